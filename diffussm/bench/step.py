"""`python -m diffussm.bench.step CONFIG`: where a training step's time goes, part by part; see `diffussm profile`.

Parts wait for the device at both ends, and the whole step is timed without them in between, so both are shown: on a GPU
the parts add up to more than the step, where work overlaps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from diffussm.bench.machine import describe, timed
from diffussm.checkpoint.fence import Fence
from diffussm.checkpoint.manifest import Counters
from diffussm.checkpoint.save import Order, draft, publish
from diffussm.checkpoint.snapshot import Part, Snapshot
from diffussm.checkpoint.store import open_store
from diffussm.config import check, load
from diffussm.config.rules import accumulation, micro_batch
from diffussm.config.schema import Config
from diffussm.config.sets import each_set
from diffussm.data import autoencoder, latents
from diffussm.data.cursor import Cursor
from diffussm.diffusion.process import Process
from diffussm.errors import DiffuSSMError, UsageError
from diffussm.model import build_model
from diffussm.model.block import Block
from diffussm.train.ahead import ahead
from diffussm.train.ema import Averages
from diffussm.train.engine import Engine
from diffussm.train.phases import Phase
from diffussm.train.step import Inputs, draw, loss
from diffussm.train.world import current

REST = "forward: norms, gates, noise and loss"
PHASES = {Phase.FORWARD: REST, Phase.BACKWARD: "backward", Phase.REDUCE: "optimizer", Phase.OTHER: "averages"}


@dataclass(frozen=True)
class PartRow:
    """One part of a step: milliseconds of the median step, the least and the most, and its share of the parts."""

    part: str
    ms: float
    ms_low: float
    ms_high: float
    share: float


class Clock:
    """Seconds by part of the present step. A part that begins within another interrupts it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.seconds = device, dict[str, float]()
        self._stack: list[str] = []
        self._since = 0.0
        self.on = False

    def switch(self, part: str) -> None:
        """End what runs, begin `part`."""
        self._book()
        self._stack = [part]

    def push(self, part: str) -> None:
        """Begin `part` within what runs."""
        self._book()
        self._stack.append(part)

    def pop(self) -> None:
        """End the innermost part; the one around it goes on."""
        self._book()
        self._stack.pop()

    def take(self) -> dict[str, float]:
        """End everything; seconds by part since the last call."""
        self._book()
        self._stack = []
        taken, self.seconds = self.seconds, {}
        return taken

    def _book(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] = self.seconds.get(self._stack[-1], 0.0) + now - self._since
        self._since = now


def watch(module: torch.nn.Module, clock: Clock) -> None:
    """Let the parts of the network tell the clock when they begin and end in the forward pass."""
    parts = {name: child for name, child in module.named_children() if name != "blocks"}
    named = [(f"forward: {name}", child) for name, child in parts.items()]
    for block in (child for child in module.modules() if isinstance(child, Block)):
        for name, child in block.named_children():
            named.append(("forward: state space" if name == "ssm" else "forward: dense layers", child))
    for part, child in named:
        child.register_forward_pre_hook(lambda *_, part=part: clock.push(part) if clock.on else None)
        child.register_forward_hook(lambda *_: clock.pop() if clock.on else None)


