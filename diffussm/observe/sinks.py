"""Where records of a run go besides its own journals, each on a thread of its own that nobody waits for.

A sink that is down, slow or broken loses its own records and tells so; it delays no step and stops no run. The records
themselves are in the run's JSONL journals in any case.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

Record = Mapping[str, Any]
Tell = Callable[[str], None]

MOST_WAITING = 4096
"""Records that wait for a sink; the newest beyond these are left out and counted."""
MOST_FAILURES = 5
"""Records in a row that a sink may refuse before it is given up for this start."""


class Backend(Protocol):
    """One service. All of it is called on the sink's thread."""

    def take(self, record: Record) -> None:
        """Pass on one record; may be slow, may raise anything."""

    def close(self) -> None:
        """Finish; may be slow, may raise anything."""


class Sink:
    """A bounded queue and the thread that empties it into one service.

    Attributes:
        open: set once the service is connected, or has failed to be.
    """

    def __init__(
        self, name: str, make: Callable[[], Backend], tell: Tell, abandon: Callable[[], object] = lambda: None
    ) -> None:  # fmt: skip
        """Begin.

        Args:
            name: of the service, for people.
            make: connects; called on the sink's thread, because it may take long and may fail.
            tell: says a line to a person.
            abandon: called when the sink's thread did not end in time: ends what else would keep the process up.
        """
        self.name, self._make, self._say, self._abandon = name, make, tell, abandon
        self._waiting: deque[Record] = deque()
        self._change = threading.Condition()
        self._closing = self._dead = self._left = False
        self._left_out = 0
        self.open = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"sink {name}", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Queue one record. Returns at once and never raises."""
        with self._change:
            if self._dead or self._closing:
                return
            if len(self._waiting) >= MOST_WAITING:
                self._left_out += 1
                first = self._left_out == 1
            else:
                self._waiting.append(record)
                first = False
                self._change.notify()
        if first:
            self._tell(f"{self.name} does not keep up: records are left out there; the run's journals have all")

    def end(self) -> None:
        """Let what waits be sent and the service be finished; no record comes any more. Returns at once."""
        with self._change:
            self._closing = True
            self._change.notify()

    def close(self, timeout_s: float = 15.0) -> None:
        """End, and wait until that is done, for at most `timeout_s`; then go on without the service."""
        self.end()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._tell(f"{self.name} did not finish within {timeout_s:.3g} s and is left alone")
            self._left = True
            self._abandon()
        if self._left_out:
            self._say(f"{self.name}: {self._left_out:,} records were left out in all")

    def _run(self) -> None:
        try:
            backend = self._make()
        except BaseException as error:  # noqa: BLE001 - some services end the program: training goes on without them
            self._give_up(f"{self.name} is not available and is left out of this start: {_said(error)}")
            return
        finally:
            self.open.set()
        failures = 0
        while (record := self._next()) is not None:
            try:
                backend.take(record)
                failures = 0
            except BaseException as error:  # noqa: BLE001 - as above
                failures += 1
                if failures == 1:
                    self._tell(f"{self.name} refused a record: {_said(error)}")
                if failures >= MOST_FAILURES:
                    self._give_up(f"{self.name} refused {failures} records in a row and is left out of this start")
                    break
        try:
            backend.close()
        except BaseException as error:  # noqa: BLE001 - as above
            self._tell(f"{self.name} did not finish well: {_said(error)}")

    def _next(self) -> Record | None:
        """The next record, waiting for it; None when the sink is closed and empty."""
        with self._change:
            while not self._waiting and not self._closing:
                self._change.wait()
            return self._waiting.popleft() if self._waiting else None

    def _tell(self, line: str) -> None:
        """Say a line, unless the sink was left alone: what comes then is no news."""
        if not self._left:
            self._say(line)

    def _give_up(self, why: str) -> None:
        with self._change:
            self._dead = True
            self._waiting.clear()
        self._tell(why)


def _said(error: BaseException) -> str:
    """An error in one short line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."
