"""Where lines are appended: to a file, or in a bucket, which knows no append, to one object after another."""

from __future__ import annotations

import io
from collections import deque
from itertools import count
from pathlib import Path

from diffussm.checkpoint.store import NotFound, Store

SEGMENT_BYTES = 512 << 10
"""Size from which an object is left as it is and the next one begun, so that no put grows with the journal."""
PUT_BYTES_PER_S = 50_000
"""Bytes a second that putting a journal into a bucket takes on average at most."""


def segment(key: str, number: int) -> str:
    """The key of a journal's object: its own name, then numbers behind it."""
    return f"{key}.{number:06d}" if number else key


def last_segment(store: Store, key: str) -> int:
    """The number of a journal's newest object; 0 also if there is none."""
    return next(number for number in count() if not store.exists(segment(key, number + 1)))


def read_all(store: Store, key: str) -> bytes:
    """All of a journal. Raises NotFound if there is none."""
    parts = [store.read(key)]
    for number in count(1):
        try:
            parts.append(store.read(segment(key, number)))
        except NotFound:
            break
    return b"".join(parts)


def read_end(store: Store, key: str, size: int) -> bytes:
    """The last bytes of a journal's newest object, from the beginning of a line on, at most `size`. Raises NotFound."""
    key = segment(key, last_segment(store, key))
    whole = store.size(key)
    start = max(0, whole - size)
    data = store.read_range(key, start, whole - start)
    return data.partition(b"\n")[2] if start else data


class File:
    """Lines of a file, appended. `add` and `write` may be called by two threads."""

    rest_s = 0.0

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: deque[bytes] = deque()
        self._rest = b""
        """What is not written yet; it may begin within a line of which the disk took only a part."""
        self._is_known = False

    def add(self, line: bytes) -> None:
        """Take a line, with its end, to be written."""
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


class Object:
    """Lines of an object in a bucket: put whole, until it is large and the next one is begun. Threads as for `File`."""

    def __init__(self, store: Store, key: str) -> None:
        """Raises StorageError."""
        self._store, self._key = store, key
        self._number, self._lines = last_segment(store, key), list[bytes]()
        try:
            if store.size(segment(key, self._number)) >= SEGMENT_BYTES:
                self._number += 1
            else:
                self._lines = store.read(segment(key, self._number)).splitlines(keepends=True)
        except NotFound:  # the first line makes it
            self._lines = []
        self._put = sum(map(len, self._lines))

    @property
    def rest_s(self) -> float:
        """Seconds until the next put: the larger the object, the rarer."""
        return self._put / PUT_BYTES_PER_S

    def add(self, line: bytes) -> None:
        """Take a line, with its end, to be written."""
        self._lines.append(line)

    def write(self) -> None:
        """Put what there is. Raises StorageError."""
        lines = [*self._lines]  # more may come meanwhile
        data = b"".join(lines)
        if len(data) == self._put:
            return
        self._store.write(segment(self._key, self._number), data)
        self._put = len(data)
        if len(data) >= SEGMENT_BYTES:
            del self._lines[: len(lines)]
            self._number, self._put = self._number + 1, 0


def _is_torn(file: io.FileIO) -> bool:
    """Whether a file ends within a line, as a full disk or the loss of a node leaves it."""
    if not file.seek(0, io.SEEK_END):
        return False
    file.seek(-1, io.SEEK_END)
    return file.read(1) != b"\n"
