"""Slurm: the batch script of a run, and sbatch, scancel and scontrol to hand it over and look after it.

Values never meet a shell unquoted. In the script every value passes through `shlex.quote`, by the template's own
`finalize`, so that a new line of the template cannot forget it; what stands in `#SBATCH` lines has been held to plain
words by the rules of section `slurm`. Commands are started from lists of arguments, without a shell.
"""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from diffussm.config.plan import layout
from diffussm.config.schema import Config
from diffussm.config.schema_jobs import Container
from diffussm.config.slurm import is_line
from diffussm.errors import MissingError, UsageError
from launch import squeue
from launch.target import Job, Submission, tail

TEMPLATE = "slurm.sh.j2"
SPARE_CPUS = 2
"""Cores of a node beside those of its workers: Ray, the driver."""


class _Verbatim(str):
    """Text that may stand in the script as it is."""


@dataclass(frozen=True)
class Slurm:
    """The target `slurm`."""

    name: str = "slurm"

    def render(self, submission: Submission) -> str:
        """The batch script. Pure: the same for the same submission."""
        return render(submission)

    def submit(self, submission: Submission) -> str:
        """Ask with --test-only, then hand over. Raises as `Target.submit`."""
        known = self.jobs() if submission.variants else self.jobs(submission.cfg.name)
        taken = {submission.cfg.name, *submission.runs}
        there = [job for job in known if job.alive and not taken.isdisjoint((job.run, job.sweep))]
        if there:
            raise UsageError(f"{there[0].line}: is there already", f"stop it first: diffussm stop {there[0].run}")
        script = self.render(submission)
        array = _array(submission)
        # An impossible request is otherwise accepted and waits for ever.
        _ask(["sbatch", "--test-only", *array], script)
        Path(submission.cfg.slurm.logs).mkdir(parents=True, exist_ok=True)
        return _ask(["sbatch", "--parsable", *array], script).strip().partition(";")[0]

    def jobs(self, run: str = "") -> list[Job]:
        """As `Target.jobs`."""
        return squeue.jobs(run)

    def logs(self, job: Job, lines: int) -> Iterator[str]:
        """As `Target.logs`."""
        return tail(job.log, lines)

    def stop(self, job: Job, now: bool) -> str:
        """As `Target.stop`; a job that waits is taken out of the queue."""
        if now or job.state != "RUNNING":
            _ask(["scancel", job.id])
            return f"job {job.id} is cancelled"
        if job.sweep:
            _signal(job.id)
        else:
            _ask(["scancel", "--batch", "--signal=USR2", job.id])
        return f"job {job.id} is asked to save and leave"


