from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffussm.evaluate import manifold
from diffussm.evaluate.manifold import precision_recall

SEEDS = st.integers(0, 2**32 - 1)


def naive_covered(queries: np.ndarray, points: np.ndarray, k: int) -> float:
    radii = [sorted(math.dist(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]
    hits = sum(any(math.dist(q, p) <= r for p, r in zip(points, radii, strict=True)) for q in queries)
    return hits / len(queries)


@given(seed=SEEDS, k=st.integers(1, 4), n=st.integers(5, 20), m=st.integers(5, 20), block=st.sampled_from([3, 7, 100]))
@settings(deadline=None, max_examples=40)
def test_precision_recall_agrees_with_plain_loops(seed: int, k: int, n: int, m: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    real, fake = rng.normal(size=(n, 3)), rng.normal(0.7, 1.3, size=(m, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifold, "_BLOCK", block)
        result = precision_recall(real, fake, k)
    assert result.precision == naive_covered(fake, real, k)
    assert result.recall == naive_covered(real, fake, k)


def test_precision_and_recall_are_not_confused() -> None:
    rng = np.random.default_rng(5)
    wide = rng.normal(size=(200, 2))
    narrow = rng.normal(scale=0.01, size=(200, 2))  # all inside the real manifold, covering little of it
    result = precision_recall(wide, narrow)
    assert result.precision > 0.95
    assert result.recall < 0.05


def test_the_border_of_a_ball_belongs_to_it() -> None:
    real = np.array([[-2.0], [-1.0], [0.0], [1.0], [2.0]])  # balls of radius 1, 1, 1, 1, 1
    fake = np.array([[3.0], [-3.0], [3.5], [9.0]])
    assert precision_recall(real, fake, k=1).precision == 0.5


def test_precision_recall_far_from_the_origin() -> None:
    rng = np.random.default_rng(6)
    real, fake = rng.normal(size=(2, 30, 4))
    far, near = precision_recall(real + 1e5, fake + 1e5), precision_recall(real, fake)
    assert (far.precision, far.recall) == (near.precision, near.recall)


def test_precision_recall_needs_more_than_k_points() -> None:
    with pytest.raises(ValueError, match="more than k"):
        precision_recall(np.ones((3, 2)), np.ones((9, 2)), k=3)
    with pytest.raises(ValueError, match="shapes"):
        precision_recall(np.ones((9, 2)), np.ones((9, 3)))
    with pytest.raises(ValueError, match="finite"):
        precision_recall(np.full((9, 2), np.inf), np.ones((9, 2)))


@pytest.mark.parametrize("mutant", ["itself counted", "k", "border", "sides swapped"])
def test_a_mutant_is_seen_by_the_plain_loops(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    real, fake = rng.normal(size=(40, 3)), rng.normal(0.7, 1.3, size=(50, 3))
    expected = (naive_covered(fake, real, 3), naive_covered(real, fake, 3))
    right = precision_recall(real, fake)
    assert (right.precision, right.recall) == expected
    if mutant == "itself counted":
        found = precision_recall(real, fake, 2)  # what the third smallest distance is when the zero counts
    elif mutant == "k":
        found = precision_recall(real, fake, 4)
    elif mutant == "border":
        radii = manifold._radii
        monkeypatch.setattr(manifold, "_radii", lambda points, k: radii(points, k) * 0.9)
        found = precision_recall(real, fake)
    else:
        found = precision_recall(fake, real)
    assert (found.precision, found.recall) != expected
