"""Rank 0's voice beside the steps: metrics, telemetry, events and the driver, at intervals counted in images."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffussm.checkpoint.fence import Fence
from diffussm.checkpoint.manifest import Counters
from diffussm.checkpoint.store import Store
from diffussm.config.schema import Config, Precision
from diffussm.observe.events import Journal, close, flush
from diffussm.observe.goodput import Ledger
from diffussm.observe.meter import Meter
from diffussm.observe.peak import peak
from diffussm.train.engine import StepResult
from diffussm.train.intervals import due
from diffussm.train.phases import Phases
from diffussm.train.telemetry import TimestepLosses
from diffussm.train.world import World

_LOG = logging.getLogger(__name__)
Announce = Callable[[dict[str, Any]], None]
"""Where rank 0 tells the driver what happens; a record has a `kind`."""


class Logger:
    """Rank 0's voice: metrics.jsonl, telemetry.jsonl, events.jsonl and the driver. Silent on the other ranks."""

    def __init__(
        self, cfg: Config, world: World, store: Store, attempt: int, announce: Announce, phases: Phases, macs: float
    ) -> None:  # fmt: skip
        """`macs` are the multiply-adds of training on one image."""
        self.cfg, self.world, self.attempt, self.announce, self.phases = cfg, world, attempt, announce, phases
        self._macs, self._peak = macs, 0.0
        self._losses: list[Tensor] = []
        self._samples = 0
        self._was_skipped = False
        if world.leads:
            fence = Fence(store, attempt)
            self._metrics = Journal(store, "metrics.jsonl", fence)
            self._events = Journal(store, "events.jsonl", fence)
            self._telemetry = Journal(store, "telemetry.jsonl", fence)
            self._ledger = Ledger(store, attempt, fence)

    def begin(self, at: Counters) -> None:
        """Start the clock of rate and ETA, and say where the training goes on."""
        about: dict[str, Any] = {}
        if self.world.leads:
            found = peak(self.world.device, bf16=self.cfg.train.precision is Precision.bf16)
            self._peak = found.macs_per_s * self.world.size
            about = {"peak_macs_per_s": round(self._peak), "peak": found.source}
            self._ledger.begin(at.images, self._seconds())
        self._meter = Meter(at.images, self.cfg.train.images)
        self.event("resumed" if at.images else "started", images=at.images, world_size=self.world.size, **about)

    def measured(self, record: dict[str, Any] | None) -> None:
        """What telemetry saw in a step, if it looked: one line in telemetry.jsonl, and to the driver."""
        if record is not None and self.world.leads:
            record = record | {
                "attempt": self.attempt, "goodput": self._ledger.share, "goodput_seconds": self._ledger.seconds,
            }  # fmt: skip
            self._telemetry.write(record)
            self.announce({"kind": "telemetry"} | record)

    def step(
        self, result: StepResult, at: Counters, lr: float, samples: int, by_timestep: TimestepLosses | None
    ) -> None:  # fmt: skip
        """Note one step; at each interval log the mean loss since the last line. Collective at the interval.

        `samples` is this rank's `Batch.fingerprint`; their sum tells whether two runs saw the same.
        """
        train = self.cfg.train
        self._samples = _wrapped(self._samples + samples)
        if not result.skipped:
            self._losses.append(result.loss)
        elif not self._was_skipped:  # the first of some in a row
            self.event("non-finite step", images=at.images, nonfinite_steps=at.nonfinite_steps)
        self._was_skipped = result.skipped
        if not due(at.images, train.global_batch, train.log_images, train.images):
            return
        loss, seen = _mean_over_ranks(self._losses), _sum_over_ranks(self._samples, self.world.device)
        quartiles = by_timestep.take() if by_timestep else {}
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
            **quartiles,
            "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
            "lr": lr,
            "images_per_s": round(reading.rate, 2),
            "macs_per_s": round(reading.rate * self._macs),
            "mfu": round(reading.rate * self._macs / self._peak, 4),
            "nonfinite_steps": at.nonfinite_steps,
            "attempt": self.attempt,
            "samples": f"{seen % (1 << 64):016x}",
        }
        self._metrics.write(record)
        booked = self._ledger.step(at.images, self._seconds())
        self.announce({"kind": "progress", "total": train.images, "eta_s": reading.eta_s, "seconds": booked} | record)

    def event(self, what: str, **details: Any) -> None:
        """One line in events.jsonl, and to the driver."""
        if self.world.leads:
            self._events.write({"event": what, "attempt": self.attempt} | details)
            self.announce({"kind": "event", "event": what, "stored": True} | details)

    def _seconds(self) -> dict[str, float]:
        return {phase.value: spent for phase, spent in self.phases.seconds().items()}

    def flush(self, timeout_s: float) -> None:
        """Wait until every line so far is stored, for at most `timeout_s`; what is not is told as a warning."""
        if self.world.leads and not flush(self._journals(), timeout_s):
            _LOG.warning("lines of the steps so far were not stored within %.3g s; a kill would lose them", timeout_s)

    def close(self, timeout_s: float = 60.0) -> None:
        """Finish the journals, all of them within `timeout_s`."""
        if self.world.leads:
            close(self._journals(), timeout_s)

    def _journals(self) -> list[Journal]:
        return [self._metrics, self._events, self._telemetry, self._ledger.journal]


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
