"""The places checkpoints go to, and when: storage, and a folder on the node that is written more often."""

from __future__ import annotations

from dataclasses import dataclass

from diffussm.checkpoint.store import Store
from diffussm.config.schema import CheckpointConfig


@dataclass(frozen=True)
class Tier:
    """One place for checkpoints of a run."""

    name: str
    """`storage` or `local`."""
    store: Store
    every_images: int
    milestone_images: int
    """Images between two that are kept for ever; 0 for none."""
    keep: int

    def due(self, images: int, since: int) -> bool:
        """Whether an interval or a milestone lies after the step that ended at `since` and not after `images`."""
        return _crossed(images, since, self.every_images) or self.milestone(images, since)

    def milestone(self, images: int, since: int) -> bool:
        """Whether a milestone lies after `since` images and not after `images`."""
        return self.milestone_images > 0 and _crossed(images, since, self.milestone_images)


def tiers(cfg: CheckpointConfig, storage: Store, local: Store | None) -> list[Tier]:
    """The tiers in the order in which they are asked whether a save is due: what storage gets need not go elsewhere."""
    found = [Tier("storage", storage, cfg.every_images, cfg.milestone_images, cfg.keep)]
    if local is not None:
        found.append(Tier("local", local, cfg.local_every_images, 0, cfg.local_keep))
    return found


def _crossed(images: int, since: int, interval: int) -> bool:
    return images // interval > since // interval
