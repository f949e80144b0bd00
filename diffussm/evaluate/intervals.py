"""How sure a score is: delete-a-group jackknife over consecutive groups of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy import stats

GROUPS = 10
"""Groups that are left out in turn: each costs one more distance, and 10 give Student's t 9 degrees of freedom."""
LEVEL = 0.95


class Interval(NamedTuple):
    """Two-sided confidence interval at `LEVEL`."""

    low: float
    high: float


def groups(n: int, count: int = GROUPS) -> list[slice]:
    """n pictures cut into at most `count` consecutive groups of nearly equal size, none with fewer than 2."""
    count = max(1, min(count, n // 2))
    edges = [n * g // count for g in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def jackknife(value: float, without: Sequence[float]) -> Interval | None:
    """The interval around an estimate, from the same estimate with each group left out (Efron and Stein, 1981).

    The spread of the leave-one-out values, not their level, makes the width: a bias that depends on the number of
    pictures, as a Frechet distance has, is the same in all of them and drops out.

    Args:
        value: the estimate from all pictures.
        without: the estimate without group g, for each group.

    Returns:
        value -/+ t(G - 1) * standard error; None for fewer than 2 groups.
    """
    g = len(without)
    if g < 2:
        return None
    spread = np.asarray(without, np.float64)
    error = float(np.sqrt((g - 1) / g * ((spread - spread.mean()) ** 2).sum()))
    reach = float(stats.t.ppf((1 + LEVEL) / 2, g - 1)) * error
    return Interval(value - reach, value + reach)


def of_mean(values: np.ndarray) -> Interval | None:
    """The jackknife interval of the mean of (n,) values in consecutive groups."""
    cuts = groups(len(values))
    if len(cuts) < 2:
        return None
    total, n = float(values.sum()), len(values)
    left = [(total - float(values[cut].sum())) / (n - (cut.stop - cut.start)) for cut in cuts]
    return jackknife(total / n, left)
