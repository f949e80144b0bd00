"""A run whose interval between checkpoints is derived from what it measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from diffussm.checkpoint import restore
from diffussm.checkpoint.pace import FIRST_STEPS
from diffussm.checkpoint.store import LocalStore
from diffussm.config.schema import Config, Pace
from diffussm.train.loop import train
from diffussm.train.rhythm import Rhythm, begun_s
from diffussm.train.world import current
from tests.runs import BATCH, tiny_run


def test_frequent_faults_shorten_it_and_the_config_bounds_it(tmp_path: Path) -> None:
    cfg = tiny_run(tmp_path, images=10**6, checkpoint_images=10**5)
    cfg.checkpoint.fault_every_s = 1000
    calm = Rhythm(cfg, 0, 1, 0.0)
    assert calm.next == FIRST_STEPS * BATCH
    often, seldom = (Rhythm(cfg, 0, attempt, begun_s=10**12) for attempt in (100, 1))
    for each in (often, seldom):
        each._since -= 10  # 80 images a second
    assert BATCH <= often.interval(800, 0.1, 0.2) < seldom.interval(800, 0.1, 0.2) <= cfg.checkpoint.every_images
    (tmp_path / "attempts" / "1").mkdir(parents=True)
    (tmp_path / "attempts" / "1" / "start.json").write_text('{"time": 12.5}')
    assert begun_s(LocalStore(str(tmp_path))) == 12.5


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    return tiny_run(tmp_path, workers=2, images=(FIRST_STEPS + 30) * BATCH)


@pytest.mark.world_size(2)
def test_all_ranks_save_at_the_steps_that_rank_0_derives(cfg: Config, tmp_path: Path) -> None:
    cfg.checkpoint.every_images, cfg.checkpoint.pace, cfg.checkpoint.fault_every_s = 10**6, Pace.auto, 0.1
    LocalStore(str(tmp_path / "runs" / cfg.name)).write("attempts/1/start.json", b'{"time": 1e12}')
    dist.barrier()
    said: list[dict[str, Any]] = []
    (tmp_path / f"scratch{dist.get_rank()}").mkdir()
    train(cfg, current(torch.device("cpu")), 1, tmp_path / f"scratch{dist.get_rank()}", said.append)
    saved = [record["images"] for record in said if record.get("event") == "saved"]
    (everyones, _) = restore.everyone(lambda: saved)
    if dist.get_rank():
        return
    assert everyones[0] == FIRST_STEPS * BATCH
    assert len(everyones) >= 3, "a second save was derived, long before every_images"
    assert all(images % BATCH == 0 for images in everyones)
