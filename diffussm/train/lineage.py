"""The first state of a run that starts from another run's checkpoint: `train.start_from`.

Weights, averages and AdamW's moments are taken over; the new run counts its own images from 0. The latents may have
another size: the state-space parameters are those of a continuous system, whose kernels are evaluated at any length.
`lineage.json` keeps where the state came from.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from diffussm.checkpoint import restore
from diffussm.checkpoint.manifest import Counters, Manifest
from diffussm.checkpoint.snapshot import Part
from diffussm.checkpoint.store import NotFound, Store, open_store
from diffussm.config.schema import Config
from diffussm.errors import DataError
from diffussm.train.ema import Averages
from diffussm.train.engine import Engine
from diffussm.train.logger import Logger

KEY = "lineage.json"


def split(start_from: str) -> tuple[str, int | None]:
    """A run's place, and the images of one checkpoint if `<run>/checkpoints/<images>` is named. Pure."""
    run, _, images = start_from.rstrip("/").partition("/checkpoints/")
    if images and not images.isdecimal():
        raise DataError(
            f"train.start_from: found {start_from!r}; allowed: a run's place, or <run>/checkpoints/<images>",
            "name one folder of the run's checkpoints/",
        )
    return run, int(images) if images else None


def check(start_from: str) -> None:
    """Refuse a run without checkpoints, or one that lacks the checkpoint that is named. Local.

    Raises:
        DataError: there is none. StorageError: the place cannot be reached.
    """
    run, images = split(start_from)
    store = open_store(run)
    there = [found.counters.images for _, found in restore.manifests(store) if isinstance(found, Manifest)]
    if not there or (images is not None and images not in there):
        raise DataError(
            f"train.start_from: found {start_from!r}; its checkpoints are {there or 'none'}",
            "train that run first, or name one of its checkpoints",
        )


def begin(cfg: Config, engine: Engine, averages: Averages, store: Store, logger: Logger, at: Counters) -> Counters:
    """Where the training begins, with engine and averages filled. Collective: every rank must call it.

    A run that has steps behind it (`at`), or that starts from nothing, is left as it is. An average that the other run
    did not keep begins with its weights.

    Raises:
        DataError: no usable checkpoint, or its parameters have other shapes.
        StorageError: the other run's place cannot be reached.
    """
    if not cfg.train.start_from or at.step:
        return at
    run, images = split(cfg.train.start_from)
    parent, leads = open_store(run), engine.world.leads
    chosen = restore.everyone(lambda: restore.choose(parent, images) if leads else None)[0]
    assert chosen is not None  # noqa: S101 - rank 0 chose it
    folder, manifest = chosen
    held = [Part(s.name, s.shape, s.start, s.tensors) for s in engine.slices(held=True)]
    owned = engine.slices()
    kept = set(averages.kinds) & set(manifest.kinds)
    averaged = [
        Part(s.name, s.shape, s.start, {kind: t for kind, t in averages.tensors(s.name).items() if kind in kept})
        for s in owned
    ]
    restore.everyone(lambda: restore.read_into(parent, folder, manifest, held + averaged if kept else held))
    engine.restored(manifest.counters.adam_steps)
    for piece in owned:
        for kind, average in averages.tensors(piece.name).items():
            if kind not in kept:
                average.copy_(piece.tensors["master"])
    origin = _origin(run, folder, manifest, parent)
    if leads:
        store.write(KEY, json.dumps(origin, indent=1).encode())
    logger.event("started from", checkpoint=f"{run}/{folder}", parent_images=manifest.counters.images)
    return replace(at, adam_steps=manifest.counters.adam_steps)


def _origin(run: str, folder: str, manifest: Manifest, parent: Store) -> dict[str, Any]:
    """What is kept of the other run; with its own origin, so that a line of runs can be read from its last one."""
    try:
        before = json.loads(parent.read(KEY))
    except NotFound:
        before = None
    return {
        "run": run,
        "checkpoint": folder,
        "images": manifest.counters.images,
        "adam_steps": manifest.counters.adam_steps,
        "config_digest": manifest.config_digest,
        "started_from": before,
    }
