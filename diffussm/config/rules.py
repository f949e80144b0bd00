"""Rules for the values of a config and for values that must fit each other. Pure: nothing outside the config is read.

What needs the autoencoder (side of the latent), the file system (storage can be written) or the machine (GPUs) is
checked by those who have them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from diffussm.config import kubernetes, plan, slurm
from diffussm.config.schema import Config, PosEmbed, Source
from diffussm.config.sets import split
from diffussm.errors import ConfigError
from diffussm.naming import check_run_name, is_remote, power_name

_URL = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?|file:///.+")

POWER_WIDTHS = (0.01, 0.28)
"""Relative widths that a power function t^gamma with gamma from 0 (0.289, the mean of all) upwards can have."""

Rule = tuple[Callable[[Any], bool], str]


def _at_least(low: int) -> Rule:
    return (lambda value: value >= low), f"{low} or more"


_POSITIVE: Rule = (lambda value: 0 < value < math.inf), "a number above 0"
_NOT_NEGATIVE: Rule = (lambda value: 0 <= value < math.inf), "0 or more"
_FRACTION: Rule = (lambda value: 0 <= value < 1), "a number from 0 to below 1"
_PROBABILITY: Rule = (lambda value: 0 <= value <= 1), "a probability from 0 to 1"
_SEED: Rule = (lambda value: 0 <= value < 2**63), "a whole number from 0 to 2**63 - 1"
_PLACE: Rule = (lambda value: _is_place(value)), "a local folder or s3://bucket/prefix"
_TEXT: Rule = (lambda value: bool(value.strip())), "text that is not empty"

_RANGES: dict[str, Rule] = {
    "storage": _PLACE,
    "seed": _SEED,
    "data.latents": _PLACE,
    "data.resolution_px": _at_least(8),
    "data.limit": _at_least(0),
    "data.autoencoder": _TEXT,
    "data.shard_bytes": _at_least(1 << 16),
    "data.loader_workers": _at_least(0),
    "data.cache_limit_bytes": _at_least(0),
    "data.predownload_images": _at_least(0),
    "data.store_deadline_s": _POSITIVE,
    "data.canonical_nodes": _at_least(1),
    "data.shuffle_block_images": _at_least(1),
    "prepare.workers": _at_least(0),
    "prepare.cpus_per_worker": _POSITIVE,
    "prepare.gpus_per_worker": ((lambda value: 0 <= value <= 1), "0 (CPU) to 1; a worker drives one GPU"),
    "prepare.threads_per_worker": _at_least(1),
    "prepare.decode_threads": _at_least(1),
    "prepare.unit_images": _at_least(1),
    "prepare.batch": _at_least(0),
    "prepare.max_failures": _at_least(0),
    "model.hourglass": _at_least(1),
    "model.state": ((lambda value: value >= 2 and value % 2 == 0), "an even number, 2 or more (conjugate pairs)"),
    "model.backend": _TEXT,
    "diffusion.timesteps": _at_least(2),
    "diffusion.beta_start": _POSITIVE,
    "diffusion.beta_end": _POSITIVE,
    "diffusion.label_drop": _PROBABILITY,
    "train.images": _at_least(1),
    "train.global_batch": _at_least(1),
    "train.micro_batch": _at_least(0),
    "train.lr": _POSITIVE,
    "train.beta1": _FRACTION,
    "train.beta2": _FRACTION,
    "train.weight_decay": _NOT_NEGATIVE,
    "train.warmup_images": _at_least(0),
    "train.decay_images": _at_least(0),
    "train.grad_clip": _NOT_NEGATIVE,
    "train.zero_stage": ((lambda value: value in (0, 1, 2, 3)), "0, 1, 2 or 3"),
    "train.ema": _FRACTION,
    "train.ema_snapshot_images": _at_least(0),
    "train.keep_ema_snapshots": _at_least(0),
    "train.log_images": _at_least(1),
    "train.max_nonfinite_steps": _at_least(1),
    "checkpoint.every_images": _at_least(1),
    "checkpoint.fault_every_s": _POSITIVE,
    "checkpoint.keep": _at_least(1),
    "checkpoint.milestone_images": _at_least(0),
    "checkpoint.deadline_s": _POSITIVE,
    "checkpoint.max_failures": _at_least(1),
    "checkpoint.local_every_images": _at_least(0),
    "checkpoint.local_keep": _at_least(1),
    "cluster.workers": _at_least(1),
    "cluster.workers_per_node": _at_least(0),
    "cluster.gpus_per_worker": ((lambda value: 0 <= value <= 1), "0 (CPU) to 1; a worker drives one GPU"),
    "cluster.cpus_per_worker": _POSITIVE,
    "cluster.threads_per_worker": _at_least(1),
    "cluster.max_failures": _at_least(0),
    "cluster.min_workers": _at_least(0),
    "cluster.wait_nodes_s": _NOT_NEGATIVE,
    "cluster.failure_window_s": _POSITIVE,
    "cluster.health_check_interval_s": _POSITIVE,
    "cluster.heartbeat_interval_s": _POSITIVE,
    "cluster.hang_s": _POSITIVE,
    "cluster.start_s": _POSITIVE,
    "cluster.grace_s": _POSITIVE,
    "sample.steps": _at_least(1),
    "sample.guidance": _NOT_NEGATIVE,
    "sample.guidance_channels": _at_least(0),
    "sample.every_images": _at_least(0),
    "sample.per_class": _at_least(1),
    "sample.batch": _at_least(1),
    "sample.seed": _SEED,
    "evaluate.every_images": _at_least(0),
    "evaluate.images": _at_least(2),
    "evaluate.extractor": _TEXT,
    "evaluate.batch": _at_least(1),
    "evaluate.block_images": _at_least(1),
    "evaluate.workers": _at_least(0),
    "observe.project": _TEXT,
    "observe.telemetry_images": _at_least(0),
    **kubernetes.RANGES,
    **slurm.RANGES,
    "plan.machine": _TEXT,
    "plan.gpus_per_node": _at_least(1),
    "plan.efficiency": ((lambda value: 0 <= value <= 1), "a number from 0 to 1; 0 takes the table's"),
    "plan.gpu_hour_price": _NOT_NEGATIVE,
    "plan.store_bytes_per_s": _POSITIVE,
    "plan.dataset_images": _at_least(0),
    "plan.dataset_classes": _at_least(0),
}


def check(cfg: Config) -> None:
    """Raise ConfigError naming every rule that `cfg` breaks: the key, what was found, what is allowed."""
    problems = list(_range_problems(cfg))
    # Rules that join keys divide and compare; they make sense only when each value makes sense alone.
    if not problems:
        problems = [
            *_data_problems(cfg),
            *_model_problems(cfg),
            *_diffusion_problems(cfg),
            *_train_problems(cfg),
            *_ema_problems(cfg),
            *_checkpoint_problems(cfg),
            *_batch_problems(cfg),
            *kubernetes.problems(cfg.kubernetes),
            *slurm.problems(cfg.slurm),
        ]
    if problems:
        raise ConfigError("\n".join(problems), "`diffussm config` explains each key")


def micro_batch(cfg: Config) -> int:
    """Images in one forward pass on one rank, for a config that passed `check`."""
    return cfg.train.micro_batch or cfg.train.global_batch // cfg.cluster.workers


def snapshot_interval(cfg: Config) -> int:
    """Images between two snapshots of the power averages."""
    return cfg.train.ema_snapshot_images or max(1, cfg.train.images // 64)


def accumulation(cfg: Config) -> int:
    """Forward passes of each rank for one optimiser step, for a config that passed `check`."""
    return cfg.train.global_batch // (cfg.cluster.workers * micro_batch(cfg))


def _is_place(url: str) -> bool:
    """Whether `url` is a local path, file:// or a bucket with an optional prefix; other schemes have no door."""
    return bool(_URL.fullmatch(url)) if "://" in url else bool(url.strip())


