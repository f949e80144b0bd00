"""Draws belong to the sample: not to its batch, its rank or its place."""

from __future__ import annotations

import torch

from diffussm.config.schema import Config, DiffusionConfig
from diffussm.data.cursor import Batch
from diffussm.diffusion.process import Process
from diffussm.train.step import draw, loss

NULL = 9


def config(**diffusion: object) -> Config:
    return Config(seed=3, diffusion=DiffusionConfig(**diffusion))


def batch(ids: list[int]) -> Batch:
    n = len(ids)
    moments = [torch.full((n, 4, 2, 2), float(k)) for k in (1, 0, -1, 0)]  # mean 1, mirrored mean -1, no spread
    return Batch(torch.tensor(ids), torch.full((n,), 5), *moments)


def test_a_sample_gets_the_same_draws_wherever_it_stands() -> None:
    whole = draw(batch([7, 1, 4, 2]), config(), epoch=2, null_class=NULL)
    alone = draw(batch([4]), config(), epoch=2, null_class=NULL)
    for all_of, one in zip(
        (whole.x0, whole.t, whole.noise, whole.y), (alone.x0, alone.t, alone.noise, alone.y), strict=True
    ):
        assert torch.equal(all_of[2:3], one)


def test_epoch_seed_and_id_each_change_the_draws() -> None:
    base = draw(batch([4]), config(), epoch=2, null_class=NULL).noise
    other_seed = Config(seed=4)
    for noise in (
        draw(batch([5]), config(), epoch=2, null_class=NULL).noise,
        draw(batch([4]), config(), epoch=3, null_class=NULL).noise,
        draw(batch([4]), other_seed, epoch=2, null_class=NULL).noise,
    ):
        assert not torch.equal(base, noise)


def test_rates_of_flips_drops_and_timesteps() -> None:
    n = 4000
    inputs = draw(batch(list(range(n))), config(label_drop=0.25), epoch=0, null_class=NULL)
    flipped = (inputs.x0[:, 0, 0, 0] == -1).float().mean()
    dropped = (inputs.y == NULL).float().mean()
    assert abs(flipped - 0.5) < 0.03
    assert abs(dropped - 0.25) < 0.03
    assert set(inputs.y.tolist()) == {5, NULL}
    assert inputs.t.min() >= 0
    assert inputs.t.max() <= 999
    assert abs(inputs.t.float().mean() - 499.5) < 20
    assert abs(inputs.noise.mean()) < 0.02
    assert abs(inputs.noise.std() - 1) < 0.02


def test_no_flip_keeps_every_sample_and_the_posterior_has_its_spread() -> None:
    cfg = config()
    cfg.data.flip = False
    given = batch(list(range(500)))
    assert (draw(given, cfg, 0, NULL).x0 == 1).all()
    wide = Batch(given.id, given.label, given.mean, torch.full_like(given.std, 2.0), given.mean_flip, given.std_flip)
    x0 = draw(wide, cfg, 0, NULL).x0
    assert abs(x0.mean() - 1) < 0.1
    assert abs(x0.std() - 2) < 0.1
    assert not torch.equal((x0 - 1) / 2, draw(wide, cfg, 0, NULL).noise)


def test_a_perfect_network_has_no_noise_error() -> None:
    cfg = config()
    process = Process(cfg.diffusion)
    inputs = draw(batch([1, 2, 3]), cfg, 0, NULL)

    def oracle(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert torch.equal(x, process.q_sample(inputs.x0, inputs.t, inputs.noise))
        return torch.cat([inputs.noise, torch.zeros_like(inputs.noise)], 1)

    perfect = loss(oracle, process, inputs)
    poor = loss(lambda x, t, y: torch.zeros(3, 8, 2, 2), process, inputs)
    assert perfect < 0.1 < poor
