"""What a plan of faults says. Pure: a plan and a seed give the same faults at the same images each time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from diffussm.errors import ConfigError


class Kind(Enum):
    """Faults that can be made."""

    KILL_RANK = "kill-rank"
    """SIGKILL to the process of one rank."""
    STOP_RANK = "stop-rank"
    """SIGSTOP to the process of one rank; for `for_s` seconds, or for ever."""
    KILL_NODE = "kill-node"
    """SIGKILL to the Ray node of one rank, and with it to all that runs there."""
    LIMIT_MEMORY = "limit-memory"
    """The rank can allocate no more memory than it has now."""
    WARN = "warn"
    """SIGTERM to the driver, as a batch system warns before it kills; after `for_s` seconds SIGKILL to all of it."""
    CUT_NETWORK = "cut-network"
    """The rank's network namespace loses `device`, for `for_s` seconds or for ever. Needs root."""
    FILL_DISK = "fill-disk"
    """`folder` is filled up for `for_s` seconds."""
    STOP_PROCESS = "stop-process"
    """SIGSTOP to the process whose id is in `pid_file`, for `for_s` seconds: for example a store."""
    COMMAND = "command"
    """Run `command`, and after `for_s` seconds `undo`: what is special to a cluster."""


NEEDS = {
    Kind.CUT_NETWORK: ("device",),
    Kind.FILL_DISK: ("folder", "for_s"),
    Kind.STOP_PROCESS: ("pid_file", "for_s"),
    Kind.COMMAND: ("command",),
    Kind.WARN: ("for_s",),
}
"""Keys without which a fault means nothing."""


@dataclass(frozen=True)
class Fault:
    """One fault of a plan."""

    kind: Kind
    at_images: int
    """Made as soon as this many images are done."""
    rank: int | None = None
    """Which rank; None takes one at random."""
    for_s: float = 0.0
    """Seconds until it is undone; 0 never."""
    device: str = ""
    folder: str = ""
    pid_file: str = ""
    command: tuple[str, ...] = ()
    undo: tuple[str, ...] = ()

    def __str__(self) -> str:
        """For people."""
        whom = "" if self.rank is None else f" {self.rank}"
        return f"{self.kind.value}{whom} at {self.at_images:,}"


@dataclass(frozen=True)
class Plan:
    """Faults in the order of their images."""

    seed: int
    faults: tuple[Fault, ...] = field(default=())


def read(text: Mapping[str, Any], images: int) -> Plan:
    """The faults of a plan's YAML for a run of `images` images.

    A fault has `fault` (a kind), `at_images` (a number, or [from, to] for a random one) and what the kind needs;
    `times` makes that many of it.

    Raises:
        ConfigError: naming the entry, what was found and what is allowed.
    """
    unknown = set(text) - {"seed", "faults"}
    if unknown or not isinstance(text.get("faults"), list):
        raise ConfigError(f"plan: found keys {sorted(text)}; allowed: seed (a number) and faults (a list)")
    seed = int(text.get("seed", 0))
    source = random.Random(seed)  # noqa: S311 - repeatable on purpose
    faults = [fault for number, entry in enumerate(text["faults"]) for fault in _faults(number, entry, images, source)]
    return Plan(seed, tuple(sorted(faults, key=lambda fault: fault.at_images)))


def _faults(number: int, entry: Mapping[str, Any], images: int, source: random.Random) -> Iterator[Fault]:
    where, given = f"plan: faults[{number}]", dict(entry)
    kinds = {kind.value: kind for kind in Kind}
    name, at, times = given.pop("fault", None), given.pop("at_images", None), given.pop("times", 1)
    if name not in kinds:
        raise ConfigError(f"{where}.fault: found {name!r}; allowed: {', '.join(kinds)}")
    kind = kinds[name]
    allowed = {each for each in Fault.__dataclass_fields__ if each not in ("kind", "at_images")}
    if set(given) - allowed:
        raise ConfigError(f"{where}: found {sorted(set(given) - allowed)}; allowed: {', '.join(sorted(allowed))}")
    missing = [key for key in NEEDS.get(kind, ()) if not given.get(key)]
    if missing:
        raise ConfigError(f"{where}: {name} needs {', '.join(missing)}")
    for key in ("command", "undo"):
        given[key] = tuple(map(str, given.get(key, ())))
    low, high = at if isinstance(at, list) and len(at) == 2 else (at, at)
    if not all(isinstance(each, int) and 0 <= each < images for each in (low, high)) or low > high:
        raise ConfigError(f"{where}.at_images: found {at!r}; allowed: 0 to {images - 1}, or [from, to] within it")
    for _ in range(times):
        yield Fault(kind, source.randint(low, high), **given)
