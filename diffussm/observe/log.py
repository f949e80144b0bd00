"""What a person reads while it runs: a live panel or bar on a terminal, plain lines elsewhere and in a log file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from diffussm.observe.panel import Known, draw, values
from diffussm.observe.words import duration

PLAIN_INTERVAL_S = 10.0
"""Least time between two plain lines of one piece of work, so that a log stays readable."""
QUIET = ("kind", "event", "attempt", "stored")
"""Parts of an event that are not said after it."""


class Narrator:
    """Tells one command's story on standard error. Every line stands after it is said, panels are redrawn in place.

    Attributes:
        log: takes each line with its date, for a file; None for no file.
    """

    def __init__(self, stream: Any = None, clock: Callable[[], float] = time.monotonic, name: str = "") -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._clock = clock
        self.log: Callable[[str], None] | None = None
        self._known = Known(name)
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._work = ""
        self._began = self._spoke = 0.0
        self._first = 0

    def say(self, line: str) -> None:
        """One line that stays."""
        stamp = "" if self._console.is_terminal else time.strftime("%H:%M:%S ")
        self._console.print(f"{stamp}{line}", markup=False)
        self._note(line)

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
            if self._console.is_terminal:
                self._progress = Progress(
                    TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"),
                    console=self._console, transient=True,
                )  # fmt: skip
                self._progress.start()
                self._task = self._progress.add_task(what, total=total, words="")
        if rate is None:
            rate = (done - self._first) / (now - self._began) if now > self._began else 0.0
        eta = duration((total - done) / rate) if rate > 0 else "?"
        words = f"{done:,}/{total:,} {unit}  {rate:,.1f} {unit}/s  ETA {eta}{'  ' + note if note else ''}"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total, words=words)
        self._plain(what, words, now, last=done >= total, shown=self._progress is not None)

    def end(self) -> None:
        """Take down a bar or panel that is shown."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._live is not None:
            self._live.stop()
            self._live = None
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

    def _train(self) -> None:
        """Redraw the panel, and from time to time say the same in a line where there is none."""
        now = self._clock()
        if self._work != "train":
            self.end()
            self._work, self._spoke = "train", -math.inf
            if self._console.is_terminal:
                self._live = Live(
                    console=self._console, get_renderable=self._panel, refresh_per_second=2, transient=True,
                    redirect_stdout=False, redirect_stderr=False,
                )  # fmt: skip
                self._live.start()
        said, progress = values(self._known, now), self._known.progress or {}
        words = f"{said['images']}"
        for name in ("images/s", "MFU", "loss", "grad norm", "lr", "ETA", "checkpoint", "workers", "faults"):
            words += f"  {name} {said[name]}"
        self._plain("train", words, now, last=progress["images"] >= progress["total"], shown=self._live is not None)

    def _panel(self) -> RenderableType:
        return draw(self._known, self._clock(), min(self._console.width, 120))

    def _plain(self, what: str, words: str, now: float, *, last: bool, shown: bool) -> None:
        """A line of progress, not too often: to the file alone where a bar or a panel is shown."""
        if not last and now - self._spoke < PLAIN_INTERVAL_S:
            return
        self._spoke = now
        if shown:
            self._note(f"{what}  {words}")
        else:
            self.say(f"{what}  {words}")

    def _note(self, line: str) -> None:
        if self.log is not None:
            self.log(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")
