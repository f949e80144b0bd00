"""Power-function profiles against numerical integration, and the fit against what it must reproduce."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffussm.checkpoint.profiles import WIDEST, Fit, Profile, beta, fit, gamma, inner_products, width

WIDTHS = st.floats(0.01, 0.28)
TIMES = st.integers(1, 10**10)


def density(profile: Profile, s: np.ndarray) -> np.ndarray:
    a = gamma(profile.sigma_rel)
    value = (a + 1) * (s / profile.images) ** a / profile.images
    return np.where(s <= profile.images, value, 0.0)


@given(WIDTHS)
def test_gamma_has_the_width_asked_for(sigma_rel: float) -> None:
    assert width(gamma(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-14)


def test_gamma_is_the_papers() -> None:
    """Section 3.1: sigma_rel = 0.05 and 0.10 are gamma = 16.97 and 6.94."""
    assert gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma(WIDEST) == pytest.approx(0, abs=1e-12)
    for outside in (0.0, -0.1, 0.3):
        with pytest.raises(ValueError, match="sigma_rel"):
            gamma(outside)


def test_the_width_is_the_profiles_standard_deviation() -> None:
    s = (np.arange(200_000) + 0.5) / 200_000
    p = density(Profile(1, 0.1), s) / 200_000
    mean = (p * s).sum()
    assert p.sum() == pytest.approx(1, rel=1e-6)
    assert np.sqrt((p * (s - mean) ** 2).sum()) == pytest.approx(0.1, rel=1e-6)


@given(WIDTHS, st.integers(1, 4096))
def test_the_first_step_takes_the_weights_as_they_are(sigma_rel: float, batch: int) -> None:
    assert beta(batch, batch, gamma(sigma_rel)) == 0.0
    assert 0 < beta(1000 * batch, batch, gamma(sigma_rel)) < 1


@pytest.mark.parametrize(
    ("left", "right"), [((60, 0.05), (100, 0.1)), ((100, 0.2), (60, 0.07)), ((80, 0.1), (80, 0.1))]
)
def test_inner_products_are_integrals(left: tuple[int, float], right: tuple[int, float]) -> None:
    a, b = Profile(*left), Profile(*right)
    n, last = 400_000, max(a.images, b.images)
    s = (np.arange(n) + 0.5) / n * last
    integral = (density(a, s) * density(b, s)).sum() / n * last
    assert inner_products([a], [b])[0, 0] == pytest.approx(integral, rel=1e-4)


@given(TIMES, WIDTHS, TIMES, WIDTHS)
def test_inner_products_are_symmetric(t_a: int, a: float, t_b: int, b: float) -> None:
    one, two = Profile(t_a, a), Profile(t_b, b)
    assert inner_products([one], [two])[0, 0] == inner_products([two], [one])[0, 0]


def grid(snapshots: int, widths: tuple[float, ...] = (0.05, 0.1)) -> list[Profile]:
    return [Profile(1000 * (i + 1), w) for i in range(snapshots) for w in widths]


def test_a_profile_that_was_stored_is_met_exactly() -> None:
    given_profiles = grid(16)
    found = fit(given_profiles, Profile(16_000, 0.1))
    assert found.error < 1e-5
    assert found.correlation == pytest.approx(1, abs=1e-10)
    assert found.coefficients[-1] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("sigma_rel", [0.06, 0.075, 0.12, 0.15])
def test_more_snapshots_come_nearer(sigma_rel: float) -> None:
    errors = [fit(grid(n), Profile(1000 * n, sigma_rel)).error for n in (4, 16, 64)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 80), WIDTHS, st.floats(0.3, 1.0))
def test_the_fit_is_the_best_there_is(snapshots: int, sigma_rel: float, part: float) -> None:
    """The coefficients add up to 1, the figures are what they say, and no small change of them is better."""
    given_profiles = grid(snapshots)
    wanted = Profile(max(1, int(1000 * snapshots * part)), sigma_rel)
    found = fit(given_profiles, wanted)
    x = np.array(found.coefficients)
    assert x.sum() == pytest.approx(1, abs=1e-9)
    assert found.gain >= 1 - 1e-9
    assert found.error == pytest.approx(distance(x, given_profiles, wanted), abs=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(6):
        change = rng.standard_normal(len(x))
        change -= change.mean()
        for size in (1e-2, 1e-4):
            assert distance(x + size * change, given_profiles, wanted) >= found.error - 1e-6


def distance(x: np.ndarray, given_profiles: list[Profile], wanted: Profile) -> float:
    a, b = inner_products(given_profiles, given_profiles), inner_products(given_profiles, [wanted])[:, 0]
    c = inner_products([wanted], [wanted])[0, 0]
    return float(np.sqrt(max(0.0, x @ a @ x - 2 * x @ b + c) / c))


def test_weights_that_do_not_move_are_met_exactly_by_a_bad_fit() -> None:
    found = fit(grid(2), Profile(2000, 0.02))
    assert found.error > 0.1
    assert sum(found.coefficients) == pytest.approx(1, abs=1e-12)


def test_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no profile"):
        fit([], Profile(1, 0.1))


def test_gain_is_the_sum_of_sizes() -> None:
    assert Fit((1.5, -0.5), 0.1, 0.9).gain == 2.0
