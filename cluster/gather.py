"""`python -m cluster.gather --address A --nodes N --timeout S`: wait until N nodes have joined a Ray cluster.

Exit code 0 when they are there; 76, with the names of those that are, when they are not in time.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence

from diffussm.errors import ExitCode

LOOK_S = 0.5


def gather(look: Callable[[], Sequence[str]], nodes: int, timeout_s: float, clock: Callable[[], float]) -> list[str]:
    """Look at the hosts that are alive until there are `nodes` of them, or until `timeout_s`; returns the last look."""
    deadline = clock() + timeout_s
    while True:
        alive = sorted(look())
        if len(alive) >= nodes or clock() >= deadline:
            return alive
        time.sleep(LOOK_S)


def main(arguments: Sequence[str] | None = None) -> int:
    """Wait, say who is there, return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cluster.gather", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--address", required=True, help="host:port of the Ray head")
    parser.add_argument("--nodes", type=int, required=True, help="nodes to wait for")
    parser.add_argument("--timeout", type=float, required=True, help="seconds to wait")
    asked = parser.parse_args(arguments)
    import ray

    ray.init(address=asked.address, log_to_driver=False, logging_level=logging.WARNING)
    try:
        alive = gather(_alive, asked.nodes, asked.timeout, time.monotonic)
    finally:
        ray.shutdown()
    if len(alive) >= asked.nodes:
        return int(ExitCode.DONE)
    print(
        f"diffussm: {len(alive)} of {asked.nodes} nodes joined within {asked.timeout:g} s: {', '.join(alive)}",
        file=sys.stderr,
    )
    return int(ExitCode.INFRASTRUCTURE)


def _alive() -> list[str]:
    import ray

    return [str(node["NodeManagerHostname"]) for node in ray.nodes() if node["Alive"]]


if __name__ == "__main__":
    sys.exit(main())
