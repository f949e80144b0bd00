"""The only door to the object store: a local folder or an S3 bucket behind the same few verbs.

Keys are relative and use forward slashes. A write is seen whole or not at all: locally by writing beside the target
and renaming, in a bucket because a put is atomic. S3's client keeps its own retries (adaptive, 10 attempts).
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
from typing import Any, BinaryIO
from urllib.parse import urlparse

from typing_extensions import override

from diffussm.checkpoint.source import BLOCK_BYTES, Source
from diffussm.errors import StorageError
from diffussm.naming import is_remote, join

_LOG = logging.getLogger(__name__)
PART_BYTES = 16 << 20
"""Parts of an upload to a bucket."""
_BODY_ATTEMPTS = 4
PART = ".part"
"""Ending of a local file that is being written."""


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

    @abstractmethod
    def size(self, key: str) -> int:
        """Bytes of the object. Raises NotFound."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; it need not exist."""

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
    def unfinished(self, prefix: str) -> Iterator[str]:
        with self._explain(prefix):
            parts = {path.relative_to(self.root).as_posix() for path in self.root.rglob(f"*{PART}")}
            empty = {f"{p.relative_to(self.root).as_posix()}/" for p in self.root.rglob("*") if _is_empty(p)}
            yield from (key for key in sorted(parts | empty) if key.startswith(prefix))

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
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):  # else somebody writes there, or was faster
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
        finally:
            temporary.unlink(missing_ok=True)
            self._remove_empty(target.parent)

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
    for _ in range(10):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(
            FileNotFoundError
        ):  # somebody just deleted the last file there, and with it the folder
            return path.open("xb")
    return path.open("xb")


def _is_empty(folder: Path) -> bool:
    try:
        return folder.is_dir() and not any(folder.iterdir())
    except FileNotFoundError:  # somebody else's deletion came first
        return False


class S3Store(Store):
    """A bucket and prefix; credentials and endpoint come from the environment, as boto3 finds them.

    `S3_ENDPOINT_URL`, which the data loader reads, is honoured too, so that one variable serves both.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        import boto3
        from botocore.config import Config

        parsed = urlparse(url)
        self.bucket, self.prefix = parsed.netloc, parsed.path.strip("/")
        if not self.bucket:
            raise StorageError(f"storage: found {url!r}, which names no bucket", "use s3://bucket/prefix")
        # A session of our own: the shared default one keeps the first credentials it saw and is not thread safe.
        self.client = boto3.session.Session().client(
            "s3",
            endpoint_url=os.environ.get("S3_ENDPOINT_URL"),
            config=Config(retries={"mode": "adaptive", "total_max_attempts": 10}, connect_timeout=10, read_timeout=60),
        )

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    @override
    def read(self, key: str) -> bytes:
        with self._explain(key):
            body: bytes = self.client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()
            return body

    @override
    def write(self, key: str, data: bytes, *, create: bool = False) -> None:
        from botocore.exceptions import ClientError

        condition: dict[str, Any] = {"IfNoneMatch": "*"} if create else {}
        with self._explain(key):
            for left in range(_BODY_ATTEMPTS - 1, -1, -1):
                try:
                    self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, **condition)
                    return
                except ClientError as error:
                    code = error.response.get("Error", {}).get("Code")
                    if code == "ConditionalRequestConflict" and left:
                        continue  # somebody writes this key at this moment; S3 asks to look again, the client does not
                    if not create or code != "NotImplemented":
                        raise
                    break
        _LOG.warning(
            "%s: the store has no conditional writes; two starts of a run at the same moment are not told apart",
            join(self.url, key),
        )
        if self.exists(key):
            raise AlreadyExists(f"{join(self.url, key)}: exists already")
        self.write(key, data)

    @override
    def upload(self, source: Path, key: str) -> None:
        with self._explain(key):
            self.client.upload_file(str(source), self.bucket, self._key(key))

    @override
    def put(self, source: Source, key: str) -> None:
        from boto3.s3.transfer import TransferConfig

        # Parts are copied out of the source one by one: at most four at a time are on their way.
        parts = TransferConfig(multipart_chunksize=PART_BYTES, multipart_threshold=PART_BYTES, max_concurrency=4)
        with self._explain(key):
            self.client.upload_fileobj(source, self.bucket, self._key(key), Config=parts)

    @override
    def read_range(self, key: str, start: int, size: int) -> bytes:
        from botocore.exceptions import HTTPClientError, IncompleteReadError, ResponseStreamingError

        if size <= 0:
            return b""
        with self._explain(key):
            for left in range(_BODY_ATTEMPTS - 1, -1, -1):  # the client retries its call, not the reading of the body
                try:
                    answer = self.client.get_object(
                        Bucket=self.bucket, Key=self._key(key), Range=f"bytes={start}-{start + size - 1}"
                    )
                    body: bytes = answer["Body"].read()
                    return body
                except (HTTPClientError, IncompleteReadError, ResponseStreamingError):
                    if not left:
                        raise
        raise AssertionError("unreachable")

    @override
    def fetch(self, key: str, folder: Path) -> Path:
        target = folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._explain(key):
            self.client.download_file(self.bucket, self._key(key), str(target))
        return target

    @override
    def keys(self, prefix: str = "") -> Iterator[str]:
        with self._explain(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(prefix))
            cut = len(self.prefix) + 1 if self.prefix else 0
            for page in pages:  # S3 lists in order
                yield from (entry["Key"][cut:] for entry in page.get("Contents", ()))

    @override
    def size(self, key: str) -> int:
        with self._explain(key):
            return int(self.client.head_object(Bucket=self.bucket, Key=self._key(key))["ContentLength"])

    @override
    def delete(self, key: str) -> None:
        with self._explain(key):
            self.client.delete_object(Bucket=self.bucket, Key=self._key(key))

    @contextlib.contextmanager
    def _explain(self, key: str) -> Iterator[None]:
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import BotoCoreError, ClientError

        where = join(self.url, key)
        try:
            yield
        except ClientError as error:
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            if status == 404:
                raise NotFound(f"{where}: no such object") from error
            if status == 416:  # the object ends before the range begins
                raise StorageError(f"{where}: is shorter than its manifest says") from error
            if status == 412:
                raise AlreadyExists(f"{where}: exists already") from error
            remedy = "check the credentials and the bucket's rights" if status in (401, 403) else "is the store up?"
            raise StorageError(f"{where}: {error}", remedy) from error
        except (BotoCoreError, S3UploadFailedError) as error:
            raise StorageError(f"{where}: {error}", "check the endpoint, the credentials and the network") from error
