"""The training of real processes without Ray: resume, world sizes and stages give the same run."""

from __future__ import annotations

import contextlib
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from diffussm.checkpoint import restore
from diffussm.checkpoint.manifest import Manifest
from diffussm.checkpoint.store import open_store
from diffussm.config.schema import CheckpointConfig, Config
from diffussm.errors import DataError, DivergedError, Preempted
from diffussm.observe.events import read_journal
from diffussm.train import loop
from diffussm.train.control import Control, Level, Wish
from diffussm.train.world import current
from tests.runs import BATCH, final_losses, no_save_overtaken, tiny_run

STEPS = 10


class Stopped(Exception):
    """Stands for a kill between two steps."""


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    return tiny_run(tmp_path, images=STEPS * BATCH, checkpoint_images=3 * BATCH)


def named(cfg: Config, name: str, **train: Any) -> Config:
    return replace(cfg, name=name, train=replace(cfg.train, **train))


def run(cfg: Config, tmp_path: Path, stop_after: int = 0) -> list[dict[str, Any]]:
    """Train on this rank; with `stop_after` rank 0 leaves in the middle of that many steps."""
    cfg.cluster.workers = dist.get_world_size()
    said: list[dict[str, Any]] = []

    def announce(record: dict[str, Any]) -> None:
        said.append(record)
        if record["kind"] == "progress" and record["images"] == stop_after * BATCH:
            raise Stopped

    world = current(torch.device("cpu"))
    with contextlib.suppress(Stopped):
        loop.train(cfg, world, attempt=1, scratch=tmp_path / f"scratch{world.rank}", announce=announce)
    return said


def state(cfg: Config) -> dict[str, torch.Tensor]:
    store = open_store(f"{cfg.storage}/{cfg.name}")
    folder, manifest = restore.choose(store)
    return {
        f"{kind}/{name}": tensor
        for kind in manifest.kinds
        for name, tensor in restore.read_weights(store, folder, manifest, kind).items()
    }


@pytest.mark.world_size(1)
def test_a_stopped_run_ends_bit_for_bit_as_one_that_was_not(cfg: Config, tmp_path: Path) -> None:
    whole, cut = named(cfg, "whole"), named(cfg, "cut")
    run(whole, tmp_path)
    run(cut, tmp_path, stop_after=5)
    said = run(cut, tmp_path)
    started = next(r for r in said if r.get("event") == "resumed")
    assert started["images"] == 3 * BATCH
    assert len(final_losses(whole)) == STEPS
    assert final_losses(cut) == final_losses(whole)
    expected, found = state(whole), state(cut)
    assert expected.keys() == found.keys()
    assert {key.split("/")[0] for key in expected} == {
        "master",
        "exp_avg",
        "exp_avg_sq",
        "ema-plain",
        "ema-power-0.050",
        "ema-power-0.100",
    }
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key


@pytest.mark.world_size(1)
def test_what_a_kill_after_the_last_save_left_is_deleted_by_the_next_start(cfg: Config, tmp_path: Path) -> None:
    cfg = named(cfg, "killed")
    cfg.checkpoint.milestone_images = 6 * BATCH
    with no_save_overtaken():
        run(cfg, tmp_path)
    folder = Path(cfg.storage, cfg.name, "checkpoints")
    expected = sorted(folder.iterdir())
    assert len(expected) > cfg.checkpoint.keep, "milestones"
    newest = expected[-1]
    shutil.copytree(newest, folder / f"{BATCH:012d}")  # superfluous, its deletion not begun
    half = shutil.copytree(newest, folder / f"{2 * BATCH:012d}")
    (half / "manifest.json").unlink()  # in the middle
    (folder / f"{3 * BATCH:012d}").mkdir(exist_ok=True)  # but for its folder
    assert (folder / f"{3 * BATCH:012d}") not in expected
    run(cfg, tmp_path)
    assert sorted(folder.iterdir()) == expected


@pytest.mark.world_size(1)
def test_a_newer_checkpoint_of_the_node_is_resumed_from(cfg: Config, tmp_path: Path) -> None:
    """Storage gets every fourth step and the milestones, the node's folder all the others."""
    local = CheckpointConfig(
        every_images=4 * BATCH, milestone_images=8 * BATCH, local=str(tmp_path / "node"), local_every_images=BATCH
    )
    whole, cut = named(cfg, "whole"), replace(named(cfg, "cut"), checkpoint=local)
    run(whole, tmp_path)
    run(cut, tmp_path, stop_after=8)
    node = open_store(str(tmp_path / "node" / "cut"))
    newest = max(m.counters.images for _, m in restore.manifests(node) if isinstance(m, Manifest))
    started = next(r for r in run(cut, tmp_path) if r.get("event") == "resumed")
    assert 4 * BATCH < started["images"] == newest
    assert final_losses(cut) == final_losses(whole)
    expected, found = state(whole), state(cut)
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key
    stored = restore.manifests(open_store(f"{cut.storage}/cut"))
    kept = [m.counters.images for _, m in stored if isinstance(m, Manifest) and m.permanent]
    assert any(images >= 8 * BATCH for images in kept), "the milestone's, or the next if its save was still under way"


