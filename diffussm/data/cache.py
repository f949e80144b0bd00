"""How many bytes of shards a node must keep at once, and may. Pure.

A shard that is evicted while samples of it are still to come is fetched again for each of them: the reader crawls, or,
when no shard at all can be spared, stands still for ever. The limit is therefore computed from what can be in use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffussm.errors import ConfigError

_SHUFFLE_REACH = 1.25
"""A block of streaming's `py1br` shuffle is at most this much longer than its nominal size."""
_SHARE_OF_DISK = 0.8
"""Part of the free disk that a cache without a limit of its own may fill."""
_STREAMING_SHARDS = 4
"""streaming refuses a limit below so many of the largest shard."""


@dataclass(frozen=True)
class Reading:
    """What decides how many shards are in use on one node."""

    shard_samples: tuple[int, ...]
    """Samples of each shard."""
    shard_bytes: tuple[int, ...]
    """Bytes of each shard."""
    index_bytes: int
    canonical_nodes: int
    shuffle_block: int
    """`data.shuffle_block_images`."""
    window: int
    """Samples from the slowest reader's next one to the furthest one fetched ahead, all readers of a node together."""
    readers: int
    """Processes of the node that fetch shards, one each at a time."""

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole set."""
        return self.index_bytes + sum(self.shard_bytes)

    @property
    def least_bytes(self) -> int:
        """Bytes below which a reader may wait for a shard that another one has just evicted.

        In the row of a canonical node, shards follow one another and samples are shuffled within blocks: `w` samples in
        a row lie within `w` plus a block on either side, in whole shards and their neighbours. The samples in use are
        dealt to all rows in turn. Each reader may be fetching one more.
        """
        rows = self.canonical_nodes
        in_a_row = math.ceil(self.window / rows) + math.ceil(2 * _SHUFFLE_REACH * self.shuffle_block)
        smallest, largest = min(self.shard_samples), max(self.shard_bytes)
        # The last shard is as small as it happens to be; there is one of it.
        usual = sorted(self.shard_samples)[1] if len(self.shard_samples) > 1 else smallest
        shards = rows * (math.ceil(in_a_row / usual) + 3) + self.readers
        shards = max(min(shards, len(self.shard_bytes)), _STREAMING_SHARDS)
        return self.index_bytes + shards * largest


def limit_bytes(reading: Reading, wanted_bytes: int, free_bytes: int) -> int | None:
    """The limit of a node's cache; None where the whole set fits, so that nothing need ever be evicted.

    Args:
        reading: what is read.
        wanted_bytes: `data.cache_limit_bytes`; 0 leaves it to the disk.
        free_bytes: room on the cache's disk, the shards that lie there already included.

    Raises:
        ConfigError: the wanted limit, or the disk, is smaller than what must be kept at once.
    """
    least = min(reading.least_bytes, reading.total_bytes)
    if wanted_bytes and wanted_bytes < least:
        raise ConfigError(
            f"data.cache_limit_bytes: found {wanted_bytes:,}; allowed here: 0 or {least:,} and more, because "
            f"images are shuffled within {reading.shuffle_block:,} and {reading.window:,} are fetched ahead, and a "
            "shard that is evicted too early is fetched again for each of its samples",
            f"set data.cache_limit_bytes={least}, or a smaller data.shuffle_block_images (a new run) or "
            "data.predownload_images",
        )
    room = int(free_bytes * _SHARE_OF_DISK)
    if room < least:
        raise ConfigError(
            f"data.cache: its disk has {free_bytes:,} bytes free, of which a cache may fill {room:,}; allowed: "
            f"{least:,} or more, the shards that are in use at once",
            "set data.cache to a folder on a larger disk, or data.predownload_images to less",
        )
    limit = min(wanted_bytes, room) if wanted_bytes else room
    return None if reading.total_bytes <= limit else limit
