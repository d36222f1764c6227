"""Exponential weighting in tabular contexts, where a policy's optimum and its value are exact: the arithmetic.

Notation: μ logging policy, s satisfaction, r = s + ε observed score, λ temperature, V(π) = Σ_a π(a)·s(a). Arrays are
(n, I): contexts and titles; events of a log are (n, m), contexts and draws.

Whatever the scores, π ∝ μ·exp(r/λ) is the policy of highest E_π[r] − λ·KL(π‖μ), so that

    E_π[r] − E_μ[r] = λ·(KL(π‖μ) + KL(μ‖π)) ≥ 0,
    V(π) − V(μ) = E_π[r] − E_μ[r] − Σ_a (π − μ)(a)·ε(a).

With one score a title and ε σ-sub-Gaussian, all |ε(a)| are at most b = σ·sqrt(2 ln(2|A|/δ)) with probability 1 − δ (a
union bound), and the last sum is at most b·‖π − μ‖₁ ≤ 2b. That is the bound which arXiv:2603.10279 is noted with,
V(π) ≥ V(μ) − 2b (`promised_loss`), and on the way to it one that says something of λ (`certificate`), for λ = ∞ even
0 ≥ 0. The derivation is ours; the full text is not at hand.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from recsim_gr.randomness import uniforms
from recsim_gr.reward_baselines import credibility
from recsim_gr.scoring import FloatArray


def promised_loss(sigma: float, n_titles: int, delta: float) -> float:
    """2σ·sqrt(2 ln(2|A|/δ)): what exponential weighting may cost below V(μ), with probability 1 − δ."""
    if sigma < 0 or n_titles < 1 or not 0 < delta < 1:
        raise ValueError(
            f"promised_loss takes σ ≥ 0, a title or more and 0 < δ < 1, got {sigma}, {n_titles} and {delta}"
        )
    return 2.0 * sigma * float(np.sqrt(2.0 * np.log(2.0 * n_titles / delta)))


def largest_deviation(room: float, n_titles: int, delta: float) -> float:
    """The σ at which `promised_loss` is ``room``: above it the bound says nothing."""
    return room / promised_loss(1.0, n_titles, delta)


def tilted(log_weights: FloatArray, rewards: FloatArray, temperature: float) -> FloatArray:
    """(n, I) probabilities in proportion to exp(log_weights + rewards/λ); 0 where a log-weight is -inf."""
    if log_weights.shape != rewards.shape or log_weights.ndim != 2:
        raise ValueError(f"tilted takes two (n, I) arrays, got {log_weights.shape} and {rewards.shape}")
    return _softmax(log_weights + rewards / temperature)


def certificate(policy: FloatArray, base: FloatArray, rewards: FloatArray, half_bound: float) -> FloatArray:
    """(n,) what V(π) − V(μ) is at least where all |ε| ≤ b: E_π[r] − E_μ[r] − b·‖π − μ‖₁, from observed scores alone."""
    moved = policy - base
    gained: FloatArray = (moved * np.where(base > 0, rewards, 0.0)).sum(axis=1)
    return gained - half_bound * np.abs(moved).sum(axis=1)


# ------------------------------------------------------------------------------------------------------------- logs


@dataclass(frozen=True, eq=False)
class ContextLog:
    """Events of every context, drawn from μ with scores of their own.

    Attributes:
        titles: (n, m) int64.
        scores: (n, m).
        n_titles: I.
    """

    titles: NDArray[np.int64]
    scores: FloatArray
    n_titles: int

    def first(self, events: int) -> "ContextLog":
        """The log of the first events of each context."""
        return ContextLog(self.titles[:, :events], self.scores[:, :events], self.n_titles)

    def spread(self, values: FloatArray) -> FloatArray:
        """(n, I): sums of (n, m) values of events by title."""
        n, size = len(self.titles), self.n_titles
        place = (self.titles + size * np.arange(n)[:, None]).ravel()
        sums: FloatArray = np.bincount(place, weights=values.ravel(), minlength=n * size).astype(np.float64)
        return sums.reshape(n, size)

    def shares(self) -> FloatArray:
        """(n, I): μ̂, the share of each title."""
        return self.spread(np.ones(self.scores.shape)) / self.scores.shape[1]

    def exp_weighted(self, temperature: float) -> FloatArray:
        """(n, I): the optimum of Exp-RSFT on this log, Σ_{events of a} exp(r/λ) over all."""
        return self.spread(self.event_weights(temperature))

    def event_weights(self, temperature: float) -> FloatArray:
        """(n, m): exp(r/λ) of each event over the context's sum."""
        return _softmax(self.scores / temperature)

    def title_means(self) -> FloatArray:
        """(n, I): r̂, each title's mean score shrunk to its context's by credibility, as `TitleMean` does: nothing is
        tuned, and a title without an event has the context's mean."""
        n, size = len(self.titles), self.n_titles
        overall = self.scores.mean(axis=1, keepdims=True)
        above = self.scores - overall
        place = self.titles + size * np.arange(n)[:, None]
        strength = credibility(above.ravel(), np.unique(place, return_inverse=True)[1].ravel())
        count = self.spread(np.ones(above.shape))
        effect = np.divide(self.spread(above), count + strength, out=np.zeros((n, size)), where=count > 0)
        return overall + effect

    def advantage_weighted(self, means: FloatArray, temperature: float) -> FloatArray:
        """(n, I): the optimum of A-SFT on this log with r̂ = ``means``, μ̂·exp(r̂/β)/Z (its baseline cancels; weights
        are not clipped)."""
        with np.errstate(divide="ignore"):
            return tilted(np.log(self.shares()), means, temperature)


