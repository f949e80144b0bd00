"""First and second moments of features, in float64, so that any number of workers and batches give one result.

Raw sums (not running means) are kept: they merge by addition. In float64 they lose about 1e-12 relative to the
two-pass formula on features of order one, far below the sampling error of any distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from diffussm.errors import DataError


@dataclass(frozen=True, eq=False)
class Moments:
    """Raw moments of `n` feature vectors x of length d."""

    n: int
    """Number of feature vectors."""
    total: np.ndarray
    """Sum of x: float64 (d,)."""
    outer: np.ndarray
    """Sum of x x^T: float64 (d, d)."""

    @property
    def mean(self) -> np.ndarray:
        """Mean: float64 (d,). Raises DataError for n = 0."""
        self._require(1, "a mean")
        return self.total / self.n

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance (divided by n - 1): float64 (d, d), symmetric. Raises DataError for n < 2."""
        self._require(2, "a covariance")
        mean = self.mean  # (d,)
        return (self.outer - self.n * np.outer(mean, mean)) / (self.n - 1)

    def without(self, part: Moments) -> Moments:
        """The moments of what is left when the vectors of `part`, a subset, are taken out."""
        if part.n > self.n or part.total.shape != self.total.shape:
            raise ValueError(f"cannot take {part.n} vectors {part.total.shape} out of {self.n} {self.total.shape}")
        return Moments(self.n - part.n, self.total - part.total, self.outer - part.outer)

    def to_bytes(self) -> bytes:
        """The moments as a safetensors file: n int64 (1,), total float64 (d,), outer float64 (d, d)."""
        return save({"n": np.array([self.n], np.int64), "total": self.total, "outer": self.outer})

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "moments") -> Moments:
        """Read what `to_bytes` wrote; `name` says in an error which file it was.

        Raises:
            DataError: not such a file, or wrong shapes, types or values.
        """
        try:
            tensors = load(data)
            n, total, outer = tensors["n"], tensors["total"], tensors["outer"]
        except (SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{name}: not a file of moments: {error}", "delete it; it is made again") from error
        if n.shape != (1,) or n.dtype != np.int64 or n[0] < 0 or total.ndim != 1 or outer.shape != 2 * total.shape:
            found = f"n {n.dtype}{n.shape}, total {total.shape}, outer {outer.shape}"
            raise DataError(f"{name}: found {found}; allowed are n >= 0, (d,), (d, d)", "delete it; it is made again")
        if total.dtype != np.float64 or outer.dtype != np.float64 or not _finite(total, outer):
            raise DataError(f"{name}: the moments are not finite float64", "delete it; it is made again")
        return cls(int(n[0]), total, outer)

    def _require(self, least: int, what: str) -> None:
        if self.n < least:
            raise DataError(f"{what} needs at least {least} pictures; found {self.n}", "use more pictures")


class Accumulator:
    """Adds up the moments of features that come in batches.

    Args:
        dim: length d of a feature vector.
    """

    def __init__(self, dim: int) -> None:
        self._n = 0
        self._total = np.zeros(dim, np.float64)  # (d,)
        self._outer = np.zeros((dim, dim), np.float64)  # (d, d)

    def add(self, features: np.ndarray) -> None:
        """Add a batch (B, d) of any float type; B may be 0.

        Raises:
            ValueError: the shape is not (B, d).
            DataError: a feature is not finite.
        """
        if features.ndim != 2 or features.shape[1] != len(self._total):
            raise ValueError(f"features: found shape {features.shape}, allowed is (B, {len(self._total)})")
        wide = features.astype(np.float64)  # (B, d)
        if not _finite(wide):
            bad = int((~np.isfinite(wide).all(axis=1)).sum())
            raise DataError(f"features: {bad} of {len(wide)} vectors are not finite", "look at the pictures")
        self._n += len(wide)
        self._total += wide.sum(axis=0)
        self._outer += wide.T @ wide

    def moments(self) -> Moments:
        """What was added up so far; later batches do not change it."""
        return Moments(self._n, self._total.copy(), self._outer.copy())


def merge(parts: Sequence[Moments]) -> Moments:
    """Moments of all parts together, added in the given order, so that the result is bit-equal from run to run.

    Raises:
        ValueError: no parts, or feature lengths differ.
    """
    if not parts or len({part.total.shape for part in parts}) != 1:
        raise ValueError(f"parts: found lengths {[part.total.shape for part in parts]}; allowed: one or more, equal")
    total, outer = np.zeros_like(parts[0].total), np.zeros_like(parts[0].outer)
    for part in parts:
        total += part.total
        outer += part.outer
    return Moments(sum(part.n for part in parts), total, outer)


def _finite(*arrays: np.ndarray) -> bool:
    return all(bool(np.isfinite(array).all()) for array in arrays)
