"""`diffussm doctor`: what the job's side finds on this machine, and what only this side knows: schedulers, and whether
a save fits into the time between a warning and the kill."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from diffussm.config import Config
from diffussm.errors import DiffuSSMError, ExitCode, UsageError
from launch import checks, local
from launch.estimate import Estimator
from launch.latent import latent

OK, WARN, BAD = "ok", "warn", "bad"
TARGETS = ("slurm", "kubernetes", "local")
WAIT_S = 10.0
"""Longest wait for a scheduler's answer."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    what: str
    state: str
    """`ok`; `warn`: work goes on without it; `bad`: jobs fail."""
    found: str
    remedy: str = ""
    """The command or step that mends it; empty when it is well."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What was measured, by a name with its unit."""

    @property
    def line(self) -> str:
        """For people, the remedy below."""
        tail = f"\n      -> {self.remedy}" if self.remedy and self.state != OK else ""
        return f"{self.state:<4}  {self.what}: {self.found}{tail}"


def survey(job: local.Job | None, target: str = "") -> Iterator[Finding]:
    """Look at this machine, then at the schedulers; one of them that is named by `target` is essential.

    Raises:
        UsageError: no such target.
    """
    if target not in ("", *TARGETS):
        raise UsageError(f"--to: found {target!r}; allowed: {', '.join(TARGETS)}")
    cfg = job.cfg if job else Config()
    for finding in machine(local.preflight(job)):
        yield finding
        if job and "write_bytes_per_s" in finding.numbers:
            yield from save(cfg, finding.numbers["write_bytes_per_s"], target)
    yield slurm(target == "slurm")
    yield kubernetes(cfg, target == "kubernetes")


def machine(command: Sequence[str]) -> Iterator[Finding]:
    """What `python -m cluster.preflight` finds, line by line as it comes."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asked:  # noqa: S603 - a list, no shell
        assert asked.stdout is not None  # noqa: S101 - it is a pipe
        for line in asked.stdout:
            yield Finding(**json.loads(line))
    if asked.returncode:
        remedy = "its last words are above; install the locked environment: make venv"
        yield Finding("machine", BAD, f"looking at this machine ended with {asked.returncode}", remedy)


def save(cfg: Config, bytes_per_s: float, target: str) -> Iterator[Finding]:
    """Whether a save fits between a warning and the kill, each node writing at the speed that was measured."""
    known = latent(cfg)
    if known is None:
        return
    try:
        planned = Estimator.of(cfg, known)
        seconds = planned.checkpoint_bytes / (planned.configured().nodes * bytes_per_s)
    except DiffuSSMError as error:
        yield Finding("save", BAD, error.message, error.remedy)
        return
    looked = checks.deadline(seconds, cfg, target, seconds)
    yield Finding("save", OK if looked.ok else WARN, looked.found, "" if looked.ok else looked.remedy)


def slurm(essential: bool) -> Finding:
    """Whether a Slurm controller answers, with its partitions and what it should be set to."""
    missing = BAD if essential else WARN
    if shutil.which("sinfo") is None:
        return Finding("slurm", missing, "sinfo is not installed here", "for --to slurm: log in to the cluster's node")
    mend = "scontrol ping shows whether the controller is up; squeue --me must work here for --to slurm"
    said: list[str] = []
    for command in (["sinfo", "--noheader", "--format=%R %a %D"], ["squeue", "--me", "--noheader"], _CONFIG):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_S)  # noqa: S603
        except subprocess.TimeoutExpired:
            return Finding("slurm", missing, f"{command[0]} does not answer within {WAIT_S:g} s", mend)
        except OSError as error:
            return Finding("slurm", missing, f"{command[0]}: {error}", mend)
        if done.returncode:
            words = (done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
            return Finding("slurm", missing, f"{command[0]}: {words}", mend)
        said.append(done.stdout)
    return told(said[0], said[2])


_CONFIG = ["scontrol", "show", "config"]


def told(partitions: str, config: str) -> Finding:
    """A controller that answers, from the words of `sinfo` and `scontrol show config`. Pure."""
    names = ", ".join(
        f"{line.split()[0]} ({line.split()[-1]} nodes)" for line in partitions.splitlines() if line.split()
    )
    settings = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in config.splitlines())}
    lacking = []
    if "preempt_send_user_signal" not in settings.get("SlurmctldParameters", ""):
        lacking.append("SlurmctldParameters=preempt_send_user_signal")
    if settings.get("ProctrackType", "") == "proctrack/linuxproc":
        lacking.append("ProctrackType=proctrack/cgroup")
    found = f"answers; partitions {names or 'none'}"
    if not lacking:
        return Finding("slurm", OK, found)
    return Finding(
        "slurm",
        WARN,
        f"{found}; {', '.join(lacking)} is not set",
        "ask whoever runs the cluster to set it in slurm.conf: docs/operations.md says what is lost without it",
    )


def kubernetes(cfg: Config, essential: bool) -> Finding:
    """Whether a cluster is configured, answers, and knows RayJobs."""
    missing = BAD if essential else WARN
    named = os.environ.get("KUBECONFIG") or os.environ.get("KUBERNETES_SERVICE_HOST")
    if not named and not (Path.home() / ".kube" / "config").exists():
        return Finding("kubernetes", missing, "no kubeconfig", "for --to kubernetes: set KUBECONFIG")
    from launch.kubernetes.client import Client  # late: the client is heavy

    try:
        version = Client(cfg.kubernetes.namespace).answers(WAIT_S)
    except DiffuSSMError as error:
        return Finding("kubernetes", missing, error.message, error.remedy)
    return Finding("kubernetes", OK, f"{version}, with RayJobs in namespace {cfg.kubernetes.namespace}")


def code(findings: Sequence[Finding]) -> ExitCode:
    """69 if anything is bad."""
    return ExitCode.ENVIRONMENT if any(each.state == BAD for each in findings) else ExitCode.DONE


def as_json(findings: Sequence[Finding]) -> str:
    """All findings and how many there are of each state."""
    counts = {state: sum(each.state == state for each in findings) for state in (OK, WARN, BAD)}
    return json.dumps({"counts": counts, "findings": [asdict(each) for each in findings]}, indent=1)


def summary(findings: Sequence[Finding]) -> str:
    """The last line."""
    bad, warn = (sum(each.state == state for each in findings) for state in (BAD, WARN))
    return f"\n{bad} bad, {warn} to know of, of {len(findings)} looked at"
