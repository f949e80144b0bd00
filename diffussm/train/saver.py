"""Checkpoints of the engine and the EMA, saved at intervals counted in images and restored at a start."""

from __future__ import annotations

from dataclasses import dataclass

from diffussm.checkpoint import restore, retain
from diffussm.checkpoint.manifest import Counters
from diffussm.checkpoint.save import Part, save
from diffussm.checkpoint.store import Store
from diffussm.config import digest
from diffussm.config.schema import Config
from diffussm.errors import StorageError
from diffussm.train.ema import Averages
from diffussm.train.engine import Engine, Slice
from diffussm.train.intervals import due
from diffussm.train.logger import Logger


@dataclass
class Saver:
    """Checkpoints of the engine and the EMA."""

    cfg: Config
    engine: Engine
    averages: Averages
    store: Store
    attempt: int
    logger: Logger

    def parts(self, slices: list[Slice]) -> list[Part]:
        """What a checkpoint holds of this rank's own slices."""
        return [Part(s.name, s.shape, s.start, s.tensors | self.averages.tensors(s.name)) for s in slices]

    def restore(self) -> Counters:
        """Put the newest checkpoint that verifies into engine and EMA. Collective: every rank must call it.

        Returns where the training stands: all zero if there is no checkpoint.
        """
        found = restore.newest(self.store, lambda text: self.logger.event("checkpoint refused", reason=text))
        if found is None:
            return Counters(0, 0, 0, 0, 0, 0)
        folder, manifest = found
        held = [Part(s.name, s.shape, s.start, s.tensors) for s in self.engine.slices(held=True)]
        averaged = [Part(s.name, s.shape, s.start, self.averages.tensors(s.name)) for s in self.engine.slices()]
        restore.read_into(self.store, folder, manifest, held + averaged)
        self.engine.restored(manifest.counters.adam_steps)
        return manifest.counters

    def step(self, at: Counters) -> None:
        """Save if a checkpoint is due. Collective: every rank must call it."""
        train = self.cfg.train
        if due(at.images, train.global_batch, train.checkpoint_images, train.images):
            self.save(at)

    def leave(self, at: Counters, deadline_s: float) -> None:
        """Save for a departure at a time since 1970. Collective: every rank must call it."""
        self.save(at)

    def save(self, at: Counters) -> None:
        """Save now and delete what is superfluous. Collective: every rank must call it.

        Raises:
            StorageError: on every rank, if the checkpoint could not be written.
        """
        folder = f"checkpoints/{at.images:012d}"
        manifest = save(
            self.store, folder, self.parts(self.engine.slices()), self.engine.shapes, at,
            attempt=self.attempt, zero_stage=self.cfg.train.zero_stage, config_digest=digest(self.cfg),
        )  # fmt: skip
        if manifest is None:
            return
        size = sum(file.size for file in manifest.files)
        self.logger.event("saved", images=at.images, checkpoint=folder, bytes=size)
        folders = [name for name, _ in restore.manifests(self.store)]
        for old in retain.superfluous(folders, self.cfg.train.keep_checkpoints, saved=folder):
            try:
                retain.delete(self.store, old)
            except StorageError as error:  # tried again after the next save; an old checkpoint too many harms nobody
                self.logger.event("delete failed", checkpoint=old, reason=error.message)
