"""Preflight: every node is looked at before the first step, compared with the others, and left out if it is bad.

`facts.look` runs as a Ray task on each node; what to make of it is decided here, purely.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import ray

from cluster import facts, nodes
from cluster.facts import Facts, Software
from cluster.readiness import DISK_BYTES
from diffussm.config.schema import Config
from diffussm.errors import InfrastructureError, MissingError

TIMEOUT_S = 120.0
"""Seconds in which a node must answer."""
LOOK_S = 0.5
"""Longest wait for a node before looking whether the job was asked to leave."""
SHARED_MEMORY_BYTES = 64 << 20
"""Least room in /dev/shm for the data loader."""
SKEW_S = 5.0
"""Clocks further apart make logs and signed requests to a bucket wrong."""
SLOW = 3.0
"""A node this many times slower than the median is bad: every step would wait for it."""

APART = "no all-reduce with its neighbours"
"""Begins what is said of a node that could talk with none of them."""

Announce = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Problem:
    """Something wrong with one node."""

    node: str
    """Ray's node id."""
    said: str
    bad: bool = True
    """The node must not be used; otherwise it is only told."""


def problems(found: Mapping[str, Facts | str], software: Software) -> Iterator[Problem]:
    """What is wrong, from the facts of each node by id; a text stands for a node that has none and says why. Pure.

    `software` is the driver's.
    """
    looked = {node: each for node, each in found.items() if isinstance(each, Facts)}
    for node, each in found.items():
        if isinstance(each, str):
            yield Problem(node, each)
    for node, each in looked.items():
        yield from (Problem(node, said) for said in _alone(each))
        if abs(each.skew_s) > SKEW_S:
            yield Problem(node, f"its clock is {each.skew_s:+.1f} s off the driver's", bad=False)
        yield from (Problem(node, said, bad=False) for said in each.unknown)
        other = sorted(f"{name} {version}" for name, version in set(each.software) - set(software))
        if each.software != software:
            yield Problem(node, f"its software differs from the driver's: {', '.join(other) or 'something is absent'}")
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


def _slow(seconds: Mapping[str, float | None], what: str) -> Iterator[Problem]:
    known = {node: value for node, value in seconds.items() if value is not None}
    if len(known) < 3:  # of two nodes nobody can say which is the odd one
        return
    middle = median(known.values())
    for node, value in known.items():
        if value > SLOW * middle:
            yield Problem(node, f"{what} takes {value:.3f} s, {value / middle:.1f} times the median")


