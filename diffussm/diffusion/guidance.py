"""Classifier-free guidance: Ho and Salimans (arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffussm.errors import ConfigError

Model = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, C, H, W), t (B,), y (B,)) -> (B, 2C, H, W): noise, then covariance."""


def guided_output(
    model: Model, x: Tensor, t: Tensor, y: Tensor, *, scale: float, channels: int, null_class: int
) -> Tensor:
    """The model's output with its noise led away from the unconditional one.

    noise = null + scale * (conditional - null) on the guided channels; the other noise channels and the covariance are
    the conditional model's. Both halves go through the network in one forward pass of 2B samples. A scale of 1 is the
    conditional model and costs one pass of B.

    DiT's released code guides channels 0 to 2 of 4. The number comes from samplers for RGB images, where 3 was all of
    them; DiT kept it so that its published samples can be reproduced, and says that guiding every channel is the
    standard. `channels=3` therefore compares with its tables and `channels=0` is guidance as the paper defines it. The
    covariance has no null counterpart worth extrapolating: a scaled difference of log variances can leave the range
    between the posterior variance and beta.

    Args:
        model: the network.
        x: (B, C, H, W) noisy latents.
        t: (B,) timesteps.
        y: (B,) labels.
        scale: guidance scale; 1 leaves the conditional model as it is.
        channels: how many of the first noise channels are guided; 0 guides all C.
        null_class: label of "no class".

    Returns:
        (B, 2C, H, W)

    Raises:
        ConfigError: `channels` is negative or more than C.
    """
    available = x.shape[1]
    if not 0 <= channels <= available:
        raise ConfigError(
            f"sample.guidance_channels: found {channels}; allowed are 0 (all) to {available}, the latent's channels",
            "set sample.guidance_channels=0 to guide all channels",
        )
    if scale == 1.0:
        return model(x, t, y)
    guided = channels or available
    labels = torch.cat([y, torch.full_like(y, null_class)])  # (2B,)
    both = model(torch.cat([x, x]), torch.cat([t, t]), labels)  # (2B, 2C, H, W)
    conditional, null = both.chunk(2)  # (B, 2C, H, W) each
    base = null[:, :guided]  # (B, guided, H, W)
    noise = base + scale * (conditional[:, :guided] - base)  # (B, guided, H, W)
    return torch.cat([noise, conditional[:, guided:]], dim=1)  # (B, 2C, H, W)
