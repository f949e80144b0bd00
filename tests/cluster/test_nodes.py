"""Which nodes may hold how many workers."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from cluster.nodes import Node, capacity, reached, total, usable
from tests.distributed import free_port

FOUND = [
    Node("a", True, "10.0.0.1", {"CPU": 8.0, "GPU": 2.0}),
    Node("b", True, "10.0.0.2", {"CPU": 8.0, "GPU": 2.0}, drain_deadline_s=5.0),
    Node("c", False, "10.0.0.3", {"CPU": 8.0}),
    Node("d", True, "10.0.0.4", {"CPU": 3.0}),
]


def test_dead_drained_and_excluded_nodes_hold_nothing() -> None:
    assert [node.id for node in usable(FOUND, set())] == ["a", "d"]
    assert [node.id for node in usable(FOUND, {"a"})] == ["d"]


def test_a_node_whose_raylet_takes_no_connection_is_dead_before_ray_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as raylet:
        port = raylet.getsockname()[1]
        there, gone = (Node(name, True, "127.0.0.1", port=at) for name, at in (("a", port), ("b", free_port())))
        assert [node.alive for node in reached([there, gone, replace(there, alive=False)])] == [True, False, False]


@pytest.mark.parametrize(("cpus", "gpus", "workers"), [(1, 0, 11), (2, 0, 5), (4, 0, 2), (1, 1, 2), (0.1, 0, 110)])
def test_workers_are_counted_node_by_node(cpus: float, gpus: float, workers: int) -> None:
    assert capacity(usable(FOUND, set()), cpus, gpus) == workers


def test_resources_are_added_up() -> None:
    assert total(usable(FOUND, set())) == {"CPU": 11.0, "GPU": 2.0}
    assert total([]) == {}
