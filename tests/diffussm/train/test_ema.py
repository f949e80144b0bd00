"""The averages against their definition, and the ranks' slices against averages of the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from diffussm.checkpoint.profiles import beta, gamma
from diffussm.config.schema import TrainConfig
from diffussm.train.ema import Averages, decay_for_batch
from diffussm.train.engine import Engine, Slice
from diffussm.train.world import current
from tests.diffussm.train.test_engine import BATCH, config, losses, net, whole

KINDS = ("ema-plain", "ema-power-0.050", "ema-power-0.200")


def averages_of(weights: torch.Tensor, **changes: Any) -> Averages:
    cfg = TrainConfig(images=1000, global_batch=256, ema=0.9, power_ema=[0.05, 0.2])
    vars(cfg).update(changes)
    return Averages([Slice("w", tuple(weights.shape), 0, weights.numel(), {"master": weights})], cfg)


def test_the_plain_average_follows_its_recurrence() -> None:
    weights = torch.arange(10, dtype=torch.float32)
    averages = averages_of(weights)
    expected = weights.double().clone()
    for step in range(5):
        weights.mul_(1.1).add_(step)
        averages.update(256 * (step + 1))
        expected = 0.9 * expected + 0.1 * weights.double()
    torch.testing.assert_close(averages.tensors("w")["ema-plain"].double(), expected, rtol=1e-6, atol=1e-6)


def test_a_power_average_weighs_each_step_by_the_profiles_integral() -> None:
    """The closed form sum_k w_k ((t_k / t)^(gamma + 1) - (t_(k-1) / t)^(gamma + 1)), not the recurrence again."""
    steps, exponent = 30, gamma(0.2)
    history = torch.randn(steps, 7, generator=torch.Generator().manual_seed(0))
    weights = torch.empty(7)
    averages = averages_of(weights)
    for step in range(steps):
        weights.copy_(history[step])
        averages.update(256 * (step + 1))
    edges = (torch.arange(steps + 1, dtype=torch.float64) / steps) ** (exponent + 1)
    expected = (edges.diff()[:, None] * history.double()).sum(0)
    torch.testing.assert_close(averages.tensors("w")["ema-power-0.200"].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_decay_is_counted_in_images() -> None:
    assert decay_for_batch(0.9999, 256) == 0.9999
    assert decay_for_batch(0.99, 128) ** 2 == pytest.approx(0.99)
    assert decay_for_batch(0.99, 512) == pytest.approx(0.99**2)


def test_a_skipped_step_moves_only_the_averages_that_count_images() -> None:
    weights = torch.ones(3)
    averages = averages_of(weights)
    averages.update(256)
    weights.fill_(2.0)
    before = {kind: tensor.clone() for kind, tensor in averages.tensors("w").items()}
    averages.update(512, skipped=True)
    after = averages.tensors("w")
    assert torch.equal(after["ema-plain"], before["ema-plain"])
    for kind, width in (("ema-power-0.050", 0.05), ("ema-power-0.200", 0.2)):
        decay = beta(512, 256, gamma(width))
        torch.testing.assert_close(after[kind], decay * before[kind] + (1 - decay) * weights)


def check_stage(stage: int) -> None:
    cfg = config(stage, ema=0.5, power_ema=[0.05, 0.2])
    engine = Engine(net(), cfg, 1, current(torch.device("cpu")))
    averages = Averages(engine.slices(), cfg)
    full = {
        name: Averages([Slice(name, tuple(w.shape), 0, w.numel(), {"master": w.flatten()})], cfg)
        for name, w in whole(engine, "master").items()
    }
    for step in range(6):
        engine.step(losses(step, 1), lr=1e-2)
        averages.update(BATCH * (step + 1))
        for name, weights in whole(engine, "master").items():
            full[name].live[0].copy_(weights.flatten())
            full[name].update(BATCH * (step + 1))
    for kind in KINDS:
        for name, tensor in whole_of(engine, averages, kind).items():
            expected = full[name].tensors(name)[kind]
            assert torch.equal(tensor, expected), (stage, kind, name)
            assert not torch.equal(expected, full[name].live[0]), "the average is the weights themselves"


def whole_of(engine: Engine, averages: Averages, kind: str) -> dict[str, torch.Tensor]:
    """Flat averages of all parameters, put together from all ranks' slices."""
    found = {}
    for name, shape in engine.shapes.items():
        found[name] = torch.zeros(shape).flatten()
    for piece in engine.slices():
        found[piece.name][piece.start : piece.start + piece.numel] += averages.tensors(piece.name)[kind]
    for tensor in found.values():
        dist.all_reduce(tensor)
    return found


@pytest.mark.world_size(3)
def test_slices_of_every_stage_equal_averages_of_the_whole_model_bit_for_bit() -> None:
    for stage in range(4):
        check_stage(stage)
