"""The store in a bucket: S3, or whatever speaks its language. The only place that knows boto3.

The client keeps its own retries (adaptive, 10 attempts).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from typing_extensions import override

from diffussm.checkpoint.source import Source
from diffussm.checkpoint.store import AlreadyExists, NotFound, Store
from diffussm.errors import StorageError
from diffussm.naming import join

_LOG = logging.getLogger(__name__)
PART_BYTES = 16 << 20
"""Parts of an upload."""
_BODY_ATTEMPTS = 4


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
    def folders(self) -> Iterator[str]:
        with self._explain(""):
            above = f"{self.prefix}/" if self.prefix else ""
            lister = self.client.get_paginator("list_objects_v2")
            for page in lister.paginate(Bucket=self.bucket, Prefix=above, Delimiter="/"):
                yield from (entry["Prefix"][len(above) : -1] for entry in page.get("CommonPrefixes", ()))

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
