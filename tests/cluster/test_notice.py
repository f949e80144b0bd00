"""A real Ray cluster: a notice file on a rank's node drains that node."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cluster import nodes
from tests.chaos.nodes import Nodes


def watch(path: str, seconds: float) -> None:
    """What a rank's pulse does, for so long."""
    from cluster.notice import Notice

    notice, end = Notice(path, grace_s=120), time.monotonic() + seconds
    while time.monotonic() < end:
        notice.look()
        time.sleep(0.1)


@pytest.mark.timeout(300)
def test_a_notice_file_drains_the_node_it_lies_on(tmp_path: Path) -> None:
    import ray

    notice = tmp_path / "notice"
    with Nodes(workers=1):
        (node,) = [each for each in nodes.nodes() if each.resources.get("CPU")]
        watching = (
            ray.remote(num_cpus=1)(watch).options(scheduling_strategy=nodes.on_node(node.id)).remote(str(notice), 120)
        )
        time.sleep(1)
        assert all(each.drain_deadline_s is None for each in nodes.nodes())
        before = time.time()
        notice.touch()
        deadline = time.monotonic() + 60
        while (drained := {each.id: each.drain_deadline_s for each in nodes.nodes()})[node.id] is None:
            assert time.monotonic() < deadline, "the node is not drained"
            time.sleep(0.1)
        assert [each for each, at in drained.items() if at is not None] == [node.id], "the head stays"
        assert before + 119 < (drained[node.id] or 0) < time.time() + 121
        ray.cancel(watching, force=True)


def test_a_node_that_ray_does_not_drain_is_drained_at_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster import notice
    from tests.near import without_ray

    here = nodes.Node("home", True, "10.0.0.1", {"CPU": 1.0}, None)
    asked: list[float] = []

    def drain(found: list[nodes.Node], deadline_s: float, said: str) -> bool:
        assert found == [here]
        asked.append(deadline_s)
        return len(asked) == 3

    without_ray(monkeypatch)
    monkeypatch.setattr(notice, "AGAIN_S", 0.0)
    monkeypatch.setattr(nodes, "nodes", lambda: [here])
    monkeypatch.setattr(nodes, "drain", drain)
    (tmp_path / "notice").touch()
    looking = notice.Notice(str(tmp_path / "notice"), grace_s=120)
    end = time.monotonic() + 10
    while len(asked) < 3:
        assert time.monotonic() < end
        looking.look()
        time.sleep(0.001)
    for _ in range(20):
        looking.look()
        time.sleep(0.001)
    assert len(asked) == 3
    assert len(set(asked)) == 1, "the grace began when the file was first seen"


def test_without_a_file_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.notice import Notice

    monkeypatch.setattr("cluster.notice.nodes", None)
    Notice("", 30).look()
    Notice(str(tmp_path / "none"), 30).look()
