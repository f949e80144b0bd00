"""Our policies as Ray's controller asks them, with a hub beside them and no Ray."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from cluster import controller, nodes
from cluster.controller import OurFailurePolicy, OurScalingPolicy
from cluster.hub import Hub, Place
from cluster.nodes import Node
from cluster.trainer import _as_ours
from diffussm.config.schema import ClusterConfig, Config, TrainConfig
from diffussm.errors import (
    ConfigError,
    DataError,
    DiffuSSMError,
    DivergedError,
    ExitCode,
    InfrastructureError,
    MissingError,
    Preempted,
    Regroup,
    RestoreMismatch,
    StorageError,
    Superseded,
    UsageError,
)  # fmt: skip
from diffussm.train.control import Level, Wish
from diffussm.train.phases import Beat, Phase
from tests.near import Near, without_ray

ECHO = RuntimeError("gloo: Connection closed by peer [127.0.0.1]:4711")
SIGNAL = Wish(Level.LEAVE, 1.0, "SIGTERM to the driver")


class Scene:
    """Two nodes of one worker each, a group on both, and the policies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        without_ray(monkeypatch)
        self.found = [Node(name, True, name, {"CPU": 1.0}) for name in "ab"]
        monkeypatch.setattr(nodes, "nodes", lambda: self.found)
        monkeypatch.setattr(nodes, "reached", lambda found: found)
        monkeypatch.setattr(controller, "LOOK_S", 0.0)
        self.cfg = Config(
            name="x", train=TrainConfig(images=64, global_batch=8), cluster=ClusterConfig(workers=2, wait_nodes_s=0)
        )
        self.hub = Hub()
        near = Near(self.hub)
        self.failure = OurFailurePolicy(self.cfg, near)
        scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1})
        self.scaling = OurScalingPolicy(self.cfg, scaling, near)
        self.begin()

    def begin(self) -> None:
        self.hub.begin(2)
        for rank, name in enumerate("ab"):
            self.hub.join(rank, Place(name, name, rank, "", 0))
            self.hub.beat(rank, rank, Beat(Phase.DATA, 0.0, 5, 40, 1.0))

    def fail(self, error: TrainingFailedError) -> tuple[FailureDecision, dict[str, Any]]:
        decision = self.failure.make_decision(error)
        (record,) = self.hub.take()
        return decision, record


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


