"""What to do after a failure: pure decisions from a cause, what happened before, and how many workers could be had."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.causes import Cause, Diagnosis
from diffussm.errors import ExitCode


class Action(enum.Enum):
    """What happens to the worker group."""

    RESTART = "restart"
    """The same number of workers again."""
    SHRINK = "shrink"
    """Fewer workers: the next legal world size that fits what is left."""
    GROW = "grow"
    """More workers again, at most as many as the config asks for."""
    WAIT = "wait for nodes"
    """Not even the smallest legal world size fits now."""
    STOP = "stop"


@dataclass(frozen=True)
class Decision:
    """An action and, for people, why."""

    action: Action
    reason: str
    workers: int = 0
    """World size of the next group (RESTART, SHRINK, GROW)."""
    wait_s: float = 0.0
    """Seconds to let pass before the next start."""
    code: ExitCode = ExitCode.DONE
    """Exit code of the job (STOP)."""


@dataclass(frozen=True)
class Fault:
    """One ended group, as the history keeps it."""

    diagnosis: Diagnosis
    images: int
    """Images done when it ended; 0 also if nobody knows."""
    steps: int
    """Steps that this group completed."""
    at_s: float
    """When, on any clock that all faults share."""
    node: str = ""
    """Id of the guilty rank's node, if it is known."""


@dataclass(frozen=True)
class Sizes:
    """How many workers there may be."""

    wanted: int
    """cluster.workers."""
    least: int
    """Smallest size the user allows; equals `wanted` for a run that never shrinks."""
    legal: Sequence[int]
    """World sizes that leave the global batch as it is, rising."""

    def fitting(self, capacity: int) -> int:
        """The largest legal size that `capacity` workers allow, or 0 if there is none the user allows."""
        return max((size for size in self.legal if self.least <= size <= min(capacity, self.wanted)), default=0)


@dataclass(frozen=True)
class Limits:
    """Budgets."""

    max_failures: int
    """Faults of one cause within the window that are answered by a new start."""
    window_s: float
    """Older faults are forgotten, so that a run of weeks has no fixed number of lives."""


PATIENCE = {Cause.STORAGE: 4, Cause.MEMORY: 1, Cause.EXCEPTION: 1}
"""Budgets that differ: how many times cluster.max_failures (STORAGE: each try waits), or a number of their own."""

OF_NODES = frozenset({Cause.WORKER, Cause.HANG, Cause.EXCEPTION})
"""Causes that a node's bad device, memory or disk may be behind."""
SUSPECT = 2
"""Such faults of one node after which others are preferred."""

FREE = frozenset({Cause.PREEMPTED, Cause.REGROUP})
"""Causes that cost no budget: the ranks saved and left in order."""

CODES = {
    Cause.USER: ExitCode.CONFIG,  # the typed error's own code wins where there is one
    Cause.NONFINITE: ExitCode.DIVERGED,
    Cause.MEMORY: ExitCode.ENVIRONMENT,
    Cause.STORAGE: ExitCode.STORAGE,
    Cause.EXCEPTION: ExitCode.INTERNAL,
}
"""Exit code by cause when the run stops; all others are INFRASTRUCTURE."""


def decide(
    fault: Fault, earlier: Sequence[Fault], capacity: int, sizes: Sizes, limits: Limits, leaving: str = ""
) -> Decision:  # fmt: skip
    """Stop, or the next group's size.

    Args:
        fault: what just ended.
        earlier: all faults before it in this job.
        capacity: workers that the healthy nodes could hold now.
        sizes: allowed world sizes.
        limits: budgets.
        leaving: why the whole job was asked to leave, if it was. Then no fault that may pass is answered by a new
            group, whether the save of the departure failed or a rank died meanwhile: the next start goes on from the
            last checkpoint, with budgets of its own.
    """
    stop = _reason_not_to_repeat(fault, earlier)
    if leaving and not stop:
        said = fault.diagnosis.said
        if fault.diagnosis.cause is Cause.PREEMPTED:  # a rank may have heard of it by another rank alone
            said += "" if leaving in said else f" ({leaving})"
        else:
            said += f"; asked to leave ({leaving}), the next start goes on from the last checkpoint"
        return Decision(Action.STOP, said, code=ExitCode.PREEMPTED)
    stop = stop or _spent(fault, earlier, limits)
    if stop:
        return Decision(Action.STOP, stop, code=CODES.get(fault.diagnosis.cause, ExitCode.INFRASTRUCTURE))
    return resize(fault, capacity, sizes, said=_said(fault, earlier, limits))


