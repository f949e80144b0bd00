"""What a report reads of a run: finished, running, or damaged."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from diffussm.checkpoint.store import open_store
from diffussm.errors import DataError, ExitCode
from diffussm.observe.report.gather import Grid, gather, last_of_each, spread
from tests.diffussm.observe.report import stories


def test_everything_of_a_run_is_found(tmp_path: Path) -> None:
    story = gather(stories.run(tmp_path), "a-run")
    assert [m["images"] for m in story.metrics] == [step * stories.STEP for step in range(1, stories.STEPS + 1)]
    assert [m["attempt"] for m in story.metrics[19:22]] == [1, 2, 2]  # steps 21 to 30 were done again
    assert (story.images, story.total_images) == (6_000, 8_000)
    assert [(g.images, g.variant) for g in story.grids] == [(2_000, ""), (4_000, ""), (6_000, ""), (6_000, "guidance")]
    assert all(g.png.startswith(b"\x89PNG") for g in story.grids)
    assert [e["value"] for e in story.evaluations if e["leads"]] == [180.0, 120.5]
    assert [e["metric"] for e in story.evaluations] == ["FD-EffLite0", "precision"] * 2
    assert [a["attempt"] for a in story.attempts] == [1, 2]
    assert story.goodput.seconds["replayed"] == pytest.approx(90.0)
    assert story.unreadable == []


def test_a_file_cut_by_a_kill_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    store = stories.run(tmp_path)
    store.write("summary.json", b'{"images": 60')
    store.write("events.jsonl", b'{"event": "started", "time": 1.0, "attempt": 1}\n{"event": "sav')
    store.write("metrics.jsonl", b'{"images": 8}\n{"ima{"images": 16}\n{"images": 24}\n')
    story = gather(store, "a-run")
    assert [line.split(":")[0] for line in story.unreadable] == ["metrics.jsonl", "summary.json"]
    assert story.unreadable[0] == "metrics.jsonl: 1 torn line left out"
    assert [m["images"] for m in story.metrics] == [8, 24]
    assert [e["event"] for e in story.events] == ["started"]  # a last line without its end is not there yet
    assert story.summary is None


def test_no_run_is_an_error_with_its_code(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run is there"):
        gather(open_store(str(tmp_path)), "nothing")


def test_replayed_steps_count_once_and_the_last_wins() -> None:
    lines = [{"images": 8, "loss": 1}, {"images": 16, "loss": 2}, {"images": 8, "loss": 3}, {"other": 1}]
    assert last_of_each(lines) == [{"images": 8, "loss": 3}, {"images": 16, "loss": 2}]


def test_many_grids_are_thinned_evenly_with_both_ends() -> None:
    grids = [Grid(i, "", b"") for i in range(1000)]
    kept = [g.images for g in spread(grids, 60)]
    assert (kept[0], kept[-1], len(kept)) == (0, 999, 60)
    gaps = [b - a for a, b in pairwise(kept)]
    assert max(gaps) - min(gaps) <= 1
    assert spread(grids[:5], 60) == grids[:5]


def test_the_command_writes_the_page_into_the_run(tmp_path: Path) -> None:
    stories.run(tmp_path)
    command = [sys.executable, "-m", "diffussm.observe.report"]
    done = subprocess.run(
        [*command, str(tmp_path / "a-run" / "config.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "goodput" in done.stdout
    assert (tmp_path / "a-run" / "report.html").read_text().startswith("<!doctype html>")
    absent = [*command, str(tmp_path / "a-run" / "config.yaml"), "name=other"]
    assert subprocess.run(absent, capture_output=True, check=False).returncode == ExitCode.DATA
