"""Write a checkpoint from snapshots: every rank its own slices, then one manifest by one writer, last."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, TypeVar

import torch.distributed as dist

import diffussm
from diffussm.checkpoint import digest
from diffussm.checkpoint.fence import Fence
from diffussm.checkpoint.manifest import MANIFEST, Counters, File, Manifest
from diffussm.checkpoint.quarantine import quarantine
from diffussm.checkpoint.restore import verify_file
from diffussm.checkpoint.snapshot import Part, Snapshot
from diffussm.checkpoint.source import Cancelled, Source, within
from diffussm.checkpoint.store import AlreadyExists, Store
from diffussm.errors import DataError, StorageError, Superseded

GROUP = "saves"
"""Description of the process group whose ranks wait for each other's uploads, and so for longer than others may."""
T = TypeVar("T")
Confirmed = tuple[File, dict[str, int], dict[str, str]]
"""What a rank tells of its file: how to find and verify it, its slices' digests, and their dtypes."""
_FIRST_S = 10.0
"""Longest time for what is stored before a manifest: a diary holds up no checkpoint."""
VERSIONED = ("torch", "deepspeed", "ray", "mosaicml-streaming", "safetensors")
"""Packages whose versions go into each manifest, beside our own."""


@dataclass(frozen=True)
class Order:
    """One checkpoint to be written."""

    store: Store
    folder: str
    draft: Manifest
    """Its manifest without files and digests."""
    source: Source
    """This rank's file."""
    deadline_s: float
    """Seconds for this rank's file, from the order on."""
    fence: Fence
    group: Any = None
    """gloo; its own if the order is carried out on a thread. None is the default group."""
    read_back: bool = True
    """Read all files back and verify them once the manifest is there."""
    first: Callable[[float], object] | None = None
    """Called by rank 0 before the manifest is put, with the seconds it may take: stores what must not be lost of the
    steps that are saved. It need not succeed."""


def draft(
    counters: Counters,
    shapes: Mapping[str, tuple[int, ...]],
    kinds: Sequence[str],
    *,
    attempt: int,
    zero_stage: int,
    config_digest: str,
    run_id: str = "",
    permanent: bool = False,
) -> Manifest:
    """The manifest of a checkpoint that is to be written by this world, without files and digests."""
    return Manifest(
        counters=counters,
        attempt=attempt,
        world_size=dist.get_world_size(),
        zero_stage=zero_stage,
        config_digest=config_digest,
        kinds=tuple(kinds),
        shapes=dict(shapes),
        files=(),
        versions=_versions(),
        created=round(time.time(), 3),
        permanent=permanent,
        run_id=run_id,
    )


