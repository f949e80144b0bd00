from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from diffussm.checkpoint.store import LocalStore, Store
from diffussm.errors import StorageError
from diffussm.observe.events import Journal, read_journal
from tests.s3 import S3Server


def test_lines_are_appended_over_starts(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    for attempt in (1, 2):
        journal = Journal(store, "metrics.jsonl")
        journal.write({"images": 10 * attempt})
        journal.close()
    assert [record["images"] for record in read_journal(store, "metrics.jsonl")] == [10, 20]


def test_a_line_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.write("m.jsonl", b'{"a": 1}\n{"a": 2}\n{"a"')
    assert [record["a"] for record in read_journal(store, "m.jsonl")] == [1, 2]
    assert read_journal(store, "none.jsonl") == []


def test_a_bucket_gets_the_whole_journal(s3_server: S3Server) -> None:
    from diffussm.checkpoint.store import open_store

    store = open_store(s3_server.url("journal"))
    for attempt in (1, 2):
        journal = Journal(store, "e.jsonl")
        for step in range(5):
            journal.write({"attempt": attempt, "step": step})
        journal.close()
    records = read_journal(store, "e.jsonl")
    assert [(r["attempt"], r["step"]) for r in records] == [(a, s) for a in (1, 2) for s in range(5)]


def test_a_slow_or_failing_bucket_delays_no_writer(caplog: pytest.LogCaptureFixture) -> None:
    gate, content = threading.Event(), {}

    class Slow(Store):
        failures = 1

        def read(self, key):
            raise_not_found(key)

        def write(self, key, data, *, create=False):
            gate.wait(30)
            if self.failures:
                self.failures -= 1
                raise StorageError("store away")
            content[key] = data

        upload = fetch = keys = size = delete = None

    Slow.__abstractmethods__ = frozenset()
    journal = Journal(Slow("s3://x"), "e.jsonl")
    for step in range(3):
        journal.write({"step": step})  # returns although nothing can be put yet
    gate.set()
    journal.write({"step": 3})
    journal.close()
    steps = [json.loads(line)["step"] for line in content["e.jsonl"].splitlines()]
    assert steps == [0, 1, 2, 3]
    assert "store away" in caplog.text


def raise_not_found(key: str) -> None:
    from diffussm.checkpoint.store import NotFound

    raise NotFound(key)
