from __future__ import annotations

import pytest
import torch
from safetensors.torch import load

from diffussm.checkpoint.digest import slice_sum
from diffussm.checkpoint.snapshot import Part, Snapshot, parse_header


def parts(offset: float) -> list[Part]:
    return [
        Part("w", (2, 3), 2, {"master": torch.arange(4.0) + offset, "ema": torch.arange(4.0) - offset}),
        Part("b", (5,), 0, {"master": torch.ones(5) * offset, "ema": torch.zeros(5)}),
    ]


def test_it_keeps_what_was_and_uses_its_memory_again() -> None:
    snapshot = Snapshot()
    live = parts(1.0)
    snapshot.take(live)
    address = snapshot._buffer.data_ptr()
    live[0].tensors["master"].zero_()
    tensors = load(b"".join(snapshot.source().blocks()))
    assert tensors["master/w"].tolist() == [1, 2, 3, 4]
    assert tensors["ema/w"].tolist() == [-1, 0, 1, 2]
    assert snapshot.size == snapshot.source().size
    assert [(p.name, p.start, p.numel) for p in snapshot.pieces] == [("w", 2, 4), ("b", 0, 5)]
    snapshot.take(parts(2.0))
    assert snapshot._buffer.data_ptr() == address
    assert load(b"".join(snapshot.source().blocks()))["master/b"].tolist() == [2] * 5
    assert snapshot.sums()["master/w"] == slice_sum(torch.arange(4.0) + 2, 2)


def test_a_rank_without_slices_writes_a_file_without_tensors() -> None:
    snapshot = Snapshot()
    snapshot.take([])
    assert load(b"".join(snapshot.source().blocks())) == {}


@pytest.mark.parametrize("text", [b"", b"[]", b'{"a": 1}', b"\xff"])
def test_a_header_that_is_none_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's own and ours
        parse_header(text)


def test_dtypes_may_differ_and_nothing_is_lost() -> None:
    mixed = [
        Part("a", (3,), 0, {"e": torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)}),
        Part("b", (2,), 0, {"e": torch.tensor([4.0, 5.0])}),
    ]
    snapshot = Snapshot()
    snapshot.take(mixed)
    tensors = load(b"".join(snapshot.source().blocks()))
    assert tensors["e/a"].dtype == torch.bfloat16
    assert tensors["e/a"].tolist() == [1, 2, 3]
    assert tensors["e/b"].tolist() == [4, 5]
    assert snapshot.dtypes == {"e/a": "BF16", "e/b": "F32"}
    assert snapshot.sums()["e/a"] == slice_sum(mixed[0].tensors["e"], 0)
