"""Preflight: every node is looked at before the first step, compared with the others, and left out if it is bad.

`facts.look` runs as a Ray task on each node; what to make of it is decided here, purely.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import ray

from cluster import facts, nodes
from cluster.facts import Facts
from diffussm.config.schema import Config
from diffussm.errors import MissingError

TIMEOUT_S = 120.0
"""Seconds in which a node must answer."""
LOOK_S = 0.5
"""Longest wait for a node before looking whether the job was asked to leave."""
DISK_BYTES = 1 << 30
"""Least room for this attempt's scratch."""
SHARED_MEMORY_BYTES = 64 << 20
"""Least room in /dev/shm for the data loader."""
SKEW_S = 5.0
"""Clocks further apart make logs and signed requests to a bucket wrong."""
SLOW = 3.0
"""A node this many times slower than the median is bad: every step would wait for it."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with one node."""

    node: str
    """Ray's node id."""
    said: str
    bad: bool = True
    """The node must not be used; otherwise it is only told."""


def problems(found: Mapping[str, Facts | str]) -> Iterator[Problem]:
    """What is wrong, from the facts of each node by id; a text stands for a node that could not be looked at. Pure."""
    looked = {node: each for node, each in found.items() if isinstance(each, Facts)}
    for node, each in found.items():
        if isinstance(each, str):
            yield Problem(node, f"cannot be looked at: {each}")
    for node, each in looked.items():
        yield from (Problem(node, said) for said in _alone(each))
        if abs(each.skew_s) > SKEW_S:
            yield Problem(node, f"its clock is {each.skew_s:+.1f} s off the driver's", bad=False)
    yield from _odd_software(looked)
    yield from _slow({n: each.matmul_s for n, each in looked.items()}, "a matrix product")
    yield from _slow({n: each.reduce_s for n, each in looked.items()}, "an all-reduce with its neighbours")


def _alone(each: Facts) -> Iterator[str]:
    """What is wrong with a node whatever the others are."""
    if each.disk_bytes < DISK_BYTES:
        yield f"{each.disk_bytes >> 20} MiB are free in {each.scratch}; wanted are {DISK_BYTES >> 20}"
    if each.shared_memory_bytes < SHARED_MEMORY_BYTES:
        yield f"{each.shared_memory_bytes >> 20} MiB are free in /dev/shm; wanted are {SHARED_MEMORY_BYTES >> 20}"
    if each.gpus < each.gpus_wanted:
        yield f"{each.gpus} GPUs answer, {each.gpus_wanted} are promised"
    yield from each.ill


def _odd_software(looked: Mapping[str, Facts]) -> Iterator[Problem]:
    """Nodes whose software differs from what most have; of two equal halves the one of the first node stays."""
    counts = Counter(each.software for each in looked.values())
    if len(counts) < 2:
        return
    usual = counts.most_common(1)[0][0]
    for node, each in looked.items():
        if each.software != usual:
            other = sorted(f"{name} {version}" for name, version in set(each.software) - set(usual))
            yield Problem(
                node, f"its software differs from the other nodes': {', '.join(other) or 'something is absent'}"
            )


def _slow(seconds: Mapping[str, float | None], what: str) -> Iterator[Problem]:
    known = {node: value for node, value in seconds.items() if value is not None}
    if len(known) < 3:  # of two nodes nobody can say which is the odd one
        return
    middle = median(known.values())
    for node, value in known.items():
        if value > SLOW * middle:
            yield Problem(node, f"{what} takes {value:.3f} s, {value / middle:.1f} times the median")


