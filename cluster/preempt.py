"""Warnings that the job must go: signals to the driver, drained nodes, a notice file. All become one wish."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from diffussm.errors import Preempted
from diffussm.train.control import Level, Wish

if TYPE_CHECKING:
    from cluster.nodes import Node  # this module is read before Ray may be imported

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

ASKED, AGAIN = "asked to leave", "start the same command again: it goes on where it was"
"""What is said when a stage ends for a warning."""

UNKNOWN_DEADLINE_S = 30.0
"""Time to save when a drain names no deadline."""


def of_drained(
    found: Iterable[Node], used: Collection[str], home: str, fits: Callable[[list[Node]], bool], now: float
) -> Wish:
    """What follows from drained nodes. Pure.

    Args:
        found: all nodes.
        used: ids of nodes that hold ranks.
        home: id of the driver's node, without which no group lives.
        fits: whether these nodes can hold a group that the config allows.
        now: seconds since 1970.

    Only the driver's node and those that hold ranks matter. When the driver stays and the other nodes could hold a
    group, the ranks move there; else the whole job leaves.
    """
    every = list(found)
    going = [node for node in every if node.alive and node.drain_deadline_s is not None]
    ours = [node for node in going if node.id in used or node.id == home]
    if not ours:
        return Wish()
    deadline_s = min((node.drain_deadline_s or now + UNKNOWN_DEADLINE_S) for node in ours)
    staying = [node for node in every if node.alive and node.drain_deadline_s is None]
    names = ", ".join(node.address for node in ours)
    if home not in {node.id for node in ours} and staying and fits(staying):
        return Wish(Level.MOVE, deadline_s, f"node {names} is drained")
    return Wish(Level.LEAVE, deadline_s, f"no place is left, drained: {names}")


def of_notice(path: str, grace_s: float, now: float) -> Wish:
    """The wish of a notice file, if it is there."""
    if path and Path(path).exists():
        return Wish(Level.LEAVE, now + grace_s, f"notice file {path}")
    return Wish()


@dataclass
class Warnings:
    """Signals to this process. The first asks to leave; while nobody listens it ends the stage that runs.

    A second warning of another kind changes nothing: the first deadline stands.
    """

    grace_s: float
    wish: Wish = field(default_factory=Wish)
    heard_by_training: bool = False
    installed: bool = False

    def install(self) -> None:
        """Take over the signals. Only in a process's main thread."""
        self.installed = True
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def take_back(self) -> None:
        """Take over the signals again, if they were ours: `ray.init` takes SIGTERM."""
        if self.installed:
            self.install()

    @contextmanager
    def through_ray(self) -> Iterator[None]:
        """Around calls of Ray in the main thread: what our handler raises in one comes out of it as a SystemError.

        Raises:
            Preempted: the signal's, if that was so.
        """
        try:
            yield
        except SystemError as error:
            if isinstance(error.__cause__, Preempted):
                raise error.__cause__ from error
            raise

    def check(self) -> None:
        """End the job here if it was asked to leave while no rank could do so: before the first step, after the last.

        Raises:
            Preempted: it was.
        """
        if self.wish.level is Level.LEAVE:
            raise Preempted(f"{self.wish.reason}: {ASKED}", AGAIN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.wish.level is Level.NONE:
            self.wish = Wish(Level.LEAVE, time.time() + self.grace_s, f"{name} to the driver")
        if not self.heard_by_training:
            raise Preempted(f"{name}: {ASKED}", AGAIN)
