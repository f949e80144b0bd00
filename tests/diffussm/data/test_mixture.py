"""Which set of latents each global batch comes from."""

from __future__ import annotations

from collections import Counter

import pytest

from diffussm.data.mixture import Mixture
from diffussm.errors import DataError


def test_each_set_comes_as_often_as_it_has_whole_batches() -> None:
    mixture = Mixture((83, 41, 8), 8, seed=3)
    assert mixture.batches == (10, 5, 1)
    assert mixture.epoch_images == 16 * 8
    for epoch in range(3):
        assert Counter(mixture.schedule(epoch)) == {0: 10, 1: 5, 2: 1}


def test_the_turns_follow_from_seed_and_epoch_alone() -> None:
    turns = Mixture((80, 80), 8, seed=3).schedule(0)
    assert turns == Mixture((83, 87), 8, seed=3).schedule(0)
    assert turns != Mixture((80, 80), 8, seed=4).schedule(0)
    assert turns != Mixture((80, 80), 8, seed=3).schedule(1)
    assert turns != sorted(turns)


def test_one_set_has_every_turn() -> None:
    assert Mixture((19,), 8, seed=0).schedule(7) == [0, 0]


def test_a_set_without_a_whole_batch_is_refused() -> None:
    with pytest.raises(DataError, match=r"train\.global_batch: found 8; the latents hold 7"):
        Mixture((80, 7), 8, seed=0).schedule(0)
