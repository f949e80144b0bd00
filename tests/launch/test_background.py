"""Runs in the background of this machine: real processes, known by number and time."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from diffussm.config import Config
from diffussm.errors import UsageError
from launch import background, local, submit
from launch.background import Background
from launch.target import Submission

SLEEPER = "import signal, sys; print('at work', flush=True); signal.signal(15, lambda *a: sys.exit(75)); signal.pause()"


@pytest.fixture
def submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submission:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    cfg = Config(name="a", storage=str(tmp_path / "runs"))
    cfg.data.latents, cfg.train.images = str(tmp_path / "latents"), 1000
    return Submission(cfg, submit.minimal(cfg))


@pytest.fixture
def sleeper(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the driver: a process that leaves when it is asked to."""
    monkeypatch.setattr(background, "_command", lambda *a: [sys.executable, "-c", SLEEPER])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_is_started_found_asked_to_leave_and_over(submission: Submission, sleeper: None) -> None:
    here = Background()
    number = here.submit(submission)
    (job,) = here.jobs("a")
    assert (job.id, job.run, job.alive, job.root) == (number, "a", True, submission.root)
    until(lambda: "at work" in list(here.logs(job, 5)))
    with pytest.raises(UsageError, match="is there already"):
        here.submit(submission)
    assert "asked to save" in here.stop(job, now=False)
    os.waitpid(int(number), 0)
    (job,) = here.jobs()
    assert not job.alive
    assert "ended already" in here.stop(job, now=True)
    assert here.jobs("other") == []


def test_now_kills_and_a_number_used_again_is_not_taken_for_it(submission: Submission, sleeper: None) -> None:
    here = Background()
    number = here.submit(submission)
    assert "killed" in here.stop(here.jobs("a")[0], now=True)
    _, status = os.waitpid(int(number), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    note = background._folder() / "a.json"
    note.write_text(note.read_text().replace(f'"pid": {number}', f'"pid": {os.getpid()}'))
    assert not here.jobs("a")[0].alive


def test_the_job_reads_the_config_that_was_submitted(submission: Submission) -> None:
    text = Background().render(submission)
    assert text.startswith(f"{local.shown(local.module('cluster.driver'))} ")
    assert submission.config in text


def test_a_sweep_needs_a_scheduler_and_a_dry_run_says_so_too(submission: Submission) -> None:
    sweep = Submission(submission.cfg, submission.config, (("name=a-0",),))
    for ask in (Background().submit, Background().render):
        with pytest.raises(UsageError, match="--sweep"):
            ask(sweep)
