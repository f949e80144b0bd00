"""AdamW and its learning rate, with the policy each parameter declares where it is made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from diffussm.config.schema import TrainConfig


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters by the weight decay that each asks for.

    A parameter may carry `_optim = {"weight_decay": ...}`; the state-space parameters do, with 0, because decay would
    pull their time scales to 1. All others get `weight_decay`. A group without members is left out.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        decay = getattr(parameter, "_optim", {}).get("weight_decay", weight_decay)
        groups.setdefault(float(decay), []).append(parameter)
    return [{"params": members, "weight_decay": decay} for decay, members in groups.items()]


def adamw(groups: list[dict[str, Any]], cfg: TrainConfig) -> torch.optim.AdamW:
    """torch's own fused AdamW: no just-in-time build, on CPU and CUDA."""
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=1e-8, fused=True)


def learning_rate(cfg: TrainConfig, images: int) -> float:
    """Learning rate of the step that begins after `images` images: linear warm-up, constant, linear decay at the end.

    The first step of a warm-up already moves: it counts its own images.
    """
    rate = cfg.lr
    if cfg.warmup_images:
        rate *= min(1.0, (images + cfg.global_batch) / cfg.warmup_images)
    if cfg.decay_images:
        rate *= min(1.0, max(0.0, (cfg.images - images) / cfg.decay_images))
    return rate


def steps_left(cfg: TrainConfig, images: int) -> int:
    """Optimiser steps from `images` on until at least `train.images` are seen."""
    return max(0, -(-(cfg.images - images) // cfg.global_batch))
