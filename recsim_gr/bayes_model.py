"""What the histories of one simulated world say of their users: priors, likelihoods and gradients.

A user's latents are one vector of independent standard normals, ``z`` = (taste θ less the epoch's mean, outside
suggestions ε, discernment, leniency, free time): every law of the world is a function of normals. N particles stand in
the columns of a (2d + 3, N) array. The likelihood of a history has two factors: its titles (`Choices`) and its scores
(`EventScores`, or `MoodScores` where events share a mood).

Between prior and posterior stands a path in β from 0 to 1. Choices, and scores of additive noise, enter as
likelihood^β. Where an event may be exogenous its likelihood is a sum, A(satisfaction) + B(free time); there only A is
flattened, to C_β·A^β with the constant that leaves its mean under the prior as it is. A power of the sum would have
narrow wells in a flat plain from the beginning, which particles find by luck; this path widens the wells.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, expit, ndtr

from recsim_gr.behaviour import acceptance_probability
from recsim_gr.errors import ConfigError
from recsim_gr.noise import Exposure
from recsim_gr.observations import HIGHEST_SCORE, LOWEST_SCORE
from recsim_gr.world import World
from recsim_gr.world_base import (
    CARRY_OVER_HOURS,
    HOURS_BETWEEN_SESSIONS,
    HOURS_WITHIN_SESSION,
    NEW_SESSION_PROBABILITY,
)

FloatArray = NDArray[np.float64]

NORMAL_RANGE = 8.0
"""Tables over a standard normal reach this far: beyond lie 10⁻¹⁵ of it."""

LOGIT_STEP = 0.01
"""Nodes of the tables over satisfaction's logit; the narrowest score (5 % of the length) is five of them wide at the
least, so that linear interpolation is right to 0.005 nats."""

NO_FREE_TIME = 1e-12
"""Share of the median free time in whose limit no event is exogenous."""

NEAREST_TO_LOWEST = 4e-6
"""A bounded score is taken to be at least this much above the lowest, of which no ordinary event is capable."""

TINY = 1e-300


class Table:
    """R functions on one grid, interpolated linearly.

    Args:
        values: (R, G).
        low, high: the ends of the grid; what lies outside is taken at the ends.
    """

    def __init__(self, values: FloatArray, low: float, high: float) -> None:
        self.n_rows, self.n_nodes = values.shape
        self.low, self.step = low, (high - low) / (self.n_nodes - 1)
        self.nodes = np.linspace(low, high, self.n_nodes)
        self.values = values
        self._flat = np.ascontiguousarray(values).ravel()
        self._rise = np.diff(values, axis=1, append=values[:, -1:]).ravel()
        self._row = (np.arange(self.n_rows) * self.n_nodes)[:, None]

    def __call__(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(R, N) values and slopes at x, (R, N) or (N,)."""
        place = np.clip((x - self.low) / self.step, 0.0, self.n_nodes - 1.000001)
        cell = place.astype(np.int64)
        at = cell + self._row
        rise = self._rise.take(at)
        return self._flat.take(at) + (place - cell) * rise, rise / self.step


class Latents(NamedTuple):
    """Particles in the world's own terms; d rows or one, N columns.

    Attributes:
        taste: (d, N) θ.
        outside: (d, N) ε.
        discernment, rest: (N,) δ and sqrt(1 − δ²).
        discernment_slope, rest_slope: (N,) their derivatives by the normal coordinate.
    """

    taste: FloatArray
    outside: FloatArray
    discernment: FloatArray
    rest: FloatArray
    discernment_slope: FloatArray
    rest_slope: FloatArray

    @property
    def pull(self) -> FloatArray:
        """(d, N): φ = δ·θ + sqrt(1 − δ²)·ε."""
        return self.discernment * self.taste + self.rest * self.outside

    @property
    def weights(self) -> FloatArray:
        """(d + 1, N): (φ, 1 − δ), what utilities are linear in."""
        return np.concatenate([self.pull, (1.0 - self.discernment)[None]])


