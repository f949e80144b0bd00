"""Warnings become one wish."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.nodes import Node
from cluster.preempt import SIGNALS, UNKNOWN_DEADLINE_S, Warnings, of_drained, of_notice
from diffussm.errors import Preempted
from diffussm.train.control import Level, Wish


def node(name: str, drain: float | None = None, alive: bool = True) -> Node:
    return Node(name, alive, f"10.0.0.{name}", {"CPU": 1.0}, drain)


def drained(found: list[Node], used: set[str], least: int = 1, home: str = "0") -> Wish:
    return of_drained(found, used, home, lambda staying: len(staying) >= least, now=1000.0)


def test_a_drained_node_without_ranks_matters_to_nobody() -> None:
    assert drained([node("1"), node("2", drain=1030)], {"1"}) == Wish()
    assert drained([node("1"), node("2", drain=1030, alive=False)], {"1", "2"}) == Wish()


def test_ranks_leave_a_drained_node_for_the_others() -> None:
    wish = drained([node("1"), node("2", drain=1030)], {"1", "2"})
    assert (wish.level, wish.deadline_s) == (Level.MOVE, 1030)


def test_the_whole_job_leaves_when_nothing_that_stays_can_hold_it() -> None:
    for found, least in (([node("1", 1030), node("2", 1020)], 1), ([node("1"), node("2", 1020)], 2)):
        wish = drained(found, {"1", "2"}, least)
        assert (wish.level, wish.deadline_s) == (Level.LEAVE, 1020)


def test_the_whole_job_leaves_with_the_drivers_node() -> None:
    """Ray's head goes with it: what stays has nobody to tell it anything."""
    for found in ([node("0", 1030), node("1"), node("2")], [node("0", 1040), node("1", 1030), node("2")]):
        wish = drained(found, {"1", "2"})
        assert (wish.level, wish.deadline_s) == (Level.LEAVE, 1030)


def test_a_drain_without_a_deadline_gets_one() -> None:
    assert drained([node("1", drain=0.0)], {"1"}).deadline_s == 1000 + UNKNOWN_DEADLINE_S


def test_a_notice_file_is_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "notice"
    assert of_notice(str(file), 30, 1000) == of_notice("", 30, 1000) == Wish()
    file.touch()
    assert of_notice(str(file), 30, 1000) == Wish(Level.LEAVE, 1030, f"notice file {file}")


@pytest.fixture
def warnings() -> Iterator[Warnings]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    warned = Warnings(grace_s=30)
    warned.install()
    yield warned
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_stage_where_nobody_listens_and_asks_the_training(
    warnings: Warnings, number: signal.Signals
) -> None:
    with pytest.raises(Preempted, match=number.name):
        os.kill(os.getpid(), number)
    warnings.heard_by_training = True
    os.kill(os.getpid(), number)
    assert warnings.wish.level is Level.LEAVE
    assert number.name in warnings.wish.reason


def test_the_first_deadline_stands(warnings: Warnings) -> None:
    warnings.heard_by_training = True
    os.kill(os.getpid(), signal.SIGUSR1)
    first = warnings.wish
    os.kill(os.getpid(), signal.SIGTERM)
    assert warnings.wish == first