@dataclass(frozen=True, eq=False)
class Tables:
    """Contexts of a world as tables.

    Attributes:
        seed, users: (n,) what noise and logs are keyed by.
        log_mu: (n, I) exact log-propensities, -inf where a title cannot be chosen.
        satisfaction: (n, I).
        sigma: deviation of the noise.
    """

    seed: int
    users: NDArray[np.int64]
    log_mu: FloatArray
    satisfaction: FloatArray
    sigma: float

    @cached_property
    def mu(self) -> FloatArray:
        """(n, I)."""
        return np.exp(self.log_mu)

    def value(self, policy: FloatArray) -> FloatArray:
        """(n,): V(π)."""
        result: FloatArray = (policy * self.satisfaction).sum(axis=1)
        return result

    def greedy_value(self, policy: FloatArray) -> FloatArray:
        """(n,): satisfaction with the likeliest title."""
        return np.take_along_axis(self.satisfaction, policy.argmax(axis=1)[:, None], axis=1)[:, 0]

    def scores_of_all(self, purpose: str) -> FloatArray:
        """(n, I): one observed score of every title."""
        return self.satisfaction + self.sigma * self._normals(purpose, self.satisfaction.shape[1])

    def log(self, events: int, purpose: str) -> ContextLog:
        """Draws from μ, with replacement; logs that differ in σ alone share titles and draws of the noise."""
        u = uniforms(self.seed, f"noise bounds: titles, {purpose}", self.users, events)
        titles = draw(self.mu, u)
        mean = np.take_along_axis(self.satisfaction, titles, axis=1)
        return ContextLog(titles, mean + self.sigma * self._normals(purpose, events), self.mu.shape[1])

    def _normals(self, purpose: str, count: int) -> FloatArray:
        return np.asarray(ndtri(uniforms(self.seed, f"noise bounds: scores, {purpose}", self.users, count)))


def draw(probabilities: FloatArray, u: FloatArray) -> NDArray[np.int64]:
    """(n, m) titles by inverse CDF: (n, I) probabilities, (n, m) uniforms in (0, 1)."""
    rows = []
    for cumulative, likeliest, marks in zip(probabilities.cumsum(axis=1), probabilities.argmax(axis=1), u, strict=True):
        place = np.searchsorted(cumulative, marks * cumulative[-1], side="right")
        rows.append(np.where(place < len(cumulative), place, likeliest))  # a mark that was rounded up to the end
    return np.stack(rows).astype(np.int64)


def _softmax(logits: FloatArray) -> FloatArray:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))
