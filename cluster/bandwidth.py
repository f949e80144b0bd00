"""How fast a store takes and gives bytes, in a few seconds: one stream, as one rank writes and reads."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass

from diffussm.checkpoint.store import Store
from diffussm.errors import StorageError

BLOCK_BYTES = 4 << 20
MOST_BYTES = 64 << 20
SECONDS = 2.0
"""A direction ends after the block in which so many seconds are over."""


@dataclass(frozen=True)
class Speed:
    """Bytes a second of one stream."""

    write: float
    read: float


def round_trip(store: Store, seconds: float = SECONDS) -> Speed:
    """Write blocks of random bytes, read them back and delete them.

    Raises:
        StorageError: the store refuses, or gives back other bytes.
    """
    block, mark = os.urandom(BLOCK_BYTES), f".probe-{secrets.token_hex(8)}"
    names: list[str] = []
    try:
        began = time.perf_counter()
        while not names or (len(names) * BLOCK_BYTES < MOST_BYTES and time.perf_counter() - began < seconds):
            names.append(f"{mark}x{len(names)}")  # a name that a set of latents takes for ours
            store.write(names[-1], block)
        write_s = time.perf_counter() - began
        began, count = time.perf_counter(), 0
        for name in names:
            if store.read(name) != block:
                raise StorageError(f"{store.url}: a written object reads back differently", "check the storage service")
            count += 1
            if time.perf_counter() - began > seconds:
                break
        read_s = time.perf_counter() - began
    finally:
        for name in names:
            store.delete(name)
    return Speed(len(names) * BLOCK_BYTES / max(write_s, 1e-9), count * BLOCK_BYTES / max(read_s, 1e-9))


def reading(store: Store, objects: Iterable[tuple[str, int]], seconds: float = SECONDS) -> float:
    """Bytes a second that come from objects that are there, given as key and size; 0 if there is none.

    Raises:
        StorageError: as the store does.
    """
    began, taken = time.perf_counter(), 0
    for key, size in objects:
        for block in store.stream(key, size):
            taken += len(block)
            if taken >= MOST_BYTES or time.perf_counter() - began > seconds:
                return taken / (time.perf_counter() - began)
    return taken / max(time.perf_counter() - began, 1e-9)