def _range_problems(cfg: Config) -> Iterator[str]:
    try:
        check_run_name(cfg.name)
    except ConfigError as error:
        yield error.message
    for name, (is_allowed, allowed) in _RANGES.items():
        value: Any = cfg
        for part in name.split("."):
            value = getattr(value, part)
        if not is_allowed(value):
            yield f"{name}: found {value!r}; allowed: {allowed}"
    for name, size in (("model.width", cfg.model.width), ("model.depth", cfg.model.depth)):
        if size is not None and size < 1:
            yield f"{name}: found {size}; allowed: 1 or more, or null for the preset's"


def _data_problems(cfg: Config) -> Iterator[str]:
    data = cfg.data
    if data.source is Source.folder and not data.images.strip():
        yield "data.images: found nothing; allowed with data.source=folder: a folder with one sub-folder a class"
    if data.source in (Source.tar, Source.parquet) and not data.images.strip():
        allowed = "a folder of shards, or a pattern like train-{000..146}.tar"
        yield f"data.images: found nothing; allowed with data.source={data.source.value}: {allowed}"
    if data.labels and data.source is not Source.folder:
        yield f"data.labels: found {data.labels!r}; allowed with data.source={data.source.value}: nothing"
    if data.image_column and data.source is not Source.parquet:
        yield f"data.image_column: found {data.image_column!r}; allowed with data.source={data.source.value}: nothing"
    if data.source is Source.twemoji and data.images.strip():
        yield f"data.images: found {data.images!r}; allowed with data.source=twemoji: nothing (a package has them)"
    repeated = sorted({name for name in data.classes if data.classes.count(name) > 1})
    if repeated or not all(name.strip() for name in data.classes):
        yield f"data.classes: found {data.classes!r}; allowed: names that are not empty, each once"
    yield from _set_problems(cfg)
    if data.autoencoder == "builtin:":
        yield "data.autoencoder: found 'builtin:'; allowed: builtin:NAME, for example builtin:emoji-32"
    if data.resolution_px**2 % cfg.model.hourglass:
        # The latent's side divides the resolution, so a ratio that does not divide resolution**2 never fits.
        yield (
            f"model.hourglass: found {cfg.model.hourglass}; allowed: a divisor of the latent's height times width, "
            f"which divides data.resolution_px**2 = {data.resolution_px**2}"
        )


