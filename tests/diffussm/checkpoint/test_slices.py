"""Ranges of tensors read where they lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffussm.checkpoint.slices import Slices
from diffussm.checkpoint.store import NotFound, open_store
from diffussm.errors import DataError
from tests.diffussm.checkpoint import snapshots


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 3])
def test_any_range_of_any_tensor(tmp_path: Path, dtype: torch.dtype, ranks: int) -> None:
    state = {kind: {n: torch.randn(s) for n, s in snapshots.SHAPES.items()} for kind in ("master", "ema-plain")}
    manifest = snapshots.write(tmp_path, "checkpoints", 8, state, ranks, dtype)
    slices = Slices(open_store(str(tmp_path)), f"checkpoints/{8:012d}", manifest)
    for kind, values in state.items():
        for name, shape in snapshots.SHAPES.items():
            flat, numel = values[name].flatten().to(dtype).float(), torch.empty(shape).numel()
            for start in range(0, numel, 3):
                for stop in (start, start + 1, numel):
                    assert torch.equal(slices.read(kind, name, start, stop - start), flat[start:stop])


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    state = {"master": {n: torch.zeros(s) for n, s in snapshots.SHAPES.items()}}
    manifest = snapshots.write(tmp_path, "checkpoints", 8, state)
    folder = f"checkpoints/{8:012d}"
    slices = Slices(open_store(str(tmp_path)), folder, manifest)
    with pytest.raises(DataError, match="holds master, not 'ema-plain'"):
        slices.read("ema-plain", "w", 0, 1)
    with pytest.raises(DataError, match="held by no file"):
        slices.read("master", "w", 40, 3)
    with pytest.raises(DataError, match="held by no file"):
        slices.read("master", "absent", 0, 1)
    last = tmp_path / folder / manifest.files[1].name
    last.write_bytes(last.read_bytes()[:-4])
    fresh = Slices(open_store(str(tmp_path)), folder, manifest)
    with pytest.raises(DataError, match="cut short"):
        fresh.read("master", "w", 41, 1)
    last.write_bytes(b"\x08" + bytes(7) + b"nonsense")
    with pytest.raises(DataError, match="not a safetensors file"):
        Slices(open_store(str(tmp_path)), folder, manifest).read("master", "w", 41, 1)
    last.unlink()
    with pytest.raises(NotFound):
        Slices(open_store(str(tmp_path)), folder, manifest).read("master", "w", 41, 1)
