"""The overseer's thread with a hub beside it and no Ray: what it hears, asks and ends, and what cannot stop it."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import nodes, overseer, preempt, stacks
from cluster.hub import Hub, Place
from cluster.nodes import Node
from cluster.overseer import Overseer
from cluster.preempt import Warnings
from cluster.watchdog import Stragglers
from diffussm.config.schema import ClusterConfig, Config, TrainConfig
from diffussm.train.control import Level, Wish
from diffussm.train.phases import Beat, Phase
from tests.near import Near, without_ray

Record = dict[str, Any]
SIGNAL = Wish(Level.LEAVE, 2e9 + 60, "SIGTERM to the driver")
STUCK = Beat(Phase.BACKWARD, 1000.0, 5, 40, 1.0)


def node(name: str, drain: float | None = None) -> Node:
    return Node(name, True, f"10.0.0.{name}", {"CPU": 1.0}, drain)


class Scene:
    """A group of two ranks on the nodes a and b, and the overseer of it with a quick eye."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, notice_file: str = "") -> None:
        self.hub = Hub()
        self.near = Near(self.hub)
        self.found = [node("home"), node("a"), node("b")]
        self.said: list[Record] = []
        self.faults: list[Record] = []
        self.killed: list[set[int]] = []
        self.collect: Callable[[Any], dict[int, Record]] = lambda places: {}
        self.hear: Callable[[Record], None] = self.said.append
        self.warnings = Warnings(30)
        self._looks = 0
        self._looked = threading.Condition()
        without_ray(monkeypatch)
        monkeypatch.setattr(overseer, "LOOK_S", 0.002)
        monkeypatch.setattr(overseer, "NODES_S", 0.0)
        monkeypatch.setattr(nodes, "nodes", self._look)
        monkeypatch.setattr(nodes, "reached", lambda found: found)
        monkeypatch.setattr(stacks, "collect", lambda places: self.collect(places))
        monkeypatch.setattr(stacks, "kill", lambda places: self.killed.append({p.pid for p in places.values()}))
        cluster = ClusterConfig(workers=2, min_workers=1, notice_file=notice_file)
        cfg = Config(name="x", train=TrainConfig(images=64, global_batch=8), cluster=cluster)
        self.overseer = Overseer(
            cfg, self.near, self.warnings, lambda record: self.hear(record), self.faults.append, lambda *_: None
        )
        self.begin(2)

    def begin(self, size: int) -> None:
        self.hub.begin(size)
        for rank in range(size):
            self.hub.join(rank, Place("ab"[rank], "host", 100 * self.hub.group().serial + rank, "stacks.txt", 0))

    def beat(self, rank: int, beat: Beat) -> None:
        self.hub.beat(rank, self.hub.group().places[rank].pid, beat)

    def looks(self, more: int = 3) -> None:
        """Until the overseer has looked so many times from now on, so that the last but one look is complete."""
        with self._looked:
            wanted = self._looks + more
            assert self._looked.wait_for(lambda: self._looks >= wanted, timeout=20)

    def asked(self) -> list[str]:
        return [record["reason"] for record in self.said if record["event"].startswith("asked to ")]

    def _look(self) -> list[Node]:
        with self._looked:
            self._looks += 1
            self._looked.notify_all()
        return self.found


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    made = Scene(monkeypatch)
    made.overseer.start()
    yield made
    made.overseer.stop()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_signal_and_a_drained_node_are_one_wish_and_each_is_told_once(scene: Scene) -> None:
    scene.warnings.wish = SIGNAL
    scene.found = [node("home"), node("a"), node("b", drain=2e9)]
    scene.looks(6)
    assert scene.hub.asked() == Wish(Level.LEAVE, 2e9, "SIGTERM to the driver")
    assert sorted(scene.asked()) == ["SIGTERM to the driver", "node 10.0.0.b is drained"]


def test_a_run_is_asked_to_grow_again_after_it_had_to_shrink_again(scene: Scene) -> None:
    for times in (1, 2):
        scene.begin(1)
        scene.beat(0, Beat(Phase.DATA, 0.0, 5, 40, 1.0))
        scene.looks()
        assert scene.hub.asked().level is Level.REGROUP
        assert scene.asked() == times * ["2 workers could be had, 1 work"]
        assert "asked to leave" not in {record["event"] for record in scene.said}  # that would be an alert


