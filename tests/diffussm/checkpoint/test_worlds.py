"""Any world writes, any other reads, under any way to cut the parameters; and a reader needs no more than its share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffussm.bench.machine import risen_gb
from diffussm.checkpoint import digest, restore
from diffussm.checkpoint.manifest import Counters, File, Manifest
from diffussm.checkpoint.snapshot import Part, Snapshot
from diffussm.checkpoint.store import LocalStore, Store

KINDS = ("master", "exp_avg", "ema-plain")
FOLDER = f"checkpoints/{1:012d}"
Shapes = Sequence[tuple[int, ...]]
Range = tuple[int, int, int]
"""Which parameter, its first element, and how many."""


def equal_shares(shapes: Shapes, size: int, rank: int) -> list[Range]:
    """Without ZeRO: each parameter cut into equal shares."""
    edges = [(rank * prod(s) // size, (rank + 1) * prod(s) // size) for s in shapes]
    return [(i, low, high - low) for i, (low, high) in enumerate(edges) if high > low]


def flat_partition(shapes: Shapes, size: int, rank: int) -> list[Range]:
    """ZeRO 1 and 2: all parameters one after another, padded, cut into one range a rank."""
    share = -(-sum(map(prod, shapes)) // size)
    begin, found = 0, []
    for i, shape in enumerate(shapes):
        low, high = max(begin, rank * share), min(begin + prod(shape), (rank + 1) * share)
        if high > low:
            found.append((i, low - begin, high - low))
        begin += prod(shape)
    return found


def padded_shares(shapes: Shapes, size: int, rank: int) -> list[Range]:
    """ZeRO 3: each parameter padded and cut into equal shares, of which the last ones may be empty."""
    found = []
    for i, shape in enumerate(shapes):
        share = -(-prod(shape) // size)
        low = min(rank * share, prod(shape))
        if high := min(share, prod(shape) - low):
            found.append((i, low, high))
    return found


CUTS = st.sampled_from([equal_shares, flat_partition, padded_shares])
Cut = Callable[[Shapes, int, int], list[Range]]


def content(kind: str, index: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Distinct values for each element of each kind of each parameter, flattened."""
    return torch.arange(prod(shape), dtype=torch.float32) + 1000 * index + 1e5 * KINDS.index(kind)


def write(store: Store, shapes: Shapes, size: int, cut: Cut) -> Manifest:
    """Each rank's file as a save makes it, and the manifest."""
    files, sums = [], dict[str, list[int]]()
    for rank in range(size):
        snapshot = Snapshot()
        snapshot.take([
            Part(f"p{i}", shapes[i], low, {k: content(k, i, shapes[i])[low : low + numel] for k in KINDS})
            for i, low, numel in cut(shapes, size, rank)
        ])  # fmt: skip
        name = f"attempt0001-rank{rank:05d}.safetensors"
        store.put(snapshot.source(), f"{FOLDER}/{name}")
        whole = digest.digest_blocks(snapshot.source().blocks())
        files.append(File(name, snapshot.size, whole, snapshot.pieces))
        for key, value in snapshot.sums().items():
            sums.setdefault(key, []).append(value)
    found = {f"p{i}": tuple(shape) for i, shape in enumerate(shapes)}
    digests = {key: digest.text(digest.add(values)) for key, values in sums.items()}
    return Manifest(Counters(1, 1, 0, 1, 1, 0), 1, size, 1, "d", KINDS, found, tuple(files), digests=digests)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=5),
    st.integers(1, 7), CUTS, st.integers(1, 7), CUTS,
)  # fmt: skip
def test_any_world_reads_what_any_other_wrote(shapes: Shapes, old: int, written: Cut, new: int, read: Cut) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(folder)
        manifest = write(store, shapes, old, written)
        assert not restore.verify(store, FOLDER, manifest)
        seen = dict[tuple[str, int], int]()
        for rank in range(new):
            parts = [
                Part(f"p{i}", shapes[i], low, {kind: torch.full((numel,), -1.0) for kind in KINDS})
                for i, low, numel in read(shapes, new, rank)
            ]
            restore.read_into(store, FOLDER, manifest, parts)
            for part, (i, low, numel) in zip(parts, read(shapes, new, rank), strict=True):
                for kind, tensor in part.tensors.items():
                    assert torch.equal(tensor, content(kind, i, shapes[i])[low : low + numel])
                    seen[kind, i] = seen.get((kind, i), 0) + digest.slice_sum(tensor, low)
        for (kind, i), total in seen.items():
            assert digest.text(total) == manifest.digests[f"{kind}/p{i}"]
        assert len(seen) == len(KINDS) * len(shapes)


@pytest.mark.world_size(1)
def test_reading_a_share_needs_its_memory_and_a_fixed_buffer(tmp_path: Path) -> None:
    """A share of 24 MB of a checkpoint of 192 MB raises the peak by little, not by the rest of the files."""
    shapes = [(4000, 1000), (4000, 1000), (4000, 1000), (4000, 1000)]
    store = LocalStore(str(tmp_path))
    manifest = write(store, shapes, 2, flat_partition)
    store.write(f"{FOLDER}/manifest.json", manifest.to_json())
    parts = [
        Part(f"p{i}", shapes[i], low, {kind: torch.full((numel,), -1.0) for kind in KINDS})
        for i, low, numel in flat_partition(shapes, 8, 3)
    ]
    risen = risen_gb(lambda: restore.restore_newest([store], parts, pytest.fail, attempt=1))
    for part, (i, low, numel) in zip(parts, flat_partition(shapes, 8, 3), strict=True):
        for kind, tensor in part.tensors.items():
            assert torch.equal(tensor, content(kind, i, shapes[i])[low : low + numel])
    if risen is None:
        pytest.skip("this kernel does not tell a process its peak memory")
    assert risen < 0.03, f"{risen:.3f} GB"
