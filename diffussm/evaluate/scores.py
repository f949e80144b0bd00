"""All scores of a set of generated features against the real ones, each with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from diffussm.errors import DataError
from diffussm.evaluate import intervals
from diffussm.evaluate.extractors import LOGITS, POOL, SPATIAL, Features
from diffussm.evaluate.intervals import Interval, jackknife
from diffussm.evaluate.manifold import precision_recall
from diffussm.evaluate.metrics import Gaussian, inception_score, kernel_sums, softmax
from diffussm.evaluate.moments import Accumulator, Moments, merge

NEIGHBOUR = 3
"""k of precision and recall."""
REFERENCE_IMAGES = 10_000
"""Real pictures whose features are kept for precision, recall and the kernel distance, as in ADM's suite."""
KERNEL_IMAGES = 10_000
"""Generated pictures of the kernel distance, the first ones: it is unbiased, and the cost grows with the square."""
DISTANCES = {POOL: "frechet", SPATIAL: "spatial"}
"""Tap -> kind of its Frechet distance."""


@dataclass(frozen=True)
class Score:
    """One number and how sure it is."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class RealSide:
    """What generated pictures are compared with."""

    statistics: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """Tap -> mean (d,) and covariance (d, d) of all real pictures."""
    features: np.ndarray
    """Pool features of some real pictures: float32 (N, d)."""

    @cached_property
    def gaussians(self) -> dict[str, Gaussian]:
        """The statistics, decomposed once for all distances."""
        return {tap: Gaussian(mean, cov) for tap, (mean, cov) in self.statistics.items()}


class Tally:
    """Takes the features of `n` generated pictures in the order of their indices, and scores them.

    Everything is added up in that order in float64, so the scores depend on how the pictures were cut into calls of
    `add` (always alike for one evaluation) and on nothing else.

    Args:
        taps: tap -> length, of the extractor.
        n: pictures that will come.
    """

    def __init__(self, taps: Mapping[str, int], n: int) -> None:
        self.n, self._seen = n, 0
        self._cuts = intervals.groups(n)
        self._sums = {tap: [Accumulator(taps[tap]) for _ in self._cuts] for tap in DISTANCES if tap in taps}
        self._kept = {tap: np.empty((n, taps[tap]), np.float32) for tap in (POOL, LOGITS) if tap in taps}

    def add(self, features: Features) -> None:
        """Add the next pictures' features.

        Raises:
            DataError: more pictures than were announced, or a feature is not finite.
        """
        first, self._seen = self._seen, self._seen + len(features[POOL])
        if self._seen > self.n:
            raise DataError(f"evaluate: found at least {self._seen} pictures, expected {self.n}")
        for tap, kept in self._kept.items():
            kept[first : self._seen] = features[tap]
        for tap, parts in self._sums.items():
            for cut, part in zip(self._cuts, parts, strict=True):
                part.add(features[tap][max(cut.start - first, 0) : max(cut.stop - first, 0)])

    def moments(self, tap: str) -> Moments:
        """Moments of everything added so far."""
        return merge([part.moments() for part in self._sums[tap]])

    def scores(self, real: RealSide, device: str | torch.device = "cpu") -> dict[str, Score]:
        """Kind -> score, for the kinds that the taps and the real side allow.

        Args:
            real: the real side, of the same extractor.
            device: where distances of precision and recall are computed.

        Raises:
            DataError: fewer than 2 pictures, or not all that were announced.
        """
        if self.n < 2 or self._seen != self.n:
            raise DataError(
                f"evaluate.images: found {self._seen} generated pictures of {self.n}; all are needed, and at least 2",
                "raise evaluate.images",
            )
        found = {
            kind: self._frechet(tap, real.gaussians[tap])
            for tap, kind in DISTANCES.items()
            if tap in self._sums and tap in real.gaussians
        }
        if LOGITS in self._kept:
            found["inception"] = self._inception()
        if len(real.features) >= 2:
            found["kernel"] = self._kernel(real.features)
        if min(len(real.features), self.n) > NEIGHBOUR:
            pair = precision_recall(real.features, self._kept[POOL], NEIGHBOUR, device)
            found["precision"] = Score(pair.precision, intervals.of_mean(pair.faithful))
            found["recall"] = Score(pair.recall, intervals.of_mean(pair.covered))
        return found

    def _frechet(self, tap: str, real: Gaussian) -> Score:
        parts = [part.moments() for part in self._sums[tap]]

        def value(kept: list[Moments]) -> float:
            whole = merge(kept)
            return real.distance(whole.mean, whole.covariance)

        without = [value(parts[:g] + parts[g + 1 :]) for g in range(len(parts))] if len(parts) > 1 else []
        return Score(all_in := value(parts), jackknife(all_in, without))

    def _inception(self) -> Score:
        p = softmax(self._kept[LOGITS])  # (n, K)
        value = inception_score(p)
        without = [inception_score(np.delete(p, cut, axis=0)) for cut in self._cuts] if len(self._cuts) > 1 else []
        return Score(value, jackknife(value, without))

    def _kernel(self, real: np.ndarray) -> Score:
        pool = self._kept[POOL][:KERNEL_IMAGES]
        cuts = intervals.groups(len(pool))
        sums = kernel_sums(real, [pool[cut] for cut in cuts])
        value = sums.value()
        return Score(value, jackknife(value, [sums.value(g) for g in range(len(cuts))] if len(cuts) > 1 else []))
