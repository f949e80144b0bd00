"""Distances between two sets of features: pure functions of arrays, computed in float64.

The definitions are those of ADM's evaluation suite (Dhariwal and Nichol, arXiv 2105.05233) where it has one. None of
them knows which network the features come from; the caller names the metric after it. Precision and recall, which
are about neighbours, are in `manifold`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, rel_entr

_BLOCK = 2048
"""Rows of a kernel matrix that are held at a time; at 10,000 columns 0.16 GB."""


def frechet(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Frechet (2-Wasserstein, squared) distance of two Gaussians (Heusel et al., arXiv 1706.08500, eq. 6).

    |a - b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2, the last term from two symmetric eigendecompositions with
    eigenvalues clipped at 0. Covariances of fewer pictures than dimensions are singular; that is no problem here.

    Args:
        mean_a, mean_b: (d,).
        cov_a, cov_b: (d, d), symmetric.

    Returns:
        The distance, >= 0, in squared units of the features.

    Raises:
        ValueError: shapes do not fit, a covariance is not symmetric, or a value is not finite.
    """
    return Gaussian(mean_a, cov_a).distance(mean_b, cov_b)


class Gaussian:
    """One side of many Frechet distances: its eigendecomposition is made once.

    Args:
        mean: (d,).
        cov: (d, d), symmetric.

    Raises:
        ValueError: shapes do not fit, the covariance is not symmetric, or a value is not finite.
    """

    def __init__(self, mean: np.ndarray, cov: np.ndarray) -> None:
        self.mean, self.cov = _checked(mean, cov)
        values, vectors = np.linalg.eigh(self.cov)  # (d,), (d, d)
        # A = R R^T, so R^T B R is similar to A^1/2 B A^1/2 and no second product with the vectors is needed.
        self._root = vectors * np.sqrt(values.clip(min=0))  # (d, d)

    def distance(self, mean: np.ndarray, cov: np.ndarray) -> float:
        """Frechet distance to another Gaussian; see `frechet`."""
        mean, cov = _checked(mean, cov)
        if mean.shape != self.mean.shape:
            raise ValueError(f"frechet: found shapes {self.mean.shape}, {mean.shape}; allowed are equal ones")
        inner = self._root.T @ cov @ self._root  # (d, d)
        overlap = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(min=0)).sum()
        difference = self.mean - mean  # (d,)
        distance = difference @ difference + np.trace(self.cov) + np.trace(cov) - 2 * overlap
        return max(float(distance), 0.0)  # equal Gaussians leave a rounding error of either sign


