"""Where the time of a run went: a ledger of seconds by cause that survives restarts, and its summary."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffussm.checkpoint.fence import Fence
from diffussm.checkpoint.store import Store
from diffussm.observe.events import Journal, read_journal

KEY = "goodput.jsonl"

CAUSES = {
    "step": "computing steps that stand",
    "data": "waiting for data",
    "save": "steps that stood still for a checkpoint",
    "restore": "reading a checkpoint",
    "start": "starting processes, importing, making groups",
    "replayed": "steps done again after a fault",
    "idle": "nothing ran: down, queued or waiting for nodes",
}
"""Cause -> what it means; `step` is the good part."""


class Ledger:
    """Rank 0's book. One record a log interval, one at each start; all of them are differences, so they add up."""

    def __init__(self, store: Store, attempt: int, fence: Fence | None = None) -> None:
        """`fence` keeps a superseded attempt from writing over the book of a newer one."""
        self._journal, self._attempt = Journal(store, KEY, fence), attempt
        self._before = summarize(read_journal(store, KEY))
        self._began_s = self._before.began_s
        self._last_s = 0.0
        self._last: Mapping[str, float] = {}
        self._booked: dict[str, float] = {}

    @property
    def share(self) -> float | None:
        """Share of the run's time so far, over all starts, that was spent on steps that stand, as the report has it.

        None before anything is booked.
        """
        found = self.seconds
        return round(found["step"] / max(sum(found.values()), 1e-9), 4) if found else None

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by cause so far, over all starts, every one of CAUSES; empty before anything is booked."""
        if not self._booked:
            return {}
        assert self._began_s is not None  # noqa: S101 - something is booked
        found = {name: self._before.seconds[name] + self._booked.get(name, 0.0) for name in CAUSES}
        found["idle"] += max(0.0, self._last_s - self._began_s - sum(found.values()))
        return {name: round(value, 3) for name, value in found.items()}

    def begin(self, images: int, seconds: Mapping[str, float]) -> dict[str, Any]:
        """The start is over and training goes on at `images`; `seconds` by phase since the process began."""
        parts = {"start": seconds.get("start", 0.0), "restore": seconds.get("restore", 0.0)}
        return self._write("begin", images, parts, seconds)

    def step(self, images: int, seconds: Mapping[str, float]) -> dict[str, Any]:
        """Book what passed since the last record; `seconds` by phase since the process began, growing."""
        spent = {name: value - self._last.get(name, 0.0) for name, value in seconds.items()}
        work = sum(spent.get(name, 0.0) for name in ("forward", "backward", "reduce", "other"))
        replayed = images <= self._before.images
        parts = {
            "data": spent.get("data", 0.0),
            "save": spent.get("save", 0.0),
            "replayed" if replayed else "step": work,
        }
        return self._write("steps", images, parts, seconds)

    @property
    def journal(self) -> Journal:
        """Where the book is kept; whoever owns the book closes it."""
        return self._journal

    def close(self) -> None:
        """Finish the journal."""
        self._journal.close()

    def _write(
        self, kind: str, images: int, parts: Mapping[str, float], seconds: Mapping[str, float]
    ) -> dict[str, Any]:
        self._last = dict(seconds)
        rounded = {name: round(value, 4) for name, value in parts.items()}
        self._last_s = time.time()
        if self._began_s is None:
            self._began_s = self._last_s - sum(parts.values())
        for name, value in parts.items():
            self._booked[name] = self._booked.get(name, 0.0) + value
        self._journal.write({"kind": kind, "attempt": self._attempt, "images": images, "seconds": rounded})
        return rounded


@dataclass(frozen=True)
class Goodput:
    """A run's time by cause."""

    total_s: float
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By cause, every one of CAUSES; they add up to the total."""
    attempts: int = 0
    images: int = 0
    began_s: float | None = None
    """Seconds since 1970; None before anything is booked."""

    @property
    def fraction(self) -> float:
        """Share of the time that was spent on steps that stand."""
        return self.seconds["step"] / self.total_s if self.total_s > 0 else 0.0

    def table(self) -> str:
        """The text table of `diffussm report`."""
        if not self.attempts:
            return "goodput: nothing is booked yet"
        share = {name: value / max(self.total_s, 1e-9) for name, value in self.seconds.items()}
        starts = f"{self.attempts} start(s), {self.images:,} images"
        head = f"goodput {self.fraction:.1%} of {self.total_s:,.0f} s in {starts}"
        rows = [
            f"  {name:<9} {self.seconds[name]:>10,.1f} s  {share[name]:>6.1%}  {meaning}"
            for name, meaning in CAUSES.items()
        ]
        return "\n".join([head, *rows])


def summarize(records: Iterable[Mapping[str, Any]]) -> Goodput:
    """Add up a ledger. Pure.

    Time between two attempts that no record names is `idle`; the later attempt books its own start. A step that is done
    again counts as `replayed`, and as `step` where it was done first.
    """
    attempts: dict[int, list[Mapping[str, Any]]] = {}
    for record in records:
        attempts.setdefault(int(record["attempt"]), []).append(record)
    seconds = dict.fromkeys(CAUSES, 0.0)
    if not attempts:
        return Goodput(0.0, seconds)
    first = last = None
    for _, group in sorted(attempts.items()):
        before = group[0]["time"] - sum(group[0]["seconds"].values())
        first = before if first is None else first
        if last is not None:
            seconds["idle"] += max(0.0, before - last)
        for record in group:
            booked = record["seconds"]
            for name, value in booked.items():
                seconds[name] += value
            seconds["idle"] += max(0.0, record["time"] - before - sum(booked.values()))
            before = record["time"]
        last = before if last is None else max(last, before)
    assert first is not None  # noqa: S101 - there is an attempt
    assert last is not None  # noqa: S101 - likewise
    images = max(record["images"] for group in attempts.values() for record in group)
    return Goodput(max(last - first, sum(seconds.values())), seconds, len(attempts), images, first)


def goodput(store: Store) -> Goodput:
    """The summary of the run in `store`."""
    return summarize(read_journal(store, KEY))
