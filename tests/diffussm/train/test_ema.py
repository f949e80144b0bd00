from __future__ import annotations

import pytest
import torch

from diffussm.train.ema import Ema, decay_for_batch
from diffussm.train.engine import Slice


def test_the_average_follows_its_recurrence_and_slices_equal_the_whole() -> None:
    weights = torch.arange(10, dtype=torch.float32)
    whole = Ema([Slice("w", (10,), 0, 10, {"master": weights})], 0.9)
    parts = [Slice(f"w{i}", (10,), s, n, {"master": weights[s : s + n]}) for i, (s, n) in enumerate([(0, 3), (3, 7)])]
    cut = Ema(parts, 0.9)
    expected = weights.double().clone()
    for step in range(5):
        weights.mul_(1.1).add_(step)
        whole.update()
        cut.update()
        expected = 0.9 * expected + 0.1 * weights.double()
    torch.testing.assert_close(whole.tensor("w").double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.cat([cut.tensor("w0"), cut.tensor("w1")]), whole.tensor("w"))


def test_the_decay_is_counted_in_images() -> None:
    assert decay_for_batch(0.9999, 256) == 0.9999
    assert decay_for_batch(0.99, 128) ** 2 == pytest.approx(0.99)
    assert decay_for_batch(0.99, 512) == pytest.approx(0.99**2)
