"""Embeddings: timestep, label with a null class, and the optional position."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_FREQUENCIES = 256
"""Size of the sinusoid that encodes a timestep, as in DiT."""


def sinusoid(t: Tensor, size: int, max_period: float = 10_000.0) -> Tensor:
    """(B,) -> (B, size) fp32: cosines, then sines, of t times frequencies from 1 down to 1/max_period."""
    half = size // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * exponents)  # (B, size/2)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def positions(width: int, height: int, columns: int, ratio: int) -> Tensor:
    """(J, width) fp32: row (first half of the channels) and column (second half) where each group of `ratio` begins."""
    first = torch.arange(0, height * columns, ratio)  # (J,) index of the group's first position
    return torch.cat((sinusoid(first // columns, width // 2), sinusoid(first % columns, width // 2)), dim=1)


class TimestepEmbedding(nn.Module):
    """Sinusoid of the timestep, then a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(_FREQUENCIES, width)
        self.outer = nn.Linear(width, width)
        for layer in (self.inner, self.outer):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) integers or floats -> (B, D)."""
        h = sinusoid(t, _FREQUENCIES).to(self.inner.weight.dtype)  # (B, 256)
        return self.outer(nn.functional.silu(self.inner(h)))


class LabelEmbedding(nn.Module):
    """One vector for each class and, at index `classes`, one for "no label"."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, y: Tensor) -> Tensor:
        """y (B,) integers in 0..classes -> (B, D)."""
        return self.table(y)
