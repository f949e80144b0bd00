"""What Slurm prints, read: 22.05 as it was seen, newer JSON as we know it; real daemons: tests/launch/slurm."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from diffussm.errors import MissingError
from launch import squeue
from launch.squeue import accounted, described, queued, remembered

SHOWN = (
    "JobId=12 JobName=diffussm-a-run UserId=me(1000) GroupId=me(1000) MCS_label=N/A Priority=1 Nice=0 Account=(null) "
    "QOS=(null) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0 "
    "NodeList=n[1-2] BatchHost=n1 NumNodes=2 TRES=cpu=8,node=2,billing=8 Command=(null) WorkDir=/my home/x=y "
    "Comment=/s%20t/it%27s/a-run StdErr=/my logs/diffussm-a-run-12.log StdIn=/dev/null "
    "StdOut=/my logs/diffussm-a-run-12.log Power= "
)


def test_a_running_job() -> None:
    (job,) = described(SHOWN)
    assert (job.id, job.run, job.state, job.alive, job.where) == ("12", "a-run", "RUNNING", True, "n[1-2]")
    assert (job.restarts, job.root, job.log) == (2, "/s t/it's/a-run", "/my logs/diffussm-a-run-12.log")
    assert "restart 2" in job.line


def test_a_waiting_job_says_why() -> None:
    line = SHOWN.replace("JobState=RUNNING Reason=None", "JobState=PENDING Reason=BeginTime")
    (job,) = described(line.replace("NodeList=n[1-2]", "NodeList="))
    assert (job.alive, job.where) == (True, "BeginTime")


def test_tasks_of_an_array_are_runs_of_a_sweep_also_those_that_have_not_begun() -> None:
    line = SHOWN.replace("JobId=12 ", "JobId=14 ArrayJobId=12 ArrayTaskId=2 ").replace("it%27s/a-run", "it%27s")
    (job,) = described(line)
    assert (job.id, job.run, job.sweep, job.root) == ("12_2", "a-run-2", "a-run", "/s t/it's/a-run-2")
    waiting = described(
        line.replace("ArrayTaskId=2", "ArrayTaskId=3-5,8-12:2%4").replace("a-run-12.log", "a_4294967294.log")
    )
    assert [(job.id, job.run, job.log) for job in waiting] == [
        (f"12_{task}", f"a-run-{task}", "") for task in (3, 4, 5, 8, 10, 12)
    ]


def test_unknown_keys_are_passed_over() -> None:
    assert described(SHOWN + " ResvPorts=1 Some:New/Key=a b")[0].log == "/my logs/diffussm-a-run-12.log"


def test_the_memory_of_sacct() -> None:
    text = "9|diffussm-a|CANCELLED by 0|n1|/s/a\n8|other|COMPLETED|n1|\n7|diffussm-b|TIMEOUT|None assigned|s3://x/b\n"
    text += "6_1|diffussm-c|COMPLETED|n1|/s\n6_[2-3]|diffussm-c|PENDING|None assigned|/s\n"
    first, second, third = remembered(text)
    assert (third.id, third.run, third.sweep, third.root) == ("6_1", "c-1", "c", "/s/c-1")
    assert remembered(text, "c-1") == remembered(text, "c") == [third]
    assert remembered(text, "c-2") == []
    assert (first.id, first.run, first.state, first.alive, first.root) == ("9", "a", "CANCELLED", False, "/s/a")
    assert (second.run, second.where, second.root) == ("b", "", "s3://x/b")


QUEUED = {
    "job_id": 12,
    "array_job_id": 0,
    "array_task_id": None,
    "array_task_string": "",
    "name": "diffussm-a-run",
    "user_id": 1000,
    "user_name": "me",
    "job_state": "RUNNING",
    "state_reason": "None",
    "nodes": "n[1-2]",
    "restart_cnt": 2,
    "comment": "/s%20t/it%27s/a-run",
    "standard_output": "/my logs/%x-%j.log",
}


def number(value: int | None) -> dict[str, Any]:
    """As Slurm 23.02 and later write a number that may not be set."""
    return {"set": value is not None, "infinite": False, "number": value or 0}


def shown(**changes: Any) -> str:
    return json.dumps({"errors": [], "jobs": [QUEUED | changes]})


def test_json_says_what_the_words_say() -> None:
    assert queued(shown(), "", 1000) == described(SHOWN)
    newer = {"job_state": ["RUNNING"], "array_job_id": number(0), "array_task_id": number(None)}
    assert queued(shown(**newer, job_id=12), "a-run", 1000) == described(SHOWN)


def test_json_of_a_task_of_an_array_and_of_one_that_has_not_begun() -> None:
    array = {"job_id": 14, "standard_output": "/l/%x-%A_%a.log"}
    for parent, task in ((12, 2), (number(12), number(2))):
        (job,) = queued(shown(**array, array_job_id=parent, array_task_id=task), "", 1000)
        assert (job.id, job.log) == ("12_2", "/l/diffussm-a-run-12_2.log")
    waits = {"job_state": ["PENDING"], "state_reason": "Priority", "nodes": "", "array_task_string": "3-5%1"}
    text = shown(**array, **waits, array_job_id=12, array_task_id=None)
    assert [job.id for job in queued(text, "a-run", 1000)] == ["12_3", "12_4", "12_5"]
    (job,) = queued(text, "a-run-4", 1000)
    assert (job.id, job.log, job.alive, job.where) == ("12_4", "", True, "Priority")
    assert queued(text, "a-run-6", 1000) == []


def test_json_of_others_and_of_other_runs_is_passed_over() -> None:
    assert queued(shown(user_id=1001), "", 1000) == []
    assert queued(shown(name="diffussm-a-run-2"), "a-run", 1000) == []
    assert queued(shown(name="theirs"), "", 1000) == []


@pytest.mark.parametrize(
    ("states", "word", "alive"),
    [
        (["PENDING", "REQUEUE_HOLD"], "REQUEUE_HOLD", True),
        (["COMPLETED", "COMPLETING"], "COMPLETING", True),
        (["RUNNING", "POWER_UP_NODE"], "POWER_UP_NODE", True),
        (["RUNNING", "SIGNALING"], "RUNNING", True),
        (["COMPLETED"], "COMPLETED", False),
    ],
)
def test_states_with_flags(states: list[str], word: str, alive: bool) -> None:
    (job,) = queued(shown(job_state=states), "", 1000)
    assert (job.state, job.alive) == (word, alive)


ACCOUNTED = {
    "job_id": 9,
    "array": {"job_id": 0, "task_id": None},
    "name": "diffussm-a",
    "user": "me",
    "state": {"current": "CANCELLED", "reason": "None"},
    "nodes": "n1",
    "comment": {"administrator": None, "job": "/s/a", "system": None},
}


def test_the_json_of_sacct() -> None:
    newer = ACCOUNTED | {"array": {"job_id": 9, "task_id": number(1)}, "state": {"current": ["TIMEOUT"], "reason": ""}}
    waits = newer | {"array": {"job_id": 9, "task_id": number(None)}}
    text = json.dumps({"errors": [], "jobs": [ACCOUNTED, newer, waits, ACCOUNTED | {"user": "other"}]})
    assert accounted(text, "b", "me") == []
    first, second = accounted(text, "a", "me")
    assert [first] == remembered("9|diffussm-a|CANCELLED by 0|n1|/s/a")
    assert (second.id, second.state, second.run) == ("9_1", "TIMEOUT", "a-1")
    assert accounted(text, "a-1", "me") == [second]


def commands(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Stand-ins for Slurm's commands: these only."""
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