@pytest.mark.world_size(1)
def test_a_milestone_that_storage_is_owed_is_kept_after_a_start_from_the_nodes_checkpoint(
    cfg: Config, tmp_path: Path
) -> None:  # fmt: skip
    """The save at the milestone (6) was lost, the node has a later one (7): the next in storage (8) stands in."""
    cfg.checkpoint = CheckpointConfig(every_images=4 * BATCH)
    run(named(cfg, "owed", images=7 * BATCH), tmp_path)
    storage, last = Path(cfg.storage, "owed", "checkpoints"), f"{7 * BATCH:012d}"
    node = tmp_path / "node" / "owed" / "checkpoints"
    node.mkdir(parents=True)
    (storage / last).rename(node / last)
    assert [folder.name for folder in storage.iterdir()] == [f"{4 * BATCH:012d}"]
    cfg.checkpoint = CheckpointConfig(
        every_images=4 * BATCH, milestone_images=6 * BATCH, local=str(tmp_path / "node"), local_every_images=100 * BATCH
    )
    started = next(r for r in run(named(cfg, "owed"), tmp_path) if r.get("event") == "resumed")
    assert started["images"] == 7 * BATCH
    stored = restore.manifests(open_store(f"{cfg.storage}/owed"))
    assert {m.counters.images: m.permanent for _, m in stored if isinstance(m, Manifest)}[8 * BATCH]


@pytest.mark.world_size(2)
def test_two_ranks_and_other_stages_make_the_same_run(cfg: Config, tmp_path: Path) -> None:
    """Losses agree to a rounding for ZeRO 1 and 3, and with accumulation."""
    runs = {
        name: named(cfg, name, **changes)
        for name, changes in {
            "stage1": {"zero_stage": 1}, "stage3": {"zero_stage": 3}, "stage0": {"zero_stage": 0, "micro_batch": 2},
        }.items()
    }  # fmt: skip
    for each in runs.values():
        run(each, tmp_path)
        dist.barrier()
    base = final_losses(runs["stage1"])
    assert len(base) == STEPS
    for each in runs.values():
        for images, loss in final_losses(each).items():
            assert loss == pytest.approx(base[images], rel=1e-5)
    run(named(cfg, "stage3", zero_stage=1, images=12 * BATCH), tmp_path)  # goes on under another stage
    dist.barrier()
    assert max(final_losses(runs["stage3"])) == 12 * BATCH


@pytest.mark.world_size(1)
def test_a_run_that_is_never_finite_is_stopped_and_keeps_its_last_checkpoint(cfg: Config, tmp_path: Path) -> None:
    healthy = named(cfg, "bad", images=3 * BATCH)
    run(healthy, tmp_path)
    before = state(healthy)
    patch = pytest.MonkeyPatch()
    with patch.context() as poisoned:
        true_loss = loop.loss
        poisoned.setattr(loop, "loss", lambda *args, **named: true_loss(*args, **named) * float("nan"))
        with pytest.raises(DivergedError, match="4 steps in a row"):
            run(named(cfg, "bad", max_nonfinite_steps=4), tmp_path)
    for key, tensor in state(healthy).items():
        if not key.startswith("ema-power-"):  # they count images, and more were seen
            assert torch.equal(tensor, before[key])


@pytest.mark.world_size(1)
def test_a_training_that_was_asked_to_leave_says_that_it_left(cfg: Config, tmp_path: Path) -> None:
    control, said = Control(), list[dict[str, Any]]()
    control.wish = Wish(Level.LEAVE, reason="SIGTERM to the driver")
    cfg.cluster.workers = 1
    with pytest.raises(Preempted):
        loop.train(cfg, current(torch.device("cpu")), 1, tmp_path / "scratch", said.append, control)
    last = read_journal(open_store(f"{cfg.storage}/{cfg.name}"), "events.jsonl")[-1]
    assert (last["event"], last["cause"], last["images"]) == ("left", "preemption", 2 * BATCH)
    assert "stopped" not in {record.get("event") for record in said}


@pytest.mark.world_size(1)
def test_a_start_that_cannot_go_on_leaves_whole_journals(cfg: Config, tmp_path: Path) -> None:
    def refuse(*known: Any) -> None:
        known[4].event("checkpoint refused", reason="all of them")
        raise DataError("none is left")

    patch = pytest.MonkeyPatch()
    with patch.context() as broken:
        broken.setattr(loop.lineage, "begin", refuse)
        with pytest.raises(DataError):
            run(cfg, tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name == "journal events.jsonl"]
    (said,) = read_journal(open_store(f"{cfg.storage}/{cfg.name}"), "events.jsonl")
    assert said["event"] == "checkpoint refused"
