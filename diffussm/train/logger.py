"""Rank 0's voice beside the steps: metrics, events, W&B and the driver, at intervals counted in images."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from diffussm.checkpoint.manifest import Counters
from diffussm.checkpoint.store import LocalStore, Store
from diffussm.config import dump
from diffussm.config.schema import Config
from diffussm.observe.events import Journal
from diffussm.observe.meter import Meter
from diffussm.observe.sinks import WandbSink, wandb_mode
from diffussm.train.engine import StepResult
from diffussm.train.intervals import due
from diffussm.train.world import World

Announce = Callable[[dict[str, Any]], None]
"""Where rank 0 tells the driver what happens; a record has a `kind`."""


class Logger:
    """Rank 0's voice: metrics.jsonl, events.jsonl, W&B and the driver. Silent on the other ranks."""

    def __init__(
        self, cfg: Config, world: World, store: Store, attempt: int, announce: Announce, scratch: Path
    ) -> None:  # fmt: skip
        self.cfg, self.world, self.attempt, self.announce = cfg, world, attempt, announce
        self._losses: list[Tensor] = []
        if world.leads:
            self._metrics = Journal(store, "metrics.jsonl")
            self._events = Journal(store, "events.jsonl")
            folder = store.root if isinstance(store, LocalStore) else scratch
            self._wandb = WandbSink(
                cfg.name, cfg.observe.project, wandb_mode(cfg.observe.wandb), yaml.safe_load(dump(cfg)), folder
            )

    def begin(self, at: Counters) -> None:
        """Start the clock of rate and ETA, and say where the training goes on."""
        self._meter = Meter(at.images, self.cfg.train.images)
        self.event("resumed" if at.images else "started", images=at.images, world_size=self.world.size)

    def step(self, result: StepResult, at: Counters, lr: float) -> None:
        """Note one step; at each interval log the mean loss since the last line. Collective at the interval."""
        train = self.cfg.train
        if not result.skipped:
            self._losses.append(result.loss)
        if not due(at.images, train.global_batch, train.log_images, train.images):
            return
        loss = _mean_over_ranks(self._losses)
        self._losses.clear()
        if not self.world.leads:
            return
        reading = self._meter.read(at.images)
        record = {
            "images": at.images,
            "step": at.step,
            "epoch": at.epoch,
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
            "lr": lr,
            "images_per_s": round(reading.rate, 2),
            "nonfinite_steps": at.nonfinite_steps,
            "attempt": self.attempt,
        }
        self._metrics.write(record)
        self._wandb.write(record)
        self.announce({"kind": "progress", "total": train.images, "eta_s": reading.eta_s} | record)

    def event(self, what: str, **details: Any) -> None:
        """One line in events.jsonl, and to the driver."""
        if self.world.leads:
            self._events.write({"event": what, "attempt": self.attempt} | details)
            self.announce({"kind": "event", "event": what} | details)

    def close(self) -> None:
        """Finish the journals and W&B."""
        if self.world.leads:
            self._metrics.close()
            self._events.close()
            self._wandb.close()


def _mean_over_ranks(losses: list[Tensor]) -> float:
    """Mean of the ranks' mean losses; NaN if every step was skipped. Collective: every rank must call it."""
    if not losses:
        return float("nan")  # a step is skipped on all ranks or on none, so all return here
    mean = torch.stack(losses).mean()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()
