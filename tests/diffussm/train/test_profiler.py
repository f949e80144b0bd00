from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from diffussm.config.schema import Config
from diffussm.train import loop
from diffussm.train.world import current
from tests.runs import BATCH, final_losses, tiny_run


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    return tiny_run(tmp_path, workers=2, images=4 * BATCH)


@pytest.mark.world_size(2)
def test_chosen_steps_are_traced_on_chosen_ranks_and_nothing_else_changes(cfg: Config, tmp_path: Path) -> None:
    calm = replace(cfg, name="calm")
    traced = replace(cfg, name="traced")
    traced.train = replace(cfg.train, profile=replace(cfg.train.profile, at_images=[BATCH + 1, 4 * BATCH], ranks=[1]))
    heard: list[dict[str, Any]] = []
    for each in (calm, traced):
        loop.train(each, current(torch.device("cpu")), 1, tmp_path / f"s{dist.get_rank()}", heard.append)
        dist.barrier()
    assert final_losses(traced) == final_losses(calm)
    folder = tmp_path / "runs" / "traced" / "profiles"
    names = ["rank1-memory.json", "rank1-operators.txt", "rank1-trace.json.gz"]
    for images in (2 * BATCH, 4 * BATCH):
        assert sorted(path.name for path in (folder / f"{images:012d}").iterdir()) == names
    assert len(list(folder.iterdir())) == 2
    trace = json.loads(gzip.decompress((folder / f"{2 * BATCH:012d}" / "rank1-trace.json.gz").read_bytes()))
    seen = {event.get("name", "") for event in trace["traceEvents"]}
    assert any("mm" in name for name in seen)
    assert any("AdamW" in name for name in seen)
    memory = json.loads((folder / f"{2 * BATCH:012d}" / "rank1-memory.json").read_bytes())
    assert max(row["bytes"] for row in memory["by_operator"]) > 1000