def pairs(ids: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Two rounds in which each node meets its neighbours in a ring, so that a slow one is known by both. Pure."""
    even = [(ids[i], ids[i + 1]) for i in range(0, len(ids) - 1, 2)]
    odd = [(ids[i], ids[(i + 1) % len(ids)]) for i in range(1, len(ids), 2)] if len(ids) > 2 else []
    return [each for each in (even, odd) if each]


def run(
    cfg: Config, hub: Any, announce: Callable[[dict[str, Any]], None], least: int, check: Callable[[], None]
) -> None:  # fmt: skip
    """Look at all usable nodes that could hold a worker, tell what is wrong, and exclude bad ones.

    Args:
        cfg: the run's config.
        hub: where excluded nodes are noted.
        announce: told each problem.
        least: workers that must remain.
        check: called while nodes are waited for; what it raises ends the preflight.

    Raises:
        MissingError: without the bad nodes fewer than `least` workers could be placed.
    """
    cpus, gpus = cfg.cluster.cpus_per_worker, cfg.cluster.gpus_per_worker
    usable = [node for node in nodes.usable(nodes.nodes(), set()) if nodes.capacity([node], cpus, gpus)]
    wrong = list(problems(look(cfg, usable, check)))
    address = {node.id: node.address for node in usable}
    for each in wrong:
        what = "bad node" if each.bad else "node"
        announce({"kind": "event", "event": what, "node": address[each.node], "reason": each.said})
    bad = {each.node for each in wrong if each.bad}
    left = nodes.capacity([node for node in usable if node.id not in bad], cpus, gpus)
    if bad and left < least:
        said = "; ".join(f"{address[each.node]}: {each.said}" for each in wrong if each.bad)
        raise MissingError(
            f"preflight: {said}; without these nodes {left} of at least {least} workers can be placed",
            "mend or replace the nodes, or set a smaller cluster.min_workers",
        )
    if bad:
        ray.get(hub.exclude.remote(bad))


def look(cfg: Config, usable: Sequence[nodes.Node], check: Callable[[], None]) -> dict[str, Facts | str]:
    """The facts of each node by id, or why there are none. All nodes are looked at at once."""
    ask = ray.remote(num_cpus=0, max_retries=0)(facts.look)
    began = time.time()
    asked = {}
    for node in usable:
        task = ask.options(scheduling_strategy=nodes.on_node(node.id))
        asked[task.remote(cfg, round(node.resources.get("GPU", 0)))] = node.id
    found: dict[str, Facts | str] = {}
    late = _wait(list(asked), check)
    for each, id_ in asked.items():
        found[id_] = f"no answer within {TIMEOUT_S:.0f} s" if each in late else _result(each)
    found = {n: f.held_against(began, time.time()) if isinstance(f, Facts) else f for n, f in found.items()}
    return _with_reduces(found, check) if len(usable) > 1 else found


def _with_reduces(found: dict[str, Facts | str], check: Callable[[], None]) -> dict[str, Facts | str]:
    """Add the time of an all-reduce with each neighbour; the better one counts, for the other may be its peer's."""
    times: dict[str, list[float]] = {}
    for meetings in pairs(sorted(node for node, each in found.items() if isinstance(each, Facts))):
        asked = {}
        for one, other in meetings:
            host = found[one]
            assert isinstance(host, Facts)  # noqa: S101 - only such nodes were paired
            for rank, node in enumerate((one, other)):
                task = ray.remote(num_cpus=0, max_retries=0)(facts.reduce_seconds)
                where = task.options(scheduling_strategy=nodes.on_node(node))
                asked[where.remote(rank, host.address, host.port)] = node
        late = _wait(list(asked), check)
        for each, node in asked.items():
            result = "no answer" if each in late else _result(each)
            times.setdefault(node, []).append(result if isinstance(result, float) else TIMEOUT_S)
    return {
        node: each.with_reduce(min(times[node])) if isinstance(each, Facts) and node in times else each
        for node, each in found.items()
    }


def _wait(tasks: list[Any], check: Callable[[], None]) -> list[Any]:
    """Wait for tasks; those that have not ended in time."""
    deadline = time.monotonic() + TIMEOUT_S
    while tasks and (left := deadline - time.monotonic()) > 0:
        check()
        _, tasks = ray.wait(tasks, num_returns=len(tasks), timeout=min(left, LOOK_S))
    return tasks


def _result(task: Any) -> Any:
    """A task's result, or its error as text: it says what is wrong with the node."""
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
        return next((line for line in reversed(list(lines)) if line), type(error).__name__)