def pairs(ids: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Rounds in which each node meets both its neighbours in a ring, so that a slow one is known by both. Pure."""
    ring = [(ids[i], ids[(i + 1) % len(ids)]) for i in range(len(ids) if len(ids) > 2 else len(ids) - 1)]
    closing = [ring.pop()] if len(ids) > 2 and len(ids) % 2 else []  # of an odd ring the last pair has no round yet
    return [each for each in (ring[0::2], ring[1::2], closing) if each]


class Preflight:
    """Looks at nodes and notes in the hub which may hold workers: all at first, later each that comes.

    From `run` on a node that was not looked at holds no worker.
    """

    def __init__(self, cfg: Config, hub: Any) -> None:
        self._cfg, self._hub = cfg, hub
        self._facts: dict[str, Facts | str] = {}
        self._is_done = False
        self._thread: threading.Thread | None = None

    def run(self, announce: Announce, least: int, check: Callable[[], None]) -> None:
        """Look at all usable nodes that could hold a worker, tell what is wrong, and leave bad ones out.

        Args:
            announce: told each problem.
            least: workers that must remain.
            check: called while nodes are waited for; what it raises ends the preflight.

        Raises:
            MissingError: without the bad nodes fewer than `least` workers could be placed.
            InfrastructureError: likewise, and nothing is wrong with them but that they could not talk with each other.
        """
        cluster = self._cfg.cluster
        able = self._able(nodes.nodes())
        found = look(self._cfg, able, check)
        if len(able) > 1:
            found = _with_reduces(found, check)
        wrong = self._judge(able, found, announce)
        bad = {each.node for each in wrong}
        left = [node for node in able if node.id not in bad]
        room = nodes.capacity(left, cluster.cpus_per_worker, cluster.gpus_per_worker)
        if bad and room < least:
            address = {node.id: node.address for node in able}
            said = "; ".join(f"{address[each.node]}: {each.said}" for each in wrong)
            # What lies between nodes may pass, and of two nobody can say whose fault it is: other nodes are tried.
            passing = all(each.said.startswith(APART) for each in wrong)
            raise (InfrastructureError if passing else MissingError)(
                f"preflight: {said}; without these nodes {room} of at least {least} workers can be placed",
                "mend or replace the nodes, or set a smaller cluster.min_workers",
            )
        self._is_done = True

    def look_at_new(self, found: Iterable[nodes.Node]) -> None:
        """Begin to look at nodes that came since, in a thread; returns at once. Does nothing before `run` is done.

        Their all-reduces are not measured: whom they would meet is at work.
        """
        fresh = [node for node in self._able(found) if node.id not in self._facts]
        if not self._is_done or not fresh or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._admit, args=(fresh,), name="preflight", daemon=True)
        self._thread.start()

    def _admit(self, fresh: list[nodes.Node]) -> None:
        self._judge(fresh, look(self._cfg, fresh, lambda: None), self._hub.tell.remote)

    def _able(self, found: Iterable[nodes.Node]) -> list[nodes.Node]:
        """Usable nodes that could hold a worker."""
        cluster = self._cfg.cluster
        cpus, gpus = cluster.cpus_per_worker, cluster.gpus_per_worker
        return [node for node in nodes.usable(found, ()) if nodes.capacity([node], cpus, gpus)]

    def _judge(
        self, looked_at: Sequence[nodes.Node], found: dict[str, Facts | str], announce: Announce
    ) -> list[Problem]:  # fmt: skip
        """Tell what is wrong with these nodes, beside those that were looked at before; the problems of bad ones."""
        self._facts |= found
        wrong = [each for each in problems(self._facts, facts.software()) if each.node in found]
        address = {node.id: node.address for node in looked_at}
        for each in wrong:
            what = "bad node" if each.bad else "node"
            announce({"kind": "event", "event": what, "node": address[each.node], "reason": each.said})
        bad = [each for each in wrong if each.bad]
        ray.get(self._hub.admit.remote(set(found) - {each.node for each in bad}))
        return bad


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
        found[id_] = _late() if each in late else _result(each)
        if isinstance(found[id_], str):
            found[id_] = f"cannot be looked at: {found[id_]}"
    return {n: f.held_against(began, time.time()) if isinstance(f, Facts) else f for n, f in found.items()}


def _with_reduces(found: dict[str, Facts | str], check: Callable[[], None]) -> dict[str, Facts | str]:
    """Add the time of an all-reduce with each neighbour; the better one counts, for the other may be its peer's."""
    met: dict[str, list[float | str]] = {}
    for meetings in pairs(sorted(node for node, each in found.items() if isinstance(each, Facts))):
        times = _meet(found, meetings, check)
        failed = [pair for pair in meetings if any(isinstance(times[node], str) for node in pair)]
        if failed:  # once more: a connection that fails once is no sign of a bad node
            times |= _meet(found, failed, check)
        for node, result in times.items():
            met.setdefault(node, []).append(result)
    return {
        node: _reduced(each, met[node]) if isinstance(each, Facts) and node in met else each
        for node, each in found.items()
    }


def _meet(
    found: Mapping[str, Facts | str], meetings: Sequence[tuple[str, str]], check: Callable[[], None]
) -> dict[str, float | str]:  # fmt: skip
    """Seconds of an all-reduce by node, or why there was none. No node is in two of the meetings."""
    asked = {}
    for one, other in meetings:
        host = found[one]
        assert isinstance(host, Facts)  # noqa: S101 - only such nodes were paired
        for rank, node in enumerate((one, other)):
            task = ray.remote(num_cpus=0, max_retries=0)(facts.reduce_seconds)
            where = task.options(scheduling_strategy=nodes.on_node(node))
            asked[where.remote(rank, host.address, host.port)] = node
    late = _wait(list(asked), check)
    results = {node: _late() if each in late else _result(each) for each, node in asked.items()}
    return {node: result if isinstance(result, float) else str(result) for node, result in results.items()}


def _reduced(each: Facts, met: Sequence[float | str]) -> Facts | str:
    """With the better of a node's all-reduces; if it had none with any neighbour, why: it cannot work with others."""
    times = [result for result in met if isinstance(result, float)]
    return each.with_reduce(min(times)) if times else f"{APART}: {met[0]}"


def _wait(tasks: list[Any], check: Callable[[], None]) -> list[Any]:
    """Wait for tasks; those that have not ended in time."""
    deadline = time.monotonic() + TIMEOUT_S
    while tasks and (left := deadline - time.monotonic()) > 0:
        check()
        _, tasks = ray.wait(tasks, num_returns=len(tasks), timeout=min(left, LOOK_S))
    return tasks


def _late() -> str:
    return f"no answer within {TIMEOUT_S:.0f} s"


def _result(task: Any) -> Any:
    """A task's result, or its error as text: it says what is wrong with the node."""
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
        return next((line for line in reversed(list(lines)) if line), type(error).__name__)
