"""The attempt number of a start, taken from the store so that no two starts have the same one."""

from __future__ import annotations

import json
import os
import socket
import time

import torch.distributed as dist

from diffussm.checkpoint.store import AlreadyExists, Store, open_store
from diffussm.config.schema import Config
from diffussm.naming import RunPaths
from diffussm.train.world import World


def next_attempt(store: Store, world_size: int) -> int:
    """Claim the next free number by creating its record; the store decides between two who want the same one."""
    taken = {int(key.split("/")[1]) for key in store.keys("attempts/")}
    number = max(taken, default=0) + 1
    record = {"host": socket.gethostname(), "pid": os.getpid(), "world_size": world_size, "time": time.time()}
    while True:
        try:
            store.write(f"attempts/{number}/start.json", json.dumps(record).encode(), create=True)
        except AlreadyExists:
            number += 1
        else:
            return number


def claim_attempt(cfg: Config, world: World) -> int:
    """The number of this start, claimed by rank 0. Collective: every rank must call it.

    Raises:
        StorageError: on every rank, if rank 0 could not reach the store.
    """
    claimed: list[int | Exception | None] = [None]
    if world.leads:
        try:
            claimed = [next_attempt(open_store(RunPaths(cfg.storage, cfg.name).root), world.size)]
        except Exception as error:  # noqa: BLE001 - whatever it is, all ranks raise it below
            claimed = [error]
    dist.broadcast_object_list(claimed, src=0)
    outcome = claimed[0]
    if isinstance(outcome, Exception):
        raise outcome
    assert outcome is not None  # noqa: S101 - rank 0 set it
    return outcome
