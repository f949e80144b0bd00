"""What a step looks like inside: loss by timestep, norms by block, distance of the averages, load of the nodes.

Losses by timestep are summed up on the device in every step, which takes no waiting; the rest is looked at only in the
steps of `observe.telemetry_images`. Nothing here is state of the run or changes a number of it.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffussm.checkpoint.manifest import Counters
from diffussm.checkpoint.restore import everyone
from diffussm.config.schema import Config
from diffussm.observe.machine import Machine, by_node
from diffussm.train.ema import Averages
from diffussm.train.engine import Engine
from diffussm.train.intervals import due

QUARTILES = 4


class TimestepLosses:
    """Losses of the samples by quartile of their timestep, of the steps that were not skipped."""

    def __init__(self, timesteps: int, device: torch.device) -> None:
        self._timesteps, self._device = timesteps, device
        self._step = torch.zeros(2, QUARTILES, dtype=torch.float64, device=device)  # (2, 4) sums and numbers
        self._kept = torch.zeros_like(self._step)  # (2, 4)

    @torch.no_grad()
    def note(self, losses: Tensor, t: Tensor) -> None:
        """Add samples of the present step: `losses` (B,) and timesteps `t` (B,). No waiting for the device."""
        quartile = t * QUARTILES // self._timesteps  # (B,) 0 holds the least noise
        pairs = torch.stack([losses.detach().double(), torch.ones_like(losses, dtype=torch.float64)])  # (2, B)
        self._step.index_add_(1, quartile, pairs)

    def end_step(self, *, skipped: bool) -> None:
        """The present step is over; if it was skipped its losses do not count."""
        if not skipped:
            self._kept += self._step
        self._step.zero_()

    def take(self) -> dict[str, float]:
        """Means over all ranks' samples since the last call, as `loss_q1` ... `loss_q4`. Collective: every rank must.

        A quartile without a sample is left out.
        """
        dist.all_reduce(self._kept)
        sums, numbers = self._kept.tolist()
        self._kept.zero_()
        return {f"loss_q{i + 1}": s / n for i, (s, n) in enumerate(zip(sums, numbers, strict=True)) if n}


def block_of(name: str) -> str:
    """The part of the network that a parameter belongs to: `blocks.3.ssm.log_dt` is of `blocks.3`. Pure."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]


@torch.no_grad()
def squares(pieces: Iterable[tuple[str, Tensor]], blocks: Sequence[str], device: torch.device) -> Tensor:
    """Sum of squares by block, (len(blocks),) float64, of tensors named by parameter. Local."""
    named = list(pieces)
    total = torch.zeros(len(blocks), dtype=torch.float64, device=device)  # (K,)
    if named:
        norms = torch.stack(torch._foreach_norm([tensor for _, tensor in named]))  # (P,)
        places = torch.tensor([blocks.index(block_of(name)) for name, _ in named], device=device)  # (P,)
        total.index_add_(0, places, norms.double().square())
    return total


class Telemetry:
    """Measures the steps of `observe.telemetry_images`. Making one is collective: every rank must.

    Attributes:
        losses: losses by timestep; None if telemetry is off.
    """

    def __init__(self, cfg: Config, engine: Engine, averages: Averages) -> None:
        """Tell the ranks' hosts to each other. Collective: every rank must."""
        self._interval = cfg.observe.telemetry_images
        self._train, self._engine, self._averages = cfg.train, engine, averages
        self._device = engine.world.device
        self.blocks = list(dict.fromkeys(block_of(name) for name in engine.shapes))
        self.losses: TimestepLosses | None = None
        self._gradients: Tensor | None = None
        if self._interval:
            self.losses = TimestepLosses(cfg.diffusion.timesteps, self._device)
            self._hosts = everyone(socket.gethostname)
            self._machine = Machine(self._device)

    def note(self, losses: Tensor, t: Tensor) -> None:
        """Losses (B,) of a micro batch with timesteps `t` (B,)."""
        if self.losses is not None:
            self.losses.note(losses, t)

    def due(self, images: int) -> bool:
        """Whether the step that ends at `images` is measured; the same on every rank."""
        return bool(self._interval) and due(images, self._train.global_batch, self._interval, self._train.images)

    def gradients(self) -> None:
        """Look at the gradients, between the last backward pass and the update. Local."""
        self._gradients = squares(self._engine.gradients(), self.blocks, self._device)  # (K,)

    def step(self, at: Counters, *, skipped: bool) -> dict[str, Any] | None:
        """Close a step. A record of what was measured if it was due. Collective then: every rank must call it.

        Norms are those of the averaged gradient before it is clipped, of the fp32 weights after the step, and of the
        difference between an average and the weights over that of the weights. What is not finite is None.
        """
        if self.losses is not None:
            self.losses.end_step(skipped=skipped)
        if not self.due(at.images):
            return None
        live = {piece.name: piece.tensors["master"] for piece in self._engine.slices()}
        weights = squares(live.items(), self.blocks, self._device)  # (K,)
        kinds = self._averages.kinds
        away = torch.stack([self._away(kind, live) for kind in kinds])  # (E,)
        gradients = torch.zeros_like(weights) if self._gradients is None else self._gradients  # (K,)
        together = torch.cat([gradients, weights, away])  # (2 K + E,)
        dist.all_reduce(together)
        gradients, weights, away = together.split([len(self.blocks), len(self.blocks), len(kinds)])
        return {
            "images": at.images,
            "step": at.step,
            "grad_norm": _named(self.blocks, gradients.sqrt()),
            "param_norm": _named(self.blocks, weights.sqrt()),
            "ema_distance": _named(kinds, (away / weights.sum()).sqrt()),
            "nonfinite_steps": at.nonfinite_steps,
            "nodes": by_node(self._hosts, self._readings()),
        }

    def _away(self, kind: str, live: dict[str, Tensor]) -> Tensor:
        """Squared distance of this rank's part of an average from the weights, a scalar; a tensor at a time."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for name, weight in live.items():
            average = self._averages.averages[kind][self._averages.place[name]]
            total += torch.linalg.vector_norm(average - weight).double().square()
        return total

    def _readings(self) -> list[list[float]]:
        """Every rank's look at its machine. Collective: every rank must call it."""
        mine = torch.tensor(self._machine.read(), dtype=torch.float32, device=self._device)  # (F,)
        everybody = [torch.empty_like(mine) for _ in self._hosts]
        dist.all_gather(everybody, mine)
        return [reading.tolist() for reading in everybody]


def _named(names: Sequence[str], values: Tensor) -> dict[str, float | None]:
    return {n: v if math.isfinite(v) else None for n, v in zip(names, values.tolist(), strict=True)}
