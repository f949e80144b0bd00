"""The DiffuSSM network: stem, blocks, head. Shapes: B images, L = H W positions, J = L / M groups, D channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffussm.config.schema import ModelConfig, PosEmbed
from diffussm.model.block import Block, modulate
from diffussm.model.embed import LabelEmbedding, TimestepEmbedding, positions
from diffussm.model.presets import LatentShape, check_fit, resolve


class DiffuSSM(nn.Module):
    """Denoiser of latents without attention and without patches (arXiv 2311.18257).

    The latent is read row by row as one sequence; M neighbours form a group. The residual stream is fp32; what
    autocast chooses applies to the dense layers.
    """

    def __init__(self, cfg: ModelConfig, latent: LatentShape, *, activation_checkpointing: bool = False) -> None:
        """Raises ConfigError where the sizes do not fit each other."""
        super().__init__()
        check_fit(cfg, latent)
        width, depth = resolve(cfg)
        self.latent = latent
        self.positions: Tensor | None
        self.hourglass = cfg.hourglass
        self.activation_checkpointing = activation_checkpointing
        self.stem = nn.Linear(cfg.hourglass * latent.channels, width)
        self.timestep = TimestepEmbedding(width)
        self.label = LabelEmbedding(latent.classes, width)
        self.blocks = nn.ModuleList(Block(width, cfg.hourglass, cfg.state, cfg.backend) for _ in range(depth))
        self.head = Head(width, cfg.hourglass * 2 * latent.channels)
        nn.init.xavier_uniform_(self.stem.weight)
        nn.init.zeros_(self.stem.bias)
        with_positions = cfg.pos_embed is PosEmbed.sincos
        table = positions(width, latent.height, latent.width, cfg.hourglass) if with_positions else None
        self.register_buffer("positions", table, persistent=False)  # (J, D)

    @property
    def null_label(self) -> int:
        """The label that stands for "no class"."""
        return self.latent.classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict noise and covariance of a noisy latent.

        Args:
            x: (B, C, H, W) noisy latents; C as the network was built for, H and W any whose product the hourglass
                divides: the state-space model has kernels for each length.
            t: (B,) timesteps.
            y: (B,) labels; `null_label` for none.

        Returns:
            (B, 2C, H, W) fp32: noise in the first C channels, the covariance's interpolation in the last C.

        Raises:
            ValueError: x has other channels, or a length that the hourglass does not divide.
        """
        batch, channels, height, columns = x.shape
        if channels != self.latent.channels or height * columns % self.hourglass:
            raise ValueError(
                f"x: found shape {tuple(x.shape)}; the network was built for {self.latent.channels} channels and "
                f"a length that {self.hourglass} divides"
            )
        c = nn.functional.silu(self.timestep(t) + self.label(y))  # (B, D)
        h = self.stem(self._group(x)).float()  # (B, J, D)
        if self.positions is not None:
            h = h + self._positions(self.positions, height, columns)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, c, use_reentrant=False)
            else:
                h = block(h, c)
        out = self.head(h, c).float()  # (B, J, M 2C)
        return out.reshape(batch, height * columns, -1).transpose(1, 2).reshape(batch, -1, height, columns)

    def _positions(self, table: Tensor, height: int, columns: int) -> Tensor:
        """(J, D) for latents of this size; `table` is for the size the network was built for."""
        if (height, columns) == (self.latent.height, self.latent.width):
            return table
        return positions(table.shape[1], height, columns, self.hourglass).to(table.device)

    def _group(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, J, M C): the channels of M neighbours side by side."""
        sequence = x.flatten(2).transpose(1, 2)  # (B, L, C)
        return sequence.reshape(x.shape[0], sequence.shape[1] // self.hourglass, -1)


class Head(nn.Module):
    """Final modulated norm and a zero-initialised linear layer."""

    def __init__(self, width: int, features_out: int) -> None:
        super().__init__()
        self.adaln = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, features_out)
        for layer in (self.adaln, self.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, J, D), c (B, D) activated condition -> (B, J, features_out)."""
        shift, scale = self.adaln(c).chunk(2, dim=1)  # (B, D) each
        return self.linear(modulate(x, shift, scale))
