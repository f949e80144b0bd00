"""From what was seen to one cause: without a cluster, with Ray's own exceptions."""

from __future__ import annotations

import pytest
import ray.exceptions
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from cluster.causes import Cause, Evidence, diagnose
from diffussm.errors import (
    ConfigError,
    DataError,
    DivergedError,
    InfrastructureError,
    Preempted,
    Regroup,
    StorageError,
)  # fmt: skip

ECHO = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")


def dead(
    said: str = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR",
) -> Exception:
    return WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.RayActorError(None, said))


@pytest.mark.parametrize(
    ("errors", "cause", "rank"),
    [
        ({0: ECHO, 1: dead()}, Cause.WORKER, 1),
        ({0: ECHO, 1: dead("(1) the process was killed by the OOM killer due to high memory usage")}, Cause.WORKER, 1),
        ({0: dead("its node has died"), 1: ECHO}, Cause.NODE, 0),
        ({0: ECHO, 1: dead("Task was killed due to the node running low on memory")}, Cause.MEMORY, 1),
        ({0: ECHO, 1: type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})("CUDA")}, Cause.MEMORY, 1),
        ({0: ECHO, 1: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")}, Cause.MEMORY, 1),
        ({0: ECHO, 1: RuntimeError("can't start new thread")}, Cause.MEMORY, 1),
        ({0: ECHO, 1: MemoryError()}, Cause.MEMORY, 1),
        ({0: ECHO, 1: ECHO}, Cause.PEER, 0),
        ({0: ECHO, 1: ConnectionResetError("reset")}, Cause.PEER, 0),
        ({0: ECHO, 1: WorkerHealthCheckTimeoutError("hanging")}, Cause.HANG, 1),
        ({0: StorageError("bucket away"), 1: StorageError("bucket away")}, Cause.STORAGE, 0),
        ({0: ECHO, 1: DivergedError("20 steps")}, Cause.NONFINITE, 1),
        ({0: ECHO, 1: DataError("shard corrupt")}, Cause.USER, 1),
        ({0: dead(), 1: ConfigError("x")}, Cause.USER, 1),
        ({0: ECHO, 1: TypeError("a bug")}, Cause.EXCEPTION, 1),
        ({0: RuntimeError("shapes do not fit"), 1: ECHO}, Cause.EXCEPTION, 0),
        ({0: Preempted("saved"), 1: ECHO}, Cause.PREEMPTED, 0),
        ({0: Regroup("saved"), 1: Regroup("saved")}, Cause.REGROUP, 0),
    ],
)
def test_the_most_telling_error_is_the_cause_and_the_others_are_echoes(
    errors: dict[int, Exception], cause: Cause, rank: int
) -> None:
    found = diagnose(WorkerGroupError("text", errors), Evidence())
    assert (found.cause, found.rank) == (cause, rank)
    assert f"rank {rank}" in found.said


def test_a_dead_worker_on_a_lost_node_is_a_lost_node() -> None:
    evidence = Evidence(lost_nodes=frozenset({"abc"}), node_of_rank={0: "def", 1: "abc"})
    assert diagnose(WorkerGroupError("", {0: ECHO, 1: dead()}), evidence).cause is Cause.NODE
    assert diagnose(WorkerGroupError("", {0: dead(), 1: ECHO}), evidence).cause is Cause.WORKER
    found = diagnose(WorkerGroupError("", {0: ECHO}), evidence)
    assert (found.cause, found.rank) == (Cause.NODE, 1), "the echo comes before Ray misses the rank itself"


def test_the_watchdogs_verdict_outweighs_what_its_kill_left_behind() -> None:
    found = diagnose(WorkerGroupError("", {0: dead(), 1: dead()}), Evidence(hang="rank 1 stands in data", hung_rank=1))
    assert (found.cause, found.rank, found.said) == (Cause.HANG, 1, "rank 1 stands in data")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (WorkerGroupStartupTimeoutError(2), Cause.START),
        (ECHO, Cause.START),
        (InfrastructureError("no nodes"), Cause.NO_NODES),
        (AttributeError("a bug"), Cause.EXCEPTION),
    ],
)
def test_errors_of_the_controller(error: Exception, cause: Cause) -> None:
    assert diagnose(ControllerError(error), Evidence()).cause is cause


def test_what_our_policies_say_after_a_hang_is_not_the_hang_again() -> None:
    hung = Evidence(hang="rank 1 stands", hung_rank=1)
    found = diagnose(ControllerError(Preempted("SIGTERM: asked to leave")), hung)
    assert (found.cause, found.said) == (Cause.PREEMPTED, "SIGTERM: asked to leave")
    assert diagnose(ControllerError(InfrastructureError("no nodes")), hung).cause is Cause.NO_NODES
    assert diagnose(WorkerGroupError("", {0: ECHO}), hung).cause is Cause.HANG
