"""Snapshots written by real ranks, and an average made of them against the one that was followed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from diffussm.checkpoint import posthoc, restore, weights
from diffussm.checkpoint.manifest import Counters
from diffussm.checkpoint.store import open_store
from diffussm.config.rules import snapshot_interval
from diffussm.config.schema import Config, SnapshotDtype
from diffussm.train.ema import Averages
from diffussm.train.engine import Engine
from diffussm.train.saver import Saver
from diffussm.train.snapshots import Snapshots, stored
from diffussm.train.world import current
from tests.diffussm.checkpoint import snapshots as files
from tests.diffussm.train.test_ema import whole_of
from tests.diffussm.train.test_engine import BATCH, config, losses, net
from tests.s3 import S3Server

STEPS, EVERY = 64, 4


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    return s3_server.url("snapshots")


def follow(
    place: str, stage: int, dtype: SnapshotDtype, steps: int = STEPS, **train: Any
) -> tuple[Averages, Engine, list[dict[str, Any]]]:
    """Train with snapshots of the widths 0.05 and 0.1; returns what follows 0.075 too, and the events."""
    said: list[dict[str, Any]] = []
    logger: Any = SimpleNamespace(event=lambda what, **details: said.append({"event": what} | details))
    cfg = Config(name="a", train=config(stage, images=steps * BATCH, power_ema=[0.05, 0.1], **train))
    cfg.train.ema_snapshot_images, cfg.train.ema_snapshot_dtype = EVERY * BATCH, dtype
    cfg.data.latents = "x"
    engine = Engine(net(), cfg.train, 1, current(torch.device("cpu")))
    averages = Averages(engine.slices(), cfg.train)
    beside = Averages(engine.slices(), replace(cfg.train, power_ema=[0.05, 0.075, 0.1]))
    saver = Saver(cfg, engine, averages, open_store(place), 1, logger)
    snapshots = Snapshots(saver)
    at = Counters(0, 0, 0, 0, 0, 0)
    for step in range(steps):
        engine.step(losses(step, 1), lr=1e-2)
        at = at.after_step(BATCH, 0, False)
        averages.update(at.images)
        beside.update(at.images)
        snapshots.wait()  # these steps are faster than any store
        snapshots.step(at)
    snapshots.close()
    saver.close()
    return beside, engine, said


def check(place: str, stage: int, dtype: SnapshotDtype, folder: Path, tolerance: float) -> None:
    beside, engine, _ = follow(place, stage, dtype)
    tracked = {w: flat(whole_of(engine, beside, f"ema-power-{w:.3f}")) for w in (0.05, 0.075, 0.1)}
    store = open_store(place)
    listed = list(restore.manifests(store, "ema"))
    assert len(listed) == STEPS // EVERY
    assert {m.kinds for _, m in listed} == {("ema-power-0.050", "ema-power-0.100")}
    if dist.get_rank() == 0:
        target = str(folder / f"{stage}.safetensors")
        made = posthoc.recipe(store, 0.075, None, print)
        posthoc.write(store, made, target)
        found = flat(weights.read(target).tensors)
        apart = min((tracked[w] - tracked[0.075]).norm() for w in (0.05, 0.1))
        ratio = float((found - tracked[0.075]).norm() / apart)
        print(f"stage {stage}: {ratio:.5f} of the distance to the nearest stored average")
        assert ratio < tolerance
    dist.barrier()


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.world_size(2)
def test_an_average_made_of_snapshots_is_the_one_that_was_followed(tmp_path: Path, bucket: str) -> None:
    """Within 1 % of the distance to the nearest stored average, and 10 % where fp16 was stored."""
    check(str(tmp_path / "run"), 1, SnapshotDtype.fp32, tmp_path, 0.01)
    check(bucket, 3, SnapshotDtype.fp16, tmp_path, 0.1)
    root, broken = tmp_path / "few", tmp_path / "broken"
    if dist.get_rank() == 0:
        for images in range(5):
            files.write(root, "checkpoints", images, {"master": {n: torch.zeros(s) for n, s in files.SHAPES.items()}})
        broken.mkdir()
        (broken / "ema").write_text("a file in the way")
    dist.barrier()
    _, _, said = follow(str(root), 0, SnapshotDtype.bf16, steps=16, keep_ema_snapshots=3)
    dist.barrier()
    kept = sorted(path.name for path in (root / "ema").iterdir())
    assert kept == [f"{images * BATCH:012d}" for images in (8, 12, 16)]
    if dist.get_rank() == 0:
        assert [record["event"] for record in said] == ["averages saved"] * 4
    assert len(list((root / "checkpoints").iterdir())) == 5, "they are not the snapshots' to delete"
    _, _, said = follow(str(broken), 0, SnapshotDtype.fp32, steps=8)
    if dist.get_rank() == 0:
        assert [record["event"] for record in said] == ["averages save failed"] * 2
        assert "ema" in said[0]["reason"]


def test_the_interval_is_a_64th_unless_it_is_set() -> None:
    cfg = Config(name="a", train=config(0, images=6400))
    assert snapshot_interval(cfg) == 100
    cfg.train.ema_snapshot_images = 7
    assert snapshot_interval(cfg) == 7


def test_what_fp16_cannot_hold_stays_fp32() -> None:
    small, large = torch.tensor([1.0, -2.5]), torch.tensor([1.0, 70_000.0])
    assert stored(small, torch.float16).dtype == torch.float16
    assert torch.equal(stored(large, torch.float16), large)
    assert stored(large, torch.bfloat16).dtype == torch.bfloat16
    assert stored(torch.tensor([float("inf")]), torch.float16).dtype == torch.float16
