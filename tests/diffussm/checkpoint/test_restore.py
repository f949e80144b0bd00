"""Which checkpoint is taken, what is refused, and what is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from diffussm.checkpoint import restore
from diffussm.checkpoint.manifest import MANIFEST, NewerFormat
from diffussm.checkpoint.quarantine import NOTE
from diffussm.checkpoint.snapshot import Part
from diffussm.checkpoint.store import Store, open_store
from diffussm.errors import DataError
from tests.diffussm.checkpoint.shares import SHAPES, save_step, share, value


def restored(stores: list[Store], said: list[str], **options: str) -> int | None:
    """The step that is restored on this rank, checked element by element."""
    parts = share(dist.get_rank(), dist.get_world_size(), step=0)
    found = restore.restore_newest(stores, parts, said.append, attempt=9, **options)
    if found is None:
        return None
    step = found.manifest.counters.step
    for part in parts:
        for kind, tensor in part.tensors.items():
            assert torch.equal(tensor, value(part.name, kind, step)[part.start : part.start + tensor.numel()])
    return step


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.world_size(2)
def test_damaged_checkpoints_are_set_aside_and_the_one_before_is_used(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for step in range(1, 8):
        save_step(store, step)
    root = tmp_path / "checkpoints"
    if dist.get_rank() == 0:
        flip(next((root / f"{7:012d}").glob("*rank00000*")), at=20)  # inside the header
        flip(next((root / f"{6:012d}").glob("*rank00001*")), at=0)  # its length
        flip(next((root / f"{5:012d}").glob("*rank00001*")), at=-1)
        cut = next((root / f"{4:012d}").glob("*rank00001*"))
        cut.write_bytes(cut.read_bytes()[:-5])
        next((root / f"{3:012d}").glob("*rank00000*")).unlink()
        (root / f"{2:012d}" / MANIFEST).write_bytes(b"{")
    dist.barrier()
    said: list[str] = []
    assert restored([store], said) == 1
    if dist.get_rank() == 0:
        expected = ["digest", "digest", "digest", "bytes of", "missing", "not a checkpoint manifest"]
        assert len(said) == len(expected)
        for line, words in zip(said, expected, strict=True):
            assert words in line
        assert not (root / f"{7:012d}" / MANIFEST).exists()
        note = json.loads((root / f"{7:012d}" / NOTE).read_text())
        assert "digest" in note["reasons"][0]
        assert json.loads(note["manifest"])["counters"]["step"] == 7
    dist.barrier()
    said.clear()
    assert restored([store], said) == 1
    assert said == []
    # The run comes by there again, and what it writes counts.
    save_step(store, 7)
    assert restored([store], said) == 7


@pytest.mark.world_size(1)
def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew_unasked(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    save_step(store, 1)
    flip(next((tmp_path / "checkpoints").rglob("*.safetensors")), at=-1)
    with pytest.raises(DataError, match="none of 1 checkpoints verifies"):
        restored([store], [])
    with pytest.raises(DataError, match="quarantined"):
        restored([store], [])


@pytest.mark.world_size(1)
def test_a_manifest_of_the_future_stops_the_start_and_stays(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    save_step(store, 1)
    save_step(store, 2)
    path = tmp_path / "checkpoints" / f"{2:012d}" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 3, "unknown": 1}))
    before = path.read_bytes()
    with pytest.raises(NewerFormat, match="version 3"):
        restored([store], [])
    assert path.read_bytes() == before


@pytest.mark.world_size(2)
def test_the_newest_of_several_places_is_taken_and_another_runs_is_not(tmp_path: Path) -> None:
    near, far = open_store(str(tmp_path / "near")), open_store(str(tmp_path / "far"))
    save_step(far, 1)
    save_step(near, 2)
    assert restored([near, far], []) == 2
    save_step(far, 3)
    assert restored([near, far], []) == 3
    save_step(near, 3)
    parts = share(dist.get_rank(), 2, step=0)
    found = restore.restore_newest([near, far], parts, print, attempt=1)
    assert found is not None
    assert found.store is near
    assert restored([near, far], [], run_id="another") is None


@pytest.mark.world_size(1)
def test_no_checkpoint_wrong_shape_and_weights(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert restored([store], []) is None
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


@pytest.mark.world_size(2)
def test_a_folder_is_reachable_only_if_every_rank_sees_it(tmp_path: Path) -> None:
    assert restore.reachable(open_store(str(tmp_path)), "1")
    assert not restore.reachable(open_store(str(tmp_path / str(dist.get_rank()))), "1")
