"""Which class each generated picture of an evaluation has: a pure function of its index, for any number of workers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffussm.config.schema import Labels
from diffussm.rng import Purpose, generator


def labels(kind: Labels, counts: Sequence[int], n: int, seed: int) -> list[int]:
    """n labels.

    Args:
        kind: `data` in the proportions of the training set; `balanced` each class equally often (ADM's 50 of each of
            1,000), or once more for the first ones; `random` drawn alike and independently, as DiT does.
        counts: real pictures of each class.
        n: pictures.
        seed: of `random`; label i depends on (seed, i) alone.
    """
    if kind is Labels.balanced:
        return [i % len(counts) for i in range(n)]
    if kind is Labels.random:
        return [int(generator(seed, Purpose.LABEL, i).integers(len(counts))) for i in range(n)]
    return proportional(counts, n)


def proportional(counts: Sequence[int], n: int) -> list[int]:
    """n labels in the proportions of `counts`, rounded by the largest remainder, the classes mixed evenly."""
    exact = np.array(counts, dtype=np.float64) * n / sum(counts)
    share = np.floor(exact).astype(int)
    share[np.argsort(share - exact, kind="stable")[: n - share.sum()]] += 1
    places = [((k + 0.5) / share[label], label) for label in range(len(counts)) for k in range(share[label])]
    return [label for _, label in sorted(places)]
