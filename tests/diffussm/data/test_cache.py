"""The limit of a node's cache, held against the order in which streaming really reads shards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffussm.data.cache import Reading, limit_bytes
from diffussm.errors import ConfigError

READING = Reading((100,) * 50, (1000,) * 50, 500, 1, 200, 100, 2)


def shards_in_use(reading: Reading, seed: int, epoch: int) -> int:
    """The most shards that any window of an epoch touches."""
    from streaming.base.partition import get_partitions
    from streaming.base.shuffle import get_shuffle

    number, rows = sum(reading.shard_samples), reading.canonical_nodes
    order = get_partitions("relaxed", number, rows, 1, 1, 1, 1, 0, rows).ravel()
    shuffled = get_shuffle("py1br", np.array(reading.shard_samples), rows, seed, epoch, reading.shuffle_block)
    shard_of = np.repeat(np.arange(len(reading.shard_samples)), reading.shard_samples)[shuffled[order]]
    last = max(1, len(shard_of) - reading.window + 1)
    return max(len(set(shard_of[start : start + reading.window])) for start in range(0, last, 7))


@settings(max_examples=80, deadline=None)
@given(
    shards=st.integers(2, 60), samples=st.integers(4, 40), rest=st.integers(1, 4), rows=st.sampled_from([1, 2, 4]),
    block=st.integers(4, 200), window=st.integers(1, 300), seed=st.integers(0, 5), epoch=st.integers(0, 3),
)  # fmt: skip
def test_the_least_holds_all_shards_that_are_in_use(
    shards: int, samples: int, rest: int, rows: int, block: int, window: int, seed: int, epoch: int
) -> None:
    reading = Reading((samples,) * (shards - 1) + (rest,), (1000,) * shards, 500, rows, block, window, 1)
    assert shards_in_use(reading, seed, epoch) * 1000 + 500 <= reading.least_bytes


def test_the_least_grows_with_what_is_shuffled_and_fetched_ahead_and_ends_at_the_whole() -> None:
    least = READING.least_bytes
    assert 500 + 4 * 1000 < least < READING.total_bytes == 50_500
    assert replace(READING, shuffle_block=400).least_bytes > least
    assert replace(READING, window=1000).least_bytes > least
    assert replace(READING, canonical_nodes=4).least_bytes > least
    assert replace(READING, readers=8).least_bytes > least
    assert replace(READING, shuffle_block=100_000).least_bytes == READING.total_bytes


def test_no_limit_where_the_disk_holds_everything() -> None:
    assert limit_bytes(READING, 0, 10**9) is None
    assert limit_bytes(READING, 60_000, 10**9) is None


def test_the_disk_or_the_user_limits_the_cache() -> None:
    assert limit_bytes(READING, 0, 50_000) == 40_000
    assert limit_bytes(READING, 30_000, 10**9) == 30_000
    assert limit_bytes(READING, 45_000, 50_000) == 40_000
    assert limit_bytes(READING, READING.least_bytes, 10**9) == READING.least_bytes


def test_a_limit_below_the_least_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"data\.cache_limit_bytes: found 9,000; allowed here: 0 or [\d,]+") as caught:
        limit_bytes(READING, 9_000, 10**9)
    assert "shuffled within 200" in caught.value.message
    assert f"data.cache_limit_bytes={READING.least_bytes}" in caught.value.remedy
    with pytest.raises(ConfigError, match=r"data\.cache: its disk has 10,000 bytes free"):
        limit_bytes(READING, 0, 10_000)
