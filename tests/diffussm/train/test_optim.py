from __future__ import annotations

import pytest
import torch
from torch import nn

from diffussm.config.schema import TrainConfig
from diffussm.train.optim import adamw, learning_rate, parameter_groups, steps_left


def test_parameters_that_ask_for_no_decay_get_none() -> None:
    plain, special = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    special._optim = {"weight_decay": 0.0}
    groups = parameter_groups([plain, special], weight_decay=0.1)
    assert [(group["weight_decay"], group["params"]) for group in groups] == [(0.1, [plain]), (0.0, [special])]
    assert len(parameter_groups([plain, special], weight_decay=0.0)) == 1
    optimizer = adamw(groups, TrainConfig(images=1, lr=0.5))
    plain.grad, special.grad = torch.zeros(2), torch.zeros(2)
    optimizer.step()
    assert plain[0].item() == pytest.approx(0.95)
    assert special[0].item() == 1.0


def test_learning_rate_rises_stays_and_falls_in_images() -> None:
    cfg = TrainConfig(images=1000, global_batch=10, lr=2.0, warmup_images=100, decay_images=200)
    assert learning_rate(cfg, 0) == pytest.approx(0.2)
    assert learning_rate(cfg, 90) == pytest.approx(2.0)
    assert learning_rate(cfg, 500) == 2.0
    assert learning_rate(cfg, 900) == pytest.approx(1.0)
    assert learning_rate(cfg, 1000) == 0.0
    assert learning_rate(TrainConfig(images=10, lr=3.0), 9) == 3.0


def test_steps_left_reach_the_end_and_no_further() -> None:
    cfg = TrainConfig(images=100, global_batch=30)
    assert [steps_left(cfg, images) for images in (0, 30, 90, 120)] == [4, 3, 1, 0]
