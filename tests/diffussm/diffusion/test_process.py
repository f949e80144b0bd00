"""Schedule, posterior, learned range and loss against closed forms, diffusers and distributions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffussm.config.schema import DiffusionConfig
from diffussm.diffusion.process import Process, Schedule, Spacing
from diffussm.errors import ConfigError

T = 1000
PROCESS = Process(DiffusionConfig())
SCHEDULE = PROCESS.schedule


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- schedule


def test_betas_are_linear_between_their_ends() -> None:
    assert SCHEDULE.betas[0] == pytest.approx(1e-4, rel=1e-12)
    assert SCHEDULE.betas[-1] == pytest.approx(0.02, rel=1e-12)
    np.testing.assert_allclose(np.diff(SCHEDULE.betas), (0.02 - 1e-4) / 999, rtol=1e-9)
    np.testing.assert_array_equal(SCHEDULE.timesteps, np.arange(T))
    assert SCHEDULE.betas.dtype == np.float64
    assert PROCESS.timesteps == T


def test_a_shorter_schedule_ends_about_as_noisy() -> None:
    short = Schedule.linear(DiffusionConfig(timesteps=100))
    assert (short.betas[0], short.betas[-1]) == pytest.approx((1e-3, 0.2))
    assert math.log(short.alphas_cumprod[-1]) == pytest.approx(math.log(SCHEDULE.alphas_cumprod[-1]), rel=0.1)


@pytest.mark.parametrize(
    ("cfg", "key"),
    [
        (DiffusionConfig(timesteps=1), "diffusion.timesteps"),
        (DiffusionConfig(timesteps=20), "diffusion.beta_end"),  # the last beta would be 1
        (DiffusionConfig(beta_start=0.0), "diffusion.beta_start"),
        (DiffusionConfig(beta_start=0.03), "diffusion.beta_start"),
        (DiffusionConfig(beta_end=float("nan")), "diffusion.beta_end"),
    ],
)
def test_a_schedule_that_is_none_is_refused(cfg: DiffusionConfig, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        Process(cfg)


def test_250_of_1000_are_the_timesteps_of_improved_diffusion() -> None:
    # Its rule, in its own words of arithmetic: walk by (T - 1) / (steps - 1) and round each place.
    stride, place, expected = (T - 1) / 249, 0.0, []
    for _ in range(250):
        expected.append(round(place))
        place += stride
    assert SCHEDULE.respaced(250).timesteps.tolist() == expected


@settings(max_examples=200, deadline=None)
@given(data=st.data(), length=st.integers(21, 1200), by=st.sampled_from(["time", "log_snr"]))
def test_respacing_keeps_distinct_timesteps_and_the_noise_levels_there(
    data: st.DataObject, length: int, by: Spacing
) -> None:
    steps = data.draw(st.integers(1, length))
    whole = Schedule.linear(DiffusionConfig(timesteps=length))
    chain = whole.respaced(steps, by=by)
    assert chain.timesteps.shape == chain.betas.shape == (steps,)
    assert (np.diff(chain.timesteps) > 0).all()
    assert chain.timesteps[-1] == length - 1
    if steps > 1:
        assert chain.timesteps[0] == 0
    np.testing.assert_allclose(chain.alphas_cumprod, whole.alphas_cumprod[chain.timesteps], rtol=1e-7)


def test_respacing_to_the_full_length_changes_nothing() -> None:
    for by in ("time", "log_snr"):
        chain = SCHEDULE.respaced(T, by=by)  # type: ignore[arg-type]
        np.testing.assert_array_equal(chain.timesteps, SCHEDULE.timesteps)
        np.testing.assert_allclose(chain.betas, SCHEDULE.betas, rtol=1e-9)


def test_log_snr_spacing_is_even_as_far_as_timesteps_allow() -> None:
    chain = SCHEDULE.respaced(10, by="log_snr")
    log_snr = np.log(chain.signal / chain.sigma)
    even = (log_snr[0] - log_snr[-1]) / 9
    np.testing.assert_allclose(-np.diff(log_snr), even, atol=0.35 * even)


@pytest.mark.parametrize("steps", [-1, 0, T + 1])
def test_respacing_to_an_impossible_length_is_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match=r"sample\.steps"):
        SCHEDULE.respaced(steps)


# --- forward process and posterior


def test_q_sample_mixes_data_and_noise_by_the_product_of_alphas() -> None:
    x0, noise = randn(4, 2, 3, 3), randn(4, 2, 3, 3, seed=1)
    t = torch.tensor([0, 1, 700, 999])
    abar = torch.tensor([math.prod(1.0 - b for b in SCHEDULE.betas[: int(i) + 1]) for i in t]).view(4, 1, 1, 1)
    expected = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    torch.testing.assert_close(PROCESS.q_sample(x0, t, noise), expected.float())


def test_predict_x0_undoes_q_sample() -> None:
    x0, noise, t = randn(3, 2, 3, 3), randn(3, 2, 3, 3, seed=1), torch.tensor([0, 400, 900])
    torch.testing.assert_close(PROCESS.predict_x0(PROCESS.q_sample(x0, t, noise), t, noise), x0, rtol=1e-3, atol=1e-4)


def test_posterior_is_bayes_rule() -> None:
    """q(x_{t-1} | x_t, x_0) from its two Gaussian factors, by adding precisions."""
    t = torch.tensor([1, 2, 300, 999])
    x0, x_t = randn(4, 1, 2, 2), randn(4, 1, 2, 2, seed=1)
    beta = torch.tensor(SCHEDULE.betas)[t].view(4, 1, 1, 1)
    abar_prev = torch.tensor(SCHEDULE.alphas_cumprod)[t - 1].view(4, 1, 1, 1)
    variance = 1 / ((1 - beta) / beta + 1 / (1 - abar_prev))
    mean = variance * ((1 - beta).sqrt() / beta * x_t + abar_prev.sqrt() / (1 - abar_prev) * x0)
    found_mean, found_variance = PROCESS.posterior(x0, x_t, t)
    torch.testing.assert_close(found_mean, mean.float())
    torch.testing.assert_close(found_variance, variance.float())


def test_posterior_at_t_0_is_the_data() -> None:
    x0, t = randn(1, 1, 2, 2), torch.tensor([0])
    mean, variance = PROCESS.posterior(x0, randn(1, 1, 2, 2, seed=1), t)
    torch.testing.assert_close(mean, x0)
    assert variance.item() == 0.0


def test_learned_range_lies_between_posterior_variance_and_beta() -> None:
    t = torch.tensor([1, 500, 999])
    ends = [PROCESS.log_variance(torch.full((3, 1, 1, 1), v), t).flatten().numpy() for v in (-1.0, 1.0, 0.0)]
    posterior, beta = SCHEDULE.posterior_variance[t.numpy()], SCHEDULE.betas[t.numpy()]
    np.testing.assert_allclose(np.exp(ends[0]), posterior, rtol=1e-5)
    np.testing.assert_allclose(np.exp(ends[1]), beta, rtol=1e-5)
    np.testing.assert_allclose(np.exp(ends[2]), np.sqrt(posterior * beta), rtol=1e-5)


def test_learned_range_at_t_0_ends_at_the_posterior_variance_of_t_1() -> None:
    lowest = PROCESS.log_variance(torch.full((1, 1, 1, 1), -1.0), torch.tensor([0])).item()
    assert math.exp(lowest) == pytest.approx(SCHEDULE.posterior_variance[1], rel=1e-5)


@pytest.mark.parametrize("t", [1, 2, 250, 999])
def test_one_reverse_step_is_that_of_diffusers(t: int) -> None:
    scheduler: Any = DDPMScheduler(variance_type="learned_range", clip_sample=False)  # its defaults are our schedule
    x_t, output = randn(2, 3, 4, 4), randn(2, 6, 4, 4, seed=1)
    expected = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(7)).prev_sample
    noise, covariance = output.chunk(2, dim=1)
    steps = torch.tensor([t, t])
    mean, _ = PROCESS.posterior(PROCESS.predict_x0(x_t, steps, noise), x_t, steps)
    draw = randn(2, 3, 4, 4, seed=7)
    found = mean + torch.exp(0.5 * PROCESS.log_variance(covariance, steps)) * draw
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # its betas are float32


# --- loss


def test_mse_is_the_mean_square_of_the_noise_error_and_total_the_sum() -> None:
    x0, noise, output = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1), randn(3, 4, 4, 4, seed=2)
    loss = PROCESS.loss(output, x0, torch.tensor([0, 10, 999]), noise)
    torch.testing.assert_close(loss.mse, ((output[:, :2] - noise) ** 2).mean(dim=(1, 2, 3)))
    torch.testing.assert_close(loss.total, loss.mse + loss.vb)
    assert loss.total.shape == loss.mse.shape == loss.vb.shape == (3,)


@pytest.mark.parametrize("t", [1, 2, 40, 500, 999])
def test_bound_is_the_divergence_of_posterior_and_model_in_bits(t: int) -> None:
    """Both Gaussians are formed the long way, through x_t and x_0, in float64."""
    x0, noise, output = (a.double() for a in (randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1), randn(2, 6, 4, 4, seed=2)))
    predicted, covariance = output.chunk(2, dim=1)
    beta, abar, abar_prev = SCHEDULE.betas[t], SCHEDULE.alphas_cumprod[t], SCHEDULE.alphas_cumprod[t - 1]
    x_t = abar**0.5 * x0 + (1 - abar) ** 0.5 * noise
    guess = (x_t - (1 - abar) ** 0.5 * predicted) / abar**0.5

    def mean(x: Tensor) -> Tensor:
        return (abar_prev**0.5 * beta * x + (1 - beta) ** 0.5 * (1 - abar_prev) * x_t) / (1 - abar)

    variance = beta * (1 - abar_prev) / (1 - abar)
    share = (covariance + 1) / 2
    model_std = (beta**share * variance ** (1 - share)).sqrt()
    divergence = kl_divergence(Normal(mean(x0), math.sqrt(variance)), Normal(mean(guess), model_std))
    expected = divergence.mean(dim=(1, 2, 3)) / math.log(2)
    found = PROCESS.loss(output.float(), x0.float(), torch.tensor([t, t]), noise.float()).vb
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_bound_vanishes_for_the_posterior_itself() -> None:
    x0, noise = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    output = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    loss = PROCESS.loss(output, x0, torch.tensor([1, 800]), noise)
    torch.testing.assert_close(loss.total, torch.zeros(2))


def nll_bits(x0: Tensor, error: Tensor, covariance: Tensor) -> Tensor:
    """The term at t = 0, one value a sample; all arguments (B,)."""
    output = torch.stack([error, covariance], dim=1).view(-1, 2, 1, 1)
    zero = torch.zeros(len(x0), 1, 1, 1)
    return PROCESS.loss(output, x0.view(-1, 1, 1, 1), torch.zeros(len(x0), dtype=torch.int64), zero).vb


def test_bins_of_the_last_step_have_probability_one_together() -> None:
    for mean in (0.0, 0.37, 0.995, -0.999):
        x0 = torch.arange(256) / 127.5 - 1.0
        error = (x0.double() - mean) / SCHEDULE.posterior_noise[0]
        bits = nll_bits(x0, error.float(), torch.full((256,), 0.3))
        assert torch.exp2(-bits.double()).sum().item() == pytest.approx(1.0, abs=1e-4)


def test_last_step_is_the_log_probability_of_the_bin() -> None:
    x0 = torch.tensor([0.0, 0.2, -0.4, 0.5, 0.5, 1.0, -1.0, 3.0, -3.0])
    error = torch.tensor([0.0, 0.5, -0.7, 4.0, -4.0, 0.3, 0.3, -1.0, 1.0])
    covariance = torch.tensor([-1.0, 1.0, 0.0, 0.5, 0.5, 0.0, 0.0, -0.5, 0.2])
    share = (covariance.double().numpy() + 1) / 2
    beta, floor = SCHEDULE.betas[0], SCHEDULE.posterior_variance[1]
    std = np.sqrt(beta**share * floor ** (1 - share))
    gap = math.sqrt(beta / (1 - beta)) * error.double().numpy()  # x0 - mean, where the mean is the predicted x0
    upper = np.where(x0.numpy() > 0.999, np.inf, (gap + 1 / 255) / std)
    lower = np.where(x0.numpy() < -0.999, -np.inf, (gap - 1 / 255) / std)
    # Mirrored so that scipy, too, subtracts small numbers.
    probability = np.where(gap > 0, norm.sf(lower) - norm.sf(upper), norm.cdf(upper) - norm.cdf(lower))
    np.testing.assert_allclose(nll_bits(x0, error, covariance).numpy(), -np.log2(probability), rtol=2e-4)


def test_bound_trains_the_covariance_and_not_the_mean() -> None:
    x0, noise = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    t = torch.tensor([0, 5, 900])
    output = randn(3, 4, 4, 4, seed=2).requires_grad_()
    (grad,) = torch.autograd.grad(PROCESS.loss(output, x0, t, noise).vb.sum(), output)
    assert grad[:, :2].abs().max() == 0
    assert (grad[:, 2:].abs().amax(dim=(1, 2, 3)) > 0).all()
    (grad,) = torch.autograd.grad(PROCESS.loss(output, x0, t, noise).total.sum(), output)
    torch.testing.assert_close(grad[:, :2], 2 * (output[:, :2] - noise).detach() / noise[0].numel())


def test_gradient_stays_finite_when_the_prediction_is_far_off() -> None:
    x0, noise = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    # At t > 0 so far that both edges of a bin round to one number: the term that is not used there has no gradient.
    output = torch.tensor([1e4, 1e9, 1e9]).view(3, 1, 1, 1) * randn(3, 4, 4, 4, seed=2)
    output[:, 2:] = randn(3, 2, 4, 4, seed=3)
    output.requires_grad_()
    loss = PROCESS.loss(output, x0, torch.tensor([0, 1, 999]), noise).total
    (grad,) = torch.autograd.grad(loss.sum(), output)
    assert loss.isfinite().all()
    assert grad.isfinite().all()


def test_arithmetic_is_float32_under_autocast_and_for_half_precision_outputs() -> None:
    x0, noise, t = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1), torch.tensor([0, 5, 900])
    output = randn(3, 4, 4, 4, seed=2).bfloat16()
    expected = PROCESS.loss(output.float(), x0, t, noise)
    with torch.autocast("cpu", torch.bfloat16):
        found, x_t = PROCESS.loss(output, x0, t, noise), PROCESS.q_sample(x0.bfloat16(), t, noise.bfloat16())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    assert x_t.dtype == PROCESS.q_sample(x0.double(), t, noise.double()).dtype == torch.float32
    assert torch.equal(x_t, PROCESS.q_sample(x0.bfloat16().float(), t, noise.bfloat16().float()))


@pytest.mark.parametrize(
    ("output", "t"), [((3, 2, 4, 4), (3,)), ((3, 4, 4, 5), (3,)), ((3, 4, 4, 4), (1,)), ((3, 4, 4, 4), (3, 1))]
)
def test_shapes_that_would_broadcast_silently_are_refused(output: tuple[int, ...], t: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="loss: found model_output"):
        PROCESS.loss(
            torch.zeros(output), torch.zeros(3, 2, 4, 4), torch.zeros(t, dtype=torch.int64), torch.zeros(3, 2, 4, 4)
        )
