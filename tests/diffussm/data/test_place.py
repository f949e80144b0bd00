"""Answers of stores, told apart. The road to a real bucket: test_bucket.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from diffussm.data import place
from diffussm.errors import DataError, StorageError


def answer(code: str) -> ClientError:
    return ClientError({"Error": {"Code": code}}, "GetObject")


def test_what_will_not_come_is_told_from_what_may() -> None:
    away = EndpointConnectionError(endpoint_url="http://127.0.0.1:9")
    assert [place.is_absent(e) for e in (answer("404"), answer("NoSuchKey"), FileNotFoundError())] == [True] * 3
    assert [place.is_refused(e) for e in (answer("403"), answer("NoSuchBucket"), PermissionError())] == [True] * 3
    for error in (away, answer("500"), answer("SlowDown"), TimeoutError()):
        assert not place.is_absent(error)
        assert not place.is_refused(error)


def test_local_places(tmp_path: Path) -> None:
    assert place.local_path("file:///a/b") == "/a/b"
    assert place.local_path("s3://bucket/x/") == "s3://bucket/x"
    assert place.fetch(str(tmp_path), "nothing", tmp_path) is None
    with pytest.raises(DataError, match=r"found no passport\.json"):
        place.passport(str(tmp_path))


def test_errors_of_streaming_name_the_place() -> None:
    with (
        pytest.raises(StorageError, match="s3://bucket/x: cannot be read or written"),
        place.storage_errors("s3://bucket/x"),
    ):
        raise RuntimeError("boom")
    with pytest.raises(DataError, match="ours"), place.storage_errors("s3://bucket/x"):
        raise DataError("ours")
