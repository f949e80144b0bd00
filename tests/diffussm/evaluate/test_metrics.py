from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from diffussm.evaluate import metrics
from diffussm.evaluate.metrics import frechet, inception_score, kernel_sums, kid, softmax

SEEDS = st.integers(0, 2**32 - 1)


def covariance(rng: np.random.Generator, dim: int, rank: int | None = None) -> np.ndarray:
    x = rng.normal(size=(dim, rank or 2 * dim))
    return x @ x.T / x.shape[1]


# --- Frechet distance


@given(seed=SEEDS, dim=st.integers(1, 8))
@settings(deadline=None)
def test_frechet_of_diagonal_gaussians_is_its_closed_form(seed: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, dim))
    s, t = rng.uniform(0.1, 3, size=(2, dim))  # standard deviations
    expected = ((a - b) ** 2).sum() + ((s - t) ** 2).sum()
    assert frechet(a, np.diag(s**2), b, np.diag(t**2)) == pytest.approx(expected, rel=1e-10, abs=1e-10)


@given(seed=SEEDS, dim=st.integers(1, 12))
@settings(deadline=None)
def test_frechet_agrees_with_the_matrix_square_root_of_the_product(seed: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, dim))
    p, q = covariance(rng, dim) + 0.1 * np.eye(dim), covariance(rng, dim) + 0.1 * np.eye(dim)
    root = scipy.linalg.sqrtm(p @ q).real
    expected = ((a - b) ** 2).sum() + np.trace(p + q - 2 * root)
    assert frechet(a, p, b, q) == pytest.approx(expected, rel=1e-8, abs=1e-8)
    assert frechet(b, q, a, p) == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_frechet_of_singular_covariances() -> None:
    # Rank one each, along u and v: the overlap is |u.v|, so |u|^2 + |v|^2 - 2 |u.v| remains.
    u, v = np.array([3.0, 0.0, 0.0]), np.array([1.0, 1.0, 0.0])
    zero = np.zeros(3)
    assert frechet(zero, np.outer(u, u), zero, np.outer(v, v)) == pytest.approx(9 + 2 - 2 * 3, abs=1e-6)
    # A point against a Gaussian: the trace.
    assert frechet(zero, np.zeros((3, 3)), zero, np.outer(u, u)) == pytest.approx(9)


def test_frechet_of_equal_gaussians_is_zero_also_at_low_rank() -> None:
    rng = np.random.default_rng(3)
    mean, low = rng.normal(size=64), covariance(rng, 64, rank=10)
    assert 0 <= frechet(mean, low, mean, low) < 1e-5


def test_frechet_refuses_what_it_would_get_wrong() -> None:
    mean, cov = np.zeros(2), np.eye(2)
    with pytest.raises(ValueError, match="symmetric"):
        frechet(mean, np.array([[1.0, 0.5], [0.0, 1.0]]), mean, cov)
    with pytest.raises(ValueError, match="symmetric"):
        frechet(mean, cov, mean, np.array([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="finite"):
        frechet(np.array([0, np.nan]), cov, mean, cov)
    with pytest.raises(ValueError, match="shapes"):
        frechet(mean, cov, np.zeros(3), np.eye(3))


# --- Inception score


def test_inception_score_of_sure_and_even_classes_is_their_number_and_of_unsure_ones_is_one() -> None:
    assert inception_score(np.tile(np.eye(4), (5, 1))) == pytest.approx(4)
    assert inception_score(np.full((8, 4), 0.25)) == pytest.approx(1)


def test_inception_score_agrees_with_plain_sums_in_consecutive_splits() -> None:
    p = np.random.default_rng(4).dirichlet(np.ones(5), size=11)
    scores = []
    for part in (p[:4], p[4:8], p[8:]):
        marginal = [math.fsum(row[c] for row in part) / len(part) for c in range(5)]
        kl = [math.fsum(row[c] * math.log(row[c] / marginal[c]) for c in range(5)) for row in part]
        scores.append(math.exp(math.fsum(kl) / len(part)))
    assert inception_score(p, split=4) == pytest.approx(sum(scores) / 3, rel=1e-12)
    assert inception_score(p, split=4) != pytest.approx(inception_score(p), rel=1e-3)


def test_inception_score_refuses_what_is_no_probability() -> None:
    for bad in (np.ones((3, 2)), np.array([[1.5, -0.5]]), np.array([[np.nan, 1.0]]), np.zeros((0, 3)), np.ones(3)):
        with pytest.raises(ValueError, match="inception_score"):
            inception_score(bad)
    with pytest.raises(ValueError, match="split"):
        inception_score(np.eye(2), split=0)


# --- Kernel distance


@given(seed=SEEDS, n=st.integers(2, 9), m=st.integers(2, 9), dim=st.integers(1, 5), block=st.sampled_from([2, 100]))
@settings(deadline=None, max_examples=40)
def test_kid_agrees_with_plain_sums_over_pairs(seed: int, n: int, m: int, dim: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    real, fake = rng.normal(size=(n, dim)), rng.normal(0.5, 1, size=(m, dim))

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / dim + 1) ** 3)

    def within(x: np.ndarray) -> float:
        pairs = list(itertools.permutations(range(len(x)), 2))
        return math.fsum(kernel(x[i], x[j]) for i, j in pairs) / len(pairs)

    across = math.fsum(kernel(x, y) for x in real for y in fake) / (n * m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_BLOCK", block)
        assert kid(real, fake) == pytest.approx(within(real) + within(fake) - 2 * across, rel=1e-9, abs=1e-9)


def test_kid_is_unbiased() -> None:
    rng = np.random.default_rng(7)
    values = [kid(rng.normal(size=(8, 3)), rng.normal(size=(12, 3))) for _ in range(3000)]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error
    assert error < 0.02  # the biased estimate is off by more than 0.3 here
    assert min(values) < 0


def test_kid_refuses_single_points() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        kid(np.ones((1, 2)), np.ones((5, 2)))


def test_leaving_a_group_out_is_the_distance_of_the_others() -> None:
    rng = np.random.default_rng(8)
    real, groups = rng.normal(size=(20, 3)), [rng.normal(0.3, 1, size=(size, 3)) for size in (5, 7, 1)]
    sums = kernel_sums(real, groups)
    assert sums.value() == pytest.approx(kid(real, np.concatenate(groups)), rel=1e-12)
    assert sums.value(1) == pytest.approx(kid(real, np.concatenate([groups[0], groups[2]])), rel=1e-12)


def test_softmax_is_taken_in_float64_and_does_not_overflow() -> None:
    found = softmax(np.array([[1000.0, 1000.0], [0.0, np.log(3.0)]], np.float32))
    np.testing.assert_allclose(found, [[0.5, 0.5], [0.25, 0.75]], rtol=1e-7)
