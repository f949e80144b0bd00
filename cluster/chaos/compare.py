"""Whether two runs saw the same samples and had the same losses, and how fast one came back after each fault. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from cluster.chaos.plan import Kind

Record = Mapping[str, Any]
"""A line of metrics.jsonl."""

ALL = "all"
"""Name of the row that counts every fault."""

ENDING = frozenset({Kind.KILL_RANK.value, Kind.KILL_NODE.value, Kind.WARN.value})
"""Faults that end the group they are made in, whatever else happens."""
IN_FLIGHT_S = 1.0
"""A step that was under way may end so long after the fault that stops the next."""

ROUNDING = 1e-4
"""Relative difference of losses that another number of ranks may make."""


@dataclass(frozen=True)
class Comparison:
    """A run with faults beside the one without."""

    lines: int
    """Logged lines of the run without faults."""
    missing: int
    """Of these, lines that the other run does not have."""
    other_samples: int
    """Lines whose samples differ."""
    worst: float
    """Largest relative difference of losses."""

    @property
    def bit_equal(self) -> bool:
        """Same samples, same losses to the last bit."""
        return self.equal and self.worst == 0

    @property
    def equal(self) -> bool:
        """Same samples, same losses to a rounding."""
        return self.lines > 0 and not self.missing and not self.other_samples and self.worst <= ROUNDING

    @property
    def short(self) -> str:
        """For a column of a table."""
        return "bit for bit" if self.bit_equal else f"to {self.worst:.0e}" if self.equal else "NO"

    def __str__(self) -> str:
        """For people."""
        if self.bit_equal:
            return f"identical: samples and losses of all {self.lines} lines"
        if self.equal:
            return f"identical samples in all {self.lines} lines; losses within {self.worst:.1e}"
        return (
            f"DIFFERENT: of {self.lines} lines {self.missing} are missing, {self.other_samples} have other samples; "
            f"losses differ by {self.worst:.1e}"
        )


def compare(calm: Iterable[Record], faulty: Iterable[Record]) -> Comparison:
    """Hold the last line of each image count of the run with faults against the one of the run without."""
    expected, found = {r["images"]: r for r in calm}, {r["images"]: r for r in faulty}
    both = expected.keys() & found.keys()
    others = sum(expected[at]["samples"] != found[at]["samples"] for at in both)
    worst = max((_difference(expected[at]["loss"], found[at]["loss"]) for at in both), default=0.0)
    return Comparison(len(expected), len(expected.keys() - found.keys()), others, worst)


def _difference(one: float | None, other: float | None) -> float:
    if one is None or other is None:
        return 0.0 if one is other else math.inf
    return abs(one - other) / max(abs(one), 1e-12)


@dataclass(frozen=True)
class Made:
    """A fault that was made."""

    name: str
    time: float
    """Seconds since 1970."""
    images: int
    """Images done by then."""
    attempt: int


@dataclass(frozen=True)
class Recovery:
    """How the run came back from one fault."""

    seconds: float
    """From the fault to the next completed step."""
    replayed_images: int
    """Images that were trained again."""


def recovery(made: Made, records: Sequence[Record], others: Iterable[Made] = ()) -> Recovery | None:
    """The recovery from a fault; None if no step followed.

    When a later start follows, its first step counts; otherwise the run went on, and its next step does. Of the kinds
    that need not end a group, one after which the group made steps was survived there: another fault ended it later.
    """
    after = [r for r in records if r["time"] > made.time]
    restarted = [r for r in after if r["attempt"] > made.attempt]
    if restarted and made.name not in ENDING:
        went_on = any(r["attempt"] == made.attempt and r["time"] > made.time + IN_FLIGHT_S for r in after)
        ended_by_other = any(made.time < other.time < restarted[0]["time"] for other in others)
        restarted = [] if went_on and ended_by_other else restarted
    following = restarted or after
    if not following:
        return None
    first = following[0]
    done = max((r["images"] for r in records if r["attempt"] <= made.attempt), default=0)
    again = sum(1 for r in restarted if r["images"] <= done and r["attempt"] == first["attempt"])
    return Recovery(first["time"] - made.time, again * _step(records))


def table(made: Sequence[Made], records: Sequence[Record], images: int, result: Comparison | None = None) -> str:
    """One row for each kind of fault, and one for all.

    Columns: survived of tried, seconds to the next step, steps and images replayed, and whether the run that had the
    faults ended as the one without ("-" where there is none to compare with).
    """
    reached = max((r["images"] for r in records), default=0)
    step = _step(records)
    same = "-" if result is None else result.short
    rows = [
        "| fault | survived | to the next step: median | worst | steps (images) replayed: median | worst | identical |",
        "|---|---|---|---|---|---|---|",
    ]
    names = list(dict.fromkeys(each.name for each in made))
    for name in [*names, ALL] if len(names) > 1 else names:
        of_kind = [each for each in made if name in (each.name, ALL)]
        back = [found for each in of_kind if (found := recovery(each, records, made))]
        if not back:
            rows.append(f"| {name} | 0 of {len(of_kind)} | - | - | - | - | {same} |")
            continue
        seconds, replayed = [each.seconds for each in back], [each.replayed_images for each in back]
        again = [f"{each / step if step else 0:,.0f} ({each:,.0f})" for each in (median(replayed), max(replayed))]
        rows.append(
            f"| {name} | {len(back)} of {len(of_kind)} | {median(seconds):.1f} s | {max(seconds):.1f} s | "
            f"{again[0]} | {again[1]} | {same} |"
        )
    rows.append(f"\nreached {reached:,} of {images:,} images")
    return "\n".join(rows)


def _step(records: Sequence[Record]) -> int:
    """Images between two lines."""
    pairs = itertools.pairwise(records)
    return min((b["images"] - a["images"] for a, b in pairs if b["images"] > a["images"]), default=0)
