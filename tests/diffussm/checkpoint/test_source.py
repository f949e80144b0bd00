from __future__ import annotations

import io
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffussm.checkpoint.source import Cancelled, Source, within
from diffussm.errors import StorageError


@given(st.lists(st.binary(max_size=50), max_size=5), st.integers(0, 100), st.integers(1, 60))
def test_it_reads_like_a_file_of_its_parts(parts: list[bytes], start: int, number: int) -> None:
    whole = b"".join(parts)
    source = Source([memoryview(part) for part in parts])
    assert source.size == len(whole)
    assert b"".join(source.blocks()) == whole
    source.seek(start)
    assert source.read(-1) == whole[start:]
    source.seek(min(start, len(whole)))
    assert io.BufferedReader(source).read(number) == whole[min(start, len(whole)) :][:number]


def test_nothing_is_read_after_the_end_of_its_time() -> None:
    source = Source([memoryview(b"abc")])
    source.cancel()
    with pytest.raises(Cancelled):
        source.read(1)
    with pytest.raises(Cancelled):
        list(source.blocks())


def test_within_returns_raises_or_gives_up() -> None:
    source = Source([memoryview(b"abc")])
    assert within(5, lambda: 3, source, "x") == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0, source, "x")
    gate = threading.Event()
    with pytest.raises(StorageError, match=r"c/r0: not stored within 0\.05 s"):
        within(0.05, gate.wait, source, "c/r0")
    assert source.cancelled
    gate.set()


def test_within_leaves_a_call_that_hangs_once_the_source_is_cancelled() -> None:
    source, gate, begun = Source([memoryview(b"abc")]), threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        gate.wait()

    def cancel() -> None:
        assert begun.wait(30)
        source.cancel()

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(Cancelled, match="c/r0: given up"):
        within(600, hang, source, "c/r0")
    canceller.join()
    with pytest.raises(Cancelled):
        within(600, gate.wait, source, "c/r0")  # cancelled before
    gate.set()


def test_one_answer_reaches_over_borders() -> None:
    """boto3 makes a part of an upload of each answer, and S3 refuses parts that are too small."""
    source = Source([memoryview(b"header"), memoryview(b"data" * 4)])
    assert source.read(16) == b"headerdatadatada"
    assert source.read(16) == b"tadata"
    assert source.read(16) == b""
