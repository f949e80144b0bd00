"""Rules for section `slurm`. Its values stand in a batch script, so each may hold only what is plain there. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from diffussm.config.schema_jobs import Container, SlurmConfig

Rule = tuple[Callable[[Any], bool], str]

_WORD = re.compile(r"[A-Za-z0-9_.,:+@%&|*()\[\]=/!-]{1,512}")
_OPTION = re.compile(r"--[a-z][a-z0-9-]*(=[A-Za-z0-9_.,:+@%&|*()\[\]=/!-]{1,512})?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\x00-\x1f\x7f]*")
_RESERVED = (
    *("--job-name", "--output", "--error", "--nodes", "--signal", "--requeue", "--no-requeue"),
    *("--wrap", "--parsable", "--array", "--comment"),
)

_AT_LEAST_0: Rule = (lambda value: value >= 0, "0 or more")
_AT_LEAST_1: Rule = (lambda value: value >= 1, "1 or more")


def is_word(text: str) -> bool:
    """Whether `text` is empty or one plain word: no blank, quote, backslash, dollar, semicolon or control character."""
    return text == "" or bool(_WORD.fullmatch(text))


def is_line(text: str) -> bool:
    """Whether `text` holds no control character, so that it stays on its line. It is quoted where it is used."""
    return all(character.isprintable() for character in text)


_WORD_RULE: Rule = (is_word, "empty, or letters, digits and _ . , : + @ % & | * ( ) [ ] = / ! -")
_LINE_RULE: Rule = (is_line, "text without control characters")
_FILE_RULE: Rule = (
    lambda value: bool(value) and is_line(value) and not set(value) & set("%\\\"'"),
    "a folder's name without control characters, %, backslash and quotes (Slurm reads these)",
)

RANGES: dict[str, Rule] = {
    **{
        f"slurm.{key}": _WORD_RULE
        for key in ("partition", "account", "qos", "constraint", "exclude", "gres", "dependency", "begin")
    },
    "slurm.logs": _FILE_RULE,
    "slurm.python": _LINE_RULE,
    "slurm.image": _LINE_RULE,
    "slurm.time_s": ((lambda value: value == 0 or value >= 60), "0, or 60 or more"),
    "slurm.cpus_per_node": _AT_LEAST_0,
    "slurm.node_memory_bytes": _AT_LEAST_0,
    "slurm.warning_s": ((lambda value: 1 <= value <= 65_535), "1 to 65535"),
    "slurm.max_restarts": _AT_LEAST_0,
    "slurm.start_timeout_s": _AT_LEAST_1,
    "slurm.array_limit": _AT_LEAST_0,
}


def problems(cfg: SlurmConfig) -> Iterator[str]:
    """What in the section does not fit, each with key, found and allowed."""
    for module in cfg.modules:
        if not module or not is_word(module):
            yield f"slurm.modules: found {module!r}; allowed: names of modules, for example cuda/13.0"
    for variable in cfg.environment:
        if not _VARIABLE.fullmatch(variable):
            yield f"slurm.environment: found {variable!r}; allowed: NAME=VALUE without control characters"
    for mount in cfg.mounts:
        if not is_line(mount) or not mount or "," in mount:
            yield f"slurm.mounts: found {mount!r}; allowed: OUTSIDE:INSIDE without commas and control characters"
    for option in cfg.options:
        name = option.partition("=")[0]  # sbatch takes a beginning for the whole
        if not _OPTION.fullmatch(option) or any(each.startswith(name) for each in _RESERVED):
            yield (
                f"slurm.options: found {option!r}; allowed: --name or --name=value of plain characters, none of "
                f"{', '.join(_RESERVED)} (the job sets those)"
            )
    if (cfg.container is not Container.none) != bool(cfg.image.strip()):
        yield f"slurm.image: found {cfg.image!r} with slurm.container={cfg.container.name}; allowed: both or neither"
    if cfg.mounts and cfg.container is Container.none:
        yield "slurm.mounts: found some without slurm.container; allowed: none"
    if cfg.time_s and cfg.time_s <= cfg.warning_s:
        yield f"slurm.warning_s: found {cfg.warning_s}; allowed: less than slurm.time_s = {cfg.time_s}"
