"""Pure functions of arrays: ranking metrics, and figures that describe a policy or a relation."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def top_k(scores: NDArray[Any], k: int) -> NDArray[np.int64]:
    """(n, k) titles of the highest scores, best first; of equal scores the lower index comes first.

    Args:
        scores: (n, I), -inf for titles that must not be chosen.
        k: list length; cut to I.
    """
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def rank_of(scores: NDArray[Any], titles: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) rank of one title a row, from 1; of equal scores the lower index comes first, as in `top_k`."""
    own = np.take_along_axis(scores, titles[:, None], axis=1)
    earlier = (scores == own) & (np.arange(scores.shape[1]) < titles[:, None])
    return 1 + (scores > own).sum(axis=1) + earlier.sum(axis=1)


def ndcg(ranks: NDArray[np.int64], k: int) -> FloatArray:
    """(n,) NDCG@k with one relevant title at ``ranks``: 1/log2(1 + rank) within the first k, else 0."""
    return np.where(ranks <= k, 1.0 / np.log2(1.0 + ranks), 0.0)


def hit_rate(ranks: NDArray[np.int64], k: int) -> FloatArray:
    """(n,) 1 where the relevant title is among the first k."""
    return (ranks <= k).astype(np.float64)


def reciprocal_rank(ranks: NDArray[np.int64]) -> FloatArray:
    """(n,) 1/rank of the relevant title; its mean is MRR."""
    return 1.0 / ranks


def entropy(log_probs: FloatArray) -> FloatArray:
    """(n,) in nats of (n, I) log-probabilities."""
    return -_expectation(log_probs, log_probs)


def kl_divergence(log_probs: FloatArray, reference: FloatArray) -> FloatArray:
    """(n,) KL(π ‖ π_ref) in nats; inf where π has weight and the reference none."""
    return _expectation(log_probs, log_probs) - _expectation(log_probs, reference)


def effective_sample_share(log_probs: FloatArray, logging: FloatArray) -> float:
    """E_μ[w]² / E_μ[w²] with w = π/μ, over contexts and actions: the share of a log that tells about π. Exact."""
    with np.errstate(invalid="ignore"):
        second = np.where(np.isneginf(log_probs), -np.inf, 2.0 * log_probs - logging)
    return float(1.0 / np.exp(second).sum(axis=1).mean())


def gini(counts: NDArray[Any]) -> float:
    """Gini coefficient of non-negative counts: 0 for equal ones, towards 1 where few hold all; 0 for all zeros."""
    ordered = np.sort(np.asarray(counts, dtype=np.float64))
    total = ordered.sum()
    if total == 0:
        return 0.0
    n = len(ordered)
    return float((2.0 * np.arange(1, n + 1) - n - 1) @ ordered / (n * total))


def signed_squared_correlation(x: NDArray[Any], y: NDArray[Any]) -> float:
    """corr(x, y)² with the sign of the correlation, over all entries; 0 where one does not vary."""
    x = np.asarray(x, dtype=np.float64) - np.mean(x)
    y = np.asarray(y, dtype=np.float64) - np.mean(y)
    covariance, spread = (x * y).sum(), (x * x).sum() * (y * y).sum()
    if spread <= 0:
        return 0.0
    return float(np.sign(covariance) * min(1.0, covariance**2 / spread))  # rounding can leave it just above 1


def _expectation(log_probs: FloatArray, values: FloatArray) -> FloatArray:
    """(n,) Σ_a π(a)·value(a), where titles without weight count as 0 whatever their value."""
    weight = np.exp(log_probs)
    with np.errstate(invalid="ignore"):
        return np.where(weight > 0, weight * values, 0.0).sum(axis=1)
