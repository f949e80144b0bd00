"""Decisions without a cluster."""

from __future__ import annotations

import pytest

from cluster.policy import Action, Failure, decide, may_pass
from diffussm.errors import ConfigError, DataError, DivergedError, InfrastructureError, StorageError


class RayActorError(Exception):
    __module__ = "ray.exceptions"


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (StorageError("bucket away"), True),
        (InfrastructureError("node lost"), True),
        (RuntimeError("gloo: connection closed by peer"), True),
        (ConnectionResetError(), True),
        (RayActorError("the worker died"), True),
        (ConfigError("x"), False),
        (DataError("x"), False),
        (DivergedError("x"), False),
        (TypeError("a bug"), False),
        (KeyError("a bug"), False),
        (FileNotFoundError("a shard"), False),
        (NotImplementedError("no kernel"), False),
        (type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})("CUDA out of memory"), False),
    ],
)
def test_what_may_pass(error: Exception, passes: bool) -> None:
    assert may_pass(error) is passes


def test_a_lost_worker_is_restarted_within_the_budget() -> None:
    lost = {0: RuntimeError("peer closed"), 1: RayActorError("died")}
    assert decide(Failure(lost, earlier=0), max_failures=2).action is Action.RESTART
    assert decide(Failure(lost, earlier=1), max_failures=2).action is Action.RESTART
    last = decide(Failure(lost, earlier=2), max_failures=2)
    assert last.action is Action.STOP
    assert "3 failures" in last.reason
    assert decide(Failure({}, earlier=0), max_failures=0).action is Action.STOP


def test_a_users_error_stops_at_once_even_beside_lost_peers() -> None:
    decision = decide(Failure({0: RuntimeError("peer closed"), 1: DataError("shard corrupt")}, 0), max_failures=9)
    assert decision.action is Action.STOP
    assert "rank 1: shard corrupt" in decision.reason
