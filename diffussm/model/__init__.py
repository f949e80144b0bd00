"""The DiffuSSM network. `presets` and `counts` need no torch, so that a login node can plan with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffussm.model.presets import LatentShape

if TYPE_CHECKING:
    from torch import nn

    from diffussm.config.schema import ModelConfig

__all__ = ["LatentShape", "build_model"]


def build_model(cfg: ModelConfig, latent: LatentShape, *, activation_checkpointing: bool = False) -> nn.Module:
    """The network of `cfg` for latents of that shape, freshly initialised from torch's global random state, fp32.

    Args:
        cfg: section `model` of the config.
        latent: channels, height and width of the latents, and number of classes.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.

    Returns:
        A module called as `model(x (B, C, H, W), t (B,), y (B,)) -> (B, 2C, H, W)` fp32; see `network.DiffuSSM`.
        Under `torch.device("meta")` it has shapes and no memory.

    Raises:
        ConfigError: unknown preset, or sizes that do not fit each other.
    """
    from diffussm.model.network import DiffuSSM

    return DiffuSSM(cfg, latent, activation_checkpointing=activation_checkpointing)
