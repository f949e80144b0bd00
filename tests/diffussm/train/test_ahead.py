from __future__ import annotations

import threading

import pytest

from diffussm.train.ahead import ahead


def test_results_come_in_order_and_no_more_are_made_than_asked_for() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    assert list(ahead(make, 5)) == [0, 1, 2, 3, 4]
    assert made == [0, 1, 2, 3, 4]
    assert list(ahead(make, 0)) == []


def test_the_next_one_is_made_while_the_present_one_is_in_use() -> None:
    second_began = threading.Event()
    calls: list[int] = []

    def make() -> int:
        calls.append(1)
        if len(calls) == 2:
            second_began.set()
        return len(calls)

    results = ahead(make, 3)
    assert next(results) == 1
    assert second_began.wait(10)  # nobody has asked for it yet
    results.close()
    assert len(calls) == 2


def test_an_error_comes_in_its_place() -> None:
    answers = iter([1, ValueError("shard corrupt"), 3])

    def make() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    results = ahead(make, 3)
    assert next(results) == 1
    with pytest.raises(ValueError, match="shard corrupt"):
        next(results)
