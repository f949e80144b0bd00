"""Write a checkpoint: every rank its own slices, then one manifest by one writer."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from diffussm.checkpoint.digest import digest_file
from diffussm.checkpoint.manifest import MANIFEST, Counters, File, Manifest, Piece
from diffussm.checkpoint.store import Store
from diffussm.errors import StorageError

VERSIONED = ("torch", "deepspeed", "ray", "mosaicml-streaming", "safetensors")
"""Packages whose versions go into each manifest."""


@dataclass(frozen=True)
class Part:
    """One parameter's slice on this rank: where it lies in the flattened parameter, and its tensors by kind."""

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: Mapping[str, Tensor]
    """kind -> (numel,) fp32."""


def save(
    store: Store,
    folder: str,
    parts: Sequence[Part],
    shapes: Mapping[str, tuple[int, ...]],
    counters: Counters,
    *,
    attempt: int,
    zero_stage: int,
    config_digest: str,
) -> Manifest | None:
    """Save all ranks' slices below key `folder` of `store`. Collective: every rank must call it.

    The manifest is put last, by rank 0, after every rank has reported size and digest of its file; a kill at any
    point before leaves no manifest and so no checkpoint. Returns the manifest on rank 0.

    Raises:
        StorageError: on every rank, if any rank could not write; it names that rank.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    name = f"attempt{attempt:04d}-rank{rank:05d}.safetensors"
    outcome: File | str
    try:
        outcome = _write(store, f"{folder}/{name}", name, parts)
    except (StorageError, OSError, SafetensorError) as error:
        outcome = str(error)
    outcomes: list[File | str | None] = [None] * size
    dist.all_gather_object(outcomes, outcome)
    _raise_if_any_failed(outcomes, folder)
    manifest = Manifest(
        counters=counters,
        attempt=attempt,
        world_size=size,
        zero_stage=zero_stage,
        config_digest=config_digest,
        kinds=tuple(parts[0].tensors) if parts else (),
        shapes=dict(shapes),
        files=tuple(file for file in outcomes if isinstance(file, File)),
        versions={package: version(package) for package in VERSIONED},
    )
    failure: list[str | None] = [None]
    if rank == 0:
        try:
            store.write(f"{folder}/{MANIFEST}", manifest.to_json())
        except StorageError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise StorageError(f"{folder}: the manifest could not be written: {failure[0]}")
    return manifest if rank == 0 else None


def _write(store: Store, key: str, name: str, parts: Sequence[Part]) -> File:
    from safetensors.torch import save_file

    tensors = {
        f"{kind}/{part.name}": t.detach().cpu().contiguous() for part in parts for kind, t in part.tensors.items()
    }
    with tempfile.TemporaryDirectory(prefix="diffussm-save-") as scratch:
        path = Path(scratch) / name
        save_file(tensors, path)
        store.upload(path, key)
        stored, written = store.size(key), path.stat().st_size
        if stored != written:
            raise StorageError(f"{key}: {stored:,} bytes arrived of {written:,}", "check the store's free space")
        pieces = tuple(Piece(part.name, part.start, next(iter(part.tensors.values())).numel()) for part in parts)
        return File(name, written, digest_file(path), pieces)


def _raise_if_any_failed(outcomes: Sequence[File | str | None], folder: str) -> None:
    failed = {rank: outcome for rank, outcome in enumerate(outcomes) if isinstance(outcome, str)}
    if failed:
        listed = "; ".join(f"rank {rank}: {message}" for rank, message in failed.items())
        raise StorageError(f"{folder}: the checkpoint could not be written by {len(failed)} ranks ({listed})")
