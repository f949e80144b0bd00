"""A sink that hangs, raises, ends the program or is slow, and what the caller notices of it: nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from diffussm.observe import sinks
from diffussm.observe.sinks import MOST_FAILURES, Record, Sink


class Service:
    """Does as told, and keeps what it got. Not a real service: those that exist are in the tests of their doors."""

    def __init__(self, act: Callable[[Record], Any] = lambda record: None) -> None:
        self.act, self.got, self.closed = act, list[Record](), False

    def take(self, record: Record) -> None:
        self.act(record)
        self.got.append(record)

    def close(self) -> None:
        self.closed = True


def seconds(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def fail(record: Record) -> None:
    raise RuntimeError("is down")


def test_records_arrive_in_order_and_all_before_the_end() -> None:
    service, said = Service(), list[str]()
    sink = Sink("S", lambda: service, said.append)
    for i in range(1000):
        sink.write({"i": i})
    sink.close(60)
    assert [record["i"] for record in service.got] == list(range(1000))
    assert service.closed
    assert said == []


def test_a_connection_that_fails_or_ends_the_program_is_told_once() -> None:
    def refuse() -> Service:
        raise SystemExit("no key")

    said: list[str] = []
    sink = Sink("S", refuse, said.append)
    sink.close(60)
    sink.write({})
    assert said == ["S is not available and is left out of this start: SystemExit: no key"]


def test_a_service_that_always_refuses_is_given_up() -> None:
    service, said = Service(fail), list[str]()
    sink = Sink("S", lambda: service, said.append)
    for _ in range(50):
        sink.write({})
    sink.close(60)
    assert said == [
        "S refused a record: RuntimeError: is down",
        f"S refused {MOST_FAILURES} records in a row and is left out of this start",
    ]
    assert service.closed


def test_a_service_that_hangs_delays_no_write_and_is_left_at_the_end(monkeypatch: Any) -> None:
    monkeypatch.setattr(sinks, "MOST_WAITING", 10)
    stuck, release, said = threading.Event(), threading.Event(), list[str]()

    def hang(record: Record) -> None:
        stuck.set()
        release.wait(60)

    service, ended = Service(hang), threading.Event()
    sink = Sink("S", lambda: service, said.append, ended.set)
    sink.write({"i": 0})
    assert stuck.wait(60)
    for i in range(1, 41):  # would never return if one of them waited
        sink.write({"i": i})
    assert seconds(lambda: sink.close(0.2)) < 30
    assert ended.is_set()
    assert said == [
        "S does not keep up: records are left out there; the run's journals have all",
        "S did not finish within 0.2 s and is left alone",
        "S: 30 records were left out in all",
    ]
    release.set()


def test_a_connection_that_hangs_delays_nothing_either() -> None:
    release, said = threading.Event(), list[str]()

    def connect() -> Service:
        release.wait(60)
        return Service()

    sink = Sink("S", connect, said.append)
    sink.write({})
    sink.close(0.2)
    assert said == ["S did not finish within 0.2 s and is left alone"]
    release.set()
