"""Where the state goes when the job must leave: to storage if there is time, else nearer."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffussm.checkpoint import restore
from diffussm.checkpoint.store import LocalStore, Source, open_store
from diffussm.config.schema import CheckpointConfig
from diffussm.errors import Preempted
from diffussm.train import loop
from diffussm.train.control import Control, Level, Wish
from diffussm.train.saver import departure
from diffussm.train.world import current
from tests.runs import BATCH, final_losses, tiny_run

SLOW_S = 1.5
NOTICE_S = 2.0
"""Less than storage takes with what is added to be sure, and time enough for the node's own folder."""
STEPS = 320


@pytest.mark.parametrize(
    ("seconds", "left_s", "tier"),
    [
        ([None], 1, 0),
        ([None, 2.0], 1, 0),  # nothing is known of storage
        ([10.0, 1.0], 30, 0),
        ([10.0, 1.0], 14, 1),  # 10 s might just do, or just not
        ([40.0, None], 30, 1),
        ([40.0, 25.0], 30, 1),  # none is sure; the fastest
        ([40.0, 50.0], 30, 0),
        ([40.0], 30, 0),
    ],
)
def test_the_tier_follows_from_measured_saves(seconds: list[float | None], left_s: float, tier: int) -> None:
    assert departure(seconds, left_s) == tier


@pytest.mark.world_size(1)
def test_with_storage_too_slow_for_the_deadline_the_nodes_folder_saves_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    cfg = tiny_run(tmp_path, images=STEPS * BATCH, checkpoint_images=STEPS * BATCH)
    whole = replace(cfg, name="whole")
    world = current(torch.device("cpu"))
    loop.train(whole, world, 1, tmp_path / "scratch", lambda record: None)

    put = LocalStore.put

    def slowly(self: LocalStore, source: Source, key: str) -> None:
        if self.root.is_relative_to(cfg.storage):
            time.sleep(SLOW_S)  # a store far away
        put(self, source, key)

    monkeypatch.setattr(LocalStore, "put", slowly)
    cfg.checkpoint = CheckpointConfig(
        every_images=10 * BATCH, local=str(tmp_path / "node"), local_every_images=STEPS * BATCH
    )
    control, said = Control(), list[dict[str, Any]]()

    def announce(record: dict[str, Any]) -> None:
        said.append(record)
        if record.get("event") == "saved" and control.wish.level is Level.NONE:
            control.wish = Wish(Level.LEAVE, time.time() + NOTICE_S, "notice")

    with pytest.raises(Preempted):
        loop.train(cfg, world, 1, tmp_path / "scratch", announce, control)
    (left,) = [record for record in said if record.get("event") == "departure to another tier"]
    assert left["tier"] == "local"
    assert left["storage_s"] >= SLOW_S
    saved = restore.choose(open_store(str(tmp_path / "node" / cfg.name)))[1].counters.images

    monkeypatch.setattr(LocalStore, "put", put)
    loop.train(cfg, world, 2, tmp_path / "scratch", said.append)
    resumed = next(record for record in said if record.get("event") == "resumed")
    assert resumed["images"] == saved
    assert final_losses(cfg) == final_losses(whole)
