"""The predicted memory of a rank against what torch's allocator counts during real steps of the real engine."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from diffussm.config.schema import DiffusionConfig, ModelConfig, Precision, TrainConfig
from diffussm.model import LatentShape, build_model
from diffussm.model.footprint import REDUCE_BUCKET, bucket_elements, footprint

TOLERANCE = 0.1
STEPS = 2


@dataclass(frozen=True)
class Case:
    stage: int
    micro_batch: int = 8
    accumulation: int = 1
    recompute: bool = False
    bf16: bool = False
    preset: str = "tiny"
    depth: int = 4
    width: int = 96
    side: int = 16


ONE_RANK = [
    *(Case(stage) for stage in range(4)),
    Case(1, accumulation=2, recompute=True),
    Case(2, bf16=True),
]
ONE_RANK_LONG = [
    *(Case(stage, accumulation=2, recompute=True) for stage in (0, 2, 3)),
    Case(1, micro_batch=4, depth=2, side=32),
    Case(1, micro_batch=2, preset="emoji", width=160, depth=6),
    Case(0, bf16=True, recompute=True),
]
TWO_RANKS = [Case(1), Case(3)]
TWO_RANKS_LONG = [Case(0), Case(2), Case(2, accumulation=2, recompute=True), Case(1, bf16=True)]


def measured(case: Case, latent: LatentShape, model_cfg: ModelConfig) -> int:
    """Most bytes that torch's CPU allocator holds over some steps, everything of this rank built inside."""
    import torch.distributed as dist

    from diffussm.diffusion.process import Process
    from diffussm.train.ema import Averages
    from diffussm.train.engine import Engine
    from diffussm.train.step import Inputs, loss
    from diffussm.train.world import World

    rank, size = dist.get_rank(), dist.get_world_size()
    n = case.micro_batch
    cfg = TrainConfig(
        images=1 << 20,
        global_batch=n * case.accumulation * size,
        micro_batch=n,
        zero_stage=case.stage,
        precision=Precision.bf16 if case.bf16 else Precision.fp32,
        activation_checkpointing=case.recompute,
    )
    process = Process(DiffusionConfig())

    def draw() -> Inputs:
        shape = (n, latent.channels, latent.height, latent.width)
        return Inputs(
            torch.randn(shape), torch.randint(0, 1000, (n,)), torch.randn(shape), torch.zeros(n).long(), torch.arange(n)
        )

    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = build_model(model_cfg, latent, activation_checkpointing=case.recompute)
        world = World(rank, size, rank, size, torch.device("cpu"))
        engine = Engine(model, cfg, case.accumulation, world)
        averages = Averages(engine.slices(), cfg)
        for step in range(1, STEPS + 1):
            micros = [draw() for _ in range(case.accumulation)]
            engine.step([partial(loss, process=process, inputs=inputs) for inputs in micros], 1e-3)
            averages.update(step * cfg.global_batch)
            gc.collect()  # gradients of the step before, kept by a cycle or not, as the collector's mood is
    return peak(profiler)


def peak(profiler: torch.profiler.profile) -> int:
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = most = 0
    for _, size in changes:
        held += size
        most = max(most, held)
    return most


def compare(cases: list[Case], workers: int) -> None:
    for case in cases:
        latent = LatentShape(4, case.side, case.side, 10)
        model = ModelConfig(preset=case.preset, width=case.width, depth=case.depth, state=16, backend="torch")
        found = measured(case, latent, model)
        said = footprint(
            model,
            latent,
            stage=case.stage,
            workers=workers,
            micro_batch=case.micro_batch,
            accumulation=case.accumulation,
            bf16=case.bf16,
            activation_checkpointing=case.recompute,
        )
        print(
            f"{case}: predicted {said.peak / 1e6:.1f} MB, measured {found / 1e6:.1f} MB, {said.peak / found - 1:+.1%}"
        )
        assert said.peak == pytest.approx(found, rel=TOLERANCE), (case, said)


@pytest.mark.world_size(1)
def test_one_rank() -> None:
    compare(ONE_RANK, 1)


@pytest.mark.long
@pytest.mark.world_size(1)
def test_one_rank_in_more_cases() -> None:
    compare(ONE_RANK_LONG, 1)


@pytest.mark.long
@pytest.mark.world_size(2)
def test_two_ranks() -> None:
    compare(TWO_RANKS, 2)


@pytest.mark.long
@pytest.mark.world_size(2)
def test_two_ranks_in_more_cases() -> None:
    compare(TWO_RANKS_LONG, 2)


def test_it_falls_with_the_stage_the_micro_batch_and_recomputation() -> None:
    latent = LatentShape(4, 64, 64, 1000)

    def size(stage: int, micro: int, recompute: bool) -> int:
        return footprint(
            "XL",
            latent,
            stage=stage,
            workers=8,
            micro_batch=micro,
            accumulation=2,
            bf16=True,
            activation_checkpointing=recompute,
        ).peak

    assert size(0, 8, False) > size(1, 8, False) > size(2, 8, False)
    assert size(1, 8, False) > size(1, 4, False) > size(1, 4, True)


def test_gradients_are_there_from_the_second_pass_on() -> None:
    latent = LatentShape(4, 32, 32, 10)
    once = footprint("S", latent, stage=0, workers=1, micro_batch=32)
    twice = footprint("S", latent, stage=0, workers=1, micro_batch=32, accumulation=2)
    assert replace(once, gradients=twice.gradients) == twice
    assert (once.gradients, twice.gradients) == (0, once.weights)


def test_the_bucket_is_never_larger_than_the_network() -> None:
    assert bucket_elements(1000) == 1000
    assert bucket_elements(10**9) == REDUCE_BUCKET
