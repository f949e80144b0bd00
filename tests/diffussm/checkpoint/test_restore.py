"""Which checkpoint is taken, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from diffussm.checkpoint import restore
from diffussm.checkpoint.manifest import MANIFEST
from diffussm.checkpoint.save import Part
from diffussm.checkpoint.store import open_store
from diffussm.errors import DataError
from tests.diffussm.checkpoint.shares import SHAPES, save_step, value


@pytest.mark.world_size(2)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for step in (1, 2, 3, 4):
        save_step(store, step)
    dist.barrier()
    if dist.get_rank() == 0:
        root = tmp_path / "checkpoints"
        flipped = next((root / f"{4:012d}").glob("*rank00001*"))
        content = bytearray(flipped.read_bytes())
        content[-1] ^= 1
        flipped.write_bytes(content)
        next((root / f"{3:012d}").glob("*rank00000*")).unlink()
        (root / f"{2:012d}" / MANIFEST).write_bytes(b"{")
    dist.barrier()
    said: list[str] = []
    _folder, manifest = restore.newest(store, said.append)
    assert manifest.counters.step == 1
    if dist.get_rank() == 0:
        assert len(said) == 3
        assert "digest" in said[0]
        assert "missing" in said[1]
        assert "manifest" in said[2]


@pytest.mark.world_size(1)
def test_no_checkpoint_wrong_shape_and_weights(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert restore.newest(store, print) is None
    with pytest.raises(DataError, match="no usable checkpoint"):
        restore.choose(store)
    save_step(store, 1)
    save_step(store, 2)
    folder, manifest = restore.choose(store, images=10)
    assert manifest.counters.step == 1
    weights = restore.read_weights(store, folder, manifest, "ema")
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == SHAPES
    assert torch.equal(weights["w"].flatten(), value("w", "ema", 1))
    with pytest.raises(DataError, match="holds master, ema"):
        restore.read_weights(store, folder, manifest, "momentum")
    with pytest.raises(DataError, match=r"\(3, 5\) in the checkpoint, \(5, 3\) in the model"):
        restore.read_into(store, folder, manifest, [Part("w", (5, 3), 0, {"master": torch.empty(15)})])
    with pytest.raises(DataError, match="after 77 images"):
        restore.choose(store, images=77)
