"""What undoes a fault: after its time, and at the latest when the tool ends, however it ends."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass

from diffussm.errors import DiffuSSMError


@dataclass(eq=False)
class _Undo:
    what: str
    act: Callable[[], None]


class Undos:
    """Pending undos; leaving the context makes all of them."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        """What could not be undone, for people."""
        self._lock = threading.Lock()
        self._pending: list[_Undo] = []
        self._timers: list[threading.Timer] = []

    def __enter__(self) -> Undos:
        return self

    def __exit__(self, *_: object) -> None:
        for timer in self._timers:
            timer.cancel()
        for undo in reversed(list(self._pending)):
            self._make(undo)
        for timer in self._timers:  # one may be at work
            timer.join()

    def later(self, seconds: float, what: str, act: Callable[[], None]) -> None:
        """Call `act` from a thread after some seconds; with 0 only at the end.

        Ask for it before the fault is made, so that an interruption between the two leaves nothing broken: `act` must
        bear that there is nothing to undo.
        """
        undo = _Undo(what, act)
        self._pending.append(undo)
        if seconds:
            timer = threading.Timer(seconds, self._make, (undo,))
            timer.daemon = True
            self._timers.append(timer)
            timer.start()

    def _make(self, undo: _Undo) -> None:
        with self._lock:
            if undo not in self._pending:
                return
            self._pending.remove(undo)
        try:
            undo.act()
        except ProcessLookupError:  # what it was done to has ended
            return
        except (OSError, subprocess.SubprocessError, DiffuSSMError) as error:
            self.failed.append(f"{undo.what}: {error}")
