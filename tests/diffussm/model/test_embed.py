import math

import torch

from diffussm.model.embed import LabelEmbedding, TimestepEmbedding, sinusoid


def test_sinusoid_is_cosines_then_sines_of_falling_frequencies() -> None:
    found = sinusoid(torch.tensor([0, 7, 999]), 8)
    for row, t in zip(found, (0, 7, 999), strict=True):
        for i in range(4):
            angle = t * 10_000 ** (-i / 4)
            assert abs(row[i].item() - math.cos(angle)) < 1e-4
            assert abs(row[4 + i].item() - math.sin(angle)) < 1e-4


def test_timesteps_are_told_apart() -> None:
    out = TimestepEmbedding(16)(torch.arange(1000))
    assert out.shape == (1000, 16)
    assert out.unique(dim=0).shape[0] == 1000


def test_label_table_has_one_row_more_than_classes() -> None:
    layer = LabelEmbedding(5, 3)
    assert layer(torch.arange(6)).shape == (6, 3)
    assert torch.equal(layer(torch.tensor([5]))[0], layer.table.weight[5])
