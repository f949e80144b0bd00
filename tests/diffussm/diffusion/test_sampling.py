"""Samplers on Gaussian data, where the exact network is known, and the noise that belongs to the picture."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffussm.config.schema import DiffusionConfig, Sampler
from diffussm.diffusion.process import Process, Schedule
from diffussm.diffusion.sampling import _scheduler, sample
from diffussm.errors import ConfigError
from diffussm.rng import Purpose, generator

PROCESS = Process(DiffusionConfig())
LATENT = (4, 1, 2)
SAMPLERS = [s.value for s in Sampler]

MEAN = torch.tensor([3.0, -2.0, 0.5, 0.0, 1.0, -1.0, 0.1, -4.0], dtype=torch.float64).view(LATENT)
DIAGONAL = torch.tensor([0.05, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 9.0], dtype=torch.float64).view(LATENT)


def draw(model: Any, count: int, sampler: str, **changes: Any) -> Tensor:
    options = {"steps": 10, "guidance": 1.0, "guidance_channels": 0, "seed": 3, "null_class": 9} | changes
    labels = options.pop("labels", torch.arange(count) % 5)
    return sample(model, PROCESS, labels, options.pop("latent", LATENT), sampler=sampler, **options)


def shaken(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """A network without meaning whose output depends on everything and is the same in any batch."""
    noise = torch.sin(3 * x + y.view(-1, 1, 1, 1)) * torch.cos(t / 300).view(-1, 1, 1, 1)
    return torch.cat([noise, torch.tanh(x)], dim=1)


class DiagonalGaussian:
    """Exact noise and exact reverse variance of a chain over N(MEAN, diag DIAGONAL)."""

    def __init__(self, chain: Schedule) -> None:
        self.index = {int(t): i for i, t in enumerate(chain.timesteps)}
        self.chain = chain

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        [step] = set(t.tolist())
        i = self.index[step]
        abar, beta = float(self.chain.alphas_cumprod[i]), float(self.chain.betas[i])
        noise = (1 - abar) ** 0.5 / (abar * DIAGONAL + 1 - abar) * (x - abar**0.5 * MEAN)
        if i == 0:
            return torch.cat([noise, torch.zeros_like(noise)], dim=1)
        abar_prev = float(self.chain.alphas_cumprod[i - 1])
        # Bayes' rule for x_{t-1} ~ N(., before) seen through x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) n.
        before = abar_prev * DIAGONAL + 1 - abar_prev
        variance = before * beta / ((1 - beta) * before + beta)
        low, high = np.log(beta * (1 - abar_prev) / (1 - abar)), np.log(beta)
        covariance = 2 * (variance.log() - low) / (high - low) - 1
        return torch.cat([noise, covariance.expand_as(noise)], dim=1)


def test_ancestral_sampling_reproduces_a_gaussian() -> None:
    """With the exact reverse variance the chain is exact for any number of steps, here 10."""
    count = 10_000
    x = draw(DiagonalGaussian(PROCESS.schedule.respaced(10)), count, "ddpm").double()
    error = (x.mean(0) - MEAN) / (DIAGONAL / count).sqrt()
    assert error.abs().max() < 4.5
    # The last step returns the mean of x_0 given x_{t=0}, which lacks a variance of about (1 - abar_0).
    ratio = x.var(0) / (DIAGONAL**2 / (DIAGONAL + (1 - float(PROCESS.schedule.alphas_cumprod[0]))))
    assert (ratio - 1).abs().max() < 4.5 * (2 / count) ** 0.5
    correlation = torch.corrcoef(x.flatten(1).T) - torch.eye(8)
    assert correlation.abs().max() < 4.5 * count**-0.5


def full_gaussian() -> tuple[Any, Tensor]:
    """Exact network over N(MEAN, S) with a full covariance S (8, 8), and S."""
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).Q
    covariance = basis @ torch.diag(DIAGONAL.flatten()) @ basis.T

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        abar = float(PROCESS.schedule.alphas_cumprod[int(t[0])])
        centred = (x - abar**0.5 * MEAN).flatten(1)
        noise = (1 - abar) ** 0.5 * torch.linalg.solve(abar * covariance + (1 - abar) * torch.eye(8), centred.T).T
        return torch.cat([noise.view(x.shape), torch.zeros_like(x, dtype=torch.float64)], dim=1)

    return model, covariance


@pytest.mark.parametrize(("sampler", "steps", "tolerance"), [("ddim", 500, 0.02), ("dpm", 30, 0.02)])
def test_deterministic_samplers_carry_noise_to_a_gaussian(sampler: str, steps: int, tolerance: float) -> None:
    """The map from noise to sample is affine; it is recovered by least squares, so no statistical error is left."""
    model, covariance = full_gaussian()
    count = 64
    x = draw(model, count, sampler, steps=steps).double().flatten(1)  # (N, 8)
    noise = np.stack([generator(3, Purpose.SAMPLE, i).standard_normal(8, dtype=np.float32) for i in range(count)])
    design = torch.cat([torch.from_numpy(noise).double(), torch.ones(count, 1)], dim=1)  # (N, 9)
    fit = torch.linalg.lstsq(design, x).solution  # (9, 8)
    torch.testing.assert_close(design @ fit, x, rtol=0, atol=1e-3)
    # The chain starts at N(0, 1), not at N(sqrt(abar) MEAN, .): the mean is off by sqrt(abar_T) |MEAN| = 0.6 % of it.
    torch.testing.assert_close(fit[8], MEAN.flatten(), rtol=0.02, atol=0.05)
    scale = covariance.diagonal().sqrt()
    error = (fit[:8].T @ fit[:8] - covariance) / torch.outer(scale, scale)
    assert error.abs().max() < tolerance


def test_ddim_is_its_closed_form_over_the_respaced_chain() -> None:
    chain = PROCESS.schedule.respaced(7)  # does not divide 1000
    found = draw(shaken, 3, "ddim", steps=7).double()
    x = torch.from_numpy(
        np.stack([generator(3, Purpose.SAMPLE, i).standard_normal(LATENT, dtype=np.float32) for i in range(3)])
    ).double()
    for i in reversed(range(7)):
        abar, abar_prev = chain.alphas_cumprod[i], chain.alphas_cumprod[i - 1] if i else 1.0
        noise = shaken(x, torch.full((3,), int(chain.timesteps[i])), torch.arange(3))[:, :4]
        x = abar_prev**0.5 * (x - (1 - abar) ** 0.5 * noise) / abar**0.5 + (1 - abar_prev) ** 0.5 * noise
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


def test_ancestral_sampling_is_that_of_diffusers_own_respacing() -> None:
    """Same noise, diffusers' scheduler over the full schedule with its own 25 of 1000 timesteps."""
    scheduler: Any = DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
    scheduler.set_timesteps(25)
    source = generator(3, Purpose.SAMPLE, 0)
    x = torch.from_numpy(source.standard_normal((1, *LATENT), dtype=np.float32))
    torch_generator = torch.Generator().manual_seed(int(source.integers(2**63)))
    for t in scheduler.timesteps:
        output = shaken(x, t.view(1), torch.zeros(1))
        x = scheduler.step(output, t, x, generator=torch_generator).prev_sample
    torch.testing.assert_close(draw(shaken, 1, "ddpm", steps=25), x, rtol=1e-2, atol=1e-2)  # its betas are float32


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_a_picture_is_the_same_in_any_batch(sampler: str, guidance: float) -> None:
    labels = torch.arange(5)
    whole = draw(shaken, 5, sampler, guidance=guidance)
    parts = [
        draw(shaken, 0, sampler, guidance=guidance, labels=labels[a:b], first_index=a)
        for a, b in ((0, 1), (1, 3), (3, 5))
    ]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_and_seeds_differ(sampler: str) -> None:
    zeros = torch.zeros(3, dtype=torch.int64)
    x = draw(shaken, 0, sampler, labels=zeros)
    other = draw(shaken, 0, sampler, labels=zeros, seed=4)
    assert not torch.isclose(x[0], x[1]).any()
    assert not torch.isclose(x, other).any()


