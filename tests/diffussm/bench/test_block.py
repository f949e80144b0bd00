from __future__ import annotations

import torch

from diffussm.bench.block import DiTBlock, bench_block


def test_the_other_side_is_a_dit_block() -> None:
    block = DiTBlock(144)
    weights = sum(p.numel() for p in block.parameters() if p.dim() == 2)
    assert weights == (12 + 6) * 144 * 144  # DiT's block: 4 D^2 attention, 8 D^2 MLP, 6 D^2 modulation
    x, c = torch.randn(2, 10, 144), torch.randn(2, 144)
    assert block(x, c).shape == x.shape
    shuffled = torch.randperm(10)
    torch.testing.assert_close(block(x, c)[:, shuffled], block(x[:, shuffled], c))  # attention knows no positions


def test_a_row_compares_both_on_the_same_tokens() -> None:
    row = bench_block(16, 2, 72, rounds=3, device=torch.device("cpu"))
    assert 0 < row.ratio_low <= row.ratio <= row.ratio_high
    assert min(row.ours_ms, row.dit_ms) > 0
