"""The charts as data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from diffussm.observe.goodput import CAUSES
from diffussm.observe.report.figures import CAUSE_COLOURS, count_faults, figures, is_fault, score, smoothed, told
from diffussm.observe.report.gather import Story, gather
from tests.diffussm.observe.report import stories


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return gather(stories.run(tmp_path), "a-run")


def test_each_chart_is_plain_data(story: Story) -> None:
    made = figures(story)
    assert set(made) == {"loss", "score", "throughput", "grad_norm", "lr", "goodput", "timeline"}
    json.dumps(made, allow_nan=False)


def test_what_was_never_logged_has_no_chart(story: Story) -> None:
    assert "score" not in figures(replace(story, evaluations=[]))
    assert "loss" not in figures(replace(story, metrics=[m | {"loss": None} for m in story.metrics]))


def test_the_interval_of_a_score_hangs_on_its_value(story: Story) -> None:
    value, floor = score(story)["data"]
    assert value["y"] == [180.0, 120.5]
    assert value["error_y"]["array"] == pytest.approx([6, 6])
    assert value["error_y"]["arrayminus"] == pytest.approx([5, 5])
    assert floor["y"] == [46.1, 46.1]


def test_a_line_joins_only_scores_that_compare(story: Story) -> None:
    other = [
        story.evaluations[0] | {"value": value, "sampler": story.evaluations[0]["sampler"] | {"guidance": guidance}}
        for guidance, value in ((3.0, 150.0), (4.0, 170.0))
    ]
    few = story.evaluations[0] | {"n": 100, "value": 200.0, "floor": 60.0}
    lines = score(replace(story, evaluations=[*story.evaluations, *other, few]))["data"]
    assert [(line["name"], line["x"], line["y"]) for line in lines] == [
        ("FD-EffLite0, n = 260, guidance 1.5", [2_000, 6_000], [180.0, 120.5]),
        ("FD-EffLite0, n = 260: real against real", [2_000, 6_000], [46.1, 46.1]),
        ("FD-EffLite0, n = 260, guidance 3.0", [2_000], [150.0]),
        ("FD-EffLite0, n = 260, guidance 4.0", [2_000], [170.0]),
        ("FD-EffLite0, n = 100, guidance 1.5", [2_000], [200.0]),
        ("FD-EffLite0, n = 100: real against real", [2_000, 2_000], [60.0, 60.0]),
    ]


def test_the_bar_has_every_cause_and_the_whole_time(story: Story) -> None:
    assert set(CAUSE_COLOURS) == set(CAUSES)
    bars = figures(story)["goodput"]["data"]
    assert [bar["name"] for bar in bars] == list(CAUSES)
    assert sum(bar["x"][0] for bar in bars) == pytest.approx(story.goodput.total_s)


def test_faults_are_told_from_events() -> None:
    assert is_fault({"event": "failure"})
    assert not is_fault({"event": "saved"})
    assert told({"event": "saved", "time": 3, "attempt": 1, "images": 8}) == "saved: images 8"


def test_one_end_is_one_fault_and_a_preemption_is_none() -> None:
    failure = {"event": "failure", "attempt": 1, "cause": "hang", "decision": "restart"}
    events = [{"event": "hang", "attempt": 1}, {"event": "evidence", "attempt": 1}, failure]
    assert count_faults(events) == 1
    assert count_faults(events[:1]) == 1  # the driver was lost before it could decide
    assert count_faults([*events, {"event": "hang", "attempt": 2}]) == 2
    for name in ("save failed", "averages save failed", "straggler", "bad node"):
        assert count_faults([{"event": name, "attempt": 1}]) == 1
    orderly = [{"event": "asked to regroup"}, {"event": "left", "cause": "regroup"}, failure | {"cause": "regroup"}]
    assert count_faults(orderly) == 0


def test_smoothing_keeps_a_constant_and_follows_a_curve() -> None:
    assert smoothed([3.0] * 200) == pytest.approx([3.0] * 200)
    ramp = smoothed([float(i) for i in range(200)])
    assert 185 < ramp[-1] < 199
    assert smoothed([]) == []
