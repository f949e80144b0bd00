"""A real Ray cluster: our policy is asked, typed errors come back, a killed worker is replaced.

tests/chaos/test_faults.py has short forms of the first two; the budget alone is tested in test_policy.py.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from cluster import env
from diffussm.config.schema import Config
from diffussm.errors import DataError, InfrastructureError
from tests.runs import BATCH, final_losses, tiny_run

pytestmark = pytest.mark.timeout(900)  # groups of processes start several times, and a loaded machine takes minutes

STEPS = 60
"""Enough that the run is not over before a kill meets it."""


@pytest.fixture(scope="module")
def cluster() -> Any:
    import ray

    given = env.apply(Config())
    # Workers of the tests must find the tests' own modules.
    given |= {"WANDB_MODE": "disabled"}
    ray.init(
        address="local", num_cpus=4, object_store_memory=100 << 20, log_to_driver=False,
        runtime_env={"env_vars": given},
    )  # fmt: skip
    yield ray
    ray.shutdown()


def fit(cfg: Config, tmp_path: Path, hear: Any = None) -> list[dict[str, Any]]:
    from cluster.trainer import fit as really_fit

    said: list[dict[str, Any]] = []

    def announce(record: dict[str, Any]) -> None:
        said.append(record)
        if hear:
            hear(record)

    really_fit(cfg, str(tmp_path / "ray"), announce)
    return said


@pytest.mark.long
def test_a_killed_worker_is_replaced_and_the_run_ends_as_it_would(cluster: Any, tmp_path: Path) -> None:
    cfg = tiny_run(tmp_path, workers=2, images=STEPS * BATCH, checkpoint_images=3 * BATCH)
    killed = threading.Event()

    def kill_once(record: dict[str, Any]) -> None:
        if record["kind"] == "progress" and record["images"] >= 5 * BATCH and not killed.is_set():
            killed.set()
            start = json.loads((tmp_path / "runs" / "tiny" / "attempts" / "1" / "start.json").read_text())
            os.kill(start["pid"], signal.SIGKILL)

    said = fit(cfg, tmp_path, kill_once)
    assert killed.is_set()
    failures = [r for r in said if r.get("event") == "failure"]
    assert [f["decision"] for f in failures] == ["restart"]
    assert [r["images"] for r in said if r.get("event") == "resumed"]
    whole = tiny_run(tmp_path, workers=2, images=STEPS * BATCH, checkpoint_images=3 * BATCH)
    whole.name = "whole"
    fit(whole, tmp_path)
    assert len(final_losses(whole)) == STEPS
    assert final_losses(cfg) == final_losses(whole)


@pytest.mark.long
def test_a_users_error_comes_back_typed_and_is_not_retried(cluster: Any, tmp_path: Path) -> None:
    cfg = tiny_run(tmp_path)
    (tmp_path / "latents" / "passport.json").write_text("{}")
    said: list[dict[str, Any]] = []
    with pytest.raises(DataError, match="passport"):
        fit(cfg, tmp_path, said.append)
    assert [r["decision"] for r in said if r.get("event") == "failure"] == ["stop"]
    assert len(list((tmp_path / "runs" / "tiny" / "attempts").iterdir())) == 1


@pytest.mark.long
def test_losing_workers_beyond_the_budget_is_an_infrastructure_error(cluster: Any, tmp_path: Path) -> None:
    cfg = tiny_run(tmp_path, images=STEPS * BATCH)
    cfg.cluster.max_failures = 0

    def kill(record: dict[str, Any]) -> None:
        if record.get("event") == "started":
            start = json.loads((tmp_path / "runs" / "tiny" / "attempts" / "1" / "start.json").read_text())
            os.kill(start["pid"], signal.SIGKILL)

    with pytest.raises(InfrastructureError, match="max_failures=0"):
        fit(cfg, tmp_path, kill)