def test_ancestral_noise_is_fresh_at_each_step_and_independent_of_the_start() -> None:
    """A network that predicts no noise leaves a weighted sum of the draws; its variance is the sum of theirs."""

    def silent(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), torch.ones_like(x)], dim=1)

    chain = PROCESS.schedule.respaced(5)
    variance = 1.0
    for i in reversed(range(5)):
        # The mean is x_t / sqrt(1 - beta) when the predicted noise is zero; beta is added except at the end.
        variance = variance / (1 - chain.betas[i]) + (chain.betas[i] if i else 0.0)
    x = draw(silent, 2000, "ddpm", steps=5).double()
    assert x.var().item() == pytest.approx(variance, rel=4.5 * (2 / x.numel()) ** 0.5)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 6])
def test_network_and_progress_see_each_step_once(sampler: str, steps: int) -> None:
    told: list[int] = []
    shown: list[tuple[int, int]] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert t.shape == (len(x),)
        assert t.dtype == y.dtype == torch.int64
        told.append(int(t[0]))
        return shaken(x, t, y)

    x = draw(model, 2, sampler, steps=steps, progress=lambda done, total: shown.append((done, total)))
    by = "log_snr" if sampler == "dpm" else "time"
    assert told == PROCESS.schedule.respaced(steps, by=by).timesteps[::-1].tolist()  # type: ignore[arg-type]
    assert shown == [(i + 1, steps) for i in range(steps)]
    assert x.shape == (2, *LATENT)
    assert x.dtype == torch.float32
    assert x.isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_reaches_the_network_and_the_result(sampler: str) -> None:
    seen: list[list[int]] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(y.tolist())
        return shaken(x, t, y)

    plain, three, everything = (
        draw(shaken, 2, sampler),
        draw(model, 2, sampler, guidance=2.0, guidance_channels=3),
        draw(shaken, 2, sampler, guidance=2.0, guidance_channels=0),
    )
    assert seen == [[0, 1, 9, 9]] * 10
    # The network works channel by channel, so a channel that is not guided stays what it was.
    assert torch.equal(three[:, 3:], plain[:, 3:])
    assert torch.equal(three[:, :3], everything[:, :3])
    assert not torch.isclose(everything, plain).any()


