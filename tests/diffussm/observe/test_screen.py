"""A screen that is paused, and a bar that is moved while it is. What is closed or full is in the narrator's tests."""

from __future__ import annotations

import io
import threading
import time

import pytest

from diffussm.observe import screen
from diffussm.observe.log import Narrator
from diffussm.observe.screen import Screen


def test_a_screen_that_was_paused_shows_what_waited_and_is_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "PATIENCE_S", 0.05)
    gate = threading.Event()

    class Paused(io.StringIO):
        def write(self, text: str) -> int:
            assert gate.wait(60)
            return super().write(text)

    stream = Paused()
    narrator = Narrator(stream)
    for number in range(3):
        narrator.say(f"line {number}")
    assert stream.getvalue() == ""
    monkeypatch.setattr(screen, "PATIENCE_S", 60.0)
    gate.set()
    while narrator._screen._is_late:
        time.sleep(0.01)
    narrator.say("line 3")
    narrator.say("line 4")
    assert [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()] == [f"line {n}" for n in range(5)]


def test_of_many_moves_while_the_screen_is_paused_the_last_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "PATIENCE_S", 60.0)
    gate = threading.Event()

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            assert gate.wait(60)
            return super().write(text)

    troubles: list[str] = []
    stream = Terminal()
    shown = Screen(stream, troubles.append)
    gate.set()
    shown.bar("encode", 5000)
    gate.clear()
    for number in range(5000):  # more than may wait
        shown.move(number, 5000, f"{number} of 5000")
    gate.set()
    shown.end()
    assert "4999 of 5000" in stream.getvalue()
    assert troubles == []
    assert shown.lost == 0