def test_a_slow_rank_is_told_with_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overseer, "Stragglers", lambda: Stragglers(steps=2, seconds=0.0))
    scene = Scene(monkeypatch)
    scene.overseer.start()
    try:
        for steps, own_s in ((1, (1.0, 1.0)), (4, (4.0, 13.0)), (7, (7.0, 25.0))):
            for rank in (0, 1):
                scene.beat(rank, Beat(Phase.DATA, 0.0, steps, 8 * steps, own_s[rank]))
            scene.looks()
    finally:
        scene.overseer.stop()
    told = [record for record in scene.said if record["event"] == "straggler"]
    assert [record["times the median"] for record in told] == ["rank 1 on host: 4.0"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space"), SystemExit(1)])
def test_who_cannot_be_told_does_not_make_the_training_deaf(
    scene: Scene, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def hear(record: Record) -> None:
        raise error

    scene.hear = hear
    failure = {"event": "failure", "kind": "event", "cause": "hang", "decision": "restart", "reason": "r"}
    for record in (failure, failure):
        scene.hub.tell(record)
    scene.looks()
    scene.warnings.wish = SIGNAL
    scene.looks()
    assert scene.hub.asked().reason == SIGNAL.reason
    assert len(scene.faults) == 2, "nor does it lose what else was said"
    assert [record.getMessage()[:23] for record in caplog.records] == ["cannot tell what happen"], "once"


def test_a_notice_file_that_cannot_be_read_keeps_nobody_from_seeing_a_hang(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any) -> Wish:
        raise PermissionError(errno.EACCES, "notice")

    monkeypatch.setattr(preempt, "of_notice", refused)
    scene.beat(1, STUCK)
    until(lambda: bool(scene.killed))
    assert scene.killed == [{100, 101}]
    assert scene.hub.evidence()[0].hang.startswith("rank 1 stands in backward")


def test_evidence_that_cannot_be_had_does_not_save_a_hung_group(scene: Scene) -> None:
    def collect(places: Any) -> dict[int, Record]:
        raise OSError(errno.EIO, "evidence")

    scene.collect = collect
    scene.beat(1, STUCK)
    until(lambda: bool(scene.killed))
    assert scene.killed == [{100, 101}]


def test_a_group_that_went_on_while_evidence_was_collected_is_left_alone(scene: Scene) -> None:
    def collect(places: Any) -> dict[int, Record]:
        scene.beat(1, Beat(Phase.DATA, 0.0, 6, 48, 1.0))
        return {1: {"state": "asleep"}}

    scene.collect = collect
    scene.beat(1, STUCK)
    until(lambda: "hang over" in {record["event"] for record in scene.said})
    scene.looks()
    assert scene.hub.group().hang == ""
    assert scene.killed == []
    scene.collect = lambda places: {}
    scene.beat(1, STUCK)
    until(lambda: bool(scene.killed))  # the next one is seen again


def test_a_hang_is_not_blamed_on_the_group_that_came_while_evidence_was_collected(scene: Scene) -> None:
    def collect(places: Any) -> dict[int, Record]:
        scene.begin(2)
        return {1: {"state": "stopped"}}

    scene.collect = collect
    scene.beat(1, STUCK)
    until(lambda: scene.hub.group().serial == 2)
    scene.looks()
    assert scene.hub.group().hang == ""
    assert scene.killed == [], "the numbers of its processes may be others' by now"
    assert scene.overseer.take_evidence() == {1: {"state": "stopped"}}


def test_when_the_hub_dies_the_ranks_end_because_nobody_could_warn_them(scene: Scene) -> None:
    scene.looks()
    scene.near.dead = True
    until(lambda: bool(scene.killed))
    assert scene.killed == [{100, 101}]
    scene.overseer.stop()


def test_a_notice_file_asks_the_job_to_leave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scene = Scene(monkeypatch, str(tmp_path / "notice"))
    scene.overseer.start()
    scene.looks()
    assert scene.asked() == []
    (tmp_path / "notice").touch()
    scene.looks()
    scene.overseer.stop()
    assert scene.asked() == [f"notice file {tmp_path / 'notice'}"]
