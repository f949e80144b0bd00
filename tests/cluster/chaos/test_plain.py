"""Plain Ray Train, really killed: it comes back from the checkpoint of DeepSpeed, to be compared with ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.chaos.compare import recovery
from cluster.chaos.plan import Fault, Kind, Plan
from cluster.chaos.run import Run
from diffussm.config import dump
from tests.runs import BATCH, tiny_run


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_killed_rank_comes_back_from_its_checkpoint(tmp_path: Path) -> None:
    cfg = tiny_run(tmp_path, workers=2, images=300 * BATCH, checkpoint_images=20 * BATCH)
    (tmp_path / "config.yaml").write_text(dump(cfg))
    run = Run.plain(str(tmp_path / "config.yaml"), [], str(tmp_path / "plain"))
    assert run.go(Plan(0, (Fault(Kind.KILL_RANK, 50 * BATCH),)), 1) == 0
    records = run.records()
    assert run.finished(cfg.train.images)
    assert {record["attempt"] for record in records} == {1, 2}
    first = next(record for record in records if record["attempt"] == 2)
    assert (first["images"] - BATCH) % cfg.checkpoint.every_images == 0
    found = recovery(run.made[0], records)
    assert found is not None
    assert 0 < found.replayed_images <= cfg.checkpoint.every_images + 5 * BATCH
