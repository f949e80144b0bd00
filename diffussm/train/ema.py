"""Exponential moving average of the weights, kept on each rank for its own slices only."""

from __future__ import annotations

import torch
from torch import Tensor

from diffussm.train.engine import Slice

REFERENCE_BATCH = 256
"""Images of one step in the recipe the decay is quoted for."""


def decay_for_batch(decay: float, global_batch: int) -> float:
    """Decay of one step of `global_batch` images that forgets as fast, counted in images, as `decay` does for 256."""
    return decay ** (global_batch / REFERENCE_BATCH)


class Ema:
    """The average e <- decay * e + (1 - decay) * w of every fp32 master weight this rank owns.

    Elementwise, so the union of all ranks' slices equals an average kept of the whole model, bit for bit.
    It is state of its own: it is never swapped into the live network.
    """

    def __init__(self, slices: list[Slice], decay: float) -> None:
        self.decay = decay
        self.live = [piece.tensors["master"] for piece in slices]
        self.average = [tensor.clone() for tensor in self.live]
        self.by_name = {piece.name: tensor for piece, tensor in zip(slices, self.average, strict=True)}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights; call after each step that was not skipped. Local."""
        torch._foreach_lerp_(self.average, self.live, 1.0 - self.decay)

    def tensor(self, name: str) -> Tensor:
        """The average of this rank's slice of a parameter, (numel,)."""
        return self.by_name[name]
