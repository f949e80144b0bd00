"""A small state cut over ranks, for the checkpoint tests."""

from __future__ import annotations

import torch
import torch.distributed as dist

from diffussm.checkpoint.manifest import Counters
from diffussm.checkpoint.save import save
from diffussm.checkpoint.snapshot import Part
from diffussm.checkpoint.store import Store

SHAPES = {"w": (3, 5), "b": (7,), "s": ()}


def value(name: str, kind: str, step: int) -> torch.Tensor:
    """What the parameter's state is: distinct for each element."""
    numel = torch.empty(SHAPES[name]).numel()
    return torch.arange(numel, dtype=torch.float32) + 100 * step + (0.5 if kind == "ema" else 0.0)


def share(rank: int, size: int, step: int) -> list[Part]:
    parts = []
    for name, shape in SHAPES.items():
        numel = torch.empty(shape).numel()
        start, stop = rank * numel // size, (rank + 1) * numel // size
        if stop > start:
            tensors = {kind: value(name, kind, step)[start:stop] for kind in ("master", "ema")}
            parts.append(Part(name, shape, start, tensors))
    return parts


def save_step(store: Store, step: int, attempt: int = 1, deadline_s: float = 60.0) -> None:
    at = Counters(step * 10, step, 0, step * 10, step, 0)
    save(
        store, f"checkpoints/{step:012d}", share(dist.get_rank(), dist.get_world_size(), step), SHAPES, at,
        attempt=attempt, zero_stage=1, config_digest="d", deadline_s=deadline_s,
    )  # fmt: skip
