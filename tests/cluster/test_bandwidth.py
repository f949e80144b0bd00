"""The speed of a store: measured on a real folder and a real bucket, and nothing stays there."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import bandwidth
from diffussm.checkpoint.store import LocalStore, open_store
from diffussm.errors import StorageError
from tests.s3 import S3Server


def test_a_folder_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    found = bandwidth.round_trip(LocalStore(str(tmp_path)), seconds=0.2)
    assert found.write > 0
    assert found.read > 0
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_bucket_is_measured_and_left_as_it_was(s3_server: S3Server) -> None:
    store = open_store(s3_server.url("bandwidth"))
    assert bandwidth.round_trip(store, seconds=0.2).write > 0
    assert list(store.keys()) == []


def test_it_ends_in_time_or_after_so_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    class Counting(LocalStore):
        def write(self, key: str, data: bytes, *, create: bool = False) -> None:
            written.append(key)
            super().write(key, data, create=create)

    bandwidth.round_trip(Counting(str(tmp_path)), seconds=0.0)
    assert len(written) == 1
    monkeypatch.setattr(bandwidth, "MOST_BYTES", 3 * bandwidth.BLOCK_BYTES)
    bandwidth.round_trip(Counting(str(tmp_path)), seconds=100.0)
    assert len(written) == 4


def test_other_bytes_than_were_written_are_an_error_and_nothing_stays(tmp_path: Path) -> None:
    class Forgetful(LocalStore):
        def read(self, key: str) -> bytes:
            return b"something else"

    with pytest.raises(StorageError, match="reads back differently"):
        bandwidth.round_trip(Forgetful(str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_objects_that_are_there_are_read(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(bytes(5000))
    store = LocalStore(str(tmp_path))
    assert bandwidth.reading(store, [("shard", 5000)]) > 0
    assert bandwidth.reading(store, []) == 0
