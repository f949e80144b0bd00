"""What a plan of faults says. Pure: a plan and a seed give the same faults at the same images each time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from diffussm.errors import ConfigError


class Kind(Enum):
    """Faults that can be made."""

    KILL_RANK = "kill-rank"
    """SIGKILL to the process of one rank."""
    STOP_RANK = "stop-rank"
    """SIGSTOP to the process of one rank; for `for_s` seconds, or until the tool ends."""
    KILL_NODE = "kill-node"
    """SIGKILL to the Ray node of one rank, and with it to all that runs there."""
    LIMIT_MEMORY = "limit-memory"
    """The rank can allocate no more memory than it has now."""
    WARN = "warn"
    """SIGTERM to the driver, as a batch system warns before it kills; after `for_s` seconds SIGKILL to all of it."""
    CUT_NETWORK = "cut-network"
    """The rank's network namespace loses `device`, for `for_s` seconds or until the tool ends. Needs root."""
    FILL_DISK = "fill-disk"
    """`folder` is filled up for `for_s` seconds."""
    STOP_PROCESS = "stop-process"
    """SIGSTOP to the process whose id is in `pid_file`, for `for_s` seconds: for example a store."""
    SLOW_PROCESS = "slow-process"
    """The process whose id is in `pid_file` runs a tenth of the time, for `for_s` seconds: for example a store."""
    COMMAND = "command"
    """Run `command`, and after `for_s` seconds `undo`: what is special to a cluster."""

    @property
    def hits_rank(self) -> bool:
        """Whether it is done to the process of a rank."""
        return self in (Kind.KILL_RANK, Kind.STOP_RANK, Kind.KILL_NODE, Kind.LIMIT_MEMORY, Kind.CUT_NETWORK)


NEEDS = {
    Kind.CUT_NETWORK: ("device",),
    Kind.FILL_DISK: ("folder", "for_s"),
    Kind.STOP_PROCESS: ("pid_file", "for_s"),
    Kind.SLOW_PROCESS: ("pid_file", "for_s"),
    Kind.COMMAND: ("command",),
    Kind.WARN: ("for_s",),
}
"""Keys without which a fault means nothing."""


@dataclass(frozen=True)
class Fault:
    """One fault of a plan."""

    kind: Kind
    at_images: int
    """Made as soon as this many images are done and the group trains."""
    after_s: float | None = None
    """Instead: made so many seconds after the fault before it, also while the run still recovers from that one."""
    rank: int | None = None
    """Which rank; None takes one at random."""
    for_s: float = 0.0
    """Seconds until it is undone; 0 when the tool ends."""
    device: str = ""
    folder: str = ""
    pid_file: str = ""
    command: tuple[str, ...] = ()
    undo: tuple[str, ...] = ()

    def __str__(self) -> str:
        """For people."""
        whom = "" if self.rank is None else f" {self.rank}"
        when = f"at {self.at_images:,}" if self.after_s is None else f"{self.after_s:g} s after the fault before"
        return f"{self.kind.value}{whom} {when}"


@dataclass(frozen=True)
class Plan:
    """Faults in the order in which they are made."""

    seed: int
    faults: tuple[Fault, ...] = field(default=())


def read(text: Mapping[str, Any], images: int, ranks: int) -> Plan:
    """The faults of a plan's YAML for a run of `images` images on `ranks` ranks.

    `faults` lists them: each has `fault` (a kind), `at_images` (a number, or [from, to] for a random one) or `after_s`
    (seconds after the fault before, likewise), and what the kind needs; `times` makes that many of it. `random` makes
    `faults` of them at random images, within `at_images` where it is given, each of one of `kinds`: a name, or a fault
    as above without `at_images`, with a `weight`. `for_s` may be [from, to] too.

    Raises:
        ConfigError: naming the entry, what was found and what is allowed.
    """
    unknown = set(text) - {"seed", "faults", "random"}
    if unknown or not isinstance(text.get("faults", []), list) or not {"faults", "random"} & set(text):
        raise ConfigError(
            f"plan: found keys {sorted(text)}; allowed: seed (a number), faults (a list), random (faults and kinds)"
        )
    seed = int(text.get("seed", 0))
    source = random.Random(seed)  # noqa: S311 - repeatable on purpose
    faults: list[Fault] = []
    for number, entry in enumerate(text.get("faults", [])):
        reader = _Entry(f"plan: faults[{number}]", entry, ranks)
        faults += reader.faults(images, source, faults[-1].at_images if faults else None)
    if "random" in text:
        faults += _random(text["random"], images, ranks, source)
    return Plan(seed, tuple(sorted(faults, key=lambda fault: fault.at_images)))


