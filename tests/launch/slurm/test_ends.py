"""How the batch script ends: its own functions, run by bash. Stand-ins of scontrol and scancel note what was asked."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffussm.config.schema import Config
from launch import slurm, submit
from launch.target import Submission

SCONTROL = """#!/bin/bash
echo "$*" >>"$CALLS"
if [[ $1 == requeue ]]; then kill -KILL "$PPID"; fi # as Slurm would end the script
if (($(grep -c show "$CALLS") <= ${BUSY:-0})); then exit 1; fi
echo "JobId=7 JobState=${STATE:-RUNNING} Reason=None"
"""
SCANCEL = """#!/bin/bash
[[ -n ${STOP_NOW:-} ]] && kill -USR2 "$PPID"
exit 0
"""


@dataclass(frozen=True)
class End:
    code: int
    asked: list[str]
    said: str

    @property
    def requeued(self) -> list[str]:
        return [line.split()[1] for line in self.asked if line.startswith("requeue")]


@pytest.fixture
def functions(tmp_path: Path) -> str:
    """The script from its first function to its trap for the end."""
    cfg = Config(name="a")
    cfg.storage, cfg.data.latents, cfg.train.images = "/s", "/l", 1000
    cfg.slurm.python, cfg.slurm.logs = "/p", "/logs"
    lines = slurm.render(Submission(cfg, submit.minimal(cfg), ())).splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith("say()"))
    ends = next(index for index, line in enumerate(lines) if line.startswith("HEAD=''"))
    end = next(index for index, line in enumerate(lines) if line.endswith("EXIT"))
    for name, text in {"scontrol": SCONTROL, "scancel": SCANCEL, "sleep": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return "\n".join([lines[begin], *lines[ends : end + 1]])


def run(functions: str, folder: Path, body: str, **environment: str) -> End:
    calls, scratch = folder / "calls", folder / "scratch"
    calls.touch()
    given = f"JOB=7 TASK=7_1 RESTARTS=0 MAX_RESTARTS=3 NODES=1 MADE=1 SCRATCH={scratch} FAILURES={folder}/failures"
    variables = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls)} | environment
    done = subprocess.run(
        ["bash", "-c", f"set -u; {given}\n{functions}\n{body}"],
        env=variables, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return End(done.returncode, calls.read_text().splitlines(), done.stdout + done.stderr)


@pytest.mark.parametrize(
    ("body", "requeued", "code"),
    [
        ("exit 75", ["7_1"], None),
        ("exit 76", ["7_1"], None),
        ("exit 64", [], 64),
        ("LEAVING=1; exit 138", ["7_1"], None),  # warned before the driver could hear it
        ("LEAVING=1; exit 143", ["7_1"], None),
        ("exit 138", [], 138),  # a SIGUSR1 that nobody here sent
        ("RESTARTS=9; exit 76", ["7_1"], None),  # starts after preemptions do not count
        ("echo 2 >$FAILURES; exit 76", ["7_1"], None),
        ("echo 3 >$FAILURES; exit 76", [], 76),
        ("echo 3 >$FAILURES; exit 75", ["7_1"], None),
        ("FAILURES=/no/such/folder; RESTARTS=2; exit 76", ["7_1"], None),
        ("FAILURES=/no/such/folder; RESTARTS=3; exit 76", [], 76),
        ("STOPPED=1; LEAVING=1; exit 75", [], 0),
        ("STOPPED=1; LEAVING=1; exit 76", [], 76),
    ],
)
def test_a_code_decides_whether_the_task_comes_back(
    functions: str, tmp_path: Path, body: str, requeued: list[str], code: int | None
) -> None:  # fmt: skip
    found = run(functions, tmp_path, body)
    assert found.requeued == requeued, found.said
    if code is not None:
        assert found.code == code


def test_only_infrastructure_errors_in_a_row_are_counted(functions: str, tmp_path: Path) -> None:
    kept = tmp_path / "failures"
    for code, count in ((76, "1"), (76, "2"), (75, ""), (76, "1"), (76, "2"), (76, "3"), (76, ""), (76, "1"), (64, "")):
        run(functions, tmp_path, f"exit {code}")
        assert (kept.read_text().strip() if kept.exists() else "") == count


def test_a_stop_during_the_cleaning_up_is_heard(functions: str, tmp_path: Path) -> None:
    """The head still ends while the user says stop: the signal interrupts the wait for it."""
    found = run(functions, tmp_path, "exec 3< <(:); /bin/sleep 1 & HEAD=$!; exit 75", STOP_NOW="1")
    assert found.requeued == []
    assert found.code == 0
    assert "stopped by the user" in found.said


@pytest.mark.parametrize(("busy", "requeued"), [(2, ["7_1"]), (9, [])])
def test_a_controller_that_is_busy_is_asked_again_and_not_for_ever(
    functions: str, tmp_path: Path, busy: int, requeued: list[str]
) -> None:  # fmt: skip
    found = run(functions, tmp_path, "exit 75", BUSY=str(busy))
    assert found.requeued == requeued
    if not requeued:
        assert found.code == 75
        assert "does not say" in found.said


def test_a_cancelled_task_does_not_come_back(functions: str, tmp_path: Path) -> None:
    assert run(functions, tmp_path, "exit 75", STATE="CANCELLED").requeued == []


@pytest.mark.parametrize("made", [0, 1])
def test_only_a_folder_of_its_own_is_removed(functions: str, tmp_path: Path, made: int) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "of-somebody").touch()
    assert run(functions, tmp_path, f"MADE={made}; exit 64").code == 64
    assert (tmp_path / "scratch").exists() == (not made)
