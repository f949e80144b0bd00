"""`python -m cluster.chaos.beats [--seconds S] [--interval S]`: processor time of heartbeats, phases and the ledger.

A rank that does nothing is measured with its pulse and without it, in turns, so that what Ray's own threads take is not
counted. Phases and the ledger are timed by many calls. Nothing here trains.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROUNDS = 5
PHASES_PER_STEP = 8
"""Calls of `Phases.enter` in a step of one micro batch, with some to spare."""
CALLS = 20_000


@dataclass(frozen=True)
class Cost:
    """What watching takes of a rank."""

    beat_share: float
    """Processor seconds of heartbeats a second: median over the rounds."""
    beat_low: float
    beat_high: float
    phases_s: float
    """Seconds of a step's phases."""
    line_s: float
    """Seconds of a line of the ledger in a local folder, written on rank 0 each `train.log_images`."""


class Rank:
    """A Ray worker's place that beats or only waits."""

    def waits(self, seconds: float) -> float:
        """Processor seconds of this process while it waits."""
        began = time.process_time()
        time.sleep(seconds)
        return time.process_time() - began

    def beats(self, hub: Any, seconds: float, interval_s: float) -> float:
        """The same with a pulse, whose start and end are left out."""
        from cluster.pulse import Pulse
        from cluster.standby import Standby
        from diffussm.config.schema import ClusterConfig
        from diffussm.train.control import Control

        cfg = ClusterConfig(heartbeat_interval_s=interval_s)
        with tempfile.TemporaryDirectory() as folder:
            pulse = Pulse(hub, 0, Control(), cfg, Path(folder, "stacks.txt"), Standby(wanted=False))
            pulse.start()
            spent = self.waits(seconds)
            pulse.stop()
        return spent


def measure(seconds: float, interval_s: float, rounds: int = ROUNDS) -> Cost:
    """Measure in a Ray cluster that is connected already.

    Args:
        seconds: how long each side is watched in each round.
        interval_s: `cluster.heartbeat_interval_s`.
        rounds: turns of both sides.
    """
    import ray

    from cluster import hub
    from diffussm.checkpoint.store import open_store
    from diffussm.observe.goodput import Ledger
    from diffussm.train.phases import Phase, Phases

    kind: Any = ray.remote(num_cpus=0)(Rank)
    rank, channel = kind.remote(), hub.make()
    ray.get(channel.begin.remote(1))
    ray.get(rank.beats.remote(channel, 0.1, 0.05))  # imports
    shares = []
    for _ in range(rounds):
        still = ray.get(rank.waits.remote(seconds))
        shares.append((ray.get(rank.beats.remote(channel, seconds, interval_s)) - still) / seconds)
    ray.kill(rank)
    ray.kill(channel)
    phases = Phases()
    began = time.perf_counter()
    for number in range(CALLS):
        phases.enter(Phase.DATA if number % 2 else Phase.FORWARD)
    phase_s = (time.perf_counter() - began) / CALLS
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(open_store(str(Path(folder, "run"))), 1)
        began = time.perf_counter()
        for number in range(CALLS // 20):
            ledger.step(number, {"data": float(number), "forward": float(number)})
        line_s = (time.perf_counter() - began) / (CALLS // 20)
        ledger.close()
    return Cost(statistics.median(shares), min(shares), max(shares), PHASES_PER_STEP * phase_s, line_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """Start Ray here, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m cluster.chaos.beats", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each side in each round")
    parser.add_argument("--interval", type=float, default=1.0, help="cluster.heartbeat_interval_s")
    asked = parser.parse_args(arguments)
    from cluster import env
    from diffussm.config.schema import Config

    given = env.apply(Config(name="beats"))  # before Ray is imported, which reads its way of authentication then
    import ray

    ray.init(address="local", num_cpus=1, runtime_env={"env_vars": given}, log_to_driver=False, logging_level=30)
    cost = measure(asked.seconds, asked.interval)
    ray.shutdown()
    print(
        f"heartbeats each {asked.interval:g} s: {cost.beat_share:.2%} of one core "
        f"({cost.beat_low:.2%} to {cost.beat_high:.2%}); phases: {1e6 * cost.phases_s:.0f} us a step; "
        f"ledger: {1e3 * cost.line_s:.2f} ms a logged line"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
