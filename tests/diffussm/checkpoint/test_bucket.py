"""What is a bucket's alone; test_store.py holds it to what both stores promise."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from urllib3 import HTTPResponse

from diffussm.checkpoint.bucket import S3Store
from diffussm.checkpoint.store import AlreadyExists, open_store
from diffussm.errors import StorageError
from tests.s3 import S3Server


def test_wrong_credentials_say_so(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="credentials"):
        open_store(s3_server.url("denied")).check_writable()


def test_a_store_without_conditional_writes_looks_first_and_says_so(
    s3_server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A mock of one answer before a real server: stores that lack the header answer so."""
    store = open_store(s3_server.url(f"plain/{tmp_path.name}"))
    assert isinstance(store, S3Store)

    def answer(request: AWSPreparedRequest, **_: object) -> AWSResponse | None:
        if "If-None-Match" not in request.headers:
            return None
        body = b"<Error><Code>NotImplemented</Code><Message>A header you provided is not implemented</Message></Error>"
        return AWSResponse(request.url, 501, {}, HTTPResponse(io.BytesIO(body), preload_content=False))

    store.client.meta.events.register("before-send.s3.PutObject", answer)
    store.write("attempts/1/start.json", b"first", create=True)
    with pytest.raises(AlreadyExists):
        store.write("attempts/1/start.json", b"second", create=True)
    assert store.read("attempts/1/start.json") == b"first"
    assert "has no conditional writes" in caplog.text


def test_two_creations_at_one_moment_are_told_apart(s3_server: S3Server, tmp_path: Path) -> None:
    """A mock of the answer that S3 gives while another conditional write of the key is under way; ours gives none."""
    store = open_store(s3_server.url(f"conflict/{tmp_path.name}"))
    assert isinstance(store, S3Store)
    conflicts = iter(range(2))

    def answer(request: AWSPreparedRequest, **_: object) -> AWSResponse | None:
        if next(conflicts, None) is None:
            return None
        body = b"<Error><Code>ConditionalRequestConflict</Code><Message>conflicting operation</Message></Error>"
        return AWSResponse(request.url, 409, {}, HTTPResponse(io.BytesIO(body), preload_content=False))

    store.client.meta.events.register("before-send.s3.PutObject", answer)
    store.write("attempts/1/start.json", b"first", create=True)
    conflicts = iter(range(2))
    with pytest.raises(AlreadyExists):
        store.write("attempts/1/start.json", b"second", create=True)
    conflicts = iter(range(100))
    with pytest.raises(StorageError, match="ConditionalRequestConflict"):
        store.write("attempts/2/start.json", b"first", create=True)
