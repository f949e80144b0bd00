"""How fast it goes and how long it will take, from a clock that is handed in."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """Rate since the last reading and time to go at the rate since the start."""

    rate: float
    """Images a second since the last reading."""
    eta_s: float
    """Seconds until `total` at the average rate since the meter was made."""


class Meter:
    """Measures images a second between readings. Local, no threads."""

    def __init__(self, done: int, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._total = clock, total
        self._first = self._last = (done, clock())

    def read(self, done: int) -> Reading:
        """Rate and ETA when `done` images are done."""
        now = self._clock()
        rate = (done - self._last[0]) / max(now - self._last[1], 1e-9)
        average = (done - self._first[0]) / max(now - self._first[1], 1e-9)
        self._last = (done, now)
        return Reading(rate, (self._total - done) / average if average > 0 else float("inf"))