def render(submission: Submission) -> str:
    """The batch script of a submission. Pure.

    Raises:
        ConfigError: `cluster.workers` do not fill whole nodes.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("launch"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_shell,
        autoescape=False,  # noqa: S701 - this is no HTML; `finalize` quotes for the shell
    )
    environment.filters |= {"verbatim": _verbatim, "comment": _verbatim}
    return environment.get_template(TEMPLATE).render(_context(submission))


def options(submission: Submission) -> list[str]:
    """The options of sbatch, each one word, in the order of the script."""
    cfg, slurm = submission.cfg, submission.cfg.slurm
    nodes, each = layout(cfg)
    gpus = _gpus(cfg, each)
    file = "%x-%A_%a.log" if submission.variants else "%x-%j.log"
    logs = f"{slurm.logs}/{file}"
    chosen: list[tuple[str, object]] = [
        ("job-name", submission.job_name),
        ("comment", quote(submission.root, safe="/:@._-")),
        ("nodes", nodes),
        ("ntasks-per-node", 1),
        ("cpus-per-task", _cpus(cfg, each)),
        ("gres", slurm.gres or (f"gpu:{gpus}" if gpus else "")),
        ("mem", _memory(cfg)),
        ("time", _duration(slurm.time_s) if slurm.time_s else ""),
        ("partition", slurm.partition),
        ("account", slurm.account),
        ("qos", slurm.qos),
        ("constraint", slurm.constraint),
        ("exclude", slurm.exclude),
        ("dependency", slurm.dependency),
        ("begin", slurm.begin),
        ("signal", f"B:USR1@{slurm.warning_s}"),
        ("open-mode", "append"),
        ("output", f'"{logs}"' if " " in logs else logs),
    ]
    flags = ["--exclusive"] if slurm.exclusive else []
    return [*(f"--{name}={value}" for name, value in chosen if value != ""), "--requeue", *flags, *slurm.options]


def _context(submission: Submission) -> dict[str, Any]:
    cfg, slurm = submission.cfg, submission.cfg.slurm
    nodes, each = layout(cfg)
    mounts = ",".join(slurm.mounts)
    return {
        "name": cfg.name,
        "options": options(submission),
        "nodes": nodes,
        "max_restarts": slurm.max_restarts,
        "python": slurm.python or (sys.executable if slurm.container is Container.none else "python3"),
        "logs": slurm.logs,
        "job_name": submission.job_name,
        "container": slurm.container.name,
        "image": slurm.image,
        "mount_list": slurm.mounts,
        "mounts_with_comma": _Verbatim(shlex.quote(mounts) + "," if mounts else ""),
        "modules": slurm.modules,
        "environment": [variable.split("=", 1) for variable in slurm.environment],
        "warning_s": slurm.warning_s,
        "start_timeout_s": slurm.start_timeout_s,
        "cpus": _cpus(cfg, each),
        # No more than the ranks take, or Ray would put the next node's ranks here too.
        "ray_cpus": math.ceil(each * cfg.cluster.cpus_per_worker),
        "gpus": _gpus(cfg, each),
        "config": _Verbatim(submission.config),
        "delimiter": _delimiter(submission.config),
        "overrides": [f"cluster.grace_s={slurm.warning_s}"],
        "variants": submission.variants,
    }


def _shell(value: object) -> str:
    """What an expression of the template becomes: quoted, unless it was marked as plain."""
    return value if isinstance(value, _Verbatim) else shlex.quote(str(value))


def _verbatim(value: object) -> _Verbatim:
    """Let a value stand as it is, where it is one line."""
    if not isinstance(value, _Verbatim) and not is_line(str(value)):
        raise ValueError(f"{value!r} is not one line of text")
    return _Verbatim(value)


def _delimiter(config: str) -> str:
    """A line that ends the config in the script and stands nowhere in it."""
    word, lines = "END_OF_CONFIG", config.splitlines()
    while word in lines:
        word += "_"
    return word


def _array(submission: Submission) -> list[str]:
    if not submission.variants:
        return []
    limit = submission.cfg.slurm.array_limit
    return [f"--array=0-{len(submission.variants) - 1}" + (f"%{limit}" if limit else "")]


def _gpus(cfg: Config, each: int) -> int:
    return math.ceil(each * cfg.cluster.gpus_per_worker)


def _cpus(cfg: Config, each: int) -> int:
    return cfg.slurm.cpus_per_node or math.ceil(each * cfg.cluster.cpus_per_worker) + SPARE_CPUS


def _memory(cfg: Config) -> str:
    """Slurm counts in MiB; 0 is all of a node."""
    size = cfg.slurm.node_memory_bytes
    return f"{math.ceil(size / (1 << 20))}M" if size else "0" if cfg.slurm.exclusive else ""


def _duration(seconds: int) -> str:
    """D-HH:MM:SS."""
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    day, hour = divmod(hours, 24)
    return f"{day}-{hour:02}:{minute:02}:{second:02}"


def _signal(task: str) -> None:
    """SIGUSR2 to the script of a task that runs.

    While others of the array wait, Slurm (22.05) delivers it and answers that the job is in a transitional state, and
    scancel would give it again and again; so the first such answer is taken for what it is.
    """
    command = ["scancel", "--verbose", "--batch", "--signal=USR2", task]
    said = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as asked:  # noqa: S603 - a list
        for line in asked.stderr or ():
            said.append(line.strip())
            if "transitional state" in line:
                asked.kill()
                return
    if asked.returncode:
        raise MissingError(
            f"{shlex.join(command)}: {'; '.join(said[-2:])}", "look whether Slurm answers: scontrol ping"
        )


def _ask(command: Sequence[str], given: str = "") -> str:
    """Run one of Slurm's commands; its output, or MissingError with what it said."""
    try:
        done = subprocess.run(  # noqa: S603 - a list
            command, input=given, capture_output=True, text=True, check=False, timeout=squeue.ANSWER_S
        )
    except subprocess.TimeoutExpired as error:
        raise squeue.silent(command) from error
    except FileNotFoundError as error:
        raise MissingError(
            f"{command[0]}: is not on this machine", "submit on a login node of the cluster, or use --to local"
        ) from error
    if done.returncode:
        raise MissingError(f"{shlex.join(command)}: {done.stderr.strip() or done.returncode}", "mend section slurm")
    return done.stdout
