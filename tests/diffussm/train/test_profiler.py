from __future__ import annotations

import gzip
import json
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from diffussm.checkpoint.store import LocalStore
from diffussm.config.schema import Config, ProfileConfig, TrainConfig
from diffussm.errors import StorageError
from diffussm.train import loop
from diffussm.train.profiler import Profiler
from diffussm.train.world import World, current
from tests.runs import BATCH, final_losses, tiny_run


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    return tiny_run(tmp_path, workers=2, images=4 * BATCH)


@pytest.mark.world_size(2)
def test_chosen_steps_are_traced_on_chosen_ranks_and_nothing_else_changes(cfg: Config, tmp_path: Path) -> None:
    calm = replace(cfg, name="calm")
    traced = replace(cfg, name="traced")
    traced.train = replace(cfg.train, profile=replace(cfg.train.profile, at_images=[BATCH + 1, 4 * BATCH], ranks=[1]))
    heard: list[dict[str, Any]] = []
    for each in (calm, traced):
        loop.train(each, current(torch.device("cpu")), 1, tmp_path / f"s{dist.get_rank()}", heard.append)
        dist.barrier()
    assert final_losses(traced) == final_losses(calm)
    folder = tmp_path / "runs" / "traced" / "profiles"
    names = ["rank1-memory.json", "rank1-operators.txt", "rank1-trace.json.gz"]
    for images in (2 * BATCH, 4 * BATCH):
        assert sorted(path.name for path in (folder / f"{images:012d}").iterdir()) == names
    assert len(list(folder.iterdir())) == 2
    trace = json.loads(gzip.decompress((folder / f"{2 * BATCH:012d}" / "rank1-trace.json.gz").read_bytes()))
    seen = {event.get("name", "") for event in trace["traceEvents"]}
    assert any("mm" in name for name in seen)
    assert any("AdamW" in name for name in seen)
    memory = json.loads((folder / f"{2 * BATCH:012d}" / "rank1-memory.json").read_bytes())
    assert max(row["bytes"] for row in memory["by_operator"]) > 1000


class Refusing(LocalStore):
    """A bucket whose policy forbids the folder."""

    def upload(self, path: Path, key: str) -> None:
        raise StorageError(f"{key}: 403 Forbidden")


class Standing(LocalStore):
    """A file system that takes nothing until it is let go."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.go = threading.Event()

    def upload(self, path: Path, key: str) -> None:
        self.go.wait()
        super().upload(path, key)


def profiler_of(rank: int, store: LocalStore, told: list[str]) -> Profiler:
    cfg = Config(train=TrainConfig(global_batch=8, profile=ProfileConfig(at_images=[8], ranks=[rank])))
    world = World(rank=rank, size=2, local_rank=rank, local_size=2, device=torch.device("cpu"))
    return Profiler(cfg, world, store, lambda event, **details: told.append(event))


def traced_step(profiler: Profiler) -> None:
    profiler.begin(8)
    torch.ones(8, 8) @ torch.ones(8, 8)
    profiler.end(8)


def test_a_store_that_refuses_is_a_warning_of_the_rank_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []
    profiler = profiler_of(1, Refusing(str(tmp_path)), told)
    with caplog.at_level(logging.WARNING, "diffussm"):
        traced_step(profiler)
        profiler.close()
    (record,) = caplog.records
    assert record.getMessage() == (
        "profiles/000000000008 of rank 1 was not stored: profiles/000000000008/rank1-memory.json: 403 Forbidden"
    )
    assert told == []


def test_a_store_that_stands_still_delays_neither_a_step_nor_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []
    store = Standing(str(tmp_path))
    profiler = profiler_of(0, store, told)
    with caplog.at_level(logging.WARNING, "diffussm"):
        traced_step(profiler)
        profiler.close(0.05)
    assert [record.getMessage() for record in caplog.records] == [
        "1 profile(s) were not stored within 0.05 s, and are left"
    ]
    assert told == []
    store.go.set()
    profiler.close()
    assert told == ["profile"]
    assert len(list(tmp_path.glob("profiles/000000000008/rank0-*"))) == 3


@pytest.mark.parametrize("ends", ["the step", "an error"])
def test_memory_is_recorded_for_the_step_alone(ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: calls.append(how))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": [], "device_traces": []})
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    monkeypatch.setattr("torch.cuda._memory_viz.trace_plot", lambda snapshot: "<html>")
    profiler = profiler_of(0, Refusing(str(tmp_path)), [])
    profiler._gpu = True
    profiler.begin(8)
    assert calls == [{"max_entries": 100_000}]
    if ends == "the step":
        profiler.end(8)
        assert calls[1:] == [{"enabled": None}]
    profiler.close()
    assert calls[1:] == [{"enabled": None}]
