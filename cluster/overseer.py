"""The driver's thread beside the training: hears the ranks, watches nodes and heartbeats, passes on what is asked."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray

from cluster import nodes, preempt, stacks
from cluster.controller import sizes_of
from cluster.hub import Group, Place
from cluster.policy import should_grow
from cluster.preempt import Warnings
from cluster.watchdog import Patience, Stragglers, Verdict, judge
from diffussm.config.schema import Config
from diffussm.train.control import Level, Wish

_LOG = logging.getLogger(__name__)

Announce = Callable[[dict[str, Any]], None]
OnPlaces = Callable[[int, Mapping[int, Place]], None]

LOOK_S = 0.25
"""Seconds between two looks at messages and signals."""
NODES_S = 1.0
"""Seconds between two looks at nodes and heartbeats."""


class Overseer:
    """Runs from `start` to `stop`. What it hears goes to `announce` and `on_fault`, in its own thread."""

    def __init__(
        self, cfg: Config, hub: Any, warnings: Warnings, announce: Announce, on_fault: Announce, on_places: OnPlaces,
        on_nodes: Callable[[list[nodes.Node]], None] = lambda found: None,
    ) -> None:  # fmt: skip
        self.cfg, self.hub, self.warnings = cfg, hub, warnings
        self.announce, self.on_fault, self.on_places, self.on_nodes = announce, on_fault, on_places, on_nodes
        cluster = cfg.cluster
        self.patience = Patience(cluster.hang_s, cluster.start_s, cluster.heartbeat_interval_s)
        self._told = 0
        self._stragglers = Stragglers()
        self._evidence: dict[int, dict[str, Any]] = {}
        self._group = Group(0, 0.0)
        self._ended = 0
        """Serial of the last group that was ended because it hung."""
        self._failed: set[tuple[str, str]] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="overseer", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Hear what is left and end."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def take_evidence(self) -> dict[int, dict[str, Any]]:
        """What was collected of the last hung group, once."""
        taken, self._evidence = self._evidence, {}
        return taken

    def _run(self) -> None:
        looked = 0.0
        last = False
        while not last:
            last = self._stop.wait(LOOK_S)
            try:
                self._duty("hear the workers", self._hear)
                self._duty("pass on a signal", self._ask, self.warnings.wish)
                if not last and time.monotonic() - looked >= NODES_S:
                    looked = time.monotonic()
                    self._duty("look at the nodes", self._watch)
            except ray.exceptions.ActorDiedError as error:
                # Deaf to warnings, drains and hangs nothing may go on. The controller asks the hub what to do about the
                # killed ranks and fails in turn, which ends the job as one to be started again.
                _LOG.error("the meeting point of the ranks is lost, so the training ends: %s", error)
                stacks.kill(self._group.places)
                return

    def _duty(self, what: str, do: Callable[..., None], *args: Any) -> None:
        """Do one thing; what goes wrong in it is said once and keeps nobody from the next thing, or the next look.

        Raises:
            ActorDiedError: the hub is gone, and with it all duties.
        """
        try:
            do(*args)
        except ray.exceptions.ActorDiedError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whoever is told may fail; rich exits on a broken pipe
            failure = (what, type(error).__name__)
            if failure not in self._failed:
                self._failed.add(failure)
                _LOG.error("cannot %s: %s: %s", what, type(error).__name__, error, exc_info=True)

    def _hear(self) -> None:
        for record in ray.get(self.hub.take.remote()):
            if record.get("event") == "failure":
                self._duty("write the evidence of a failure", self.on_fault, record)
                record = {k: record[k] for k in ("kind", "event", "cause", "decision", "reason")}
            self._say(record)

    def _say(self, record: dict[str, Any]) -> None:
        self._duty("tell what happens", self.announce, record)

    def _ask(self, wish: Wish, group: int = 0) -> None:
        """Pass on a wish to the ranks of a group, or of any if the whole job must go. Say it when it is news."""
        if wish.level is not Level.NONE and ray.get(self.hub.wish.remote(wish, group)):
            event = "asked to regroup" if wish.level is Level.REGROUP else "asked to leave"
            self._say({"kind": "event", "event": event, "reason": wish.reason})

    def _watch(self) -> None:
        """Nodes that go and come, the notice file, and ranks that hang."""
        group, found = ray.get(self.hub.group.remote()), nodes.nodes()
        self._group = group
        self._duty("look for the notice file", self._look_for_notice)
        self._duty("look for drained nodes", self._look_for_drains, group, found)
        self._duty("tell where the ranks are", self._tell_places, group)
        self._duty("look for stragglers", self._tell_stragglers, group)
        self._duty("look at new nodes", self.on_nodes, found)
        self._duty("look for more nodes", self._look_for_room, group, found)
        self._duty("look for hangs", self._look_for_hang, group)

    def _look_for_notice(self) -> None:
        self._ask(preempt.of_notice(self.cfg.cluster.notice_file, self.cfg.cluster.grace_s, time.time()))

    def _look_for_drains(self, group: Group, found: list[nodes.Node]) -> None:
        used = {place.node for place in group.places.values()}
        home = ray.get_runtime_context().get_node_id()
        wish = preempt.of_drained(found, used, home, lambda staying: self._size(staying) > 0, time.time())
        self._ask(wish, group.serial)

    def _look_for_room(self, group: Group, found: list[nodes.Node]) -> None:
        if larger := self._grown(group, found):
            wish = Wish(Level.REGROUP, reason=f"{larger} workers could be had, {group.size} work")
            self._ask(wish, group.serial)

    def _look_for_hang(self, group: Group) -> None:
        verdict = None if group.serial == self._ended else judge(ray.get(self.hub.seen.remote()), self.patience)
        if verdict is not None:
            self._end(verdict, group)

    def _grown(self, group: Group, found: list[nodes.Node]) -> int:
        """The larger size that a working group should take, or 0. A node that was just lost still counts for Ray."""
        if not group.beats or not should_grow(group.size, self._capacity(found), sizes_of(self.cfg)):
            return 0
        return should_grow(group.size, self._capacity(nodes.reached(found)), sizes_of(self.cfg))

    def _tell_places(self, group: Group) -> None:
        """Store once, for each start, where its ranks run."""
        if group.attempt > self._told and len(group.places) == group.size:
            self._told = group.attempt
            self.on_places(group.attempt, group.places)

    def _tell_stragglers(self, group: Group) -> None:
        """Tell a rank that is much slower by itself than the others."""
        slow = self._stragglers.look(group.attempt, group.beats, time.monotonic())
        if slow:
            said = ", ".join(f"rank {rank} on {group.places[rank].host}: {score:.1f}" for rank, score in slow.items())
            self._say({"kind": "event", "event": "straggler", "times the median": said})

    def _capacity(self, found: list[nodes.Node]) -> int:
        usable = nodes.usable(found, ray.get(self.hub.barred.remote({node.id for node in found})))
        return nodes.capacity(usable, self.cfg.cluster.cpus_per_worker, self.cfg.cluster.gpus_per_worker)

    def _size(self, staying: list[nodes.Node]) -> int:
        return sizes_of(self.cfg).fitting(self._capacity(staying))

    def _end(self, verdict: Verdict, group: Group) -> None:
        """Collect the stacks of a hung group, say which rank is guilty, and kill the group; Ray makes another."""
        if not ray.get(self.hub.hangs.remote(group.serial, verdict.rank, verdict.said)):
            return  # it has ended since it was looked at
        self._say({"kind": "event", "event": "hang", "reason": verdict.said})
        self._duty("collect the evidence of a hang", self._collect, group)
        # Collecting takes seconds, in which a store may have answered after all.
        again = judge(ray.get(self.hub.seen.remote()), self.patience)
        if again is None:
            if ray.get(self.hub.recovered.remote(group.serial)):
                self._evidence = {}
                self._say({"kind": "event", "event": "hang over", "reason": "the ranks went on by themselves"})
            return
        guilty = self._evidence.get(again.rank, {})
        state = f"; its process is {guilty['state']}" if guilty.get("state") else "; its node does not answer"
        if ray.get(self.hub.hangs.remote(group.serial, again.rank, f"{again.said}{state}")):
            self._ended = group.serial
            stacks.kill(group.places)

    def _collect(self, group: Group) -> None:
        self._evidence = stacks.collect(group.places)
