"""How many multiply-adds a second a device can do at most: from the table of cards, else measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from diffussm.config.machines import of_card

ROUNDS = 5
SIDE = {"cpu": 768, "cuda": 8192}
"""Side of the square matrices that are multiplied: large enough to leave memory out of it, short enough to wait for."""


@dataclass(frozen=True)
class Peak:
    """What one rank's device can do."""

    macs_per_s: float
    source: str
    """Where that is from, for people."""


def peak(device: torch.device, *, bf16: bool) -> Peak:
    """Of a card in the table what its sheet says, of others the best of some matrix products, which takes about 0.2 s.

    On the CPU it is measured in fp32 with the threads this process uses.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        row = of_card(name)
        if row is not None:
            return Peak(row.flops(bf16) / 2, f"data sheet of {row.name}")
        dtype = torch.bfloat16 if bf16 else torch.float32
        return Peak(measured(device, dtype), f"measured on {name}, {str(dtype).removeprefix('torch.')}")
    return Peak(measured(device, torch.float32), f"measured with {torch.get_num_threads()} thread(s), float32")


def measured(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds a second of the fastest of some square matrix products after one to warm up."""
    side = SIDE.get(device.type, SIDE["cpu"])
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))  # (S, S)
    best = float("inf")
    for _ in range(ROUNDS + 1):
        _wait(device)
        began = time.perf_counter()
        torch.mm(left, right)  # (S, S)
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
