"""Find the newest checkpoint that verifies and read any rank's slices of it, at any world size."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from diffussm.checkpoint.digest import digest_file
from diffussm.checkpoint.manifest import MANIFEST, Index, Manifest
from diffussm.checkpoint.save import Part
from diffussm.checkpoint.store import NotFound, Store
from diffussm.errors import DataError, DiffuSSMError, StorageError

T = TypeVar("T")


def manifests(store: Store, prefix: str = "checkpoints") -> Iterator[tuple[str, Manifest | DataError]]:
    """(folder key, manifest or why it cannot be read) of every checkpoint below `prefix`, newest first. Local."""
    folders = sorted(k.removesuffix(f"/{MANIFEST}") for k in store.keys(f"{prefix}/") if k.endswith(f"/{MANIFEST}"))
    for folder in reversed(folders):
        key = f"{folder}/{MANIFEST}"
        try:
            yield folder, Manifest.from_json(store.read(key), key)
        except DataError as error:
            yield folder, error


def verify(store: Store, folder: str, manifest: Manifest, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with the files of a checkpoint: an empty list if every byte is as written. Local.

    Args:
        store: where it lies.
        folder: the checkpoint's key.
        manifest: its manifest.
        share: (rank, size): look at every size-th file only, beginning with the rank-th.
    """
    wrong = []
    with tempfile.TemporaryDirectory(prefix="diffussm-verify-") as scratch:
        for file in manifest.files[share[0] :: share[1]]:
            key = f"{folder}/{file.name}"
            try:
                path = store.fetch(key, Path(scratch))
            except NotFound:
                wrong.append(f"{key} is missing")
                continue
            size = path.stat().st_size
            if size != file.size:
                wrong.append(f"{key} has {size:,} bytes of {file.size:,}")
            elif (found := digest_file(path)) != file.xxh3:
                wrong.append(f"{key} has digest {found}, written was {file.xxh3}")
            if path.is_relative_to(scratch):
                path.unlink()
    return wrong


def newest(store: Store, announce: Callable[[str], None]) -> tuple[str, Manifest] | None:
    """The newest checkpoint whose files all verify, or None. Collective: every rank must call it.

    Ranks share the reading. A checkpoint that does not verify is announced (on rank 0) and passed over.

    Raises:
        StorageError: on every rank, if any rank cannot reach the store.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    listed = _together(lambda: list(manifests(store)) if rank == 0 else [])[0]
    for folder, manifest in listed:
        if isinstance(manifest, Manifest):
            found = _together(partial(verify, store, folder, manifest, (rank, size)))
            wrong = [line for lines in found for line in lines]
        else:
            wrong = [manifest.message]
        if not wrong and isinstance(manifest, Manifest):
            return folder, manifest
        if rank == 0:
            announce(f"checkpoint {folder} does not verify and is passed over: {'; '.join(wrong)}")
    return None


def _together(look: Callable[[], T]) -> list[T]:
    """What every rank saw, by rank. Collective: every rank must call it; a StorageError on one is raised on all."""
    outcome: T | StorageError
    try:
        outcome = look()
    except StorageError as error:
        outcome = error
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, outcome)
    for seen in everyone:
        if isinstance(seen, StorageError):
            raise seen
    return everyone


def read_into(store: Store, folder: str, manifest: Manifest, parts: Sequence[Part]) -> None:
    """Fill the tensors of `parts` from a checkpoint of any world size and ZeRO stage. Local.

    Raises:
        DataError: a parameter or kind is missing, has another shape, or is not covered by the files.
    """
    index = Index(manifest.files)
    absent = {kind for part in parts for kind in part.tensors} - set(manifest.kinds)
    if absent:
        raise DataError(f"{folder}: holds {', '.join(manifest.kinds)}, not {', '.join(sorted(absent))}")
    for part in parts:
        saved = manifest.shapes.get(part.name)
        if saved != tuple(part.shape):
            raise DataError(
                f"{folder}: parameter {part.name} has shape {saved} in the checkpoint, {part.shape} in the model",
                "use the model settings of the run (its config.yaml), or another run name",
            )
    with _opened(store, folder) as open_file, torch.no_grad():
        for part in parts:
            for kind, target in part.tensors.items():
                for copy in index.copies(part.name, part.start, target.numel()):
                    source = open_file(copy.file).get_slice(f"{kind}/{part.name}")
                    target[copy.target : copy.target + copy.numel].copy_(source[copy.source : copy.source + copy.numel])


def read_weights(store: Store, folder: str, manifest: Manifest, kind: str) -> dict[str, Tensor]:
    """Whole parameters of one kind (`master` or `ema`) as a state dict of fp32 tensors. Local.

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


@contextmanager
def _opened(store: Store, folder: str) -> Iterator[Callable[[str], Any]]:
    """A function that opens a checkpoint's safetensors file by name, each once, fetched if it is remote."""
    from safetensors import safe_open

    with tempfile.TemporaryDirectory(prefix="diffussm-restore-") as scratch:
        handles: dict[str, Any] = {}

        def open_file(name: str) -> Any:
            if name not in handles:
                handles[name] = safe_open(store.fetch(f"{folder}/{name}", Path(scratch)), framework="pt")
            return handles[name]

        yield open_file
