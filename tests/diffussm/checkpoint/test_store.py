"""Both stores keep the same promises: the local folder and a real S3 server."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from urllib3 import HTTPResponse

from diffussm.checkpoint.store import PART, AlreadyExists, LocalStore, NotFound, S3Store, Store, open_store
from diffussm.errors import StorageError
from tests.s3 import S3Server


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "run"))
    server = request.getfixturevalue("s3_server")
    return open_store(server.url(f"store/{tmp_path.name}"))


def test_what_is_written_is_read_listed_and_deleted(store: Store, tmp_path: Path) -> None:
    store.write("a/1.json", b"one")
    store.write("a/1.json", b"two")
    store.write("b.txt", b"")
    source = tmp_path / "big.bin"
    source.write_bytes(bytes(range(256)) * 40_000)  # above the size from which S3 uploads in parts
    store.upload(source, "a/big.bin")
    assert list(store.keys()) == ["a/1.json", "a/big.bin", "b.txt"]
    assert list(store.keys("a/")) == ["a/1.json", "a/big.bin"]
    assert store.read("a/1.json") == b"two"
    assert store.size("a/big.bin") == 10_240_000
    assert store.fetch("a/big.bin", tmp_path / "copies").read_bytes() == source.read_bytes()
    store.delete("a/1.json")
    store.delete("a/1.json")
    assert not store.exists("a/1.json")
    assert store.exists("b.txt")


def test_absent_keys_are_not_found(store: Store, tmp_path: Path) -> None:
    for look in (lambda: store.read("x"), lambda: store.size("x"), lambda: store.fetch("x", tmp_path)):
        with pytest.raises(NotFound, match="x"):
            look()


def test_only_one_creates(store: Store) -> None:
    store.write("attempts/1/start.json", b"first", create=True)
    with pytest.raises(AlreadyExists):
        store.write("attempts/1/start.json", b"second", create=True)
    assert store.read("attempts/1/start.json") == b"first"


def test_the_writability_check_leaves_nothing(store: Store) -> None:
    store.check_writable()
    assert list(store.keys()) == []


def test_a_file_in_the_way_is_a_storage_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        LocalStore(str(tmp_path / "file")).check_writable()


def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(str(tmp_path))
    store.write("a", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        store.write("a", b"new")
    assert store.read("a") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


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


def test_unknown_schemes_and_missing_buckets_are_refused() -> None:
    with pytest.raises(StorageError, match="gs://"):
        open_store("gs://bucket/x")
    with pytest.raises(StorageError, match="names no bucket"):
        open_store("s3:///x")


def test_what_a_killed_write_left_is_no_key_and_can_be_deleted(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f"b.1234{PART}").write_bytes(b"half")
    assert list(store.keys()) == []
    (left,) = store.unfinished("a/")
    assert not list(store.unfinished("c/"))
    store.delete(left)
    assert not list(store.unfinished(""))


def test_a_write_that_fails_leaves_no_folder_and_one_whose_folder_goes_meanwhile_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = LocalStore(str(tmp_path))
    with pytest.MonkeyPatch.context() as full:
        full.setattr(os, "fsync", refuse)
        with pytest.raises(StorageError):
            store.write("a/b/c", b"x")
    assert list(tmp_path.iterdir()) == []

    mkdir, calls = Path.mkdir, []

    def made_and_gone(path: Path, **given: Any) -> None:
        mkdir(path, **given)
        calls.append(path)
        if len(calls) == 1:
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", made_and_gone)
    store.write("a/c", b"x")
    assert store.read("a/c") == b"x"
    assert len(calls) == 2
