"""Which rank this process is, asserted from every source that claims to know.

A missing variable means "rank 0 of 1" to the data loader without any error, and every rank would then train on the
same samples; so the environment and the process group must agree before the first data set is opened.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from diffussm.errors import MissingError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among all training processes."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    def claim_device(self) -> None:
        """Make this rank's device the current one of the calling thread; each new thread begins with the first GPU."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for all: it logs and writes the manifest."""
        return self.rank == 0


def current(device: torch.device) -> World:
    """Read the environment and hold it against the initialised process group.

    Raises:
        MissingError: no process group, a variable is unset, or the two disagree.
    """
    if not dist.is_initialized():
        raise MissingError("training: no process group is initialised", "start training with `diffussm train`")
    unset = [name for name in _VARIABLES if name not in os.environ]
    if unset:
        raise MissingError(
            f"environment: {', '.join(unset)} not set on rank {dist.get_rank()}; all of {', '.join(_VARIABLES)} "
            "are needed, or every rank would read the same data",
            "start the workers through Ray's torch backend or export the variables for each process",
        )
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if (rank, size) != (dist.get_rank(), dist.get_world_size()):
        raise MissingError(
            f"environment says rank {rank} of {size}, the process group says "
            f"{dist.get_rank()} of {dist.get_world_size()}",
            "do not set RANK or WORLD_SIZE by hand",
        )
    return World(rank, size, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]), device)
