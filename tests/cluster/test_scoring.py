"""One worker's part of an evaluation: the files, the keys and the weights that are kept for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster import scoring
from cluster.scoring import Scorer
from diffussm.checkpoint.store import LocalStore
from diffussm.config.schema import Config
from diffussm.data.latents import passport as read_passport
from diffussm.errors import DataError
from diffussm.evaluate.extractors import open_extractor
from diffussm.evaluate.reference import members
from tests.evaluations import BATCH


@pytest.fixture
def cfg(scored: Config) -> Config:
    store = LocalStore(f"{scored.storage}/{scored.name}")
    for key in list(store.keys("evaluations")):
        store.delete(key)
    return scored


def test_kept_weights_outlive_the_checkpoint_and_make_the_same_plan(cfg: Config) -> None:
    whole = Scorer(cfg, 2 * BATCH)
    store = whole.store
    assert scoring.keep_weights(cfg, store, 2 * BATCH)
    assert not scoring.keep_weights(cfg, store, 2 * BATCH)
    assert scoring.kept(store) == [2 * BATCH]
    place = scoring.kept_place(cfg, 2 * BATCH)
    kept = Scorer(replace(cfg, sample=replace(cfg.sample, weights=place)), None)
    assert kept.plan == whole.plan
    assert kept.ready() == whole.ready()
    assert np.array_equal(kept._paint([0, 1], 5), whole._paint([0, 1], 5))
    scoring.release(store, 2 * BATCH)
    assert scoring.kept(store) == []
    assert not any(scoring.PENDING in key for key in store.keys(""))
    with pytest.raises(DataError, match="no usable checkpoint after 7 images"):
        scoring.keep_weights(cfg, store, 7)


def test_a_result_is_named_by_checkpoint_extractor_and_settings(cfg: Config) -> None:
    scorer = Scorer(cfg, None)
    assert scorer.images == 8 * BATCH  # the newest
    settings = dict(scorer.plan.settings)
    key = scoring.result_key(32, scorer.extractor, settings)
    assert key.startswith("evaluations/000000000032-channels-")
    assert key == scoring.result_key(32, scorer.extractor, settings | {"code": "other"})
    guided = settings | {"sample": settings["sample"] | {"guidance": 9.0}}
    assert key != scoring.result_key(32, scorer.extractor, guided)


def test_what_decides_the_pictures_is_in_the_plan_and_workers_are_not(cfg: Config) -> None:
    plan = Scorer(cfg, None).plan
    for section, change in (
        ("sample", {"guidance": 2.0}),
        ("sample", {"ema": "none"}),
        ("evaluate", {"block_images": 4}),
        ("evaluate", {"images": 12}),
        ("cluster", {"threads_per_worker": 2}),  # float sums depend on it
    ):
        other = replace(cfg, **{section: replace(getattr(cfg, section), **change)})
        assert Scorer(other, None).plan.digest != plan.digest, change
    for section, change in (("evaluate", {"workers": 7}), ("cluster", {"workers": 4}), ("sample", {"per_class": 1})):
        other = replace(cfg, **{section: replace(getattr(cfg, section), **change)})
        assert Scorer(other, None).plan == plan, change


def test_a_reference_is_written_as_adm_does_and_read_again(cfg: Config, tmp_path: Path) -> None:
    passport = read_passport(cfg.data.latents)
    extractor = open_extractor(cfg.evaluate.extractor)
    made = scoring.training_reference(cfg, passport, extractor, cfg.evaluate.images)
    path = tmp_path / "reference.npz"
    scoring.write_reference(path, cfg, passport, extractor, made)
    with np.load(path, allow_pickle=False) as archive:
        assert archive["arr_0"].shape == (members(passport.number).sum(), 8, 8, 3)
        np.testing.assert_array_equal(archive["mu"], made.side.statistics["pool"][0])
        found = extractor.extract(archive["arr_0"])["pool"]
    np.testing.assert_allclose(found, made.side.features, rtol=1e-6)
    scorer = Scorer(replace(cfg, evaluate=replace(cfg.evaluate, reference=str(path))), None)
    again = scorer._reference(lambda more: None)
    np.testing.assert_array_equal(again.side.statistics["pool"][1], made.side.statistics["pool"][1])
    np.testing.assert_allclose(again.side.features, made.side.features, rtol=1e-6)
