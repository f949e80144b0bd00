"""Real training on real Slurm daemons: two nodes, preempted by a higher partition, resumed, the same result."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffussm.config import dump, load
from tests.e2e import undisturbed
from tests.runs import BATCH, final_losses, tiny_run
from tests.slurm import SlurmCluster

STEPS = 600
NEVER = 10**9
WAIT_S = 400


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run that saves only when it is told to go, so that resuming shows that save."""
    cfg = tiny_run(tmp_path, workers=2, images=STEPS * BATCH, checkpoint_images=NEVER)
    cfg.train.ema_snapshot_images = NEVER
    cfg.cluster.workers_per_node, cfg.evaluate.enabled = 1, False
    cfg.slurm.logs, cfg.slurm.time_s, cfg.slurm.warning_s = str(tmp_path / "logs"), 1800, 60
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(cfg))
    return path


def events(root: Path) -> list[dict[str, Any]]:
    path = root / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_preempted_run_ends_as_if_nothing_had_happened(
    slurm_cluster: SlurmCluster, config: Path, tmp_path: Path
) -> None:
    cluster, cfg = slurm_cluster, load(config)
    root, metrics = tmp_path / "runs" / "tiny", tmp_path / "runs" / "tiny" / "metrics.jsonl"

    def steps() -> list[dict[str, Any]]:
        return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []

    def log() -> str:
        return "\n".join(path.read_text() for path in (tmp_path / "logs").glob("*.log"))

    said = cluster.diffussm("submit", str(config)).stdout
    job = said.split("job ")[1].split()[0]
    try:
        cluster.wait(lambda: len(steps()) > STEPS // 6, "a hundred steps", WAIT_S)
        warned = time.time()
        cluster.run("sbatch", "--parsable", "-p", "high", "-N2", "--exclusive", "--wrap=sleep 1", "-o/dev/null")
        saved = cluster.wait(lambda: [e for e in events(root) if e["event"] == "saved"], "a save", WAIT_S)[0]
        cluster.wait(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), "the end", WAIT_S)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log()[-4000:]}") from error
    assert cluster.state(job) == "COMPLETED", log()[-4000:]

    resumed = next(e for e in events(root) if e["event"] == "resumed")
    assert resumed["images"] == saved["images"] < STEPS * BATCH
    again = [line for line in steps() if line["attempt"] == 2]
    assert again[0]["images"] == saved["images"] + BATCH  # nothing is lost, nothing is done twice
    requeued = log().index("put into the queue again")
    assert "asked to leave by SIGUSR1" in log()[:requeued]
    print(log())
    print(f"warning to saved: {saved['time'] - warned:.1f} s")
    print(f"saved to the next step: {again[0]['time'] - saved['time']:.1f} s")

    undisturbed.run(config, tmp_path / "scratch", 2)
    other = load(config, ["name=undisturbed"])
    assert final_losses(cfg) == final_losses(other)
    ours, theirs = undisturbed.state(cfg, "tiny"), undisturbed.state(cfg, undisturbed.NAME)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert yaml.safe_load((root / "config.yaml").read_text())["name"] == "tiny"
    finished = cluster.diffussm("status", "tiny").stdout
    assert "finished" in finished

    again_job = cluster.diffussm("submit", str(config)).stdout.split("job ")[1].split()[0]
    cluster.wait(lambda: cluster.state(again_job) in ("COMPLETED", "FAILED"), "a no-op", WAIT_S)
    assert cluster.state(again_job) == "COMPLETED", log()[-4000:]
    assert "is finished: nothing to do" in log()