JSON_OR = 'for word; do last=$word; done; if [ "$last" = --json ]; then {}; else {}; fi'
LISTED = "echo '12|diffussm-a-run'"


@pytest.mark.parametrize(
    "answer",
    ["echo 'no JSON plugin' >&2; exit 1", "echo '{'", """echo '{"errors": [], "jobs": [{}]}'"""],
    ids=["no plugin", "no JSON", "unknown shape"],
)
def test_where_there_is_no_json_the_words_are_read(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = SHOWN.replace("it%27s", "its")
    said = JSON_OR.format(answer, LISTED)
    commands(tmp_path, monkeypatch, squeue=said, scontrol=f"echo '{plain}'")
    assert squeue.jobs("a-run") == described(plain)


def test_a_slurm_that_does_not_answer_is_no_empty_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands(tmp_path, monkeypatch, squeue="echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(MissingError, match=r"squeue .*: Unable to contact slurm controller"):
        squeue.jobs()


def test_a_slurm_that_hangs_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squeue, "ANSWER_S", 0.2)
    commands(tmp_path, monkeypatch, squeue="exec /bin/sleep 60")
    with pytest.raises(MissingError, match=r"squeue .*: no answer within 0.2 s"):
        squeue.jobs()


def test_what_the_controller_has_forgotten_comes_from_sacct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = json.dumps({"errors": [], "jobs": [QUEUED | {"user_id": os.getuid()}]})
    words = JSON_OR.format("exit 1", "echo '9|diffussm-a-run|TIMEOUT|n1|/s/a-run'")
    commands(tmp_path, monkeypatch, squeue=f"echo '{listed}'", sacct=words)
    assert [(job.id, job.state) for job in squeue.jobs("a-run")] == [("12", "RUNNING"), ("9", "TIMEOUT")]
