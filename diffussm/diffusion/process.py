"""The forward process, its posterior, and the training loss.

Gaussian diffusion with a linear schedule, noise prediction and a learned-range covariance: Ho et al., "Denoising
Diffusion Probabilistic Models" (arXiv 2006.11239, "DDPM" below) and Nichol and Dhariwal, "Improved Denoising Diffusion
Probabilistic Models" (arXiv 2102.09672, "IDDPM" below). Timesteps count from 0: t = 0 is the least noisy.

The schedule is computed once, in float64; tensors are float32 whatever autocast says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffussm.config.schema import DiffusionConfig
from diffussm.errors import ConfigError

Array = npt.NDArray[np.float64]
Spacing = Literal["time", "log_snr"]

# The schedule's betas are stated for this many timesteps; another length scales them to keep the final noise level.
_REFERENCE_TIMESTEPS = 1000
# Half a bin of an 8-bit image in [-1, 1], and the edge beyond which a bin is open-ended (DDPM eq. 13).
_HALF_BIN = 1.0 / 255.0
_OPEN_BIN_EDGE = 0.999


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise schedule of a chain and everything that follows from it, in float64.

    Args:
        betas: (T,) variance that step t adds.
        timesteps: (T,) the timestep the network is told at each index; rises. For the full chain 0, 1, ..., T - 1.
    """

    betas: Array
    timesteps: npt.NDArray[np.int64]

    @classmethod
    def linear(cls, cfg: DiffusionConfig) -> Schedule:
        """The schedule of a config: betas rise linearly (DDPM section 4).

        Raises:
            ConfigError: fewer than two timesteps, or betas that are not 0 < beta_start <= beta_end < 1 after scaling.
        """
        if cfg.timesteps < 2:
            raise ConfigError(
                f"diffusion.timesteps: found {cfg.timesteps}; allowed are whole numbers from 2",
                f"set diffusion.timesteps={_REFERENCE_TIMESTEPS}",
            )
        scale = _REFERENCE_TIMESTEPS / cfg.timesteps
        first, last = scale * cfg.beta_start, scale * cfg.beta_end
        if not 0.0 < first <= last < 1.0:
            raise ConfigError(
                f"diffusion.beta_start, diffusion.beta_end: found {cfg.beta_start:g}, {cfg.beta_end:g}, which become "
                f"{first:g}, {last:g} for {cfg.timesteps} timesteps; allowed is 0 < beta_start <= beta_end < 1",
                "use more timesteps or smaller betas",
            )
        return cls(
            betas=np.linspace(first, last, cfg.timesteps, dtype=np.float64),
            timesteps=np.arange(cfg.timesteps, dtype=np.int64),
        )

    def respaced(self, steps: int, *, by: Spacing = "time") -> Schedule:
        """The shorter chain that visits `steps` distinct timesteps, both ends included.

        Its betas are those of the shorter chain, 1 - abar_t / abar_s for neighbours s < t, so its posterior is the
        posterior of the steps that are really taken. One step visits the noisiest timestep.

        Args:
            steps: length of the shorter chain.
            by: "time" spreads the timesteps evenly (IDDPM section 4); "log_snr" spreads the logarithm of signal over
                noise evenly, as far as whole timesteps allow (Lu et al., arXiv 2206.00927, section 3.4).

        Raises:
            ConfigError: `steps` below 1 or above the length of this chain.
        """
        length = len(self.betas)
        if not 1 <= steps <= length:
            raise ConfigError(
                f"sample.steps: found {steps}; allowed are 1 to diffusion.timesteps = {length}",
                f"set sample.steps={min(250, length)}",
            )
        if by == "time":
            # Counted from the noisy end: a chain of one step has to start from pure noise.
            kept = np.linspace(length - 1, 0, steps).round().astype(np.int64)[::-1]
        else:
            kept = self._evenly_by_log_snr(steps)
        abar = self.alphas_cumprod[kept]
        return Schedule(betas=1.0 - abar / np.append(1.0, abar[:-1]), timesteps=self.timesteps[kept])

    def _evenly_by_log_snr(self, steps: int) -> npt.NDArray[np.int64]:
        """Rising indices (steps,), each the nearest to its share of the log signal-to-noise ratio."""
        log_ratio = np.log(self.sigma / self.signal)  # (T,) rises
        wanted = np.linspace(log_ratio[-1], log_ratio[0], steps)[::-1]  # (steps,)
        middles = (log_ratio[1:] + log_ratio[:-1]) / 2.0  # (T - 1,)
        nearest = np.searchsorted(middles, wanted)  # (steps,)
        # At the clean end several shares fall on one timestep. Each index is moved up past its lower neighbour, and
        # down again where too few are left above it.
        order = np.arange(steps)
        apart = np.maximum.accumulate(nearest - order) + order
        return np.minimum(apart, len(self.betas) - steps + order).astype(np.int64)

    @cached_property
    def alphas_cumprod(self) -> Array:
        """(T,) abar_t, the share of the data's variance left at t (DDPM eq. 4)."""
        return np.cumprod(1.0 - self.betas)

    @cached_property
    def _alphas_cumprod_prev(self) -> Array:
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def signal(self) -> Array:
        """(T,) sqrt(abar_t), the factor of the data in x_t."""
        return np.sqrt(self.alphas_cumprod)

    @cached_property
    def sigma(self) -> Array:
        """(T,) sqrt(1 - abar_t), the factor of the noise in x_t."""
        return np.sqrt(1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_variance(self) -> Array:
        """(T,) variance of q(x_{t-1} | x_t, x_0) (DDPM eq. 7); 0 at t = 0, where x_{t-1} is x_0."""
        return self.betas * (1.0 - self._alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def log_posterior_variance(self) -> Array:
        """(T,) its logarithm, with the value of t = 1 at t = 0 to stay finite (IDDPM's code does the same)."""
        return np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))

    @cached_property
    def log_betas(self) -> Array:
        """(T,) log beta_t, the upper end of the learned range."""
        return np.log(self.betas)

    @cached_property
    def posterior_x0(self) -> Array:
        """(T,) factor of x_0 in the mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
        return self.betas * np.sqrt(self._alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_xt(self) -> Array:
        """(T,) factor of x_t in the same mean."""
        return (1.0 - self._alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_noise(self) -> Array:
        """(T,) how far an error of one in the noise moves that mean: posterior_x0 * sigma / signal (DDPM eq. 11)."""
        return self.posterior_x0 * self.sigma / self.signal


class Loss(NamedTuple):
    """Loss of each sample. `total` is the sum of the other two."""

    total: Tensor
    """(B,)"""
    mse: Tensor
    """(B,) mean squared error of the predicted noise (DDPM eq. 14)."""
    vb: Tensor
    """(B,) the timestep's term of the variational bound, bits per dimension; trains the covariance only."""


