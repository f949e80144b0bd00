"""What a person reads while it runs: a live line with rate and ETA on a terminal, plain lines in a log file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

PLAIN_INTERVAL_S = 10.0
"""Least time between two plain lines of one piece of work, so that a log stays readable."""


def duration(seconds: float) -> str:
    """Seconds as `1:02:03` or `2:03`; `?` if not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Narrator:
    """Tells one command's story on standard error. Every line stands after it is said, bars are redrawn in place."""

    def __init__(self, stream: Any = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._clock = clock
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._work = ""
        self._began = self._spoke = 0.0
        self._first = 0

    def say(self, line: str) -> None:
        """One line that stays."""
        stamp = "" if self._console.is_terminal else time.strftime("%H:%M:%S ")
        self._console.print(f"{stamp}{line}", markup=False)

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
        elif done >= total or now - self._spoke >= PLAIN_INTERVAL_S:
            self._spoke = now
            self.say(f"{what}  {words}")

    def end(self) -> None:
        """Take down a bar that is shown."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._work = ""

    def hear(self, record: dict[str, Any]) -> None:
        """Show a record of the workers: kind `progress` or `event`."""
        if record["kind"] == "progress":
            loss = record["loss"]
            note = f"loss {loss:.4f}" if loss is not None else "loss not finite"
            note += f"  grad {record['grad_norm']:.3g}" if record["grad_norm"] is not None else "  grad not finite"
            note += f"  lr {record['lr']:.2g}"
            if record["nonfinite_steps"]:
                note += f"  non-finite steps {record['nonfinite_steps']}"
            self.work("train", record["images"], record["total"], "images", note, record["images_per_s"])
        elif record["kind"] == "evaluation" and "line" in record:
            self.say(f"evaluated after {record['images']:,} images: {record['line']}")
        elif record["kind"] == "event":
            details = {k: v for k, v in record.items() if k not in ("kind", "event", "attempt", "stored")}
            self.say(f"{record['event']}: " + ", ".join(f"{key} {value}" for key, value in details.items()))
