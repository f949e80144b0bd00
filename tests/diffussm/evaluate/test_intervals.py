from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffussm.evaluate.intervals import groups, jackknife, of_mean
from diffussm.evaluate.metrics import frechet


@given(n=st.integers(0, 200), count=st.integers(1, 12))
def test_groups_cover_all_pictures_once_and_are_even(n: int, count: int) -> None:
    cuts = groups(n, count)
    assert [i for cut in cuts for i in range(n)[cut]] == list(range(n))
    sizes = [cut.stop - cut.start for cut in cuts]
    assert max(sizes) - min(sizes) <= 1
    assert n < 2 or min(sizes) >= 2


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(1000):
        found = of_mean(rng.normal(3.0, 1.0, 100))
        assert found is not None
        inside += found.low <= 3.0 <= found.high
    assert 920 <= inside <= 975


def test_the_jackknife_of_a_mean_is_its_textbook_error() -> None:
    x = np.random.default_rng(2).normal(size=8)
    found = jackknife(x.mean(), [np.delete(x, i).mean() for i in range(8)])
    assert found is not None
    error = x.std(ddof=1) / np.sqrt(8)
    assert found.high - found.low == pytest.approx(2 * 2.3646 * error, rel=1e-4)  # t(7) at 0.975
    assert (found.high + found.low) / 2 == pytest.approx(x.mean())


def test_the_interval_of_a_frechet_distance_tells_the_spread_of_other_draws() -> None:
    """Width from one draw of 300 against the spread over many draws; the bias of the small count does not widen it."""
    rng = np.random.default_rng(3)
    real_mean, real_cov = np.zeros(4), np.eye(4)

    def value(x: np.ndarray) -> float:
        return frechet(x.mean(axis=0), np.cov(x.T), real_mean, real_cov)

    widths, values = [], []
    for _ in range(60):
        x = rng.normal(0.5, 1.2, (300, 4))
        values.append(value(x))
        found = jackknife(values[-1], [value(np.delete(x, np.r_[cut], axis=0)) for cut in groups(300)])
        assert found is not None
        widths.append(found.high - found.low)
    assert np.mean(widths) == pytest.approx(2 * 2.262 * np.std(values, ddof=1), rel=0.25)


def test_one_group_has_no_interval() -> None:
    assert jackknife(1.0, [1.0]) is None
    assert of_mean(np.ones(3)) is None
