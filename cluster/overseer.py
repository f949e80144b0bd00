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
from cluster.watchdog import Patience, Verdict, judge, stragglers
from diffussm.config.schema import Config
from diffussm.train.control import Level, Wish

_LOG = logging.getLogger(__name__)

Announce = Callable[[dict[str, Any]], None]
OnPlaces = Callable[[int, Mapping[int, Place]], None]

LOOK_S = 0.25
"""Seconds between two looks at messages and signals."""
STRAGGLES = 1.5
"""Times the median of the ranks' own seconds a step."""
MANY_STEPS = 20
"""Steps after which such times mean something."""
NODES_S = 1.0
"""Seconds between two looks at nodes and heartbeats."""


class Overseer:
    """Runs from `start` to `stop`. What it hears goes to `announce` and `on_fault`, in its own thread."""

    def __init__(
        self, cfg: Config, hub: Any, warnings: Warnings, announce: Announce, on_fault: Announce, on_places: OnPlaces
    ) -> None:  # fmt: skip
        self.cfg, self.hub, self.warnings = cfg, hub, warnings
        self.announce, self.on_fault, self.on_places = announce, on_fault, on_places
        self._told = 0
        self._straggled: set[int] = set()
        cluster = cfg.cluster
        self.patience = Patience(cluster.hang_s, cluster.start_s, cluster.heartbeat_interval_s)
        self._evidence: dict[int, dict[str, Any]] = {}
        self._asked = Wish()
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
                self._hear()
                self._ask(self.warnings.wish)
                if not last and time.monotonic() - looked >= NODES_S:
                    looked = time.monotonic()
                    self._watch()
            except ray.exceptions.RayActorError as error:
                _LOG.warning("messages of the workers are lost: %s", error)
                return
            except ray.exceptions.RayError as error:  # tried again at the next look
                _LOG.warning("the cluster does not answer: %s", error)

    def _hear(self) -> None:
        for record in ray.get(self.hub.take.remote()):
            if record.get("event") == "failure":
                self.on_fault(record)
                record = {k: record[k] for k in ("kind", "event", "cause", "decision", "reason")}
            self.announce(record)

    def _ask(self, wish: Wish) -> None:
        """Pass on a wish that is new."""
        if wish.level is Level.NONE or (wish.level, wish.reason) == (self._asked.level, self._asked.reason):
            return
        self._asked = wish
        ray.get(self.hub.wish.remote(wish))
        self.announce({"kind": "event", "event": "asked to leave", "reason": wish.reason})

    def _watch(self) -> None:
        """Nodes that go and come, the notice file, and ranks that hang."""
        group, found = ray.get(self.hub.group.remote()), nodes.nodes()
        used = {place.node for place in group.places.values()}
        self.hub.lose.remote({node.id for node in found if not node.alive})
        self._ask(preempt.of_notice(self.cfg.cluster.notice_file, self.cfg.cluster.grace_s, time.time()))
        home = ray.get_runtime_context().get_node_id()
        self._ask(preempt.of_drained(found, used, home, lambda staying: self._size(staying) > 0, time.time()))
        self._tell_places(group)
        self._tell_stragglers(group)
        larger = self._grown(group, found)
        if larger:
            self._ask(Wish(Level.REGROUP, reason=f"{larger} workers could be had, {group.size} work"))
        verdict = judge(ray.get(self.hub.seen.remote()), self.patience) if not group.hang else None
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
        """Tell, once for each start, a rank that is much slower by itself than the others."""
        if group.attempt in self._straggled or min((b.steps for b in group.beats.values()), default=0) < MANY_STEPS:
            return
        slow = {rank: score for rank, score in stragglers(group.beats).items() if score > STRAGGLES}
        if slow:
            self._straggled.add(group.attempt)
            said = ", ".join(f"rank {rank} on {group.places[rank].host}: {score:.1f}" for rank, score in slow.items())
            self.announce({"kind": "event", "event": "straggler", "times the median": said})

    def _capacity(self, found: list[nodes.Node]) -> int:
        usable = nodes.usable(found, ray.get(self.hub.excluded.remote()))
        return nodes.capacity(usable, self.cfg.cluster.cpus_per_worker, self.cfg.cluster.gpus_per_worker)

    def _size(self, staying: list[nodes.Node]) -> int:
        return sizes_of(self.cfg).fitting(self._capacity(staying))

    def _end(self, verdict: Verdict, group: Group) -> None:
        """Collect the stacks of a hung group, say which rank is guilty, and kill the group; Ray makes another."""
        self.announce({"kind": "event", "event": "hang", "reason": verdict.said})
        ray.get(self.hub.hangs.remote(verdict.rank, verdict.said))  # before anything else can end the group
        self._evidence = stacks.collect(group.places)
        guilty = self._evidence.get(verdict.rank, {})
        state = f"; its process is {guilty['state']}" if guilty.get("state") else "; its node does not answer"
        ray.get(self.hub.hangs.remote(verdict.rank, f"{verdict.said}{state}"))
        stacks.kill(group.places)