def publish(
    order: Order, snapshot: Snapshot, concluded: Callable[[Manifest], None] = lambda manifest: None
) -> tuple[Manifest, bool]:  # fmt: skip
    """Bring a snapshot to the store and make it a checkpoint. Collective on `order.group`: every rank must call it.

    The manifest is put last, by rank 0, after every rank has reported size and digest of its file; a kill at any
    point before leaves no manifest and so no checkpoint. `concluded` is called then, before the files are read back.
    Cancelling the source of every rank ends it soon, even while the store hangs: before the manifest the save fails,
    after it the reading back is left out.

    Returns the manifest, and whether every byte was read back.

    Raises:
        StorageError: on every rank, if any rank could not write in time; it names that rank and its object.
        Superseded: on every rank, if a newer attempt has taken over.
        DataError: on every rank, if a file reads back differently; the checkpoint is quarantined.
    """
    end = time.monotonic() + order.deadline_s
    rank = dist.get_rank()
    name = f"attempt{order.draft.attempt:04d}-rank{rank:05d}.safetensors"
    key = f"{order.folder}/{name}"

    def bring() -> Confirmed:
        """Upload this rank's file; what there is to confirm about it."""
        file = File(name, snapshot.size, digest.digest_blocks(order.source.blocks()), snapshot.pieces)
        sums = snapshot.sums()
        order.fence.check()
        order.store.put(order.source, key)
        stored = order.store.size(key)
        if stored != file.size:
            raise StorageError(f"{key}: {stored:,} bytes arrived of {file.size:,}", "check the store's free space")
        return file, sums, snapshot.dtypes

    def in_time(work: Callable[[], T], what: str) -> T:
        return within(end - time.monotonic(), work, order.source, what)

    confirmed = _everyone(order, lambda: in_time(bring, key), "written")

    def conclude() -> Manifest:
        if order.first is not None:
            order.first(min(_FIRST_S, max(0.0, end - time.monotonic()) / 2))
        return in_time(lambda: _put_manifest(order, confirmed), f"{order.folder}/{MANIFEST}")

    manifest: Manifest = _everyone(order, lambda: conclude() if rank == 0 else None, "concluded")[0]
    concluded(manifest)
    if not order.read_back:
        return manifest, False

    def verify() -> list[str]:
        return verify_file(order.store, order.folder, confirmed[rank][0])

    def look() -> list[str] | None:
        try:
            return within(math.inf, verify, order.source, key)
        except Cancelled:
            return None

    seen = _everyone(order, look, "read back")
    wrong = [line for lines in seen for line in lines or ()]
    if wrong:
        if rank == 0:
            quarantine(order.store, order.folder, wrong, order.draft.attempt)
        raise DataError(
            f"{order.folder}: reads back differently right after it was written: {'; '.join(wrong)}",
            "check the disk or the storage service; the checkpoint is set aside and those before it are kept",
        )
    return manifest, None not in seen


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
    deadline_s: float = 600.0,
) -> Manifest | None:
    """Snapshot and publish at once, in the caller's time. Collective: every rank must call it. Raises as `publish`.

    Returns the manifest on rank 0.
    """
    snapshot = Snapshot()
    snapshot.take(parts)
    plan = draft(
        counters, shapes, list(parts[0].tensors) if parts else [],
        attempt=attempt, zero_stage=zero_stage, config_digest=config_digest,
    )  # fmt: skip
    order = Order(store, folder, plan, snapshot.source(), deadline_s, Fence(store, attempt))
    manifest, _ = publish(order, snapshot)
    return manifest if dist.get_rank() == 0 else None


@functools.cache
def _versions() -> dict[str, str]:
    return {"diffussm": diffussm.__version__} | {package: version(package) for package in VERSIONED}


def code_of_this_run() -> dict[str, str]:
    """Versions of the packages that decide results."""
    return dict(_versions())


def _put_manifest(order: Order, confirmed: Sequence[Confirmed]) -> Manifest:
    """Write the manifest unless a newer attempt is there; one of an older attempt is replaced."""
    sums: dict[str, list[int]] = {}
    for _, mine, _ in confirmed:
        for name, value in mine.items():
            sums.setdefault(name, []).append(value)
    manifest = replace(
        order.draft,
        files=tuple(file for file, _, _ in confirmed),
        dtypes={name: dtype for _, _, mine in confirmed for name, dtype in mine.items()},
        digests={name: digest.text(digest.add(values)) for name, values in sums.items()},
    )
    key = f"{order.folder}/{MANIFEST}"
    order.fence.check()
    try:
        order.store.write(key, manifest.to_json(), create=True)
    except AlreadyExists:
        # An attempt that was not stopped in time, or our own put whose answer was lost. Ours is the newest: it counts.
        order.fence.check()
        order.store.write(key, manifest.to_json())
    return manifest


def _everyone(order: Order, work: Any, what: str) -> list[Any]:
    """What each rank's `work` returned, by rank; any rank's error is raised on all. Collective on the order's group."""
    outcome: Any
    try:
        outcome = work()
    except Exception as error:  # noqa: BLE001 - whatever it is, all ranks raise it below
        outcome = error
    outcomes: list[Any] = [None] * dist.get_world_size(order.group)
    dist.all_gather_object(outcomes, outcome, group=order.group)
    failed = {rank: found for rank, found in enumerate(outcomes) if isinstance(found, Exception)}
    if not failed:
        return outcomes
    first = next((error for error in failed.values() if isinstance(error, Superseded)), next(iter(failed.values())))
    if not isinstance(first, StorageError | OSError):
        raise first
    said = {rank: error.message if isinstance(error, StorageError) else str(error) for rank, error in failed.items()}
    listed = "; ".join(f"rank {rank}: {text}" for rank, text in said.items())
    raise StorageError(
        f"{order.folder}: the checkpoint could not be {what} by {len(failed)} of {len(outcomes)} ranks ({listed})",
        getattr(first, "remedy", "") or "check the store",
    )