class UserLaw:
    """The prior of a world's users, and what titles are to them: what all histories share.

    Raises:
        ConfigError: the noise model is not one that the path knows how to flatten.
    """

    def __init__(self, world: World) -> None:
        config = world.config
        self.world, self.d = world, config.taste_dimensions
        self.dimensions = 2 * self.d + 3
        a = config.satisfaction_slope
        self.leniency = a * config.leniency_deviation
        self.logit_traits, self.logit_quality = a * world.traits, a * world.quality
        self.logit_deviation = a * float(np.hypot(1.0, config.leniency_deviation))
        x = np.linspace(-NORMAL_RANGE, NORMAL_RANGE, 3_201)
        alpha, beta = config.discernment_alpha, config.discernment_beta
        delta = betaincinv(alpha, beta, ndtr(x))
        rest = np.sqrt(betaincinv(beta, alpha, ndtr(-x)) * (1.0 + delta))  # 1 − δ from its own tail: exact near 1
        table = np.stack([delta, rest, np.gradient(delta, x), np.gradient(rest, x)])
        self._discernment = Table(table, -NORMAL_RANGE, NORMAL_RANGE)
        self._traits32 = self.logit_traits.astype(np.float32)
        centres = self.logit_quality + world.taste_centres @ self.logit_traits.T  # (epochs, I)
        self._centres32 = centres.astype(np.float32)
        reach = float(np.abs(centres).max()) + NORMAL_RANGE * max(self.logit_deviation, LOGIT_STEP)
        self.logit_reach, self.n_nodes = reach, max(int(2 * reach / LOGIT_STEP), 64)
        self.free_time = Table(np.zeros((1, 481)), -NORMAL_RANGE, NORMAL_RANGE).nodes  # of its normal coordinate
        self.minutes = config.free_time_median_minutes * np.exp(config.free_time_log_deviation * self.free_time)

    def latents(self, z: FloatArray, epoch: int) -> Latents:
        """The particles as tastes, suggestions and discernment."""
        d = self.d
        table, _ = self._discernment(z[2 * d])
        return Latents(z[:d] + self.world.taste_centres[epoch][:, None], z[d : 2 * d], *table)

    def satisfaction(self, z: FloatArray, epoch: int) -> NDArray[np.float32]:
        """(I, N)."""
        logit = self._traits32 @ z[: self.d].astype(np.float32)
        logit += self._centres32[epoch][:, None]
        logit += (self.leniency * z[2 * self.d + 1]).astype(np.float32)
        np.exp(np.negative(logit, out=logit), out=logit)
        logit += 1.0
        np.divide(np.float32(HIGHEST_SCORE - LOWEST_SCORE), logit, out=logit)
        logit += np.float32(LOWEST_SCORE)
        return logit

    def acceptance(self, latents: Latents, epoch: int, released: NDArray[np.bool_]) -> FloatArray:
        """(I, N): P(a recommended title is watched)."""
        utilities = self.utility_traits(epoch) @ latents.weights
        top = utilities[released].max(axis=0)
        outside = top + np.log(np.exp(utilities[released] - top).mean(axis=0))
        return acceptance_probability(utilities, outside, self.world.config.accept)

    def utility_traits(self, epoch: int) -> FloatArray:
        """(I, d + 1): utilities are these, times `Latents.weights`."""
        pull = self.world.config.pull_strength * self.world.traits
        return np.concatenate([pull, self.world.appeal[epoch][:, None]], axis=1)


# ------------------------------------------------------------------------------------------------------------ titles


