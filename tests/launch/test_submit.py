"""From a config to a submission, and to a scheduler if every check passes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from diffussm.config import Config, check, dump, load, preset
from diffussm.config.places import absolutely
from diffussm.errors import ConfigError, UsageError
from launch import submit
from launch.target import Job, Submission

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


class Recorder:
    """A target that only remembers."""

    name = "recorder"

    def __init__(self) -> None:
        self.given: list[Submission] = []

    def render(self, submission: Submission) -> str:
        return f"rendered {submission.cfg.name}"

    def submit(self, submission: Submission) -> str:
        self.given.append(submission)
        return "7"

    def jobs(self, run: str = "") -> list[Job]:
        return []

    def logs(self, job: Job, lines: int) -> Iterator[str]:
        yield from ()

    def stop(self, job: Job, now: bool) -> str:
        return ""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_text(
        "name: a\nstorage: runs\ndata: {latents: latents, resolution_px: 32, classes: [x]}\n"
        "model: {preset: tiny}\ntrain: {images: 1000}\n"
    )
    return str(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_differs_from_the_defaults_is_the_whole_config(path: Path, tmp_path: Path) -> None:
    submission = submit.prepare(str(path))
    (tmp_path / "again.yaml").write_text(submission.config)
    assert load(tmp_path / "again.yaml") == submission.cfg
    assert len(submission.config.splitlines()) < 120


def test_a_job_knows_the_file_that_its_config_began_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where that file is not, and where the config says again what is the default."""
    monkeypatch.chdir(tmp_path)
    recipe = next(path for path in CONFIGS if path.stem == "imagenet-256")
    began, default = load(recipe), Config().cluster.workers
    assert began.cluster.workers != default
    submission = submit.prepare(str(recipe), ["train.lr=0.5", f"cluster.workers={default}"])
    (tmp_path / "again.yaml").write_text(submission.config)
    assert load("again.yaml") == submission.cfg
    found = preset("again.yaml")
    assert found == ("imagenet-256.yaml", absolutely(began))
    assert list(yaml.safe_load(submission.config)) == ["base", "train", "cluster"]


def test_a_job_of_a_runs_folder_knows_no_file_and_takes_none_for_one(config: str, tmp_path: Path) -> None:
    """Its store has the preset that the run began from, which must stay."""
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(absolutely(load(config))))
    submission = submit.prepare(str(folder), ["train.lr=0.5"])
    (tmp_path / "again.yaml").write_text(submission.config)
    assert load(tmp_path / "again.yaml") == submission.cfg
    assert preset(tmp_path / "again.yaml") is None


def test_places_become_absolute(config: str, tmp_path: Path) -> None:
    cfg = submit.prepare(config).cfg
    assert cfg.storage == str(tmp_path / "runs")
    assert cfg.data.latents == str(tmp_path / "latents")
    assert cfg.slurm.logs == str(tmp_path / "logs")
    assert submit.prepare(config, ["storage=s3://bucket/x"]).cfg.storage == "s3://bucket/x"


def test_a_sweep_is_every_combination_and_each_is_checked(config: str, tmp_path: Path) -> None:
    found = submit.prepare(config, [], ["train.lr=0.1,0.2", "seed=1,2"]).variants
    assert found[1] == ("name=a-1", "train.lr=0.1", "seed=2")
    assert len({given[0] for given in found}) == 4
    for given in found:
        check(load(config, given))
    with pytest.raises(ConfigError, match="seed"):
        submit.prepare(config, [], ["seed=1,-2"])
    for wrong in ("seed", "seed=", "=1,2", "seed=1,,2"):
        with pytest.raises(UsageError, match="--sweep"):
            submit.prepare(config, [], [wrong])
    for shared in ("name=a,b", "storage=/a,/b", "cluster.workers=1,2", "slurm.qos=a,b", "kubernetes.image=a,b"):
        with pytest.raises(UsageError, match="runs of a sweep share"):
            submit.prepare(config, [], [shared])


def test_each_run_of_a_sweep_is_looked_at(config: str) -> None:
    to = Recorder()
    submission = submit.prepare(config, ["train.global_batch=8"], ["train.micro_batch=2,8"])
    text, passed = submit.dry_run(submission, to)
    assert passed
    assert re.search("ok      size of a-0: .* 2 images a pass", text)
    assert re.search("ok      size of a-1: .* 8 images a pass", text)
    large = ["train.lr=1e-4,2e-4", "model.preset=tiny,XL"]
    tight = submit.prepare(config, ["train.global_batch=8", "cluster.grace_s=2"], large)
    to.name = "local"
    with pytest.raises(
        ConfigError, match=r"^deadline of a-1: .*\ndeadline of a-3: .*\n  -> cluster.grace_s=60, or more nodes$"
    ):
        submit.submit(tight, to)
    assert to.given == []


def test_a_dry_run_shows_the_job_and_every_check_and_starts_nothing(config: str) -> None:
    to = Recorder()
    text, passed = submit.dry_run(submit.prepare(config), to)
    assert passed
    assert "rendered a" in text
    for what in ("size", "memory", "deadline", "places", "bucket"):
        assert f"ok      {what}: " in text
    assert to.given == []


def test_a_job_that_cannot_be_written_is_a_failed_check_beside_the_others(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(submission: Submission) -> str:
        raise ConfigError("kubernetes.image: found ''", "name one")

    to = Recorder()
    monkeypatch.setattr(to, "render", refuse)
    text, passed = submit.dry_run(submit.prepare(config), to)
    assert not passed
    assert "ok      size: " in text
    assert "FAILED  job: kubernetes.image: found ''\n        -> name one" in text


def test_a_failed_check_hands_nothing_over(config: str, tmp_path: Path) -> None:
    to = Recorder()
    (tmp_path / "file").write_text("x")
    submission = submit.prepare(config, [f"storage={tmp_path}/file"])
    assert submit.dry_run(submission, to)[1] is False
    with pytest.raises(ConfigError, match="bucket"):
        submit.submit(submission, to)
    assert to.given == []


def test_it_says_under_which_id(config: str) -> None:
    to = Recorder()
    assert "job 7 on recorder" in submit.submit(submit.prepare(config), to)
    assert [given.cfg.name for given in to.given] == ["a"]


def test_it_says_how_a_run_in_a_namespace_is_found_again(config: str) -> None:
    to = Recorder()
    to.name = "kubernetes"
    places = ["storage=/data/runs", "data.latents=/data/latents", "kubernetes.claims=[d=/data]"]
    given = submit.prepare(config, [*places, "kubernetes.image=i:1", "kubernetes.namespace=ml"])
    assert submit.submit(given, to).endswith("diffussm status a kubernetes.namespace=ml")


def test_the_newest_save_is_what_a_job_is_given_time_for(config: str, tmp_path: Path) -> None:
    submission = submit.prepare(config)
    assert submit.with_save_times(submission).measured_save_s is None
    events = Path(submission.root) / "events.jsonl"
    events.parent.mkdir(parents=True)
    events.write_text('{"event": "saved", "seconds": 9.5}\n{"event": "saved", "seconds": 2.5}\n{"event": "stopped"}\n')
    assert submit.with_save_times(submission).measured_save_s == 2.5
