"""Costs of a run: they move the way they must, and the recommendation is the best of all that fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffussm.config import Config, load
from diffussm.config.plan import Batching, is_legal
from diffussm.config.plan import layout as asked
from diffussm.errors import ConfigError
from diffussm.model.footprint import USABLE
from launch.estimate import Estimator, Layout, network_bytes
from launch.latent import latent

RECIPE = Path(__file__).parents[2] / "configs" / "imagenet-256.yaml"


def planned(*overrides: str) -> Estimator:
    cfg = load(RECIPE, overrides)
    known = latent(cfg)
    assert known is not None
    return Estimator.of(cfg, known)


def test_the_time_is_that_of_the_multiply_adds() -> None:
    """One card, no network: by hand from the counts."""
    plan = planned("plan.efficiency=0.5", "cluster.workers=1", "train.images=2560", "checkpoint.every_images=2560")
    counts = plan.counts()
    found = plan.estimate(Layout(1, 1, 1, 32, False))
    step_s = 8 * 6 * (32 * counts.macs + counts.kernel_macs) / (0.5 * 989e12)
    assert found.step_s == pytest.approx(step_s)
    assert found.passes == 8
    assert found.steps == 10
    assert found.train_s == pytest.approx(10 * step_s)
    assert found.network_bytes_per_step == 0
    recomputed = plan.estimate(Layout(1, 1, 1, 32, True))
    assert recomputed.step_s == pytest.approx(step_s * 4 / 3)


def test_money_is_hours_times_price() -> None:
    plan = planned("plan.gpu_hour_price=2", "evaluate.enabled=false")
    found = plan.estimate(plan.configured())
    assert found.train_s is not None
    assert found.gpu_hours == pytest.approx(8 * found.train_s / 3600)
    assert found.price == pytest.approx(2 * found.gpu_hours)
    scored = planned("plan.gpu_hour_price=2")
    assert scored.estimate(scored.configured()).gpu_hours > found.gpu_hours  # type: ignore[operator]


def test_guidance_doubles_the_drawing() -> None:
    plain, guided = planned("sample.guidance=1"), planned("sample.guidance=1.5")
    one, two = (plan.estimate(plan.configured()).evaluate_gpu_s for plan in (plain, guided))
    assert two == pytest.approx(2 * one)  # type: ignore[operator]


def test_a_score_is_drawn_in_whole_blocks_by_all_workers() -> None:
    """By hand: 50,000 pictures are 196 blocks of 256, so the busiest of 64 workers draws 4 of them."""
    plan = planned("plan.efficiency=0.5", "sample.guidance=1.5", "sample.steps=10")
    picture_s = 2 * 10 * 2 * plan.counts().macs / (0.5 * 989e12)
    for workers, share in ((1, 50_000), (8, 25 * 256), (64, 4 * 256), (256, 256)):
        found = plan.estimate(Layout(workers, 1, 1, 1, False))
        assert found.score_s == pytest.approx(share * picture_s), workers
        assert found.evaluate_gpu_s == pytest.approx(50_000 * picture_s)
    own = planned("plan.efficiency=0.5", "sample.guidance=1.5", "sample.steps=10", "evaluate.workers=8")
    assert own.estimate(Layout(64, 1, 1, 1, False)).score_s == pytest.approx(25 * 256 * picture_s)


def test_scores_while_the_training_goes_on_are_paid_too() -> None:
    one = planned("train.images=1_000_000")
    assert one.scores == 1
    five = planned("train.images=1_000_000", "evaluate.every_images=200_000", "checkpoint.every_images=200_000")
    assert five.scores == 5  # at 200, 400, 600, 800 thousand, and at the end
    costs = [plan.estimate(plan.configured()).evaluate_gpu_s for plan in (one, five)]
    assert costs[1] == pytest.approx(5 * costs[0])  # type: ignore[operator]
    assert planned("evaluate.enabled=false").scores == 0


@pytest.mark.parametrize(("stage", "rounds"), [(0, 2), (1, 2), (2, 5), (3, 12)])
def test_network_bytes_by_stage(stage: int, rounds: int) -> None:
    assert network_bytes(1000, 4, stage, passes=4) == rounds * 3000
    assert network_bytes(1000, 1, stage, passes=4) == 0


def test_a_checkpoint_holds_master_moments_and_averages() -> None:
    assert planned("train.power_ema=[]").checkpoint_bytes == 16 * planned().counts().parameters
    assert planned("train.power_ema=[0.05, 0.1]").checkpoint_bytes == 24 * planned().counts().parameters


def test_the_recommendation_is_the_quickest_that_fits() -> None:
    plan = planned("plan.machine=A100", "data.resolution_px=512")
    best = plan.recommend(16)
    assert best is not None
    assert best.fits
    assert plan.card is not None
    for layout in plan.candidates(16):
        other = plan.estimate(layout)
        fits = other.memory.peak <= USABLE * plan.card.memory_bytes
        assert other.fits == fits
        if fits:
            assert other.step_s >= best.step_s - 1e-4  # type: ignore[operator]
    assert best.layout.nodes == 2


def test_recomputation_is_chosen_only_where_nothing_else_fits() -> None:
    roomy = planned().recommend(8)
    assert roomy is not None
    assert not roomy.layout.recompute
    wide = planned("model.width=4096", "data.resolution_px=512", "plan.machine=A100").recommend(256)
    assert wide is not None
    assert wide.layout.stage > 0


def test_candidates_are_legal_and_none_are_offered_for_an_illegal_size() -> None:
    plan = planned()
    for layout in plan.candidates(64):
        assert is_legal(Batching.of(plan.cfg), layout.nodes, 64 // layout.nodes)
        assert 64 * layout.micro_batch * layout.passes(256) == 256
    assert list(plan.candidates(96)) == []
    assert plan.recommend(96) is None


def test_on_cpus_there_is_memory_but_no_time() -> None:
    cfg = Config(name="a")
    cfg.data.latents, cfg.data.resolution_px, cfg.data.classes = "latents", 32, ["x"]
    cfg.train.images, cfg.model.preset = 1000, "tiny"
    known = latent(cfg)
    assert known is not None
    plan = Estimator.of(cfg, known)
    found = plan.estimate(plan.configured())
    assert (found.step_s, found.price, found.fits) == (None, None, None)
    assert found.memory.peak > 0
    assert plan.recommend(1) is None
    assert found.plain()["peak_bytes"] == found.memory.peak


def test_an_estimate_is_that_of_the_nodes_which_submit_asks_for() -> None:
    """Sixteen workers with half a GPU each share a node of eight: the network between nodes is not used."""
    halves = planned("cluster.workers=16", "cluster.gpus_per_worker=0.5")
    assert halves.configured().nodes == asked(halves.cfg)[0] == 1
    assert halves.nodes(32) == 2
    whole = planned("cluster.workers=16", "cluster.workers_per_node=4")
    assert whole.configured().nodes == asked(whole.cfg)[0] == 4
    crowded = planned("cluster.workers=64")
    with pytest.raises(ConfigError, match=r"allowed: plan\.gpus_per_node=8"):
        crowded.configured()


def test_the_last_snapshot_is_that_of_the_end() -> None:
    odd = planned("train.images=1000", "train.ema_snapshot_images=300", "train.power_ema=[0.05]")
    assert odd.snapshot_bytes == 4 * 2 * odd.counts().parameters
