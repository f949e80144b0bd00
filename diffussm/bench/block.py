"""A DiffuSSM block against a DiT block on the same tokens, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from diffussm.bench.machine import interleave, paired_ratios
from diffussm.model.block import Block, modulate
from diffussm.ops import registry

HEAD = 72
"""Channels of an attention head in DiT-XL (1152 / 16)."""


class DiTBlock(nn.Module):
    """Attention and MLP with adaLN-zero (Peebles and Xie, arXiv 2212.09748, figure 3); the other side, nothing else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulations = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, L, D), c (B, D) -> (B, L, D)."""
        batch, length, width = x.shape
        a, b, gate, a2, b2, gate2 = self.modulations(nn.functional.silu(c)).chunk(6, dim=1)  # (B, D) each
        q, k, v = self.qkv(modulate(x, a, b)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)  # (B, L, D)
        x = x + gate[:, None] * self.out(mixed)
        hidden = nn.functional.gelu(self.up(modulate(x, a2, b2)), approximate="tanh")  # (B, L, 4D)
        return x + gate2[:, None] * self.down(hidden)


@dataclass(frozen=True)
class BlockRow:
    """One size: milliseconds of a step (forward and backward) and DiT's time over ours, round by round."""

    length: int
    batch: int
    width: int
    backend: str
    ours_ms: float
    dit_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


def bench_block(
    length: int, batch: int, width: int, *, rounds: int, device: torch.device, hourglass: int = 2
) -> BlockRow:
    """Both blocks on L tokens of D channels: ours sees them as L / M groups, as in the network.

    fp32 on a CPU; bf16 autocast on an accelerator, as in training.
    """
    torch.manual_seed(0)
    backend = registry.resolve(registry.AUTO, device, torch.float32).name
    ours = Block(width, hourglass, state=64, backend=backend).to(device)
    dit = DiTBlock(width).to(device)
    c = torch.randn(batch, width, device=device)  # (B, D)
    groups = torch.randn(batch, length // hourglass, width, device=device, requires_grad=True)  # (B, J, D)
    tokens = torch.randn(batch, length, width, device=device, requires_grad=True)  # (B, L, D)

    def step(block: nn.Module, x: Tensor) -> Callable[[], None]:
        def call() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
                y = block(x, c)
            y.sum().backward()

        return call

    dit_side, our_side = interleave({"dit": step(dit, tokens), "ours": step(ours, groups)}, rounds, device)
    ratios = paired_ratios(dit_side, our_side)
    return BlockRow(
        length, batch, width, backend, 1e3 * our_side.median, 1e3 * dit_side.median,
        ratios[len(ratios) // 2], ratios[0], ratios[-1],
    )  # fmt: skip
