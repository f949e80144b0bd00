"""What a person reads while it runs: a live panel or bar on a terminal, plain lines elsewhere and in a log file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import RenderableType

from diffussm.observe.panel import Known, draw, values
from diffussm.observe.scalars import is_failure
from diffussm.observe.screen import Screen
from diffussm.observe.words import duration

PLAIN_INTERVAL_S = 10.0
"""Least time between two plain lines of one piece of work, so that a log stays readable."""
QUIET = ("kind", "event", "attempt", "stored")
"""Parts of an event that are not said after it."""


class Narrator:
    """Tells one command's story on standard error. Every line stands after it is said, panels are redrawn in place.

    A standard error that is closed, full or paused costs what it does not show, and a moment once; the log goes on.

    Attributes:
        log: takes each line with its date, for a file; None for no file.
    """

    def __init__(self, stream: Any = None, clock: Callable[[], float] = time.monotonic, name: str = "") -> None:
        self._screen = Screen(stream or sys.stderr, self._trouble)
        self._clock = clock
        self.log: Callable[[str], None] | None = None
        self._known = Known(name)
        self._work = ""
        self._began = self._spoke = 0.0
        self._first = self._missed = 0

    def say(self, line: str) -> None:
        """One line that stays."""
        stamp = "" if self._screen.is_terminal else time.strftime("%H:%M:%S ")
        self._note(line)
        self._screen.line(f"{stamp}{line}")

    def work(
        self, what: str, done: int, total: int, unit: str, note: str = "", rate: float | None = None
    ) -> None:  # fmt: skip
        """Progress of `what`: done of total units, with rate and ETA. Call it as often as you like.

        Without a `rate` (units a second) it is taken from the time since the first call.
        """
        now = self._clock()
        if what != self._work:
            self.end()
            self._work, self._began, self._first, self._spoke = what, now, done, -math.inf
            if self._screen.is_terminal:
                self._screen.bar(what, total)
        if rate is None:
            rate = (done - self._first) / (now - self._began) if now > self._began else 0.0
        eta = duration((total - done) / rate) if rate > 0 else "?"
        words = f"{done:,}/{total:,} {unit}  {rate:,.1f} {unit}/s  ETA {eta}{'  ' + note if note else ''}"
        if self._screen.is_terminal:
            self._screen.move(done, total, words)
        self._plain(what, words, now, last=done >= total)

    def end(self) -> None:
        """Take down a bar or panel that is shown."""
        if self._work and self._screen.is_terminal:
            self._screen.end()
        if self._screen.lost > self._missed:
            self._missed = self._screen.lost
            self._note(f"standard error has not shown {self._missed:,} lines and drawings so far")
        self._work = ""

    def hear(self, record: dict[str, Any]) -> None:
        """Show a record: of kind `progress` in the panel, an `event` or `evaluation` as a line."""
        self._known = self._known.hear(record, self._clock())
        match record["kind"]:
            case "progress":
                self._train()
            case "evaluation" if "line" in record:
                self.say(f"evaluated after {record['images']:,} images: {record['line']}")
            case "event":
                details = {key: value for key, value in record.items() if key not in QUIET}
                self.say(f"{record['event']}: " + ", ".join(f"{key} {value}" for key, value in details.items()))

    def recall(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Know the failures that earlier starts wrote down, without saying them again."""
        for record in filter(is_failure, records):
            self._known = self._known.hear({"kind": "event"} | dict(record), self._clock())

    def _train(self) -> None:
        """Redraw the panel, and from time to time say the same in a line where there is none."""
        now = self._clock()
        if self._work != "train":
            self.end()
            self._work, self._spoke = "train", -math.inf
            if self._screen.is_terminal:
                self._screen.panel(self._panel)
        said, progress = values(self._known, now), self._known.progress or {}
        words = f"{said['images']}"
        for name in ("images/s", "MFU", "loss", "grad norm", "lr", "ETA", "checkpoint", "workers", "faults"):
            words += f"  {name} {said[name]}"
        self._plain("train", words, now, last=progress["images"] >= progress["total"])

    def _panel(self) -> RenderableType:
        return draw(self._known, self._clock(), min(self._screen.width, 120))

    def _plain(self, what: str, words: str, now: float, *, last: bool) -> None:
        """A line of progress, not too often: to the file alone where a bar or a panel is shown."""
        if not last and now - self._spoke < PLAIN_INTERVAL_S:
            return
        self._spoke = now
        if self._screen.is_terminal:
            self._note(f"{what}  {words}")
        else:
            self.say(f"{what}  {words}")

    def _trouble(self, why: str) -> None:
        self._note(f"standard error does not show everything: {why}")

    def _note(self, line: str) -> None:
        if self.log is not None:
            self.log(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")
