"""How many pictures an evaluation makes a second, where its time goes, and what precision and recall take at full size.

The network has random weights, which cost as much as trained ones. Workers are processes on this machine that make
blocks as those of a cluster do, in turns of different numbers; what they take to start is left out.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffussm.bench.machine import risen_gb
from diffussm.checkpoint.store import open_store
from diffussm.config.schema import Config
from diffussm.data import autoencoder
from diffussm.data.images import open_source, picture_batches
from diffussm.data.latents import passport
from diffussm.diffusion.process import Process
from diffussm.evaluate import blocks
from diffussm.evaluate.blocks import Plan
from diffussm.evaluate.extractors import open_extractor
from diffussm.evaluate.labels import labels
from diffussm.evaluate.manifold import precision_recall
from diffussm.evaluate.reference import Reference, prepare_reference
from diffussm.evaluate.run import judge
from diffussm.model import build_model
from diffussm.sample import Painter

STAGES = ("sampling", "decoding", "extraction", "store")


@dataclass(frozen=True)
class EvaluateRow:
    """One thing that was timed; median and spread over the rounds."""

    what: str
    workers: int
    images: int
    seconds: float
    """Of the wall clock; of a stage, summed over the workers."""
    low: float
    high: float
    images_per_s: float | None
    cpu_s: float | None
    """Processor seconds of all workers, the median: what other work on the machine stretches least."""
    share: float | None
    """Part of the workers' time until the last block is stored."""
    over_one: float | None
    """Pictures a second over those of one worker in the same round, the median."""
    peak_rise_gb: float | None
    """By how much resident memory rose; None where it was not read."""


def bench_evaluate(cfg: Config, folder: Path, *, workers: Sequence[int], images: int, rounds: int) -> list[EvaluateRow]:
    """Measure evaluations of `images` pictures by each number of workers, in turns.

    Args:
        cfg: a checked config whose latents exist; its sampler, network, autoencoder and extractor are measured.
        folder: an empty local folder.
        workers: numbers of processes.
        images: pictures of one evaluation, at least 2 for each worker.
        rounds: rounds after one of warm-up.

    Raises:
        DataError: there are no latents.
        MissingError: weights of the extractor are not there.
    """
    plan = plan_of(cfg, images, max(workers))
    extractor = open_extractor(cfg.evaluate.extractor, weights=cfg.evaluate.weights)
    began = time.perf_counter()
    reference = _reference(cfg, folder, images)
    took = time.perf_counter() - began
    rows = [
        EvaluateRow("reference, once", 1, reference.n, took, took, took, reference.n / took, None, None, None, None)
    ]
    found: dict[int, list[dict[str, float]]] = {count: [] for count in workers}
    context = multiprocessing.get_context("spawn")
    lines = [context.Pipe() for _ in range(max(workers))]
    crew = [context.Process(target=_work, args=(cfg, plan, theirs), daemon=True) for _, theirs in lines]
    for process in crew:
        process.start()
    for ours, theirs in lines:
        theirs.close()  # so that the end of a worker is the end of its line
        ours.recv()
    for turn in range(rounds + 1):
        for count in workers:
            place = str(folder / f"{count}-{turn}")
            began = time.perf_counter()
            for rank, (ours, _) in enumerate(lines[:count]):
                ours.send((place, list(range(rank, plan.count, count))))
            parts: list[dict[str, float]] = [ours.recv() for ours, _ in lines[:count]]
            drawn = time.perf_counter()
            features = blocks.features(open_store(place), plan, extractor.taps)
            judge(features, images, reference, extractor, checkpoint={}, settings={})
            done = time.perf_counter()
            stages = {stage: sum(part[stage] for part in parts) for stage in (*STAGES, "cpu")}
            found[count].append(stages | {"blocks": drawn - began, "metrics": done - drawn})
    for (ours, _), process in zip(lines, crew, strict=True):
        ours.send(None)
        process.join()
    single = found.get(1)
    for count, all_rounds in found.items():
        rows += _rows(count, images, all_rounds[1:], single[1:] if single else None)
    return rows


