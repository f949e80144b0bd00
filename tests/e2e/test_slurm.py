"""Real training on real Slurm daemons: two nodes, a run that is warned, loses a node, reaches its time limit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Training:
    """A run of two ranks, one a node, by its config, and what it leaves behind."""

    cluster: SlurmCluster
    folder: Path

    @classmethod
    def prepare(
        cls, cluster: SlurmCluster, folder: Path, checkpoint_images: int = NEVER, steps: int = STEPS
    ) -> Training:
        """Unless told otherwise it saves only when it is told to go, so that resuming shows that save."""
        cfg = tiny_run(folder, workers=2, images=steps * BATCH, checkpoint_images=checkpoint_images)
        cfg.train.ema_snapshot_images = NEVER
        cfg.cluster.workers_per_node, cfg.evaluate.enabled = 1, False
        cfg.slurm.logs, cfg.slurm.time_s, cfg.slurm.warning_s = str(folder / "logs"), 1800, 60
        training = cls(cluster, folder)
        training.config.write_text(dump(cfg))
        return training

    @property
    def config(self) -> Path:
        return self.folder / "tiny.yaml"

    @property
    def root(self) -> Path:
        return self.folder / "runs" / "tiny"

    def submit(self) -> str:
        return self.cluster.diffussm("submit", str(self.config)).stdout.split("job ")[1].split()[0]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in _records(self.root / "events.jsonl") if event["event"] == name]

    def steps(self, attempt: int = 0) -> list[dict[str, Any]]:
        """Of one attempt, or all."""
        return [line for line in _records(self.root / "metrics.jsonl") if attempt in (0, line["attempt"])]

    def log(self) -> str:
        return "\n".join(path.read_text() for path in (self.folder / "logs").glob("*.log"))

    @contextmanager
    def told(self) -> Iterator[None]:
        """What waits in vain shows the job's own output."""
        try:
            yield
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()[-4000:]}") from error

    def until_it_trains(self) -> None:
        self.cluster.wait(lambda: len(self.steps()) > STEPS // 6, "a hundred steps", WAIT_S)

    def until_the_end(self, job: str) -> None:
        self.cluster.wait(lambda: self.cluster.state(job) in ("COMPLETED", "FAILED"), "the end", WAIT_S)
        assert self.cluster.state(job) == "COMPLETED"

    def resumed(self) -> list[dict[str, Any]]:
        """Steps of the second start. They follow upon the checkpoint: nothing is left out."""
        (at,) = self.events("resumed")
        again = self.steps(2)
        assert again[0]["images"] == at["images"] + BATCH
        return again

    def equals_the_undisturbed(self) -> None:
        """Losses of every step, weights, moments and averages, bit for bit."""
        undisturbed.run(self.config, self.folder / "scratch", 2)
        cfg = load(self.config)
        assert final_losses(cfg) == final_losses(load(self.config, ["name=undisturbed"]))
        ours, theirs = undisturbed.state(cfg, "tiny"), undisturbed.state(cfg, undisturbed.NAME)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_preempted_run_ends_as_if_nothing_had_happened(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    cluster, training = slurm_cluster, Training.prepare(slurm_cluster, tmp_path)
    job = training.submit()
    with training.told():
        training.until_it_trains()
        warned = time.time()
        cluster.run("sbatch", "--parsable", "-p", "high", "-N2", "--exclusive", "--wrap=sleep 1", "-o/dev/null")
        saved = cluster.wait(lambda: training.events("saved"), "a save", WAIT_S)[0]
        training.until_the_end(job)

    again = training.resumed()
    assert training.events("resumed")[0]["images"] == saved["images"] < STEPS * BATCH  # nothing is done twice
    log = training.log()
    assert "asked to leave by SIGUSR1" in log[: log.index("put into the queue again")]
    print(log)
    print(f"warning to saved: {saved['time'] - warned:.1f} s")
    print(f"saved to the next step: {again[0]['time'] - saved['time']:.1f} s")
    training.equals_the_undisturbed()
    assert yaml.safe_load((training.root / "config.yaml").read_text())["name"] == "tiny"
    assert "finished" in cluster.diffussm("status", "tiny").stdout

    once_more = training.submit()
    with training.told():
        training.until_the_end(once_more)
    assert "is finished: nothing to do" in training.log()


@pytest.mark.parametrize("which", [0, 1], ids=["head", "other"])
def test_a_node_that_dies_costs_the_steps_since_the_checkpoint(
    slurm_cluster: SlurmCluster, tmp_path: Path, which: int
) -> None:
    """All processes of the node at once, slurmd, Ray and rank, without a warning."""
    cluster, training = slurm_cluster, Training.prepare(slurm_cluster, tmp_path, checkpoint_images=50 * BATCH)
    job = training.submit()
    with training.told():
        cluster.wait(lambda: training.events("saved"), "a checkpoint", WAIT_S)
        killed = time.time()
        cluster.kill_node(cluster.nodes[which])
        kept = training.events("saved")[-1]["images"]
        try:
            cluster.wait(lambda: cluster.state(job) != "RUNNING", "the loss to be seen")
        finally:
            cluster.start_node(cluster.nodes[which])
        seen = time.time()
        training.until_the_end(job)

    again = training.resumed()
    assert kept <= training.events("resumed")[0]["images"] < STEPS * BATCH
    print(training.log())
    print(f"killed to seen: {seen - killed:.1f} s; killed to the next step: {again[0]['time'] - killed:.1f} s")
    training.equals_the_undisturbed()


def test_a_time_limit_is_warned_of_and_the_next_job_goes_on(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    """The limit is drawn near once it trains: how long the start of a loaded machine takes nobody knows."""
    cluster, training = slurm_cluster, Training.prepare(slurm_cluster, tmp_path, steps=100 * STEPS)
    job = training.submit()

    def limit(minutes: int) -> None:
        cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    with training.told():
        training.until_it_trains()
        elapsed = cluster.run("squeue", "--noheader", f"--jobs={job}", "--Format=TimeUsed").stdout.strip()
        limit(int(elapsed.split(":")[-2]) + 2)  # 60 to 120 s from now; Slurm warns up to a minute early
        drawn = time.time()
        saved = cluster.wait(lambda: training.events("saved"), "a save", WAIT_S)[0]
        limit(60)
        cluster.wait(lambda: training.steps(2), "a step of the second start", WAIT_S)
        again = training.resumed()
        assert "asked to save and leave" in cluster.diffussm("stop", "tiny").stdout
        training.until_the_end(job)

    assert training.events("resumed")[0]["images"] == saved["images"]
    log = training.log()
    assert log.index("asked to leave by SIGUSR1") < log.index("put into the queue again")
    assert "stopped by the user" in log
    print(log)
    print(f"limit drawn near to saved: {saved['time'] - drawn:.1f} s")
    print(f"saved to the next step: {again[0]['time'] - saved['time']:.1f} s")
