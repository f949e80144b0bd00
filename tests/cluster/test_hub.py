"""The hub's state, without Ray around it."""

from __future__ import annotations

from cluster.hub import Hub, Place
from diffussm.train.control import Level, Wish
from diffussm.train.phases import Beat, Phase


def place(pid: int, node: str = "n1") -> Place:
    return Place(node, "host", pid, "stacks.txt")


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
    hub.wish(Wish(Level.REGROUP, reason="more nodes"))
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
    hub.wish(Wish(Level.LEAVE, 5.0, "node 10.0.0.1 is drained"))
    hub.wish(Wish(Level.REGROUP, reason="more nodes"))
    assert hub.asked().level is Level.LEAVE
    hub.begin(1)
    assert hub.asked().level is Level.NONE
    hub.wish(Wish(Level.LEAVE, 5.0, "SIGTERM to the driver"))
    hub.begin(1)
    assert hub.asked().level is Level.LEAVE, "the job must go, whatever group it has"


def test_a_hang_is_evidence_of_its_group_only() -> None:
    hub = Hub()
    hub.begin(2)
    hub.hangs(1, "rank 1 stands")
    assert (hub.evidence()[0].hang, hub.evidence()[0].hung_rank) == ("rank 1 stands", 1)
    hub.begin(2)
    assert hub.evidence()[0].hang == ""
