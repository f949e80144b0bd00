"""Strips of pictures that show how a model behaves: over the reverse steps, between two noises, over a setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from diffussm.config.schema import Config, SampleConfig, Sampler
from diffussm.errors import ConfigError
from diffussm.observe.grid import grid
from diffussm.rng import Purpose, generator
from diffussm.sample import Painter, Pictures

KINDS = ("trajectory", "interpolation", "guidance", "ema")
GUIDANCE = (1.0, 1.5, 2.5, 4.0)
"""Scales of a guidance strip, if none are named."""

Load = Callable[[Config], Painter]
"""Makes a painter of the same checkpoint for a changed config."""


def strip(painter: Painter, kind: str, names: Sequence[str], values: Sequence[str], load: Load) -> bytes:
    """A strip as PNG.

    Args:
        painter: the model.
        kind: trajectory (columns are reverse steps), interpolation (columns lie between two noises), guidance or ema
            (rows are settings, the noise stays).
        names: classes to draw; empty takes the first `sample.per_class` of the data.
        values: settings of a guidance or ema strip; empty takes `GUIDANCE`, or the averages of the config.
        load: makes a painter with other weights (ema).

    Raises:
        ConfigError: unknown kind, class or value.
    """
    if kind not in KINDS:
        raise ConfigError(f"--strip: found {kind!r}; allowed: {', '.join(KINDS)}", "name one of these")
    classes = painter.passport.classes
    chosen = list(names) or list(classes[: painter.cfg.sample.per_class])
    unknown = [name for name in chosen if name not in classes]
    if unknown:
        raise ConfigError(f"--classes: found {', '.join(unknown)}; allowed: {', '.join(classes)}", "name some of those")
    labels = [classes.index(name) for name in chosen]
    if kind in ("trajectory", "interpolation"):
        frames = painter.cfg.sample.per_class
        draw = trajectory if kind == "trajectory" else interpolation
        rows, pictures = chosen, draw(painter, labels, frames)
    else:
        rows = list(values) or _settings(painter.cfg, kind)
        pictures = np.concatenate([_set(painter, kind, value, load).paint(labels) for value in rows])
        rows = [f"{kind} {value}" for value in rows]
    return grid(pictures, rows, painter.passport.credit, max(1, 64 // pictures.shape[1]))


def trajectory(painter: Painter, labels: Sequence[int], frames: int) -> Pictures:
    """What the latents decode to along the way, (R * frames, H, W, 3): frames of the first label first.

    The frames are spread evenly over the reverse steps; the last one is the finished picture, and there are no more
    frames than steps.
    """
    steps = painter.cfg.sample.steps
    wanted = sorted({max(1, round(steps * (i + 1) / frames)) for i in range(frames)})
    kept: list[Tensor] = []

    def watch(done: int, x: Tensor) -> None:
        if done in wanted:
            kept.append(x.clone())

    painter.latents(labels, watch=watch)
    along = torch.stack(kept, dim=1)  # (R, frames, C, h, w)
    return painter.decoder.decode(along.flatten(0, 1))


def interpolation(painter: Painter, labels: Sequence[int], frames: int) -> Pictures:
    """Pictures between two noises of each label, (R * frames, H, W, 3), by a deterministic sampler.

    Noises are joined along the great circle, which keeps their norm: a straight line would pass through noise that the
    model never saw. A ddpm config is drawn with ddim, because new noise in each step would hide the way.
    """
    latent = painter.passport.latent
    shape = (latent.channels, latent.height, latent.width)
    first, last = (
        torch.from_numpy(
            generator(painter.cfg.sample.seed, Purpose.SAMPLE, index).standard_normal(shape, dtype=np.float32)
        )
        for index in (0, 1)
    )
    ways = torch.stack([between(first, last, i / max(1, frames - 1)) for i in range(frames)])  # (frames, C, h, w)
    sampler = Sampler.ddim if painter.cfg.sample.sampler is Sampler.ddpm else painter.cfg.sample.sampler
    still = _with(painter, sampler=sampler)
    every = [label for label in labels for _ in range(frames)]
    latents = still.latents(every, initial=ways.repeat(len(labels), 1, 1, 1))  # (R * frames, C, h, w)
    return still.decoder.decode(latents)


def between(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation from `a` (share 0) to `b` (share 1) of two noises of any equal shape."""
    cosine = torch.dot(a.flatten() / a.norm(), b.flatten() / b.norm()).clamp(-1, 1)
    angle = torch.arccos(cosine)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def _settings(cfg: Config, kind: str) -> list[str]:
    if kind == "guidance":
        return [f"{scale:g}" for scale in GUIDANCE]
    return ["none", "plain", *(f"power-{width:.3f}" for width in cfg.train.power_ema)]


def _set(painter: Painter, kind: str, value: str, load: Load) -> Painter:
    """A painter with one setting changed; for other weights they are read anew."""
    if kind == "ema":
        return load(dataclasses.replace(painter.cfg, sample=dataclasses.replace(painter.cfg.sample, ema=value)))
    try:
        scale = float(value)
    except ValueError:
        raise ConfigError(f"--values: found {value!r}; allowed are numbers from 0", "--values 1,1.5,3") from None
    if not 0 <= scale < float("inf"):
        raise ConfigError(f"--values: found {value}; allowed are numbers from 0", "--values 1,1.5,3")
    return _with(painter, guidance=scale)


def _with(painter: Painter, **sample: object) -> Painter:
    changed: SampleConfig = dataclasses.replace(painter.cfg.sample, **sample)  # type: ignore[arg-type]
    return dataclasses.replace(painter, cfg=dataclasses.replace(painter.cfg, sample=changed))
