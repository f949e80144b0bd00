"""Processes of this host, told apart by when they started: a number alone may be another process's by now."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

ENDED = frozenset("ZX")
"""States of a process that has ended and is only still listed."""


@dataclass(frozen=True)
class Process:
    """One process. What is done to it raises ProcessLookupError once it has ended, whoever has its number then."""

    pid: int
    started: int
    """Clock ticks from the host's start to its own."""

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process that has this number now.

        Raises:
            ProcessLookupError: none has, or it is one that must not be touched (0 is the caller's group, 1 is init).
        """
        if pid <= 1:
            raise ProcessLookupError(f"{pid} is no process to be touched")
        return cls(pid, int(_stat(pid)[19]))

    @property
    def lives(self) -> bool:
        """Whether it is still there; a stopped one is."""
        try:
            return Process.of(self.pid) == self
        except ProcessLookupError:
            return False

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            raise
        except (AttributeError, OSError):  # an old kernel, or a filter of system calls: the start alone must do
            if not self.lives:
                raise ProcessLookupError(f"process {self.pid} has ended") from None
            os.kill(self.pid, number)
            return
        try:
            if not self.lives:  # looked at while the handle keeps the number from meaning another
                raise ProcessLookupError(f"process {self.pid} has ended")
            signal.pidfd_send_signal(handle, number)
        finally:
            os.close(handle)

    def parent(self) -> Process:
        """The process that started it: of a Ray worker, the node's raylet."""
        found = Process.of(int(_stat(self.pid)[1]))
        if not self.lives:
            raise ProcessLookupError(f"process {self.pid} has ended")
        return found

    def kill_tree(self) -> None:
        """SIGKILL it and all that it started, the parents first so that nothing is started anew."""
        children = children_of(self.pid)
        self.signal(signal.SIGKILL)
        for child in children:
            kill_tree(child)


def parent_of(pid: int) -> int:
    """The number of the process that started `pid`."""
    return Process.of(pid).parent().pid


def children_of(pid: int) -> list[int]:
    """Processes that any thread of `pid` started."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, file.read_text().split())
        except OSError:  # the thread has ended
            continue
    return found


def kill_tree(pid: int) -> None:
    """As `Process.kill_tree`; of what has ended nothing is left to do."""
    try:
        Process.of(pid).kill_tree()
    except ProcessLookupError:
        return


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on, which is the state."""
    try:
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        fields = ["X"]
    if fields[0] in ENDED:
        raise ProcessLookupError(f"process {pid} has ended")
    return fields
