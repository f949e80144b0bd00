"""Measures what checkpoint/pace.py reckons with: how fast the steps are and how often this run was started anew."""

from __future__ import annotations

import json
import time

from diffussm.checkpoint.fence import record
from diffussm.checkpoint.pace import FIRST_STEPS, Measured, fault_every_s, interval_images
from diffussm.checkpoint.store import Store
from diffussm.config.schema import Config


def begun_s(store: Store) -> float:
    """When the first start of the run in `store` began, seconds since 1970."""
    return float(json.loads(store.read(record(1)))["time"])


class Rhythm:
    """When the next save of `checkpoint.pace=auto` is due.

    Attributes:
        next: images at which it is due, the same on every rank.
    """

    def __init__(self, cfg: Config, images: int, attempt: int, begun_s: float) -> None:
        """A start goes on at `images`, of a run whose first one began at `begun_s` (seconds since 1970)."""
        self._cfg, self._attempt, self._begun = cfg, attempt, begun_s
        self._images, self._since = images, time.monotonic()
        self.next = images + min(FIRST_STEPS * cfg.train.global_batch, cfg.checkpoint.every_images)

    def interval(self, images: int, stall_s: float, save_s: float | None) -> int:
        """Images until the next save, as this rank measures it. Every start counts as a fault.

        Args:
            images: where the training stands.
            stall_s: what the last save cost the step.
            save_s: its whole duration; None if none has ended yet.
        """
        checkpoint = self._cfg.checkpoint
        rate = (images - self._images) / max(1e-9, time.monotonic() - self._since)
        between = fault_every_s(checkpoint.fault_every_s, time.time() - self._begun, self._attempt - 1)
        measured = Measured(stall_s, save_s or stall_s, rate, between)
        return interval_images(measured, self._cfg.train.global_batch, checkpoint.every_images)
