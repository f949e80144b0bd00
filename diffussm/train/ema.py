"""Moving averages of the weights, kept on each rank for its own slices only: plain and power functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffussm.checkpoint.profiles import beta, gamma
from diffussm.config.schema import TrainConfig
from diffussm.naming import power_name, weights_kind
from diffussm.train.engine import Slice

REFERENCE_BATCH = 256
"""Images of one step in the recipe the plain decay is quoted for."""


def decay_for_batch(decay: float, global_batch: int) -> float:
    """Decay of one step of `global_batch` images that forgets as fast, counted in images, as `decay` does for 256."""
    return decay ** (global_batch / REFERENCE_BATCH)


class Averages:
    """Averages e <- decay * e + (1 - decay) * w of every fp32 master weight this rank owns, by kind.

    `ema-plain` has the constant decay `train.ema`. `ema-power-0.050` has the decay of the power-function profile whose
    relative width is 0.05, which follows from the images seen alone (`diffussm.checkpoint.profiles`).

    Elementwise, so the union of all ranks' slices equals averages kept of the whole model, bit for bit. They are state
    of their own: never swapped into the live network.
    """

    def __init__(self, slices: Sequence[Slice], cfg: TrainConfig) -> None:
        self.plain_decay = decay_for_batch(cfg.ema, cfg.global_batch)
        self.step_images = cfg.global_batch
        self.power = {weights_kind(power_name(width)): gamma(width) for width in cfg.power_ema}
        self.live = [piece.tensors["master"] for piece in slices]
        self.kinds = (weights_kind("plain"), *self.power)
        self.averages = {kind: [tensor.clone() for tensor in self.live] for kind in self.kinds}
        self.place = {piece.name: index for index, piece in enumerate(slices)}

    @torch.no_grad()
    def update(self, images: int, *, skipped: bool = False) -> None:
        """Move the averages towards the present weights. Local.

        Args:
            images: images seen at the end of the step.
            skipped: the step did not change the weights. The plain average counts steps and waits; those of images
                take the same weights once more, since a profile that is put together afterwards counts every image.
        """
        if not skipped:
            torch._foreach_lerp_(self.averages[self.kinds[0]], self.live, 1.0 - self.plain_decay)
        for kind, exponent in self.power.items():
            torch._foreach_lerp_(self.averages[kind], self.live, 1.0 - beta(images, self.step_images, exponent))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The averages of this rank's slice of a parameter by kind, (numel,) each: live, not copies."""
        return {kind: self.averages[kind][self.place[name]] for kind in self.kinds}
