from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from diffussm.errors import DataError
from diffussm.evaluate.moments import Accumulator, Moments, merge


def of(features: np.ndarray) -> Moments:
    sums = Accumulator(features.shape[1])
    sums.add(features)
    return sums.moments()


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 40), dim=st.integers(1, 6), cuts=st.lists(st.integers(0, 40)))
@settings(deadline=None)
def test_any_batching_gives_the_two_pass_mean_and_covariance(seed: int, n: int, dim: int, cuts: list[int]) -> None:
    x = np.random.default_rng(seed).normal(3.0, 2.0, (n, dim))
    sums = Accumulator(dim)
    for batch in np.split(x, sorted(min(cut, n) for cut in cuts)):
        sums.add(batch)
    moments = sums.moments()
    assert moments.n == n
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(x.T).reshape(dim, dim), rtol=1e-9, atol=1e-11)


def test_float32_features_are_summed_in_float64() -> None:
    x = np.full((1000, 1), 4096.25, np.float32)
    x[::2] += np.float32(0.5)
    moments = of(x)
    assert moments.total.dtype == moments.outer.dtype == np.float64
    assert moments.total[0] == 1000 * 4096.5
    assert moments.outer[0, 0] == 500 * 4096.25**2 + 500 * 4096.75**2


def test_parts_merge_to_the_whole_in_the_given_order_and_can_be_taken_out() -> None:
    x = np.random.default_rng(1).normal(size=(30, 4))
    parts = [of(x[:7]), of(x[7:7]), of(x[7:20]), of(x[20:])]
    whole = merge(parts)
    assert whole.n == 30
    np.testing.assert_allclose(whole.outer, of(x).outer, rtol=1e-13)
    again = merge(parts)
    assert np.array_equal(whole.total, again.total)
    assert np.array_equal(whole.outer, again.outer)
    rest = whole.without(parts[0])
    assert rest.n == 23
    np.testing.assert_allclose(rest.covariance, np.cov(x[7:].T), rtol=1e-11)


def test_merging_leaves_its_parts_alone() -> None:
    a, b = of(np.ones((2, 3))), of(np.ones((3, 3)))
    merge([a, b])
    assert a.total.tolist() == [2, 2, 2]
    assert b.total.tolist() == [3, 3, 3]


def test_moments_are_a_snapshot() -> None:
    sums = Accumulator(2)
    sums.add(np.ones((3, 2)))
    before = sums.moments()
    sums.add(np.ones((3, 2)))
    assert (before.n, before.total[0], before.outer[0, 1]) == (3, 3, 3)


def test_bytes_round_trip_exactly() -> None:
    moments = of(np.random.default_rng(2).normal(size=(5, 3)))
    read = Moments.from_bytes(moments.to_bytes())
    assert read.n == 5
    assert np.array_equal(read.total, moments.total)
    assert np.array_equal(read.outer, moments.outer)


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"not safetensors at all",
        of(np.ones((2, 3))).to_bytes()[:-1],
        save({"n": np.array([2], np.int64), "total": np.ones(3)}),
        save({"n": np.array([-1], np.int64), "total": np.ones(3), "outer": np.ones((3, 3))}),
        save({"n": np.array([2], np.int64), "total": np.ones(3), "outer": np.ones((3, 2))}),
        save({"n": np.array([2], np.int64), "total": np.ones(3, np.float32), "outer": np.ones((3, 3), np.float32)}),
        save({"n": np.array([2], np.int64), "total": np.full(3, np.nan), "outer": np.ones((3, 3))}),
    ],
)
def test_a_broken_file_is_refused_by_name(blob: bytes) -> None:
    with pytest.raises(DataError, match=r"reference-x.*") as caught:
        Moments.from_bytes(blob, "reference-x.safetensors")
    assert "delete" in caught.value.remedy


def test_too_few_pictures_and_bad_features_are_refused() -> None:
    with pytest.raises(DataError, match="found 1"):
        _ = of(np.ones((1, 2))).covariance
    with pytest.raises(DataError, match="found 0"):
        _ = Accumulator(2).moments().mean
    with pytest.raises(DataError, match="1 of 2"):
        of(np.array([[1.0, 2.0], [np.inf, 0.0]]))
    with pytest.raises(ValueError, match="shape"):
        Accumulator(2).add(np.ones((3, 4)))
    with pytest.raises(ValueError, match="parts"):
        merge([])
    with pytest.raises(ValueError, match="parts"):
        merge([of(np.ones((2, 2))), of(np.ones((2, 3)))])
    with pytest.raises(ValueError, match="out of"):
        of(np.ones((2, 2))).without(of(np.ones((3, 2))))
