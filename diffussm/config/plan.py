"""Legal world sizes: how many nodes, with how many ranks each, can train a run without changing it. Pure.

A size is legal when every node has equally many ranks, the ranks split the global batch into whole micro batches, and
the data set's order of samples stays the same: each global batch holds the same samples as on any other legal size.

The order comes from streaming (0.13, `partition/relaxed.py`), which deals the samples out to `data.canonical_nodes`
rows and reads these in turn. Each global batch is then a run of `global_batch` samples of that sequence, however many
nodes read it, if one of nodes and canonical nodes divides the other; for other nodes streaming deals the batch as if
there were as many nodes as canonical ones, and needs `canonical_nodes * ranks_per_node` to divide the global batch.
`data.canonical_nodes` must divide `train.global_batch` in any case: then no row that is one sample short, and so
repeats its last one, reaches into a whole batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

from diffussm.config.schema import Config
from diffussm.errors import ConfigError


@dataclass(frozen=True)
class Batching:
    """What a run has fixed, whatever it runs on."""

    global_batch: int
    """Images of one optimiser step over all ranks."""
    micro_batch: int = 0
    """Images of one forward pass on one rank; 0 takes a rank's whole share."""
    canonical_nodes: int = 1
    """Rows that the samples are dealt out to."""
    most_per_pass: int = 0
    """With `micro_batch` = 0: images that one rank can hold in a pass, so that a smaller world accumulates; 0: any."""

    @staticmethod
    def of(cfg: Config, most_per_pass: int = 0) -> Batching:
        """What `cfg` says."""
        return Batching(cfg.train.global_batch, cfg.train.micro_batch, cfg.data.canonical_nodes, most_per_pass)

    def per_pass(self, world_size: int) -> int:
        """Images of a forward pass on one rank of a legal size."""
        share = self.global_batch // world_size
        if self.micro_batch or not self.most_per_pass:
            return self.micro_batch or share
        return max(part for part in _divisors(share) if part <= self.most_per_pass)


@dataclass(frozen=True, order=True)
class Size:
    """A legal size. Sizes are ordered by world size, then by nodes."""

    world_size: int
    """Ranks in all."""
    nodes: int
    ranks_per_node: int
    micro_batch: int
    """Images of one forward pass on one rank."""
    accumulation: int
    """Forward passes of each rank for one optimiser step."""

    def __str__(self) -> str:
        """For people."""
        return (
            f"{self.world_size} = {self.nodes} x {self.ranks_per_node}, {self.micro_batch} images a pass, "
            f"{self.accumulation} passes a step"
        )


def size(batching: Batching, nodes: int, ranks_per_node: int) -> Size:
    """The plan for `nodes` nodes of `ranks_per_node` ranks.

    Raises:
        ConfigError: it is not legal; says why and what to do.
    """
    refused = why_illegal(batching, nodes, ranks_per_node)
    if refused is not None:
        raise ConfigError(*refused)
    world_size = nodes * ranks_per_node
    per_pass = batching.per_pass(world_size)
    passes = batching.global_batch // (world_size * per_pass)
    return Size(world_size, nodes, ranks_per_node, per_pass, passes)


def is_legal(batching: Batching, nodes: int, ranks_per_node: int) -> bool:
    """Whether a run with this batching may run on `nodes` nodes of `ranks_per_node` ranks."""
    return (
        why_unfit(batching) is None
        and nodes >= 1
        and ranks_per_node >= 1
        and batching.global_batch % (nodes * ranks_per_node * (batching.micro_batch or 1)) == 0
        and _keeps_order(batching, nodes, ranks_per_node)
    )


def legal(batching: Batching, nodes: int, ranks_per_node: int) -> list[Size]:
    """Legal sizes on 1 to `nodes` whole nodes of `ranks_per_node` ranks each, in rising order."""
    counts = range(1, nodes + 1)
    return [size(batching, count, ranks_per_node) for count in counts if is_legal(batching, count, ranks_per_node)]


