from __future__ import annotations

import json
import resource
import threading
import time
from pathlib import Path

import pytest

from diffussm.checkpoint.fence import Fence
from diffussm.checkpoint.store import LocalStore, Store
from diffussm.errors import StorageError
from diffussm.observe.events import Journal, close, flush, read_journal, read_lines
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


def test_a_torn_line_costs_itself_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = LocalStore(str(tmp_path))
    store.write("m.jsonl", b'{"a": 1}\n{"a')  # the disk was full
    journal = Journal(store, "m.jsonl")
    journal.write({"a": 2})
    journal.close()
    with (tmp_path / "m.jsonl").open("ab") as file:
        file.write(b'\0\0\0\n\xff\n[]\n{"a": 3}\n')  # zeros are what a lost node leaves
    records, torn = read_lines(store, "m.jsonl")
    assert [record["a"] for record in records] == [1, 2, 3]
    assert torn == 4
    assert read_journal(store, "m.jsonl") == records
    assert "m.jsonl: 4 torn" in caplog.text


def test_a_line_of_which_the_disk_took_a_part_goes_on_where_it_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, soft_hard = LocalStore(str(tmp_path)), resource.getrlimit(resource.RLIMIT_FSIZE)
    journal = Journal(store, "m.jsonl")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, soft_hard[1]))
    try:
        journal.write({"a": "x" * 200})
        while "was not written, it is tried again" not in caplog.text:
            time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_hard)
    assert (tmp_path / "m.jsonl").stat().st_size == 100
    journal.write({"a": "y"})
    journal.close()
    assert [record["a"] for record in read_journal(store, "m.jsonl")] == ["x" * 200, "y"]


def test_a_folder_that_stands_still_delays_neither_a_writer_nor_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()

    class Standing(Fence):
        def check(self) -> None:  # where a mount stands still, this look is where a writer would wait first
            assert gate.wait(60)

    store = LocalStore(str(tmp_path))
    journal = Journal(store, "m.jsonl", Standing(store, 1))
    for number in range(3):
        journal.write({"a": number})  # would never return if it waited
    journal.close(0.01)
    assert "m.jsonl: its last lines were not written within 0.01 s" in caplog.text
    gate.set()
    journal.close()
    assert [record["a"] for record in read_journal(store, "m.jsonl")] == [0, 1, 2]


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

        def size(self, key):
            raise_not_found(key)

        upload = fetch = keys = delete = None

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


def test_a_bucket_rests_between_puts_unless_somebody_must_know_that_the_lines_are_there(s3_server: S3Server) -> None:
    from diffussm.checkpoint.store import open_store

    store = open_store(s3_server.url("large"))
    store.write("t.jsonl", b'{"a": 0}\n' * 50_000)  # 450 kB: 9 s between two puts
    puts, write = [], store.write
    store.write = lambda key, data: puts.append(write(key, data))  # type: ignore[assignment, method-assign]
    journal = Journal(store, "t.jsonl")
    began = time.monotonic()
    journal.write({"a": 1})
    while not puts:
        time.sleep(0.01)
    for number in range(2, 6):
        journal.write({"a": number})
    assert journal.flush(60)
    assert [record["a"] for record in read_journal(store, "t.jsonl")[-5:]] == [1, 2, 3, 4, 5]
    journal.write({"a": 6})
    journal.close()
    assert len(puts) == 3
    assert time.monotonic() - began < 18, "it rested nowhere to the end"
    assert read_journal(store, "t.jsonl")[-1]["a"] == 6


def test_a_flush_says_whether_the_lines_are_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()

    class Standing(Fence):
        def check(self) -> None:
            gate.wait(60)

    store = LocalStore(str(tmp_path))
    standing, refused = Journal(store, "s.jsonl", Standing(store, 1)), Journal(store, "r.jsonl")
    assert standing.flush(60), "there is nothing to be stored"
    (tmp_path / "r.jsonl").mkdir()
    standing.write({"a": 1})
    refused.write({"a": 1})
    assert not standing.flush(0.05)
    began = time.monotonic()
    assert not refused.flush(60)
    assert time.monotonic() - began < 30, "a refusal is not waited out"
    gate.set()
    (tmp_path / "r.jsonl").rmdir()
    assert flush([standing, refused], 60)
    assert [read_journal(store, key)[0]["a"] for key in ("s.jsonl", "r.jsonl")] == [1, 1]
    close([standing, refused], 60)


def raise_not_found(key: str) -> None:
    from diffussm.checkpoint.store import NotFound

    raise NotFound(key)


def test_journals_share_the_time_to_close(tmp_path: Path) -> None:
    gate = threading.Event()

    class Standing(Fence):
        def check(self) -> None:
            gate.wait(60)

    store = LocalStore(str(tmp_path))
    journals = [Journal(store, f"{number}.jsonl", Standing(store, 1)) for number in range(4)]
    for journal in journals:
        journal.write({"a": 1})
    began = time.monotonic()
    close(journals, 0.2)
    assert time.monotonic() - began < 10
    gate.set()
    close(journals, 60)
    assert [read_journal(store, f"{number}.jsonl")[0]["a"] for number in range(4)] == [1] * 4
