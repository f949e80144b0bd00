"""Jobs on real Slurm daemons: preempted, requeued, killed, cancelled, refused. What runs inside them is a stand-in.

Real are the daemons and the batch script; Ray and the driver are played. With real training tests/e2e/test_slurm.py is
preempted, loses a node and reaches its time limit.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.slurm import SlurmCluster

STAND_IN = Path(__file__).with_name("stand_in.py")


class Work:
    """A config whose job the stand-in plays."""

    def __init__(self, cluster: SlurmCluster, folder: Path, *acts: str, name: str = "odd-run", **slurm: Any) -> None:
        self.cluster, self.folder, self.name = cluster, folder, name
        self.storage = folder / 'it\'s "here" $(touch pwned)'
        self.storage.mkdir(parents=True)
        (self.storage / "acts").write_text("\n".join(acts))
        python = folder / "py thon"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
        python.chmod(0o755)
        settings = {
            "python": str(python),
            "exclusive": False,
            "warning_s": 10,
            "time_s": 600,
            "logs": str(folder / "lo gs"),
        }
        self.path = folder / "config.yaml"
        self.config = {
            "name": name,
            "storage": str(self.storage),
            "data": {"latents": str(folder / "latents"), "resolution_px": 32, "classes": ["a"]},
            "model": {"preset": "tiny"},
            "train": {"images": 1000},
            "cluster": {"workers": 2, "workers_per_node": 1},
            "slurm": settings | slurm,
        }
        self.path.write_text(yaml.safe_dump(self.config))

    def submit(self, *more: str) -> str:
        said = self.cluster.diffussm("submit", str(self.path), *more).stdout
        return said.split("job ")[1].split()[0]

    @property
    def starts(self) -> list[dict[str, Any]]:
        path = self.storage / "starts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def saved(self, start: int) -> str:
        path = self.storage / f"saved-{start}"
        return path.read_text() if path.exists() else ""

    def log(self) -> str:
        return "\n".join(path.read_text() for path in (self.folder / "lo gs").glob("*.log"))

    def until_started(self, count: int, seconds: float = 300) -> None:
        self.cluster.wait(lambda: len(self.starts) >= count, f"start {count}\n{self.log}", seconds)

    def until(self, job: str, state: str, seconds: float = 300) -> None:
        self.cluster.wait(lambda: self.cluster.state(job) == state, f"{job} {state}", seconds)

    def details(self, job: str) -> dict[str, str]:
        words = self.cluster.run("scontrol", "-o", "show", "job", job).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)


@pytest.fixture
def cluster(slurm_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    yield slurm_cluster
    slurm_cluster.run("scancel", "--user=root", "--quiet", check=False)
    slurm_cluster.wait(lambda: slurm_cluster.idle(2), "the cluster to be empty")


@pytest.mark.timeout(900)
def test_preempted_warned_saved_requeued_resumed(cluster: SlurmCluster, tmp_path: Path) -> None:
    work = Work(cluster, tmp_path, "wait", "exit 0", exclusive=True)
    job = work.submit()
    work.until_started(1)
    urgent = cluster.run("sbatch", "--parsable", "-p", "high", "-N2", "--exclusive", "--wrap=sleep 2", "-o/dev/null")
    work.until(job, "COMPLETED")
    assert work.saved(0) == "SIGUSR1"
    assert [start["SLURM_RESTART_COUNT"] for start in work.starts] == [None, "1"]
    assert work.details(job)["Restarts"] == "1"
    assert cluster.state(urgent.stdout.strip()) == "COMPLETED"
    assert "asked to leave by SIGUSR1" in work.log()
    assert "code 75: put into the queue again" in work.log()
    assert work.starts[0]["token"] != work.starts[1]["token"]
    assert work.starts[0]["token"] not in work.log()


def test_a_config_error_ends_the_job_and_odd_values_arrive_as_they_are(cluster: SlurmCluster, tmp_path: Path) -> None:
    odd = "it's \"odd\" $(touch pwned) `touch pwned` \\ ; & | é 'x"
    work = Work(cluster, tmp_path, "exit 64", environment=[f"ODD={odd}"])
    job = work.submit()
    work.until(job, "FAILED")
    assert work.details(job)["ExitCode"] == "64:0"
    (start,) = work.starts
    assert start["ODD"] == odd
    assert start["config"]["storage"] == str(work.storage)
    assert start["overrides"][0].startswith("cluster.address=10.77.0.1")
    assert not list(tmp_path.rglob("pwned"))
    assert not Path("pwned").exists()
    assert "ends with code 64" in work.log()
    assert "sbatch" not in cluster.diffussm("status", str(work.path)).stderr


def test_stop_lets_it_save_and_does_not_requeue(cluster: SlurmCluster, tmp_path: Path) -> None:
    work = Work(cluster, tmp_path, "wait")
    job = work.submit()
    work.until_started(1)
    again = cluster.diffussm("submit", str(work.path), check=False)
    assert again.returncode == 2
    assert "is there already" in again.stderr
    assert "running" in cluster.diffussm("status", work.name).stdout  # by its name alone
    assert work.name in cluster.diffussm("list").stdout
    assert "asked to save and leave" in cluster.diffussm("stop", work.name).stdout
    work.until(job, "COMPLETED")
    assert work.saved(0) == "SIGUSR1"
    assert len(work.starts) == 1
    assert "stopped by the user" in cluster.diffussm("logs", work.name).stdout


def test_json_and_words_tell_the_same_of_real_jobs(cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "lo gs").mkdir()
    plain = ["--comment=/s%20t/a", f"--output={tmp_path}/lo gs/%x-%j.log", "--wrap=sleep 600"]
    runs = cluster.run("sbatch", "--parsable", "--job-name=diffussm-runs", *plain).stdout.strip()
    waits = cluster.run("sbatch", "--parsable", "--hold", "--job-name=diffussm-waits", *plain).stdout.strip()
    held = ["sbatch", "--parsable", "--hold", *plain]
    tasks = ",".join(str(task) for task in range(0, 300, 3))  # longer than what Slurm shows unasked
    array = cluster.run(*held, f"--array={tasks}", "--job-name=diffussm-sweep").stdout.strip()
    cluster.wait(lambda: cluster.state(runs) == "RUNNING", "a job that runs")
    code = (
        "import dataclasses, json; from launch import squeue; print(json.dumps([[dataclasses.asdict(job) for job in "
        "sorted(found, key=lambda job: job.id)] for found in (squeue.listed_by_json(), squeue.listed_by_words())]))"
    )
    by_json, by_words = json.loads(cluster.run(sys.executable, "-c", code).stdout)
    assert by_json == by_words
    found = {job["id"]: job for job in by_json}
    assert {runs, waits, *(f"{array}_{task}" for task in range(0, 300, 3))} <= found.keys()
    assert found[f"{array}_297"]["run"] == "sweep-297"
    assert found[f"{array}_297"]["log"] == ""  # it has not begun


@pytest.mark.long
def test_two_jobs_share_a_node(cluster: SlurmCluster, tmp_path: Path) -> None:
    one = Work(cluster, tmp_path / "1", "wait", name="one")
    two = Work(cluster, tmp_path / "2", "wait", name="two")
    jobs = [work.submit("cluster.workers=1", f"slurm.options=[--nodelist={cluster.nodes[0]}]") for work in (one, two)]
    for work in (one, two):
        work.until_started(1)
    assert all(cluster.state(job) == "RUNNING" for job in jobs)
    addresses = [work.starts[0]["overrides"][0] for work in (one, two)]
    assert addresses[0] != addresses[1]
    cluster.diffussm("stop", "one")
    one.until(jobs[0], "COMPLETED")
    assert cluster.state(jobs[1]) == "RUNNING"
    cluster.diffussm("stop", "two")
    two.until(jobs[1], "COMPLETED")


def test_scancel_does_not_come_back(cluster: SlurmCluster, tmp_path: Path) -> None:
    work = Work(cluster, tmp_path, "wait", "exit 0")
    job = work.submit()
    work.until_started(1)
    cluster.diffussm("stop", work.name, "--now")
    work.until(job, "CANCELLED")
    cluster.wait(lambda: cluster.idle(2), "the nodes to be free")
    assert cluster.state(job) == "CANCELLED"
    assert len(work.starts) == 1


@pytest.mark.long
def test_what_cannot_run_is_refused_at_once(cluster: SlurmCluster, tmp_path: Path) -> None:
    work = Work(cluster, tmp_path)
    refused = cluster.diffussm("submit", str(work.path), "cluster.workers=64", check=False)
    assert refused.returncode == 69
    assert "sbatch --test-only" in refused.stderr
    assert "odd-run" not in cluster.queue().split()


@pytest.mark.long
def test_infrastructure_errors_are_tried_again_up_to_a_cap(cluster: SlurmCluster, tmp_path: Path) -> None:
    work = Work(cluster, tmp_path, "exit 76", "exit 76", "exit 0", max_restarts=1)
    job = work.submit()
    work.until(job, "FAILED")
    assert work.details(job)["ExitCode"] == "76:0"
    assert len(work.starts) == 2
    assert "gave up after 2 infrastructure errors in a row" in work.log()


@pytest.mark.long
def test_scontrol_requeue(cluster: SlurmCluster, tmp_path: Path) -> None:
    work = Work(cluster, tmp_path, "wait", "exit 0")
    job = work.submit()
    work.until_started(1)
    cluster.run("scontrol", "requeue", job)
    work.until(job, "COMPLETED")
    assert len(work.starts) == 2


@pytest.mark.long
@pytest.mark.parametrize("which", [0, 1], ids=["head", "other"])
def test_a_killed_node_is_survived(cluster: SlurmCluster, tmp_path: Path, which: int) -> None:
    work = Work(cluster, tmp_path, "wait", "exit 0")
    job = work.submit()
    work.until_started(1)
    cluster.kill_node(cluster.nodes[which])
    try:
        cluster.wait(lambda: cluster.state(job) != "RUNNING", "the loss to be seen")
    finally:
        cluster.start_node(cluster.nodes[which])
    work.until(job, "COMPLETED", 180)
    assert len(work.starts) == 2
    assert work.details(job)["Restarts"] == "1"


@pytest.mark.long
def test_the_time_limit_saves_and_requeues(cluster: SlurmCluster, tmp_path: Path) -> None:
    work = Work(cluster, tmp_path, "wait", "exit 0", time_s=120, warning_s=100)
    job = work.submit()
    work.until(job, "COMPLETED", 200)
    assert work.saved(0) == "SIGUSR1"
    assert len(work.starts) == 2


def test_a_python_that_is_not_there_ends_the_job_and_says_why(cluster: SlurmCluster, tmp_path: Path) -> None:
    work = Work(cluster, tmp_path, python="/no/such/python")
    job = work.submit()
    work.until(job, "FAILED")
    assert work.details(job)["ExitCode"] == "69:0"
    assert work.details(job)["Restarts"] == "0"
    assert "/no/such/python cannot import ray and diffussm" in work.log()
    assert "No such file or directory" in work.log()
    assert not list(Path(tempfile.gettempdir()).glob(f"diffussm-{job}-*"))


def test_one_task_of_a_sweep_comes_back_alone(cluster: SlurmCluster, tmp_path: Path) -> None:
    """The last task's number is the array's, and `scontrol requeue` of that would bring back the one that failed."""
    work = Work(cluster, tmp_path, "exit 64", "wait", "exit 0", name="sweep", array_limit=1)
    job = work.submit("--sweep", "seed=1,2")
    work.until_started(2)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_1")
    work.until_started(3)
    cluster.wait(lambda: cluster.idle(2), "the array to end")
    assert [start["overrides"][-2] for start in work.starts] == ["name=sweep-0", "name=sweep-1", "name=sweep-1"]
    for task, how in enumerate(("failed", "completed")):
        assert f"sweep-{task}  job {job}_{task}: {how}" in cluster.diffussm("status", f"sweep-{task}").stdout
    assert "code 64" in cluster.diffussm("logs", "sweep-0").stdout
    assert work.starts[1]["SLURM_JOB_ID"] == job, "this was that task"


@pytest.mark.long
def test_a_run_of_a_sweep_is_looked_after_by_its_name(cluster: SlurmCluster, tmp_path: Path) -> None:
    work = Work(cluster, tmp_path, "wait", "wait", name="sweep", array_limit=1)
    job = work.submit("--sweep", "seed=1,2,3")
    work.until_started(1)
    assert "is cancelled" in cluster.diffussm("stop", "sweep-1").stdout  # it waits
    alone = cluster.diffussm("submit", str(work.path), "name=sweep-2", check=False)
    assert alone.returncode == 2
    assert f"job {job}_2: pending" in alone.stderr
    assert "asked to save and leave" in cluster.diffussm("stop", "sweep-0").stdout
    work.until_started(2)
    assert work.starts[1]["overrides"][-2] == "name=sweep-2"
    assert [line.split()[0] for line in cluster.diffussm("stop", "sweep", "--now").stdout.splitlines()] == ["job"]
    cluster.wait(lambda: cluster.idle(2), "the array to end")


@pytest.mark.long
def test_a_sweep_is_an_array(cluster: SlurmCluster, tmp_path: Path) -> None:
    work = Work(cluster, tmp_path, "exit 0", "exit 0", "exit 0", "exit 0", name="sweep", array_limit=1)
    work.submit("--sweep", "train.lr=0.1,0.2", "--sweep", "seed=1,2")
    work.until_started(4)
    given = [start["overrides"][-3:] for start in work.starts]
    assert sorted(given) == [
        [f"name=sweep-{index}", f"train.lr={lr}", f"seed={seed}"]
        for index, (lr, seed) in enumerate([("0.1", 1), ("0.1", 2), ("0.2", 1), ("0.2", 2)])
    ]
    cluster.wait(lambda: cluster.idle(2), "the array to end")
