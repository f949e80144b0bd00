"""What Slurm knows of our jobs: squeue finds them, sacct remembers them.

Slurm's JSON is read first. Its shape differs between versions: numbers became {"set", "infinite", "number"}, states
became lists; both are read here. Where a Slurm has no JSON (it is a plugin), or writes what is not known here, the
words of `squeue -o`, `scontrol -o` and `sacct -P` are read instead.

A sweep is one array of that name, and each of its tasks a run: task 3 of `diffussm-a` is the run `a-3`.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

from diffussm.errors import MissingError
from diffussm.naming import join
from launch.target import PREFIX, Job

ALIVE = frozenset(
    {
        *("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED"),
        *("RESIZING", "STAGE_OUT", "SIGNALING", "SPECIAL_EXIT", "STOPPED", "RESV_DEL_HOLD"),
    }
)
"""States in which a job is running or will run."""

_KEY = re.compile(r"(?:^| )([A-Za-z][A-Za-z0-9/:_-]*)=")
_NO_TASK = 0xFFFFFFFE
"""Stands where Slurm fills a task's number into the name of a file before the task has begun."""
_FORGOTTEN_DAYS = 30
ANSWER_S = 60.0
"""Longest wait for one of Slurm's commands; each tries again by itself while the controller is away."""
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError)
"""What reading JSON of an unknown shape raises."""


def jobs(run: str = "") -> list[Job]:
    """Our jobs of this user, of one run, one sweep or all, those alive first; empty where there is no Slurm.

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
    found += [job for job in _remembered(run) if job.id not in known]
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
    lines = [line for each in ids for line in _words(_show(each)).splitlines() if line]
    found = _wanted((job for line in lines for job in described(line)), run)
    return list({job.id: job for job in found}.values())  # asked for an array, scontrol shows all its tasks


def queued(text: str, run: str, user: int) -> list[Job]:
    """Jobs of `squeue --json`. Before Slurm 23.02 it lists everybody's, so they are told apart here.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: another shape than those known here.
    """
    found: list[Job] = []
    for each in _listed(text):
        if not _is_ours(each["name"], run) or _whole(each["user_id"]) != user:
            continue
        states = _states(each["job_state"])
        alive = not ALIVE.isdisjoint(states)
        task = _whole(each["array_task_id"])
        parent, number = _whole(each["array_job_id"]), _whole(each["job_id"])
        marks = {"x": each["name"], "j": number, "A": parent or number, "a": task, "u": each["user_name"]}
        reason = each["state_reason"].replace("None", "")
        job = Job(
            id=str(number),
            run=each["name"].removeprefix(PREFIX),
            state=_word(states),
            alive=alive,
            where=each["nodes"] or (reason if alive else ""),
            restarts=_whole(each["restart_cnt"]) or 0,
            root=unquote(each["comment"]),
            log=_expanded(each["standard_output"], marks),
        )
        found += _by_task(job, str(parent), str(task) if task is not None else each["array_task_string"])
    return _wanted(found, run)


def accounted(text: str, run: str, user: str) -> list[Job]:
    """Jobs of `sacct --json`, for those that the controller has forgotten. Raises as `queued`."""
    found: list[Job] = []
    for each in _listed(text):
        if not _is_ours(each["name"], run) or each["user"] != user:
            continue
        parent, task = _whole(each["array"]["job_id"]), _whole(each["array"]["task_id"])
        if parent and task is None:
            continue  # tasks that have not begun: the controller has not forgotten them
        states = _states(each["state"]["current"])
        number, run_or_sweep = str(_whole(each["job_id"])), each["name"].removeprefix(PREFIX)
        where = each["nodes"].replace("None assigned", "")
        root = unquote(each["comment"]["job"] or "")
        alive = not ALIVE.isdisjoint(states)
        job = Job(number, run_or_sweep, _word(states), alive, where, 0, root, "")
        found += _by_task(job, str(parent), str(task) if parent else "")
    return _wanted(found, run)


def described(line: str) -> list[Job]:
    """One line of `scontrol -o show job`: a job, or the tasks of an array that have not begun."""
    keys = [(match.group(1), match.start(), match.end()) for match in _KEY.finditer(line)]
    ends = [start for _, start, _ in keys[1:]] + [len(line)]
    values = {name: line[begin:end].strip() for (name, _, begin), end in zip(keys, ends, strict=True)}
    state = values.get("JobState", "UNKNOWN")
    alive = state in ALIVE
    nodes = values.get("NodeList", "").replace("(null)", "")
    reason = values.get("Reason", "").replace("None", "")
    log = values.get("StdOut", "")  # of tasks that wait scontrol names a file that none of them will have
    job = Job(
        id=values.get("JobId", ""),
        run=values.get("JobName", "").removeprefix(PREFIX),
        state=state,
        alive=alive,
        where=nodes or (reason if alive else ""),
        restarts=int(values.get("Restarts", "0") or 0),
        root=unquote(values.get("Comment", "")),
        log=log if "%" not in log and str(_NO_TASK) not in log else "",
    )
    return _by_task(job, values.get("ArrayJobId", ""), values.get("ArrayTaskId", ""))


def remembered(text: str, run: str = "") -> list[Job]:
    """Lines of `sacct`, for jobs that the controller has forgotten."""
    found: list[Job] = []
    for line in text.splitlines():
        number, name, state, nodes, comment = [*line.split("|"), "", "", "", ""][:5]
        parent, _, task = number.partition("_")
        if _is_ours(name, run) and not task.startswith("["):  # 12_[3-5]: as in `accounted`
            word = state.split(" ", 1)[0]  # CANCELLED by 1000
            where = nodes.replace("None assigned", "")
            job = Job(number, name.removeprefix(PREFIX), word, word in ALIVE, where, 0, unquote(comment), "")
            found += _by_task(job, parent, task)
    return _wanted(found, run)


def _is_ours(name: str, run: str) -> bool:
    """Whether a job of that name can be the run, or the array that the run is a task of."""
    return name.startswith(PREFIX) and (not run or name.removeprefix(PREFIX) in _names(run))


def _names(run: str) -> list[str]:
    """Under which a run can be in the queue: its own, and that of the sweep it may be of."""
    return list(dict.fromkeys([run, re.sub(r"-\d+$", "", run)]))


def _wanted(found: Iterable[Job], run: str) -> list[Job]:
    return [job for job in found if run in ("", job.run, job.sweep)]


def _by_task(job: Job, parent: str, tasks: str) -> list[Job]:
    """The runs of a sweep, if `tasks` has any: they lie below the sweep's place. Else the job as it is."""
    if not tasks:
        return [job]
    found = []
    for task in _numbers(tasks):
        run = f"{job.run}-{task}"
        root, log = join(job.root, run) if job.root else "", job.log if tasks.isdecimal() else ""  # not begun: no file
        found.append(replace(job, id=f"{parent}_{task}", run=run, sweep=job.run, root=root, log=log))
    return found


