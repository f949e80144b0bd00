"""The verbs that look after runs: status, logs, stop, list; the same for every target.

A run is found by its name: in the schedulers that this machine can ask, and in its storage. Nothing is remembered on
the machine that submitted it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffussm.config import Config
from diffussm.config.places import absolutely
from diffussm.errors import MissingError, StorageError, UsageError
from diffussm.naming import RunPaths, absolute, check_run_name, is_remote
from launch import local, store
from launch.background import Background
from launch.slurm import Slurm
from launch.target import Job, Streams, Target

NAMES = ("slurm", "kubernetes", "local")
STORAGE = "DIFFUSSM_STORAGE"
"""Environment variable: the storage in which a run that is given by name alone is looked for."""


def target(name: str, cfg: Config) -> Target:
    """The target of that name, for a config; raises UsageError if there is none."""
    match name:
        case "slurm":
            return Slurm()
        case "kubernetes":
            from launch.kubernetes.target import Kubernetes  # late: the client is heavy

            return Kubernetes(cfg.kubernetes.namespace)
        case "local":
            return Background()
    raise UsageError(f"--to: found {name!r}; allowed: {', '.join(NAMES)}")


def targets(cfg: Config | None = None) -> list[Target]:
    """Every place that this machine can ask; Kubernetes where there is a context or this is a pod.

    The namespace is the config's, or without one that of the context.
    """
    has_context = any(os.environ.get(name) for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"))
    with_cluster = has_context or (Path.home() / ".kube" / "config").exists()
    if cfg is None:
        cfg = Config()
        cfg.kubernetes.namespace = ""
    return [target(name, cfg) for name in NAMES if name != "kubernetes" or with_cluster]


@dataclass(frozen=True)
class Named:
    """A run that was named on the command line."""

    name: str
    place: str
    """Its folder or prefix; "" if only a scheduler can know it."""
    cfg: Config | None
    """None: nothing is known but the name."""


def named(run: str, overrides: Sequence[str] = ()) -> Named:
    """A run that is given as a config, a folder, a URL or a name."""
    if Path(run).exists():
        whole = absolutely(local.read(run, overrides).cfg)
        return Named(whole.name, RunPaths(whole.storage, whole.name).root, whole)
    if is_remote(run):
        parent, _, run = run.rstrip("/").rpartition("/")
        overrides = [*overrides, f"storage={parent}"]
    check_run_name(run)
    storage = os.environ.get(STORAGE, "")
    for text in overrides:
        key, _, value = text.partition("=")
        if key not in ("storage", "kubernetes.namespace") or not value:
            raise UsageError(
                f"{text}: found beside the name of a run; allowed: storage=..., kubernetes.namespace=...",
                "give the run's config or folder to override other keys",
            )
    given = dict(text.split("=", 1) for text in overrides)
    storage = given.get("storage", storage)
    cfg: Config | None = None
    if "kubernetes.namespace" in given:
        cfg = Config()
        cfg.kubernetes.namespace = given["kubernetes.namespace"]
    return Named(run, RunPaths(absolute(storage), run).root if storage else "", cfg)


def ask(places: Sequence[Target], run: str = "") -> tuple[list[tuple[Target, Job]], list[str]]:
    """Jobs of a run, or all of ours, in every place; and what kept a place from answering, for people."""
    jobs: list[tuple[Target, Job]] = []
    silent = []
    for place in places:
        try:
            jobs += [(place, job) for job in place.jobs(run)]
        except MissingError as error:
            silent.append(error.message)
    return jobs, silent


def status(run: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What schedulers and store say of a run: `run`, `jobs`, `store` (as `diffussm.observe.runs`), `silent`.

    Raises:
        UsageError: neither knows it.
    """
    asked = named(run, overrides)
    found, silent = ask(targets(asked.cfg), asked.name)
    jobs = [job for _, job in found]
    place = asked.place or next((job.root for job in jobs if job.root and job.run == asked.name), "")
    kept: Mapping[str, Any] = {"found": False}
    if place:
        try:
            kept = store.ask("status", place)
        except StorageError as error:  # what the schedulers said is told all the same
            silent.append(error.message)
    if not jobs and not kept["found"]:
        raise UsageError(
            f"{asked.name}: no scheduler on this machine and no storage knows it{_unasked(silent)}",
            f"give its config, or its storage: {STORAGE}=s3://bucket/runs diffussm status {asked.name}",
        )
    return {"run": asked.name, "jobs": jobs, "store": kept, "silent": silent}


