"""Randomness that belongs to the sample: the same anywhere, different from every other."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from diffussm.rng import Purpose, generator

SEEDS = st.integers(min_value=0, max_value=2**63 - 1)
INDICES = st.integers(min_value=0, max_value=2**40)


def draw(seed: int, purpose: Purpose, index: int, epoch: int = 0, count: int = 8) -> tuple[float, ...]:
    return tuple(generator(seed, purpose, index, epoch).standard_normal(count).tolist())


@given(SEEDS, st.sampled_from(Purpose), INDICES, st.integers(min_value=0, max_value=10_000))
def test_the_same_key_gives_the_same_numbers(seed: int, purpose: Purpose, index: int, epoch: int) -> None:
    assert draw(seed, purpose, index, epoch) == draw(seed, purpose, index, epoch)


@given(SEEDS, INDICES)
def test_any_change_of_the_key_gives_other_numbers(seed: int, index: int) -> None:
    keys = [
        (seed, Purpose.TRAIN, index, 0),
        ((seed + 1) % 2**63, Purpose.TRAIN, index, 0),
        (seed ^ 1, Purpose.SAMPLE, index, 0),
        (seed, Purpose.SAMPLE, index, 0),
        (seed, Purpose.LABEL, index, 0),
        (seed, Purpose.EVALUATE, index, 0),
        (seed, Purpose.TRAIN, index + 1, 0),
        (seed, Purpose.TRAIN, index, 1),
        (seed, Purpose.TRAIN, 0, index + 2),
    ]
    drawn = [draw(*key) for key in dict.fromkeys(keys)]
    assert len(set(drawn)) == len(drawn)


def test_index_and_epoch_are_not_exchangeable() -> None:
    assert draw(0, Purpose.TRAIN, 1, 2) != draw(0, Purpose.TRAIN, 2, 1)


def test_large_seeds_are_told_apart_to_the_last_bit() -> None:
    """Through float64 the two seeds would be one."""
    assert draw(2**63 - 1, Purpose.TRAIN, 0) != draw(2**63 - 2, Purpose.TRAIN, 0)


def test_streams_of_neighbours_do_not_run_into_each_other() -> None:
    """A long draw of one sample contains no number of the next samples' streams."""
    long = set(generator(0, Purpose.TRAIN, 5).random(50_000).tolist())
    others = itertools.chain.from_iterable(generator(0, Purpose.TRAIN, i).random(50).tolist() for i in (4, 6, 7))
    assert not long.intersection(others)


def test_numbers_are_known() -> None:
    """A change of these values breaks every resumed run: it needs a reason and a new format version."""
    found = generator(42, Purpose.TRAIN, index=7, epoch=3).integers(0, 2**32, size=4, dtype=np.uint64).tolist()
    assert found == [1777086206, 4011851499, 1557386849, 3979936813]


def test_one_number_of_each_sample_is_uniform() -> None:
    first = np.array([generator(1, Purpose.TRAIN, index).random() for index in range(4000)])
    assert abs(first.mean() - 0.5) < 4 / np.sqrt(12 * 4000)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 4 / np.sqrt(4000)
