"""JSONL journals of a run: `metrics.jsonl` and `events.jsonl`, on disk or in a bucket, never in the step's way."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from diffussm.checkpoint.fence import Fence
from diffussm.checkpoint.store import LocalStore, NotFound, Store
from diffussm.errors import StorageError, Superseded
from diffussm.naming import join
from diffussm.observe.appended import File, Object, read_all

_LOG = logging.getLogger(__name__)

DRIVER = "driver.jsonl"
"""Events that the driver saw: faults, decisions, warnings of any rank. Rank 0 writes events.jsonl."""


class Lines:
    """Appends lines to one key, on a thread of its own. One writer for each key; rank 0 or the driver.

    A store that is slow, full or away delays no caller: lines wait in memory. Failures to write are logged and tried
    again with the next line: training does not stop for its diary. A process that is killed loses the lines of the last
    moment, in a bucket of up to 10 s; those that must not be lost are flushed.

    With a fence, lines of an attempt that is not the newest any more are refused.
    """

    def __init__(self, store: Store, key: str, fence: Fence | None = None) -> None:
        self._key, self._fence = key, fence
        self._place = File(store.root / key) if isinstance(store, LocalStore) else Object(store, key)
        self._ending, self._hurry = threading.Event(), threading.Event()
        self._changed = threading.Condition()
        self._appended = self._stored = self._failures = 0
        self._wake: queue.Queue[bool] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name=f"journal {key}", daemon=True)
        self._thread.start()

    def append(self, line: str) -> None:
        """Append one line. Returns at once."""
        self._place.add(line.encode() + b"\n")
        with self._changed:
            self._appended += 1
        self._wake.put(True)

    def hurry(self) -> None:
        """Let what waits be written now, whatever the store has rested. Returns at once."""
        self._hurry.set()
        self._wake.put(True)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all lines so far are in the store, for at most `timeout_s`; whether they are."""
        with self._changed:
            appended, failures = self._appended, self._failures
        self.hurry()
        with self._changed:
            self._changed.wait_for(lambda: self._stored >= appended or self._failures > failures, timeout_s)
            return self._stored >= appended

    def end(self) -> None:
        """Let what waits be written now; no line comes any more. Returns at once."""
        if not self._ending.is_set():
            self._ending.set()
            self._hurry.set()
            self._wake.put(False)

    def close(self, timeout_s: float = 60.0) -> None:
        """End, and wait until everything is in the store, for at most `timeout_s`."""
        self.end()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            _LOG.warning("%s: its last lines were not written within %.3g s and may be lost", self._key, timeout_s)

    def _run(self) -> None:
        more, written = True, True
        while more:
            more = self._wake.get()
            while more:  # many lines at once are one write
                try:
                    more = self._wake.get_nowait()
                except queue.Empty:
                    break
            written = self._write("it is tried again with the next line")
            if not self._ending.is_set():
                self._hurry.wait(self._place.rest_s)
                self._hurry.clear()
        if not written:
            self._write("its last lines are lost")

    def _write(self, otherwise: str) -> bool:
        """Write what waits; False, with a warning, if the store refused."""
        with self._changed:
            appended = self._appended
        written = not self._allowed() or self._try_to_write(otherwise)
        with self._changed:
            if written:
                self._stored = appended
            else:
                self._failures += 1
            self._changed.notify_all()
        return written

    def _try_to_write(self, otherwise: str) -> bool:
        try:
            self._place.write()
        except (StorageError, OSError) as error:
            _LOG.warning("%s was not written, %s: %s", self._key, otherwise, error)
            return False
        return True

    def _allowed(self) -> bool:
        """Whether this attempt may still write. A store that does not answer is met again by the write itself."""
        try:
            if self._fence is not None:
                self._fence.check()
        except Superseded as error:
            _LOG.info("%s: lines of an old attempt are left out: %s", self._key, error.message)
            return False
        except StorageError:
            return True
        return True


class Journal(Lines):
    """Lines that are JSON objects."""

    def write(self, record: dict[str, Any]) -> None:
        """Append one object; `time` (seconds since 1970) is added."""
        self.append(json.dumps({"time": round(time.time(), 3)} | record, default=str))


def close(journals: Sequence[Lines], timeout_s: float) -> None:
    """Close journals, all of them within `timeout_s`; none uses up the time of another."""
    end = time.monotonic() + timeout_s
    for journal in journals:
        journal.end()
    for journal in journals:
        journal.close(max(0.0, end - time.monotonic()))


def flush(journals: Sequence[Lines], timeout_s: float) -> bool:
    """Wait until all lines so far of all these journals are stored, for at most `timeout_s`; whether they are."""
    end = time.monotonic() + timeout_s
    for journal in journals:
        journal.hurry()
    stored = [journal.flush(max(0.0, end - time.monotonic())) for journal in journals]
    return all(stored)


def count_lines(store: Store, key: str) -> int:
    """Lines of a journal; 0 if it is absent."""
    try:
        return read_all(store, key).count(b"\n")
    except NotFound:
        return 0


def read_lines(store: Store, key: str) -> tuple[list[dict[str, Any]], int]:
    """The records of a journal, and the number of its lines that are none. An absent journal is empty.

    A full disk or the loss of a node tears a line, or leaves zeros; all other lines are as good as before. What follows
    the last newline is being written at this moment, or was cut by a kill, and does not count.
    """
    try:
        lines = read_all(store, key).split(b"\n")[:-1]
    except NotFound:
        return [], 0
    found, torn = [], 0
    for line in filter(None, lines):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            found.append(record)
        else:
            torn += 1
    return found, torn


def read_journal(store: Store, key: str) -> list[dict[str, Any]]:
    """The records of a journal, as `read_lines`; lines that are none are left out with a warning."""
    found, torn = read_lines(store, key)
    if torn:
        _LOG.warning("%s: %d torn line(s) are left out", join(store.url, key), torn)
    return found
