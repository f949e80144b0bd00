"""What a run will be, in pure arithmetic: the words of `diffussm plan` and of `diffussm train --dry-run`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from diffussm.config.plan import layout, some, world_sizes
from diffussm.config.rules import accumulation, micro_batch
from diffussm.config.schema import Config, Pace
from diffussm.errors import ConfigError
from diffussm.model.presets import check_fit, resolve
from launch.checks import Check, deadline
from launch.estimate import Estimate, Estimator
from launch.latent import Latent, latent


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


def _training(cfg: Config) -> list[tuple[str, str]]:
    train, cluster = cfg.train, cfg.cluster
    nodes, each = layout(cfg)
    where = f" on {nodes} nodes" if nodes > 1 else ""
    saves = -(-train.images // cfg.checkpoint.every_images)
    least = "at least " if cfg.checkpoint.pace is Pace.auto else ""
    device = f"{cluster.gpus_per_worker:g} GPU each" if cluster.gpus_per_worker else "CPU"
    return [
        ("run", f"{cfg.storage.rstrip('/')}/{cfg.name}"),
        ("images", f"{train.images:,}"),
        ("steps", f"{steps(cfg):,} of {train.global_batch} images"),
        ("workers", f"{nodes * each}{where} ({device}); legal are {some(world_sizes(cfg), 16)}"),
        ("batch", f"{micro_batch(cfg)} images a pass, {accumulation(cfg)} passes a step on each worker"),
        ("checkpoints", f"{least}{saves:,} saves, the newest {cfg.checkpoint.keep} kept"),
    ]


def _network(cfg: Config) -> list[tuple[str, str]]:
    width, depth = resolve(cfg.model)
    rows = [("network", f"{cfg.model.preset}: width {width}, depth {depth}, state {cfg.model.state}")]
    known = latent(cfg)
    if known is None:
        return [*rows, ("latent", f"not known before {cfg.data.autoencoder} is fetched")]
    shape = known.shape
    check_fit(cfg.model, shape)
    planned = Estimator.of(cfg, known)
    counts, memory = planned.counts(), planned.estimate(planned.configured()).memory
    more = "" if known.counted else f" with one class; each further class adds {width:,}"
    return [
        *rows,
        ("latent", f"{shape.channels} x {shape.height} x {shape.width} by {known.source}"),
        ("parameters", f"{counts.parameters:,}{more}"),
        (
            "multiply-adds",
            f"{counts.macs / 1e9:,.3f} G for an image's forward pass, and {counts.kernel_macs / 1e9:,.3f} G a pass for "
            "the state-space kernels",
        ),
        (
            "memory",
            f"{_gib(memory.peak)} at the fullest moment of each worker: {_gib(memory.state)} of state, "
            f"{_gib(memory.gradients)} of gradients, {_gib(memory.activations + memory.transient)} of activations",
        ),
    ]


def report(cfg: Config, workers: Sequence[int] = ()) -> str:
    """All that `diffussm plan` says: the run, its costs as configured, and the best settings for numbers of workers.

    Raises:
        ConfigError: as `text`; or the autoencoder must be fetched before anything can be said.
    """
    planned = Estimator.of(cfg, _known(cfg))
    asked = planned.estimate(planned.configured())
    rows = _costs(planned, asked)
    width = max(len(what) for what, _ in rows)
    lines = [text(cfg), "", *(f"{what:<{width}}  {value}" for what, value in rows)]
    if planned.card is None:
        lines += ["", "Time, money and settings are predicted for GPUs only (cluster.gpus_per_worker=1)."]
        return "\n".join(lines)
    sizes = list(workers) or [cfg.cluster.workers]
    found = [(size, planned.recommend(size)) for size in sizes]
    lines += ["", *table(found, planned.card.name), "", f"{planned.card.name}: {planned.card.source}."]
    for size, best in found:
        lines += [f"{size} workers: {' '.join(best.layout.overrides) if best else planned.why_not(size)}"]
    return "\n".join(lines)


def refused(cfg: Config, workers: Sequence[int]) -> str:
    """Why none of these numbers of workers can be had, one after another; "" if each can."""
    planned = Estimator.of(cfg, _known(cfg))
    return "; ".join(f"{size}: {why}" for size in workers if (why := planned.why_not(size)))


def plain(cfg: Config, workers: Sequence[int] = ()) -> dict[str, Any]:
    """What `report` says as plain data: bytes, seconds, and money as the table has it."""
    known = _known(cfg)
    planned = Estimator.of(cfg, known)
    counts = planned.counts()
    card = planned.card
    sizes = list(workers) or [cfg.cluster.workers]
    best = {size: planned.recommend(size) for size in sizes}
    return {
        "run": cfg.name,
        "parameters": counts.parameters,
        "macs_per_image": counts.macs,
        "kernel_macs_per_pass": counts.kernel_macs,
        "latent": [known.shape.channels, known.shape.height, known.shape.width],
        "classes": known.shape.classes if known.counted else None,
        "dataset_bytes": known.images * known.sample_bytes or None,
        "checkpoint_bytes": planned.checkpoint_bytes,
        "kept_bytes": planned.kept_bytes,
        "snapshot_bytes": planned.snapshot_bytes,
        "legal_workers": world_sizes(cfg),
        "machine": None if card is None else {"name": card.name, "efficiency": card.efficiency, "source": card.source},
        "configured": planned.estimate(planned.configured()).plain(),
        "recommended": {str(size): None if found is None else found.plain() for size, found in best.items()},
        "refused": {str(size): planned.why_not(size) for size, found in best.items() if found is None},
    }


def as_json(cfg: Config, workers: Sequence[int] = ()) -> str:
    """`plain` as indented JSON."""
    return json.dumps(plain(cfg, workers), indent=1)


def table(found: Sequence[tuple[int, Estimate | None]], card: str) -> list[str]:
    """The best settings of some numbers of workers, as lines of a Markdown table."""
    head = [
        "GPUs",
        "ZeRO",
        "micro batch",
        "passes",
        "recompute",
        "peak GiB",
        "s/step",
        "images/s",
        "days",
        "GPU h",
        "USD",
        "score h",
    ]
    rows = [f"| {card} {' | '.join(head)} |", "|" + "---|" * len(head)]
    for size, best in found:
        if best is None or best.step_s is None:
            cells = [str(size), "-", *[""] * (len(head) - 2)]
        else:
            at, images = best.layout, best.layout.workers * best.layout.micro_batch
            passes = best.passes
            cells = [
                str(size),
                str(at.stage),
                str(at.micro_batch),
                str(passes),
                "yes" if at.recompute else "no",
                f"{best.memory.peak / (1 << 30):.1f}",
                f"{best.step_s:.3f}",
                f"{images * passes / best.step_s:,.0f}",
                f"{(best.train_s or 0) / 86400:.1f}",
                f"{best.gpu_hours or 0:,.0f}",
                f"{best.price or 0:,.0f}",
                f"{(best.score_s or 0) / 3600:,.1f}",
            ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _costs(planned: Estimator, asked: Estimate) -> list[tuple[str, str]]:
    """What the run moves, keeps and takes, as configured."""
    cfg, known, card = planned.cfg, planned.known, planned.card
    rows = [
        ("data set", f"{_gb(known.images * known.sample_bytes)} of latents" if known.images else "size not known"),
        ("reads", f"{_gb(asked.data_bytes_per_step)} of latents a step"),
        ("sends", f"{_gb(asked.network_bytes_per_step)} a step from each worker"),
        (
            "checkpoint",
            f"{_gb(planned.checkpoint_bytes)}; at the end {_gb(planned.kept_bytes)} of them are kept, and "
            f"{_gb(planned.snapshot_bytes)} of snapshots of the averages",
        ),
        ("save", f"{asked.save_s:.1f} s at {_gb(int(cfg.plan.store_bytes_per_s))}/s from each node"),
        *(("warning", _told(deadline(asked.save_s, cfg, target))) for target in ("slurm", "kubernetes")),
    ]
    if card is None or asked.step_s is None or asked.train_s is None:
        return rows
    return [
        *rows,
        ("fits", f"{'yes' if asked.fits else 'NO'}: {_gib(asked.memory.peak)} of {_gib(card.memory_bytes)}"),
        ("step", f"{asked.step_s:.3f} s on {card.name} at {card.efficiency:.0%} of its peak"),
        ("time", f"{asked.train_s / 86400:.1f} days"),
        ("score", _score(planned, asked)),
        ("cost", f"{asked.gpu_hours:,.0f} GPU hours, {asked.price:,.0f} USD at {card.gpu_hour_price:.2f}"),
    ]


def _score(planned: Estimator, asked: Estimate) -> str:
    """What one evaluation takes, and all of the run; decoding and features are not in it."""
    cfg, count = planned.cfg, planned.scores
    each = planned.score_workers(asked.layout.workers)
    drawn = f"{cfg.evaluate.images:,} pictures of {cfg.sample.steps} steps"
    guided = "" if cfg.sample.guidance == 1 else ", guided"
    wall = f"{(asked.score_s or 0) / 3600:,.1f} h on {each} GPUs for one"
    return f"{(asked.evaluate_gpu_s or 0) / 3600:,.1f} GPU hours for {count} of {drawn}{guided}; {wall}"


def _told(found: Check) -> str:
    return f"{'long enough' if found.ok else 'TOO SHORT'}: {found.found}"


def _known(cfg: Config) -> Latent:
    known = latent(cfg)
    if known is None:
        raise ConfigError(
            f"data.autoencoder: found {cfg.data.autoencoder!r}, whose config.json is not on this machine",
            "prepare the latents first, or name a folder that holds the autoencoder",
        )
    check_fit(cfg.model, known.shape)
    return known


def _gb(size: int) -> str:
    """Bytes in the unit that keeps three digits."""
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:,.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def _gib(size: int) -> str:
    return f"{size / (1 << 30):,.2f} GiB"