def resize(fault: Fault, capacity: int, sizes: Sizes, said: str) -> Decision:
    """The size of the next group after a fault that may pass."""
    size, wait_s = sizes.fitting(capacity), back_off_s(fault)
    if not size:
        return Decision(
            Action.WAIT,
            f"{said}; {capacity} worker(s) could be had, at least {sizes.least} are needed",
            wait_s=wait_s,
        )
    if size < sizes.wanted:
        return Decision(Action.SHRINK, f"{said}; on with {size} of {sizes.wanted} workers", size, wait_s)
    if fault.diagnosis.cause is Cause.REGROUP:
        return Decision(Action.GROW, f"{said}; {size} workers again", size)
    return Decision(Action.RESTART, said, size, wait_s)


def back_off_s(fault: Fault) -> float:
    """Seconds before the next start: a store that refuses is not asked again at once."""
    return 2.0 if fault.diagnosis.cause is Cause.STORAGE else 0.0


def should_grow(present: int, capacity: int, sizes: Sizes) -> int:
    """The larger size a running group of `present` workers should take at its next checkpoint, or 0."""
    size = sizes.fitting(capacity)
    return size if size > present else 0


def suspects(faults: Sequence[Fault], limits: Limits) -> set[str]:
    """Nodes whose ranks failed again and again within the window. The last fault is the newest."""
    recent = [each for each in faults if each.diagnosis.cause in OF_NODES and _is_recent(each, faults[-1], limits)]
    counts = Counter(each.node for each in recent if each.node)
    return {node for node, count in counts.items() if count >= SUSPECT}


def _reason_not_to_repeat(fault: Fault, earlier: Sequence[Fault]) -> str:
    """Why another start would only end as this one did; empty if it may not."""
    found, cause = fault.diagnosis, fault.diagnosis.cause
    if cause in (Cause.USER, Cause.NONFINITE, Cause.NO_NODES):
        return found.said
    if cause in (Cause.EXCEPTION, Cause.MEMORY):
        if fault.steps == 0 and not any(before.steps for before in earlier):
            return f"{found.said} (before the first step was done: it would only happen again)"
        if any(_is_repeated(fault, before) for before in earlier):
            return f"{found.said} (a second time at {fault.images:,} images)"
    return ""


def _spent(fault: Fault, earlier: Sequence[Fault], limits: Limits) -> str:
    """That the budget of this cause is used up; empty if it is not."""
    cause = fault.diagnosis.cause
    if cause in FREE:
        return ""
    count, budget = _count(fault, earlier, limits), budget_of(cause, limits)
    if count > budget:
        spent = f"{count} times {cause.value}; the budget is {budget}, from cluster.max_failures"
        return f"{fault.diagnosis.said} ({spent})"
    return ""


def _count(fault: Fault, earlier: Sequence[Fault], limits: Limits) -> int:
    """Faults of this cause within the window, this one included."""
    cause = fault.diagnosis.cause
    return 1 + sum(before.diagnosis.cause is cause and _is_recent(before, fault, limits) for before in earlier)


def budget_of(cause: Cause, limits: Limits) -> int:
    """Faults of a cause within the window that are answered by a new start."""
    if cause is Cause.STORAGE:
        return PATIENCE[cause] * limits.max_failures
    return min(PATIENCE.get(cause, limits.max_failures), limits.max_failures)


def _is_repeated(fault: Fault, before: Fault) -> bool:
    """The same at the same place, however long ago; at 0 images nothing of the place may be known yet."""
    return before.diagnosis.cause is fault.diagnosis.cause and before.images == fault.images > 0


def _is_recent(before: Fault, fault: Fault, limits: Limits) -> bool:
    return fault.at_s - before.at_s <= limits.window_s


def _said(fault: Fault, earlier: Sequence[Fault], limits: Limits) -> str:
    cause = fault.diagnosis.cause
    if cause in FREE:
        return fault.diagnosis.said
    used = f"{cause.value}, {_count(fault, earlier, limits)} of at most {budget_of(cause, limits)}"
    return f"{fault.diagnosis.said} ({used})"
