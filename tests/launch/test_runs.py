"""Status, logs, stop and list over places that are given; tests/launch/slurm runs them against real daemons."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from diffussm.config import Config
from diffussm.errors import ConfigError, MissingError, StorageError, UsageError
from launch import runs
from launch.target import Job, Submission, tail


class Place:
    """A target with jobs that are given; one that is out of reach has none to give."""

    name = "place"

    def __init__(self, *jobs: Job, reachable: bool = True) -> None:
        self.given, self.reachable, self.stopped = list(jobs), reachable, []  # type: ignore[var-annotated]

    def render(self, submission: Submission) -> str:
        return ""

    def submit(self, submission: Submission) -> str:
        return ""

    def jobs(self, run: str = "") -> list[Job]:
        if not self.reachable:
            raise MissingError("place: cannot be reached")
        return [job for job in self.given if run in ("", job.run, job.sweep)]

    def logs(self, job: Job, lines: int) -> Iterator[str]:
        return tail(job.log, lines)

    def stop(self, job: Job, now: bool) -> str:
        self.stopped.append((job.id, now))
        return f"{job.id} stopped"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "log").write_text("one\ntwo\nthree\n")
    return Job("7", "a", "RUNNING", True, "n1", 1, str(tmp_path / "runs" / "a"), str(tmp_path / "log"))


@pytest.fixture
def places(job: Job, monkeypatch: pytest.MonkeyPatch) -> list[Place]:
    made = [Place(replace(job, id="3", state="COMPLETED", alive=False), job), Place(reachable=False)]
    monkeypatch.setattr(runs, "targets", lambda cfg=None: made)
    monkeypatch.delenv(runs.STORAGE, raising=False)
    return made


def test_a_run_is_found_by_its_name_and_its_place_by_its_job(places: list[Place], job: Job) -> None:
    folder = Path(job.root)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"images": 64, "loss": 0.5}) + "\n")
    found = runs.status("a")
    assert found["store"]["images"] == 64
    text = runs.told(found)
    assert "job 7: running, restart 1 (n1)" in text
    assert "64 images" in text
    assert "not asked: place: cannot be reached" in text


def test_a_sweep_is_its_jobs_and_each_run_of_it_has_a_place(places: list[Place], job: Job, tmp_path: Path) -> None:
    one, two = (
        replace(job, id=f"7_{task}", run=f"a-{task}", sweep="a", root=f"{tmp_path}/runs/a-{task}") for task in (0, 1)
    )
    Path(two.root).mkdir(parents=True)
    (Path(two.root) / "metrics.jsonl").write_text(json.dumps({"images": 64, "loss": 0.5}) + "\n")
    places[0].given = [one, two]
    assert runs.told(runs.status("a")).splitlines()[:2] == [one.line, two.line]
    assert not runs.status("a")["store"]["found"]
    assert runs.status("a-1")["store"]["images"] == 64
    assert runs.stop("a-1", now=False).startswith("7_1 stopped")
    assert places[0].stopped == [("7_1", False)]


def test_without_a_job_the_storage_knows_it(
    places: list[Place], job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    places[0].given = []
    with pytest.raises(UsageError, match="no scheduler"):
        runs.status("a")
    Path(job.root).mkdir(parents=True)
    (Path(job.root) / "config.yaml").write_text("train: {images: 10}\n")
    monkeypatch.setenv(runs.STORAGE, str(tmp_path / "runs"))
    assert "no job" in runs.told(runs.status("a"))
    assert "a  no job" in runs.listing(str(tmp_path / "runs"))


def test_a_run_is_given_as_a_config_too(places: list[Place], tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"name: a\nstorage: {tmp_path}/runs\ndata: {{latents: l}}\ntrain: {{images: 1000}}\n")
    found = runs.named(str(path), ["name=b"])
    assert (found.name, found.place) == ("b", f"{tmp_path}/runs/b")


def test_a_run_is_given_as_a_url_too() -> None:
    assert runs.named("s3://bucket/some/runs/a/") == runs.Named("a", "s3://bucket/some/runs/a", None)
    with pytest.raises(ConfigError, match="name"):
        runs.named("s3://bucket/some/runs/A B")


def test_stop_asks_every_job_that_is_alive(places: list[Place]) -> None:
    assert runs.stop("a", now=False).splitlines() == ["7 stopped", "not asked: place: cannot be reached"]
    assert places[0].stopped == [("7", False)]
    with pytest.raises(UsageError, match="no job that runs or waits; not asked: place: cannot be reached"):
        runs.stop("b", now=True)


def test_logs_are_those_of_the_job_that_is_alive(places: list[Place], job: Job) -> None:
    assert list(runs.logs("a", 2)) == ["two", "three"]
    command = runs.following("a", 2)
    assert isinstance(command, list)
    assert command[-1] == job.log
    places[0].given = [replace(job, log="")]
    with pytest.raises(UsageError, match="--follow"):
        runs.following("a", 2)
    with pytest.raises(UsageError, match="no scheduler knows a job of it; not asked: place: cannot be reached"):
        runs.logs("b", 2)


def test_list_shows_jobs_that_are_alive(places: list[Place]) -> None:
    assert runs.listing("").splitlines()[0].startswith("a  job 7")
    places[0].given = []
    assert runs.listing("").startswith("no runs")


def test_targets_have_names_and_kubernetes_is_asked_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    assert [each.name for each in runs.targets()] == ["slurm", "local"]
    monkeypatch.setenv("KUBECONFIG", "x")
    assert [each.name for each in runs.targets()] == ["slurm", "kubernetes", "local"]
    with pytest.raises(UsageError, match="allowed: slurm, kubernetes, local"):
        runs.target("cloud", Config())


def test_a_store_that_is_away_hides_nothing_that_the_schedulers_said(
    places: list[Place], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def away(*_: str) -> None:
        raise StorageError("s3://b: no answer within 30 s")

    monkeypatch.setattr(runs.store, "ask", away)
    found = runs.status("a")
    assert [job.id for job in found["jobs"]] == ["3", "7"]
    assert "not asked: s3://b: no answer within 30 s" in runs.told(found)
    assert "not asked: s3://b: no answer" in runs.listing("s3://b")


def test_beside_a_name_only_what_finds_it_may_stand(places: list[Place]) -> None:
    assert runs.named("a", ["storage=/s"]).place == "/s/a"
    cfg = runs.named("a", ["kubernetes.namespace=ml"]).cfg
    assert cfg is not None
    assert cfg.kubernetes.namespace == "ml"
    with pytest.raises(UsageError, match=r"foo\.bar=1"):
        runs.named("a", ["foo.bar=1"])
