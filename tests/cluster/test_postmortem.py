"""One sentence and one folder for each failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.postmortem import PostMortem, files
from diffussm.checkpoint.store import open_store

FAULT = {
    "kind": "event", "event": "failure", "cause": "hang", "rank": 1, "decision": "restart",
    "reason": "rank 1 stands in data", "images": 4096, "steps": 8, "errors": {0: "RuntimeError: peer closed"},
}  # fmt: skip
RANKS = {
    0: {"pid": 7, "state": "asleep", "stacks": "Thread 1"},
    1: {"pid": 8, "state": "stopped", "wchan": "do_signal"},
}


def test_the_sentence_names_cause_place_and_decision() -> None:
    summary = json.loads(files(FAULT, RANKS)["summary.json"])
    assert summary["sentence"] == "hang at 4,096 images: rank 1 stands in data; decision: restart."
    assert summary["ranks"]["1"] == {"pid": 8, "state": "stopped", "wchan": "do_signal"}
    assert "stacks" not in summary["ranks"]["0"]


def test_evidence_lies_in_files_of_its_own(tmp_path: Path) -> None:
    after = PostMortem(open_store(str(tmp_path)))
    assert after.write(2, FAULT, RANKS) == "attempts/2/postmortem"
    assert after.write(2, FAULT, {}) == "attempts/2/postmortem-2"
    assert PostMortem(open_store(str(tmp_path))).write(2, FAULT, {}) == "attempts/2/postmortem-3", "of the next driver"
    folder = tmp_path / "attempts" / "2" / "postmortem"
    assert (folder / "stacks-rank0.txt").read_text() == "Thread 1"
    assert (folder / "error-rank0.txt").read_text() == "RuntimeError: peer closed"
    assert not (folder / "stacks-rank1.txt").exists()


def test_a_store_that_is_away_does_not_stop_the_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    after = PostMortem(open_store(str(tmp_path / "run")))
    (tmp_path / "run").write_text("a file in the way")
    after.write(1, FAULT, {})
    assert "attempt 1 is not stored" in caplog.text
