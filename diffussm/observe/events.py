"""JSONL journals of a run: `metrics.jsonl` and `events.jsonl`, on disk or in a bucket, never in the step's way."""

from __future__ import annotations

import io
import json
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffussm.checkpoint.fence import Fence
from diffussm.checkpoint.store import LocalStore, NotFound, Store
from diffussm.errors import StorageError, Superseded
from diffussm.naming import join

_LOG = logging.getLogger(__name__)

PUT_BYTES_PER_S = 50_000
"""Bytes a second that putting a journal into a bucket takes on average at most, until it is 30 MB large."""
MOST_REST_S = 600.0
"""Longest time between two puts: what a killed process can lose of a journal, at the most."""

DRIVER = "driver.jsonl"
"""Events that the driver saw: faults, decisions, warnings of any rank. Rank 0 writes events.jsonl."""


class Lines:
    """Appends lines to one key, on a thread of its own. One writer for each key; rank 0 or the driver.

    A store that is slow, full or away delays no caller: lines wait in memory. Failures to write are logged and tried
    again with the next line: training does not stop for its diary.

    With a fence, lines of an attempt that is not the newest any more are refused.
    """

    def __init__(self, store: Store, key: str, fence: Fence | None = None) -> None:
        self._key, self._fence = key, fence
        self._place = _File(store.root / key) if isinstance(store, LocalStore) else _Object(store, key)
        self._ending = threading.Event()
        self._wake: queue.Queue[bool] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name=f"journal {key}", daemon=True)
        self._thread.start()

    def append(self, line: str) -> None:
        """Append one line. Returns at once."""
        self._place.add(line.encode() + b"\n")
        self._wake.put(True)

    def end(self) -> None:
        """Let what waits be written now; no line comes any more. Returns at once."""
        if not self._ending.is_set():
            self._ending.set()
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
            self._ending.wait(self._place.rest_s)
        if not written:
            self._write("its last lines are lost")

    def _write(self, otherwise: str) -> bool:
        """Write what waits; False, with a warning, if the store refused."""
        if not self._allowed():
            return True
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


class _File:
    """Lines of a file, appended. `add` and `write` may be called by two threads."""

    rest_s = 0.0

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: deque[bytes] = deque()
        self._rest = b""
        """What is not written yet; it may begin within a line of which the disk took only a part."""
        self._is_known = False

    def add(self, line: bytes) -> None:
        self._waiting.append(line)

    def write(self) -> None:
        """Append what waits. Raises OSError; what was written until then is not written again."""
        while self._waiting:
            self._rest += self._waiting.popleft()
        if not self._rest:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b", buffering=0) as file:
            if not self._is_known and _is_torn(file):
                self._rest = b"\n" + self._rest  # else the first line would be lost with the torn one
            self._is_known = True
            while self._rest:
                self._rest = self._rest[file.write(self._rest) :]


class _Object:
    """Lines of an object in a bucket, which knows no append: the whole is put anew. Threads as for `_File`."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key
        try:
            self._lines = store.read(key).splitlines(keepends=True)
        except NotFound:
            self._lines = []
        self._size = self._put = sum(map(len, self._lines))

    @property
    def rest_s(self) -> float:
        """Seconds until the next put: the larger the journal, the rarer."""
        return min(MOST_REST_S, self._size / PUT_BYTES_PER_S)

    def add(self, line: bytes) -> None:
        self._lines.append(line)

    def write(self) -> None:
        """Put all lines. Raises StorageError."""
        data = b"".join([*self._lines])
        if len(data) == self._put:
            return
        self._size = len(data)
        self._store.write(self._key, data)
        self._put = len(data)


def _is_torn(file: io.FileIO) -> bool:
    """Whether a file ends within a line, as a full disk or the loss of a node leaves it."""
    if not file.seek(0, io.SEEK_END):
        return False
    file.seek(-1, io.SEEK_END)
    return file.read(1) != b"\n"


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


def count_lines(store: Store, key: str) -> int:
    """Lines of a journal; 0 if it is absent."""
    try:
        return store.read(key).count(b"\n")
    except NotFound:
        return 0


def read_lines(store: Store, key: str) -> tuple[list[dict[str, Any]], int]:
    """The records of a journal, and the number of its lines that are none. An absent journal is empty.

    A full disk or the loss of a node tears a line, or leaves zeros; all other lines are as good as before. What follows
    the last newline is being written at this moment, or was cut by a kill, and does not count.
    """
    try:
        lines = store.read(key).split(b"\n")[:-1]
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
