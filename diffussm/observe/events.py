"""JSONL journals of a run: `metrics.jsonl` and `events.jsonl`, on disk or in a bucket, never in the step's way."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from typing import Any

from diffussm.checkpoint.fence import Fence
from diffussm.checkpoint.store import LocalStore, NotFound, Store
from diffussm.errors import StorageError, Superseded

_LOG = logging.getLogger(__name__)

DRIVER = "driver.jsonl"
"""Events that the driver saw: faults, decisions, warnings of any rank. Rank 0 writes events.jsonl."""


class Lines:
    """Appends lines to one key. One writer for each key; rank 0 or the driver.

    On disk a line is appended at once. A bucket knows no append: there a thread puts the whole file anew, the
    latest state only, so that a slow store delays no caller; `close` waits for the last put. Failures to write
    are logged and retried with the next line: training does not stop for its diary.

    With a fence, lines of an attempt that is not the newest any more are refused. `rest_s` seconds at least lie between
    two puts into a bucket.
    """

    def __init__(self, store: Store, key: str, fence: Fence | None = None, rest_s: float = 0.0) -> None:
        self._store, self._key, self._fence, self._rest_s = store, key, fence, rest_s
        self._closing = threading.Event()
        self._local = store.root / key if isinstance(store, LocalStore) else None
        if self._local is not None:
            self._local.parent.mkdir(parents=True, exist_ok=True)
            return
        try:
            self._lines = store.read(key).splitlines()
        except NotFound:
            self._lines = []
        self._wake: queue.Queue[bool] = queue.Queue()
        self._thread = threading.Thread(target=self._put_latest, name=f"journal {key}", daemon=True)
        self._thread.start()

    def append(self, line: str) -> None:
        """Append one line."""
        if self._local is not None:
            if not self._allowed():
                return
            try:
                with self._local.open("a") as file:
                    file.write(line + "\n")
            except OSError as error:
                _LOG.warning("%s: a line was not written: %s", self._local, error)
            return
        self._lines.append(line.encode())
        self._wake.put(True)

    def close(self, timeout_s: float = 60.0) -> None:
        """Wait until everything is in the store."""
        self._closing.set()
        if self._local is None:
            self._wake.put(False)
            self._thread.join(timeout_s)

    def _allowed(self) -> bool:
        """Whether this attempt may still write. A store that does not answer is met again by the write itself."""
        try:
            if self._fence is not None:
                self._fence.check()
        except Superseded as error:
            _LOG.info("%s: a line of an old attempt is left out: %s", self._key, error.message)
            return False
        except StorageError:
            return True
        return True

    def _put_latest(self) -> None:
        more, written = True, True
        while more:
            more = self._wake.get()
            while more:  # many lines at once are one put
                try:
                    more = self._wake.get_nowait()
                except queue.Empty:
                    break
            written = self._put("it is tried again with the next line")
            self._closing.wait(self._rest_s)
        if not written:
            self._put("its last lines are lost")

    def _put(self, otherwise: str) -> bool:
        """Put the whole file; False, with a warning, if the store refused."""
        if not self._allowed():
            return True
        try:
            self._store.write(self._key, b"\n".join([*self._lines, b""]))
        except StorageError as error:
            _LOG.warning("%s was not written, %s: %s", self._key, otherwise, error)
            return False
        return True


class Journal(Lines):
    """Lines that are JSON objects."""

    def write(self, record: dict[str, Any]) -> None:
        """Append one object; `time` (seconds since 1970) is added."""
        self.append(json.dumps({"time": round(time.time(), 3)} | record, default=str))


def count_lines(store: Store, key: str) -> int:
    """Lines of a journal; 0 if it is absent."""
    try:
        return store.read(key).count(b"\n")
    except NotFound:
        return 0


def read_journal(store: Store, key: str) -> list[dict[str, Any]]:
    """All whole lines of a journal; a last line cut by a kill is left out. An absent journal is empty."""
    try:
        text = store.read(key).decode()
    except NotFound:
        return []
    lines = text.split("\n")[:-1]  # what follows the last newline was cut off
    return [json.loads(line) for line in lines if line]
