"""Which rank hangs, and which is slow: pure judgements on the ranks' heartbeats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median_low

from diffussm.train.phases import Beat, Phase

ORDER = {phase: place for place, phase in enumerate(Phase)}
"""Place of a phase within a step."""

WAITING = frozenset({Phase.START, Phase.RESTORE})
"""Phases before the first step; they read, build and compile, so they have their own patience."""

SILENT_BEATS = 8
"""Heartbeats that may be missed before a rank counts as silent: its process is stopped or its node is away."""


@dataclass(frozen=True)
class Patience:
    """How long nothing may happen."""

    step_s: float
    """In one phase of a step, or between two heartbeats' worth of progress."""
    start_s: float
    """Before the first step is done, and in a save."""
    interval_s: float
    """Between two heartbeats."""


@dataclass(frozen=True)
class Seen:
    """The last heartbeat of a rank."""

    beat: Beat
    age_s: float
    """Seconds since it came."""


@dataclass(frozen=True)
class Verdict:
    """A group that hangs."""

    rank: int
    phase: Phase
    silent: bool
    """The rank's process does not even beat."""
    for_s: float
    said: str


def judge(ranks: Mapping[int, Seen], patience: Patience) -> Verdict | None:
    """The guilty rank, if the group hangs.

    A group hangs when some rank has made no progress for longer than the patience of its phase. Guilty is a rank that
    is silent; else the one that is furthest behind: fewest steps, then the earliest phase. The others wait for it.
    """
    stuck = {rank: seen for rank, seen in ranks.items() if _stands_for(seen) > _allowed(seen, patience)}
    if not stuck:
        return None
    silent = [rank for rank, seen in ranks.items() if _is_silent(seen, patience)]
    guilty = min(silent or stuck, key=lambda rank: (_behind(ranks[rank]), rank))
    seen = ranks[guilty]
    for_s = _stands_for(seen)
    manner = "gives no sign of life" if silent else "stands"
    others = ", ".join(
        f"rank {rank} in {each.beat.phase.value}" for rank, each in sorted(ranks.items()) if rank != guilty
    )
    said = f"rank {guilty} {manner} in {seen.beat.phase.value} after {seen.beat.steps} steps, for {for_s:.1f} s"
    return Verdict(guilty, seen.beat.phase, bool(silent), for_s, f"{said} ({others})" if others else said)


class Stragglers:
    """Finds ranks that are slow by themselves, window by window: one that slows down after an hour is found too.

    A window is as many steps as mean something, and as many seconds as keep a rank on the border from being told at
    every look. The first step, which compiles, is in none.
    """

    def __init__(self, times: float = 1.5, steps: int = 20, seconds: float = 30.0) -> None:
        """A rank straggles at so many `times` the median of the group's own seconds a step."""
        self._times, self._steps, self._seconds = times, steps, seconds
        self._attempt, self._began = 0, 0.0
        self._first: Mapping[int, Beat] = {}
        self._slow: frozenset[int] = frozenset()

    def look(self, attempt: int, beats: Mapping[int, Beat], now: float) -> dict[int, float]:
        """Ranks that were found slow in the window that ends now and not in the one before, and how slow.

        Args:
            attempt: number of the start that they belong to.
            beats: the last heartbeat of each rank.
            now: seconds on any clock that only goes forward.
        """
        if attempt != self._attempt:
            self._attempt, self._first, self._slow = attempt, {}, frozenset()
        if not beats or not all(beat.steps for beat in beats.values()):
            return {}
        if beats.keys() != self._first.keys():
            self._first, self._began = dict(beats), now
        done = min(beats[rank].steps - self._first[rank].steps for rank in beats)
        if done < self._steps or now - self._began < self._seconds:
            return {}
        found = {rank: score for rank, score in scores(self._first, beats).items() if score > self._times}
        told = {rank: score for rank, score in found.items() if rank not in self._slow}
        self._first, self._began, self._slow = dict(beats), now, frozenset(found)
        return told


def scores(first: Mapping[int, Beat], last: Mapping[int, Beat]) -> dict[int, float]:
    """Each rank's own seconds a step between two heartbeats, over the ranks' median: the straggler score.

    A rank's own are those in data and forward, where nobody is waited for. Of two ranks the faster one is the measure.
    """
    own = {rank: (beat.own_s - first[rank].own_s) / (beat.steps - first[rank].steps) for rank, beat in last.items()}
    middle = median_low(own.values())
    return {rank: value / middle for rank, value in own.items()} if middle > 0 else {}


def _stands_for(seen: Seen) -> float:
    return 0.0 if seen.beat.phase is Phase.END else seen.beat.for_s + seen.age_s


def _allowed(seen: Seen, patience: Patience) -> float:
    early = seen.beat.phase in WAITING or seen.beat.phase is Phase.SAVE or seen.beat.steps == 0
    return patience.start_s if early else patience.step_s


def _is_silent(seen: Seen, patience: Patience) -> bool:
    return seen.beat.phase is not Phase.END and seen.age_s > SILENT_BEATS * patience.interval_s


def _behind(seen: Seen) -> tuple[int, int]:
    return seen.beat.steps, ORDER[seen.beat.phase]