@pytest.mark.parametrize("error", [StorageError("the save was late"), ECHO, Preempted("SIGTERM: saved at 40 images")])
def test_a_job_that_was_asked_to_leave_ends_to_be_started_again(scene: Scene, error: Exception) -> None:
    assert scene.fail(WorkerGroupError("", {0: error, 1: error}))[0] is FailureDecision.RETRY
    scene.begin()
    scene.hub.wish(SIGNAL, 0)
    failed = WorkerGroupError("", {0: error, 1: error})
    decision, record = scene.fail(failed)
    assert (decision, record["code"]) == (FailureDecision.RAISE, ExitCode.PREEMPTED)
    shown = _as_ours(failed, scene.cfg, record)
    assert isinstance(shown, Preempted)
    assert "SIGTERM" in str(shown)


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("a"), DataError("b"), DivergedError("c"), MissingError("d"), Superseded("e"), UsageError("f"),
        RestoreMismatch("g"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_typed_error_that_ends_the_job_ends_it_with_its_own_code(scene: Scene, error: DiffuSSMError) -> None:
    failed = WorkerGroupError("", {0: ECHO, 1: error})
    decision, record = scene.fail(failed)
    assert decision is FailureDecision.RAISE
    assert _as_ours(failed, scene.cfg, record) is error


def test_who_only_left_does_not_decide_the_code(scene: Scene) -> None:
    """Rank 0 left for another group while rank 1 failed for good."""
    wrong = ConfigError("mend it")
    failed = WorkerGroupError("", {0: Regroup("2 workers could be had"), 1: wrong})
    record = {"cause": "user", "rank": 1, "code": int(ExitCode.CONFIG), "reason": "rank 1: mend it"}
    assert _as_ours(failed, scene.cfg, record) is wrong
    lost = WorkerGroupError("", {0: Regroup("2 workers could be had"), 1: ECHO})
    record |= {"code": int(ExitCode.INFRASTRUCTURE), "reason": "rank 1: lost"}
    assert isinstance(_as_ours(lost, scene.cfg, record), InfrastructureError)


def test_a_move_is_answered_by_another_group_and_a_departure_by_none(scene: Scene) -> None:
    scene.hub.wish(Wish(Level.MOVE, 1.0, "node b is drained"), scene.hub.group().serial)
    assert scene.fail(WorkerGroupError("", {0: Preempted("node b is drained: saved")}))[0] is FailureDecision.RETRY
    assert isinstance(scene.scaling.make_decision_for_non_running_worker_group(), ResizeDecision)
    scene.hub.wish(SIGNAL, 0)
    with pytest.raises(Preempted, match="SIGTERM") as raised:
        scene.scaling.make_decision_for_non_running_worker_group()
    decision, record = scene.fail(ControllerError(raised.value))
    assert (decision, record["code"]) == (FailureDecision.RAISE, ExitCode.PREEMPTED)


def test_nodes_are_waited_for_until_a_warning_or_the_end_of_patience(scene: Scene) -> None:
    scene.found = scene.found[:1]
    assert isinstance(scene.scaling.make_decision_for_non_running_worker_group(), NoopDecision)
    with pytest.raises(InfrastructureError, match="wait_nodes_s"):
        scene.scaling.make_decision_for_non_running_worker_group()
    scene.hub.wish(SIGNAL, 0)
    with pytest.raises(Preempted):
        scene.scaling.make_decision_for_non_running_worker_group()


def test_a_node_that_was_away_and_is_back_is_not_lost(scene: Scene) -> None:
    alive = scene.found
    scene.found = [alive[0], Node("b", False, "b", {"CPU": 1.0})]
    assert scene.fail(WorkerGroupError("", {0: ECHO, 1: ECHO}))[1]["cause"] == "node lost"
    scene.found = alive
    scene.begin()
    assert scene.fail(WorkerGroupError("", {0: ECHO, 1: ECHO}))[1]["cause"] == "connection lost"


def test_a_bug_in_the_controller_is_no_reason_to_try_other_machines(scene: Scene) -> None:
    scene.hub.begin(2)
    failed = ControllerError(KeyError("workers"))
    decision, record = scene.fail(failed)
    assert (decision, record["code"]) == (FailureDecision.RAISE, ExitCode.INTERNAL)
    shown = _as_ours(failed, scene.cfg, record)
    assert not isinstance(shown, DiffuSSMError)
    assert "KeyError" in str(shown)


def label(scene: Scene) -> dict[str, str] | None:
    scaling = scene.scaling
    return scaling.on_controller_start_worker_group(scaling_config=scaling.scaling_config, num_workers=2)


def test_barred_nodes_are_not_counted_and_their_label_is_refused(scene: Scene) -> None:
    assert isinstance(scene.scaling.make_decision_for_non_running_worker_group(), ResizeDecision)
    assert label(scene) is None
    scene.hub.admit({"a"})
    assert isinstance(scene.scaling.make_decision_for_non_running_worker_group(), NoopDecision)
    assert label(scene) == {"ray.io/node-id": "!in(b)"}


def test_a_node_whose_ranks_fail_again_and_again_is_left_out_while_others_can_hold_the_group(scene: Scene) -> None:
    spare = Node("c", True, "c", {"CPU": 1.0})
    died = ray.exceptions.RayActorError(None, "The actor is dead because its worker process has died.")
    for times in range(2):
        scene.scaling.make_decision_for_non_running_worker_group()
        assert label(scene) is None, times
        scene.begin()
        scene.failure.make_decision(WorkerGroupError("", {1: died}))
    assert [record["node"] for record in scene.hub.take() if record["event"] == "bad node"] == ["b"]
    scene.scaling.make_decision_for_non_running_worker_group()
    assert label(scene) is None, "without it the group would be smaller"
    scene.found = [*scene.found, spare]
    scene.scaling.make_decision_for_non_running_worker_group()
    assert label(scene) == {"ray.io/node-id": "!in(b)"}
