"""Several real processes write one checkpoint; any other number reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from diffussm.checkpoint import digest, restore
from diffussm.checkpoint.fence import record
from diffussm.checkpoint.manifest import MANIFEST
from diffussm.checkpoint.quarantine import NOTE
from diffussm.checkpoint.source import Source
from diffussm.checkpoint.store import open_store
from diffussm.errors import DataError, StorageError, Superseded
from tests.diffussm.checkpoint.shares import SHAPES, save_step, share, value


@pytest.mark.world_size(3)
def test_three_ranks_write_and_any_other_size_reads(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    save_step(store, 1)
    save_step(store, 2)
    folder, manifest = restore.choose(store)
    assert manifest.counters.step == 2
    assert manifest.world_size == 3
    for size in (1, 2, 4, 5):
        for rank in range(size):
            parts = share(rank, size, step=0)
            restore.read_into(store, folder, manifest, parts)
            for part in parts:
                for kind, tensor in part.tensors.items():
                    expected = value(part.name, kind, 2)[part.start : part.start + tensor.numel()]
                    assert torch.equal(tensor, expected)
    for name in SHAPES:
        for kind in ("master", "ema"):
            whole = digest.text(digest.slice_sum(value(name, kind, 2), 0))
            assert manifest.digests[f"{kind}/{name}"] == whole
            assert (
                as_the_page_of_formats_says(tmp_path / folder, kind)[name].tolist()
                == value(name, kind, 2).view(SHAPES[name]).tolist()
            )


def as_the_page_of_formats_says(folder: Path, kind: str) -> dict[str, Any]:
    """What the page's own code reads."""
    page = (Path(__file__).parents[3] / "docs" / "formats.md").read_text()
    room: dict[str, Any] = {}
    exec(page.split("### Reading it without DiffuSSM")[1].split("```python\n")[1].split("```")[0], room)  # noqa: S102
    return dict(room["read"](folder, kind))


@pytest.mark.world_size(1)
def test_files_are_safetensors_as_others_read_them(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    save_step(open_store(str(tmp_path)), 1)
    tensors = load_file(next(tmp_path.rglob("*.safetensors")))
    assert set(tensors) == {f"{kind}/{name}" for kind in ("master", "ema") for name in SHAPES}
    assert torch.equal(tensors["ema/w"], value("w", "ema", 1))


@pytest.mark.world_size(2)
def test_a_rank_that_cannot_write_fails_all_and_leaves_no_manifest(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    save_step(store, 1)
    if dist.get_rank() == 1:

        def refuse(source: Source, key: str) -> None:
            raise StorageError("disk full")

        store.put = refuse  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="rank 1: disk full"):
        save_step(store, 2)
    dist.barrier()
    assert [folder for folder, _ in restore.manifests(store)] == [f"checkpoints/{1:012d}"]


@pytest.mark.world_size(2)
def test_an_upload_past_its_deadline_names_rank_and_object(tmp_path: Path) -> None:
    import threading

    store = open_store(str(tmp_path))
    hang = threading.Event()
    if dist.get_rank() == 1:
        store.put = lambda source, key: hang.wait()  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(StorageError, match=r"rank 1: .*rank00001\.safetensors: not stored within"):
        save_step(store, 1, deadline_s=0.3)
    hang.set()
    assert list(restore.manifests(store)) == []


@pytest.mark.world_size(2)
def test_a_newer_attempt_keeps_an_older_one_from_concluding(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    if dist.get_rank() == 0:
        store.write(record(2), b"{}")
    dist.barrier()
    with pytest.raises(Superseded, match="attempt 2 has begun"):
        save_step(store, 1)
    assert list(restore.manifests(store)) == []
    save_step(store, 1, attempt=2)
    assert [m.attempt for _, m in restore.manifests(store)] == [2]  # type: ignore[union-attr]


@pytest.mark.world_size(1)
def test_the_newest_attempt_replaces_what_an_older_one_left_at_its_place(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    save_step(store, 1)
    save_step(store, 1, attempt=2)
    _folder, manifest = restore.choose(store)
    assert manifest.attempt == 2


@pytest.mark.world_size(2)
def test_what_reads_back_differently_is_set_aside(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    honest = store.put

    def lossy(source: Source, key: str) -> None:
        honest(source, key)
        path = tmp_path / key
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")

    if dist.get_rank() == 1:
        store.put = lossy  # type: ignore[method-assign]
    with pytest.raises(DataError, match="reads back differently"):
        save_step(store, 1)
    dist.barrier()
    folder = tmp_path / "checkpoints" / f"{1:012d}"
    assert not (folder / MANIFEST).exists()
    assert "digest" in json.loads((folder / NOTE).read_text())["reasons"][0]
