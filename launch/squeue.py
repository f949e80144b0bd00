"""What Slurm knows of our jobs: squeue finds them, scontrol describes them, sacct remembers them.

The words of `squeue -o` and `scontrol -o` are read, and keys that are not known are passed over: the shape of Slurm's
JSON differs between its versions, and 22.05 needs a plugin for it.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from urllib.parse import unquote

from launch.target import PREFIX, Job

ALIVE = frozenset(
    {
        *("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED"),
        *("RESIZING", "STAGE_OUT", "SIGNALING", "SPECIAL_EXIT", "STOPPED", "RESV_DEL_HOLD"),
    }
)
"""States in which a job is running or will run."""

_KEY = re.compile(r"(?:^| )([A-Za-z][A-Za-z0-9/:_-]*)=")
_FORGOTTEN_DAYS = 30


def jobs(run: str = "") -> list[Job]:
    """Our jobs of this user, of one run or all, those alive first; empty where there is no Slurm."""
    listed = _words(["squeue", "--me", "--noheader", "--states=all", "--format=%i|%j"])
    ids = [line.split("|", 1)[0] for line in listed.splitlines() if _is_ours(line.partition("|")[2], run)]
    found = [described(line) for each in dict.fromkeys(ids) for line in _words(_show(each)).splitlines() if line]
    known = {job.id for job in found}
    found += [job for job in remembered(_words(_sacct(run))) if job.id not in known and (not run or job.run == run)]
    return sorted(found, key=lambda job: (not job.alive, job.run, -_number(job.id)))


def described(line: str) -> Job:
    """One line of `scontrol -o show job`."""
    keys = [(match.group(1), match.start(), match.end()) for match in _KEY.finditer(line)]
    ends = [start for _, start, _ in keys[1:]] + [len(line)]
    values = {name: line[begin:end].strip() for (name, _, begin), end in zip(keys, ends, strict=True)}
    state = values.get("JobState", "UNKNOWN")
    alive = state in ALIVE
    nodes = values.get("NodeList", "").replace("(null)", "")
    reason = values.get("Reason", "").replace("None", "")
    task = values.get("ArrayTaskId", "")
    parent = values.get("ArrayJobId", "")
    log = values.get("StdOut", "")
    return Job(
        id=f"{parent}_{task}" if task.isdecimal() else values.get("JobId", ""),
        run=values.get("JobName", "").removeprefix(PREFIX),
        state=state,
        alive=alive,
        where=nodes or (reason if alive else ""),
        restarts=int(values.get("Restarts", "0") or 0),
        root=unquote(values.get("Comment", "")),
        log=log if "%" not in log else "",
    )


def remembered(text: str) -> list[Job]:
    """Lines of `sacct`, for jobs that the controller has forgotten."""
    found = []
    for line in text.splitlines():
        number, name, state, nodes, comment = [*line.split("|"), "", "", "", ""][:5]
        if name.startswith(PREFIX):
            word = state.split(" ", 1)[0]  # CANCELLED by 1000
            where = nodes.replace("None assigned", "")
            found.append(Job(number, name.removeprefix(PREFIX), word, word in ALIVE, where, 0, unquote(comment), ""))
    return found


def _is_ours(name: str, run: str) -> bool:
    return name == PREFIX + run if run else name.startswith(PREFIX)


def _show(job: str) -> list[str]:
    return ["scontrol", "--oneliner", "show", "job", job]


def _sacct(run: str) -> list[str]:
    name = [f"--name={PREFIX}{run}"] if run else []
    fields = "--format=JobID,JobName%255,State,NodeList,Comment%1024"
    return ["sacct", "-X", "-P", "--noheader", f"--starttime=now-{_FORGOTTEN_DAYS}days", *name, fields]


def _number(job: str) -> int:
    digits = re.match(r"\d+", job)
    return int(digits.group()) if digits else 0


def _words(command: Sequence[str]) -> str:
    """Output of a command that only looks; nothing where it is missing or has nothing to say (sacct without a
    database, a job that ended in between)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a list, no shell
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""
