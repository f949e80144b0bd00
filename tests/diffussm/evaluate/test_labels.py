from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from diffussm.config.schema import Labels
from diffussm.evaluate.labels import labels, proportional


@given(st.lists(st.integers(1, 500), min_size=1, max_size=12), st.integers(1, 300))
def test_labels_keep_the_proportions(counts: list[int], n: int) -> None:
    found = labels(Labels.data, counts, n, seed=0)
    assert len(found) == n
    for label, count in enumerate(counts):
        assert abs(found.count(label) - n * count / sum(counts)) < 1


def test_labels_are_mixed_so_that_any_stretch_has_all_classes() -> None:
    assert set(proportional((100, 100, 200), 40)[:8]) == {0, 1, 2}


def test_balanced_labels_come_equally_often_in_any_stretch() -> None:
    found = labels(Labels.balanced, (1, 1, 500), 32, seed=0)
    assert Counter(found) == {0: 11, 1: 11, 2: 10}
    assert set(found[3:6]) == {0, 1, 2}


def test_random_labels_belong_to_seed_and_index_and_are_even() -> None:
    many = labels(Labels.random, (1, 1, 500, 7), 4000, seed=3)
    assert many[:50] == labels(Labels.random, (1, 1, 500, 7), 50, seed=3)
    assert many[:50] != labels(Labels.random, (1, 1, 500, 7), 50, seed=4)
    assert all(abs(count - 1000) < 120 for count in Counter(many).values())