def _set_problems(cfg: Config) -> Iterator[str]:
    places = [cfg.data.latents]
    for text in cfg.data.more:
        resolution_px, place = split(text)
        if resolution_px < 8 or not _is_place(place):
            yield f"data.more: found {text!r}; allowed: RESOLUTION=PLACE with 8 px or more and a folder or s3:// URL"
        if place in places:
            yield f"data.more: found {place!r} twice, or as data.latents; allowed: each place once"
        places.append(place)
        if resolution_px > 0 and resolution_px**2 % cfg.model.hourglass:
            yield f"data.more: found {resolution_px} px; allowed: a square that model.hourglass divides"


def _model_problems(cfg: Config) -> Iterator[str]:
    width = cfg.model.width
    if width is None:
        return
    if 2 * width % cfg.model.hourglass:
        yield (
            f"model.width: found {width}; allowed with model.hourglass={cfg.model.hourglass}: a width whose double is "
            "a multiple of it"
        )
    if cfg.model.pos_embed is PosEmbed.sincos and width % 4:
        yield f"model.width: found {width}; allowed with model.pos_embed=sincos: a multiple of 4"


def _diffusion_problems(cfg: Config) -> Iterator[str]:
    diffusion, sample = cfg.diffusion, cfg.sample
    if diffusion.beta_start > diffusion.beta_end:
        first, end = diffusion.beta_start, diffusion.beta_end
        yield f"diffusion.beta_start: found {first}; allowed: at most diffusion.beta_end = {end}"
    last = diffusion.beta_end * 1000 / diffusion.timesteps
    if last >= 1:
        least = math.floor(1000 * diffusion.beta_end) + 1
        yield (
            f"diffusion.timesteps: found {diffusion.timesteps}, which makes the last beta {last:.3g}; allowed with "
            f"diffusion.beta_end={diffusion.beta_end}: {least} or more"
        )
    if sample.steps > diffusion.timesteps:
        yield f"sample.steps: found {sample.steps}; allowed: at most diffusion.timesteps = {diffusion.timesteps}"
    if diffusion.label_drop == 0 and sample.guidance != 1:
        yield (
            f"sample.guidance: found {sample.guidance}; allowed with diffusion.label_drop=0: 1, because the null class "
            "that guidance needs is never trained"
        )


