"""Our policies inside Ray Train's controller: it asks them what to do after a failure and how large a group to make.

Both run in the controller's process. Ray offers no public way to hand them in, so this leans on internals of the pinned
version; tests/cluster/test_trainer.py kills workers to see that they are asked.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import ray
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from cluster import nodes
from cluster.causes import diagnose, errors_of
from cluster.policy import SUSPECT, Action, Decision, Fault, Limits, Sizes, decide, suspects
from cluster.preempt import AGAIN, ASKED
from diffussm.config.plan import smaller_sizes
from diffussm.config.schema import Config
from diffussm.errors import InfrastructureError, Preempted
from diffussm.train.control import Level, Wish

NODE_LABEL = "ray.io/node-id"
"""Label that Ray gives each node."""
LOOK_S = 0.25
"""Seconds between two looks while a group cannot start yet."""


def sizes_of(cfg: Config) -> Sizes:
    """The world sizes that a checked config allows."""
    wanted = cfg.cluster.workers
    return Sizes(wanted, cfg.cluster.min_workers or wanted, smaller_sizes(cfg))


def places_for(cfg: Config, hub: Any) -> tuple[int, set[str]]:
    """Workers of this config that the cluster's usable nodes could hold, and nodes that must hold none.

    Suspect nodes are among those as long as the others can hold as large a group.
    """
    found = nodes.reached(nodes.nodes())
    barred: set[str] = ray.get(hub.barred.remote({node.id for node in found if node.alive}))
    spared = barred | ray.get(hub.suspects.remote())

    def room(without: set[str]) -> int:
        usable = nodes.usable(found, without)
        return nodes.capacity(usable, cfg.cluster.cpus_per_worker, cfg.cluster.gpus_per_worker)

    fitting = sizes_of(cfg).fitting
    chosen = spared if fitting(room(spared)) == fitting(room(barred)) else barred
    return room(chosen), chosen


class OurFailurePolicy(FailurePolicy):
    """Lets the controller ask `policy.decide`."""

    def __init__(self, cfg: Config, hub: Any) -> None:
        # Budgets are ours; Ray's own would count as well if it could.
        super().__init__(FailureConfig(max_failures=-1, controller_failure_limit=-1))
        self.cfg, self.hub, self.history = cfg, hub, list[Fault]()

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Find the cause, decide, and say so to the driver."""
        # Asked now: a node that was away for some seconds and is back is not lost.
        lost = frozenset(node.id for node in nodes.reached(nodes.nodes()) if not node.alive)
        evidence, images, steps = ray.get(self.hub.evidence.remote())
        found = diagnose(training_failed_error, replace(evidence, lost_nodes=lost))
        node = "" if found.rank is None else evidence.node_of_rank.get(found.rank, "")
        fault = Fault(found, images, steps, time.time(), node)
        attempt = ray.get(self.hub.group.remote()).attempt
        room, _ = places_for(self.cfg, self.hub)
        limits = Limits(self.cfg.cluster.max_failures, self.cfg.cluster.failure_window_s)
        decision = decide(fault, self.history, room, sizes_of(self.cfg), limits, reason_to_leave(self.hub))
        self.history.append(fault)
        for each in ray.get(self.hub.suspect.remote(suspects(self.history, limits))):
            said = f"ranks failed on it {SUSPECT} times: others are preferred"
            self.hub.tell.remote({"kind": "event", "event": "bad node", "node": each, "reason": said})
        if decision.wait_s:
            self.hub.hold.remote(time.time() + decision.wait_s)
        ray.get(self.hub.tell.remote(_record(fault, decision, training_failed_error) | {"attempt": attempt}))
        return FailureDecision.RAISE if decision.action is Action.STOP else FailureDecision.RETRY


def reason_to_leave(hub: Any) -> str:
    """Why the whole job was asked to leave; empty if it was not."""
    asked: Wish = ray.get(hub.asked.remote())
    return asked.reason if asked.level is Level.LEAVE else ""


def _record(fault: Fault, decision: Decision, error: TrainingFailedError) -> dict[str, Any]:
    """What the driver is told of a fault and the decision."""
    return {
        "kind": "event",
        "event": "failure",
        "cause": fault.diagnosis.cause.value,
        "rank": fault.diagnosis.rank,
        "decision": decision.action.value,
        "reason": decision.reason,
        "images": fault.images,
        "steps": fault.steps,
        "workers": decision.workers,
        "code": int(decision.code),
        "errors": {rank: f"{type(each).__name__}: {each}"[:4000] for rank, each in errors_of(error).items()},
    }


class OurScalingPolicy(ScalingPolicy):
    """Starts groups of the largest legal size that the usable nodes hold; waits, with an end, when none fits."""

    def __init__(self, cfg: Config, scaling: ScalingConfig, hub: Any) -> None:
        super().__init__(scaling)
        self.cfg, self.hub = cfg, hub
        self._waiting_since: float | None = None
        self._barred: set[str] = set()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """The next group's size, or not yet.

        Raises:
            Preempted: the whole job was asked to leave while there was no group to hear it.
            InfrastructureError: nodes were waited for longer than `cluster.wait_nodes_s`.
        """
        if reason := reason_to_leave(self.hub):
            raise Preempted(f"{reason}: {ASKED}", AGAIN)
        if time.time() < ray.get(self.hub.held_until.remote()):
            return self._not_yet()
        room, self._barred = places_for(self.cfg, self.hub)
        size = sizes_of(self.cfg).fitting(room)
        if not size:
            self._give_up_in_the_end()
            return self._not_yet()
        self._waiting_since = None
        ray.get(self.hub.begin.remote(size))
        return ResizeDecision(num_workers=size, resources_per_worker=self.scaling_config._resources_per_worker_not_none)

    def make_decision_for_running_worker_group(self, *_: Any, **__: Any) -> ScalingDecision:
        """Never: a running group is asked through the hub to leave at a checkpoint, so that no step is lost."""
        return NoopDecision()

    def on_controller_start_worker_group(
        self, *, scaling_config: ScalingConfig, num_workers: int
    ) -> dict[str, str] | None:
        """Labels that a worker's node must have: not to be one that must hold none."""
        return {NODE_LABEL: f"!in({','.join(sorted(self._barred))})"} if self._barred else None

    def _not_yet(self) -> ScalingDecision:
        time.sleep(LOOK_S)  # the controller asks again at once, without a pause of its own
        return NoopDecision()

    def _give_up_in_the_end(self) -> None:
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
            self.hub.tell.remote({"kind": "event", "event": "waiting for nodes", "workers": self.cfg.cluster.workers})
        if now - self._waiting_since > self.cfg.cluster.wait_nodes_s:
            self._waiting_since = None
            raise InfrastructureError(
                f"no {sizes_of(self.cfg).least} worker(s) could be placed within "
                f"cluster.wait_nodes_s={self.cfg.cluster.wait_nodes_s:g}",
                "start the same command again when nodes are there, or set a smaller cluster.min_workers",
            )

    def _get_num_workers_for_resource_request(self) -> int:
        return self.cfg.cluster.workers

    def after_controller_start(self, train_run_context: Any) -> None:
        """No request to Ray's autoscaler: clusters are made by the launcher, of a size that is known."""

    async def before_controller_shutdown(self) -> None:
        """Nothing was requested."""

    def before_controller_abort(self) -> None:
        """Nothing was requested."""
