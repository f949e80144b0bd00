"""Standard error behind a thread: one that is closed, full or paused (Ctrl-S) holds up and ends nobody."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn

PATIENCE_S = 1.0
"""Longest wait for a line to be out; a screen that took longer is not waited for until it has caught up."""
MOST_WAITING = 1000
"""Lines that wait; the newest beyond these are left out and counted."""


class Screen:
    """Shows lines that stay, and below them one bar or panel that is redrawn in place.

    Attributes:
        is_terminal: whether bars and panels can be shown.
        lost: lines and drawings that were not shown.
    """

    def __init__(self, stream: Any, trouble: Callable[[str], None]) -> None:
        """`trouble` is told once why something cannot be shown."""
        self._stream = _Stream(stream)
        self._console = Console(file=self._stream, highlight=False, soft_wrap=True)  # type: ignore[arg-type]
        self.is_terminal = self._console.is_terminal
        self.lost = 0
        self._trouble, self._is_told = trouble, False
        self._waiting: deque[Callable[[], None]] = deque()
        self._change = threading.Condition()
        self._posted = self._done = 0
        self._is_late = False
        self._thread: threading.Thread | None = None
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._bar: dict[str, Any] = {}

    @property
    def width(self) -> int:
        """Columns."""
        return self._console.width

    def line(self, text: str) -> None:
        """A line that stays."""
        self._post(lambda: self._console.print(text, markup=False))

    def bar(self, what: str, total: int) -> None:
        """Show a bar."""
        self._post(lambda: self._start_bar(what, total))

    def move(self, done: int, total: int, words: str) -> None:
        """Move the bar. Never waits: of many moves in a row the last one counts."""
        is_new, self._bar = not self._bar, {"completed": done, "total": total, "words": words}
        if is_new:
            self._post(self._move, wait=False)

    def panel(self, render: Callable[[], RenderableType]) -> None:
        """Show what `render` returns, drawn anew twice a second."""
        self._post(lambda: self._start_panel(render))

    def refresh(self) -> None:
        """Draw the panel now."""
        self._post(lambda: self._live.refresh() if self._live else None)

    def end(self) -> None:
        """Take down what is shown."""
        self._post(self._take_down)

    def _post(self, show: Callable[[], None], *, wait: bool = True) -> None:
        """Have the thread do something, and wait a moment for it, so that lines keep their order among others'."""
        with self._change:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="screen", daemon=True)
                self._thread.start()
            if len(self._waiting) >= MOST_WAITING:
                self._miss("it does not take what is said")
                return
            self._waiting.append(show)
            self._posted += 1
            mine = self._posted
            self._change.notify_all()
            if wait and not self._is_late:
                self._is_late = not self._change.wait_for(lambda: self._done >= mine, PATIENCE_S)

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: bool(self._waiting))
                show = self._waiting.popleft()
            failures = self._stream.failures
            try:
                show()
                error = self._stream.error if self._stream.failures > failures else None
            except Exception as raised:  # noqa: BLE001 - a bar that cannot be drawn ends no training
                error = raised
            with self._change:
                if error is not None:
                    self._miss(f"{type(error).__name__}: {error}")
                self._done += 1
                self._is_late = self._is_late and bool(self._waiting)
                self._change.notify_all()

    def _miss(self, why: str) -> None:
        self.lost += 1
        if not self._is_told:
            self._is_told = True
            self._trouble(why)

    def _start_bar(self, what: str, total: int) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}")
        self._progress = Progress(*columns, console=self._console, transient=True)
        self._progress.start()
        self._progress.add_task(what, total=total, words="")

    def _move(self) -> None:
        latest, self._bar = self._bar, {}
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], **latest)

    def _start_panel(self, render: Callable[[], RenderableType]) -> None:
        self._live = Live(
            console=self._console, get_renderable=render, refresh_per_second=2, transient=True,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._live.start()

    def _take_down(self) -> None:
        shown, self._progress, self._live = (self._progress, self._live), None, None
        for each in shown:
            if each is not None:
                each.stop()


class _Stream:
    """A stream that counts what it cannot take instead of raising: rich would end the program, or stop drawing.

    It goes past the buffer of a stream with a descriptor: a thread that stands within that buffer lets no process end.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failures = 0
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        try:
            try:
                number = self._stream.fileno()
            except (OSError, AttributeError):  # it lives in memory
                self._stream.write(text)
                return len(text)
            data = text.encode(getattr(self._stream, "encoding", None) or "utf-8", "replace")
            while data:
                data = data[os.write(number, data) :]
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.failures += 1
            self.error = error
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