def _checked(mean: np.ndarray, cov: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    if mean.ndim != 1 or cov.shape != 2 * mean.shape:
        raise ValueError(f"frechet: found shapes {mean.shape}, {cov.shape}; allowed are (d,), (d, d)")
    if not np.isfinite(mean).all() or not np.isfinite(cov).all():
        raise ValueError("frechet: a mean or covariance is not finite")
    # eigh reads one triangle only, so an asymmetric matrix would give a wrong distance without a word.
    if not np.allclose(cov, cov.T, rtol=0, atol=1e-8 * max(np.abs(cov).max(initial=0), 1e-300)):
        raise ValueError("frechet: a covariance is not symmetric")
    return mean, cov


def softmax(logits: np.ndarray) -> np.ndarray:
    """Class probabilities of logits (n, K), in float64."""
    return np.exp(log_softmax(np.asarray(logits, np.float64), axis=1))


def inception_score(probabilities: np.ndarray, split: int = 5000) -> float:
    """Inception score (Salimans et al., arXiv 1606.03498): mean over splits of exp(mean KL(p(y|x) || p(y))).

    Splits are consecutive; a last one that is shorter counts like the others, as in ADM's suite.

    Args:
        probabilities: (n, K), class probabilities of the generated pictures; rows sum to 1.
        split: pictures in one split.

    Returns:
        The score, between 1 and K.

    Raises:
        ValueError: not a non-empty matrix of probabilities, or split < 1.
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2 or 0 in p.shape or split < 1:
        raise ValueError(f"inception_score: found shape {p.shape}, split {split}; allowed are (n, K), split >= 1")
    if not (p >= 0).all() or not np.allclose(p.sum(axis=1), 1, rtol=0, atol=1e-3):
        raise ValueError("inception_score: rows are not probabilities that sum to 1")
    scores = []
    for start in range(0, len(p), split):
        part = p[start : start + split]  # (m, K)
        divergence = rel_entr(part, part.mean(axis=0)).sum(axis=1)  # (m,); 0 log 0 = 0
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def kid(reference: np.ndarray, generated: np.ndarray) -> float:
    """Kernel distance, unbiased (Binkowski et al., arXiv 1801.01401): squared MMD under (x.y / d + 1)^3.

    The estimate over all pairs, not a mean over random subsets: the same expectation, less variance, no seed. It may be
    negative when the sets do not differ.

    Args:
        reference: (N, d), N >= 2.
        generated: (M, d), M >= 2.

    Raises:
        ValueError: shapes do not fit or a set has fewer than 2 points.
    """
    return kernel_sums(reference, [generated]).value()


@dataclass(frozen=True, eq=False)
class KernelSums:
    """Sums of the kernel over pairs, the generated points in groups, so that any group can be left out."""

    real: float
    """Mean over pairs of different real points."""
    count: int
    """Real points."""
    sizes: np.ndarray
    """Points of each group: (G,)."""
    within: np.ndarray
    """Sum over pairs of different points, one from each of two groups: (G, G), symmetric."""
    across: np.ndarray
    """Sum over pairs of a point of the group and a real one: (G,)."""

    def value(self, left_out: int | None = None) -> float:
        """The kernel distance, of all points or of those outside one group."""
        kept = np.arange(len(self.sizes)) != (-1 if left_out is None else left_out)
        m = int(self.sizes[kept].sum())
        if m < 2:
            raise ValueError(f"kid: found {m} generated points; at least 2 are needed")
        within = float(self.within[np.ix_(kept, kept)].sum()) / (m * (m - 1))
        return self.real + within - 2 * float(self.across[kept].sum()) / (m * self.count)


def kernel_sums(reference: np.ndarray, groups: Sequence[np.ndarray]) -> KernelSums:
    """The sums that `kid` is made of, for generated points in groups of (M_g, d); see `kid`."""
    pairs = [_pair("kid", reference, group) for group in groups]
    real, fakes = pairs[0][0], [fake for _, fake in pairs]
    n = len(real)
    if n < 2:
        raise ValueError(f"kid: found {n} real points; at least 2 are needed")
    within = np.zeros((len(fakes), len(fakes)))
    for g, one in enumerate(fakes):
        within[g, g] = _kernel_sum(one, one) - _kernel_diagonal(one)
        for h in range(g):
            within[g, h] = within[h, g] = _kernel_sum(one, fakes[h])
    return KernelSums(
        real=(_kernel_sum(real, real) - _kernel_diagonal(real)) / (n * (n - 1)),
        count=n,
        sizes=np.array([len(fake) for fake in fakes]),
        within=within,
        across=np.array([_kernel_sum(fake, real) for fake in fakes]),
    )


def _pair(name: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"{name}: found shapes {a.shape}, {b.shape}; allowed are (N, d), (M, d)")
    if not np.isfinite(a).all() or not np.isfinite(b).all():
        raise ValueError(f"{name}: a feature is not finite")
    return a, b


def _kernel_sum(a: np.ndarray, b: np.ndarray) -> float:
    blocks = range(0, len(a), _BLOCK)
    return sum(float(((a[s : s + _BLOCK] @ b.T / a.shape[1] + 1) ** 3).sum()) for s in blocks)


def _kernel_diagonal(a: np.ndarray) -> float:
    return float((((a * a).sum(axis=1) / a.shape[1] + 1) ** 3).sum())
