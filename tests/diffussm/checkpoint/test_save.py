"""Several real processes write one checkpoint; any other number reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from diffussm.checkpoint import restore
from diffussm.checkpoint.store import open_store
from diffussm.errors import StorageError
from tests.diffussm.checkpoint.shares import save_step, share, value


@pytest.mark.world_size(3)
def test_three_ranks_write_and_any_other_size_reads(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    save_step(store, 1)
    save_step(store, 2)
    dist.barrier()
    said: list[str] = []
    folder, manifest = restore.newest(store, said.append)
    assert manifest.counters.step == 2
    assert manifest.world_size == 3
    assert said == []
    for size in (1, 2, 4, 5):
        for rank in range(size):
            parts = share(rank, size, step=0)
            restore.read_into(store, folder, manifest, parts)
            for part in parts:
                for kind, tensor in part.tensors.items():
                    expected = value(part.name, kind, 2)[part.start : part.start + tensor.numel()]
                    assert torch.equal(tensor, expected)


@pytest.mark.world_size(2)
def test_a_rank_that_cannot_write_fails_all_and_leaves_no_manifest(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    save_step(store, 1)
    if dist.get_rank() == 1:

        def refuse(source: Path, key: str) -> None:
            raise StorageError("disk full")

        store.upload = refuse
    with pytest.raises(StorageError, match="rank 1: disk full"):
        save_step(store, 2)
    dist.barrier()
    assert [folder for folder, _ in restore.manifests(store)] == [f"checkpoints/{1:012d}"]
