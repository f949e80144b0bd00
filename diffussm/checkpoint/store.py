"""The only door to the object store: a local folder or an S3 bucket behind the same few verbs.

Keys are relative and use forward slashes. A write is seen whole or not at all: locally by writing beside the target
and renaming, in a bucket because a put is atomic.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from typing_extensions import override

from diffussm.checkpoint.source import BLOCK_BYTES, Source
from diffussm.errors import StorageError
from diffussm.naming import is_remote, join

_LOG = logging.getLogger(__name__)
PART = ".part"
"""Ending of a local file that is being written."""
_OTHERS = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
"""Why an empty folder cannot be removed a moment later: somebody writes there, or was faster."""
_RACES = 10
"""How often a folder may be removed between its making and its first file."""


class NotFound(StorageError):
    """The key does not exist."""


class AlreadyExists(StorageError):
    """A write that was to create the key found one there."""


class Store(ABC):
    """A prefix in a folder or bucket."""

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object. Raises NotFound, StorageError."""

    @abstractmethod
    def read_range(self, key: str, start: int, size: int) -> bytes:
        """Bytes [start, start + size) of the object, fewer at its end. Raises NotFound, StorageError."""

    @abstractmethod
    def write(self, key: str, data: bytes, *, create: bool = False) -> None:
        """Put an object; with `create` raise AlreadyExists if there is one.

        Atomic in folders, and in buckets that know `If-None-Match`; elsewhere it is looked up first, with a warning.
        """

    @abstractmethod
    def upload(self, source: Path, key: str) -> None:
        """Put a local file, in parts when it is large."""

    @abstractmethod
    def put(self, source: Source, key: str) -> None:
        """Put bytes of memory, in parts when they are many; raises source.Cancelled once the source is cancelled."""

    @abstractmethod
    def fetch(self, key: str, folder: Path) -> Path:
        """A local path of the object: the object itself if it is local, else a copy below `folder`."""

    @abstractmethod
    def keys(self, prefix: str = "") -> Iterator[str]:
        """All keys that begin with `prefix`, sorted."""

    def folders(self) -> Iterator[str]:
        """Names of the folders right below, sorted; a store that can lists nothing that lies in them."""
        yield from sorted({key.partition("/")[0] for key in self.keys() if "/" in key})

    @abstractmethod
    def size(self, key: str) -> int:
        """Bytes of the object. Raises NotFound."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; it need not exist. What `unfinished` lists can be removed too."""

    def stream(self, key: str, size: int) -> Iterator[bytes]:
        """The first `size` bytes of the object in blocks of at most BLOCK_BYTES, each read with its own retries."""
        for start in range(0, size, BLOCK_BYTES):
            yield self.read_range(key, start, min(size - start, BLOCK_BYTES))

    def unfinished(self, prefix: str) -> Iterator[str]:
        """What writes and deletions that were killed left behind below `prefix`, an empty folder with a slash at its
        end; a bucket shows none of it. It can be deleted.
        """
        yield from ()

    def exists(self, key: str) -> bool:
        """Whether the object exists."""
        try:
            self.size(key)
        except NotFound:
            return False
        return True

    def check_writable(self) -> None:
        """Write, read back and delete a small object. Raises StorageError with what failed."""
        key = f".probe-{secrets.token_hex(8)}"
        self.write(key, b"probe")
        try:
            if self.read(key) != b"probe":
                raise StorageError(f"{self.url}: a written object reads back differently", "check the storage service")
        finally:
            self.delete(key)


def open_store(url: str) -> Store:
    """The store at a folder path, `file://` or `s3://bucket/prefix`.

    Raises:
        StorageError: the scheme is not known.
    """
    if not is_remote(url):
        return LocalStore(url)
    if url.startswith("s3://"):
        from diffussm.checkpoint.bucket import S3Store

        return S3Store(url)
    raise StorageError(f"storage: found {url!r}; allowed are a folder or s3://bucket/prefix", "change storage=")


