"""What Slurm knows of our jobs: squeue finds them, sacct remembers them.

Slurm's JSON is read first. Its shape differs between versions: numbers became {"set", "infinite", "number"}, states
became lists; both are read here. Where a Slurm has no JSON (it is a plugin), or writes what is not known here, the
words of `squeue -o`, `scontrol -o` and `sacct -P` are read instead.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from diffussm.errors import MissingError
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
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError)
"""What reading JSON of an unknown shape raises."""


def jobs(run: str = "") -> list[Job]:
    """Our jobs of this user, of one run or all, those alive first; empty where there is no Slurm.

    Raises:
        MissingError: there is a Slurm, and it does not answer.
    """
    try:
        found = listed_by_json(run)
    except FileNotFoundError:
        return []
    except (MissingError, *_UNREADABLE):
        found = listed_by_words(run)
    known = {job.id for job in found}
    found += [job for job in _remembered(run) if job.id not in known and (not run or job.run == run)]
    return sorted(found, key=lambda job: (not job.alive, job.run, -_number(job.id)))


def listed_by_json(run: str = "") -> list[Job]:
    """What the controller knows, from `squeue --json`.

    Raises:
        FileNotFoundError: there is no Slurm here.
        MissingError: it does not answer, or has no plugin for JSON.
        ValueError, KeyError, TypeError, AttributeError: it writes another shape than those known here.
    """
    return queued(_asked(["squeue", "--me", "--states=all", "--json"]), run, os.getuid())


def listed_by_words(run: str = "") -> list[Job]:
    """The same from `squeue -o` and `scontrol -o`. Raises FileNotFoundError, MissingError as `listed_by_json`."""
    # %A and not %i, which is 5_[0-2] for tasks that wait: scontrol does not take that.
    listed = _asked(["squeue", "--me", "--noheader", "--states=all", "--format=%A|%j"])
    ids = [line.split("|", 1)[0] for line in listed.splitlines() if _is_ours(line.partition("|")[2], run)]
    found = [described(line) for each in ids for line in _words(_show(each)).splitlines() if line]
    return list({job.id: job for job in found}.values())  # asked for an array, scontrol shows all its tasks


def queued(text: str, run: str, user: int) -> list[Job]:
    """Jobs of `squeue --json`. Before Slurm 23.02 it lists everybody's, so they are told apart here.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: another shape than those known here.
    """
    found = []
    for each in _listed(text):
        if not _is_ours(each["name"], run) or _whole(each["user_id"]) != user:
            continue
        states = _states(each["job_state"])
        alive = not ALIVE.isdisjoint(states)
        task = _whole(each["array_task_id"])
        parent, number = _whole(each["array_job_id"]), _whole(each["job_id"])
        marks = {"x": each["name"], "j": number, "A": parent or number, "a": task, "u": each["user_name"]}
        reason = each["state_reason"].replace("None", "")
        found.append(
            Job(
                id=f"{parent}_{task}" if parent and task is not None else str(number),
                run=each["name"].removeprefix(PREFIX),
                state=states[-1],
                alive=alive,
                where=each["nodes"] or (reason if alive else ""),
                restarts=_whole(each["restart_cnt"]) or 0,
                root=unquote(each["comment"]),
                log=_expanded(each["standard_output"], marks),
            )
        )
    return found


def accounted(text: str, run: str, user: str) -> list[Job]:
    """Jobs of `sacct --json`, for those that the controller has forgotten. Raises as `queued`."""
    found = []
    for each in _listed(text):
        if not _is_ours(each["name"], run) or each["user"] != user:
            continue
        states = _states(each["state"]["current"])
        parent, task = _whole(each["array"]["job_id"]), _whole(each["array"]["task_id"])
        number = f"{parent}_{task}" if parent and task is not None else str(_whole(each["job_id"]))
        where = each["nodes"].replace("None assigned", "")
        root = unquote(each["comment"]["job"] or "")
        alive = not ALIVE.isdisjoint(states)
        found.append(Job(number, each["name"].removeprefix(PREFIX), states[-1], alive, where, 0, root, ""))
    return found


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
    begun = not task or task.isdecimal()  # of tasks that wait scontrol names a file that none of them will have
    log = values.get("StdOut", "") if begun else ""
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


def _remembered(run: str) -> list[Job]:
    name = [f"--name={PREFIX}{run}"] if run else []
    command = ["sacct", "-X", f"--starttime=now-{_FORGOTTEN_DAYS}days", *name]
    try:
        return accounted(_words([*command, "--json"]), run, pwd.getpwuid(os.getuid()).pw_name)
    except _UNREADABLE:
        fields = "--format=JobID,JobName%255,State,NodeList,Comment%1024"
        return remembered(_words([*command, "-P", "--noheader", fields]))


def _listed(text: str) -> list[Mapping[str, Any]]:
    found = json.loads(text)
    if found["errors"]:
        raise ValueError(f"Slurm's JSON tells of errors: {found['errors']}")
    listed: list[Mapping[str, Any]] = found["jobs"]
    return listed


def _whole(value: Any) -> int | None:
    """A number, which newer versions wrap; None where it is not set."""
    if isinstance(value, dict):
        return int(value["number"]) if value["set"] else None
    return None if value is None else int(value)


def _states(value: Any) -> list[str]:
    """The state and its flags, which newer versions list; the last word says most."""
    states = [value] if isinstance(value, str) else list(value)
    if not states or not all(isinstance(state, str) for state in states):
        raise ValueError(f"Slurm's JSON has the state {value!r}")
    return [state.split(" ", 1)[0] for state in states]  # CANCELLED by 1000


def _expanded(file: str, marks: Mapping[str, object]) -> str:
    """A name with Slurm's marks filled in; "" if one is not known, or not yet."""
    if any(marks.get(mark) is None for mark in re.findall("%(.?)", file)):
        return ""
    return re.sub("%(.)", lambda found: str(marks[found.group(1)]), file)


def _number(job: str) -> int:
    digits = re.match(r"\d+", job)
    return int(digits.group()) if digits else 0


def _asked(command: Sequence[str]) -> str:
    """Output of a command that must answer. Raises FileNotFoundError, and MissingError with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a list, no shell
    if done.returncode:
        raise MissingError(
            f"{shlex.join(command)}: {'; '.join(done.stderr.splitlines()) or done.returncode}",
            "look whether Slurm answers: scontrol ping",
        )
    return done.stdout


def _words(command: Sequence[str]) -> str:
    """Output of a command that only looks; nothing where it is missing or has nothing to say (sacct without a
    database, a job that ended in between)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a list, no shell
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""
