"""What the preflight makes of the nodes' facts; tests/chaos looks at real nodes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.checkup import pairs, problems
from cluster.facts import Facts

GOOD = Facts("10.0.0.1", 4711, (("torch", "2"), ("ray", "3")), "/scratch", 1 << 34, 1 << 30, 1000.0, 8, 8, 0.01)
MANY = {f"n{i}": replace(GOOD, reduce_s=0.02) for i in range(5)}


def said(found: dict[str, Facts | str]) -> list[tuple[str, bool, str]]:
    return [(each.node, each.bad, each.said) for each in problems(found)]


def test_good_nodes_have_no_problems() -> None:
    assert said({**MANY}) == []
    assert said({"n0": GOOD}) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"disk_bytes": 1 << 20}, "1 MiB are free in /scratch"),
        ({"shared_memory_bytes": 1 << 20}, "1 MiB are free in /dev/shm"),
        ({"gpus": 7}, "7 GPUs answer, 8 are promised"),
        ({"ill": ("GPU 3: 2 uncorrected memory errors",)}, "GPU 3"),
        ({"ill": ("storage: s3://b/r: cannot be read",)}, "storage"),
        ({"software": (("torch", "2"), ("ray", "4"))}, "ray 4"),
        ({"matmul_s": 0.04}, "a matrix product takes 0.040 s, 4.0 times"),
        ({"reduce_s": 0.08}, "an all-reduce with its neighbours takes 0.080 s"),
    ],
)
def test_a_bad_node_is_named(change: dict[str, object], words: str) -> None:
    (found,) = said({**MANY, "n2": replace(MANY["n2"], **change)})  # type: ignore[arg-type]
    assert found[:2] == ("n2", True)
    assert words in found[2]


def test_a_node_that_does_not_answer_is_bad_and_a_clock_is_only_told() -> None:
    assert said({**MANY, "n4": "no answer within 120 s"}) == [
        ("n4", True, "cannot be looked at: no answer within 120 s")
    ]
    off = GOOD.held_against(asked_s=1010.0, answered_s=1012.0)
    assert off.skew_s == -10
    assert GOOD.held_against(980.0, 990.0).skew_s == 10
    assert GOOD.held_against(999.0, 1001.0).skew_s == 0
    (found,) = said({**MANY, "n4": replace(MANY["n4"], skew_s=off.skew_s)})
    assert found == ("n4", False, "its clock is -10.0 s off the driver's")


def test_of_two_nodes_nobody_can_say_which_is_slow() -> None:
    assert said({"a": GOOD, "b": replace(GOOD, matmul_s=1.0)}) == []


@pytest.mark.parametrize("count", range(1, 9))
def test_every_node_meets_a_neighbour_and_never_two_at_once(count: int) -> None:
    ids = [f"n{i}" for i in range(count)]
    rounds = pairs(ids)
    for meetings in rounds:
        met = [node for pair in meetings for node in pair]
        assert len(met) == len(set(met))
    assert {node for meetings in rounds for pair in meetings for node in pair} == (set(ids) if count > 1 else set())
