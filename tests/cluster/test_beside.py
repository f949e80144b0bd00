"""Grids and evaluations while a training goes on, on a real cluster; the training only says what it saved."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from cluster import env, scoring
from cluster.beside import Beside, room
from cluster.evaluate import JOURNAL, Job
from cluster.scoring import checked_passport
from diffussm.checkpoint import retain
from diffussm.checkpoint.store import LocalStore, Store
from diffussm.config.schema import ClusterConfig, Config, EvaluateConfig
from diffussm.naming import grid_key
from diffussm.observe.events import read_journal
from diffussm.sample import Painter, paint_grid
from tests.evaluations import BATCH, agreed, results


@pytest.fixture(scope="module")
def cfg(scored: Config) -> Config:
    return replace(scored, evaluate=replace(scored.evaluate, every_images=4 * BATCH))


@pytest.fixture(scope="module")
def cluster(cfg: Config) -> Iterator[None]:
    ray.init(
        address="local", num_cpus=2, runtime_env={"env_vars": env.apply(cfg)}, object_store_memory=100 << 20,
        log_to_driver=False, logging_level="warning", include_dashboard=False,
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture
def store(cfg: Config) -> Store:
    found = LocalStore(f"{cfg.storage}/{cfg.name}")
    for key in [*found.keys("evaluations"), *found.keys("samples")]:
        found.delete(key)
    return found


def saved(images: int, tier: str = "storage") -> dict[str, Any]:
    return {"kind": "event", "event": "saved", "images": images, "tier": tier}


def evaluated(store: Store) -> list[int]:
    return [line["images"] for line in read_journal(store, JOURNAL) if line["event"] == "evaluated"]


def test_there_is_room_only_for_what_the_training_never_takes() -> None:
    cfg = Config(cluster=ClusterConfig(workers=8, gpus_per_worker=1, cpus_per_worker=4), evaluate=EvaluateConfig())
    assert room({"CPU": 999, "GPU": 8}, cfg) == 0
    assert room({"CPU": 999, "GPU": 10}, cfg) == 2
    assert room({"CPU": 36, "GPU": 10}, cfg) == 1
    assert room({"CPU": 999, "GPU": 64}, cfg) == 8
    assert room({"CPU": 4}, cfg) == 0
    cfg.cluster.gpus_per_worker = 0
    assert room({"CPU": 41}, cfg) == 2


def test_an_evaluation_gives_way_when_the_training_needs_its_place(
    cfg: Config, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a group that lost a node would wait for the evaluation's CPUs until its start is given up."""
    scoring.keep_weights(cfg, store, 4 * BATCH)
    spare = [3, 1, 2]
    """Room for an evaluation: at its start, after a node was lost, and when it is back."""
    tried: list[int] = []

    def on_ray(self: Job, count: int) -> Any:
        tried.append(count)
        while len(tried) == 1:
            self.check_stop()
        return FakeResult()

    class FakeResult:
        def line(self) -> str:
            return "FD = 1"

        def record(self) -> dict[str, Any]:
            return {"images": 4 * BATCH}

    monkeypatch.setattr("cluster.beside.LOOK_S", 0.0)
    monkeypatch.setattr("cluster.beside.room", lambda resources, cfg: spare.pop(0) if spare else 2)
    monkeypatch.setattr("cluster.nodes.nodes", list)
    monkeypatch.setattr(Job, "on_ray", on_ray)
    said: list[dict[str, Any]] = []
    told = threading.Event()

    def hear(record: dict[str, Any]) -> None:
        said.append(record)
        told.set()

    beside = Beside(cfg, store, hear)
    assert told.wait(60)
    beside.close(finish=True)
    assert tried == [3, 2]
    assert [record["line"] for record in said] == ["FD = 1"]
    assert scoring.kept(store) == []


