"""The one meeting point of a job: an actor with the ranks' messages and heartbeats, and what is asked of them.

Everything here is small and answered at once. Ranks send messages without waiting, and heartbeats from a thread.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.causes import Evidence
from cluster.processes import Process
from cluster.watchdog import Seen
from diffussm.train.control import Level, Wish
from diffussm.train.phases import Beat


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    node: str
    """Ray's node id."""
    host: str
    pid: int
    stacks: str
    """File on that host to which the process writes its stacks on a signal."""
    started: int
    """When the process began, in clock ticks of its host: a number alone may be another's by now."""

    @property
    def process(self) -> Process:
        """For that host."""
        return Process(self.pid, self.started)


@dataclass
class Group:
    """One worker group."""

    size: int
    began: float
    """When its start was decided, seconds since 1970."""
    serial: int = 0
    """Which of this job's groups it is; what is said of one must not meet the next."""
    places: dict[int, Place] = field(default_factory=dict)
    beats: dict[int, Beat] = field(default_factory=dict)
    heard: dict[int, float] = field(default_factory=dict)
    """Monotonic time of each rank's last heartbeat."""
    attempt: int = 0
    """Number of this start; 0 until rank 0 has claimed it."""
    hang: str = ""
    hung_rank: int | None = None


class Hub:
    """State of the job that several processes need. One actor, made by the driver; gone with it."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._wish = Wish()
        self._group = Group(0, time.time())
        self._good: set[str] | None = None
        self._suspects: set[str] = set()
        self._not_before = 0.0

    def tell(self, record: dict[str, Any]) -> None:
        """Leave a message for the driver."""
        self._messages.append(record)

    def take(self) -> list[dict[str, Any]]:
        """All messages since the last call."""
        taken, self._messages = self._messages, []
        return taken

    def begin(self, size: int) -> None:
        """A new group of `size` is about to be made; what was asked of the old one is over, unless the job must go."""
        self._group = Group(size, time.time(), self._group.serial + 1)
        if self._wish.level is not Level.LEAVE:
            self._wish = Wish()

    def join(self, rank: int, place: Place) -> float:
        """A rank of the present group says where it is; returns when the group's start was decided."""
        self._group.places[rank] = place
        return self._group.began

    def number(self, attempt: int) -> None:
        """The present group is this start of the run."""
        self._group.attempt = attempt

    def beat(self, rank: int, pid: int, beat: Beat) -> Wish:
        """Take a heartbeat, give what is asked. One of an earlier group's processes is not counted."""
        place = self._group.places.get(rank)
        if place is not None and place.pid == pid:
            self._group.beats[rank], self._group.heard[rank] = beat, time.monotonic()
        return self._wish

    def wish(self, wish: Wish, group: int) -> bool:
        """Ask something of the ranks of this group, or of the whole job, beside what is asked already.

        Returns:
            whether that is news: a more urgent level or an earlier deadline. What is meant for a group that has ended
            is dropped.
        """
        if wish.level is not Level.LEAVE and group != self._group.serial:
            return False
        before, self._wish = self._wish, self._wish.joined(wish)
        return (self._wish.level, self._wish.deadline_s) != (before.level, before.deadline_s)

    def asked(self) -> Wish:
        """What is asked now."""
        return self._wish

    def seen(self) -> dict[int, Seen]:
        """The last heartbeat of every rank of the present group that has sent one."""
        now = time.monotonic()
        return {rank: Seen(beat, now - self._group.heard[rank]) for rank, beat in self._group.beats.items()}

    def group(self) -> Group:
        """The present group."""
        return self._group

    def hangs(self, group: int, rank: int, said: str) -> bool:
        """The watchdog's verdict on a group, before it ends it; False if that group has ended meanwhile."""
        if group != self._group.serial:
            return False
        self._group.hang, self._group.hung_rank = said, rank
        return True

    def recovered(self, group: int) -> bool:
        """Take back the verdict on a group, which goes on after all; False if that group has ended meanwhile."""
        if group != self._group.serial:
            return False
        self._group.hang, self._group.hung_rank = "", None
        return True

    def evidence(self) -> tuple[Evidence, int, int]:
        """What is known of the present group but for lost nodes, the images it did and its steps."""
        nodes = {rank: place.node for rank, place in self._group.places.items()}
        beats = self._group.beats.values()
        images, steps = max((b.images for b in beats), default=0), max((b.steps for b in beats), default=0)
        evidence = Evidence(node_of_rank=nodes, hang=self._group.hang, hung_rank=self._group.hung_rank)
        return evidence, images, steps

    def admit(self, nodes: set[str]) -> None:
        """Nodes that were looked at and are good. From the first call on no other may be used."""
        self._good = (self._good or set()) | nodes

    def barred(self, nodes: set[str]) -> set[str]:
        """Those of these nodes that must not be used: they were found bad, or are not looked at yet."""
        return set() if self._good is None else nodes - self._good

    def suspect(self, nodes: set[str]) -> set[str]:
        """From now on these nodes are used only where there are no others as good; those that are new to the list."""
        fresh, self._suspects = nodes - self._suspects, nodes
        return fresh

    def suspects(self) -> set[str]:
        """Nodes on which ranks failed again and again."""
        return self._suspects

    def hold(self, until: float) -> None:
        """No group starts before this time, seconds since 1970."""
        self._not_before = until

    def held_until(self) -> float:
        """No group starts before this time, seconds since 1970."""
        return self._not_before


def make() -> Any:
    """The actor, on the driver's own node: anywhere else it would be lost with a node that only held ranks."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kind: Any = ray.remote(num_cpus=0)(Hub)
    return kind.options(scheduling_strategy=here).remote()
