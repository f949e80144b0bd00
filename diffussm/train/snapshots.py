"""Snapshots of the power-function averages, from which an average of any length is made after the training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffussm.checkpoint import restore, retain
from diffussm.checkpoint.manifest import Counters
from diffussm.checkpoint.posthoc import FOLDER
from diffussm.checkpoint.save import Part, save
from diffussm.checkpoint.store import Store
from diffussm.config import digest
from diffussm.config.schema import Config, SnapshotDtype
from diffussm.errors import StorageError
from diffussm.train.ema import Averages
from diffussm.train.engine import Engine
from diffussm.train.intervals import due
from diffussm.train.logger import Logger

SNAPSHOTS = 64
"""Snapshots of a training whose config does not say how many."""

_DTYPES = {SnapshotDtype.fp32: torch.float32, SnapshotDtype.bf16: torch.bfloat16, SnapshotDtype.fp16: torch.float16}


@dataclass
class Snapshots:
    """Writes `ema/<images>/`, in the form of a checkpoint that holds the power averages alone."""

    cfg: Config
    engine: Engine
    averages: Averages
    store: Store
    attempt: int
    logger: Logger

    def step(self, at: Counters) -> None:
        """Save if a snapshot is due. Collective: every rank must call it."""
        train = self.cfg.train
        if self.averages.power and due(at.images, train.global_batch, interval(self.cfg), train.images):
            self.save(at)

    def save(self, at: Counters) -> None:
        """Save now and delete what is superfluous. Collective: every rank must call it.

        Raises:
            StorageError: on every rank, if the snapshot could not be written.
        """
        folder = f"{FOLDER}/{at.images:012d}"
        dtype = _DTYPES[self.cfg.train.ema_snapshot_dtype]
        parts = []
        for piece in self.engine.slices():
            tensors = self.averages.tensors(piece.name)
            kept = {kind: stored(tensors[kind], dtype) for kind in self.averages.power}
            parts.append(Part(piece.name, piece.shape, piece.start, kept))
        manifest = save(
            self.store, folder, parts, self.engine.shapes, at,
            attempt=self.attempt, zero_stage=self.cfg.train.zero_stage, config_digest=digest(self.cfg),
        )  # fmt: skip
        if manifest is None:
            return
        self.logger.event("averages saved", images=at.images, bytes=sum(file.size for file in manifest.files))
        keep = self.cfg.train.keep_ema_snapshots
        folders = [name for name, _ in restore.manifests(self.store, FOLDER)] if keep else []
        for old in retain.superfluous(folders, keep, saved=folder):
            try:
                retain.delete(self.store, old)
            except StorageError as error:  # tried again after the next one
                self.logger.event("delete failed", checkpoint=old, reason=error.message)


def interval(cfg: Config) -> int:
    """Images between two snapshots."""
    return cfg.train.ema_snapshot_images or max(1, cfg.train.images // SNAPSHOTS)


def stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` (numel,) as `dtype`, or as they are if that would make a finite one infinite."""
    cast = values.to(dtype)
    return cast if dtype != torch.float16 or torch.equal(cast.isfinite(), values.isfinite()) else values.clone()
