"""Distances between two sets of features: pure functions of arrays, computed in float64.

The definitions are those of ADM's evaluation suite (Dhariwal and Nichol, arXiv 2105.05233) where it has one. None of
them knows which network the features come from; the caller names the metric after it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import rel_entr

_BLOCK = 2048
"""Rows of a distance or kernel matrix that are held at a time; at 50,000 columns 0.8 GB."""


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
    mean_a, mean_b = np.asarray(mean_a, np.float64), np.asarray(mean_b, np.float64)
    cov_a, cov_b = np.asarray(cov_a, np.float64), np.asarray(cov_b, np.float64)
    dim = mean_a.shape
    if len(dim) != 1 or mean_b.shape != dim or cov_a.shape != 2 * dim or cov_b.shape != 2 * dim:
        shapes = [a.shape for a in (mean_a, cov_a, mean_b, cov_b)]
        raise ValueError(f"frechet: found shapes {shapes}; allowed are (d,), (d, d), (d,), (d, d)")
    if not all(np.isfinite(array).all() for array in (mean_a, cov_a, mean_b, cov_b)):
        raise ValueError("frechet: a mean or covariance is not finite")
    for cov in (cov_a, cov_b):
        # eigh reads one triangle only, so an asymmetric matrix would give a wrong distance without a word.
        if not np.allclose(cov, cov.T, rtol=0, atol=1e-8 * max(np.abs(cov).max(initial=0), 1e-300)):
            raise ValueError("frechet: a covariance is not symmetric")
    values, vectors = np.linalg.eigh(cov_a)  # (d,), (d, d)
    # A = R R^T, so R^T B R is similar to A^1/2 B A^1/2 and no second product with the vectors is needed.
    root = vectors * np.sqrt(values.clip(min=0))  # (d, d)
    inner = root.T @ cov_b @ root  # (d, d)
    overlap = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(min=0)).sum()
    difference = mean_a - mean_b  # (d,)
    distance = difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap
    return max(float(distance), 0.0)  # equal Gaussians leave a rounding error of either sign


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


class PrecisionRecall(NamedTuple):
    """Fidelity and coverage of generated pictures."""

    precision: float
    """Fraction of generated features inside the manifold of the real ones."""
    recall: float
    """Fraction of real features inside the manifold of the generated ones."""


def precision_recall(reference: np.ndarray, generated: np.ndarray, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991).

    A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest neighbour in
    the same set, itself not counted; the border belongs to the ball.

    Args:
        reference: (N, d), features of real pictures, N > k.
        generated: (M, d), features of generated pictures, M > k.
        k: which neighbour gives the radius.

    Raises:
        ValueError: shapes do not fit or a set has no more than k points.
    """
    real, fake = _pair("precision_recall", reference, generated)
    if k < 1 or min(len(real), len(fake)) <= k:
        raise ValueError(f"precision_recall: found {len(real)} and {len(fake)} points, k {k}; each needs more than k")
    # Distances do not change under a shift, and near the origin the expanded square below loses fewer digits.
    centre = real.mean(axis=0)  # (d,)
    real, fake = real - centre, fake - centre
    return PrecisionRecall(_covered(fake, real, k), _covered(real, fake, k))


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
    real, fake = _pair("kid", reference, generated)
    n, m = len(real), len(fake)
    if min(n, m) < 2:
        raise ValueError(f"kid: found {n} and {m} points; each set needs at least 2")
    within = (_kernel_sum(real, real) - _kernel_diagonal(real)) / (n * (n - 1))
    within += (_kernel_sum(fake, fake) - _kernel_diagonal(fake)) / (m * (m - 1))
    return within - 2 * _kernel_sum(real, fake) / (n * m)


def _pair(name: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"{name}: found shapes {a.shape}, {b.shape}; allowed are (N, d), (M, d)")
    if not np.isfinite(a).all() or not np.isfinite(b).all():
        raise ValueError(f"{name}: a feature is not finite")
    return a, b


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2 * (a @ b.T)  # (N, M)
    return squares.clip(min=0)


def _radii(points: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each point to its k-th nearest other point: (N,)."""
    radii = np.empty(len(points))
    for start in range(0, len(points), _BLOCK):
        block = points[start : start + _BLOCK]  # (m, d)
        squares = _squared_distances(block, points)  # (m, N)
        rows = np.arange(len(block))
        squares[rows, start + rows] = np.inf  # a point is not its own neighbour
        radii[start + rows] = np.partition(squares, k - 1, axis=1)[:, k - 1]
    return radii


def _covered(queries: np.ndarray, points: np.ndarray, k: int) -> float:
    """Fraction of queries that lie inside the manifold of the points."""
    radii = _radii(points, k)  # (N,)
    inside = 0
    for start in range(0, len(queries), _BLOCK):
        squares = _squared_distances(queries[start : start + _BLOCK], points)  # (m, N)
        inside += int((squares <= radii).any(axis=1).sum())
    return inside / len(queries)


def _kernel_sum(a: np.ndarray, b: np.ndarray) -> float:
    blocks = range(0, len(a), _BLOCK)
    return sum(float(((a[s : s + _BLOCK] @ b.T / a.shape[1] + 1) ** 3).sum()) for s in blocks)


def _kernel_diagonal(a: np.ndarray) -> float:
    return float((((a * a).sum(axis=1) / a.shape[1] + 1) ** 3).sum())
