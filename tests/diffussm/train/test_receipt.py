"""A start proves that it goes on where the state ended, and stops when it does not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from diffussm.checkpoint import digest
from diffussm.checkpoint.snapshot import Part
from diffussm.config.schema import Config, Precision
from diffussm.errors import ExitCode, RestoreMismatch
from diffussm.train import loop
from diffussm.train.engine import Engine
from diffussm.train.receipt import TOLERANCES, compare, digests_of, draws
from diffussm.train.step import Inputs
from diffussm.train.world import current
from tests.runs import BATCH, tiny_run

LAYOUT = {"device": "cpu", "precision": "fp32", "world_size": 2}
STEP = {"ids": [[1, 2], [3, 4]], "draws": "00ff", "loss": 0.5, "layout": LAYOUT}


def otherwise(**changed: Any) -> dict[str, Any]:
    return copy.deepcopy(STEP) | changed


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (otherwise(), ""),
        (otherwise(ids=[[1, 2], [3, 5]]), "reads samples 1, 2 | 3, 5, before it read 1, 2 | 3, 4"),
        (otherwise(ids=[[1, 3], [2, 4]]), "ranks read 1, 3 | 2, 4, before they read"),
        (otherwise(ids=[[1, 2, 3, 4]], layout=LAYOUT | {"world_size": 1}), ""),
        (otherwise(draws="00fe"), "noise or timesteps differ (digest 00fe, before 00ff)"),
        (otherwise(loss=0.5000000000000001), "allowed relative difference: 0)"),
        (otherwise(loss=0.500001, layout=LAYOUT | {"world_size": 4}), ""),
        (otherwise(loss=0.5001, layout=LAYOUT | {"world_size": 4}), "allowed relative difference: 0.0001)"),
        (otherwise(loss=0.501, layout=LAYOUT | {"precision": "bf16"}), ""),
        (otherwise(loss=0.52, layout=LAYOUT | {"precision": "bf16"}), "allowed relative difference: 0.02)"),
        (otherwise(loss=None), "its loss is None, before it was 0.5"),
    ],
)
def test_two_records_of_a_step(now: dict[str, Any], says: str) -> None:
    verdict = compare(STEP, now)
    assert says in verdict
    assert bool(says) == bool(verdict)
    assert bool(says) == bool(compare(now, STEP))


def test_a_step_that_was_not_finite_may_be_so_again() -> None:
    assert not compare(otherwise(loss=None), otherwise(loss=None))
    assert set(TOLERANCES) == set(Precision)


def test_draws_belong_to_the_sample() -> None:
    ids, t, noise = torch.arange(6) + 40, torch.arange(6), torch.randn(6, 2, 3, 3)
    y = torch.zeros(6, dtype=torch.int64)

    def part(at: list[int]) -> Inputs:
        return Inputs(torch.zeros(len(at), 2, 3, 3), t[at], noise[at], y[at], ids[at])

    whole = draws([part([0, 1, 2, 3, 4, 5])])
    assert digest.add([draws([part([4, 1])]), draws([part([0, 5]), part([2, 3])])]) == whole
    noise[3, 0, 0, 0] += 1e-6
    assert draws([part([0, 1, 2, 3, 4, 5])]) != whole


@pytest.mark.world_size(2)
def test_digests_of_slices_are_those_of_the_whole_tensor() -> None:
    whole = torch.randn(101, generator=torch.Generator().manual_seed(0))
    low, high = ((0, 37), (37, 101))[dist.get_rank()]
    found = digests_of([Part("w", (101,), low, {"master": whole[low:high]})], ["master/w"], torch.device("cpu"))
    assert found == {"master/w": digest.text(digest.slice_sum(whole, 0))}


def train(cfg: Config, folder: Path, attempt: int, images: int) -> None:
    cfg = replace(cfg, train=replace(cfg.train, images=images))
    scratch = folder / f"scratch{attempt}"
    loop.train(cfg, current(torch.device("cpu")), attempt, scratch, lambda record: None)


def begun(folder: Path) -> tuple[Config, Path]:
    """A run of one checkpoint, after three steps, and two steps that no checkpoint has."""
    cfg = tiny_run(folder, images=8 * BATCH, checkpoint_images=3 * BATCH)
    cfg.train.ema_snapshot_images = 0
    cfg.checkpoint.keep = 10
    run = Path(cfg.storage, cfg.name)
    train(cfg, folder, 1, 5 * BATCH)
    (run / f"checkpoints/{5 * BATCH:012d}/manifest.json").unlink()  # as if it had been killed there
    return cfg, run


def receipt(run: Path, attempt: int) -> dict[str, Any]:
    return dict(json.loads((run / f"attempts/{attempt}/receipt.json").read_text()))


@pytest.mark.world_size(1)
def test_a_good_start_leaves_a_receipt(tmp_path: Path) -> None:
    cfg, run = begun(tmp_path)
    assert receipt(run, 1)["checkpoint"] is None
    train(cfg, tmp_path, 2, 8 * BATCH)
    found = receipt(run, 2)
    manifest = json.loads((run / f"checkpoints/{3 * BATCH:012d}/manifest.json").read_text())
    assert found["images"] == 3 * BATCH
    assert found["tensors"] == manifest["digests"]
    assert found["replayed"]["verdict"] == "equal"
    assert found["replayed"]["now"]["loss"] == found["replayed"]["before"]["loss"]
    assert found["first_samples"] == found["replayed"]["before"]["ids"]
    assert len(found["first_samples"][0]) == BATCH
    assert "refused" not in found


def other_weights(run: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One bit of one restored tensor flips on the way from the file."""
    original = Engine.restored

    def flipping(self: Engine, adam_steps: int) -> None:
        original(self, adam_steps)
        bits = self.slices()[2].tensors["exp_avg"].view(torch.int32)
        bits[0] ^= 1

    monkeypatch.setattr(Engine, "restored", flipping)
    return "1 of "


