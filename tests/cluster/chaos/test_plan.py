"""Plans of faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.chaos.plan import Kind, read
from diffussm.errors import ConfigError

PLAN = {
    "seed": 3,
    "faults": [
        {"fault": "kill-rank", "at_images": [8, 800], "times": 5},
        {"fault": "stop-rank", "at_images": 100, "rank": 1, "for_s": 2.5},
        {"fault": "command", "at_images": 0, "command": ["true", 1]},
    ],
}


def test_a_seed_makes_the_same_faults_in_the_order_of_their_images() -> None:
    plan = read(PLAN, 1000, 2)
    assert plan == read(PLAN, 1000, 2)
    assert plan != read(PLAN | {"seed": 4}, 1000, 2)
    assert [f.at_images for f in plan.faults] == sorted(f.at_images for f in plan.faults)
    kills = [f.at_images for f in plan.faults if f.kind is Kind.KILL_RANK]
    assert len(set(kills)) > 1
    assert all(8 <= at <= 800 for at in kills)
    assert plan.faults[0].command == ("true", "1")
    assert [(f.rank, f.for_s) for f in plan.faults if f.kind is Kind.STOP_RANK] == [(1, 2.5)]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"fault": "explode", "at_images": 1}, "kill-rank, stop-rank"),
        ({"fault": "kill-rank"}, "at_images: found None"),
        ({"fault": "kill-rank", "at_images": 1000}, "0 to 999"),
        ({"fault": "kill-rank", "at_images": [9, 8]}, r"\[9, 8\]"),
        ({"fault": "kill-rank", "at_images": 1, "rnak": 1}, "rnak"),
        ({"fault": "fill-disk", "at_images": 1, "folder": "/x"}, "needs for_s"),
        ({"fault": "cut-network", "at_images": 1}, "needs device"),
        ({"fault": "kill-rank", "at_images": 1, "rank": 2}, "rank: found 2; allowed: 0 to 1"),
        ({"fault": "kill-rank", "at_images": 1, "after_s": 1}, "either at_images or after_s"),
        ({"fault": "kill-rank", "after_s": 1}, "no fault before it"),
        ({"fault": "stop-rank", "at_images": 1, "for_s": [3, 2]}, r"for_s: found \[3, 2\]"),
        ([], "a mapping with fault"),
    ],
)
def test_a_plan_that_means_nothing_is_refused(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read({"faults": [entry]}, 1000, 2)


def test_unknown_keys_of_a_plan_are_refused() -> None:
    with pytest.raises(ConfigError, match="fualts"):
        read({"fualts": []}, 10, 2)


def test_a_fault_may_follow_the_one_before_it() -> None:
    faults = [
        {"fault": "kill-rank", "at_images": 500},
        {"fault": "kill-rank", "at_images": 80},
        {"fault": "warn", "after_s": [1, 4], "for_s": 30},
    ]
    plan = read({"faults": faults}, 1000, 2)
    assert [(f.kind, f.at_images) for f in plan.faults] == [
        (Kind.KILL_RANK, 80), (Kind.WARN, 80), (Kind.KILL_RANK, 500),
    ]  # fmt: skip
    follows = plan.faults[1].after_s
    assert follows is not None
    assert 1 <= follows <= 4


RANDOM = {
    "faults": 100,
    "at_images": [80, 900],
    "kinds": [
        "kill-rank",
        {"fault": "stop-rank", "for_s": [1, 5], "weight": 2},
        {"fault": "warn", "for_s": 30, "after_s": [0, 9]},
    ],
}


def test_the_example_in_the_docs_kills_a_rank_each_minute() -> None:
    text = (Path(__file__).parents[3] / "docs" / "examples" / "kill-each-minute.yaml").read_text()
    first, *others = read(yaml.safe_load(text), images=64_000, ranks=2).faults
    assert (first.kind, first.at_images, first.after_s) == (Kind.KILL_RANK, 3200, None)
    assert {(fault.kind, fault.at_images, fault.after_s) for fault in others} == {(Kind.KILL_RANK, 3200, 60)}
    assert len(others) == 7


def test_random_faults_are_of_all_kinds_within_their_images_and_the_same_for_a_seed() -> None:
    plan = read({"seed": 1, "random": RANDOM}, 1000, 2)
    assert plan == read({"seed": 1, "random": RANDOM}, 1000, 2)
    assert plan != read({"seed": 2, "random": RANDOM}, 1000, 2)
    assert len(plan.faults) == 100
    assert all(80 <= f.at_images <= 900 for f in plan.faults)
    assert len({f.at_images for f in plan.faults}) > 40
    count = {kind: sum(f.kind is kind for f in plan.faults) for kind in (Kind.KILL_RANK, Kind.STOP_RANK, Kind.WARN)}
    assert sum(count.values()) == 100
    assert count[Kind.STOP_RANK] > count[Kind.KILL_RANK] > 0 < count[Kind.WARN]
    assert all(1 <= f.for_s <= 5 for f in plan.faults if f.kind is Kind.STOP_RANK)
    for before, fault in zip(plan.faults, plan.faults[1:], strict=False):
        if fault.kind is Kind.WARN:
            assert fault.after_s is not None
            assert fault.at_images == before.at_images, "it is made when the fault before it is, and later"
        else:
            assert fault.after_s is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kinds": []}, "kinds"),
        ({"kinds": ["explode"]}, r"random.kinds\[0\].fault: found 'explode'"),
        ({"kinds": [{"fault": "kill-rank", "at_images": 8}]}, "at_images or times"),
        ({"at_images": [1, 1000]}, "0 to 999"),
        ({"mean_s": 3}, "mean_s"),
    ],
)
def test_random_faults_that_mean_nothing_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read({"random": RANDOM | change}, 1000, 2)
