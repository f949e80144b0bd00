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

from diffussm.checkpoint.fence import Fence
from diffussm.checkpoint.manifest import Counters
from diffussm.checkpoint.store import LocalStore, Store
from diffussm.config import dump
from diffussm.config.schema import Config
from diffussm.observe.events import Journal
from diffussm.observe.goodput import Ledger
from diffussm.observe.meter import Meter
from diffussm.observe.sinks import WandbSink, wandb_mode
from diffussm.train.engine import StepResult
from diffussm.train.intervals import due
from diffussm.train.phases import Phases
from diffussm.train.world import World

Announce = Callable[[dict[str, Any]], None]
"""Where rank 0 tells the driver what happens; a record has a `kind`."""


class Logger:
    """Rank 0's voice: metrics.jsonl, events.jsonl, W&B and the driver. Silent on the other ranks."""

    def __init__(
        self, cfg: Config, world: World, store: Store, attempt: int, announce: Announce, scratch: Path, phases: Phases
    ) -> None:  # fmt: skip
        self.cfg, self.world, self.attempt, self.announce, self.phases = cfg, world, attempt, announce, phases
        self._losses: list[Tensor] = []
        self._samples = 0
        if world.leads:
            fence = Fence(store, attempt)
            self._metrics = Journal(store, "metrics.jsonl", fence)
            self._events = Journal(store, "events.jsonl", fence)
            self._ledger = Ledger(store, attempt)
            folder = store.root if isinstance(store, LocalStore) else scratch
            self._wandb = WandbSink(
                cfg.name, cfg.observe.project, wandb_mode(cfg.observe.wandb), yaml.safe_load(dump(cfg)), folder
            )

    def begin(self, at: Counters) -> None:
        """Start the clock of rate and ETA, and say where the training goes on."""
        self._meter = Meter(at.images, self.cfg.train.images)
        if self.world.leads:
            self._ledger.begin(at.images, self._seconds())
        self.event("resumed" if at.images else "started", images=at.images, world_size=self.world.size)

    def step(self, result: StepResult, at: Counters, lr: float, samples: int) -> None:
        """Note one step; at each interval log the mean loss since the last line. Collective at the interval.

        `samples` is this rank's `Batch.fingerprint`; their sum tells whether two runs saw the same.
        """
        train = self.cfg.train
        self._samples = _wrapped(self._samples + samples)
        if not result.skipped:
            self._losses.append(result.loss)
        if not due(at.images, train.global_batch, train.log_images, train.images):
            return
        loss, seen = _mean_over_ranks(self._losses), _sum_over_ranks(self._samples, self.world.device)
        self._losses.clear()
        self._samples = 0
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
            "samples": f"{seen % (1 << 64):016x}",
        }
        self._metrics.write(record)
        booked = self._ledger.step(at.images, self._seconds())
        self._wandb.write(record | {f"goodput/{cause}_s": spent for cause, spent in booked.items()})
        self.announce({"kind": "progress", "total": train.images, "eta_s": reading.eta_s} | record)

    def event(self, what: str, **details: Any) -> None:
        """One line in events.jsonl, and to the driver."""
        if self.world.leads:
            self._events.write({"event": what, "attempt": self.attempt} | details)
            self.announce({"kind": "event", "event": what} | details)

    def _seconds(self) -> dict[str, float]:
        return {phase.value: spent for phase, spent in self.phases.seconds().items()}

    def close(self) -> None:
        """Finish the journals and W&B."""
        if self.world.leads:
            self._metrics.close()
            self._events.close()
            self._ledger.close()
            self._wandb.close()


def _mean_over_ranks(losses: list[Tensor]) -> float:
    """Mean of the ranks' mean losses; NaN if every step was skipped. Collective: every rank must call it."""
    if not losses:
        return float("nan")  # a step is skipped on all ranks or on none, so all return here
    mean = torch.stack(losses).mean()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def _sum_over_ranks(number: int, device: torch.device) -> int:
    """Sum of the ranks' 64-bit numbers, modulo 2**64. Collective: every rank must call it."""
    total = torch.tensor(number, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total)


def _wrapped(number: int) -> int:
    """`number` modulo 2**64 as a signed 64-bit integer."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