def profile(cfg: Config, folder: Path, *, steps: int, between: float) -> list[PartRow]:
    """Time steps part by part, in turns with as many that are timed whole, then saves. Collective: every rank must.

    Args:
        cfg: a checked config for this many ranks whose latents exist.
        folder: an empty local folder that all ranks see; saves go there.
        steps: of each kind, after one of each that is not counted.
        between: steps of the run between two checkpoints.
    """
    world = current(torch.device("cuda", int(os.environ["LOCAL_RANK"])) if _cuda(cfg) else torch.device("cpu"))
    world.claim_device()
    torch.manual_seed(cfg.seed)
    data = latents.open_latents(cfg, rank_batch=cfg.train.global_batch // world.size, scratch=folder)
    process = Process(cfg.diffusion)
    model = build_model(cfg.model, data.latent, activation_checkpointing=cfg.train.activation_checkpointing)
    engine = Engine(model.to(world.device), cfg.train, accumulation(cfg), world)
    averages, clock = Averages(engine.slices(), cfg.train), Clock(world.device)
    watch(engine.module, clock)
    _watch_reduction(engine, clock)
    batches = data.batches(Cursor())
    reading: list[float] = []

    def fetch() -> list[Inputs]:
        began = time.perf_counter()
        epoch, batch = next(batches)
        micros = [draw(m, cfg, epoch, data.null_class).to(world.device) for m in batch.split(micro_batch(cfg))]
        reading.append(time.perf_counter() - began)
        return micros

    coming = ahead(fetch, 2 * (steps + 1), world.claim_device)
    images = 0

    def enter(phase: Phase) -> None:
        if clock.on:
            clock.switch(PHASES[phase])

    def step() -> None:
        nonlocal images
        if clock.on:
            clock.switch("data: waiting for the next batch")
        micros = next(coming)
        losses = [partial(loss, process=process, inputs=inputs) for inputs in micros]
        result = engine.step(losses, cfg.train.lr, enter)
        enter(Phase.OTHER)
        images += cfg.train.global_batch
        averages.update(images, skipped=result.skipped)

    whole, found = list[float](), list[dict[str, float]]()
    for turn in range(steps + 1):
        seconds = timed(step, world.device)
        clock.on = True
        step()
        parts = clock.take()
        clock.on = False
        if turn:
            whole.append(seconds)
            found.append(parts)
    coming.close()
    batches.close()
    data.close()
    names = dict.fromkeys(name for parts in found for name in parts)
    every = {name: [1e3 * parts.get(name, 0.0) for parts in found] for name in names}
    total = statistics.median(sum(parts.values()) for parts in found) * 1e3
    rows = [_row(name, values, total) for name, values in every.items()]
    rows.sort(key=lambda row: -row.ms)
    stalls, saves = _saves(cfg, engine, averages, folder, images)
    return [
        *rows,
        _row("sum of the parts", [1e3 * sum(parts.values()) for parts in found], total),
        _row("a step timed whole", [1e3 * seconds for seconds in whole], total),
        _row("beside it: reading and drawing a batch, on a thread", [1e3 * s for s in reading[2:]], total),
        _row("save: what one holds the step up for", stalls, total),
        _row("save: the same, over the steps between two", [stall / between for stall in stalls], total),
        _row("beside it: writing and verifying one, on a thread", saves, total),
    ]


def _watch_reduction(engine: Engine, clock: Clock) -> None:
    """Let DeepSpeed's epilogue of a backward pass tell the clock; stages 2 and 3 reduce within the pass as well."""
    inner: Callable[[], None] = engine.engine._backward_epilogue

    def epilogue() -> None:
        if clock.on:
            clock.switch("reduce")
        inner()
        if clock.on:
            clock.switch("backward")

    engine.engine._backward_epilogue = epilogue


def _saves(
    cfg: Config, engine: Engine, averages: Averages, folder: Path, images: int, rounds: int = 3
) -> tuple[list[float], list[float]]:
    """Milliseconds of the copy into host memory, and of what follows. Collective: every rank must call it."""
    snapshot, stalls, saves = Snapshot(), [], []
    store = open_store(str(folder / "saves"))
    parts = [Part(s.name, s.shape, s.start, s.tensors | averages.tensors(s.name)) for s in engine.slices()]
    snapshot.prepare(parts)
    for turn in range(rounds + 1):
        dist.barrier()
        began = time.perf_counter()
        snapshot.take(parts)
        taken = time.perf_counter()
        at = Counters(images + turn, 0, 0, 0, 0, 0)
        plan = draft(at, engine.shapes, list(parts[0].tensors), attempt=1, zero_stage=engine.stage, config_digest="")
        where = f"checkpoints/{at.images:012d}"
        publish(Order(store, where, plan, snapshot.source(), cfg.checkpoint.deadline_s, Fence(store, 1)), snapshot)
        if turn:
            stalls.append(1e3 * (taken - began))
            saves.append(1e3 * (time.perf_counter() - taken))
    return stalls, saves


def _row(part: str, ms: Sequence[float], total: float) -> PartRow:
    median = statistics.median(ms)
    return PartRow(part, median, min(ms), max(ms), median / total)


def _of_ranks(cfg: Config, ranks: int) -> Config:
    """The config with as many ranks, each of which does in a step what each does in the run."""
    passes = micro_batch(cfg)
    cfg.train.global_batch = cfg.train.global_batch // cfg.cluster.workers * ranks
    cfg.train.micro_batch = passes
    cfg.train.images = max(cfg.train.images, cfg.train.global_batch)
    cfg.cluster.workers, cfg.cluster.workers_per_node, cfg.cluster.min_workers = ranks, 0, 0
    if not torch.cuda.is_available():
        cfg.cluster.gpus_per_worker = 0
    return cfg


def _cuda(cfg: Config) -> bool:
    return cfg.cluster.gpus_per_worker > 0


def _rank(rank: int, cfg: Config, folder: str, steps: int, between: float) -> None:
    """One process; rank 0 leaves the rows as JSON. Collective: every rank must call it."""
    size = cfg.cluster.workers
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", DS_ACCELERATOR="cuda" if _cuda(cfg) else "cpu",
    )  # fmt: skip
    torch.set_num_threads(cfg.cluster.threads_per_worker)
    meet = f"file://{folder}/group"
    dist.init_process_group("nccl" if _cuda(cfg) else "gloo", init_method=meet, rank=rank, world_size=size)
    try:
        rows = profile(cfg, Path(folder), steps=steps, between=between)
        if rank == 0:
            Path(folder, "rows.json").write_text(json.dumps([asdict(row) for row in rows]))
    finally:
        dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(prog="diffussm profile", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_args(arguments)
    try:
        cfg = load(asked.config, asked.overrides)
        check(cfg)
        if asked.steps < 1 or asked.ranks < 1:
            found = f"found --steps {asked.steps} --ranks {asked.ranks}"
            raise UsageError(f"{found}; allowed: whole numbers from 1", "leave them out for 10 steps on 1 rank")
        between = cfg.checkpoint.every_images / cfg.train.global_batch
        cfg = _of_ranks(cfg, asked.ranks)
        check(cfg)
        for one in each_set(cfg):  # not made here: of ImageNet that takes hours, and nobody asked for it
            latents.passport(one.data.latents).check(one.data, autoencoder.digest(one.data.autoencoder))
        with tempfile.TemporaryDirectory(prefix="diffussm-profile-") as folder:
            torch.multiprocessing.spawn(_rank, args=(cfg, folder, asked.steps, between), nprocs=asked.ranks)
            rows = [PartRow(**row) for row in json.loads(Path(folder, "rows.json").read_text())]
    except DiffuSSMError as error:
        print(f"diffussm: {type(error).__name__}: {error}", file=sys.stderr)
        return int(error.code)
    device = torch.device("cuda") if _cuda(cfg) else torch.device("cpu")
    torch.set_num_threads(cfg.cluster.threads_per_worker)
    about = f"a step of {cfg.train.global_batch} images on {asked.ranks} rank(s), {describe(device)}"
    if asked.json:
        body = {"machine": describe(device), "ranks": asked.ranks, "rows": [asdict(row) for row in rows]}
        print(json.dumps(body, indent=1))
    else:
        _show(rows, about)
    return 0


def _show(rows: Sequence[PartRow], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("part", "ms", "least", "most", "share"):
        table.add_column(name, justify="left" if name == "part" else "right", no_wrap=True)
    for row in rows:
        if row.part == "sum of the parts":
            table.add_section()
        table.add_row(row.part, *(f"{value:,.2f}" for value in (row.ms, row.ms_low, row.ms_high)), f"{row.share:.1%}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    sys.exit(main())
