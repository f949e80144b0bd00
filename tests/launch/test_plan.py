"""The plan of a run: arithmetic that must agree with what the job will do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from diffussm.config import Config, check, load
from diffussm.errors import ConfigError
from diffussm.model.counts import count
from diffussm.model.footprint import footprint
from diffussm.model.presets import LatentShape
from launch import plan
from launch.estimate import Estimator
from launch.latent import latent

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    made = Config(name="a", storage="s3://bucket/runs/")
    made.data.latents, made.data.resolution_px, made.data.classes = str(tmp_path / "latents"), 32, ["x", "y", "z"]
    made.train.images, made.train.global_batch, made.train.micro_batch = 1001, 100, 25
    made.checkpoint.every_images = 400
    made.cluster.workers, made.model.preset = 2, "tiny"
    return made


def rows(cfg: Config) -> dict[str, str]:
    return dict(line.split("  ", 1) for line in plan.text(cfg).splitlines())


def test_steps_batch_and_saves(cfg: Config) -> None:
    found = {what: value.strip() for what, value in rows(cfg).items()}
    assert plan.steps(cfg) == 11
    assert found["run"] == "s3://bucket/runs/a"
    assert found["steps"] == "11 of 100 images"
    assert found["batch"] == "25 images a pass, 2 passes a step on each worker"
    assert found["workers"] == "2 (CPU); legal are 1, 2, 4"
    assert found["checkpoints"] == "3 saves, the newest 2 kept"


def test_whole_batches_need_no_step_more(cfg: Config) -> None:
    cfg.train.images = 1000
    assert plan.steps(cfg) == 10


def test_classes_that_are_not_counted_yet_are_said_to_be(cfg: Config) -> None:
    cfg.data.classes = []
    known = latent(cfg)
    assert known is not None
    assert not known.counted
    one = count(cfg.model, known.shape).parameters
    more = count(cfg.model, LatentShape(4, 8, 8, classes=2)).parameters - one
    assert rows(cfg)["parameters"].strip() == f"{one:,} with one class; each further class adds {more:,}"


def test_memory_is_that_of_one_worker(cfg: Config) -> None:
    cfg.model.preset = "XL"
    known = latent(cfg)
    assert known is not None
    states = []
    for stage in (0, 3):
        cfg.train.zero_stage = stage
        peak, state, *_ = (float(size) for size in re.findall(r"([\d.]+) GiB", rows(cfg)["memory"]))
        found = footprint(cfg.model, known.shape, stage=stage, workers=2, micro_batch=25, accumulation=2, bf16=True)
        assert peak == pytest.approx(found.peak / 2**30, abs=0.01)
        assert state == pytest.approx(found.state / 2**30, abs=0.01)
        states.append(state)
    assert states[1] != states[0]


def test_an_autoencoder_that_must_be_fetched_leaves_the_latent_open(cfg: Config) -> None:
    cfg.data.autoencoder = "owner/some-vae"
    assert "not known before owner/some-vae is fetched" in plan.text(cfg)
    with pytest.raises(ConfigError, match=r"data\.autoencoder"):
        plan.report(cfg)


def test_the_report_on_cpus_says_nothing_about_time(cfg: Config) -> None:
    said = plan.report(cfg)
    assert "checkpoint" in said
    assert "USD" not in said
    assert "predicted for GPUs only" in said


def test_the_report_compares_numbers_of_workers() -> None:
    cfg = load(CONFIGS / "imagenet-512.yaml")
    said = plan.report(cfg, [8, 64, 96])
    lines = {line.split("|")[1].strip(): line for line in said.splitlines() if line.startswith("|")}
    assert lines["96"].split("|")[2].strip() == "-"
    assert "96 workers: found 96 ranks" in said
    assert plan.refused(cfg, [8, 64]) == ""
    assert plan.refused(cfg, [8, 96]).startswith("96: found 96 ranks (12 nodes with 8 each); train.global_batch=256")
    assert len(lines["8"].split("|")) == len(lines["H100 GPUs"].split("|"))
    assert "MACHINE" not in said
    assert "not measured by us" in said
    assert "64 workers: cluster.workers=64 cluster.workers_per_node=8" in said


def test_what_it_recommends_is_a_config_that_passes_the_rules() -> None:
    path = CONFIGS / "imagenet-512.yaml"
    said = plan.report(load(path), [8, 64, 256])
    recommended = [line.split(": ", 1)[1].split() for line in said.splitlines() if " workers: cluster" in line]
    assert len(recommended) == 3
    for overrides in recommended:
        cfg = load(path, overrides)
        check(cfg)
        planned = Estimator.of(cfg, latent(cfg))  # type: ignore[arg-type]
        best = planned.recommend(cfg.cluster.workers)
        assert best is not None
        assert planned.estimate(planned.configured()) == best


def test_a_save_is_held_against_the_warning_that_each_scheduler_gives(cfg: Config) -> None:
    cfg.slurm.warning_s = 300
    assert "long enough: a save takes about" in plan.report(cfg)
    assert "(the pods' grace)" in plan.report(cfg)
    cfg.plan.store_bytes_per_s = 1e3
    assert "TOO SHORT: a save takes about" in plan.report(cfg)


def test_json_has_the_same_numbers() -> None:
    cfg = load(CONFIGS / "imagenet-256.yaml")
    told = json.loads(plan.as_json(cfg, [8, 64]))
    assert told["parameters"] == count("XL", LatentShape(4, 32, 32, 1000)).parameters
    assert told["legal_workers"] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert set(told["recommended"]) == {"8", "64"}
    parts = told["configured"]["memory"]
    assert told["configured"]["peak_bytes"] == sum(parts.values())
    assert told["dataset_bytes"] == 1_281_167 * 4 * 2 * 4 * 32 * 32
    assert told["machine"]["source"]


def test_a_network_that_does_not_fit_is_refused(cfg: Config) -> None:
    cfg.model.hourglass = 128
    with pytest.raises(ConfigError, match=r"model\.hourglass"):
        plan.text(cfg)
    cfg.model.preset = "XXL"
    with pytest.raises(ConfigError, match=r"model\.preset"):
        plan.text(cfg)


def test_everything_that_stays_in_the_store_is_counted() -> None:
    """64 snapshots of two averages in bf16, by hand; milestones beside the newest checkpoints."""
    cfg = load(CONFIGS / "imagenet-256.yaml")
    told = json.loads(plan.as_json(cfg))
    assert cfg.train.power_ema
    assert len(cfg.train.power_ema) == 2
    assert told["snapshot_bytes"] == 64 * 2 * 2 * told["parameters"]
    milestones = cfg.train.images // cfg.checkpoint.milestone_images if cfg.checkpoint.milestone_images else 0
    assert told["kept_bytes"] == (cfg.checkpoint.keep + milestones) * told["checkpoint_bytes"]
    cfg.train.keep_ema_snapshots = 5
    assert json.loads(plan.as_json(cfg))["snapshot_bytes"] == 5 * 2 * 2 * told["parameters"]


def test_at_the_end_every_gpu_is_paid_for_until_the_last_picture_is_drawn() -> None:
    cfg = load(
        CONFIGS / "imagenet-256.yaml", ["cluster.workers=64", "cluster.workers_per_node=8", "train.micro_batch=4"]
    )
    planned = Estimator.of(cfg, latent(cfg))  # type: ignore[arg-type]
    found = planned.estimate(planned.configured())
    assert found.train_s is not None
    assert found.score_s is not None
    assert found.gpu_hours is not None
    assert planned.scores == 1
    assert found.gpu_hours == pytest.approx(64 * (found.train_s + found.score_s) / 3600)
