"""A journal in a bucket is some objects, none of which is put again once it is large; test_events.py writes to both."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffussm.checkpoint.store import NotFound, Store, open_store
from diffussm.observe import appended
from diffussm.observe.appended import File, Object, last_segment, read_all, read_end, segment
from tests.s3 import S3Server


@pytest.fixture
def store(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(appended, "SEGMENT_BYTES", 40)
    return open_store(s3_server.url(f"appended/{tmp_path.name}"))


def lines(*numbers: int) -> bytes:
    return b"".join(b"%09d\n" % number for number in numbers)


def test_a_large_object_stays_and_the_next_is_begun_over_starts_too(store: Store) -> None:
    puts: list[tuple[str, int]] = []
    write = store.write

    def noted(key: str, data: bytes, *, create: bool = False) -> None:
        puts.append((key, len(data)))
        write(key, data, create=create)

    store.write = noted  # type: ignore[method-assign]
    for start in range(3):
        place = Object(store, "m.jsonl")
        for number in range(5 * start, 5 * start + 5):
            place.add(lines(number))
            place.write()
        place.write()  # nothing new
    assert read_all(store, "m.jsonl") == lines(*range(15))
    assert list(store.keys("m")) == [segment("m.jsonl", n) for n in range(4)]
    assert [size for _, size in puts] == [10, 20, 30, 40] * 3 + [10, 20, 30]
    assert last_segment(store, "m.jsonl") == 3
    assert read_end(store, "m.jsonl", 25) == lines(13, 14)
    assert read_end(store, "m.jsonl", 1000) == lines(12, 13, 14)


def test_an_object_of_any_size_that_is_there_is_not_put_again(store: Store) -> None:
    store.write("m.jsonl", lines(*range(100)))
    place = Object(store, "m.jsonl")
    assert place.rest_s == 0
    place.add(lines(100))
    place.write()
    assert store.size("m.jsonl") == 1000
    assert read_all(store, "m.jsonl") == lines(*range(101))


def test_lines_that_come_while_a_large_object_is_put_begin_the_next(store: Store) -> None:
    place, write = Object(store, "m.jsonl"), store.write

    def meanwhile(key: str, data: bytes, *, create: bool = False) -> None:
        if len(data) == 40:
            place.add(lines(4))
        write(key, data, create=create)

    store.write = meanwhile  # type: ignore[method-assign]
    for number in range(4):
        place.add(lines(number))
    place.write()
    place.write()
    assert store.read(segment("m.jsonl", 1)) == lines(4)
    assert read_all(store, "m.jsonl") == lines(*range(5))


def test_what_was_copied_to_a_folder_is_read_there(store: Store, tmp_path: Path) -> None:
    place = Object(store, "m.jsonl")
    for number in range(9):
        place.add(lines(number))
        place.write()
    copy = open_store(str(tmp_path / "copy"))
    for key in store.keys(""):
        copy.write(key, store.read(key))
    assert read_all(copy, "m.jsonl") == lines(*range(9))


def test_an_absent_journal_is_not_found(store: Store, tmp_path: Path) -> None:
    for each in (store, open_store(str(tmp_path))):
        for read in (lambda at: read_all(at, "none"), lambda at: read_end(at, "none", 10)):
            with pytest.raises(NotFound):
                read(each)
    File(tmp_path / "below" / "none").write()
    assert not (tmp_path / "below").exists(), "without a line there is no file"
