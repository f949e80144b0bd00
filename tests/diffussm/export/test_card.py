"""The card says what is known and nothing more."""

from __future__ import annotations

from dataclasses import replace

import yaml

from diffussm.checkpoint.manifest import Counters, Manifest
from diffussm.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from diffussm.export.card import UNKNOWN_LICENCE, Story, write
from diffussm.model.counts import count
from tests.diffussm.test_sample import PASSPORT

MANIFEST = Manifest(
    counters=Counters(images=1_280, step=10, epoch=0, images_in_epoch=0, adam_steps=10, nonfinite_steps=0),
    attempt=1, world_size=1, zero_stage=0, config_digest="c0ffee", kinds=("master",), shapes={}, files=(),
    versions={"torch": "2.14.1"},
)  # fmt: skip


def story(**changes: object) -> Story:
    cfg = Config(name="a-run", data=DataConfig(latents="l"), train=TrainConfig(images=1_280))
    cfg.model = ModelConfig(preset="tiny")
    made = Story(cfg, PASSPORT, 640, MANIFEST, count(cfg.model, PASSPORT.latent), "ema", [])
    return replace(made, **changes)  # type: ignore[arg-type]


def test_without_scores_or_licence_it_says_so() -> None:
    text = write(story())
    assert "None was computed." in text
    assert UNKNOWN_LICENCE in text
    assert "license" not in yaml.safe_load(text.split("---")[1])


def test_many_classes_are_counted_and_names_cannot_break_a_table() -> None:
    names = tuple(f"n{i}|x\ny" for i in range(30))
    text = write(story(passport=replace(PASSPORT, classes=names, class_counts=(1,) * 30)))
    assert "and 18 more" in text
    row = next(line for line in text.splitlines() if line.startswith("| classes"))
    assert row.count(" | ") == 1
    assert "\\|" in row


def test_much_data_is_not_said_to_be_learnt_by_heart() -> None:
    assert "by heart" in write(story())
    assert "by heart" not in write(story(passport=replace(PASSPORT, number=50_000)))
