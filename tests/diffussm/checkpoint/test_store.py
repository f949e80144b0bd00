"""Both stores keep the same promises: the local folder and a real S3 server."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffussm.checkpoint.store import PART, AlreadyExists, LocalStore, NotFound, Store, open_store
from diffussm.errors import StorageError


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
    assert list(store.folders()) == ["a"]
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


def test_a_write_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    def refuse(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = LocalStore(str(tmp_path))
    with pytest.MonkeyPatch.context() as full:
        full.setattr(os, "fsync", refuse)
        with pytest.raises(StorageError):
            store.write("a/b/c", b"x")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "other").write_bytes(b"y")
    with pytest.MonkeyPatch.context() as full:
        full.setattr(os, "fsync", refuse)
        with pytest.raises(StorageError, match="No space"):
            store.write("a/b/c", b"x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["other"]


@pytest.mark.parametrize("moment", ["before the file", "between the folders"])
def test_a_folder_that_goes_while_a_file_is_written_there_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    store, mkdir, calls = LocalStore(str(tmp_path)), Path.mkdir, []

    def made_and_gone(path: Path, **given: Any) -> None:
        calls.append(path)
        if len(calls) == 1 and moment == "between the folders":
            raise FileNotFoundError(errno.ENOENT, "its parent is gone", str(path))
        mkdir(path, **given)
        if len(calls) == 1:
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", made_and_gone)
    store.write("a/c", b"x")
    assert store.read("a/c") == b"x"
    assert len(calls) == 2


def test_what_is_left_is_looked_for_below_the_prefix_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of somebody else, which cannot be read, keeps nobody from tidying."""
    for folder in ("c/1", "c/2", "d"):
        (tmp_path / folder).mkdir(parents=True)
    looked, iterdir = [], Path.iterdir

    def refuse(path: Path) -> Iterator[Path]:
        looked.append(path.name)
        if path.name == "1":
            raise PermissionError(errno.EACCES, "not yours", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert list(LocalStore(str(tmp_path)).unfinished("c/")) == ["c/2/"]
    assert "d" not in looked
