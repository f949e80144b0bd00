"""Find the newest checkpoint that verifies and read any rank's slices of it, at any world size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from diffussm.checkpoint.manifest import MANIFEST, File, Manifest, NewerFormat
from diffussm.checkpoint.quarantine import quarantine
from diffussm.checkpoint.snapshot import Part
from diffussm.checkpoint.store import NotFound, Store
from diffussm.checkpoint.wants import Wants, plan
from diffussm.errors import DataError, DiffuSSMError, StorageError

T = TypeVar("T")


def manifests(store: Store, prefix: str = "checkpoints") -> Iterator[tuple[str, Manifest | DataError]]:
    """(folder key, manifest or why it cannot be read) of every checkpoint below `prefix`, newest first. Local."""
    folders = sorted(k.removesuffix(f"/{MANIFEST}") for k in store.keys(f"{prefix}/") if k.endswith(f"/{MANIFEST}"))
    for folder in reversed(folders):
        key = f"{folder}/{MANIFEST}"
        try:
            yield folder, Manifest.from_json(store.read(key), key)
        except NotFound:  # deleted since it was listed
            continue
        except DataError as error:
            yield folder, error


def verify_file(store: Store, folder: str, file: File, wants: Wants | None = None) -> list[str]:
    """What is wrong with one file: an empty list if every byte is as written. Local.

    It is read once, in blocks. What `wants` asks of it is copied on the way.
    """
    key = f"{folder}/{file.name}"
    try:
        size = store.size(key)
        if size != file.size:
            return [f"{key} has {size:,} bytes of {file.size:,}"]
        if wants is not None:
            wants.open(store, key, file)
        state, position = xxhash.xxh3_128(), 0
        for block in store.stream(key, file.size):
            state.update(block)
            if wants is not None:
                wants.offer(file.name, position, block)
            position += len(block)
    except NotFound:
        return [f"{key} is missing"]
    found = state.hexdigest()
    return [] if found == file.xxh3 else [f"{key} has digest {found}, written was {file.xxh3}"]


def verify(store: Store, folder: str, manifest: Manifest) -> list[str]:
    """What is wrong with the files of a checkpoint: an empty list if every byte is as written. Local."""
    return [line for file in manifest.files for line in verify_file(store, folder, file)]


@dataclass(frozen=True)
class Found:
    """A checkpoint that was restored."""

    store: Store
    folder: str
    manifest: Manifest


def restore_newest(
    stores: Sequence[Store],
    parts: Sequence[Part],
    announce: Callable[[str], None],
    *,
    attempt: int,
    run_id: str = "",
) -> Found | None:
    """Fill `parts` from the newest checkpoint that verifies, in any of the stores. Collective: every rank must call it.

    Ranks share the verification, each reading about what it needs itself; the rest comes by ranged reads. One that
    does not verify is announced and quarantined by rank 0, and the one before it is taken. Of equally old ones the
    first store's is taken.

    Returns None if there is no checkpoint at all; `parts` are as they were then.

    Raises:
        NewerFormat: the newest was written by a newer version.
        DataError: there are checkpoints and none of them verifies, or they are another model's.
        StorageError: any rank cannot reach a store.
    """
    leads = dist.get_rank() == 0
    listed = everyone(lambda: _candidates(stores, run_id) if leads else [])[0]
    refused = []
    for which, folder, manifest in listed:
        store = stores[which]
        if isinstance(manifest, NewerFormat):
            raise manifest
        if isinstance(manifest, DataError):
            wrong = [manifest.message]
        else:
            wrong = _load(store, folder, manifest, parts)
            if not wrong:
                return Found(store, folder, manifest)
        if leads:
            announce(f"{store.url}/{folder} does not verify and is set aside: {'; '.join(wrong)}")
        everyone(lambda s=store, f=folder, w=wrong: quarantine(s, f, w, attempt) if leads else None)  # type: ignore[misc]
        refused.append(folder)
    if refused:
        raise DataError(
            f"{stores[-1].url}: none of {len(refused)} checkpoints verifies ({', '.join(refused)}); each was set aside "
            "with a quarantine.json that says why",
            "bring a good checkpoint back, or give the run another name to begin anew",
        )
    if everyone(lambda: leads and _has_quarantined(stores))[0]:
        raise DataError(
            f"{stores[-1].url}: all checkpoints of this run are quarantined",
            "bring a good checkpoint back, remove the checkpoints to begin anew, or give the run another name",
        )
    return None


def everyone(look: Callable[[], T]) -> list[T]:
    """What every rank saw, by rank. Collective: every rank must call it; a typed error on one is raised on all."""
    outcome: T | DiffuSSMError
    try:
        outcome = look()
    except DiffuSSMError as error:
        outcome = error
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    for seen in outcomes:
        if isinstance(seen, DiffuSSMError):
            raise seen
    return outcomes


def _candidates(stores: Sequence[Store], run_id: str) -> list[tuple[int, str, Manifest | DataError]]:
    """All checkpoints of this run over all stores, newest first; those of another run with this name are left out."""
    found = [
        (which, folder, manifest)
        for which, store in enumerate(stores)
        for folder, manifest in manifests(store)
        if isinstance(manifest, DataError) or manifest.run_id == run_id
    ]
    return sorted(found, key=lambda entry: entry[1], reverse=True)  # names sort by age; the sort is stable


def _has_quarantined(stores: Sequence[Store]) -> bool:
    from diffussm.checkpoint.quarantine import NOTE

    return any(key.endswith(f"/{NOTE}") for store in stores for key in store.keys("checkpoints/"))


def _load(store: Store, folder: str, manifest: Manifest, parts: Sequence[Part]) -> list[str]:
    """Verify the files, each rank its share, and fill `parts`; what is wrong on any rank. Collective."""
    rank, size = dist.get_rank(), dist.get_world_size()
    wants = plan(folder, manifest, parts)
    number = len(manifest.files)
    # Neighbouring files to one rank: these are the ones it needs itself, for any two world sizes.
    share = [file for i, file in enumerate(manifest.files) if i * size // number == rank]

    def look() -> list[str]:
        wrong = [line for file in share for line in verify_file(store, folder, file, wants)]
        return wrong or wants.fetch_rest(store, folder, manifest)

    return [line for lines in everyone(look) for line in lines]


def read_into(store: Store, folder: str, manifest: Manifest, parts: Sequence[Part]) -> None:
    """Fill the tensors of `parts` from a checkpoint of any world size and ZeRO stage, which has been verified. Local.

    Raises:
        DataError: a parameter or kind is missing, has another shape, or is not covered by the files.
    """
    wrong = plan(folder, manifest, parts).fetch_rest(store, folder, manifest)
    if wrong:
        raise DataError("; ".join(wrong), "use another checkpoint")


def read_weights(store: Store, folder: str, manifest: Manifest, kind: str) -> dict[str, Tensor]:
    """Whole parameters of one kind (`master` or an EMA's) as a state dict of fp32 tensors. Local.

    Raises:
        DataError: the checkpoint has no such kind or does not cover a parameter.
    """
    if kind not in manifest.kinds:
        raise DataError(f"{folder}: holds {', '.join(manifest.kinds)}, not {kind!r}", "choose one of those")
    flat = {name: torch.empty(prod(shape)) for name, shape in manifest.shapes.items()}
    read_into(store, folder, manifest, [Part(n, manifest.shapes[n], 0, {kind: t}) for n, t in flat.items()])
    return {name: tensor.view(manifest.shapes[name]) for name, tensor in flat.items()}


def choose(
    store: Store, images: int | None = None, announce: Callable[[str], None] = lambda line: None
) -> tuple[str, Manifest]:  # fmt: skip
    """The checkpoint after exactly `images` images, or the newest that verifies. For one process. Local.

    A checkpoint that is passed over because it does not verify is announced.

    Raises:
        DataError: there is none; the message lists those there are.
    """
    refused = []
    for folder, manifest in manifests(store):
        if isinstance(manifest, DiffuSSMError):
            refused.append(manifest.message)
            announce(f"{folder} is passed over: {manifest.message}")
            continue
        if images is not None and manifest.counters.images != images:
            refused.append(f"{folder} (another one)")
            continue
        wrong = verify(store, folder, manifest)
        if not wrong:
            return folder, manifest
        refused += wrong
        announce(f"{folder} is passed over: {'; '.join(wrong)}")
    wanted = f"after {images:,} images " if images is not None else ""
    listed = f"; seen: {'; '.join(refused)}" if refused else ""
    raise DataError(f"{store.url}: no usable checkpoint {wanted}found{listed}", "train the run first")


def reachable(store: Store, token: str) -> bool:
    """Whether every rank sees in `store` what rank 0 writes there. Collective: every rank must call it.

    Raises:
        StorageError: on every rank, if rank 0 cannot write there.
    """
    leads = dist.get_rank() == 0
    key = f".seen-{token}"
    everyone(lambda: store.write(key, b"seen") if leads else None)

    def look() -> bool:
        try:
            return store.exists(key)
        except StorageError:
            return False

    seen = everyone(look)
    everyone(lambda: store.delete(key) if leads else None)
    return all(seen)
