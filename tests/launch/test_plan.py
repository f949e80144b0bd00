"""The plan of a run: arithmetic that must agree with what the job will do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffussm.config import Config
from diffussm.errors import ConfigError
from diffussm.model.counts import count, memory
from diffussm.model.presets import LatentShape
from launch import plan


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    made = Config(name="a", storage="s3://bucket/runs/")
    made.data.latents, made.data.resolution_px, made.data.classes = str(tmp_path / "latents"), 32, ["x", "y", "z"]
    made.train.images, made.train.global_batch, made.train.micro_batch = 1001, 100, 25
    made.train.checkpoint_images = 400
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


def test_the_latent_follows_from_the_built_in_autoencoder(cfg: Config) -> None:
    known = plan.latent(cfg)
    assert known is not None
    assert known.shape == LatentShape(channels=4, height=8, width=8, classes=3)
    assert known.counted
    assert rows(cfg)["parameters"].strip() == f"{count(cfg.model, known.shape).parameters:,}"


def test_classes_that_are_not_counted_yet_are_said_to_be(cfg: Config) -> None:
    cfg.data.classes = []
    known = plan.latent(cfg)
    assert known is not None
    assert (known.shape.classes, known.counted) == (1, False)
    one = count(cfg.model, known.shape).parameters
    more = count(cfg.model, LatentShape(4, 8, 8, classes=2)).parameters - one
    assert rows(cfg)["parameters"].strip() == f"{one:,} with one class; each further class adds {more:,}"


def test_memory_is_that_of_one_worker(cfg: Config) -> None:
    cfg.model.preset, cfg.train.zero_stage = "XL", 0
    known = plan.latent(cfg)
    assert known is not None
    state_gib = float(rows(cfg)["memory"].split()[0])
    kept = memory(count(cfg.model, known.shape).parameters, 0, 2)
    assert state_gib == pytest.approx((kept.weights + kept.gradients + kept.optimizer + kept.ema) / 2**30, abs=0.01)
    activations = [float(rows(cfg)["memory"].split("about")[1].split()[0])]
    cfg.train.micro_batch = 50
    activations.append(float(rows(cfg)["memory"].split("about")[1].split()[0]))
    assert activations[1] == pytest.approx(2 * activations[0], rel=0.05)
    cfg.train.zero_stage = 3
    assert float(rows(cfg)["memory"].split()[0]) < state_gib


def test_the_latent_follows_from_a_folder(cfg: Config, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [1] * 4, "latent_channels": 16}))
    cfg.data.autoencoder, cfg.data.resolution_px = str(tmp_path / "vae"), 256
    known = plan.latent(cfg)
    assert known is not None
    assert (known.shape.channels, known.shape.height, known.shape.width) == (16, 32, 32)


def test_latents_that_exist_speak_for_themselves(cfg: Config, tmp_path: Path) -> None:
    (tmp_path / "latents").mkdir()
    passport = {"latent_shape": [8, 4, 6], "classes": ["a", "b"]}
    (tmp_path / "latents" / "passport.json").write_text(json.dumps(passport))
    for place in (tmp_path / "latents", f"file://{tmp_path}/latents"):
        cfg.data.latents = str(place)
        known = plan.latent(cfg)
        assert known is not None
        assert known.shape == LatentShape(channels=8, height=4, width=6, classes=2)


def test_an_autoencoder_that_must_be_fetched_leaves_the_latent_open(cfg: Config) -> None:
    cfg.data.autoencoder = "owner/some-vae"
    assert plan.latent(cfg) is None
    assert "not known before owner/some-vae is fetched" in plan.text(cfg)


def test_a_network_that_does_not_fit_is_refused(cfg: Config) -> None:
    cfg.model.hourglass = 128
    with pytest.raises(ConfigError, match=r"model\.hourglass"):
        plan.text(cfg)
    cfg.model.preset = "XXL"
    with pytest.raises(ConfigError, match=r"model\.preset"):
        plan.text(cfg)
