"""A run that starts from another run: weights, averages and optimiser go on at another size of the latents."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffussm.checkpoint import restore
from diffussm.checkpoint.store import open_store
from diffussm.config import check
from diffussm.config.schema import Config
from diffussm.data.encode import prepare
from diffussm.errors import ConfigError, DataError
from diffussm.train import lineage, loop
from diffussm.train.world import current
from tests.runs import BATCH, metrics, tiny_run

PARENT_STEPS = 4


@pytest.fixture
def parent(tmp_path: Path) -> Config:
    return tiny_run(tmp_path, images=PARENT_STEPS * BATCH, checkpoint_images=2 * BATCH)


@pytest.fixture
def child(parent: Config, tmp_path: Path) -> Config:
    """Pictures of twice the side, so sequences of four times the length; a rate of 0 keeps weights as they came."""
    data = replace(parent.data, latents=str(tmp_path / "large"), resolution_px=2 * parent.data.resolution_px)
    train = replace(parent.train, images=BATCH, lr=0.0, start_from=f"{parent.storage}/{parent.name}")
    made = replace(parent, name="child", data=data, train=train)
    prepare(made)
    return made


def run(cfg: Config, tmp_path: Path) -> None:
    world = current(torch.device("cpu"))
    cfg.cluster.workers = world.size
    loop.train(cfg, world, attempt=1, scratch=tmp_path / f"{cfg.name}{world.rank}", announce=lambda record: None)


def weights(cfg: Config, kind: str) -> dict[str, torch.Tensor]:
    store = open_store(f"{cfg.storage}/{cfg.name}")
    return restore.read_weights(store, *restore.choose(store), kind)


def expect_taken_over(parent: Config, child: Config) -> None:
    store = open_store(f"{child.storage}/{child.name}")
    _, manifest = restore.choose(store)
    assert manifest.counters.images == BATCH
    assert manifest.counters.adam_steps == PARENT_STEPS + 1
    before, after = weights(parent, "master"), weights(child, "master")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    old, new = weights(parent, "exp_avg"), weights(child, "exp_avg")
    assert not all(torch.equal(old[name], new[name]) for name in old)  # one step of the new pictures on top
    averages, kept = weights(parent, "ema-plain"), weights(child, "ema-plain")
    decay = child.train.ema ** (BATCH / 256)
    for name, average in averages.items():
        torch.testing.assert_close(kept[name], decay * average + (1 - decay) * before[name], rtol=1e-5, atol=1e-7)
    origin = json.loads(store.read(lineage.KEY))
    assert (origin["run"], origin["images"]) == (child.train.start_from, PARENT_STEPS * BATCH)
    assert origin["started_from"] is None


@pytest.mark.world_size(2)
def test_everything_is_taken_over_and_kernels_follow_the_length(parent: Config, child: Config, tmp_path: Path) -> None:
    run(parent, tmp_path)
    run(child, tmp_path)
    expect_taken_over(parent, child)
    if current(torch.device("cpu")).leads:
        assert metrics(child)[0]["loss"] < 2.0


@pytest.mark.world_size(1)
def test_only_the_first_start_takes_over_and_the_line_goes_on(parent: Config, child: Config, tmp_path: Path) -> None:
    run(parent, tmp_path)
    run(child, tmp_path)
    longer = replace(child, train=replace(child.train, images=3 * BATCH))
    run(longer, tmp_path)  # resumes: its own checkpoint, not the parent's
    _, manifest = restore.choose(open_store(f"{child.storage}/{child.name}"))
    assert manifest.counters.adam_steps == PARENT_STEPS + 3
    # An average that the run before did not keep begins with the weights; one checkpoint may be named.
    start = f"{parent.storage}/{parent.name}/checkpoints/{2 * BATCH}"
    other = replace(parent, name="other", train=replace(parent.train, images=BATCH, lr=0.0, power_ema=[0.2]))
    other.train.start_from = start
    run(other, tmp_path)
    store = open_store(f"{other.storage}/{other.name}")
    assert json.loads(store.read(lineage.KEY))["images"] == 2 * BATCH
    master, average = weights(other, "master"), weights(other, "ema-power-0.200")
    assert all(torch.equal(master[name], average[name]) for name in master)
    grandchild = replace(parent, name="grandchild", train=replace(parent.train, images=BATCH, power_ema=[0.2]))
    grandchild.train.start_from = f"{other.storage}/other"
    run(grandchild, tmp_path)
    line = json.loads(open_store(f"{other.storage}/grandchild").read(lineage.KEY))
    assert line["started_from"]["run"] == f"{parent.storage}/{parent.name}"


@pytest.mark.world_size(1)
def test_another_network_is_refused(parent: Config, tmp_path: Path) -> None:
    run(parent, tmp_path)
    wide = replace(parent, name="wide", model=replace(parent.model, width=24))
    wide.train = replace(parent.train, start_from=f"{parent.storage}/{parent.name}")
    with pytest.raises(DataError, match="shape"):
        run(wide, tmp_path)


def test_what_is_not_there_is_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="its checkpoints are none"):
        lineage.check(str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"<run>/checkpoints/<images>"):
        lineage.split("s3://b/run/checkpoints/newest")
    assert lineage.split("s3://b/run/checkpoints/000000000064/") == ("s3://b/run", 64)
    assert lineage.split("s3://b/run/") == ("s3://b/run", None)


def test_a_run_does_not_start_from_itself(parent: Config) -> None:
    for place in ("", "/checkpoints/8"):
        parent.train.start_from = f"{parent.storage}/{parent.name}{place}"
        with pytest.raises(ConfigError, match="another run"):
            check(parent)
    parent.train.start_from = "ftp://x/y"
    with pytest.raises(ConfigError, match=r"train\.start_from"):
        check(parent)
