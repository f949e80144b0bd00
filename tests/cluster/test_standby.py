"""A real Ray cluster: the processes that waited beside the ranks take over when one of them is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import env
from cluster.preempt import Warnings
from cluster.standby import Standby
from diffussm.config.schema import Config
from diffussm.errors import Preempted
from diffussm.train.control import Level, Wish
from tests.runs import BATCH, tiny_run

STEPS = 100_000
"""More than the run takes before the standby processes are there; it is asked to leave as soon as they work."""


def rank_processes(raylet: int) -> set[int]:
    """Processes of this raylet that are ranks or wait to be."""
    found = set()
    for child in psutil.Process(raylet).children():
        try:
            if child.environ().get(env.RANK_PROCESS.name):
                found.add(child.pid)
        except psutil.Error:  # it ended meanwhile
            continue
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray

    given = env.apply(Config()) | {"WANDB_MODE": "disabled"}
    ray.init(
        address="local", num_cpus=4, object_store_memory=100 << 20, log_to_driver=False,
        runtime_env={"env_vars": given, "worker_process_setup_hook": env.WARM},
    )  # fmt: skip
    yield ray
    ray.shutdown()


@pytest.mark.timeout(600)
def test_processes_that_waited_become_the_next_ranks(cluster: Any, tmp_path: Path) -> None:
    from cluster.trainer import fit

    cfg = tiny_run(tmp_path, workers=2, images=STEPS * BATCH, checkpoint_images=50 * BATCH)
    cfg.cluster.standby = True
    attempts = Path(cfg.storage, cfg.name, "attempts")
    waiting: set[int] = set()
    killed = threading.Event()
    warnings = Warnings(grace_s=60)

    def ranks(attempt: int) -> set[int]:
        file = attempts / str(attempt) / "ranks.json"
        return {place["pid"] for place in json.loads(file.read_text()).values()} if file.exists() else set()

    def hear(record: dict[str, Any]) -> None:
        if killed.is_set():
            if ranks(2):
                warnings.wish = Wish(Level.LEAVE, time.time() + 60, "seen enough")
        elif record["kind"] == "progress" and (now := ranks(1)):
            found = rank_processes(psutil.Process(min(now)).ppid()) - now
            if len(found) == 2:
                waiting.update(found)
                killed.set()
                os.kill(min(now), signal.SIGKILL)

    with pytest.raises(Preempted):
        fit(cfg, str(tmp_path / "ray"), hear, warnings)
    assert killed.is_set()
    assert ranks(2) == waiting


def test_nothing_is_asked_before_a_step_nor_unless_wanted_nor_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    there = threading.Event()
    monkeypatch.setattr("cluster.standby.ask", lambda: (asked.append(time.monotonic()), there.set()))
    Standby(wanted=False).look(5)
    standby = Standby(wanted=True)
    standby.look(0)
    assert not asked
    standby.look(1)
    assert there.wait(10)
    standby.look(2)
    assert not [thread for thread in threading.enumerate() if thread.name == "standby" and thread.is_alive()]
    assert len(asked) == 1


@pytest.mark.parametrize(("variables", "imported"), [({}, False), ({env.RANK_PROCESS.name: "1"}, True)])
def test_only_processes_for_ranks_import_what_ranks_need(variables: dict[str, str], imported: bool) -> None:
    program = (
        "import sys, cluster.standby as s; s.warm(); print(all(n in sys.modules for n in s.NEEDED + s.NEEDED_ON_CPU))"
    )
    given = os.environ | {"DS_ACCELERATOR": "cpu"} | variables
    done = subprocess.run([sys.executable, "-c", program], env=given, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(imported)
