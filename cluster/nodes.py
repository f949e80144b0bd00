"""The nodes of the Ray cluster: which are there, which must go, and how many workers they could hold."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

REACH_S = 1.0
"""Seconds in which a node's raylet must take a connection."""


@dataclass(frozen=True)
class Node:
    """One node as Ray knows it."""

    id: str
    alive: bool
    address: str
    resources: Mapping[str, float] = field(default_factory=dict)
    """All of its resources, whoever uses them."""
    drain_deadline_s: float | None = None
    """Seconds since 1970 at which it goes (0: Ray knows no time); None if it stays."""
    port: int = 0
    """Of its raylet."""


def nodes() -> list[Node]:
    """All nodes that were ever part of the cluster. Asks Ray's control store.

    Which nodes are drained is internal to Ray, so Ray is pinned and tests/cluster/test_nodes.py drains one.
    """
    drained: dict[str, int] = ray_state.get_draining_nodes() or {}
    return [_node(each, drained) for each in ray.nodes()]


def _node(found: Mapping[str, Any], drained: Mapping[str, int]) -> Node:
    deadline_ms = drained.get(found["NodeID"])
    deadline_s = None if deadline_ms is None else deadline_ms / 1000
    return Node(
        found["NodeID"],
        found["Alive"],
        found["NodeManagerAddress"],
        found["Resources"] or {},
        deadline_s,
        found["NodeManagerPort"],
    )


def reached(found: Iterable[Node]) -> list[Node]:
    """The nodes as they are now: one whose raylet takes no connection is dead, seconds before Ray gives it up."""
    every = list(found)
    with ThreadPoolExecutor(min(32, max(1, len(every)))) as pool:
        answers = pool.map(lambda node: node.alive and _answers(node), every)
    return [replace(node, alive=answer) for node, answer in zip(every, answers, strict=True)]


def _answers(node: Node) -> bool:
    try:
        socket.create_connection((node.address, node.port), REACH_S).close()
    except OSError:  # refused: its raylet is dead; no answer: it is cut off
        return False
    return True


def usable(found: Iterable[Node], excluded: Collection[str]) -> list[Node]:
    """Nodes that may hold workers: alive, not drained, not excluded. Pure."""
    return [node for node in found if node.alive and node.drain_deadline_s is None and node.id not in excluded]


def capacity(found: Iterable[Node], cpus: float, gpus: float) -> int:
    """Workers that these nodes hold at once when nobody else uses them. Pure."""
    return sum(_fit(node.resources, cpus, gpus) for node in found)


def total(found: Iterable[Node]) -> dict[str, float]:
    """The resources of these nodes together. Pure."""
    summed: Counter[str] = Counter()
    for node in found:
        summed.update(node.resources)  # type: ignore[arg-type]  # a Counter adds floats as well
    return dict(summed)


def _fit(resources: Mapping[str, float], cpus: float, gpus: float) -> int:
    most = resources.get("CPU", 0.0) / cpus
    if gpus:
        most = min(most, resources.get("GPU", 0.0) / gpus)
    return int(most + 1e-6)


def on_node(node: str) -> NodeAffinitySchedulingStrategy:
    """Where a task must run to run on this node."""
    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)


def drain(found: Iterable[Node], deadline_s: float, message: str) -> list[str]:
    """Ask Ray to drain these nodes by a time since 1970, as a cloud's warning would; returns those that agreed.

    Internal to Ray, see `nodes`.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # Ray's stubs leave it out
    from ray.core.generated import autoscaler_pb2 as proto

    reason = proto.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    agreed = []
    for node in found:
        accepted, _ = client.drain_node(
            node.id,
            reason,
            message,
            round(deadline_s * 1000),
        )
        if accepted:
            agreed.append(node.id)
    return agreed
