"""The ledger of seconds by cause."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from diffussm.checkpoint.fence import Fence
from diffussm.checkpoint.store import open_store
from diffussm.observe.events import read_journal
from diffussm.observe.goodput import CAUSES, KEY, Ledger, goodput, summarize


def record(time: float, attempt: int, images: int, kind: str = "steps", **seconds: float) -> dict[str, Any]:
    return {"time": time, "attempt": attempt, "images": images, "kind": kind, "seconds": seconds}


def test_everything_between_first_and_last_record_has_a_cause() -> None:
    found = summarize(
        [
            record(110, 1, 0, "begin", start=8, restore=2),
            record(120, 1, 8, step=7, data=2, save=1),
            record(130, 1, 16, step=10),
            # killed; 20 s nothing, then 5 s of start
            record(155, 2, 8, "begin", start=4, restore=1),
            record(165, 2, 16, replayed=10),
            record(175, 2, 24, step=9, data=1),
        ]
    )
    assert found.total_s == 75
    assert found.seconds == {
        "step": 26, "data": 3, "save": 1, "restore": 3, "start": 12, "replayed": 10, "idle": 20,
    }  # fmt: skip
    assert sum(found.seconds.values()) == found.total_s
    assert found.fraction == pytest.approx(26 / 75)
    assert (found.attempts, found.images) == (2, 24)
    for cause in CAUSES:
        assert cause in found.table()


def test_a_run_without_records_has_no_goodput() -> None:
    assert summarize([]).fraction == 0
    assert "nothing" in summarize([]).table()


def test_the_ledger_books_differences_and_knows_what_was_done_before(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    first = Ledger(store, 1)
    first.begin(0, {"start": 3.0})
    first.step(8, {"start": 3.0, "data": 1.0, "forward": 1.0, "backward": 2.0, "reduce": 0.5, "other": 0.5})
    first.step(16, {"start": 3.0, "data": 1.5, "forward": 2.0, "backward": 4.0, "reduce": 1.0, "other": 1.0, "save": 2})
    first.close()
    second = Ledger(store, 2)
    second.begin(8, {"start": 1.0, "restore": 2.0})
    assert second.step(16, {"start": 1.0, "restore": 2.0, "forward": 5.0})["replayed"] == 5.0
    assert second.step(24, {"start": 1.0, "restore": 2.0, "forward": 6.0})["step"] == 1.0
    second.close()
    kinds = [r["kind"] for r in read_journal(store, KEY)]
    assert kinds == ["begin", "steps", "steps", "begin", "steps", "steps"]
    found = goodput(store).seconds
    assert (found["step"], found["data"], found["save"], found["replayed"]) == (9.0, 1.5, 2.0, 5.0)
    assert (found["start"], found["restore"]) == (4.0, 2.0)


def test_the_share_of_a_later_start_is_the_whole_run_s_as_the_report_has_it(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    began = time.time() - 100
    lines = [record(began + 10, 1, 0, "begin", start=10.0), record(began + 40, 1, 8, step=30.0)]
    store.write(KEY, "".join(json.dumps(line) + "\n" for line in lines).encode())
    ledger = Ledger(store, 2)
    assert ledger.share is None
    ledger.begin(8, {"start": 20.0})  # of the 60 s since the last line 40 were idle
    ledger.step(16, {"start": 20.0, "forward": 0.05})
    assert ledger.share == pytest.approx(30.05 / 100, abs=0.01)
    ledger.close()
    whole = goodput(store)
    assert whole.fraction == pytest.approx(ledger.share, abs=0.001)
    assert whole.seconds == pytest.approx(ledger.seconds, abs=0.1)


def test_a_torn_line_keeps_no_run_from_starting(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    whole = b'{"time": 20, "attempt": 1, "kind": "steps", "images": 8, "seconds": {"step": 5}}\n'
    store.write(KEY, whole + b'{"time": 21, "att' + whole + b'{"tim')
    ledger = Ledger(store, 2)
    assert ledger.step(8, {"forward": 1.0}) == {"data": 0.0, "save": 0.0, "replayed": 1.0}
    ledger.close()
    assert [record["attempt"] for record in read_journal(store, KEY)] == [1, 2]


def test_an_attempt_that_is_not_the_newest_writes_nothing_more(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    old = Ledger(store, 1, Fence(store, 1))
    old.begin(0, {"start": 3.0})
    store.write("attempts/2/start.json", b"{}", create=True)
    old.step(8, {"start": 3.0, "forward": 1.0})
    old.close()
    assert [record["kind"] for record in read_journal(store, KEY)] == ["begin"]
