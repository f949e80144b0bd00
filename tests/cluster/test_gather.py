"""Waiting for the nodes of a Ray cluster. tests/e2e/test_slurm.py runs it on a real one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster import gather as module
from cluster.gather import gather


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.0)


def looks(*seen: list[str]) -> Iterator[list[str]]:
    yield from seen
    while True:
        yield seen[-1]


def test_it_waits_until_all_are_there() -> None:
    seen = looks([], ["b"], ["b", "a"], ["b", "a", "c"])
    assert gather(lambda: next(seen), 3, 60, lambda: 0.0) == ["a", "b", "c"]


def test_it_gives_up_in_time_and_names_those_that_came() -> None:
    seen, clock = looks(["b"]), iter(range(100))
    assert gather(lambda: next(seen), 2, 5, lambda: float(next(clock))) == ["b"]
    assert next(clock) == 6  # one look at the start, five until the end


@pytest.mark.parametrize("missing", ["--address", "--nodes", "--timeout"])
def test_every_option_is_needed(missing: str) -> None:
    given = {"--address": "h:1", "--nodes": "2", "--timeout": "3"}
    words = [word for name, value in given.items() if name != missing for word in (name, value)]
    with pytest.raises(SystemExit):
        module.main(words)
