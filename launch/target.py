"""What every place to run in has in common: the seam between the verbs of the command line and the schedulers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from diffussm.config.schema import Config
from diffussm.naming import RunPaths

PREFIX = "diffussm-"
"""Of the names of our jobs, so that they are told from others."""


@dataclass(frozen=True)
class Submission:
    """A checked config on its way to a scheduler."""

    cfg: Config
    """Local places are absolute."""
    config: str
    """What differs from the defaults, as YAML: what the job reads."""
    variants: tuple[tuple[str, ...], ...] = ()
    """Of a sweep: the overrides of each run, its name among them."""
    measured_save_s: float | None = None
    """Seconds that the newest save of this run took; None before its first."""
    planned_save_s: float | None = None
    """Seconds that a save should take by the plan; None where the size of the latents is not known."""
    swept: tuple[Config, ...] = ()
    """Of a sweep: the whole config of each run."""
    interactive: bool = False
    """A cluster to work in, which runs nothing by itself; Kubernetes alone has that."""

    @property
    def job_name(self) -> str:
        """Under which the scheduler knows it."""
        return PREFIX + self.cfg.name

    @property
    def runs(self) -> list[str]:
        """Names of the runs: its own, or those of a sweep."""
        return [given[0].removeprefix("name=") for given in self.variants] or [self.cfg.name]

    @property
    def root(self) -> str:
        """The run's folder or prefix; of a sweep, the place that holds its runs."""
        return self.cfg.storage if self.variants else RunPaths(self.cfg.storage, self.cfg.name).root


@dataclass(frozen=True)
class Job:
    """One job as its scheduler sees it."""

    id: str
    run: str
    """Name of the run."""
    state: str
    """The scheduler's own word."""
    alive: bool
    """Whether it runs or waits to run."""
    where: str
    """Nodes it has, or the reason why it waits."""
    restarts: int
    root: str
    """Where the run lies; "" if the scheduler has forgotten."""
    log: str
    """File of its output; "" if there is none."""
    sweep: str = ""
    """Name of the sweep that the run is of; "" if it is of none."""

    @property
    def line(self) -> str:
        """For people."""
        again = f", restart {self.restarts}" if self.restarts else ""
        return f"{self.run}  job {self.id}: {self.state.lower()}{again}{f' ({self.where})' if self.where else ''}"


class Target(Protocol):
    """A place to run in: Slurm, Kubernetes, this machine."""

    @property
    def name(self) -> str:
        """As `--to` says it."""

    def render(self, submission: Submission) -> str:
        """The job as text, the same for the same submission. Pure."""

    def submit(self, submission: Submission) -> str:
        """Hand the job over and return its id.

        Raises:
            UsageError: a job of that name is there already.
            MissingError: the scheduler's tools are not on this machine, or it refused.
        """

    def jobs(self, run: str = "") -> list[Job]:
        """Jobs of one run, or all of ours, those alive first. Empty when the scheduler knows none."""

    def logs(self, job: Job, lines: int) -> Iterator[str]:
        """The last lines of a job's output."""

    def stop(self, job: Job, now: bool) -> str:
        """Let the job save and leave, or with `now` end it at once; returns what was done, for people."""


@runtime_checkable
class Streams(Protocol):
    """A place whose output is in no file that can be followed, but which hands it over as it comes."""

    def stream(self, job: Job, lines: int) -> Iterator[str]:
        """The last lines of a job's output, and then what is added."""


def tail(file: str, lines: int) -> Iterator[str]:
    """The last lines of a file; nothing if it is not there yet."""
    if Path(file).exists():
        with Path(file).open(errors="replace") as text:
            yield from (line.rstrip("\n") for line in deque(text, maxlen=lines))
