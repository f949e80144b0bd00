"""What the preflight makes of the nodes' facts; the last test looks at real nodes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import checkup
from cluster.checkup import Preflight, pairs, problems
from cluster.facts import Facts
from cluster.hub import Hub
from cluster.nodes import Node
from diffussm.checkpoint.store import LocalStore
from diffussm.config import dump
from diffussm.config.schema import Config
from diffussm.errors import InfrastructureError, MissingError, Preempted
from tests.near import Near, without_ray
from tests.runs import BATCH, tiny_run

GOOD = Facts("10.0.0.1", 4711, (("torch", "2"), ("ray", "3")), "/scratch", 1 << 34, 1 << 30, 1000.0, 8, 8, 0.01)
MANY = {f"n{i}": replace(GOOD, reduce_s=0.02) for i in range(5)}


def said(found: dict[str, Facts | str]) -> list[tuple[str, bool, str]]:
    return [(each.node, each.bad, each.said) for each in problems(found, GOOD.software)]


def test_good_nodes_have_no_problems() -> None:
    assert said({**MANY}) == []
    assert said({"n0": GOOD}) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"disk_bytes": 1 << 20}, "1 MiB are free in /scratch"),
        ({"shared_memory_bytes": 1 << 20}, "1 MiB are free in /dev/shm"),
        ({"gpus": 7}, "7 GPUs answer, 8 are promised"),
        ({"ill": ("GPU 3: 2 uncorrected memory errors",)}, "GPU 3"),
        ({"ill": ("storage: s3://b/r: cannot be read",)}, "storage"),
        ({"software": (("torch", "2"), ("ray", "4"))}, "differs from the driver's: ray 4"),
        ({"matmul_s": 0.04}, "a matrix product takes 0.040 s, 4.0 times"),
        ({"reduce_s": 0.08}, "an all-reduce with its neighbours takes 0.080 s"),
    ],
)
def test_a_bad_node_is_named(change: dict[str, object], words: str) -> None:
    (found,) = said({**MANY, "n2": replace(MANY["n2"], **change)})  # type: ignore[arg-type]
    assert found[:2] == ("n2", True)
    assert words in found[2]


def test_a_node_that_does_not_answer_is_bad_and_a_clock_is_only_told() -> None:
    assert said({**MANY, "n4": "cannot be looked at: no answer within 120 s"}) == [
        ("n4", True, "cannot be looked at: no answer within 120 s")
    ]
    off = GOOD.held_against(asked_s=1010.0, answered_s=1012.0)
    assert off.skew_s == -10
    assert GOOD.held_against(980.0, 990.0).skew_s == 10
    assert GOOD.held_against(999.0, 1001.0).skew_s == 0
    (found,) = said({**MANY, "n4": replace(MANY["n4"], skew_s=off.skew_s)})
    assert found == ("n4", False, "its clock is -10.0 s off the driver's")


def test_of_two_nodes_nobody_can_say_which_is_slow() -> None:
    assert said({"a": GOOD, "b": replace(GOOD, matmul_s=1.0)}) == []


def test_what_cannot_be_looked_at_is_told() -> None:
    (found,) = said({"n0": replace(GOOD, unknown=("memory errors are not looked at",))})
    assert found == ("n0", False, "memory errors are not looked at")


def test_nodes_that_agree_with_each_other_but_not_with_the_driver_are_bad() -> None:
    other = replace(GOOD, software=(("torch", "1"), ("ray", "3")))
    assert [each[:2] for each in said({"a": other, "b": other})] == [("a", True), ("b", True)]


@pytest.mark.parametrize("count", range(1, 10))
def test_every_node_meets_both_neighbours_and_never_two_at_once(count: int) -> None:
    ids = [f"n{i}" for i in range(count)]
    rounds = pairs(ids)
    for meetings in rounds:
        met = [node for pair in meetings for node in pair]
        assert len(met) == len(set(met))
    met = Counter(node for meetings in rounds for pair in meetings for node in pair)
    assert met == dict.fromkeys(ids, min(count - 1, 2)) if count > 1 else not met


@pytest.mark.parametrize("count", range(3, 10))
def test_of_a_ring_only_the_slow_node_is_accused(count: int) -> None:
    ids = [f"n{i}" for i in range(count)]
    meetings = [pair for each in pairs(ids) for pair in each]
    for slow in ids:
        best = {n: min(0.2 if slow in pair else 0.02 for pair in meetings if n in pair) for n in ids}
        assert [node for node, *_ in said({n: replace(GOOD, reduce_s=best[n]) for n in ids})] == [slow]


def test_a_node_that_no_neighbour_can_talk_with_is_bad_also_of_two() -> None:
    assert checkup._reduced(GOOD, ["Connection refused", 0.02]) == GOOD.with_reduce(0.02)
    alone = checkup._reduced(GOOD, ["Connection refused", "no answer within 120 s"])
    assert said({"a": GOOD, "b": alone}) == [("b", True, "no all-reduce with its neighbours: Connection refused")]


class Scene:
    """A preflight of nodes whose facts are given, with a hub beside it and no Ray."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Facts | str]) -> None:
        without_ray(monkeypatch)
        monkeypatch.setattr(checkup, "look", lambda cfg, usable, check: {n.id: facts[n.id] for n in usable})
        monkeypatch.setattr(checkup, "_with_reduces", lambda found, check: found)
        monkeypatch.setattr(checkup.facts, "software", lambda: GOOD.software)
        self.hub = Hub()
        self.preflight = Preflight(Config(name="x"), Near(self.hub))
        self.said: list[dict[str, Any]] = []
        self.nodes = {name: Node(name, True, f"10.0.0.{name}", {"CPU": 1.0}) for name in facts}
        self._monkeypatch = monkeypatch

    def run(self, names: str, least: int) -> None:
        self._monkeypatch.setattr(checkup.nodes, "nodes", lambda: [self.nodes[name] for name in names])
        self.preflight.run(self.said.append, least, lambda: None)

    def look_at_new(self) -> None:
        self.preflight.look_at_new(self.nodes.values())
        if self.preflight._thread is not None:
            self.preflight._thread.join()


