"""The target `local`: the job in the background of this machine, which is its own scheduler.

This machine's notes of its jobs lie in one folder of the user ($XDG_STATE_HOME, else ~/.local/state); each process is
known by its number and the time it began, so that a number used again is not taken for it.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from diffussm.errors import UsageError
from launch import local
from launch.target import Job, Submission, tail


@dataclass(frozen=True)
class _Note:
    """What is kept of a job."""

    run: str
    pid: int
    began: str
    """The kernel's clock ticks at which the process began."""
    root: str
    log: str


@dataclass(frozen=True)
class Background:
    """The target `local`."""

    name: str = "local"

    def render(self, submission: Submission) -> str:
        """The command line and the config it reads. Raises UsageError if it is a sweep."""
        return f"{local.shown(_command(submission, _folder()))}\n\n# {submission.cfg.name}.yaml\n{submission.config}"

    def submit(self, submission: Submission) -> str:
        """Start the job in a session of its own. Raises UsageError if the run is at work or is a sweep."""
        run, folder = submission.cfg.name, _folder()
        command = _command(submission, folder)
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            there = self.jobs(run)
            if there and there[0].alive:
                raise UsageError(f"{there[0].line}: is there already", f"stop it first: diffussm stop {run}")
            (folder / f"{run}.yaml").write_text(submission.config)
            log = folder / f"{run}.log"
            with log.open("ab") as output:
                process = subprocess.Popen(  # noqa: S603 - a list, no shell
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            note = _Note(run, process.pid, _began(process.pid), submission.root, str(log))
            kept = folder / f"{run}.json.new"
            kept.write_text(json.dumps(asdict(note)))
            kept.replace(folder / f"{run}.json")  # never half a note: every look at this machine's jobs reads it
        return str(process.pid)

    def jobs(self, run: str = "") -> list[Job]:
        """As `Target.jobs`."""
        files = [_folder() / f"{run}.json"] if run else sorted(_folder().glob("*.json"))
        notes = [_Note(**json.loads(file.read_text())) for file in files if file.exists()]
        found = [_job(note) for note in notes]
        return sorted(found, key=lambda job: not job.alive)

    def logs(self, job: Job, lines: int) -> Iterator[str]:
        """As `Target.logs`."""
        return tail(job.log, lines)

    def stop(self, job: Job, now: bool) -> str:
        """As `Target.stop`."""
        if not job.alive:
            return f"process {job.id} has ended already"
        os.kill(int(job.id), signal.SIGKILL if now else signal.SIGTERM)
        return f"process {job.id} is {'killed' if now else 'asked to save and leave'}"


def _command(submission: Submission, folder: Path) -> list[str]:
    if submission.variants:
        raise UsageError("--sweep: found with --to local; allowed: --to slurm", "submit its runs one at a time")
    return [*local.module("cluster.driver"), str(folder / f"{submission.cfg.name}.yaml")]


def _job(note: _Note) -> Job:
    alive = bool(note.began) and _began(note.pid) == note.began
    return Job(str(note.pid), note.run, "RUNNING" if alive else "ENDED", alive, "", 0, note.root, note.log)


def _began(pid: int) -> str:
    """When a process began, by the kernel's clock; "" if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "diffussm" / "jobs"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One submission at a time, so that two of the same run cannot both find it free."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
