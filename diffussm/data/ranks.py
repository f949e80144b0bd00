"""Which rank reads here, and what the ranks must agree on before they read."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from diffussm.data.cursor import Batch
from diffussm.errors import DataError, DiffuSSMError, MissingError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that read."""

    rank: int
    size: int
    """Ranks in all."""
    per_node: int

    @property
    def nodes(self) -> int:
        """Nodes, with equally many ranks each."""
        return self.size // self.per_node

    @property
    def leader(self) -> int:
        """The first rank on this one's node."""
        return self.rank - self.rank % self.per_node


def current() -> Ranks:
    """From the environment that streaming reads too.

    Raises:
        MissingError: a variable is missing or contradicts the process group. Streaming would take this process for
            rank 0 of 1, and every rank would train on the same samples.
    """
    group = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = [os.environ.get(name) for name in names]
    if values == [None] * 4 and group == (0, 1):
        return Ranks(0, 1, 1)
    if None in values:
        raise MissingError(
            f"environment: {', '.join(n for n, v in zip(names, values, strict=True) if v is None)} not set",
            "start the workers by Ray Train or torchrun, which set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE",
        )
    rank, size, local_rank, local_size = (int(value) for value in values if value is not None)
    if (rank, size) != group or size % local_size or rank % local_size != local_rank:
        raise MissingError(
            f"environment: found rank {rank} of {size}, {local_rank} of {local_size} on its node, "
            f"and a process group with rank {group[0]} of {group[1]}; each node needs equally many ranks in order",
            "give each node the same number of workers",
        )
    return Ranks(rank, size, local_size)


def everyone(mine: T) -> list[T]:
    """What each rank gives, by rank. Collective."""
    if not dist.is_initialized():
        return [mine]
    given: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(given, mine)
    return given


def by_leader(ranks: Ranks, make: Callable[[], T]) -> T:
    """What `make` returns on the first rank of this node, on each of the node's ranks. Collective.

    Raises:
        DiffuSSMError: on every rank of every node, the first of those that `make` raised on any.
    """
    value: T | None = None
    failure: DiffuSSMError | None = None
    if ranks.rank == ranks.leader:
        try:
            value = make()
        except DiffuSSMError as error:  # the others would wait for ever if it were raised here
            failure = error
    given = everyone((value, failure))
    for _, failed in given:
        if failed is not None:
            raise failed
    return given[ranks.leader][0]  # type: ignore[return-value]


def check_disjoint(batch: Batch) -> None:
    """Raise DataError when two ranks read the same samples. Collective."""
    ids = list(itertools.chain(*everyone(batch.id.tolist())))
    if len(set(ids)) != len(ids):
        raise DataError(f"data.latents: {len(ids) - len(set(ids))} of {len(ids)} samples of a batch are doubled")