def _numbers(tasks: str) -> list[int]:
    """Of `3`, `1-4,7%2`, `0-8:2`, as Slurm writes tasks; raises ValueError for anything else."""
    found: list[int] = []
    for part in tasks.partition("%")[0].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        found += range(int(first), int(last or first) + 1, int(step or 1))
    return found


def _show(job: str) -> list[str]:
    return ["scontrol", "--oneliner", "show", "job", job]


def _remembered(run: str) -> list[Job]:
    name = ["--name=" + ",".join(PREFIX + each for each in _names(run))] if run else []
    command = ["sacct", "-X", f"--starttime=now-{_FORGOTTEN_DAYS}days", *name]
    try:
        return accounted(_words([*command, "--json"]), run, pwd.getpwuid(os.getuid()).pw_name)
    except _UNREADABLE:
        fields = "--format=JobID,JobName%255,State,NodeList,Comment%1024"
        return remembered(_words([*command, "-P", "--noheader", fields]), run)


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


def _word(states: Sequence[str]) -> str:
    """The one that says most: the last flag, but a job that is sent a signal or resized runs."""
    return states[0] if set(states[1:]) <= {"SIGNALING", "RESIZING"} else states[-1]


def _expanded(file: str, marks: Mapping[str, object]) -> str:
    """A name with Slurm's marks filled in; "" if one is not known, or not yet."""
    if any(marks.get(mark) is None for mark in re.findall("%(.?)", file)):
        return ""
    return re.sub("%(.)", lambda found: str(marks[found.group(1)]), file)


def _number(job: str) -> int:
    digits = re.match(r"\d+", job)
    return int(digits.group()) if digits else 0


def silent(command: Sequence[str]) -> MissingError:
    """What to say of a command that did not end."""
    return MissingError(
        f"{shlex.join(command)}: no answer within {ANSWER_S:g} s", "look whether Slurm answers: scontrol ping"
    )


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Raises FileNotFoundError, and MissingError if it does not end."""
    whole = os.environ | {"SLURM_BITSTR_LEN": "0"}  # or a long list of tasks ends in "..."
    try:
        return subprocess.run(  # noqa: S603 - a list
            command, capture_output=True, text=True, check=False, env=whole, timeout=ANSWER_S
        )
    except subprocess.TimeoutExpired as error:
        raise silent(command) from error


def _asked(command: Sequence[str]) -> str:
    """Output of a command that must answer. Raises FileNotFoundError, and MissingError with what it said."""
    done = _run(command)
    if done.returncode:
        raise MissingError(
            f"{shlex.join(command)}: {'; '.join(done.stderr.splitlines()) or done.returncode}",
            "look whether Slurm answers: scontrol ping",
        )
    return done.stdout


def _words(command: Sequence[str]) -> str:
    """Output of a command that only looks; nothing where it is missing or has nothing to say (sacct without a
    database or with one that does not answer, a job that ended in between)."""
    try:
        done = _run(command)
    except (FileNotFoundError, MissingError):
        return ""
    return done.stdout if done.returncode == 0 else ""
