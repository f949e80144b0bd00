"""What a run will be, in pure arithmetic: printed by `diffussm train --dry-run` before anything starts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from diffussm.config.plan import layout, some, world_sizes
from diffussm.config.rules import accumulation, micro_batch
from diffussm.config.schema import Config, Precision
from diffussm.model.counts import count, memory
from diffussm.model.presets import LatentShape, check_fit, resolve

PASSPORT = "passport.json"


@dataclass(frozen=True)
class Latent:
    """Shape of the latents, and how it is known."""

    shape: LatentShape
    source: str
    counted: bool
    """Whether the number of classes is known; if not, the shape has one."""


def text(cfg: Config) -> str:
    """The plan as lines of `what  value`, for a config that passed `check`.

    Raises:
        ConfigError: the preset is unknown, or the network does not fit the latents.
    """
    rows = [*_training(cfg), *_network(cfg)]
    width = max(len(what) for what, _ in rows)
    return "\n".join(f"{what:<{width}}  {value}" for what, value in rows)


def steps(cfg: Config) -> int:
    """Optimiser steps until `train.images` are seen; the last one may go beyond."""
    return -(-cfg.train.images // cfg.train.global_batch)


def latent(cfg: Config) -> Latent | None:
    """What the network will denoise, as far as it can be known without a network or torch; None if it cannot.

    Latents that were made on this machine say it themselves. Otherwise the autoencoder's own config does, with the
    class names of `data.classes`.
    """
    passport = Path(cfg.data.latents.removeprefix("file://")) / PASSPORT
    if passport.is_file():
        made = json.loads(passport.read_text())
        channels, height, wide = made["latent_shape"]
        return Latent(LatentShape(channels, height, wide, len(made["classes"])), str(passport), True)
    found = _autoencoder(cfg.data.autoencoder)
    if found is None:
        return None
    side = cfg.data.resolution_px // 2 ** (len(found["block_out_channels"]) - 1)
    shape = LatentShape(found["latent_channels"], side, side, classes=len(cfg.data.classes) or 1)
    return Latent(shape, cfg.data.autoencoder, counted=bool(cfg.data.classes))


def _autoencoder(spec: str) -> dict | None:  # type: ignore[type-arg]
    """config.json of a built-in autoencoder or of a local folder; None for one that would have to be fetched."""
    if spec.startswith("builtin:"):
        name = spec.removeprefix("builtin:")
        file = resources.files("diffussm") / "data" / "weights" / name / "config.json"
    else:
        file = Path(spec) / "config.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _training(cfg: Config) -> list[tuple[str, str]]:
    train, cluster = cfg.train, cfg.cluster
    nodes, each = layout(cfg)
    where = f" on {nodes} nodes" if nodes > 1 else ""
    saves = -(-train.images // train.checkpoint_images)
    device = f"{cluster.gpus_per_worker:g} GPU each" if cluster.gpus_per_worker else "CPU"
    return [
        ("run", f"{cfg.storage.rstrip('/')}/{cfg.name}"),
        ("images", f"{train.images:,}"),
        ("steps", f"{steps(cfg):,} of {train.global_batch} images"),
        ("workers", f"{nodes * each}{where} ({device}); legal are {some(world_sizes(cfg), 16)}"),
        ("batch", f"{micro_batch(cfg)} images a pass, {accumulation(cfg)} passes a step on each worker"),
        ("checkpoints", f"{saves:,} saves, the newest {train.keep_checkpoints} kept"),
    ]


def _network(cfg: Config) -> list[tuple[str, str]]:
    width, depth = resolve(cfg.model)
    rows = [("network", f"{cfg.model.preset}: width {width}, depth {depth}, state {cfg.model.state}")]
    known = latent(cfg)
    if known is None:
        return [*rows, ("latent", f"not known before {cfg.data.autoencoder} is fetched")]
    shape = known.shape
    check_fit(cfg.model, shape)
    train = cfg.train
    is_bf16, recompute = train.precision is Precision.bf16, train.activation_checkpointing
    counts = count(cfg.model, shape, bf16=is_bf16, activation_checkpointing=recompute)
    kept = memory(counts.parameters, train.zero_stage, cfg.cluster.workers, 1 + len(train.power_ema))
    pass_bytes = counts.activation_bytes * micro_batch(cfg)
    more = "" if known.counted else f" with one class; each further class adds {width:,}"
    return [
        *rows,
        ("latent", f"{shape.channels} x {shape.height} x {shape.width} by {known.source}"),
        ("parameters", f"{counts.parameters:,}{more}"),
        ("multiply-adds", f"{counts.macs / 1e9:,.3f} G for an image's forward pass"),
        ("memory", f"{_gib(kept.total)} of state and about {_gib(pass_bytes)} of activations on each worker"),
    ]


def _gib(size: int) -> str:
    return f"{size / (1 << 30):,.2f} GiB"
