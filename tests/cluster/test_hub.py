"""The hub's state, without Ray around it."""

from __future__ import annotations

import pytest

from cluster.hub import Hub, Place
from diffussm.train.control import Level, Wish
from diffussm.train.phases import Beat, Phase


def place(pid: int, node: str = "n1") -> Place:
    return Place(node, "host", pid, "stacks.txt", 0)


def beat(images: int) -> Beat:
    return Beat(Phase.DATA, 0.1, images // 8, images, 1.0)


def test_messages_are_taken_once_in_order() -> None:
    hub = Hub()
    hub.tell({"n": 1})
    hub.tell({"n": 2})
    assert [m["n"] for m in hub.take()] == [1, 2]
    assert hub.take() == []


def test_a_beat_brings_back_the_wish_and_only_the_present_group_counts() -> None:
    hub = Hub()
    hub.begin(2)
    hub.join(0, place(10))
    hub.wish(Wish(Level.REGROUP, reason="more nodes"), hub.group().serial)
    assert hub.beat(0, 10, beat(16)).level is Level.REGROUP
    hub.beat(0, 99, beat(800))  # a process of an earlier group that has not ended yet
    hub.number(3)
    evidence, images, steps = hub.evidence()
    assert (images, steps, evidence.node_of_rank, hub.group().attempt) == (16, 2, {0: "n1"}, 3)
    assert hub.seen()[0].beat.images == 16
    hub.begin(1)
    assert hub.seen() == {}
    assert hub.group().attempt == 0


def test_the_more_urgent_wish_stays_and_a_new_group_ends_what_was_meant_for_the_old() -> None:
    hub = Hub()
    hub.begin(2)
    first = hub.group().serial
    hub.wish(Wish(Level.MOVE, 5.0, "node 10.0.0.1 is drained"), first)
    hub.wish(Wish(Level.REGROUP, reason="more nodes"), first)
    assert hub.asked().level is Level.MOVE
    hub.begin(1)
    assert hub.asked().level is Level.NONE
    assert not hub.wish(Wish(Level.MOVE, 5.0, "node 10.0.0.1 is drained"), first), "that group has ended"
    assert hub.asked().level is Level.NONE
    hub.wish(Wish(Level.LEAVE, 5.0, "SIGTERM to the driver"), first)
    hub.begin(1)
    assert hub.asked().level is Level.LEAVE, "the job must go, whatever group it has"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_wishes_are_one_with_the_jobs_reason_and_the_earlier_deadline(order: tuple[int, int]) -> None:
    hub = Hub()
    both = (Wish(Level.LEAVE, 90.0, "SIGTERM to the driver"), Wish(Level.MOVE, 60.0, "node 10.0.0.1 is drained"))
    for index in order:
        assert hub.wish(both[index], 0), "news"
    assert hub.asked() == Wish(Level.LEAVE, 60.0, "SIGTERM to the driver")
    for index in (*order, *order):
        assert not hub.wish(both[index], 0), "known"
    assert not hub.wish(Wish(Level.LEAVE, 120.0, "notice file"), 0), "a later deadline is no news"
    assert hub.asked() == Wish(Level.LEAVE, 60.0, "SIGTERM to the driver")


def test_a_hang_is_evidence_of_its_group_only() -> None:
    hub = Hub()
    hub.begin(2)
    hung = hub.group().serial
    assert hub.hangs(hung, 1, "rank 1 stands")
    assert (hub.evidence()[0].hang, hub.evidence()[0].hung_rank) == ("rank 1 stands", 1)
    hub.begin(2)
    assert not hub.hangs(hung, 1, "rank 1 stands; its process is stopped")
    assert hub.evidence()[0].hang == ""
