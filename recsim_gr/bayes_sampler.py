"""Annealed sequential Monte Carlo for one history (Del Moral, Doucet, Jasra 2006, "Sequential Monte Carlo samplers").

Particles drawn from the prior follow a path of flattened likelihoods to the posterior (`recsim_gr.bayes_model`). The
next β is where the weights' effective sample size falls to a given share; particles are resampled (systematically) and
moved by Hamiltonian Monte Carlo, whose metric and step size come from the particles (Buchholz, Chopin, Jacob 2021).

Where events may be exogenous the posterior has as many modes as there are subsets of events that fit one user. There
each particle draws which events are ordinary, and moves given that: with a metric of its own, since given the flags the
curvature is known; and before it by a sweep over the flags with taste integrated out in a Gaussian approximation of the
ordinary densities, corrected by a Metropolis–Hastings step, so that the sampler stays exact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsim_gr.bayes_model import FloatArray, History, Sites, Valued
from recsim_gr.configs import require, require_finite_numbers

ACCEPTANCE = 0.75
"""Share of trajectories to be accepted, by the step size: the usual aim of Hamiltonian Monte Carlo."""

STEP_RANGE = (0.02, 1.2)
FIRST_STEP = 0.7


@dataclass(frozen=True, kw_only=True)
class BayesConfig:
    """How hard the sampler works. The defaults keep the Monte Carlo error of E[s] near 0.02 points (root mean square
    over titles and users) at 20 events and 200 titles, for 0.1 to 0.25 seconds a user; in the hardest worlds (watch
    time at dial 0.6, whose posteriors have many modes) it is 0.04."""

    particles: int = 256
    """More of them help less than more moves: the modes of a posterior are found on the way, not by numbers."""
    least_share: float = 0.7
    """Effective sample size, as a share of the particles, at which the next β is set. At the customary half the error
    at dial 0.6 of watch time, where posteriors have most modes, is 0.06 points."""
    moves: int = 1
    """Moves at every β."""
    trajectory: int = 3
    """Leapfrog steps of a move: at the step size that gives the acceptance aimed at, a quarter of a period."""
    final_moves: int = 10
    """Moves under the posterior itself, after each of which all particles count."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_finite_numbers(self)
        require(self.particles >= 64, self, "particles", "at least 64, since they estimate a covariance")
        require(0 < self.least_share < 1, self, "least_share", "between 0 and 1")
        for name in ("moves", "trajectory", "final_moves"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        require(self.seed >= 0, self, "seed", "0 or more")


class Run(NamedTuple):
    """How a run went.

    Attributes:
        log_evidence: log p(titles, scores), estimated.
        temperatures: how many β there were.
        acceptance: mean of the moves.
    """

    log_evidence: float
    temperatures: int
    acceptance: float


def anneal(history: History, config: BayesConfig, rng: np.random.Generator, visit: Callable[[FloatArray], None]) -> Run:
    """Takes particles from the prior to the posterior; ``visit`` sees them, (2d + 3, N), after each final move."""
    n = config.particles
    particles = Particles(history, rng, rng.standard_normal((history.law.dimensions, n)), config.trajectory)
    beta, before, log_evidence, temperatures = 0.0, np.zeros(n), 0.0, 0
    while temperatures == 0 or beta < 1.0:
        following = 0.0 if temperatures == 0 else _next_beta(particles, before, beta, config.least_share * n)
        after = history.log_likelihood_at(particles.valued, following)
        weights, log_mean = _weights(after - before)
        log_evidence += log_mean
        beta, temperatures = following, temperatures + 1
        particles.resample(weights, beta)
        for _ in range(config.moves):
            particles.move(beta)
        before = particles.valued.log_likelihood
    for _ in range(config.final_moves):
        particles.move(beta)
        visit(particles.z)
    return Run(log_evidence, temperatures, float(np.mean(particles.acceptance)))


class Particles:
    """N particles and the moves that leave the flattened posterior as it is."""

    def __init__(self, history: History, rng: np.random.Generator, z: FloatArray, trajectory: int) -> None:
        self.history, self.rng, self.z, self.trajectory = history, rng, z, trajectory
        self.valued: Valued = history(z, 0.0)
        self.step = FIRST_STEP
        self.acceptance: list[float] = []
        d = history.law.d
        self._scored = np.r_[0:d, 2 * d + 1]  # the coordinates that satisfaction depends on
        leniency = np.full((history.n_events, 1), history.law.leniency)
        self._by_scored = np.concatenate([history.logit_traits, leniency], axis=1)  # (T, d + 1) slopes of the logits
        squares = self._by_scored[:, :, None] * self._by_scored[:, None, :]
        self._squares = squares.reshape(history.n_events, (d + 1) ** 2)

    def resample(self, weights: FloatArray, beta: float) -> None:
        """Systematic resampling, and the metric of the moves to come."""
        n = len(weights)
        cumulative = np.cumsum(weights)
        places = (np.arange(n) + self.rng.random()) / n * cumulative[-1]
        self.z = self.z[:, np.minimum(np.searchsorted(cumulative, places), n - 1)]
        self.valued = self.history(self.z, beta)
        if self.history.mixture:
            precision = self.history.curvature(self.z, beta)
            self._inverse = _inverse(precision)
        else:
            self._inverse = np.asarray(np.cov(self.z), dtype=np.float64) + 1e-10 * np.eye(len(self.z))
            precision = _inverse(self._inverse)
        self._root: FloatArray = np.asarray(np.linalg.cholesky(precision), dtype=np.float64)

    def move(self, beta: float) -> None:
        """One move, given drawn flags where events may be exogenous."""
        if not self.history.mixture:
            for _ in range(2):  # for half the price of a move with flags
                z, valued, moved = self._trajectory(beta, self.valued, Metric(self._root, self._inverse))
                self.z = np.where(moved, z, self.z)
                self.valued = _where(moved, valued, self.valued)
            return
        assert self.valued.scores is not None
        probability = self.history.ordinary_probability(self.valued, beta)
        ordinary = self.rng.random(probability.shape) < probability
        sites = self.history.scores.sites(beta)  # type: ignore[union-attr]
        self.z, ordinary = flip(self.history, self.z, self.valued, ordinary, beta, sites, self._by_scored, self.rng)
        metric = self._metric_given(sites.precision[:, None] * ordinary)
        given = self.history(self.z, beta, ordinary)
        z, _, moved = self._trajectory(beta, given, metric, ordinary)
        self.z = np.where(moved, z, self.z)
        self.valued = self.history(self.z, beta)

    def _metric_given(self, precision: FloatArray) -> "Metric":
        """The metric of each particle, from the (T, N) precision with which its ordinary events fix their logits."""
        k, n = len(self._scored), precision.shape[1]
        added = (precision.T @ self._squares).reshape(n, k, k)
        inner = self._inverse[np.ix_(self._scored, self._scored)]
        # (P + SGSᵀ)⁻¹ = P⁻¹ − P⁻¹S(I + GQ)⁻¹GSᵀP⁻¹, Q = SᵀP⁻¹S: Woodbury
        correction = np.linalg.solve(np.eye(k) + added @ inner, added)
        kick = self._by_scored.T @ (np.sqrt(precision) * self.rng.standard_normal(precision.shape))
        return Metric(
            self._root, self._inverse, self._scored, np.ascontiguousarray(correction.transpose(1, 2, 0)), kick
        )

    def _trajectory(
        self, beta: float, start: Valued, metric: "Metric", ordinary: NDArray[np.bool_] | None = None
    ) -> tuple[FloatArray, Valued, NDArray[np.bool_]]:
        """A leapfrog trajectory: where it ends, what that is worth, and which particles accept it."""
        n = self.z.shape[1]
        z, valued = self.z, start
        step = self.step * (0.6 + 0.6 * self.rng.random(n))
        p = metric.momentum(self.rng, z.shape)
        before = start.log_likelihood - 0.5 * ((z * z).sum(axis=0) + (p * metric.velocity(p)).sum(axis=0))
        p = p + 0.5 * step * (valued.gradient - z)
        for k in range(self.trajectory):
            z = z + step * metric.velocity(p)
            valued = self.history(z, beta, ordinary)
            p = p + (step if k < self.trajectory - 1 else 0.5 * step) * (valued.gradient - z)
        after = valued.log_likelihood - 0.5 * ((z * z).sum(axis=0) + (p * metric.velocity(p)).sum(axis=0))
        with np.errstate(invalid="ignore", over="ignore"):
            probability = np.nan_to_num(np.exp(np.minimum(0.0, after - before)))
        rate = float(probability.mean())
        self.acceptance.append(rate)
        self.step = float(np.clip(self.step * np.exp(rate - ACCEPTANCE), *STEP_RANGE))
        return z, valued, self.rng.random(n) < probability


class Metric(NamedTuple):
    """A mass matrix P, the same for all particles, plus what a particle's own ordinary events add.

    Attributes:
        root: (D, D) Cholesky factor of P.
        inverse: (D, D) P⁻¹.
        scored: (k,) the coordinates that are added to; or None.
        correction: (k, k, N), see `Particles._metric_given`.
        kick: (k, N) the momentum that goes with what is added.
    """

    root: FloatArray
    inverse: FloatArray
    scored: NDArray[np.int64] | None = None
    correction: FloatArray | None = None
    kick: FloatArray | None = None

    def momentum(self, rng: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
        """(D, N) drawn from N(0, mass)."""
        p = self.root @ rng.standard_normal(shape)
        if self.kick is not None:
            p[self.scored] += self.kick
        return p

    def velocity(self, p: FloatArray) -> FloatArray:
        """(D, N): mass⁻¹·p."""
        v: FloatArray = self.inverse @ p
        if self.correction is not None:
            v -= self.inverse[:, self.scored] @ (self.correction * v[self.scored]).sum(axis=1)
        return v


def flip(
    history: History,
    z: FloatArray,
    valued: Valued,
    ordinary: NDArray[np.bool_],
    beta: float,
    sites: Sites,
    by_scored: FloatArray,
    rng: np.random.Generator,
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """New flags, and tastes and leniencies that go with them, given each particle's pull φ and discernment.

    Given φ and δ the titles say nothing more, and taste is θ = δ·φ + sqrt(1 − δ²)·ξ with ξ standard normal (both less
    the mean of the epoch): (θ, ε) → (φ, ξ) is a rotation. With the sites in place of the ordinary densities ξ and
    leniency are Gaussian given the flags, so each flag can be drawn with them integrated out. Going through the events
    in random order is reversible; what the sites miss, a Metropolis–Hastings step puts right.

    Returns:
        (2d + 3, N) particles and (T, N) flags.
    """
    d, n = history.law.d, z.shape[1]
    who = history.law.latents(z, history.epoch)
    delta, rest, taste, outside = who.discernment, who.rest, z[:d], z[d : 2 * d]
    pull = delta * taste + rest * outside
    known = history.offset[:, None] + delta * (history.logit_traits @ pull)  # (T, N) the part of the logits that stays
    logits = history.logits(z)
    before = _missed_by_sites(history, valued, ordinary, beta, sites, logits)
    scale = np.concatenate([np.broadcast_to(rest, (d, n)), np.ones((1, n))])
    state = _Regression(scale, by_scored, sites.mean[:, None] - known, sites.precision, ordinary)
    assert valued.scores is not None
    log_b = np.log(np.maximum(valued.scores.exogenous, 1e-300))
    u = rng.random(ordinary.shape)
    threshold = np.log(u) - np.log1p(-u)
    for t in rng.permutation(len(ordinary)):
        state.draw(t, threshold[t] < state.log_predictive(t) + sites.log_height[t] - log_b[t])
    drawn = state.sample(rng)
    proposal = z.copy()
    proposal[:d] = delta * pull + rest * drawn[:d]
    proposal[d : 2 * d] = rest * pull - delta * drawn[:d]
    proposal[2 * d + 1] = drawn[d]
    logits = history.logits(proposal)
    scores = history.scores(logits, z[2 * d + 2])  # type: ignore[misc]
    after = _missed_by_sites(history, valued._replace(scores=scores), state.ordinary, beta, sites, logits)
    moved = rng.random(n) < np.exp(np.minimum(0.0, after - before))
    return np.where(moved, proposal, z), np.where(moved, state.ordinary, ordinary)


class _Regression:
    """Gaussian (ξ, leniency) of each particle given its ordinary events, updated event by event.

    Args:
        scale: (k, N) what multiplies the slopes of the logits.
        slopes: (T, k).
        target: (T, N) where each event's site wants the logit, less the part of it that stays.
        precision: (T,) of the sites.
        ordinary: (T, N) flags.
    """

    def __init__(
        self,
        scale: FloatArray,
        slopes: FloatArray,
        target: FloatArray,
        precision: FloatArray,
        ordinary: NDArray[np.bool_],
    ) -> None:
        self._scale, self._slopes, self._target, self._precision = scale, slopes, target, precision
        self.ordinary = ordinary.copy()
        k, n = scale.shape
        weight = precision[:, None] * ordinary
        squares = (slopes[:, :, None] * slopes[:, None, :]).reshape(len(slopes), -1)
        gram = (weight.T @ squares).reshape(n, k, k) * (scale.T[:, :, None] * scale.T[:, None, :])
        self._covariance = np.ascontiguousarray(np.linalg.inv(np.eye(k) + gram).transpose(1, 2, 0))
        self._mean = (self._covariance * (scale * (slopes.T @ (weight * target)))).sum(axis=1)

    def log_predictive(self, t: int) -> FloatArray:
        """(N,) the log of ∫ exp(−½·precision·(logit − mean)²) under all other ordinary events."""
        slope = self._scale * self._slopes[t][:, None]
        self._gain = (self._covariance * slope).sum(axis=1)
        self._variance, self._predicted = (slope * self._gain).sum(axis=0), (slope * self._mean).sum(axis=0)
        counted = self._precision[t] * self.ordinary[t]
        without = 1.0 / (1.0 - counted * self._variance)  # takes the event itself out of what is known
        variance = self._variance * without
        mean = (self._predicted - counted * self._variance * self._target[t]) * without
        spread = variance + 1.0 / self._precision[t]
        return -0.5 * ((self._target[t] - mean) ** 2 / spread + np.log(spread * self._precision[t]))

    def draw(self, t: int, ordinary: NDArray[np.bool_]) -> None:
        """Sets the flags of an event that `log_predictive` was just asked about."""
        change = self._precision[t] * (ordinary.astype(np.float64) - self.ordinary[t])
        share = change / (1.0 + change * self._variance)
        self._mean += self._gain * (share * (self._target[t] - self._predicted))
        self._covariance -= self._gain[:, None] * (self._gain * share)
        self.ordinary[t] = ordinary

    def sample(self, rng: np.random.Generator) -> FloatArray:
        """(k, N)."""
        root = np.linalg.cholesky(np.ascontiguousarray(self._covariance.transpose(2, 0, 1)))
        noise = rng.standard_normal(self._mean.shape)
        return self._mean + np.einsum("nij,jn->in", root, noise)


def _missed_by_sites(
    history: History,
    valued: Valued,
    ordinary: NDArray[np.bool_],
    beta: float,
    sites: Sites,
    logits: FloatArray,
) -> FloatArray:
    """(N,) the log-likelihood of the ordinary events, less what the sites take it to be."""
    exact = history.flattened(valued, beta)
    gap = exact - sites.log_height[:, None] + 0.5 * sites.precision[:, None] * (logits - sites.mean[:, None]) ** 2
    return np.where(ordinary, gap, 0.0).sum(axis=0)


def _next_beta(particles: Particles, before: FloatArray, beta: float, least: float) -> float:
    """The β to go on to: 1, or where the effective sample size is about ``least``."""

    def size(candidate: float) -> float:
        weights, _ = _weights(particles.history.log_likelihood_at(particles.valued, candidate) - before)
        return float(weights.sum() ** 2 / (weights @ weights))

    if size(1.0) >= least:
        return 1.0
    low, high = beta, 1.0
    for _ in range(60):
        candidate = np.sqrt(low * high) if low > 0 and high > 4 * low else 0.5 * (low + high)
        reached = size(candidate)
        if abs(reached - least) < 0.04 * least:
            break
        low, high = (candidate, high) if reached > least else (low, candidate)
    return float(candidate)


def _inverse(matrix: FloatArray) -> FloatArray:
    return np.asarray(np.linalg.inv(matrix), dtype=np.float64)


def _weights(log_weights: FloatArray) -> tuple[FloatArray, float]:
    """Weights up to a factor, and the log of their mean."""
    top = log_weights.max()
    weights = np.exp(log_weights - top)
    return weights, float(top + np.log(weights.mean()))


def _where(moved: NDArray[np.bool_], new: Valued, old: Valued) -> Valued:
    """Particle by particle."""
    scores = None
    if new.scores is not None and old.scores is not None:
        scores = type(new.scores)(*(np.where(moved, a, b) for a, b in zip(new.scores, old.scores, strict=True)))
    log_likelihood, gradient, choices = (np.where(moved, a, b) for a, b in zip(new[:3], old[:3], strict=True))
    return Valued(log_likelihood, gradient, choices, scores)