def told(found: Mapping[str, Any]) -> str:
    """`status` for people."""
    lines = [job.line for job in found["jobs"]] or [f"{found['run']}  no job"]
    kept = found["store"]
    if kept["found"]:
        total = f" of {kept['total']:,}" if kept["total"] else ""
        done = "finished, " if kept["finished"] else ""
        lines.append(f"  {done}{kept['images']:,}{total} images; {kept['attempts']} starts; {kept['root']}")
        if kept["checkpoints"]:
            lines.append(f"  checkpoints at {', '.join(f'{images:,}' for images in kept['checkpoints'])} images")
        if kept["metrics"]:
            lines.append("  " + ", ".join(f"{key} {value:g}" for key, value in kept["metrics"].items()))
        if kept["score"]:
            lines.append(f"  {kept['score']}")
    return "\n".join([*lines, *(f"  not asked: {why}" for why in found["silent"])])


def listing(storage: str) -> str:
    """All our jobs that are alive, and all runs of the storage, if one is given."""
    found, silent = ask(targets())
    alive = [job for _, job in found if job.alive]
    busy = {job.run for job in alive}
    runs: list[str] = []
    if storage:
        try:
            runs = store.ask("list", absolute(storage))
        except StorageError as error:
            silent.append(error.message)
    lines = [job.line for job in alive] + [f"{run}  no job" for run in runs if run not in busy]
    return "\n".join([*(lines or ["no runs"]), *(f"not asked: {why}" for why in silent)])


def stop(run: str, now: bool, overrides: Sequence[str] = ()) -> str:
    """Stop every job of a run that is alive.

    Raises:
        UsageError: there is none.
    """
    asked = named(run, overrides)
    found, silent = ask(targets(asked.cfg), asked.name)
    alive = [(place, job) for place, job in found if job.alive]
    if not alive:
        raise UsageError(
            f"{asked.name}: has no job that runs or waits{_unasked(silent)}", "diffussm list shows those there are"
        )
    return "\n".join([*(place.stop(job, now) for place, job in alive), *(f"not asked: {why}" for why in silent)])


def newest(run: str, overrides: Sequence[str] = ()) -> tuple[Target, Job]:
    """The newest job of a run, an alive one first.

    Raises:
        UsageError: no scheduler knows one.
    """
    asked = named(run, overrides)
    found, silent = ask(targets(asked.cfg), asked.name)
    if not found:
        raise UsageError(
            f"{asked.name}: no scheduler knows a job of it{_unasked(silent)}",
            "the run's events.jsonl says what happened",
        )
    return min(found, key=lambda each: not each[1].alive)


def logs(run: str, lines: int, overrides: Sequence[str] = ()) -> Iterator[str]:
    """The last lines of a run's newest job. Raises UsageError as `newest`."""
    place, job = newest(run, overrides)
    return place.logs(job, lines)


def following(run: str, lines: int, overrides: Sequence[str] = ()) -> list[str] | Iterator[str]:
    """The command that shows the end of a log and what is added to it; where no file holds it, the lines themselves.

    Raises:
        UsageError: as `newest`, or the output is in no file.
    """
    place, job = newest(run, overrides)
    if isinstance(place, Streams):
        return place.stream(job, lines)
    if not job.log:
        raise UsageError(f"--follow: the output of {job.id} on {place.name} is in no file", "leave --follow out")
    return ["/usr/bin/env", "tail", f"--lines={lines}", "--follow=name", "--retry", "--", job.log]


def _unasked(silent: Sequence[str]) -> str:
    """A place that did not answer may have what was not found."""
    return "".join(f"; not asked: {why}" for why in silent)
