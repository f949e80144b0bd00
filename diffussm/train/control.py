"""What the outside may ask of a running training, and how the ranks come to do it at the same step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from diffussm.checkpoint.manifest import Counters
from diffussm.checkpoint.save import GROUP
from diffussm.config.schema import Config
from diffussm.errors import Preempted, Regroup
from diffussm.train.phases import Phases

EVIDENCE_S = 30.0
"""Seconds at least that a collective waits longer than the watchdog, which asks every node for evidence first."""


def collective_s(hang_s: float) -> float:
    """Seconds after which a collective gives up by itself: half as late again as the watchdog, who knows more."""
    return max(1.5 * hang_s, hang_s + EVIDENCE_S)


class Level(IntEnum):
    """How much is asked; the most urgent of all ranks' wishes counts."""

    NONE = 0
    REGROUP = 1
    """Leave after the next checkpoint: the group will be made anew with another size."""
    MOVE = 2
    """Save now and leave before the deadline: the group will be made anew on the nodes that stay."""
    LEAVE = 3
    """Save now and leave before the deadline: the whole job must go."""


@dataclass(frozen=True)
class Wish:
    """Something asked of the training."""

    level: Level = Level.NONE
    deadline_s: float = math.inf
    """Seconds since 1970 at which the process may be gone."""
    reason: str = ""

    def joined(self, other: Wish) -> Wish:
        """Both at once: the more urgent level and its reason, the earlier deadline. Of equals the first one speaks."""
        level, reason = max((self.level, self.reason), (other.level, other.reason), key=lambda each: each[0])
        return Wish(level, min(self.deadline_s, other.deadline_s), reason)


class Control:
    """One rank's end of the line: somebody sets `wish` from another thread, the loop asks once a step.

    Without anybody at the other end it never asks for anything.
    """

    def __init__(self, phases: Phases | None = None) -> None:
        self.phases = phases or Phases()
        self.wish = Wish()

    def left_s(self, most: float) -> float:
        """Seconds that an end may still take: `most`, or fewer where the process will be gone before."""
        return max(0.0, min(most, self.wish.deadline_s - time.time()))


class Agreement:
    """Makes wishes common to all ranks, one step late and without waiting.

    Each step starts a reduction of two numbers on a group of its own and reads the one that the step before started;
    by then every rank has passed a gradient reduction, so it is complete. All ranks read the same numbers at the same
    step. Making one is collective: every rank must.
    """

    def __init__(self, size: int) -> None:
        """Make the group. Collective: every rank must."""
        self._group: Any = dist.new_group(backend="gloo") if size > 1 else None
        self._pending: tuple[torch.Tensor, dist.Work | None] | None = None

    def exchange(self, wish: Wish) -> Wish:
        """Give this rank's wish and get the agreed one of the step before. Collective: every rank, every step."""
        deadline_ms = 0 if math.isinf(wish.deadline_s) else round(wish.deadline_s * 1000)
        # The largest level; of the deadlines the earliest, so the largest of their negatives.
        mine = torch.tensor([int(wish.level), -deadline_ms if deadline_ms else -(1 << 62)], dtype=torch.int64)  # (2,)
        agreed = Wish()
        if self._pending is not None:
            numbers, work = self._pending
            if work is not None:
                work.wait()
            level, negative = numbers.tolist()
            deadline_s = math.inf if negative == -(1 << 62) else -negative / 1000
            agreed = Wish(Level(level), deadline_s, wish.reason if wish.level else "another rank was asked to")
        work = None if self._group is None else dist.all_reduce(mine, dist.ReduceOp.MAX, self._group, async_op=True)
        self._pending = (mine, work)
        return agreed


class Leaving:
    """Does what is asked at the step on which the ranks agree. Making one is collective: every rank must."""

    def __init__(self, cfg: Config, control: Control, size: int) -> None:
        self._train, self._control, self._hang_s = cfg.train, control, cfg.cluster.hang_s
        self._agreement = Agreement(size)

    def step(self, at: Counters, save: Callable[[Counters, float], None], *, checkpoint: bool) -> None:
        """After a step and its regular checkpoint: leave if that is agreed. Collective: every rank must call it.

        Args:
            at: where the training stands.
            save: `Saver.leave`; called with the deadline. It waits for a regular checkpoint of this step.
            checkpoint: whether one was due at this step; the same on every rank.

        Raises:
            Preempted, Regroup: the state is saved and this rank must end.
        """
        if self._control.phases.steps == 1:
            shorten_timeouts(collective_s(self._hang_s))
        wish = self._agreement.exchange(self._control.wish)
        if at.images >= self._train.images or wish.level is Level.NONE:
            return
        if wish.level is Level.REGROUP and not checkpoint:
            return
        save(at, wish.deadline_s)
        kind = Regroup if wish.level is Level.REGROUP else Preempted
        raise kind(f"{wish.reason}: saved at {at.images:,} images", "start the same command again")


def shorten_timeouts(seconds: float) -> None:
    """Let collectives of every group but the saves' fail after this time. Local; the first step had longer."""
    for group in dist.distributed_c10d._world.pg_map:
        if group.group_desc != GROUP:
            dist.set_timeout(timedelta(seconds=seconds), group)
