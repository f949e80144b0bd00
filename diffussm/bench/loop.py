"""Our training loop against a bare PyTorch loop over the same network and batch, in one process.

Ours reads latents, draws noise by sample, steps through DeepSpeed, averages the weights and counts. The bare loop does
forward, backward and AdamW on one batch that lies ready: what no framework can be faster than.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from diffussm.bench.machine import interleave, paired_ratios
from diffussm.config.rules import accumulation, micro_batch
from diffussm.config.schema import Config
from diffussm.data import latents
from diffussm.data.cursor import Cursor
from diffussm.diffusion.process import Process
from diffussm.model import build_model
from diffussm.train.ahead import ahead
from diffussm.train.ema import Averages
from diffussm.train.engine import Engine
from diffussm.train.optim import adamw, parameter_groups
from diffussm.train.step import Inputs, draw, loss
from diffussm.train.world import World, current


@dataclass(frozen=True)
class LoopResult:
    """Steps a second of both, and bare time over our time, round by round (1 is as fast as the bare loop)."""

    ours_steps_per_s: float
    bare_steps_per_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int
    steps_a_round: int


def bench_loop(cfg: Config, *, rounds: int = 7, steps: int = 10) -> LoopResult:
    """Measure on one worker with the config's network, batch and threads.

    Args:
        cfg: a checked config whose latents exist; it is trained as one worker.
        rounds: interleaved rounds after one of warm-up.
        steps: optimiser steps of each side in a round.

    Raises:
        DataError: there are no latents.
    """
    cfg.cluster.workers = 1
    torch.set_num_threads(cfg.cluster.threads_per_worker)
    with tempfile.TemporaryDirectory(prefix="diffussm-bench-") as scratch, _group_of_one(scratch) as world:
        torch.manual_seed(cfg.seed)
        data = latents.open_latents(cfg, rank_batch=cfg.train.global_batch, scratch=Path(scratch))
        process = Process(cfg.diffusion)
        model = build_model(cfg.model, data.latent).to(world.device)
        engine = Engine(model, cfg.train, accumulation(cfg), world)
        averages, images = Averages(engine.slices(), cfg.train), 0
        batches = data.batches(Cursor())

        def fetch() -> tuple[int, list[Inputs]]:
            epoch, batch = next(batches)
            micros = batch.split(micro_batch(cfg))
            return epoch, [draw(micro, cfg, epoch, data.null_class).to(world.device) for micro in micros]

        _, ready = fetch()
        coming = ahead(fetch, (rounds + 1) * steps)

        def ours() -> None:
            nonlocal images
            for _ in range(steps):
                _, micros = next(coming)
                result = engine.step([partial(loss, process=process, inputs=micro) for micro in micros], cfg.train.lr)
                images += cfg.train.global_batch
                averages.update(images, skipped=result.skipped)

        bare_model = build_model(cfg.model, data.latent).to(world.device)
        optimizer = adamw(parameter_groups(bare_model.parameters(), cfg.train.weight_decay), cfg.train)
        autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=cfg.train.precision.value == "bf16")

        def bare() -> None:
            for _ in range(steps):
                with autocast:
                    value = loss(bare_model, process, ready[0])
                value.backward()
                if cfg.train.grad_clip:
                    torch.nn.utils.clip_grad_norm_(bare_model.parameters(), cfg.train.grad_clip)
                optimizer.step()
                optimizer.zero_grad()

        bare_side, our_side = interleave({"bare": bare, "ours": ours}, rounds, world.device)
        coming.close()
        batches.close()
        data.close()
    ratios = paired_ratios(bare_side, our_side)
    return LoopResult(
        ours_steps_per_s=steps / our_side.median,
        bare_steps_per_s=steps / bare_side.median,
        ratio=ratios[len(ratios) // 2],
        ratio_low=ratios[0],
        ratio_high=ratios[-1],
        rounds=rounds,
        steps_a_round=steps,
    )


@contextmanager
def _group_of_one(scratch: str) -> Iterator[World]:
    """A process group of this process alone, and the variables that the data loader reads. Collective in name only."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT="0", DS_ACCELERATOR=device.type)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{scratch}/group", rank=0, world_size=1
    )
    try:
        yield current(device)
    finally:
        dist.destroy_process_group()
