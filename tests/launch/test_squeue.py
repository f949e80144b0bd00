"""What Slurm prints, read: lines as Slurm 22.05 and 23.11 write them."""

from __future__ import annotations

from launch.squeue import described, remembered

SHOWN = (
    "JobId=12 JobName=diffussm-a-run UserId=me(1000) GroupId=me(1000) MCS_label=N/A Priority=1 Nice=0 Account=(null) "
    "QOS=(null) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0 "
    "NodeList=n[1-2] BatchHost=n1 NumNodes=2 TRES=cpu=8,node=2,billing=8 Command=(null) WorkDir=/my home/x=y "
    "Comment=/s%20t/it%27s/a-run StdErr=/my logs/diffussm-a-run-12.log StdIn=/dev/null "
    "StdOut=/my logs/diffussm-a-run-12.log Power= "
)


def test_a_running_job() -> None:
    job = described(SHOWN)
    assert (job.id, job.run, job.state, job.alive, job.where) == ("12", "a-run", "RUNNING", True, "n[1-2]")
    assert (job.restarts, job.root, job.log) == (2, "/s t/it's/a-run", "/my logs/diffussm-a-run-12.log")
    assert "restart 2" in job.line


def test_a_waiting_job_says_why() -> None:
    line = SHOWN.replace("JobState=RUNNING Reason=None", "JobState=PENDING Reason=BeginTime")
    job = described(line.replace("NodeList=n[1-2]", "NodeList="))
    assert (job.alive, job.where) == (True, "BeginTime")


def test_a_task_of_an_array_and_one_that_has_not_begun() -> None:
    line = SHOWN.replace("JobId=12 ", "JobId=14 ArrayJobId=12 ArrayTaskId=2 ")
    assert described(line).id == "12_2"
    waiting = described(
        line.replace("ArrayTaskId=2", "ArrayTaskId=3-5").replace("StdOut=/my logs/", "StdOut=/my logs/%A")
    )
    assert (waiting.id, waiting.log) == ("14", "")


def test_unknown_keys_are_passed_over() -> None:
    assert described(SHOWN + " ResvPorts=1 Some:New/Key=a b").log == "/my logs/diffussm-a-run-12.log"


def test_the_memory_of_sacct() -> None:
    text = "9|diffussm-a|CANCELLED by 0|n1|/s/a\n8|other|COMPLETED|n1|\n7|diffussm-b|TIMEOUT|None assigned|s3://x/b\n"
    first, second = remembered(text)
    assert (first.id, first.run, first.state, first.alive, first.root) == ("9", "a", "CANCELLED", False, "/s/a")
    assert (second.run, second.where, second.root) == ("b", "", "s3://x/b")
