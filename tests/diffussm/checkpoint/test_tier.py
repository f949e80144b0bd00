from __future__ import annotations

from pathlib import Path

from diffussm.checkpoint.store import LocalStore
from diffussm.checkpoint.tier import tiers
from diffussm.config.schema import CheckpointConfig


def test_storage_is_asked_first_and_milestones_are_its_own(tmp_path: Path) -> None:
    cfg = CheckpointConfig(every_images=100, milestone_images=250, local=str(tmp_path), local_every_images=30)
    storage, local = tiers(cfg, LocalStore("a"), LocalStore("b"))
    assert (storage.name, local.name, local.keep) == ("storage", "local", 1)
    assert [n for n in range(10, 310, 10) if storage.due(n, n - 10)] == [100, 200, 250, 300]
    assert [n for n in range(10, 130, 10) if local.due(n, n - 10)] == [30, 60, 90, 120]
    assert storage.milestone(260, 240)
    assert storage.milestone(300, 240)  # owed by a save that failed
    assert not storage.milestone(300, 250)
    assert not local.milestone(10_000, 0)
    assert len(tiers(cfg, LocalStore("a"), None)) == 1
