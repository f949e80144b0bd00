"""Draw latents from a trained model by running the process in reverse.

The update rules are those of diffusers' schedulers. This module gives them the respaced chain, the guided network and
noise that belongs to the picture, not to the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffussm.config.schema import Sampler
from diffussm.diffusion.guidance import Model, guided_output
from diffussm.diffusion.process import Process, Schedule
from diffussm.errors import ConfigError
from diffussm.rng import Purpose, generator


# Not inference_mode: tensors that a model caches while sampling must stay usable when training goes on.
@torch.no_grad()
def sample(
    model: Model,
    process: Process,
    labels: Tensor,
    latent: tuple[int, int, int],
    *,
    sampler: Sampler | str,
    steps: int,
    guidance: float,
    guidance_channels: int,
    seed: int,
    null_class: int,
    first_index: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    initial: Tensor | None = None,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw one latent for each label.

    Picture i depends on (seed, first_index + i, label) alone: any cut into batches gives the same noise.

    Args:
        model: the network in the state to sample from (EMA weights, eval mode and autocast are the caller's).
        process: the forward process it was trained with.
        labels: (N,) class of each picture.
        latent: (C, H, W).
        sampler: ddpm (ancestral, with the learned covariance), ddim (deterministic) or dpm (DPM-Solver++, order 2).
        steps: network evaluations, 1 to T; evenly spread timesteps (ddpm, ddim) or log SNR (dpm).
        guidance: classifier-free guidance scale; 1 is the conditional model.
        guidance_channels: guided noise channels, 0 for all.
        seed: seed of all noise.
        null_class: label of "no class".
        first_index: index of the first picture in the whole set.
        device: where the model is.
        progress: called after each step with (steps done, steps).
        initial: (N, C, H, W) noise to begin with, instead of the pictures' own; noise of later steps stays theirs.
        watch: called after each step with (steps done, the (N, C, H, W) latents as they are then).

    Returns:
        (N, C, H, W) float32 latents on `device`, at the scale the model was trained at.

    Raises:
        ConfigError: unknown sampler, `steps` outside 1 to T, or more guided channels than the latent has.
    """
    kind = _sampler(sampler)
    # DPM-Solver++ extrapolates in log SNR. Over steps even in time its last ones span so much of it that, on Gaussian
    # data and 20 steps, the standard deviation comes out up to 30 % wrong; even in log SNR it is 1.5 %.
    chain = process.schedule.respaced(steps, by="log_snr" if kind is Sampler.dpm else "time")
    scheduler = _scheduler(kind, chain)
    labels = labels.to(device=device, dtype=torch.int64)  # (N,)
    x, generators = _noise(seed, first_index, len(labels), latent)  # (N, C, H, W)
    x = (x if initial is None else initial).to(device)
    if len(labels) == 0:
        return x
    for done, index in enumerate(reversed(range(steps)), start=1):
        t = torch.full((len(labels),), int(chain.timesteps[index]), dtype=torch.int64, device=device)  # (N,)
        output = guided_output(
            model, x, t, labels, scale=guidance, channels=guidance_channels, null_class=null_class
        ).float()  # (N, 2C, H, W)
        if kind is Sampler.ddpm:
            x = scheduler.step(output, index, x, generator=generators, return_dict=False)[0]  # (N, C, H, W)
        else:
            # The deterministic samplers have no covariance. It is cut off here because DPMSolverMultistepScheduler,
            # told of a learned one, would keep 3 channels whatever their number.
            x = scheduler.step(output[:, : latent[0]], index, x, return_dict=False)[0]  # (N, C, H, W)
        if watch is not None:
            watch(done, x)
        if progress is not None:
            progress(done, steps)
    return x


def _sampler(name: Sampler | str) -> Sampler:
    try:
        return Sampler(name)
    except ValueError:
        allowed = ", ".join(s.value for s in Sampler)
        raise ConfigError(f"sample.sampler: found {name!r}; allowed are {allowed}") from None


def _scheduler(kind: Sampler, chain: Schedule) -> Any:
    """diffusers' scheduler over the indices steps - 1, ..., 0 of the respaced chain.

    The scheduler is given the short chain as if it were the whole one. Its own respacing is not used: DDIM's assumes
    a step that divides T and starts far from pure noise when it does not, and the three differ in where they end.
    """
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    steps = len(chain.betas)
    # Latents have no bounds, so nothing is ever clipped.
    common: dict[str, Any] = {"num_train_timesteps": steps, "trained_betas": chain.betas, "prediction_type": "epsilon"}
    scheduler: Any  # diffusers' schedulers share no typed interface
    if kind is Sampler.ddpm:
        scheduler = DDPMScheduler(**common, variance_type="learned_range", clip_sample=False)
    elif kind is Sampler.ddim:
        scheduler = DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True)
    else:
        scheduler = DPMSolverMultistepScheduler(
            **common, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="trailing"
        )
    # diffusers multiplies the betas up in float32; small betas, recovered as 1 - abar_t / abar_s, would lose digits.
    scheduler.alphas_cumprod = torch.from_numpy(chain.alphas_cumprod)
    scheduler.set_timesteps(steps)
    return scheduler


def _noise(
    seed: int, first_index: int, count: int, latent: tuple[int, int, int]
) -> tuple[Tensor, list[torch.Generator]]:
    """Initial noise (count, C, H, W) and, for the noise of each step, a torch generator for each picture.

    Both come from the picture's own keyed generator. The torch generators live on the host, so that a picture gets the
    same noise on every device.
    """
    x = np.empty((count, *latent), dtype=np.float32)
    generators = []
    for i in range(count):
        source = generator(seed, Purpose.SAMPLE, first_index + i)
        source.standard_normal(dtype=np.float32, out=x[i])
        generators.append(torch.Generator().manual_seed(int(source.integers(2**63))))
    return torch.from_numpy(x), generators