class _Entry:
    """One entry of a plan."""

    def __init__(self, where: str, entry: Any, ranks: int) -> None:
        given = {"fault": entry} if isinstance(entry, str) else entry
        if not isinstance(given, Mapping):
            raise ConfigError(f"{where}: found {entry!r}; allowed: a mapping with fault")
        self.where, self._given = where, dict(given)
        kinds = {kind.value: kind for kind in Kind}
        name, self._at, self._times = (self._given.pop(key, None) for key in ("fault", "at_images", "times"))
        if name not in kinds:
            raise ConfigError(f"{where}.fault: found {name!r}; allowed: {', '.join(kinds)}")
        self._kind, self.weight = kinds[name], self._given.pop("weight", 1)
        allowed = {each for each in Fault.__dataclass_fields__ if each not in ("kind", "at_images")}
        if set(self._given) - allowed:
            found = sorted(set(self._given) - allowed)
            raise ConfigError(f"{where}: found {found}; allowed: {', '.join(sorted(allowed))}")
        missing = [key for key in NEEDS.get(self._kind, ()) if not self._given.get(key)]
        if missing:
            raise ConfigError(f"{where}: {name} needs {', '.join(missing)}")
        rank = self._given.get("rank")
        if rank is not None and not (isinstance(rank, int) and 0 <= rank < ranks):
            raise ConfigError(f"{where}.rank: found {rank!r}; allowed: 0 to {ranks - 1}")
        for key in ("command", "undo"):
            self._given[key] = tuple(map(str, self._given.get(key, ())))
        for key in ("for_s", "after_s"):
            self._seconds(key)

    def faults(self, images: int, source: random.Random, before_images: int | None) -> Iterator[Fault]:
        """Its faults; `before_images` are those of the fault before, if there is one."""
        if (self._at is None) == ("after_s" not in self._given):
            raise ConfigError(f"{self.where}.at_images: found {self._at!r}; allowed: either at_images or after_s")
        if self._at is None and before_images is None:
            raise ConfigError(f"{self.where}.after_s: there is no fault before it")
        at = before_images if self._at is None else self._at
        low, high = within(f"{self.where}.at_images", at, images)
        for _ in range(1 if self._times is None else self._times):
            yield self.fault(source.randint(low, high), source)

    def fault(self, at_images: int, source: random.Random) -> Fault:
        """One fault, its seconds drawn."""
        drawn = {}
        for key in ("for_s", "after_s"):
            span = self._seconds(key)
            if span is not None:
                drawn[key] = span[0] if span[0] == span[1] else round(source.uniform(*span), 2)
        return Fault(self._kind, at_images, **(self._given | drawn))

    @property
    def without_time(self) -> bool:
        """Whether it says neither at which images nor how often, as `random` wants it."""
        return self._at is None and self._times is None

    def _seconds(self, key: str) -> tuple[float, float] | None:
        if key not in self._given:
            return None
        low, high = _span(self._given[key])
        if not all(isinstance(each, int | float) and each >= 0 for each in (low, high)) or low > high:
            raise ConfigError(f"{self.where}.{key}: found {self._given[key]!r}; allowed: seconds, or [from, to]")
        return float(low), float(high)


def within(where: str, at: Any, images: int) -> tuple[int, int]:
    """The first and the last image count that `at` allows, which is a number or [from, to]."""
    low, high = _span(at)
    if not all(isinstance(each, int) and 0 <= each < images for each in (low, high)) or low > high:
        raise ConfigError(f"{where}: found {at!r}; allowed: 0 to {images - 1}, or [from, to] within it")
    return low, high


def _span(given: Any) -> tuple[Any, Any]:
    return (given[0], given[1]) if isinstance(given, list) and len(given) == 2 else (given, given)


def _random(given: Any, images: int, ranks: int, source: random.Random) -> Iterator[Fault]:
    """Faults at random images; one with `after_s` follows the fault before it wherever that is made."""
    keys = set(given) if isinstance(given, Mapping) else set()
    if not {"faults", "kinds"} <= keys <= {"faults", "kinds", "at_images"} or not given["kinds"]:
        raise ConfigError(f"plan: random: found {given!r}; allowed: faults (how many), kinds (a list), at_images")
    kinds = [_Entry(f"plan: random.kinds[{number}]", each, ranks) for number, each in enumerate(given["kinds"])]
    for kind in kinds:
        if not kind.without_time:
            raise ConfigError(f"{kind.where}: found at_images or times; allowed: only beside kinds")
    low, high = within("plan: random.at_images", given.get("at_images", [0, images - 1]), images)
    drawn = source.choices(kinds, [kind.weight for kind in kinds], k=given["faults"])
    before: Fault | None = None
    for at_images, kind in zip(sorted(source.randint(low, high) for _ in drawn), drawn, strict=True):
        fault = kind.fault(at_images, source)
        if fault.after_s is not None:
            fault = replace(fault, after_s=None) if before is None else replace(fault, at_images=before.at_images)
        yield fault
        before = fault