def test_sampling_leaves_no_graph_and_no_inference_tensors() -> None:
    weight = torch.nn.Parameter(torch.ones(()))
    x = draw(lambda x, t, y: weight * shaken(x, t, y), 1, "ddpm")
    assert not x.requires_grad
    assert not x.is_inference()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_half_precision_outputs_are_stepped_in_float32(sampler: str) -> None:
    """Only the network rounds: neither the noise of a step nor the latent is drawn or kept in its precision."""
    x = draw(lambda x, t, y: shaken(x, t, y).bfloat16(), 2, sampler)
    assert x.dtype == torch.float32
    assert torch.equal(x, draw(lambda x, t, y: shaken(x, t, y).bfloat16().float(), 2, sampler))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_scheduler_holds_the_respaced_chain_in_full_precision(sampler: str) -> None:
    chain = PROCESS.schedule.respaced(250)
    scheduler = _scheduler(Sampler(sampler), chain)
    assert scheduler.timesteps.tolist() == list(reversed(range(250)))
    np.testing.assert_allclose(scheduler.betas.numpy(), chain.betas, rtol=1e-6)
    np.testing.assert_array_equal(scheduler.alphas_cumprod.numpy(), chain.alphas_cumprod)


@pytest.mark.parametrize("index", [1, 2, 120, 249])
def test_one_respaced_step_is_the_posterior_of_the_respaced_betas(index: int) -> None:
    """From x_t and x_0 by adding the precisions of the two Gaussian factors of the short chain."""
    chain = PROCESS.schedule.respaced(250)
    x0, x_t, draws = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3))
    beta, abar, abar_prev = chain.betas[index], chain.alphas_cumprod[index], chain.alphas_cumprod[index - 1]
    noise = (x_t - abar**0.5 * x0) / (1 - abar) ** 0.5
    variance = 1 / ((1 - beta) / beta + 1 / (1 - abar_prev))
    mean = variance * ((1 - beta) ** 0.5 / beta * x_t + abar_prev**0.5 / (1 - abar_prev) * x0)
    for covariance, std in ((-1.0, variance**0.5), (1.0, beta**0.5)):
        output = torch.cat([noise, torch.full_like(noise, covariance)], dim=1)
        source = torch.Generator().manual_seed(3)
        found = _scheduler(Sampler.ddpm, chain).step(output, index, x_t, generator=source).prev_sample
        torch.testing.assert_close(found, mean + std * draws, rtol=1e-4, atol=2e-4)


def test_no_labels_give_no_pictures() -> None:
    assert draw(shaken, 0, "ddpm", labels=torch.zeros(0, dtype=torch.int64)).shape == (0, *LATENT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "euler"}, r"sample\.sampler: found 'euler'; allowed are ddpm, ddim, dpm"),
        ({"sampler": "ddpm", "steps": 0}, r"sample\.steps: found 0"),
        ({"sampler": "ddpm", "steps": 1001}, r"sample\.steps: found 1001"),
        ({"sampler": "ddpm", "guidance": 2.0, "guidance_channels": 5}, r"sample\.guidance_channels"),
    ],
)
def test_what_cannot_be_sampled_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw(shaken, 1, **changes)


def test_diffusers_is_not_loaded_before_it_is_needed() -> None:
    check = "import sys, diffussm.diffusion.sampling; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
