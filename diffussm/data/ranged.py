"""Large files read in parts, on disk or in a bucket: shard patterns, and an object as a file that can be sought in."""

from __future__ import annotations

import fnmatch
import glob
import io
import re
from pathlib import Path
from typing import BinaryIO, cast

from diffussm.checkpoint.store import NotFound
from diffussm.data.source import listed, local_folder, store_of
from diffussm.errors import DataError
from diffussm.naming import is_remote, join

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
_MAGIC = re.compile(r"[*?\[]")


def open_file(file: str, buffer_bytes: int) -> BinaryIO:
    """`file`, a path or an object's URL, for reading and seeking; `buffer_bytes` are read ahead.

    Raises:
        DataError: there is none.
        StorageError: it cannot be read.
    """
    try:
        raw = _Object(file)
    except NotFound as error:
        raise DataError(f"data.images: {file} is not there", "name shards that exist") from error
    return cast(BinaryIO, io.BufferedReader(raw, buffer_bytes))


class _Object(io.RawIOBase):
    """Reads by ranges; errors of the store pass through as they are."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self._store, self._key = store_of(file)
        self._size = self._store.size(self._key)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, target: bytearray | memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(target), self._size - self._at))
        if count:
            target[:count] = self._store.read_range(self._key, self._at, count)
            self._at += count
        return count


def expand(pattern: str, suffix: str) -> list[str]:
    """The files that `pattern` names, sorted within each of its alternatives.

    Args:
        pattern: a path or URL with `{000..146}`, `{a,b}`, `*`, `?` or `[...]`, or a folder: all files in it that end
            with `suffix`.
        suffix: ending of the shards, with the dot.

    Raises:
        DataError: a part of the pattern names no file.
    """
    files: list[str] = []
    for part in braces(pattern):
        found = _matching(part, suffix)
        if not found:
            raise DataError(
                f"data.images: {part} names no {suffix} file",
                "check the pattern, for example train-{000..146}" + suffix,
            )
        files += found
    twice = sorted({file for file in files if files.count(file) > 1}) if len(set(files)) < len(files) else []
    if twice:
        raise DataError(f"data.images: {pattern} names {listed(twice)} twice", "name each shard once")
    return files


def braces(pattern: str) -> list[str]:
    """All texts that `{a..b}` (numbers, zeros in front kept) and `{x,y}` stand for, in order."""
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    low, high, words = found.groups()
    if words is not None:
        parts = words.split(",")
    else:
        width = len(low) if low.startswith("0") or len(low) == len(high) else 0
        parts = [f"{number:0{width}d}" for number in range(int(low), int(high) + 1)]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [text for part in parts for text in braces(head + part + tail)]


def _matching(part: str, suffix: str) -> list[str]:
    if not is_remote(part):
        path = local_folder(part)
        if path.is_dir():
            return sorted(str(p) for p in path.rglob(f"*{suffix}") if p.is_file())
        found = glob.glob(str(path), recursive=True)  # noqa: PTH207 - pathlib's takes no absolute patterns
        return sorted(p for p in found if Path(p).is_file())
    bucket = "/".join(part.split("/")[:3])
    key = part[len(bucket) + 1 :]
    store, _ = store_of(part)
    if _MAGIC.search(key) is None:
        if not key.endswith("/") and store.exists(key):
            return [part]
        return [join(bucket, k) for k in store.keys(key.rstrip("/") + "/" if key else "") if k.endswith(suffix)]
    fixed = _MAGIC.split(key)[0]
    return [join(bucket, k) for k in store.keys(fixed) if fnmatch.fnmatchcase(k, key)]