class Choices:
    """The likelihood of a history's titles: Plackett–Luce, in order.

    Args:
        traits: (I, d + 1), see `UserLaw.utility_traits`.
        titles: (T,) in order.
        open_titles: (I,) which titles are out.
    """

    def __init__(self, traits: FloatArray, titles: NDArray[np.int64], open_titles: NDArray[np.bool_]) -> None:
        left = open_titles.copy()
        left[titles] = False
        self.unseen = np.flatnonzero(left)
        self.chosen = traits[titles]
        self.left = traits[left]
        self._left32 = self.left.astype(np.float32)
        self._left32_t = np.ascontiguousarray(self._left32.T)
        self._sum = self.chosen.sum(axis=0)[:, None]

    def __call__(self, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(N,) log-likelihood and (d + 1, N) gradient by the weights."""
        mass, top = self._mass_left(weights)
        if len(self.chosen) == 0:
            return np.zeros(weights.shape[1]), np.zeros_like(weights)
        utility = self.chosen @ weights
        highest = np.maximum(top, utility.max(axis=0))
        share = np.exp(top - highest)
        e = np.exp(utility - highest)
        remaining = _sums_to_the_end(mass.sum(axis=0, dtype=np.float64) * share, e)
        log_likelihood = utility.sum(axis=0) - np.log(remaining).sum(axis=0) - len(utility) * highest
        weight = np.tri(len(remaining)) @ (1.0 / remaining)  # a title counts at every step until it is chosen
        gradient = self._sum - self.chosen.T @ (e * weight) - (self._left32_t @ mass) * (share * weight[-1])
        return log_likelihood, gradient

    def next_probabilities(self, weights: FloatArray) -> FloatArray:
        """(U,): P(next title) of the unseen titles, averaged over particles."""
        mass, _ = self._mass_left(weights)
        return (mass @ (1.0 / mass.sum(axis=0, dtype=np.float64))) / weights.shape[1]

    def curvature(self, weights: FloatArray) -> FloatArray:
        """(d + 1, d + 1): minus the Hessian at one (d + 1,) vector of weights."""
        left, chosen = self.left @ weights, self.chosen @ weights
        highest = max(left.max(initial=-np.inf), chosen.max(initial=-np.inf))
        mass, e = np.exp(left - highest), np.exp(chosen - highest)
        remaining = _sums_to_the_end(mass.sum(), e)
        weight = np.cumsum(1.0 / remaining)
        mean = _sums_to_the_end(mass @ self.left, e[:, None] * self.chosen) / remaining[:, None]
        second = (self.left.T * (mass * weight[-1])) @ self.left + (self.chosen.T * (e * weight)) @ self.chosen
        return second - mean.T @ mean

    def _mass_left(self, weights: FloatArray) -> tuple[NDArray[np.float32], FloatArray]:
        """exp(utility − top) of the titles left over, (U, N), and top, (N,)."""
        utility = self._left32 @ weights.astype(np.float32)
        top = utility.max(axis=0)
        utility -= top
        return np.exp(utility, out=utility), top.astype(np.float64)


class CarriedChoices(Choices):
    """The same where earlier titles carry over to later choices (``order_effect``).

    Args:
        carried: (T, I) what is added to each utility at each step; -inf for titles that cannot be chosen.
        carried_next: (I,) what the titles seen would add right after the last of them; it fades until the next choice.
    """

    def __init__(
        self,
        traits: FloatArray,
        titles: NDArray[np.int64],
        open_titles: NDArray[np.bool_],
        carried: FloatArray,
        carried_next: FloatArray,
    ) -> None:
        super().__init__(traits, titles, open_titles)
        self._traits = traits
        self._factor = np.exp(carried)
        self._constant = float(np.take_along_axis(carried, titles[:, None], axis=1).sum())
        self._fading, self._fading_law = _fading_law()
        self._next = carried_next[self.unseen]

    def __call__(self, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
        utility = self._traits @ weights
        top = utility.max(axis=0)
        mass = np.exp(utility - top)
        remaining = np.maximum(self._factor @ mass, TINY)
        log_likelihood = (self.chosen @ weights - np.log(remaining) - top).sum(axis=0) + self._constant
        gradient = self._sum - self._traits.T @ (mass * (self._factor.T @ (1.0 / remaining)))
        return log_likelihood, gradient

    def next_probabilities(self, weights: FloatArray) -> FloatArray:
        mass, _ = self._mass_left(weights)
        total = np.zeros(len(mass))
        for fading, probability in zip(self._fading, self._fading_law, strict=True):
            then = mass * np.exp(fading * self._next)[:, None]
            total += probability * (then @ (1.0 / then.sum(axis=0)))
        return total / weights.shape[1]

    def curvature(self, weights: FloatArray) -> FloatArray:
        utility = self._traits @ weights
        mass = self._factor * np.exp(utility - utility.max())
        mass /= np.maximum(mass.sum(axis=1, keepdims=True), TINY)
        mean = mass @ self._traits
        return (self._traits.T * mass.sum(axis=0)) @ self._traits - mean.T @ mean


def _fading_law(nodes: int = 12) -> tuple[FloatArray, FloatArray]:
    """Values and probabilities of exp(−gap/2 h), the gap before a next event unknown: Gauss–Legendre in the
    quantile of each kind of gap; exp(−gap/2 h) = U^(mean gap/2 h)."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    quantile, w = 0.5 * (x + 1.0), 0.5 * w
    values = [quantile ** (mean / CARRY_OVER_HOURS) for mean in (HOURS_BETWEEN_SESSIONS, HOURS_WITHIN_SESSION)]
    return np.concatenate(values), np.concatenate([NEW_SESSION_PROBABILITY * w, (1.0 - NEW_SESSION_PROBABILITY) * w])


def _sums_to_the_end(rest: FloatArray, terms: FloatArray) -> FloatArray:
    """(T, …): rest plus the sum of terms[t:], for every t."""
    return np.tri(len(terms)).T @ terms + rest  # a product is several times faster than a cumulative sum


# ------------------------------------------------------------------------------------------------------------ scores


class Sites(NamedTuple):
    """Gaussians in place of each event's flattened ordinary density, of the same first moments under the prior:
    exp(log_height − ½·precision·(logit − mean)²), (T,) each."""

    mean: FloatArray
    precision: FloatArray
    log_height: FloatArray


class ScoreValues(NamedTuple):
    """What scores say of particles, before flattening.

    Attributes:
        ordinary: (T, N) log A; or (1, N), the log-likelihood of all events, where they are not independent.
        ordinary_slope: (T, N) its derivatives by the logits.
        exogenous: (T, N) B; empty where no event is.
        exogenous_slope: (T, N) by the coordinate of free time.
    """

    ordinary: FloatArray
    ordinary_slope: FloatArray
    exogenous: FloatArray
    exogenous_slope: FloatArray


class EventScores:
    """Scores of events that are independent given the user, from tables over satisfaction's logit and free time.

    Args:
        law: of the users.
        score: (T,).
        titles, epoch: of the events.
        offset: (T,) the prior mean of the logits.
    """

    def __init__(
        self, law: UserLaw, score: FloatArray, titles: NDArray[np.int64], epoch: int, offset: FloatArray
    ) -> None:
        self._offset, self._variance = offset, law.logit_deviation**2
        nodes = np.linspace(-law.logit_reach, law.logit_reach, law.n_nodes)
        density = event_density(law.world, score, titles, epoch)
        no_time = np.array(NO_FREE_TIME * law.world.config.free_time_median_minutes)
        log_a = np.maximum(density(nodes[:, None], no_time).T, -1e6)
        self._ordinary = Table(log_a, -law.logit_reach, law.logit_reach)
        # where A is nothing, at the end of the range that is farther from the score, the density is B
        far = np.where(log_a[:, 0] < log_a[:, -1], nodes[0], nodes[-1])
        far = np.broadcast_to(far, (len(law.minutes), len(score)))
        b = np.exp(density(far, law.minutes[:, None])).T - np.exp(np.minimum(log_a[:, :1], log_a[:, -1:]))
        self.mixture = bool(b.max(initial=0.0) > 1e-12)
        self._exogenous = Table(b, -NORMAL_RANGE, NORMAL_RANGE)
        # for integrals over the prior; every second node
        self._nodes, self._log_a = nodes[::2], log_a[:, ::2]
        log_prior = -0.5 * (self._nodes - offset[:, None]) ** 2 / max(self._variance, LOGIT_STEP**2)
        self._log_prior = log_prior - _log_sum_exp(log_prior)
        self._log_mean = _log_sum_exp(self._log_a + self._log_prior)
        self._constant: tuple[float, FloatArray] | None = None

    def __call__(self, logits: FloatArray, free_time: FloatArray) -> ScoreValues:
        """At (T, N) logits and (N,) coordinates of free time."""
        ordinary, slope = self._ordinary(logits)
        if not self.mixture:
            return ScoreValues(ordinary, slope, logits[:0], logits[:0])
        return ScoreValues(ordinary, slope, *self._exogenous(free_time))

    def log_constant(self, beta: float) -> FloatArray:
        """(T, 1) log C_β: E_prior[C_β·A^β] = E_prior[A]."""
        if self._constant is None or self._constant[0] != beta:  # asked for at every step of a trajectory
            self._constant = beta, self._log_mean - _log_sum_exp(beta * self._log_a + self._log_prior)
        return self._constant[1]

    def sites(self, beta: float) -> Sites:
        """See `Sites`."""
        flattened = beta * self._log_a + self._log_prior
        log_total = _log_sum_exp(flattened)
        weight = np.exp(flattened - log_total)
        mean = weight @ self._nodes
        variance = (weight * (self._nodes - mean[:, None]) ** 2).sum(axis=1)
        prior = max(self._variance, LOGIT_STEP**2)
        precision = np.maximum(1.0 / np.maximum(variance, 1e-8) - 1.0 / prior, 1e-3)
        centre = (mean / np.maximum(variance, 1e-8) - self._offset / prior) / precision
        spread = prior + 1.0 / precision
        log_height = self._log_mean[:, 0] + 0.5 * ((centre - self._offset) ** 2 / spread + np.log(precision * spread))
        return Sites(centre, precision, log_height)


class MoodScores:
    """Scores of events that share a drifting mood: Gaussian given satisfaction, −½(s − m)ᵀQ(s − m) and a constant.

    Q and m are read off the noise model's own log-likelihood, by its differences: exact for a quadratic.
    """

    mixture = False

    def __init__(
        self, law: UserLaw, score: FloatArray, titles: NDArray[np.int64], epoch: int, hours: FloatArray
    ) -> None:
        n = len(titles)
        eye = np.eye(n)
        pairs = (eye[:, None] + eye[None]).reshape(-1, n)
        at = np.concatenate([np.zeros((1, n)), eye, -eye, pairs])
        noise, durations = law.world.noise, law.world.durations[titles]
        facts = Exposure(at, np.ones(()), durations, law.world.allure[epoch, titles])
        value = noise.log_likelihood(score, facts, hours).sum(axis=1)
        self._constant, plus, minus = value[0], value[1 : n + 1], value[n + 1 : 2 * n + 1]
        self._linear = 0.5 * (plus - minus)
        both = value[2 * n + 1 :].reshape(n, n)
        self._q = -(both - plus[:, None] - plus[None] + value[0])

    def __call__(self, logits: FloatArray, free_time: FloatArray) -> ScoreValues:
        fraction = expit(logits)
        s = LOWEST_SCORE + (HIGHEST_SCORE - LOWEST_SCORE) * fraction
        pulled = self._q @ s
        value = self._constant + (s * (self._linear[:, None] - 0.5 * pulled)).sum(axis=0)
        slope = (self._linear[:, None] - pulled) * (HIGHEST_SCORE - LOWEST_SCORE) * fraction * (1.0 - fraction)
        return ScoreValues(value[None], slope, logits[:0], logits[:0])


def event_density(
    world: World, score: FloatArray, titles: NDArray[np.int64], epoch: int
) -> Callable[[FloatArray, FloatArray], FloatArray]:
    """The log-density of (T,) scores as a function of (…, T) logits and (…, 1) minutes of free time."""
    if world.noise.bounded:
        score = np.clip(score, LOWEST_SCORE + NEAREST_TO_LOWEST, HIGHEST_SCORE)
    durations, allure, hours = world.durations[titles], world.allure[epoch, titles], np.zeros(len(titles))

    def density(logits: FloatArray, minutes: FloatArray) -> FloatArray:
        satisfaction = LOWEST_SCORE + (HIGHEST_SCORE - LOWEST_SCORE) * expit(logits)
        return world.noise.log_likelihood(score, Exposure(satisfaction, minutes, durations, allure), hours)

    return density


def require_separable(world: World) -> None:
    """Refuses a noise model whose likelihood is no sum of a function of satisfaction and one of free time.

    Raises:
        ConfigError: it is not.
    """
    if "mood" in world.noise.uses:
        return
    score = np.array([1.7, 2.9, 4.4, HIGHEST_SCORE])
    density = event_density(world, score, np.zeros(4, dtype=np.int64), 0)
    median = world.config.free_time_median_minutes
    table = np.exp([[density(np.full(4, x), np.array(t * median)) for x in (-2.0, 0.0, 2.0)] for t in (0.5, 1.0, 2.0)])
    mixed = table[:, :, :] - table[:1] - table[:, :1] + table[:1, :1]
    if np.abs(mixed).max() > 1e-8 * max(1.0, np.abs(table).max()):
        raise ConfigError(
            f"BayesReference does not know noise like {type(world.noise).__name__}: its likelihood must be a function "
            "of satisfaction plus one of free time"
        )


# --------------------------------------------------------------------------------------------------------- histories


class Valued(NamedTuple):
    """Particles with their flattened log-likelihood.

    Attributes:
        log_likelihood: (N,) at the β of the evaluation.
        gradient: (2d + 3, N) by z.
        choices: (N,) that of the titles, at β = 1.
        scores: of the scores, before flattening.
    """

    log_likelihood: FloatArray
    gradient: FloatArray
    choices: FloatArray
    scores: ScoreValues | None


class History:
    """One context: the likelihood of its titles and scores in z, flattened by β.

    Args:
        law: of the users.
        titles, score, hours: (T,) in order; T may be 0.
        epoch: of the context.
    """

    def __init__(
        self, law: UserLaw, titles: NDArray[np.int64], score: FloatArray, hours: FloatArray, epoch: int
    ) -> None:
        self.law, self.epoch, self.n_events = law, epoch, len(titles)
        self.logit_traits = law.logit_traits[titles]  # (T, d)
        centre = law.world.taste_centres[epoch]
        self.offset = self.logit_traits @ centre + law.logit_quality[titles]
        released = law.world.release <= epoch
        traits = law.utility_traits(epoch)
        self.choices = Choices(traits, titles, released)
        if law.world.config.order_effect > 0 and len(titles) > 0:
            self.choices = CarriedChoices(traits, titles, released, *_carried(law.world, titles, hours, released))
        self.scores: EventScores | MoodScores | None = None
        if len(titles) > 0:
            if "mood" in law.world.noise.uses:
                self.scores = MoodScores(law, score, titles, epoch, hours)
            else:
                self.scores = EventScores(law, score, titles, epoch, self.offset)
        self.mixture = self.scores is not None and self.scores.mixture

    def logits(self, z: FloatArray) -> FloatArray:
        """(T, N): of the satisfaction with the titles seen."""
        d = self.law.d
        return self.logit_traits @ z[:d] + (self.offset[:, None] + self.law.leniency * z[2 * d + 1])

    def __call__(self, z: FloatArray, beta: float, ordinary: NDArray[np.bool_] | None = None) -> Valued:
        """The log-likelihood and its gradient; given which events are ordinary, (T, N), where that is given."""
        d, who = self.law.d, self.law.latents(z, self.epoch)
        choices, by_weights = self.choices(who.weights)
        by_weights *= beta
        by_pull = by_weights[:d]
        gradient = np.zeros_like(z)
        gradient[:d] = who.discernment * by_pull
        gradient[d : 2 * d] = who.rest * by_pull
        gradient[2 * d] = who.discernment_slope * ((who.taste * by_pull).sum(axis=0) - by_weights[d])
        gradient[2 * d] += who.rest_slope * (who.outside * by_pull).sum(axis=0)
        if self.scores is None:
            return Valued(beta * choices, gradient, choices, None)
        scores = self.scores(self.logits(z), z[2 * d + 2])
        total, by_logits, by_free_time = self._scored(scores, beta, ordinary)
        gradient[:d] += self.logit_traits.T @ by_logits
        gradient[2 * d + 1] = self.law.leniency * by_logits.sum(axis=0)
        gradient[2 * d + 2] = by_free_time
        return Valued(beta * choices + total, gradient, choices, scores)

    def _scored(
        self, scores: ScoreValues, beta: float, ordinary: NDArray[np.bool_] | None
    ) -> tuple[FloatArray, FloatArray, FloatArray | float]:
        """Log-likelihood of the scores, (N,), and its derivatives by logits and free time."""
        if not self.mixture:
            return beta * scores.ordinary.sum(axis=0), beta * scores.ordinary_slope, 0.0
        flattened = self._flattened(scores, beta)
        if ordinary is not None:
            b = np.maximum(scores.exogenous, TINY)
            total = np.where(ordinary, flattened, np.log(b)).sum(axis=0)
            by_free_time = np.where(ordinary, 0.0, scores.exogenous_slope / b).sum(axis=0)
            return total, beta * scores.ordinary_slope * ordinary, by_free_time
        a = np.exp(flattened)
        both = np.maximum(a + scores.exogenous, TINY)
        by_free_time = (scores.exogenous_slope / both).sum(axis=0)
        return np.log(both).sum(axis=0), beta * scores.ordinary_slope * (a / both), by_free_time

    def log_likelihood_at(self, valued: Valued, beta: float) -> FloatArray:
        """(N,) of the same particles at another β."""
        if valued.scores is None:
            return beta * valued.choices
        if not self.mixture:
            return beta * (valued.choices + valued.scores.ordinary.sum(axis=0))
        both = np.exp(self._flattened(valued.scores, beta)) + valued.scores.exogenous
        return beta * valued.choices + np.log(np.maximum(both, TINY)).sum(axis=0)

    def ordinary_probability(self, valued: Valued, beta: float) -> FloatArray:
        """(T, N): P(the event is ordinary | particle)."""
        assert valued.scores is not None
        a = np.exp(self._flattened(valued.scores, beta))
        return a / np.maximum(a + valued.scores.exogenous, TINY)

    def flattened(self, valued: Valued, beta: float) -> FloatArray:
        """(T, N): log C_β·A^β of each event."""
        assert valued.scores is not None
        return self._flattened(valued.scores, beta)

    def _flattened(self, scores: ScoreValues, beta: float) -> FloatArray:
        assert isinstance(self.scores, EventScores)
        return beta * scores.ordinary + self.scores.log_constant(beta)

    def curvature(self, z: FloatArray, beta: float) -> FloatArray:
        """(2d + 3, 2d + 3): of prior and titles, averaged over particles; what scores add is left to the sampler,
        but for free time, whose curvature is the particles' own."""
        d, who = self.law.d, self.law.latents(z, self.epoch)
        h = beta * self.choices.curvature(who.weights.mean(axis=1))
        by_discernment = np.concatenate(
            [who.discernment_slope * who.taste + who.rest_slope * who.outside, -who.discernment_slope[None]]
        )
        hb = h @ by_discernment
        curvature = np.eye(self.law.dimensions)
        parts = (who.discernment, who.rest)
        for i, left in enumerate(parts):
            rows = slice(i * d, (i + 1) * d)
            for j, right in enumerate(parts):
                curvature[rows, j * d : (j + 1) * d] += (left * right).mean() * h[:d, :d]
            curvature[rows, 2 * d] = curvature[2 * d, rows] = (left * hb[:d]).mean(axis=1)
        curvature[2 * d, 2 * d] += (by_discernment * hb).sum(axis=0).mean()
        curvature[2 * d + 2, 2 * d + 2] = 1.0 / max(z[2 * d + 2].var(), 1e-6)
        return curvature


def _carried(
    world: World, titles: NDArray[np.int64], hours: FloatArray, released: NDArray[np.bool_]
) -> tuple[FloatArray, FloatArray]:
    """(T, I) what earlier titles add at each step, -inf for titles that cannot be chosen; (I,) what all add at the
    hour of the last."""
    n = len(titles)
    steps = np.arange(n)
    earlier = np.where(steps[None] < steps[:, None], titles[None], world.n_titles)  # (T, T), padded
    carried = world.carry_over(earlier, np.broadcast_to(hours, (n, n)), hours)
    carried[:, ~released] = -np.inf
    for step in range(1, n):
        carried[step:, titles[step - 1]] = -np.inf
    return carried, world.carry_over(titles[None], hours[None], hours[-1:])[0]


def _log_sum_exp(values: FloatArray) -> FloatArray:
    """(T, 1) of (T, G)."""
    top = values.max(axis=1, keepdims=True)
    return top + np.log(np.exp(values - top).sum(axis=1, keepdims=True))
