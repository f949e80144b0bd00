"""Faults on other hosts of a Ray cluster: a task on the rank's node does there what must be done.

`python -m cluster.chaos.far ADDRESS NODE PID STARTED ACT [ARGUMENT ...]` does one act and says when. It is a process of
its own, since one that is joined to a cluster dies with the Ray node it is joined by, and faults end those.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

from cluster.chaos import inject
from cluster.chaos.plan import Fault, Kind
from cluster.chaos.undo import Undos
from cluster.processes import Process, children_of, kill_tree
from diffussm.errors import ConfigError, DiffuSSMError, ExitCode

ANSWER_S = 30.0
"""Longest wait for a node to do what is asked."""
PATIENCE_S = 120.0
"""Likewise for the process that asks it, which joins the cluster first."""
GONE, AWAY = 3, 4
"""Exit codes: the process has ended; its node, or the cluster, does not answer."""


@dataclass(frozen=True)
class Far:
    """A rank's process on another host."""

    address: str
    """Of the Ray cluster."""
    node: str
    """Ray's id of its node."""
    process: Process
    """On that host."""

    lives = True
    """Not known before it is asked."""

    def make(self, fault: Fault, undos: Undos) -> float:
        """Make one fault; returns when, in seconds since 1970.

        Raises:
            ProcessLookupError: the process has ended; nothing was made.
            ConnectionError: its node does not answer.
            ConfigError: it cannot be made there, or only with `for_s`.
        """
        match fault.kind:
            case Kind.STOP_RANK:
                what = f"the stopped process {self.process.pid} of Ray's node {self.node}"
                undos.later(0, what, self._go_on)
                made = self._ask("stop")
                if fault.for_s:  # asked for now only: else it might go on before it was stopped
                    undos.later(fault.for_s, what, self._go_on)
                return made
            case Kind.CUT_NETWORK:
                if not fault.for_s:
                    raise ConfigError("plan: cut-network of a rank on another host needs for_s: nobody could mend it")
                return self._ask("cut", fault.device, str(fault.for_s))
            case Kind.KILL_RANK:
                return self._ask("kill")
            case Kind.KILL_NODE:
                return self._ask("kill_node")
            case Kind.LIMIT_MEMORY:
                return self._ask("limit_memory")
        raise ConfigError(f"plan: {fault.kind.value} is not done to a rank")

    def _go_on(self) -> None:
        try:
            self._ask("go_on")
        except ConnectionError as error:  # with its node it is gone too
            raise ProcessLookupError(str(error)) from error

    def _ask(self, act: str, *arguments: str) -> float:
        words = [self.address, self.node, str(self.process.pid), str(self.process.started), act, *arguments]
        command = [sys.executable, "-P", "-m", "cluster.chaos.far", *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)  # noqa: S603 - a list
        except subprocess.TimeoutExpired:
            raise ConnectionError(f"Ray at {self.address} does not answer") from None
        if done.returncode == GONE:
            raise ProcessLookupError(done.stderr.strip())
        if done.returncode == AWAY or done.returncode < 0:  # Ray ends a process whose own node is lost
            raise ConnectionError(done.stderr.strip()[-1000:])
        if done.returncode:
            raise ConfigError(f"plan: {act} on Ray's node {self.node} failed: {done.stderr.strip()[-1000:]}")
        return float(json.loads(done.stdout.splitlines()[-1])["made"])


def kill(process: Process) -> None:
    """On that host, as all below."""
    process.signal(signal.SIGKILL)


def stop(process: Process) -> None:
    """It stands."""
    process.signal(signal.SIGSTOP)


def go_on(process: Process) -> None:
    """It stands no more."""
    process.signal(signal.SIGCONT)


def kill_node(process: Process) -> None:
    """The raylet and all that runs below it, the process that does this among them, and last."""
    raylet = process.parent()
    others = [child for child in children_of(raylet.pid) if child != os.getpid()]
    raylet.signal(signal.SIGKILL)
    for child in others:
        kill_tree(child)
    os.kill(os.getpid(), signal.SIGKILL)


def cut(process: Process, device: str, for_s: str) -> None:
    """The link goes down and up again by a process that is no child of Ray's: the node may be given up meanwhile."""
    space = os.open(f"/proc/{process.pid}/ns/net", os.O_RDONLY)
    try:
        if not process.lives:
            raise ProcessLookupError(f"process {process.pid} has ended")
        inject.link(space, device, "up")  # it is: what may not be done, or needs a tool, is found out here
        words = [sys.executable, "-P", "-m", "cluster.chaos.far", "hold", str(space), device, for_s]
        with subprocess.Popen(  # noqa: S603 - a list
            ["/usr/bin/setsid", "--fork", *words], stdout=subprocess.PIPE, text=True, pass_fds=[space]
        ) as started:
            said = started.stdout.readline() if started.stdout else ""
    finally:
        os.close(space)
    if said != "ready\n":
        raise ConfigError(f"{device} was not cut: nobody stands ready to mend it")


def hold(space: int, device: str, for_s: float) -> int:
    """Keep a link down for so long; once it says that it is ready it depends on nobody."""
    signal.signal(signal.SIGTERM, _leave)
    with Undos() as undos:
        undos.later(0, f"link {device}", partial(inject.link, space, device, "up"))
        print("ready", flush=True)
        inject.link(space, device, "down")
        time.sleep(for_s)  # the cut itself
    for each in undos.failed:
        print(f"NOT UNDONE: {each}", file=sys.stderr)
    return int(bool(undos.failed))


ACTS = {each.__name__: each for each in (kill, stop, go_on, inject.limit_memory, kill_node, cut)}


def main(arguments: Sequence[str]) -> int:
    """Do one act on a node, or hold a link down."""
    if arguments[0] == "hold":
        return hold(int(arguments[1]), arguments[2], float(arguments[3]))
    address, node, pid, started, act, *more = arguments
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        made = _on(ray, node, act, Process(int(pid), int(started)), more)
    except ProcessLookupError as error:
        print(error, file=sys.stderr)
        return GONE
    except (ConnectionError, ray.exceptions.RayError) as error:
        print(error, file=sys.stderr)
        return AWAY
    except (DiffuSSMError, OSError) as error:
        print(error, file=sys.stderr)
        return int(ExitCode.CONFIG)
    print(json.dumps({"made": made}))
    return 0


def _on(ray: Any, node: str, act: str, process: Process, more: Sequence[str]) -> float:
    """Do it in a task there; returns when it was done, or asked for where there is no answer.

    Raises:
        ProcessLookupError: the process has ended.
        ConnectionError: the node does not answer.
        ConfigError: it cannot be done there.
    """
    from cluster.nodes import on_node

    def there(name: str, *arguments: Any) -> None:
        task = ray.remote(num_cpus=0, max_retries=0)(do).options(scheduling_strategy=on_node(node))
        ray.get(task.remote(name, process, arguments), timeout=ANSWER_S)

    try:
        there("look")
        made = time.time()
        # What ends a node, or cuts it off, may end before it has answered.
        try:
            there(act, *more)
            made = time.time()
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError:
            if act not in ("kill_node", "cut"):
                raise
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise ConnectionError(f"Ray's node {node} does not answer: {type(error).__name__}") from None
    return made


def do(name: str, process: Process, arguments: Sequence[Any]) -> None:
    """One act, on this host. Raises ProcessLookupError if the process has ended."""
    if not process.lives:
        raise ProcessLookupError(f"process {process.pid} has ended")
    if name != "look":
        ACTS[name](process, *arguments)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