def plan_of(cfg: Config, images: int, workers: int) -> Plan:
    """The blocks: the config's, or smaller ones where so few pictures would not give each worker one."""
    made = passport(cfg.data.latents)
    wanted = labels(cfg.evaluate.labels, made.class_counts, images, cfg.sample.seed)
    block = min(cfg.evaluate.block_images, max(1, images // workers))
    return Plan(tuple(wanted), block, cfg.sample.batch, cfg.evaluate.batch, {})


def bench_manifold(real: int, generated: int, dims: int) -> EvaluateRow:
    """Time and memory of precision and recall on random features, once, on this process's threads."""
    rng = np.random.default_rng(0)
    one, other = (rng.standard_normal((n, dims), np.float32) for n in (real, generated))
    began, busy = time.perf_counter(), time.process_time()
    rise = risen_gb(lambda: precision_recall(one, other))
    took, cpu_s = time.perf_counter() - began, time.process_time() - busy
    what = f"precision and recall, {generated:,} x {real:,} x {dims:,}"
    return EvaluateRow(what, 1, generated, took, took, took, None, cpu_s, None, None, rise)


def _rows(
    count: int, images: int, rounds: list[dict[str, float]], single: list[dict[str, float]] | None
) -> list[EvaluateRow]:
    def row(what: str, seconds: list[float], **more: float | None) -> EvaluateRow:
        rest: dict[str, float | None] = dict.fromkeys(("images_per_s", "cpu_s", "share", "over_one", "peak_rise_gb"))
        return EvaluateRow(what, count, images, statistics.median(seconds), min(seconds), max(seconds), **rest | more)

    wall = [one["blocks"] for one in rounds]
    over = statistics.median(a["blocks"] / b for a, b in zip(single, wall, strict=True)) if single else None
    cpu = statistics.median(one["cpu"] for one in rounds)
    rows = [row("blocks", wall, images_per_s=images / statistics.median(wall), cpu_s=cpu, share=1.0, over_one=over)]
    for stage in STAGES:
        share = statistics.median(one[stage] / (count * one["blocks"]) for one in rounds)
        rows.append(row(stage, [one[stage] for one in rounds], share=share))
    return [*rows, row("metrics, by one", [one["metrics"] for one in rounds])]


def _reference(cfg: Config, folder: Path, images: int) -> Reference:
    made = passport(cfg.data.latents)
    return prepare_reference(
        open_store(str(folder / "reference")),
        open_extractor(cfg.evaluate.extractor, weights=cfg.evaluate.weights),
        lambda: picture_batches(open_source(cfg.data), cfg.evaluate.batch),
        count=made.number,
        n=images,
        data=made.index_digest,
    )


def _work(cfg: Config, plan: Plan, line: Connection) -> None:
    """One worker: say when ready, then make the blocks asked for and answer with the seconds of each stage."""
    torch.set_num_threads(cfg.cluster.threads_per_worker)
    torch.manual_seed(0)
    made, device = passport(cfg.data.latents), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(cfg.model, made.latent).to(device).eval()
    decoder = autoencoder.load(cfg.data.autoencoder).to(device)
    painter = Painter(cfg, made, model, Process(cfg.diffusion), decoder, 0, device, "random", None, "")
    painter.cast()
    extractor = open_extractor(cfg.evaluate.extractor, device, cfg.evaluate.weights)
    seconds: dict[str, float] = {}

    def paint(wanted: Sequence[int], first: int) -> Any:
        began = time.perf_counter()
        latents = painter.latents(wanted, first)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        sampled = time.perf_counter()
        pictures = decoder.decode(latents)
        seconds["sampling"] += sampled - began
        seconds["decoding"] += time.perf_counter() - sampled
        return pictures

    line.send("ready")
    while (asked := line.recv()) is not None:
        place, indices = asked
        seconds |= dict.fromkeys(STAGES, 0.0)
        busy = time.process_time()
        for index in indices:
            report = blocks.make(open_store(place), plan, index, paint, extractor)
            seconds["extraction"] += report.extract_s
            seconds["store"] += report.store_s
        line.send(seconds | {"cpu": time.process_time() - busy})