class LocalStore(Store):
    """A folder; made on the first write."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.root = Path(url.removeprefix("file://"))

    @override
    def read(self, key: str) -> bytes:
        with self._explain(key):
            return (self.root / key).read_bytes()

    @override
    def read_range(self, key: str, start: int, size: int) -> bytes:
        with self._explain(key), (self.root / key).open("rb") as file:
            file.seek(start)
            return file.read(size)

    @override
    def write(self, key: str, data: bytes, *, create: bool = False) -> None:
        with self._explain(key), self._published(key, create=create) as writer:
            writer.write(data)

    @override
    def upload(self, source: Path, key: str) -> None:
        import shutil

        with self._explain(key), source.open("rb") as reader, self._published(key) as writer:
            shutil.copyfileobj(reader, writer, 1 << 22)

    @override
    def put(self, source: Source, key: str) -> None:
        with self._explain(key), self._published(key) as writer:
            for block in source.blocks():
                writer.write(block)

    @override
    def fetch(self, key: str, folder: Path) -> Path:
        path = self.root / key
        if not path.is_file():
            raise NotFound(f"{join(self.url, key)}: no such file")
        return path

    @override
    def keys(self, prefix: str = "") -> Iterator[str]:
        with self._explain(prefix):
            files = (p for p in self.root.rglob("*") if p.is_file() and not p.name.endswith(PART))
            yield from sorted(k for p in files if (k := p.relative_to(self.root).as_posix()).startswith(prefix))

    @override
    def folders(self) -> Iterator[str]:
        with self._explain(""):
            yield from sorted(path.name for path in self.root.glob("*") if path.is_dir())

    @override
    def unfinished(self, prefix: str) -> Iterator[str]:
        with self._explain(prefix):
            there = ((path.relative_to(self.root).as_posix(), path) for path in self.root.rglob("*"))
            below = ((key, path) for key, path in there if key.startswith(prefix))
            found = (key if key.endswith(PART) else f"{key}/" for key, path in below if _is_left(path))
            yield from sorted(found)

    @override
    def size(self, key: str) -> int:
        with self._explain(key):
            return (self.root / key).stat().st_size

    @override
    def delete(self, key: str) -> None:
        with self._explain(key):
            path = parent = self.root / key
            if not key.endswith("/"):
                path.unlink(missing_ok=True)
                parent = path.parent
            self._remove_empty(parent)

    def _remove_empty(self, folder: Path) -> None:
        """A folder exists only through its files, as a prefix in a bucket does."""
        try:
            while folder != self.root and _is_empty(folder):
                folder.rmdir()
                folder = folder.parent
        except OSError as error:
            if error.errno not in _OTHERS:
                raise

    @contextlib.contextmanager
    def _published(self, key: str, *, create: bool = False) -> Iterator[BinaryIO]:
        """A file to write to, which becomes the object when all is written; nothing is left of it otherwise."""
        target = self.root / key
        temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}{PART}")
        try:
            with _open_in_folder(temporary) as writer:
                yield writer
                writer.flush()
                os.fsync(writer.fileno())
            self._publish(temporary, key, create)
            temporary.unlink(missing_ok=True)
        except BaseException:
            with contextlib.suppress(OSError):  # what went wrong first is what is told
                temporary.unlink(missing_ok=True)
                self._remove_empty(target.parent)
            raise

    def _publish(self, temporary: Path, key: str, create: bool) -> None:
        target = self.root / key
        if not create:
            temporary.replace(target)
            return
        try:
            os.link(temporary, target)  # fails if the target exists, unlike a rename
        except FileExistsError:
            raise AlreadyExists(f"{join(self.url, key)}: exists already") from None

    @contextlib.contextmanager
    def _explain(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotFound(f"{join(self.url, key)}: no such file") from error
        except OSError as error:
            raise StorageError(
                f"{join(self.url, key)}: {error.strerror or error}", "check that the folder can be written and has room"
            ) from error


def _open_in_folder(path: Path) -> BinaryIO:
    """Open a new file to write to; its folder is made."""
    for left in range(_RACES, -1, -1):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("xb")
        except (FileNotFoundError, FileExistsError):
            # Somebody just deleted the last file there, and with it the folder.
            if not left or path.parent.is_file():
                raise
    raise AssertionError("unreachable")


def _is_left(path: Path) -> bool:
    """Whether a killed write or deletion left this: a file half written, or an empty folder."""
    return path.name.endswith(PART) or _is_empty(path)


def _is_empty(folder: Path) -> bool:
    try:
        return folder.is_dir() and not any(folder.iterdir())
    except (FileNotFoundError, PermissionError):  # gone already, or not known to be empty
        return False
