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

STRAGGLES, WELL = 1.5, 1.2
"""Scores above which a rank straggles, and at most which it is well again."""
MATTERS = 0.1
"""Share of a whole step that a rank must lose beside the others: a few milliseconds are none, whatever their ratio."""


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
    is silent; else the one that is furthest behind: fewest steps, then the earliest phase. The others wait for it, also
    if it is on its way out: who failed in a step tidies up while the others wait in its collectives.
    """
    stuck = {rank: seen for rank, seen in ranks.items() if _stands_for(seen) > _allowed(seen, patience)}
    if not stuck:
        return None
    silent = [rank for rank, seen in ranks.items() if _is_silent(seen, patience)]
    done = any(
        seen.beat.phase in (Phase.OTHER, Phase.SAVE) for seen in stuck.values()
    )  # with the step, so nobody failed
    left = [] if done else [rank for rank, seen in ranks.items() if seen.beat.phase is Phase.END]
    guilty = min(
        silent or [*stuck, *left],
        key=lambda rank: (ranks[rank].beat.steps, rank not in left, _order(ranks[rank]), rank),
    )
    seen = ranks[guilty]
    for_s = seen.beat.for_s + seen.age_s
    manner = "gives no sign of life" if silent else "stands"
    others = ", ".join(
        f"rank {rank} in {each.beat.phase.value}" for rank, each in sorted(ranks.items()) if rank != guilty
    )
    said = f"rank {guilty} {manner} in {seen.beat.phase.value} after {seen.beat.steps} steps, for {for_s:.1f} s"
    return Verdict(guilty, seen.beat.phase, bool(silent), for_s, f"{said} ({others})" if others else said)


class Stragglers:
    """Finds ranks that are slow by themselves, window by window: one that slows down after an hour is found too.

    A window is so many steps and seconds that times mean something. The first step, which compiles, is in none. A rank
    that was told is told again only after it was well in between, so that one on the border is told once.
    """

    def __init__(self, steps: int = 20, seconds: float = 30.0) -> None:
        self._steps, self._seconds = steps, seconds
        self._attempt, self._began = 0, 0.0
        self._first: Mapping[int, Beat] = {}
        self._told: set[int] = set()

    def look(self, attempt: int, beats: Mapping[int, Beat], now: float) -> dict[int, float]:
        """Ranks that were found slow in the window that ends now and are not told yet, with their scores.

        Args:
            attempt: number of the start that they belong to.
            beats: the last heartbeat of each rank.
            now: seconds on any clock that only goes forward.
        """
        if attempt != self._attempt:
            self._attempt, self._first, self._told = attempt, {}, set()
        if not beats or not all(beat.steps for beat in beats.values()):
            return {}
        if beats.keys() != self._first.keys():
            self._first, self._began = dict(beats), now
        done = min(beats[rank].steps - self._first[rank].steps for rank in beats)
        if done < self._steps or now - self._began < self._seconds:
            return {}
        own = own_seconds(self._first, beats)
        found, matters_s = scores(own), MATTERS * (now - self._began) / done
        slow = {rank for rank, score in found.items() if score > STRAGGLES and own[rank] * (1 - 1 / score) > matters_s}
        new = {rank: found[rank] for rank in sorted(slow - self._told)}
        self._told = slow | {rank for rank in self._told if found[rank] > WELL}
        self._first, self._began = dict(beats), now
        return new


def own_seconds(first: Mapping[int, Beat], last: Mapping[int, Beat]) -> dict[int, float]:
    """Each rank's own seconds a step between two heartbeats: in data and forward, where nobody is waited for."""
    return {rank: (beat.own_s - first[rank].own_s) / (beat.steps - first[rank].steps) for rank, beat in last.items()}


def scores(own: Mapping[int, float]) -> dict[int, float]:
    """Straggler scores: own seconds a step over the ranks' median. Of two ranks the faster one is the measure."""
    middle = median_low(own.values())
    return {rank: value / middle for rank, value in own.items()} if middle > 0 else {}


def _stands_for(seen: Seen) -> float:
    return 0.0 if seen.beat.phase is Phase.END else seen.beat.for_s + seen.age_s


def _allowed(seen: Seen, patience: Patience) -> float:
    early = seen.beat.phase in WAITING or seen.beat.phase is Phase.SAVE or seen.beat.steps == 0
    return patience.start_s if early else patience.step_s


def _is_silent(seen: Seen, patience: Patience) -> bool:
    return seen.beat.phase is not Phase.END and seen.age_s > SILENT_BEATS * patience.interval_s


def _order(seen: Seen) -> int:
    return ORDER[seen.beat.phase]
