"""Makes faults on this host: signals, limits, links and disks. What is undone later is undone from a thread."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from cluster.chaos.plan import Fault, Kind

HEADROOM_BYTES = 4 << 20
"""Memory that a rank may still allocate under LIMIT_MEMORY."""
LEFT_BYTES = 1 << 20
"""Room that FILL_DISK leaves, less than any checkpoint needs."""


def inject(fault: Fault, ranks: Mapping[int, int], driver: int, rank: int) -> None:
    """Make one fault.

    Args:
        fault: what to do.
        ranks: process id of each rank, all of them on this host.
        driver: process id of the driver.
        rank: the rank it hits.
    """
    pid = ranks.get(rank, 0)
    match fault.kind:
        case Kind.KILL_RANK:
            os.kill(pid, signal.SIGKILL)
        case Kind.STOP_RANK:
            stop(pid, fault.for_s)
        case Kind.KILL_NODE:
            kill_tree(parent_of(pid))
        case Kind.LIMIT_MEMORY:
            limit_memory(pid)
        case Kind.WARN:
            os.kill(driver, signal.SIGTERM)
            later(fault.for_s, lambda: kill_tree(driver) if driver in children_of(os.getpid()) else None)
        case Kind.CUT_NETWORK:
            link(pid, fault.device, "down")
            if fault.for_s:
                later(fault.for_s, lambda: link(pid, fault.device, "up"))
        case Kind.FILL_DISK:
            fill(Path(fault.folder), fault.for_s)
        case Kind.STOP_PROCESS:
            stop(int(Path(fault.pid_file).read_text()), fault.for_s)
        case Kind.COMMAND:
            run(fault.command)
            if fault.undo:
                later(fault.for_s, lambda: run(fault.undo))


def stop(pid: int, for_s: float) -> None:
    """SIGSTOP, and SIGCONT after `for_s` seconds unless that is 0."""
    os.kill(pid, signal.SIGSTOP)
    if for_s:
        later(for_s, lambda: _signal(pid, signal.SIGCONT))


def parent_of(pid: int) -> int:
    """The process that started `pid`: of a Ray worker, the node's raylet."""
    return int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])


def children_of(pid: int) -> list[int]:
    """Processes that `pid` started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has ended
        return []


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all that it started, the parents first so that nothing is started anew."""
    children = children_of(pid)
    _signal(pid, signal.SIGKILL)
    for child in children:
        kill_tree(child)


def limit_memory(pid: int) -> None:
    """Let a process allocate no more than a few megabytes beyond what it has."""
    pages = int(Path("/proc", str(pid), "statm").read_text().split()[0])
    most = pages * resource.getpagesize() + HEADROOM_BYTES
    resource.prlimit(pid, resource.RLIMIT_AS, (most, most))


def link(pid: int, device: str, state: str) -> None:
    """Set a link up or down in the network namespace of a process."""
    run(("nsenter", "-t", str(pid), "-n", "ip", "link", "set", device, state))


def fill(folder: Path, for_s: float) -> None:
    """Fill the file system of `folder` for `for_s` seconds."""
    file = folder / f"diffussm-chaos-{os.getpid()}"
    with file.open("wb") as body:
        os.posix_fallocate(body.fileno(), 0, max(1, shutil.disk_usage(folder).free - LEFT_BYTES))
    later(for_s, lambda: file.unlink(missing_ok=True))


def run(command: tuple[str, ...]) -> None:
    """Run a command of the plan; raises CalledProcessError if it fails."""
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - the user's own words, and no shell


def later(seconds: float, undo: Callable[[], None]) -> None:
    """Call `undo` from a thread after some seconds."""
    timer = threading.Timer(seconds, undo)
    timer.daemon = True
    timer.start()


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it has ended: nothing is left to do
        return
