"""Decisions without a cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.causes import Cause, Diagnosis
from cluster.policy import Action, Decision, Fault, Limits, Sizes, decide, should_grow, suspects
from diffussm.errors import ExitCode

LIMITS = Limits(max_failures=2, window_s=100)
FIXED = Sizes(wanted=4, least=4, legal=(1, 2, 4))
ELASTIC = Sizes(wanted=4, least=1, legal=(1, 2, 4))


def fault(cause: Cause, *, images: int = 80, steps: int = 10, at_s: float = 0.0) -> Fault:
    return Fault(Diagnosis(cause, 1, "rank 1: what it said"), images, steps, at_s)


def after(now: Fault, *earlier: Fault, capacity: int = 4, sizes: Sizes = FIXED) -> Decision:
    return decide(now, earlier, capacity, sizes, LIMITS)


LOST = [Cause.WORKER, Cause.NODE, Cause.HANG, Cause.PEER, Cause.START]


@pytest.mark.parametrize("cause", LOST)
def test_what_may_pass_is_started_again_within_its_own_budget(cause: Cause) -> None:
    assert after(fault(cause)).action is Action.RESTART
    others = [fault(other, images=index) for index, other in enumerate(LOST) if other is not cause]
    assert after(fault(cause), *others, *others).action is Action.RESTART
    once = fault(cause, images=8)
    assert after(fault(cause), once).action is Action.RESTART
    stopped = after(fault(cause), once, once)
    assert (stopped.action, stopped.code) == (Action.STOP, ExitCode.INFRASTRUCTURE)
    assert "3 times" in stopped.reason
    assert "max_failures" in stopped.reason


def test_old_faults_are_forgotten() -> None:
    earlier = [fault(Cause.WORKER, at_s=at) for at in range(5)]
    assert after(fault(Cause.WORKER, at_s=50), *earlier).action is Action.STOP
    assert after(fault(Cause.WORKER, at_s=200), *earlier).action is Action.RESTART


@pytest.mark.parametrize(
    ("cause", "code"), [(Cause.USER, ExitCode.CONFIG), (Cause.NONFINITE, ExitCode.DIVERGED), (Cause.NO_NODES, 76)]
)
def test_what_only_a_person_can_mend_stops_at_once(cause: Cause, code: int) -> None:
    decision = after(fault(cause))
    assert (decision.action, decision.code) == (Action.STOP, code)
    assert decision.reason == "rank 1: what it said"


@pytest.mark.parametrize("cause", [Cause.EXCEPTION, Cause.MEMORY])
def test_an_exception_never_loops(cause: Cause) -> None:
    first = after(fault(cause, steps=0))
    assert first.action is Action.STOP
    assert "first step" in first.reason
    assert after(fault(cause)).action is Action.RESTART
    again = after(fault(cause), fault(cause))
    assert again.action is Action.STOP
    assert "second time at 80 images" in again.reason
    assert after(fault(cause, images=160), fault(cause)).action is Action.STOP


def test_an_exception_at_the_same_place_is_a_repetition_however_late_unless_the_place_is_unknown() -> None:
    once = fault(Cause.EXCEPTION)
    assert after(fault(Cause.EXCEPTION, at_s=20_000), once).action is Action.STOP
    unknown, worked = fault(Cause.EXCEPTION, images=0, steps=0), fault(Cause.HANG, steps=50)
    assert "second time at" not in after(unknown, worked, unknown).reason, "its budget ends it, not the place"


def test_a_start_that_fails_after_others_have_worked_is_no_users_error() -> None:
    """Such as a device out of memory in the start after a hang: the run has shown that it can step."""
    worked = fault(Cause.HANG, images=900_000, steps=50)
    for cause in (Cause.EXCEPTION, Cause.MEMORY):
        assert after(fault(cause, steps=0, images=900_000), worked).action is Action.RESTART
        assert after(fault(cause, steps=0), fault(Cause.START, steps=0)).action is Action.STOP
        again = fault(cause, steps=0, images=900_000)
        assert after(again, worked, again).action is Action.STOP


@pytest.mark.parametrize("cause", [*LOST, Cause.STORAGE, Cause.PREEMPTED, Cause.REGROUP, Cause.EXCEPTION, Cause.MEMORY])
def test_a_job_that_was_asked_to_leave_makes_no_other_group(cause: Cause) -> None:
    """Each would hear the same wish in its first step, with a deadline that has passed."""
    for earlier in ([], [fault(cause, images=index) for index in range(20)]):
        decision = decide(fault(cause), earlier, 4, FIXED, LIMITS, leaving="SIGTERM to the driver")
        assert (decision.action, decision.code) == (Action.STOP, ExitCode.PREEMPTED)
        assert decision.reason.count("SIGTERM") == 1


def test_a_wish_that_the_ranks_name_themselves_is_not_said_twice() -> None:
    said = "rank 0: SIGTERM to the driver: saved at 40 images"
    left = replace(fault(Cause.PREEMPTED), diagnosis=Diagnosis(Cause.PREEMPTED, 0, said))
    assert decide(left, [], 4, FIXED, LIMITS, leaving="SIGTERM to the driver").reason == said


@pytest.mark.parametrize("cause", [Cause.USER, Cause.NONFINITE])
def test_what_a_person_must_mend_is_said_even_when_leaving(cause: Cause) -> None:
    decision = decide(fault(cause), [], 4, FIXED, LIMITS, leaving="SIGTERM to the driver")
    assert decision == after(fault(cause))


def test_leaving_in_order_costs_nothing() -> None:
    left = [fault(Cause.PREEMPTED, images=8 * n) for n in range(50)]
    assert after(fault(Cause.PREEMPTED), *left).action is Action.RESTART
    assert after(fault(Cause.REGROUP), *left).action is Action.GROW


def test_a_store_that_is_away_is_given_time() -> None:
    refused = [fault(Cause.STORAGE, images=8)] * 7
    decision = after(fault(Cause.STORAGE), *refused)
    assert decision.action is Action.RESTART
    assert decision.wait_s > 0
    stopped = after(fault(Cause.STORAGE), *refused, refused[0])
    assert (stopped.action, stopped.code) == (Action.STOP, ExitCode.STORAGE)


@pytest.mark.parametrize(("capacity", "size"), [(4, 4), (5, 4), (3, 2), (2, 2), (1, 1), (0, 0)])
def test_a_group_shrinks_to_the_largest_legal_size(capacity: int, size: int) -> None:
    decision = after(fault(Cause.NODE), capacity=capacity, sizes=ELASTIC)
    expected = {0: Action.WAIT, 4: Action.RESTART}.get(size, Action.SHRINK)
    assert (decision.action, decision.workers) == (expected, size)


def test_a_run_that_may_not_shrink_waits_for_nodes() -> None:
    decision = after(fault(Cause.NODE), capacity=3)
    assert decision.action is Action.WAIT
    assert "at least 4 are needed" in decision.reason


@pytest.mark.parametrize(
    ("present", "capacity", "size"), [(1, 4, 4), (2, 3, 0), (2, 4, 4), (4, 8, 0), (1, 0, 0), (1, 2, 2)]
)
def test_a_group_grows_only_to_a_larger_legal_size(present: int, capacity: int, size: int) -> None:
    assert should_grow(present, capacity, ELASTIC) == size


def test_no_budget_means_no_second_start() -> None:
    assert decide(fault(Cause.WORKER), [], 4, FIXED, Limits(0, 100)).action is Action.STOP


def test_a_node_is_suspect_after_two_recent_faults_of_its_own() -> None:
    def on(node: str, cause: Cause = Cause.WORKER, at_s: float = 0.0) -> Fault:
        return Fault(Diagnosis(cause, 1, "said"), 80, 10, at_s, node)

    assert suspects([on("a"), on("b"), on("a", Cause.HANG)], LIMITS) == {"a"}
    assert suspects([on("a"), on("b")], LIMITS) == set()
    assert suspects([on("a"), on("a", at_s=200)], LIMITS) == set(), "forgotten"
    assert suspects([on("a", Cause.STORAGE), on("a", Cause.PREEMPTED), on("", Cause.WORKER)], LIMITS) == set()
