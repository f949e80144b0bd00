"""What telemetry says against the same taken from whole tensors, and that it changes nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from diffussm.checkpoint.manifest import Counters
from diffussm.config.schema import Config, ObserveConfig
from diffussm.data.passport import FILE, Passport
from diffussm.model.counts import count
from diffussm.observe.goodput import CAUSES
from diffussm.train import loop
from diffussm.train.ema import Averages
from diffussm.train.engine import Engine
from diffussm.train.telemetry import Telemetry, TimestepLosses, block_of
from diffussm.train.world import current
from tests.diffussm.train.test_engine import BATCH, config, data, losses, net, whole
from tests.runs import BATCH as RUN_BATCH
from tests.runs import final_losses, metrics, tiny_run


def test_parameters_belong_to_blocks() -> None:
    assert [block_of(n) for n in ("stem.weight", "blocks.11.ssm.log_dt", "head.linear.bias")] == [
        "stem", "blocks.11", "head",
    ]  # fmt: skip


@pytest.mark.world_size(2)
def test_losses_are_means_by_quartile_over_ranks_and_steps_that_stand() -> None:
    told = TimestepLosses(1000, torch.device("cpu"))
    rank = dist.get_rank()
    told.note(torch.tensor([1.0, 2.0, 8.0]) + rank, torch.tensor([0, 249, 250]))
    told.end_step(skipped=False)
    told.note(torch.tensor([float("nan")]), torch.tensor([999]))
    told.end_step(skipped=True)
    told.note(torch.tensor([5.0]), torch.tensor([999]))
    told.end_step(skipped=False)
    assert told.take() == {"loss_q1": 2.0, "loss_q2": 8.5, "loss_q4": 5.0}
    assert told.take() == {}


@pytest.mark.world_size(2)
def test_norms_and_distances_are_those_of_whole_tensors_under_every_stage() -> None:
    for stage in range(4):
        cfg = Config(name="x", train=config(stage, ema=0.5), observe=ObserveConfig(telemetry_images=2 * BATCH))
        engine = Engine(net(), cfg.train, 2, current(torch.device("cpu")))
        averages = Averages(engine.slices(), cfg.train)
        telemetry = Telemetry(cfg, engine, averages)
        assert telemetry.blocks == ["scale", "a", "b"]
        record: dict[str, Any] | None = None
        for step in range(2):
            images = (step + 1) * BATCH
            measure = telemetry.gradients if telemetry.due(images) else None
            assert (measure is not None) == (step == 1)
            before = {name: tensor.clone() for name, tensor in whole(engine, "master").items()}
            result = engine.step(losses(step, 2), 1e-2, measure=measure)
            averages.update(images)
            record = telemetry.step(Counters(images, step + 1, 0, 0, step + 1, 0), skipped=False)
        assert record is not None
        total = math.sqrt(sum(norm**2 for norm in record["grad_norm"].values()))
        assert total == pytest.approx(result.grad_norm, rel=1e-5)
        model = net()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name])
        shares = [x for r in range(2) for x in _of_rank(r, 1)]
        (sum(model(x).pow(2).mean() for x in shares) / len(shares)).backward()
        for block, module in (("a", model.a), ("b", model.b)):
            norm = torch.cat([p.grad.flatten() for p in module.parameters()]).norm()
            assert record["grad_norm"][block] == pytest.approx(float(norm), rel=1e-5)
        weights = whole(engine, "master")
        for block in telemetry.blocks:
            norm = torch.cat([t.flatten() for n, t in weights.items() if block_of(n) == block]).norm()
            assert record["param_norm"][block] == pytest.approx(float(norm), rel=1e-6)
        assert 0 < record["ema_distance"]["ema-plain"] < 0.1
        (node,) = record["nodes"].values()
        assert node["rss_gb"] > 0


def _of_rank(rank: int, step: int) -> list[torch.Tensor]:
    return list(data(step).chunk(2)[rank].chunk(2))


@pytest.mark.world_size(1)
def test_a_run_tells_it_and_stays_the_same_run(tmp_path: Path) -> None:
    cfg = tiny_run(tmp_path, images=6 * RUN_BATCH)
    silent = replace(cfg, name="silent", observe=replace(cfg.observe, telemetry_images=0))
    telling = replace(cfg, name="telling", observe=replace(cfg.observe, telemetry_images=4 * RUN_BATCH))
    heard: list[dict[str, Any]] = []
    for each in (silent, telling):
        loop.train(each, current(torch.device("cpu")), 1, tmp_path / "scratch", heard.append)
    assert final_losses(telling) == final_losses(silent)
    assert not any("loss_q1" in line for line in metrics(silent))
    lines = metrics(telling)
    for line in lines:
        found = [line[f"loss_q{i}"] for i in range(1, 5) if f"loss_q{i}" in line]
        assert min(found) <= line["loss"] <= max(found)
    latents = Passport.from_json((Path(cfg.data.latents) / FILE).read_text(), FILE)
    macs = count(telling.model, latents.latent).training_macs(RUN_BATCH)
    started = [r for r in heard if r.get("event") == "started"][-1]
    assert "measured" in started["peak"]
    for line in lines:
        assert line["macs_per_s"] == pytest.approx(line["images_per_s"] * macs, rel=1e-2)
        assert line["mfu"] == pytest.approx(line["macs_per_s"] / started["peak_macs_per_s"], abs=1e-4)
    text = (Path(telling.storage) / "telling" / "telemetry.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    assert [record["images"] for record in records] == [4 * RUN_BATCH, 6 * RUN_BATCH]
    by_images = {line["images"]: line for line in lines}
    for record in records:
        assert set(record["grad_norm"]) == {"stem", "timestep", "label", "blocks.0", "blocks.1", "head"}
        total = math.sqrt(sum(norm**2 for norm in record["grad_norm"].values()))
        assert total == pytest.approx(by_images[record["images"]]["grad_norm"], rel=1e-4)
        assert set(record["ema_distance"]) == {"ema-plain", "ema-power-0.050", "ema-power-0.100"}
        assert 0 < record["goodput"] <= 1
        assert record["goodput_seconds"]["start"] > 0
        assert set(record["goodput_seconds"]) == set(CAUSES)
    assert [r["images"] for r in heard if r["kind"] == "telemetry"] == [4 * RUN_BATCH, 6 * RUN_BATCH]


@pytest.mark.world_size(1)
def test_a_block_whose_gradient_is_not_finite_is_named_and_told_once(tmp_path: Path) -> None:
    cfg = tiny_run(tmp_path, images=3 * RUN_BATCH)
    cfg.observe.telemetry_images = RUN_BATCH
    heard: list[dict[str, Any]] = []
    true_loss = loop.loss
    patch = pytest.MonkeyPatch()
    with patch.context() as poisoned:
        poisoned.setattr(loop, "loss", lambda *args, **named: true_loss(*args, **named) * float("nan"))
        loop.train(cfg, current(torch.device("cpu")), 1, tmp_path / "scratch", heard.append)
    told = [r for r in heard if r.get("event") == "non-finite step"]
    assert [r["images"] for r in told] == [RUN_BATCH]
    record = next(r for r in heard if r["kind"] == "telemetry")
    assert record["grad_norm"]["head"] is None
    assert record["param_norm"]["head"] >= 0
    assert record["nonfinite_steps"] == 1
