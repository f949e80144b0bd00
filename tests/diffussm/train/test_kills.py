"""SIGKILL at any moment, and resume: the run ends bit by bit as one that nobody disturbed."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffussm.checkpoint import restore
from diffussm.checkpoint.manifest import Manifest
from diffussm.checkpoint.store import open_store
from diffussm.config.schema import Config
from tests import kills
from tests.kills import Kill
from tests.runs import BATCH, final_losses, tiny_run

STEPS = 40
MOMENTS = {"forward", "step", "snapshot", "upload", "rename", "manifest.json", "deletion", "reading", "receipt.json"}
"""Kinds of moments at which the long test must have killed."""


def state(cfg: Config) -> dict[str, torch.Tensor]:
    store = open_store(f"{cfg.storage}/{cfg.name}")
    folder, manifest = restore.choose(store)
    assert manifest.counters.images == cfg.train.images
    return {
        f"{kind}/{name}": tensor
        for kind in manifest.kinds
        for name, tensor in restore.read_weights(store, folder, manifest, kind).items()
    }


def averages(cfg: Config) -> dict[str, dict[str, str]]:
    """Digests of all tensors of each snapshot of the averages, every one of which must verify."""
    store = open_store(f"{cfg.storage}/{cfg.name}")
    found = dict(restore.manifests(store, "ema"))
    for folder, manifest in found.items():
        assert isinstance(manifest, Manifest)
        assert not restore.verify(store, folder, manifest)
    return {folder: manifest.digests for folder, manifest in found.items()}  # type: ignore[union-attr]


def assert_the_same_run(found: Config, expected: Config, folder: Path) -> None:
    assert len(final_losses(expected)) == STEPS
    assert final_losses(found) == final_losses(expected)
    assert kills.steps(folder, found.name) == kills.steps(folder, expected.name)
    states = state(found), state(expected)
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        assert torch.equal(states[0][name], tensor), name
    snapshots = averages(found), averages(expected)
    assert len(snapshots[1]) == STEPS // 10
    assert max(snapshots[0]) == max(snapshots[1])  # earlier ones may have been killed on their way
    assert snapshots[0].items() <= snapshots[1].items()


def chain(folder: Path, number: int, size: int, stage: int, seed: int) -> Counter[str]:
    """Kill runs at random moments, `number` times in all; returns how often at which.

    Every kind of moment is as likely as any other, however often it comes.
    """
    rng, died = random.Random(seed), Counter[str]()  # noqa: S311 - a test's dice
    whole = tiny_run(folder, images=STEPS * BATCH, checkpoint_images=3 * BATCH, zero_stage=stage)
    whole.name, whole.checkpoint.milestone_images = "whole", 15 * BATCH
    ended = kills.attempt(whole, folder, size)
    assert not ended.errors, ended.errors
    moments = ended.moments
    assert {_plain(name) for name in moments[0]} >= MOMENTS
    while died.total() < number:
        cut = replace(whole, name=f"cut{died.total()}")
        for _ in range(60):
            left = number - died.total()
            rank = rng.randrange(size)
            moment = rng.choice(sorted(moments[rank]))
            kill = Kill(rank, moment, rng.randint(1, -(-moments[rank][moment] // 3))) if left else None
            ended = kills.attempt(cut, folder, size, kill)
            if not ended.died_at:
                assert not ended.errors, ended.errors
                break
            died[_plain(ended.died_at)] += 1
        assert_the_same_run(cut, whole, folder)
        run = Path(cut.storage, cut.name)
        receipts = [json.loads(path.read_text()) for path in run.glob("attempts/*/receipt.json")]
        assert not [receipt["refused"] for receipt in receipts if "refused" in receipt]
        # Two milestones; where the deletion after the last save was killed, the next start made up for it.
        assert len(list((run / "checkpoints").iterdir())) <= cut.checkpoint.keep + 2
    return died


def _plain(moment: str) -> str:
    return moment.removeprefix("before ").removeprefix("after ")


def test_killed_anywhere_it_ends_bit_by_bit_the_same(tmp_path: Path) -> None:
    died = chain(tmp_path, number=8, size=2, stage=1, seed=0)
    assert died.total() == 8


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("size", "stage", "number"), [(1, 0, 60), (1, 3, 40), (2, 1, 60), (2, 2, 40), (2, 3, 60)])
def test_killed_hundreds_of_times(tmp_path: Path, size: int, stage: int, number: int) -> None:
    died = chain(tmp_path, number, size, stage, seed=size * 10 + stage)
    print(f"{size} ranks, ZeRO {stage}: killed {dict(died)}")
    assert died.total() >= number
    assert set(died) >= MOMENTS


def test_other_world_sizes_and_stages_see_the_same_samples(tmp_path: Path) -> None:
    """1 -> 2 -> 4 -> 3 ranks and ZeRO 1 -> 3 -> 2 -> 0 along one run, against one rank that was never stopped."""
    whole = tiny_run(tmp_path, images=16 * 12, checkpoint_images=1000 * 12, log_images=12)
    whole.name, whole.train.global_batch = "whole", 12
    assert not kills.attempt(whole, tmp_path, 1).errors
    moved = replace(whole, name="moved")
    for size, stage, end in ((1, 1, 4), (2, 3, 8), (4, 2, 12), (3, 0, 16)):
        part = replace(moved, train=replace(moved.train, zero_stage=stage, images=end * 12))
        ended = kills.attempt(part, tmp_path, size)
        assert not ended.errors, ended.errors
    expected, found = kills.steps(tmp_path, "whole"), kills.steps(tmp_path, "moved")
    assert [found[images]["ranks"] for images in (48, 96, 144, 192)] == [1, 2, 4, 3]
    assert {n: step["samples"] for n, step in found.items()} == {n: step["samples"] for n, step in expected.items()}
    losses, reference = final_losses(moved), final_losses(whole)
    assert len(losses) == 16
    for images, loss in reference.items():
        assert losses[images] == pytest.approx(loss, rel=1e-5)


def test_of_two_attempts_at_once_the_newer_one_survives(tmp_path: Path) -> None:
    cfg = tiny_run(tmp_path, images=STEPS * BATCH, checkpoint_images=3 * BATCH)
    old_place, new_place = tmp_path / "old", tmp_path / "new"
    old_place.mkdir()
    new_place.mkdir()
    old = kills.start(cfg, old_place, 1, patch="hold_first")
    while not (old_place / "held-0").exists():
        assert old[0].is_alive(), (old_place / "error-0").read_text()
        old[0].join(0.05)
    assert not kills.attempt(cfg, new_place, 1).errors
    before = sorted((p.as_posix(), p.stat().st_mtime_ns) for p in Path(cfg.storage).rglob("*") if p.is_file())
    (old_place / "go").touch()
    ended = kills.finish(old, old_place)
    assert "Superseded: " in ended.errors[0]
    assert "attempt 2 has begun" in ended.errors[0]
    after = sorted((p.as_posix(), p.stat().st_mtime_ns) for p in Path(cfg.storage).rglob("*") if p.is_file())
    changed = {name for name, _ in set(after) ^ set(before)}
    assert not [name for name in changed if "/attempts/1/" not in name and "goodput" not in name], changed
