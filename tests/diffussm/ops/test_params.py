from __future__ import annotations

import torch

from diffussm.ops.params import is_shared, join_directions, work_dtype


def test_the_operator_never_computes_below_fp32() -> None:
    half, single, double = (torch.zeros(1, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64))
    assert work_dtype(half) == work_dtype(half, single) == torch.float32
    assert work_dtype(half, double) == torch.float64


def test_the_two_layouts_of_the_input() -> None:
    assert is_shared(torch.zeros(2, 5, 3), channels=3)
    assert not is_shared(torch.zeros(2, 5, 6), channels=3)


def test_what_both_directions_read_gets_both_gradients() -> None:
    forward, backward = torch.full((1, 2, 3), 1.0), torch.full((1, 2, 3), 10.0)
    assert torch.equal(join_directions(forward, backward, shared=True), torch.full((1, 2, 3), 11.0))
    apart = join_directions(forward, backward, shared=False)
    assert torch.equal(apart[..., :3], forward)
    assert torch.equal(apart[..., 3:], backward)