def weights_not_in_use(run: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The state is right, but the network goes on with its first weights: only the replayed loss can tell."""

    original = Engine.restored

    def forgetful(self: Engine, adam_steps: int) -> None:
        initial = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        original(self, adam_steps)
        for name, parameter in self.module.named_parameters():
            parameter.data.copy_(initial[name])

    monkeypatch.setattr(Engine, "restored", forgetful)
    return "its loss is "


def other_samples(run: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The first attempt read other samples here."""
    path = run / "attempts/1/trace.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["ids"][0][0] += 1000
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return "it reads samples "


def other_noise(run: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The generator of the draws gives others than it did."""
    from diffussm.train import step

    original = step.generator
    monkeypatch.setattr(step, "generator", lambda seed, *key: original(seed + 1, *key))
    return "noise or timesteps differ"


@pytest.mark.world_size(1)
@pytest.mark.parametrize("change", [other_weights, weights_not_in_use, other_samples, other_noise])
def test_a_start_that_is_not_the_same_stops(
    tmp_path: Path, change: Callable[[Path, pytest.MonkeyPatch], str]
) -> None:  # fmt: skip
    cfg, run = begun(tmp_path)
    with pytest.MonkeyPatch.context() as monkeypatch:
        says = change(run, monkeypatch)
        with pytest.raises(RestoreMismatch) as refused:
            train(cfg, tmp_path, 2, 8 * BATCH)
    assert says in refused.value.message
    assert refused.value.code is ExitCode.DATA
    assert "attempts/2/receipt.json" in refused.value.remedy
    assert says in receipt(run, 2)["refused"]
    assert not (run / f"checkpoints/{6 * BATCH:012d}").exists()
    if change.__name__ != "other_samples":  # nothing was lost: with the cause gone the run goes on
        train(cfg, tmp_path, 3, 8 * BATCH)