def test_whatever_goes_wrong_with_weights_the_end_does_not_wait_for_ever(
    cfg: Config, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep(*arguments: Any) -> bool:
        raise MemoryError("no room for the weights")

    monkeypatch.setattr(scoring, "keep_weights", keep)
    said: list[dict[str, Any]] = []

    def hear(record: dict[str, Any]) -> None:
        said.append(record)
        raise SystemExit if len(said) == 2 else BrokenPipeError

    beside = Beside(cfg, store, hear)
    for images in (4 * BATCH, 6 * BATCH):
        beside.hear(saved(images))
    beside.close(finish=True)
    assert [(record["event"], record["reason"]) for record in said] == [
        ("evaluation skipped", "MemoryError: no room for the weights")
    ] * 2


@pytest.mark.usefixtures("cluster")
def test_checkpoints_that_are_due_are_evaluated_though_the_training_deletes_them(cfg: Config, store: Store) -> None:
    said: list[dict[str, Any]] = []
    copied = threading.Event()

    keep = scoring.keep_weights

    def keeping(*arguments: Any) -> bool:
        done = keep(*arguments)
        copied.set()
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "keep_weights", keeping)
        beside = Beside(cfg, store, said.append)
        for images in (2 * BATCH, 4 * BATCH, 6 * BATCH):
            beside.hear(saved(images))
        beside.hear({"kind": "progress", "images": 1})
        beside.hear(saved(5 * BATCH, tier="local"))
        assert copied.wait(60)
        held = {key: store.read(key) for key in store.keys(f"checkpoints/{4 * BATCH:012d}/")}
        retain.delete(store, f"checkpoints/{4 * BATCH:012d}")
        beside.hear(saved(8 * BATCH))  # the end: the stage after the training evaluates it
        beside.close(finish=True)
    assert evaluated(store) == [4 * BATCH]
    assert len(said) == 1
    assert said[0]["kind"] == "evaluation"
    assert said[0]["images"] == 4 * BATCH
    assert said[0]["line"].startswith("FD-Channels = ")
    assert scoring.kept(store) == []
    beside_result = next(iter(results(cfg).values()))
    for key, data in held.items():
        store.write(key, data)
    for key in list(store.keys("evaluations")):
        store.delete(key)
    alone = Job(cfg, store, 4 * BATCH, say=lambda line: None).here()
    assert agreed(beside_result)["scores"] == {
        name: score | {"interval": list(score["interval"])} for name, score in alone.scores.items()
    }


@pytest.mark.usefixtures("cluster")
def test_what_a_killed_start_leaves_is_done_by_the_next(cfg: Config, store: Store) -> None:
    scoring.keep_weights(cfg, store, 4 * BATCH)
    stopped = Beside(cfg, store, lambda line: None)
    stopped.close(finish=False)
    assert scoring.kept(store) == [4 * BATCH] or evaluated(store) == [4 * BATCH]
    following = Beside(cfg, store, lambda line: None)
    following.close(finish=True)
    assert evaluated(store) == [4 * BATCH]
    assert scoring.kept(store) == []


@pytest.mark.usefixtures("cluster")
def test_a_failed_evaluation_is_told_and_stops_nothing(cfg: Config, store: Store) -> None:
    wrong = replace(cfg, evaluate=replace(cfg.evaluate, extractor="no.such:network"))
    said: list[dict[str, Any]] = []
    beside = Beside(wrong, store, said.append)
    beside.hear(saved(4 * BATCH))
    beside.hear(saved(999))  # there is no such checkpoint, and it is not due either once 4 batches were taken
    beside.close(finish=True)
    (failed,) = [record for record in said if record["event"] == "evaluation failed"]
    assert failed["images"] == 4 * BATCH
    assert "No module named" in failed["reason"]
    assert scoring.kept(store) == [4 * BATCH]  # for the next start
    assert any(line["event"] == "evaluation failed" for line in read_journal(store, JOURNAL))


@pytest.mark.usefixtures("cluster")
def test_grids_are_drawn_of_checkpoints_that_are_due_and_of_what_a_start_left(cfg: Config, store: Store) -> None:
    drawing = replace(
        cfg, sample=replace(cfg.sample, every_images=4 * BATCH), evaluate=replace(cfg.evaluate, every_images=0)
    )
    said: list[dict[str, Any]] = []
    scoring.keep_weights(cfg, store, 2 * BATCH, "samples")  # as a killed start leaves them
    beside = Beside(drawing, store, said.append)
    for images in (2 * BATCH, 4 * BATCH, 6 * BATCH, 8 * BATCH):  # the last is of the stage after the training
        beside.hear(saved(images))
    beside.close(finish=True)
    assert [(record["kind"], record["images"]) for record in said] == [("picture", 2 * BATCH), ("picture", 4 * BATCH)]
    assert list(store.keys("samples")) == [grid_key(2 * BATCH), grid_key(4 * BATCH)]
    painter = Painter.load(cfg, store, checked_passport(cfg), 4 * BATCH)
    torch.set_num_threads(cfg.cluster.threads_per_worker)
    drawn, expected = (Image.open(io.BytesIO(png)) for png in (said[1]["png"], paint_grid(painter)[0]))
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))  # of that checkpoint, as `diffussm sample` draws it
    assert store.read(grid_key(4 * BATCH)) == said[1]["png"]

    again = Beside(drawing, store, said.append)
    again.hear(saved(6 * BATCH))  # the grid before it is known by its file
    again.close(finish=True)
    assert len(said) == 2
