"""Faults are undone in time, and whatever happens at the end."""

from __future__ import annotations

import threading

import pytest

from cluster.chaos.undo import Undos
from diffussm.errors import ConfigError


def test_an_undo_comes_in_its_time_and_once() -> None:
    done, said = threading.Event(), list[int]()
    with Undos() as undos:
        undos.later(0.01, "x", lambda: (said.append(1), done.set())[1])
        assert done.wait(10)
    assert said == [1]


def test_all_is_undone_at_the_end_the_latest_first() -> None:
    said = list[int]()

    def broken() -> None:
        with Undos() as undos:
            undos.later(600, "one", lambda: said.append(1))
            undos.later(0, "two", lambda: said.append(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert said == [2, 1]


def test_the_end_waits_for_an_undo_that_is_at_work() -> None:
    began, finished = threading.Event(), list[int]()

    def slowly() -> None:
        began.set()
        threading.Event().wait(0.2)
        finished.append(1)

    with Undos() as undos:
        undos.later(0.001, "slow", slowly)
        assert began.wait(10)
    assert finished == [1]


def test_what_could_not_be_undone_is_told_and_the_rest_is_undone() -> None:
    said = list[int]()

    def fails() -> None:
        raise ConfigError("no such device")

    def gone() -> None:
        raise ProcessLookupError

    with Undos() as undos:
        undos.later(600, "one", lambda: said.append(1))
        undos.later(600, "a link", fails)
        undos.later(600, "a process", gone)
    assert said == [1]
    assert [text.split(":")[0] for text in undos.failed] == ["a link"]
