"""From a command of the user to the one command line that runs it on this machine.

The interface to the job is a command line and its exit code, nothing else; that of training and what follows it:

    python -P -m cluster.driver [--only STAGE] [--classes A,B] [--grid FILE] [--npz FILE]
        [--strip KIND] [--values A,B] [--checkpoint IMAGES] CONFIG [key=value]...

-P keeps the working folder out of the module path, where folders called `cluster` or `diffussm` would hide ours.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from diffussm.errors import ConfigError
from diffussm.naming import is_remote

if TYPE_CHECKING:
    from diffussm.config import Config


@dataclass(frozen=True)
class Job:
    """A checked config and where it came from."""

    path: str
    """YAML file, as the job will read it."""
    overrides: tuple[str, ...]
    """`key=value` in the order in which the job applies them."""
    cfg: Config = field(repr=False)
    """What they make together."""


def read(config: str, overrides: Sequence[str] = (), options: Mapping[str, object] | None = None) -> Job:
    """Load and check a config before anything starts.

    Args:
        config: a YAML file, or the folder or URL of a run.
        overrides: `key=value` from the command line.
        options: values of named options by config key; None means not given. They win over `overrides`.

    A run's folder that was moved or copied is used where it lies: `storage` follows it unless it is overridden.

    Raises:
        ConfigError: as `diffussm.config.load` and `check`, or a run's folder was renamed.
        StorageError: a run's bucket cannot be reached, or has no such run.
    """
    from diffussm.config import check, load  # late: half of the time that `--help` may take

    given = [*overrides, *(f"{key}={value}" for key, value in (options or {}).items() if value is not None)]
    path, home = Path(config), ""
    if is_remote(config):
        path, home = _fetched(config.rstrip("/")), config.rstrip("/")
    elif path.is_dir():
        path, home = path / "config.yaml", str(path.resolve())
    if home and not any(text.startswith(("storage=", "name=")) for text in given):
        cfg = load(path, given)
        storage, _, name = home.rpartition("/")
        if cfg.name != name:
            raise ConfigError(
                f"{home}: found name: {cfg.name!r} in its config; allowed: the folder's own name, {name!r}",
                f"rename the folder to {cfg.name}",
            )
        lies = cfg.storage.rstrip("/") if is_remote(cfg.storage) else str(Path(cfg.storage).resolve())
        if lies != storage:
            given.append(f"storage={storage}")
    cfg = load(path, given)
    check(cfg)
    return Job(str(path), tuple(given), cfg)


def run_of(path: str) -> tuple[str, int | None]:
    """A checkpoint's folder, `RUN/checkpoints/IMAGES`, as its run and images; anything else as it is."""
    run, _, images = path.rstrip("/").rpartition("/checkpoints/")
    if is_remote(run) and images.isdecimal():
        return run, int(images)
    folder = Path(path)
    if folder.parent.name == "checkpoints" and folder.name.isdecimal():
        return str(folder.parent.parent), int(folder.name)
    return path, None


def driver(job: Job, stage: str = "", flags: Mapping[str, object] | None = None) -> list[str]:
    """The command line of a job; `stage` runs that stage alone, and flags that are None or empty are left out."""
    only = ["--only", stage] if stage else []
    return [*module("cluster.driver"), *only, *_flags(flags or {}), job.path, *job.overrides]


def export(job: Job, flags: Mapping[str, object]) -> list[str]:
    """The command line of `diffussm export`."""
    return [*module("diffussm.export"), *_flags(flags), job.path, *job.overrides]


def report(job: Job, flags: Mapping[str, object]) -> list[str]:
    """The command line of `diffussm report`."""
    return [*module("diffussm.observe.report"), *_flags(flags), job.path, *job.overrides]


def preflight(job: Job | None) -> list[str]:
    """The command line of `diffussm doctor`."""
    return [*module("cluster.preflight"), *([job.path, *job.overrides] if job else [])]


def checkpoint(what: str, run: str, flags: Mapping[str, object]) -> list[str]:
    """The command line of `diffussm checkpoints` and `ema`; flags that are None, False or empty are left out."""
    command = [*module("diffussm.checkpoint"), what, run]
    for name, value in flags.items():
        if value is True:
            command.append(f"--{name}")
        elif value is not None and value is not False and value != "":
            command += [f"--{name}", str(value)]
    return command


def data(what: str, verify: bool, flags: Mapping[str, object]) -> list[str]:
    """The command line of `diffussm data`."""
    return [*module("diffussm.data"), *(["--verify"] if verify else []), *_flags(flags), what]


def chaos(job: Job, plan: str, starts: int, plain: bool) -> list[str]:
    """The command line of `diffussm chaos`."""
    options = ["--plan", plan, "--starts", str(starts), *(["--plain"] if plain else [])]
    return [*module("cluster.chaos"), *options, job.path, *job.overrides]


def bench(what: str, passed: Sequence[str]) -> list[str]:
    """The command line of `diffussm bench`."""
    return [*module("diffussm.bench"), what, *passed]


def profile(job: Job, as_json: bool, flags: Mapping[str, object]) -> list[str]:
    """The command line of `diffussm profile`."""
    json = ["--json"] if as_json else []
    return [*module("diffussm.bench.step"), *json, *_flags(flags), job.path, *job.overrides]


def run(command: Sequence[str]) -> NoReturn:
    """Become `command`: signals reach it directly and its exit code is ours."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], list(command))  # noqa: S606 - no shell is wanted


def shown(command: Sequence[str]) -> str:
    """`command` as it can be pasted into a shell."""
    return shlex.join(command)


def _fetched(url: str) -> Path:
    """A copy of the config of a run in a bucket, in the user's cache: the command that follows reads it there."""
    from launch import store  # it uses this module

    text: str = store.ask("config", url)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "diffussm" / "configs" / hashlib.sha256(url.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f"config.yaml.{os.getpid()}"
    fresh.write_text(text)
    return fresh.replace(folder / "config.yaml")


def _flags(flags: Mapping[str, object]) -> list[str]:
    """`--name value` for each flag that is given, `--name` alone for one that is true."""
    given = {name: value for name, value in flags.items() if value is not False and value not in (None, "")}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))[: 1 if value is True else 2]]


def module(name: str) -> list[str]:
    """The command line that runs a module of ours."""
    return [sys.executable, "-P", "-m", name]
