"""What this rank is doing now and for how long: marked by the loop, read by a thread that tells others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Phase(Enum):
    """Parts of a step, in their order. A rank that hangs is in an earlier one than those that wait for it."""

    START = "start"
    RESTORE = "restore"
    DATA = "data"
    FORWARD = "forward"
    BACKWARD = "backward"
    REDUCE = "reduce"
    OTHER = "other"
    """Moving averages, logging, agreement: the rest of a step."""
    SAVE = "save"
    END = "end"


@dataclass(frozen=True)
class Beat:
    """One look at a rank."""

    phase: Phase
    for_s: float
    """Seconds it has been in this phase."""
    steps: int
    """Steps completed since the start."""
    images: int
    """Images done."""
    own_s: float
    """Seconds so far in data and forward, where no other rank is waited for."""


class Phases:
    """Seconds by phase of one rank. `enter` costs two clock reads; everything else is the reader's cost."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase, self._since = Phase.START, clock()
        self._seconds = dict.fromkeys(Phase, 0.0)
        self._lock = threading.Lock()
        self.steps = 0
        self.images = 0

    def enter(self, phase: Phase) -> None:
        """Leave the present phase for this one."""
        now = self._clock()
        with self._lock:
            self._seconds[self._phase] += now - self._since
            self._phase, self._since = phase, now

    def book(self, phase: Phase, seconds: float) -> None:
        """Add seconds that passed before this object was made, such as the start of the process."""
        with self._lock:
            self._seconds[phase] += seconds

    def completed(self, images: int) -> None:
        """One step is done; `images` are done in all."""
        self.steps += 1
        self.images = images

    def resumed(self, images: int) -> None:
        """The training goes on after so many images; no step of this start is done yet."""
        self.images = images

    def seconds(self) -> dict[Phase, float]:
        """Seconds by phase until now, the present one included."""
        with self._lock:
            found = dict(self._seconds)
            found[self._phase] += self._clock() - self._since
        return found

    def beat(self) -> Beat:
        """What there is to tell now."""
        found = self.seconds()
        with self._lock:
            phase, for_s = self._phase, self._clock() - self._since
        return Beat(phase, for_s, self.steps, self.images, found[Phase.DATA] + found[Phase.FORWARD])
