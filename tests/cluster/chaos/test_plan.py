"""Plans of faults."""

from __future__ import annotations

from typing import Any

import pytest

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
    plan = read(PLAN, 1000)
    assert plan == read(PLAN, 1000)
    assert plan != read(PLAN | {"seed": 4}, 1000)
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
    ],
)
def test_a_plan_that_means_nothing_is_refused(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read({"faults": [entry]}, 1000)


def test_unknown_keys_of_a_plan_are_refused() -> None:
    with pytest.raises(ConfigError, match="fualts"):
        read({"fualts": []}, 10)