class Process:
    """The diffusion process of a config: forward, posterior, learned-range covariance and loss.

    Every method takes `t: (B,)`, integers in [0, T), on the device of the other tensors, and computes in float32.

    Args:
        cfg: length and betas of the forward process.

    Raises:
        ConfigError: the schedule is not one (see `Schedule.linear`).
    """

    def __init__(self, cfg: DiffusionConfig) -> None:
        self.schedule = Schedule.linear(cfg)
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def timesteps(self) -> int:
        """Length T of the chain."""
        return len(self.schedule.betas)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t, the data `x0` (B, C, H, W) with `noise` (B, C, H, W) mixed in (DDPM eq. 4). Returns (B, C, H, W)."""
        return self._at("signal", t) * x0.float() + self._at("sigma", t) * noise.float()  # (B, C, H, W)

    def predict_x0(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The data that `x_t` (B, C, H, W) was made of if `noise` is what was mixed in. Returns (B, C, H, W)."""
        return (x_t.float() - self._at("sigma", t) * noise.float()) / self._at("signal", t)  # (B, C, H, W)

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, H, W) and variance (B, 1, 1, 1) of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
        mean = self._at("posterior_x0", t) * x0.float() + self._at("posterior_xt", t) * x_t.float()  # (B, C, H, W)
        return mean, self._at("posterior_variance", t)

    def log_variance(self, covariance: Tensor, t: Tensor) -> Tensor:
        """Log of the learned variance (IDDPM eq. 15).

        Args:
            covariance: (B, C, H, W) second half of the network's output; -1 is the posterior variance, +1 is beta.
            t: (B,)

        Returns:
            (B, C, H, W)
        """
        share = (covariance.float() + 1.0) / 2.0  # (B, C, H, W)
        return share * self._at("log_betas", t) + (1.0 - share) * self._at("log_posterior_variance", t)

    def loss(self, model_output: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> Loss:
        """The hybrid loss of IDDPM as DiT uses it: noise error plus the bound's term, both with weight one.

        The bound sees the predicted noise detached, so that it trains the covariance and leaves the mean to the noise
        error. The term is that of the drawn timestep alone, not multiplied by T.

        Args:
            model_output: (B, 2C, H, W) predicted noise and covariance at x_t = q_sample(x0, t, noise).
            x0: (B, C, H, W) data.
            t: (B,)
            noise: (B, C, H, W) what was mixed in.

        Raises:
            ValueError: shapes do not fit.
        """
        batch, channels, *side = x0.shape
        if model_output.shape != (batch, 2 * channels, *side) or noise.shape != x0.shape or t.shape != (batch,):
            raise ValueError(
                f"loss: found model_output {tuple(model_output.shape)}, x0 {tuple(x0.shape)}, noise "
                f"{tuple(noise.shape)}, t {tuple(t.shape)}; allowed are (B, 2C, H, W), (B, C, H, W), (B, C, H, W), (B,)"
            )
        predicted, covariance = model_output.float().chunk(2, dim=1)  # (B, C, H, W) each
        error = predicted - noise.float()  # (B, C, H, W)
        mse = error.square().flatten(1).mean(1)  # (B,)
        vb = self._bound(error.detach(), covariance, x0.float(), t)  # (B,)
        return Loss(mse + vb, mse, vb)

    def _bound(self, error: Tensor, covariance: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Term L_t of the variational bound, bits per dimension (DDPM eq. 5, 13). Returns (B,)."""
        first = (t == 0).view(-1, *[1] * (x0.dim() - 1))  # (B, 1, 1, 1)
        # True mean minus predicted mean. Both are built from the same x_t, so the difference is the noise's error,
        # scaled; forming the two means first would lose it to cancellation at large t. At t = 0 the true mean is x0.
        gap = self._at("posterior_noise", t) * error  # (B, C, H, W)
        log_variance = self.log_variance(covariance, t)  # (B, C, H, W)
        kl = _gaussian_kl(gap, self._at("log_posterior_variance", t), log_variance)  # (B, C, H, W)
        # Rows with t > 0 are not used below; a gap of zero keeps their gradient finite, which `where` alone does not.
        nll = _binned_nll(torch.where(first, gap, 0.0), x0, 0.5 * log_variance)  # (B, C, H, W)
        return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2.0)  # (B,)

    def _at(self, name: str, t: Tensor) -> Tensor:
        """Values of one of the schedule's arrays at `t` (B,), as float32 (B, 1, 1, 1) on the device of `t`."""
        key = (name, t.device)
        if key not in self._on_device:
            self._on_device[key] = torch.tensor(getattr(self.schedule, name), dtype=torch.float32, device=t.device)
        return self._on_device[key][t].view(-1, 1, 1, 1)


def _gaussian_kl(gap: Tensor, log_variance_q: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL(q || p) of Gaussians whose means differ by `gap`, in nats, elementwise."""
    ratio = log_variance_q - log_variance_p
    return 0.5 * (torch.expm1(ratio) - ratio + gap.square() * torch.exp(-log_variance_p))


def _binned_nll(gap: Tensor, x0: Tensor, log_std: Tensor) -> Tensor:
    """-log of the probability of the 8-bit bin around `x0` under N(x0 - gap, std^2), in nats (DDPM eq. 13).

    Latents are neither 8-bit nor within [-1, 1]; DiT and the code before it use this term for them all the same, and
    it is kept so that losses can be compared. All arguments and the result have the same shape.
    """
    inverse_std = torch.exp(-log_std)
    upper, lower = (gap + _HALF_BIN) * inverse_std, (gap - _HALF_BIN) * inverse_std
    # A bin above the mean is mirrored below it: there the two log probabilities are far apart, not both nearly 0.
    above = gap > 0
    near, far = torch.where(above, -lower, upper), torch.where(above, -upper, lower)
    log_near = torch.special.log_ndtr(near)
    inside = log_near + torch.log(-torch.expm1(torch.special.log_ndtr(far) - log_near))
    log_probability = torch.where(
        x0 < -_OPEN_BIN_EDGE,
        torch.special.log_ndtr(upper),
        torch.where(x0 > _OPEN_BIN_EDGE, torch.special.log_ndtr(-lower), inside),
    )
    return -log_probability