def largest(batching: Batching, nodes: int, ranks_per_node: int) -> Size | None:
    """The largest legal size on at most `nodes` nodes with room for `ranks_per_node` ranks each; None if there is none.

    Nodes are used whole. Only where no number of whole nodes is legal, part of one node is.
    """
    whole = legal(batching, nodes, ranks_per_node)
    if whole:
        return whole[-1]
    for ranks in range(ranks_per_node - 1, 0, -1):
        if nodes and is_legal(batching, 1, ranks):
            return size(batching, 1, ranks)
    return None


def why_illegal(batching: Batching, nodes: int, ranks_per_node: int) -> tuple[str, str] | None:
    """Why a size is not legal, as a message and a remedy; None if it is legal."""
    unfit = why_unfit(batching)
    if unfit is not None:
        return unfit
    if nodes < 1 or ranks_per_node < 1:
        return f"found {nodes} nodes with {ranks_per_node} ranks; allowed: 1 or more of each", "use at least one rank"
    batch, micro = batching.global_batch, batching.micro_batch
    world_size = nodes * ranks_per_node
    found = f"found {world_size} ranks ({nodes} nodes with {ranks_per_node} each)"
    per_pass = f" and train.micro_batch={micro}" if micro else ""
    if batch % (world_size * (micro or 1)):
        smaller = largest(batching, nodes, ranks_per_node) if world_size > 1 else None
        advice = f"use {smaller.nodes} nodes with {smaller.ranks_per_node} ranks each, or " if smaller else ""
        unit = math.lcm(world_size * (micro or 1), batching.canonical_nodes)
        return (
            f"{found}; train.global_batch={batch}{per_pass} needs a world size that divides {batch // (micro or 1)}",
            f"{advice}start a new run with a train.global_batch that is a multiple of {unit}",
        )
    if not is_legal(batching, nodes, ranks_per_node):
        rows = batching.canonical_nodes
        return (
            f"{found}; data.canonical_nodes={rows} keeps the order of the samples on nodes that it divides or that "
            f"divide it, or where data.canonical_nodes times ranks a node divides train.global_batch={batch}",
            f"use {' or '.join(map(str, _neighbours(rows, nodes)))} nodes, or start a new run with "
            "data.canonical_nodes=1",
        )
    return None


def why_unfit(batching: Batching) -> tuple[str, str] | None:
    """Why no size at all is legal, as a message and a remedy; None if one rank is."""
    batch, micro, rows = batching.global_batch, batching.micro_batch, batching.canonical_nodes
    if micro and batch % micro:
        return (
            f"train.micro_batch: found {micro}; allowed: 0 or a divisor of train.global_batch = {batch}: "
            f"{some(_divisors(batch))}",
            "choose one of these, or another train.global_batch",
        )
    if batch % rows:
        return (
            f"data.canonical_nodes: found {rows}; allowed: a divisor of train.global_batch = {batch}: "
            f"{some(_divisors(batch))}",
            "choose one of these, or another train.global_batch",
        )
    return None


