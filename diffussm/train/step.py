"""From a batch of latents to the loss of one micro batch. All randomness belongs to the sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from diffussm.config.schema import Config
from diffussm.data.cursor import Batch
from diffussm.diffusion.process import Process
from diffussm.rng import Purpose, generator

Note = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Inputs:
    """What the network and the loss are given."""

    x0: Tensor
    """(B, C, H, W) latent drawn from the posterior."""
    t: Tensor
    """(B,) int64 timestep in [0, T)."""
    noise: Tensor
    """(B, C, H, W)."""
    y: Tensor
    """(B,) int64 label, or the null class where it was dropped."""
    id: Tensor
    """(B,) int64 sample ids, on the host."""

    def to(self, device: torch.device) -> Inputs:
        """The same on another device."""
        x0, t, noise, y = (f.to(device, non_blocking=True) for f in (self.x0, self.t, self.noise, self.y))
        return Inputs(x0, t, noise, y, self.id)


def draw(batch: Batch, cfg: Config, epoch: int, null_class: int) -> Inputs:
    """Draw flip, label drop, timestep, posterior sample and noise of each sample, in this fixed order, on the host.

    Keyed by (seed, epoch, sample id): the same for any batch size, rank layout or device, and after any restart.
    """
    ids: Sequence[int] = batch.id.tolist()
    latent = tuple(batch.mean.shape[1:])
    flips = np.empty(len(ids), dtype=bool)
    drops = np.empty(len(ids), dtype=bool)
    steps = np.empty(len(ids), dtype=np.int64)
    normal = np.empty((2, len(ids), *latent), dtype=np.float32)
    for i, sample in enumerate(ids):
        rng = generator(cfg.seed, Purpose.TRAIN, sample, epoch)
        flip, drop = rng.random(2)
        flips[i], drops[i] = cfg.data.flip and flip < 0.5, drop < cfg.diffusion.label_drop
        steps[i] = rng.integers(cfg.diffusion.timesteps)
        rng.standard_normal(dtype=np.float32, out=normal[0, i])
        rng.standard_normal(dtype=np.float32, out=normal[1, i])
    flipped = torch.from_numpy(flips)  # (B,)
    where = flipped.view(-1, 1, 1, 1)
    mean = torch.where(where, batch.mean_flip, batch.mean)  # (B, C, H, W)
    std = torch.where(where, batch.std_flip, batch.std)  # (B, C, H, W)
    posterior, noise = torch.from_numpy(normal)  # (B, C, H, W) each
    y = batch.label.masked_fill(torch.from_numpy(drops), null_class)  # (B,)
    return Inputs(mean + std * posterior, torch.from_numpy(steps), noise, y, batch.id)


def loss(model: nn.Module, process: Process, inputs: Inputs, note: Note | None = None) -> Tensor:
    """Mean hybrid loss of one micro batch, a scalar (noise MSE plus the covariance's variational bound).

    `note` is shown each sample's loss (B,), detached, with its timestep (B,).
    """
    noisy = process.q_sample(inputs.x0, inputs.t, inputs.noise)  # (B, C, H, W)
    output = model(noisy, inputs.t, inputs.y)  # (B, 2C, H, W)
    total = process.loss(output, inputs.x0, inputs.t, inputs.noise).total  # (B,)
    if note is not None:
        note(total.detach(), inputs.t)
    return total.mean()
