"""The doctor's own side: what it makes of the other side's lines, of Slurm's words and of a cluster's answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffussm.config import Config
from diffussm.errors import ExitCode, MissingError, UsageError
from launch import cli, doctor, local
from launch.doctor import Finding
from launch.kubernetes.client import Client
from tests.launch.kubernetes import fake

PARTITIONS = "gpu up 8\ncpu up 2\n"
WELL = "SlurmctldParameters     = preempt_send_user_signal\nProctrackType           = proctrack/cgroup\n"
ANY = {"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": {"type": "object"}}}]}}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without schedulers, whose other side finds one thing; returns the folder of its programs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(local, "preflight", lambda job: says(Finding("gpus", "ok", "none")))
    return programs


def says(*findings: Finding, code: int = 0) -> list[str]:
    lines = [json.dumps(vars(each)) for each in findings]
    return [sys.executable, "-c", f"import sys\nfor line in {lines!r}: print(line)\nsys.exit({code})"]


def program(folder: Path, name: str, words: str, code: int = 0) -> None:
    """A STAND-IN for one of Slurm's programs."""
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{words}END\nexit {code}\n".replace("cat", "/bin/cat"))
    path.chmod(0o755)


def test_the_lines_of_the_other_side_are_shown_and_its_death_is_bad() -> None:
    found = list(doctor.machine(says(Finding("gpus", "warn", "none", "buy one", {"count": 0.0}), code=3)))
    assert found[0] == Finding("gpus", "warn", "none", "buy one", {"count": 0.0})
    assert found[0].line == "warn  gpus: none\n      -> buy one"
    assert (found[1].what, found[1].state) == ("machine", "bad")
    assert "ended with 3" in found[1].found
    assert len(list(doctor.machine(says(Finding("gpus", "ok", "none"))))) == 1


def test_a_machine_without_schedulers_is_well_unless_one_is_asked_for(alone: Path) -> None:
    found = {each.what: each.state for each in doctor.survey(None)}
    assert found == {"gpus": "ok", "slurm": "warn", "kubernetes": "warn"}
    assert {each.what: each.state for each in doctor.survey(None, "slurm")}["slurm"] == "bad"
    assert {each.what: each.state for each in doctor.survey(None, "kubernetes")}["kubernetes"] == "bad"
    with pytest.raises(UsageError, match="--to: found 'moon'"):
        list(doctor.survey(None, "moon"))


def test_the_command_prints_lines_or_json_and_ends_with_69_if_something_is_bad(alone: Path) -> None:
    shown = CliRunner().invoke(cli.app, ["doctor"], catch_exceptions=False)
    assert shown.exit_code == 0
    assert "ok    gpus: none" in shown.output
    assert "0 bad, 2 to know of, of 3 looked at" in shown.output
    told = CliRunner().invoke(cli.app, ["doctor", "--json", "--to", "slurm"], catch_exceptions=False)
    assert told.exit_code == ExitCode.ENVIRONMENT
    found = json.loads(told.output)
    assert found["counts"] == {"ok": 1, "warn": 1, "bad": 1}
    assert {each["what"] for each in found["findings"] if each["remedy"]} == {"slurm", "kubernetes"}


def test_a_save_is_held_against_the_time_there_is(tmp_path: Path) -> None:
    cfg = Config(name="a")
    cfg.data.resolution_px, cfg.data.autoencoder, cfg.data.latents = 32, "builtin:emoji-32", str(tmp_path)
    cfg.model.preset, cfg.train.images, cfg.train.global_batch, cfg.data.classes = "emoji", 1000, 8, ["x"]
    (quick,) = doctor.save(cfg, 1e9, "")
    assert quick.state == "ok"
    (slow,) = doctor.save(cfg, 1e6, "")
    assert slow.state == "warn"
    assert "cluster.grace_s=" in slow.remedy


def test_a_controller_that_answers_is_read(alone: Path) -> None:
    program(alone, "sinfo", PARTITIONS)
    program(alone, "squeue", "")
    program(alone, "scontrol", WELL)
    assert doctor.slurm(True) == Finding("slurm", "ok", "answers; partitions gpu (8 nodes), cpu (2 nodes)")


def test_settings_that_cost_a_save_are_told() -> None:
    found = doctor.told(PARTITIONS, WELL.replace("preempt_send_user_signal", "(null)").replace("cgroup", "linuxproc"))
    assert found.state == "warn"
    assert "preempt_send_user_signal" in found.found
    assert "proctrack/cgroup" in found.found


def test_a_controller_that_does_not_answer_is_told(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(alone, "sinfo", PARTITIONS)
    program(alone, "squeue", "", code=1)
    assert "squeue: ended with 1" in doctor.slurm(False).found
    (alone / "sinfo").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    monkeypatch.setattr(doctor, "WAIT_S", 0.2)
    assert "does not answer within 0.2 s" in doctor.slurm(False).found


def test_a_cluster_that_answers_and_one_without_kuberay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a FAKE API server: no live cluster was in the loop."""
    api = fake.FakeApi({"rayjobs": ANY})
    with fake.serve(api, tmp_path) as kubeconfig:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        found = doctor.kubernetes(Config(), True)
        assert (found.state, found.found) == ("ok", "v1.0-fake, with RayJobs in namespace default")
        api.forbidden = frozenset({"list rayjobs"})
        with pytest.raises(MissingError, match="no right to do this with rayjobs"):
            Client("default").answers(5)
    gone = doctor.kubernetes(Config(), True)
    assert gone.state == "bad"
    assert "cannot be reached" in gone.found
