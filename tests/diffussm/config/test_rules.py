"""Every rule refuses what it should by name, and lets the legal through."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffussm.config import Config, check, load, world_sizes
from diffussm.config.explain import describe
from diffussm.config.rules import _RANGES, accumulation, micro_batch
from diffussm.errors import ConfigError


def config(*overrides: str, tmp: Path) -> Config:
    path = tmp / "c.yaml"
    path.write_text("name: a\ndata:\n  latents: latents\ntrain:\n  images: 100_000\n")
    return load(path, overrides)


def problems(cfg: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        check(cfg)
    return caught.value.message


def test_the_defaults_are_legal(tmp_path: Path) -> None:
    check(config(tmp=tmp_path))


@pytest.mark.parametrize(
    "override",
    [
        "name=A",
        "name=a..b",
        "storage=",
        "storage=gs://bucket/x",
        "storage=s3://",
        "data.latents=s3://B_/x",
        "data.latents=file://x",
        "seed=-1",
        "seed=9223372036854775808",
        "data.resolution_px=0",
        "data.limit=-1",
        "data.autoencoder=builtin:",
        "data.source=folder",
        "data.images=x",
        "data.classes=[a, b, a]",
        "data.classes=['']",
        "data.shard_bytes=10",
        "data.loader_workers=-1",
        "data.canonical_nodes=0",
        "data.shuffle_block_images=0",
        "model.width=0",
        "model.depth=0",
        "model.hourglass=0",
        "model.hourglass=3",
        "model.state=63",
        "model.state=0",
        "diffusion.timesteps=0",
        "diffusion.beta_start=0",
        "diffusion.beta_start=0.5",
        "diffusion.label_drop=1.5",
        "train.images=0",
        "train.images=255",
        "train.global_batch=0",
        "train.micro_batch=-1",
        "train.micro_batch=3",
        "train.lr=0",
        "train.lr=.nan",
        "train.lr=.inf",
        "train.beta2=1",
        "train.weight_decay=-1",
        "train.warmup_images=100_001",
        "train.decay_images=100_001",
        "train.grad_clip=-1",
        "train.profile.at_images=[0]",
        "train.zero_stage=4",
        "train.ema=1",
        "train.ema=-0.1",
        "train.power_ema=[0]",
        "train.power_ema=[0.3]",
        "train.power_ema=[.nan]",
        "train.power_ema=[0.0501]",
        "train.power_ema=[0.05, 0.05]",
        "train.ema_snapshot_images=-1",
        "train.keep_ema_snapshots=-1",
        "sample.ema=true",
        "sample.ema=power-0.050",
        "train.log_images=0",
        "train.max_nonfinite_steps=0",
        "checkpoint.every_images=0",
        "checkpoint.keep=0",
        "checkpoint.milestone_images=-1",
        "checkpoint.deadline_s=0",
        "checkpoint.max_failures=0",
        "checkpoint.local_every_images=100",
        "checkpoint.local=folder",
        "checkpoint.local=s3://bucket/x",
        "cluster.workers=0",
        "cluster.workers=3",
        "cluster.gpus_per_worker=2",
        "cluster.gpus_per_worker=-1",
        "cluster.cpus_per_worker=0",
        "cluster.threads_per_worker=0",
        "cluster.max_failures=-1",
        "cluster.health_check_interval_s=0",
        "sample.steps=0",
        "sample.steps=1001",
        "sample.guidance=-1",
        "sample.guidance_channels=-1",
        "sample.per_class=0",
        "sample.batch=0",
        "sample.seed=-1",
        "evaluate.images=1",
        "evaluate.batch=0",
        "observe.project=",
    ],
)
def test_an_illegal_value_is_refused_by_its_key(override: str, tmp_path: Path) -> None:
    key = override.partition("=")[0]
    message = problems(config(override, tmp=tmp_path))
    assert key in message
    assert "allowed" in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["storage=s3://bucket/runs", "data.latents=s3://my.bucket-1"],
        ["storage=file:///runs"],
        ["data.source=folder", "data.images=/data"],
        ["data.source=fashion_mnist", "data.images=/idx"],
        ["seed=9223372036854775807"],
        ["diffusion.label_drop=0", "sample.guidance=1"],
        ["diffusion.label_drop=1"],
        ["diffusion.timesteps=21", "sample.steps=21"],
        ["train.images=256"],
        ["train.warmup_images=40_000", "train.decay_images=60_000"],
        ["train.micro_batch=64", "cluster.workers=4"],
        ["cluster.workers=256"],
        ["cluster.gpus_per_worker=0.5"],
        ["cluster.gpus_per_worker=1", "cluster.workers=8"],
        ["model.width=4", "model.pos_embed=sincos"],
        ["model.state=2", "model.hourglass=1", "train.ema=0", "train.zero_stage=3"],
        ["train.power_ema=[0.01, 0.28]", "sample.ema=power-0.280"],
        ["sample.ema=none"],
    ],
)
def test_values_at_the_edge_are_legal(overrides: list[str], tmp_path: Path) -> None:
    check(config(*overrides, tmp=tmp_path))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["diffusion.timesteps=20", "sample.steps=1"], ["diffusion.timesteps", "21 or more"]),
        (["diffusion.label_drop=0"], ["sample.guidance", "null class"]),
        (["cluster.workers=2", "cluster.gpus_per_worker=0.5"], ["cluster.gpus_per_worker", "NCCL"]),
        (["model.width=6", "model.pos_embed=sincos"], ["model.width", "multiple of 4"]),
        (["model.width=9", "model.hourglass=4"], ["model.width", "model.hourglass=4"]),
        (["train.warmup_images=60_000", "train.decay_images=60_000"], ["train.decay_images", "100000"]),
        (["train.global_batch=12", "cluster.workers=5"], ["cluster.workers", "1, 2, 3, 4, 6, 12", "multiple of 5"]),
        (
            ["train.global_batch=12", "train.micro_batch=3", "cluster.workers=3"],
            ["cluster.workers", "1, 2, 4;", "multiple of 9"],
        ),
        (["train.global_batch=12", "train.micro_batch=5"], ["train.micro_batch", "1, 2, 3, 4, 6, 12"]),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused_with_the_legal_ones(
    overrides: list[str], words: list[str], tmp_path: Path
) -> None:
    message = problems(config(*overrides, tmp=tmp_path))
    for word in words:
        assert word in message


def test_all_broken_rules_are_named_at_once(tmp_path: Path) -> None:
    message = problems(config("train.lr=-1", "sample.steps=0", "name=!", tmp=tmp_path))
    assert all(key in message for key in ("train.lr", "sample.steps", "name"))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(min_value=1, max_value=300),
    micro=st.integers(min_value=0, max_value=64),
)
def test_world_sizes_are_exactly_those_that_the_rules_accept(batch: int, micro: int) -> None:
    cfg = Config(name="a")
    cfg.data.latents, cfg.train.images = "x", 10_000
    cfg.train.global_batch, cfg.train.micro_batch = batch, micro
    expected = []
    for workers in range(1, batch + 1):
        passes = micro or batch // workers
        if passes and batch % (workers * passes) == 0:
            expected.append(workers)
    assert world_sizes(cfg) == expected
    for workers in expected:
        cfg.cluster.workers = workers
        check(cfg)
        assert workers * micro_batch(cfg) * accumulation(cfg) == batch
    cfg.cluster.workers = next(size for size in range(1, batch + 2) if size not in expected)
    with pytest.raises(ConfigError):
        check(cfg)


def test_world_sizes_of_a_large_prime_batch_come_at_once() -> None:
    cfg = Config(name="a")
    cfg.train.global_batch = 999_999_937
    assert world_sizes(cfg) == [1, 999_999_937]


def test_every_number_has_a_range() -> None:
    """A new numeric key needs a rule, or a reason to be here."""
    optional = {"model.width", "model.depth"}  # null is legal; checked beside the table
    numeric = {key.name for key in describe() if key.kind in (int, float)}
    assert numeric - optional == {name for name in _RANGES if name in numeric}
    assert all(math.isfinite(key.default) for key in describe() if key.kind is float)