def _train_problems(cfg: Config) -> Iterator[str]:
    train = cfg.train
    if train.start_from and not _is_place(train.start_from):
        yield f"train.start_from: found {train.start_from!r}; allowed: a run's folder or s3://bucket/prefix/run"
    if any(images < 1 for images in train.profile.at_images):
        yield f"train.profile.at_images: found {list(train.profile.at_images)}; allowed: whole numbers from 1"
    last = cfg.cluster.workers - 1
    if train.profile.at_images and any(not 0 <= rank <= last for rank in train.profile.ranks):
        yield f"train.profile.ranks: found {list(train.profile.ranks)}; allowed: 0 to {last} (cluster.workers - 1)"
    if train.start_from.partition("/checkpoints/")[0].rstrip("/") == f"{cfg.storage.rstrip('/')}/{cfg.name}":
        yield f"train.start_from: found {train.start_from!r}; allowed: another run than this one"
    if train.images < train.global_batch:
        yield f"train.images: found {train.images}; allowed: one train.global_batch = {train.global_batch} or more"
    if train.warmup_images + train.decay_images > train.images:
        yield (
            f"train.warmup_images + train.decay_images: found {train.warmup_images} + {train.decay_images}; allowed: "
            f"together at most train.images = {train.images}"
        )
    gpus, workers = cfg.cluster.gpus_per_worker, cfg.cluster.workers
    least = cfg.cluster.min_workers
    if least and not any(least <= size for size in plan.smaller_sizes(cfg)):
        yield f"cluster.min_workers: found {least}; allowed with cluster.workers={workers}: 0 or 1 to {workers}"
    if 0 < gpus < 1 and workers > 1:
        yield (
            f"cluster.gpus_per_worker: found {gpus} with cluster.workers={workers}; allowed: 0 or 1, because NCCL "
            "refuses two ranks on one GPU"
        )


def _ema_problems(cfg: Config) -> Iterator[str]:
    widths = cfg.train.power_ema
    names = [power_name(width) for width in widths]
    low, high = POWER_WIDTHS
    # Three decimals, so that the name says exactly what the average is.
    if not all(low <= width <= high and round(width, 3) == width for width in widths) or len({*names}) < len(names):
        yield (
            f"train.power_ema: found {widths!r}; allowed: numbers from {low} to {high} with at most three decimals, "
            "each once, for example [0.05, 0.1]"
        )
    allowed = ["none", "plain", *names]
    if cfg.sample.ema not in allowed:
        yield (f"sample.ema: found {cfg.sample.ema!r}; allowed with train.power_ema={widths!r}: {', '.join(allowed)}")


def _checkpoint_problems(cfg: Config) -> Iterator[str]:
    local, every = cfg.checkpoint.local, cfg.checkpoint.local_every_images
    if local and is_remote(local):
        yield f"checkpoint.local: found {local!r}; allowed: a folder (storage= may be a bucket)"
    if local and not every:
        yield "checkpoint.local_every_images: found 0; allowed with checkpoint.local: 1 or more"
    if every and not local:
        yield f"checkpoint.local_every_images: found {every}; allowed without checkpoint.local: 0"


def _batch_problems(cfg: Config) -> Iterator[str]:
    batching = plan.Batching.of(cfg)
    unfit = plan.why_unfit(batching)
    if unfit is not None:
        yield unfit[0]
        return
    try:
        nodes, each = plan.layout(cfg)
    except ConfigError as error:
        yield error.message
        return
    refused = plan.why_illegal(batching, nodes, each)
    if refused is not None:
        allowed = plan.some(plan.world_sizes(cfg)) or "none"
        yield f"cluster.workers: {refused[0]}; allowed here: {allowed}; {refused[1]}"
