"""Averages with a power-function profile, and the weighted sum of some that comes nearest to another. Pure.

Karras et al. 2023 (arXiv 2312.02696), section 3: after t images the average is the integral of w(s) p(s) ds with
p(s) = (gamma + 1) s^gamma / t^(gamma + 1) for s in [0, t]. Its relative width sigma_rel is the standard deviation of p
divided by t. Lengths and times are in images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WIDEST = 12**-0.5
"""sigma_rel of gamma = 0, the mean of all weights so far."""


def gamma(sigma_rel: float) -> float:
    """The exponent of the profile of relative width `sigma_rel`, which lies in (0, WIDEST].

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) falls strictly for gamma >= 0; solved by bisection to the
    last bit, the same on every machine.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(f"sigma_rel: found {sigma_rel}; allowed: above 0, at most {WIDEST:.4f}")
    low, high = 0.0, 1.0 / sigma_rel  # sigma_rel < 1 / (gamma + 2)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if width(middle) > sigma_rel else (low, middle)
    return low if abs(width(low) - sigma_rel) <= abs(width(high) - sigma_rel) else high


def width(exponent: float) -> float:
    """sigma_rel of the profile s^exponent."""
    return math.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3)))


def beta(images: int, step_images: int, exponent: float) -> float:
    """Decay of the step that ends at `images`: (1 - step/images)^(gamma + 1), 0 at the first one (equation 4).

    The product of these decays gives each step exactly the profile's integral over the images of the step.
    """
    return float((1.0 - step_images / images) ** (exponent + 1.0))


@dataclass(frozen=True)
class Profile:
    """An average as it stood after `images` images."""

    images: int
    sigma_rel: float


@dataclass(frozen=True)
class Fit:
    """How a profile is put together from others."""

    coefficients: tuple[float, ...]
    """One for each given profile; they add up to 1."""
    error: float
    """Norm of the difference from the wanted profile over the norm of the wanted one."""
    correlation: float
    """Cosine between the sum and the wanted profile; 1 is a perfect fit."""

    @property
    def gain(self) -> float:
        """Sum of absolute coefficients: by how much rounding in the stored weights may grow."""
        return math.fsum(map(abs, self.coefficients))


def inner_products(left: Sequence[Profile], right: Sequence[Profile]) -> NDArray[np.float64]:
    """Integrals of p_i p_j over all images, (len(left), len(right)), in 1/image (Algorithm 3).

    For t_a <= t_b: (a + 1)(b + 1) / (a + b + 1) * (t_a / t_b)^b / t_b.
    """
    t_a, a = _columns(left)
    t_b, b = _columns(right)
    t_a, a = t_a[:, None], a[:, None]
    ratio = np.minimum(t_a, t_b) / np.maximum(t_a, t_b)
    exponent = np.where(t_a < t_b, b, a)  # of the later profile, whose tail covers the earlier one
    products: NDArray[np.float64] = (a + 1) * (b + 1) * ratio**exponent / ((a + b + 1) * np.maximum(t_a, t_b))
    return products


def fit(given: Sequence[Profile], wanted: Profile) -> Fit:
    """Coefficients of `given`, adding up to 1, whose weighted sum is nearest to `wanted` in the least squares.

    The sum is held to 1, so that weights that do not move are met exactly. Given profiles are nearly parallel; the
    equations are solved in float64 on profiles scaled to norm 1, leaving out directions below its precision.

    Raises:
        ValueError: nothing is given.
    """
    if not given:
        raise ValueError("no profile is given")
    products = inner_products(given, given)
    norm = np.sqrt(np.diag(products))
    towards = inner_products(given, [wanted])[:, 0]
    square = float(inner_products([wanted], [wanted])[0, 0])
    # Stationary point of x'Ax - 2 x'b under 1'x = 1, for x = y / norm.
    size = len(given)
    system = np.zeros((size + 1, size + 1))
    system[:size, :size] = products / norm / norm[:, None]
    system[size, :size] = system[:size, size] = norm.min() / norm
    right = np.append(towards / norm, norm.min())
    solved, *_ = np.linalg.lstsq(system, right, rcond=1e-13)
    x = solved[:size] / norm
    x /= x.sum()
    both, own = float(x @ towards), float(x @ products @ x)
    error = math.sqrt(max(0.0, own - 2 * both + square) / square)
    return Fit(tuple(x.tolist()), error, both / math.sqrt(own * square))


def _columns(profiles: Sequence[Profile]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Times in images and exponents, (n,) each."""
    times = np.array([profile.images for profile in profiles], dtype=np.float64)
    return times, np.array([gamma(profile.sigma_rel) for profile in profiles])
