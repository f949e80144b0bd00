"""Weights as one file: written in blocks, read by the library, whole or not at all."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffussm.checkpoint import weights
from diffussm.checkpoint.store import NotFound
from diffussm.errors import DataError, StorageError
from tests.s3 import S3Server

SHAPES = {"b.weight": (3, 5), "a": (7,), "scale": ()}


def value(name: str, start: int, numel: int) -> torch.Tensor:
    return torch.arange(start, start + numel, dtype=torch.float64) + len(name)


def test_the_library_reads_what_was_written_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BLOCK", 4)
    asked: list[tuple[str, int, int]] = []

    def produce(name: str, start: int, numel: int) -> torch.Tensor:
        asked.append((name, start, numel))
        return value(name, start, numel)

    target = tmp_path / "new" / "w.safetensors"
    size = weights.write(str(target), SHAPES, produce, 640, {"kind": "ema-plain"})
    assert size == target.stat().st_size
    assert max(numel for _, _, numel in asked) == 4
    assert [a for a in asked if a[0] == "b.weight"] == [
        ("b.weight", s, n) for s, n in [(0, 4), (4, 4), (8, 4), (12, 3)]
    ]
    with safe_open(target, framework="pt") as file:
        assert file.metadata() == {"format": weights.FORMAT, "images": "640", "kind": "ema-plain"}
    back = weights.read(str(target))
    assert back.images == 640
    for name, shape in SHAPES.items():
        assert tuple(back.tensors[name].shape) == shape
        assert torch.equal(back.tensors[name].flatten(), value(name, 0, back.tensors[name].numel()).float())
    assert [path.name for path in target.parent.iterdir()] == ["w.safetensors"]


def test_memory_does_not_grow_with_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BLOCK", 1 << 12)
    produced: list[int] = []

    def produce(name: str, start: int, numel: int) -> torch.Tensor:
        produced.append(numel)
        return torch.zeros(numel)

    tracemalloc.start()
    weights.write(str(tmp_path / "w"), {"w": (1 << 10, 1 << 10)}, produce, 0, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "w").stat().st_size > 4 << 20
    assert max(produced) == 1 << 12
    assert peak < 1 << 20


def test_a_bucket_is_a_target_too(s3_server: S3Server) -> None:
    target = s3_server.url("weights/w.safetensors")
    weights.write(target, SHAPES, value, 8, {})
    assert torch.equal(weights.read(target).tensors["a"], value("a", 0, 7).float())


def test_a_failure_leaves_the_file_that_was_there_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "w.safetensors"
    weights.write(str(target), SHAPES, value, 8, {})
    before = target.read_bytes()

    def broken(name: str, start: int, numel: int) -> torch.Tensor:
        raise DataError("damaged")

    with pytest.raises(DataError, match="damaged"):
        weights.write(str(target), SHAPES, broken, 16, {})
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(StorageError, match=r"w\.safetensors"):
        weights.write(str(target / "below" / "x"), SHAPES, value, 8, {})


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        weights.read(str(tmp_path / "absent"))
    (tmp_path / "text").write_text("hello, this is no such file")
    with pytest.raises(DataError, match="not a safetensors file"):
        weights.read(str(tmp_path / "text"))
    save_file({"w": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(DataError, match="diffussm-weights-1"):
        weights.read(str(tmp_path / "foreign"))
