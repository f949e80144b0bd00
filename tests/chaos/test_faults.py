"""Real faults in a real cluster of several Ray nodes; each scenario ends as the run that was left alone.

One cluster serves the module: a head without room for workers and one node for each of two ranks, processes of this
machine. tests/chaos/test_long.py has the scenarios that take longer.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.chaos.compare import Comparison, compare
from cluster.preempt import Warnings
from diffussm.checkpoint.store import open_store
from diffussm.config import dump
from diffussm.config.schema import Config
from diffussm.errors import ConfigError, ExitCode, Preempted
from diffussm.observe.events import DRIVER, read_journal
from diffussm.train.control import Level, Wish
from tests.chaos.nodes import Nodes
from tests.runs import BATCH, metrics, tiny_run

pytestmark = pytest.mark.timeout(600)  # groups of processes start several times, and a loaded machine takes minutes

STEPS, LONG = 110, 400
"""Steps of a run, and of one that loses a node; a step takes some 30 ms."""
SAVE = 20
"""Steps between two checkpoints."""

Record = dict[str, Any]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with Nodes(workers=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def calm(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The run that is left alone, as long as the longest of the others."""
    folder = tmp_path_factory.mktemp("chaos")
    cfg = tiny_run(folder, workers=2, images=LONG * BATCH, checkpoint_images=SAVE * BATCH)
    cfg.name = "calm"
    fit(cfg)
    assert len(metrics(cfg)) == LONG
    return cfg


def named(calm: Config, name: str, steps: int = STEPS, **cluster: Any) -> Config:
    train = replace(calm.train, images=steps * BATCH)
    return replace(calm, name=name, train=train, cluster=replace(calm.cluster, **cluster))


def held_against(calm: Config, cfg: Config) -> Comparison:
    return compare([record for record in metrics(calm) if record["images"] <= cfg.train.images], metrics(cfg))


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


def test_a_killed_rank_is_replaced(calm: Config) -> None:
    cfg = named(calm, "killed")
    rank = secrets.randbelow(2)
    said = fit(cfg, once_at(50 * BATCH, lambda: os.kill(pids(cfg)[rank], signal.SIGKILL)))
    (failure,) = failures(said)
    assert failure["decision"] == "restart", failure
    assert failure["cause"] in ("worker died", "connection lost")
    assert summary(cfg)["images"] >= 50 * BATCH
    assert held_against(calm, cfg).bit_equal


def test_a_stopped_rank_is_named_with_its_phase_and_the_group_restarted(calm: Config) -> None:
    cfg = named(calm, "stopped", hang_s=8)
    said = fit(cfg, once_at(50 * BATCH, lambda: os.kill(pids(cfg)[1], signal.SIGSTOP)))
    assert [(f["cause"], f["decision"]) for f in failures(said)] == [("hang", "restart")]
    assert "rank 1" in failures(said)[0]["reason"]
    assert "its process is stopped" in failures(said)[0]["reason"]
    folder = Path(cfg.storage, cfg.name, "attempts", "1", "postmortem")
    assert "loop.py" in (folder / "stacks-rank0.txt").read_text(), "where the other rank waited"
    assert summary(cfg)["ranks"]["1"]["state"] == "stopped"
    assert held_against(calm, cfg).bit_equal


def test_a_wrong_setting_never_loops(calm: Config) -> None:
    cfg = named(calm, "refused")
    cfg.model = replace(cfg.model, backend="no-such-backend")
    said: list[Record] = []
    with pytest.raises(ConfigError, match="no-such-backend"):
        fit(cfg, said.append)
    assert [(f["cause"], f["decision"]) for f in failures(said)] == [("user's error", "stop")]
    assert len(list(Path(cfg.storage, cfg.name, "attempts").iterdir())) == 1


@pytest.mark.long
def test_an_exception_in_the_first_step_never_loops(calm: Config, tmp_path: Path) -> None:
    """The whole job, with a user's bug in a copy of the code."""
    source = Path(__file__).parents[2]
    for package in ("diffussm", "cluster"):
        shutil.copytree(source / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    step = tmp_path / "diffussm" / "train" / "step.py"
    head, line, tail = step.read_text().partition("    noisy = process.q_sample(")
    assert line
    step.write_text(f"{head}    {{}}['a key of a user']\n{line}{tail}")
    cfg = named(calm, "wrong")
    (tmp_path / "config.yaml").write_text(dump(cfg))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cluster.driver", "--only", "train", str(tmp_path / "config.yaml")],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == ExitCode.INTERNAL, done.stderr[-4000:]
    assert "KeyError: 'a key of a user'" in done.stderr
    said = read_journal(open_store(str(Path(cfg.storage, cfg.name))), DRIVER)
    (failure,) = [record for record in said if record["event"] == "failure"]
    assert (failure["cause"], failure["decision"]) == ("exception", "stop")
    assert "before the first step was done" in failure["reason"]
    assert not Path(cfg.storage, cfg.name, "attempts", "2").exists()


def test_a_warning_makes_all_ranks_save_and_the_next_start_goes_on_at_that_step(calm: Config) -> None:
    cfg = named(calm, "warned")
    warnings = Warnings(grace_s=30)

    def warn() -> None:
        warnings.wish = Wish(Level.LEAVE, time.time() + 30, "SIGTERM to the driver")

    with pytest.raises(Preempted, match="saved at"):
        fit(cfg, once_at(50 * BATCH, warn), warnings)
    stopped = max(record["images"] for record in metrics(cfg))
    assert stopped < STEPS * BATCH
    said = fit(cfg)
    assert [record["images"] for record in said if record.get("event") == "resumed"] == [stopped], "no step is lost"
    assert held_against(calm, cfg).bit_equal


def test_a_lost_node_shrinks_the_group_and_a_new_one_lets_it_grow_again(calm: Config, nodes: Nodes) -> None:
    cfg = named(calm, "elastic", LONG, min_workers=1)
    returned = threading.Event()
    lose = once_at(50 * BATCH, lambda: nodes.kill(pids(cfg)[1]))

    def hear(record: Record) -> None:
        lose(record)
        if record.get("event") == "resumed" and record.get("world_size") == 1 and not returned.is_set():
            returned.set()
            nodes.add()

    said = fit(cfg, hear)
    sizes = [record["world_size"] for record in said if record.get("event") in ("started", "resumed")]
    assert sizes == [2, 1, 2], [record for record in said if record["kind"] != "progress"]
    causes = [(f["cause"], f["decision"]) for f in failures(said)]
    assert causes == [("node lost", "shrink"), ("regroup", "grow")]
    result = held_against(calm, cfg)
    assert result.equal, str(result)


@pytest.mark.long
def test_the_ranks_leave_a_drained_node_in_time_and_the_others_go_on(calm: Config, nodes: Nodes) -> None:
    """SIGTERM to a node's `ray start --block`, as an eviction sends it."""
    nodes.wait(2)
    cfg = named(calm, "drained", min_workers=1)
    said = fit(cfg, once_at(50 * BATCH, lambda: nodes.warn(pids(cfg)[1])))
    assert [(f["cause"], f["decision"]) for f in failures(said)] == [("preemption", "shrink")]
    starts = [record for record in said if record.get("event") in ("started", "resumed")]
    assert [record["world_size"] for record in starts] == [2, 1]
    left = max(record["images"] for record in metrics(cfg) if record["attempt"] == 1)
    assert starts[1]["images"] == left, "no step is lost"
    result = held_against(calm, cfg)
    assert result.equal, str(result)