BAD = replace(GOOD, ill=("GPU 3: 2 uncorrected memory errors",))


def test_bad_nodes_hold_no_ranks_and_those_that_come_later_are_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = replace(GOOD, matmul_s=1.0)
    scene = Scene(monkeypatch, {"a": GOOD, "b": BAD, "c": GOOD, "d": GOOD, "e": slow, "f": BAD})
    everyone = set(scene.nodes)
    scene.look_at_new()
    assert scene.hub.barred(everyone) == set(), "there was no preflight"
    scene.run("abc", 2)
    assert scene.hub.barred(everyone) == everyone - {"a", "c"}
    assert [(record["event"], record["node"]) for record in scene.said] == [("bad node", "10.0.0.b")]
    scene.look_at_new()
    assert scene.hub.barred(everyone) == {"b", "e", "f"}
    told = scene.hub.take()
    assert [record["node"] for record in told] == ["10.0.0.f", "10.0.0.e"], "and what is known is not told again"
    scene.look_at_new()
    assert scene.hub.take() == []


def test_too_few_good_nodes_stop_the_job_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, {"a": GOOD, "b": BAD})
    with pytest.raises(MissingError, match=r"10\.0\.0\.b: GPU 3.*1 of at least 2"):
        scene.run("ab", 2)


def test_two_nodes_that_cannot_talk_are_no_final_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = checkup._reduced(GOOD, ["Connection refused"])
    scene = Scene(monkeypatch, {"a": apart, "b": apart})
    with pytest.raises(InfrastructureError, match="no all-reduce with its neighbours: Connection refused"):
        scene.run("ab", 2)
    scene = Scene(monkeypatch, {"a": apart, "b": BAD})
    with pytest.raises(MissingError, match="GPU 3"):
        scene.run("ab", 2)


def test_a_meeting_that_fails_is_held_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[list[tuple[str, str]]] = []

    def meet(found: Any, meetings: list[tuple[str, str]], check: Any) -> dict[str, float | str]:
        held.append(meetings)
        first = ("a", "b") in meetings and len(held) == 1
        return {node: "refused" if first and node in "ab" else 0.02 for pair in meetings for node in pair}

    monkeypatch.setattr(checkup, "_meet", meet)
    found = checkup._with_reduces(dict.fromkeys("abcd", GOOD), lambda: None)
    assert found == {name: GOOD.with_reduce(0.02) for name in "abcd"}
    assert held == [[("a", "b"), ("c", "d")], [("a", "b")], [("b", "c"), ("d", "a")]]


def test_a_warning_ends_the_preflight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any rank is there to hear it."""

    def check() -> None:
        raise Preempted("SIGTERM to the driver")

    monkeypatch.setattr(ray, "wait", lambda tasks, num_returns, timeout: ([], tasks))
    with pytest.raises(Preempted):
        checkup._wait(["task"], check)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_ranks_of_a_real_cluster_are_placed_beside_a_bad_node(tmp_path: Path) -> None:
    """It has room for both ranks, so that Ray would put them there."""
    from cluster.trainer import fit
    from tests.chaos.nodes import ROOT, Nodes

    cfg = tiny_run(tmp_path, workers=2, images=4 * BATCH)
    LocalStore(f"{cfg.storage}/{cfg.name}").write("config.yaml", dump(cfg).encode())
    said: list[dict[str, Any]] = []
    other = tmp_path / "other" / "diffussm-99.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: diffussm\nVersion: 99.0\n")
    with Nodes(workers=2) as cluster:
        cluster.add(cpus=2, PYTHONPATH=f"{other.parent}:{ROOT}")
        cluster.wait(3)
        large = {node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU") == 2}
        cfg.cluster.address = cluster.address  # where nodes are looked at
        fit(cfg, str(tmp_path / "ray"), said.append)
    (bad,) = [record for record in said if record.get("event") == "bad node"]
    assert bad["reason"] == "its software differs from the driver's: diffussm 99.0"
    places = json.loads(Path(cfg.storage, cfg.name, "attempts", "1", "ranks.json").read_text())
    nodes = {place["node"] for place in places.values()}
    assert len(nodes) == 2
    assert not nodes & large
