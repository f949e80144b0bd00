from __future__ import annotations

import pytest

from diffussm.observe.words import count, duration, short


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3723, "1:02:03"), (float("inf"), "?")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(12, "12 "), (12345, "12.3 k"), (2.5e9, "2.5 G"), (4.94e14, "494 T")])
def test_prefixes(number: float, text: str) -> None:
    assert short(number) == text


def test_what_nobody_told_is_not_zero() -> None:
    assert [count(0), count(1024)] == ["?", "1,024"]
