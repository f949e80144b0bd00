"""From a config to a job that a scheduler takes: `diffussm submit`, the same for every target."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffussm.config import Config, check, dump, load, preset
from diffussm.config.places import absolutely
from diffussm.errors import ConfigError, DiffuSSMError, StorageError, UsageError
from launch import local, store
from launch.checks import Check, checks, planned_save_s
from launch.target import Submission, Target

OF_ALL = ("name", "storage", "slurm", "kubernetes", "plan", "cluster")
"""Keys and sections that the runs of a sweep share, since one array of jobs is all of them."""


def prepare(
    config: str, overrides: Sequence[str] = (), sweep: Sequence[str] = (), interactive: bool = False
) -> Submission:
    """Read and check a config for a job that runs elsewhere: local places become absolute.

    Raises:
        ConfigError: as `local.read`, for each run of a sweep too.
        UsageError: a sweep is not key=value,value.
    """
    read = local.read(config, overrides)
    cfg = absolutely(read.cfg)
    recipe = preset(read.path)
    text = dump(cfg) if recipe is None else minimal(cfg, recipe)  # a whole config is taken for no recipe by the job
    chosen = variants(cfg, sweep)
    swept = tuple(_variant(text, given) for given in chosen)
    return Submission(cfg, text, chosen, interactive=interactive, swept=swept)


def minimal(cfg: Config, recipe: tuple[str, Config] | None = None) -> str:
    """What differs from the defaults, as YAML; `load` of it gives an equal config.

    With a `recipe`, a file's name and what it says, that is the base, and then comes what differs from it: so the job
    knows from which file it began, wherever it runs.
    """
    import yaml

    ours, plain = (yaml.safe_load(dump(each)) for each in (cfg, Config()))
    if recipe is None:
        found = _differing(ours, plain)
    else:
        file, began = recipe
        base = yaml.safe_load(dump(absolutely(began)))
        found = {"base": {"file": Path(file).name} | _differing(base, plain)} | _differing(ours, base)
    text: str = yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=120)
    return text


def variants(cfg: Config, sweep: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The overrides of each run of a sweep, every combination of the values; each run has the sweep's name and its
    number.

    Raises:
        UsageError: a sweep is not key=value,value, or the key is one that all runs share.
    """
    if not sweep:
        return ()
    axes = []
    for axis in sweep:
        key, equals, values = axis.partition("=")
        if not equals or not key or not all(values.split(",")):
            raise UsageError(f"--sweep: found {axis!r}; allowed: key=value,value", "write --sweep train.lr=1e-4,3e-4")
        if key.partition(".")[0] in OF_ALL:
            raise UsageError(
                f"--sweep: found {key}, which the runs of a sweep share", "submit a run of each value, by its own name"
            )
        axes.append([f"{key}={value}" for value in values.split(",")])
    return tuple((f"name={cfg.name}-{index}", *chosen) for index, chosen in enumerate(itertools.product(*axes)))


def with_save_times(submission: Submission) -> Submission:
    """With the seconds of the run's newest save, and of the plan's; a store that cannot be asked is told of by the
    check `bucket`."""
    submission = replace(submission, planned_save_s=planned_save_s(submission.cfg))
    try:
        found = store.ask("status", submission.root)
    except StorageError:
        return submission
    return replace(submission, measured_save_s=found["save_s"])


def dry_run(submission: Submission, to: Target) -> tuple[str, bool]:
    """The whole job as it would be handed over and every check; whether all passed."""
    looked = list(checks(submission, to.name))
    try:
        job = to.render(submission)
    except DiffuSSMError as error:  # the checks are shown all the same
        job = ""
        looked.append(Check("job", False, error.message, error.remedy))
    head = f"# target {to.name}, run {submission.root}\n"
    return head + job + "\n" + "\n".join(each.line for each in looked), all(c.ok for c in looked)


def submit(submission: Submission, to: Target) -> str:
    """Check, hand over, and say under which id.

    Raises:
        ConfigError: a check failed.
    """
    failed = [each for each in checks(submission, to.name) if not each.ok]
    if failed:
        raise ConfigError("\n".join(each.what + ": " + each.found for each in failed), _remedies(failed))
    number = to.submit(submission)
    # By its name alone a run is looked for in the namespace of the context, which may be another.
    where = f" kubernetes.namespace={submission.cfg.kubernetes.namespace}" if to.name == "kubernetes" else ""
    return f"{submission.cfg.name}  job {number} on {to.name}; diffussm status {submission.cfg.name}{where}"


def _differing(ours: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in ours.items():
        if isinstance(value, dict):
            inside = _differing(value, plain[key])
            if inside:
                found[key] = inside
        elif value != plain[key]:
            found[key] = value
    return found


def _variant(text: str, given: Sequence[str]) -> Config:
    """The whole config of one run of a sweep. Raises ConfigError if it is refused."""
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        cfg = load(file.name, given)
    check(cfg)
    return cfg


def _remedies(failed: Sequence[Check]) -> str:
    return "; ".join(dict.fromkeys(each.remedy for each in failed if each.remedy))