def world_sizes(cfg: Config) -> list[int]:
    """World sizes that `cfg` may be started or restarted with, in rising order; empty if its batches do not fit.

    With `cluster.workers_per_node` = 0 all workers share one node, and any number of them is tried; otherwise whole
    nodes of so many workers are.
    """
    batching = Batching.of(cfg)
    if why_unfit(batching) is not None:
        return []
    each = cfg.cluster.workers_per_node
    divisors = _divisors(batching.global_batch // (batching.micro_batch or 1))
    return [
        workers
        for workers in divisors
        if workers % (each or 1) == 0 and is_legal(batching, workers // each if each else 1, each or workers)
    ]


def smaller_sizes(cfg: Config) -> list[int]:
    """World sizes up to `cluster.workers` at which no forward pass is larger than planned, in rising order.

    A smaller group keeps the micro batch of the full one, so that it needs no more memory, and accumulates more passes.
    """
    fixed = copy.deepcopy(cfg)
    fixed.train.micro_batch = cfg.train.micro_batch or max(1, cfg.train.global_batch // cfg.cluster.workers)
    return [workers for workers in world_sizes(fixed) if workers <= cfg.cluster.workers]


def with_workers(cfg: Config, workers: int) -> Config:
    """`cfg` for a group of one of its `smaller_sizes`; itself if that is its size."""
    if workers == cfg.cluster.workers:
        return cfg
    each = cfg.cluster.workers_per_node or workers
    planned = cfg.train.micro_batch or cfg.train.global_batch // cfg.cluster.workers
    return resized(cfg, size(Batching.of(cfg, most_per_pass=planned), workers // each, each))


def layout(cfg: Config) -> tuple[int, int]:
    """Nodes and workers on each of them that `cfg` asks for.

    Raises:
        ConfigError: `cluster.workers` do not fill whole nodes of `cluster.workers_per_node`, or a node would need
            more GPUs than it has.
    """
    workers, each = cfg.cluster.workers, cfg.cluster.workers_per_node or cfg.cluster.workers
    gpus, there = math.ceil(each * cfg.cluster.gpus_per_worker), cfg.plan.gpus_per_node
    if gpus > there:
        said = f"cluster.workers_per_node={each}" if cfg.cluster.workers_per_node else f"cluster.workers={each}"
        raise ConfigError(
            f"{said}: found {gpus} GPUs on one node; allowed: plan.gpus_per_node={there}",
            f"set cluster.workers_per_node={most_on_a_node(cfg) or 1}, or "
            f"plan.gpus_per_node={gpus} if your nodes have so many",
        )
    if workers % each:
        raise ConfigError(
            f"cluster.workers: found {workers}; allowed with cluster.workers_per_node={each}: a multiple of {each}, "
            "since each node has equally many",
            f"set cluster.workers={workers // each * each or each} or {(workers // each + 1) * each}",
        )
    return workers // each, each


def most_on_a_node(cfg: Config) -> int:
    """Workers that the GPUs of one node take; 0: they need none, and any number fits."""
    gpus = cfg.cluster.gpus_per_worker
    return int(cfg.plan.gpus_per_node / gpus) if gpus else 0


def resized(cfg: Config, to: Size) -> Config:
    """A copy of `cfg` that runs on the size `to`."""
    other = copy.deepcopy(cfg)
    other.cluster.workers = to.world_size
    other.cluster.workers_per_node = to.ranks_per_node if to.nodes > 1 or cfg.cluster.workers_per_node else 0
    if to.micro_batch * to.world_size != cfg.train.global_batch or cfg.train.micro_batch:
        other.train.micro_batch = to.micro_batch
    return other


def some(values: list[int], most: int = 24) -> str:
    """The first `most` values as text; says so when there are more."""
    text = ", ".join(map(str, values[:most]))
    return f"{text}, ... ({len(values)} in all)" if len(values) > most else text


def _keeps_order(batching: Batching, nodes: int, ranks_per_node: int) -> bool:
    rows = batching.canonical_nodes
    return rows % nodes == 0 or nodes % rows == 0 or batching.global_batch % (rows * ranks_per_node) == 0


def _neighbours(rows: int, nodes: int) -> Iterator[int]:
    """The nearest numbers of nodes below and above `nodes` that divide `rows` or are multiples of it."""
    fits = [count for count in range(1, nodes + rows + 1) if rows % count == 0 or count % rows == 0]
    yield max(count for count in fits if count < nodes)
    yield min(count for count in fits if count > nodes)


def _divisors(number: int) -> list[int]:
    small = [part for part in range(1, math.isqrt(number) + 1) if number % part == 0]
    return sorted({*small, *(number // part for part in small)})
