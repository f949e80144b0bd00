"""Real faults in a real cluster of several Ray nodes; each scenario ends as the run that was left alone.

One cluster serves the module: a head without room for workers and one node for each of two ranks, processes of this
machine. tests/chaos/test_long.py has the scenarios that take longer.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.chaos.compare import compare
from cluster.preempt import Warnings
from diffussm.config.schema import Config
from diffussm.errors import Preempted
from diffussm.train.control import Level, Wish
from tests.chaos.nodes import Nodes
from tests.runs import BATCH, metrics, tiny_run

STEPS = 24
SAVE = 4

Record = dict[str, Any]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with Nodes(workers=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def calm(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The run that is left alone."""
    folder = tmp_path_factory.mktemp("chaos")
    cfg = tiny_run(folder, workers=2, images=STEPS * BATCH, checkpoint_images=SAVE * BATCH)
    cfg.name = "calm"
    fit(cfg)
    assert len(metrics(cfg)) == STEPS
    return cfg


def named(calm: Config, name: str, **cluster: Any) -> Config:
    return replace(calm, name=name, cluster=replace(calm.cluster, **cluster))


def fit(
    cfg: Config, hear: Callable[[Record], None] = lambda record: None, warnings: Warnings | None = None
) -> list[Record]:  # fmt: skip
    from cluster.trainer import fit as really_fit

    said: list[Record] = []

    def announce(record: Record) -> None:
        said.append(record)
        hear(record)

    really_fit(cfg, str(Path(cfg.storage).parent / f"ray-{cfg.name}"), announce, warnings)
    return said


def once_at(images: int, act: Callable[[], None]) -> Callable[[Record], None]:
    """Call `act` when so many images are logged for the first time."""
    done = threading.Event()

    def hear(record: Record) -> None:
        if record["kind"] == "progress" and record["images"] >= images and not done.is_set():
            done.set()
            act()

    return hear


def pids(cfg: Config, attempt: int = 1) -> dict[int, int]:
    file = Path(cfg.storage, cfg.name, "attempts", str(attempt), "ranks.json")
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, "no places"
        time.sleep(0.05)
    return {int(rank): place["pid"] for rank, place in json.loads(file.read_text()).items()}


def failures(said: list[Record]) -> list[Record]:
    return [record for record in said if record.get("event") == "failure"]


def summary(cfg: Config, attempt: int = 1) -> Record:
    return json.loads(Path(cfg.storage, cfg.name, "attempts", str(attempt), "postmortem", "summary.json").read_text())


def test_a_stopped_rank_is_named_with_its_phase_and_the_group_restarted(calm: Config) -> None:
    cfg = named(calm, "stopped", hang_s=12)
    act = lambda: threading.Thread(target=lambda: os.kill(pids(cfg)[1], signal.SIGSTOP)).start()  # noqa: E731
    said = fit(cfg, once_at(6 * BATCH, act))
    assert [(f["cause"], f["decision"]) for f in failures(said)] == [("hang", "restart")]
    assert "rank 1" in failures(said)[0]["reason"]
    assert "its process is stopped" in failures(said)[0]["reason"]
    folder = Path(cfg.storage, cfg.name, "attempts", "1", "postmortem")
    assert "loop.py" in (folder / "stacks-rank0.txt").read_text(), "where the other rank waited"
    assert summary(cfg)["ranks"]["1"]["state"] == "stopped"
    assert compare(metrics(calm), metrics(cfg)).bit_equal


def test_a_warning_makes_all_ranks_save_and_the_next_start_goes_on_at_that_step(calm: Config) -> None:
    cfg = named(calm, "warned")
    warnings = Warnings(grace_s=30)

    def warn() -> None:
        warnings.wish = Wish(Level.LEAVE, time.time() + 30, "SIGTERM to the driver")

    with pytest.raises(Preempted, match="saved at"):
        fit(cfg, once_at(5 * BATCH, warn), warnings)
    stopped = max(record["images"] for record in metrics(cfg))
    assert stopped < STEPS * BATCH
    said = fit(cfg)
    assert [record["images"] for record in said if record.get("event") == "resumed"] == [stopped], "no step is lost"
    assert compare(metrics(calm), metrics(cfg)).bit_equal


def test_a_lost_node_shrinks_the_group_and_a_new_one_lets_it_grow_again(calm: Config, nodes: Nodes) -> None:
    cfg = named(calm, "elastic", min_workers=1)
    cfg.train = replace(cfg.train, images=4 * STEPS * BATCH)
    long = named(calm, "calm")
    long.train = cfg.train
    fit(long)  # the calm run goes on as far as this one will
    returned = threading.Event()

    def hear(record: Record) -> None:
        lose(record)
        alone = record.get("event") in ("resumed", "started") and record.get("world_size") == 1
        if alone and not returned.is_set():
            returned.set()
            threading.Thread(target=nodes.add).start()

    lose = once_at(6 * BATCH, lambda: nodes.kill(pids(cfg)[1]))
    said = fit(cfg, hear)
    sizes = [record["world_size"] for record in said if record.get("event") in ("started", "resumed")]
    assert sizes == [2, 1, 2]
    causes = [(f["cause"], f["decision"]) for f in failures(said)]
    assert causes == [("node lost", "shrink"), ("regroup", "grow")]
    result = compare(metrics(long), metrics(cfg))
    assert result.equal, str(result)
