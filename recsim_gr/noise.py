"""How satisfaction becomes an observed score: one interface, one dial from 0 to 1.

A model draws from a fixed number of uniforms an event, so that worlds which differ in the dial (or in the model) alone
share all their random numbers, and it knows the mean and the likelihood of what it draws in closed form.

| model | what it stands for | averages out over a title's viewers? |
|---|---|---|
| ``watch_time`` | sessions that end for reasons of their own | the noise does; the bias towards short titles does not |
| ``gaussian`` | additive noise | yes |
| ``student_t`` | additive noise with outliers: a film left running, an accidental click | yes, slowly |
| ``drift`` | a user's standards wander from day to day | over users, not over a user's neighbouring events |
| ``clickbait`` | alluring titles score above what they satisfy | no: pure bias |
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr, ndtri

from recsim_gr.configs import require, require_finite_numbers
from recsim_gr.errors import UnknownNameError
from recsim_gr.observations import HIGHEST_SCORE, LOWEST_SCORE

FloatArray = NDArray[np.float64]

ZERO = np.zeros(())
RANGE = HIGHEST_SCORE - LOWEST_SCORE
HALF_LOG_2PI = 0.5 * float(np.log(2.0 * np.pi))

RESOLUTION = 0.02
"""Points: the least deviation that an additive model's likelihood assumes. At dial 0 its scores are exact, and a
density would be infinite; nothing in a world turns on a fiftieth of a point."""


class Exposure(NamedTuple):
    """The facts of events that a score may depend on; arrays that broadcast against each other.

    Attributes:
        satisfaction: s(u, i), in [1, 5].
        free_time: minutes, the mean of a user's exogenous session.
        duration: minutes, of the title.
        allure: how appealing the title is in the user's epoch, standard normal over titles.
        mood: how lenient the user is at that moment, standard normal over moments.
    """

    satisfaction: FloatArray
    free_time: FloatArray
    duration: FloatArray
    allure: FloatArray = ZERO
    mood: FloatArray = ZERO


class Scores(NamedTuple):
    """What was observed, elementwise.

    Attributes:
        score: the score; on [1, 5] unless the model says otherwise.
        watched: the fraction of the title that was watched, in [0, 1].
        exogenous: whether the event had nothing to do with satisfaction.
    """

    score: FloatArray
    watched: FloatArray
    exogenous: NDArray[np.bool_]


class RewardNoise(Protocol):
    """A model of the noise between satisfaction and score."""

    uniforms_per_event: ClassVar[int]
    bounded: ClassVar[bool]
    """Whether scores stay in [1, 5]."""
    uses: ClassVar[frozenset[str]]
    """Which of ``allure`` and ``mood`` the model reads; the others need not be given."""

    def sample(self, exposure: Exposure, uniforms: FloatArray) -> Scores:
        """Draws scores from ``uniforms`` of shape (..., uniforms_per_event)."""
        ...

    def expected(self, exposure: Exposure) -> FloatArray:
        """E[score | user, title], exact; over moments too, so ``mood`` has no part in it."""
        ...

    def second_moment(self, exposure: Exposure) -> FloatArray:
        """E[score² | user, title], exact."""
        ...

    def log_likelihood(self, score: FloatArray, exposure: Exposure, hours: FloatArray) -> FloatArray:
        """Log-density of each score given satisfaction and the earlier scores of its row.

        The last axis is time, ``hours`` its clock; the sum over it is the log-likelihood of a history. ``mood`` is
        unknown here, and integrated out. Where a score has positive probability (a title watched to its end) that
        probability stands in place of a density.
        """
        ...


@dataclass(frozen=True)
class WatchTimeNoise:
    """Watch time with exogenous sessions (design: the default).

    With probability ``dial`` an event is exogenous: what is watched is ``min(1, T/D)`` of the title, with free time
    T exponential of mean τ, whatever the satisfaction. Otherwise the watched fraction is (s−1)/4 times a log-normal
    factor of median 1, cut at 1. The score is 1 + 4·fraction.
    """

    dial: float
    small_noise: float = 0.05
    """Deviation of the log of the watched fraction of an ordinary event: 5 % of the length, the imprecision of
    where people stop; small enough that dial 0 is all but the truth."""

    uniforms_per_event: ClassVar[int] = 3
    bounded: ClassVar[bool] = True
    uses: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        _check_dial(self)
        require(0 < self.small_noise <= 5, self, "small_noise", "positive and at most 5")

    def sample(self, exposure: Exposure, uniforms: FloatArray) -> Scores:
        shape = np.broadcast(uniforms[..., 0], *exposure[:3]).shape
        uniforms = uniforms if uniforms.shape[:-1] == shape else np.broadcast_to(uniforms, (*shape, uniforms.shape[-1]))
        exogenous = uniforms[..., 0] < self.dial  # nested: what is exogenous at one dial is so at every higher one
        session = -exposure.free_time * np.log1p(-uniforms[..., 2])
        watched = np.asarray(session / exposure.duration, order="C")
        # ndtri takes longest, so only where it matters; and np.where is slow, since nobody can guess its flags
        places = np.flatnonzero(~exogenous)
        jitter = np.exp(self.small_noise * ndtri(uniforms[..., 1].ravel().take(places)))
        satisfaction = exposure.satisfaction
        if np.shape(satisfaction) != shape:
            satisfaction = np.broadcast_to(satisfaction, shape)
        watched.reshape(-1)[places] = _fraction(satisfaction.ravel().take(places)) * jitter
        watched = np.minimum(1.0, watched, out=watched)
        return Scores(_score(watched), watched, exogenous)

    def sample_one(
        self, satisfaction: float, free_time: float, duration: float, uniforms: list[float]
    ) -> tuple[float, float, bool]:
        """`sample` of one event, in Python's numbers and to the last bit: arrays of length 1 take ten times as long."""
        exogenous = uniforms[0] < self.dial
        if exogenous:
            watched = -free_time * float(np.log1p(-uniforms[2])) / duration
        else:
            jitter = float(np.exp(self.small_noise * float(ndtri(uniforms[1]))))
            watched = (satisfaction - LOWEST_SCORE) / RANGE * jitter
        watched = min(1.0, watched)
        return LOWEST_SCORE + RANGE * watched, watched, exogenous

    def expected(self, exposure: Exposure) -> FloatArray:
        ordinary, exogenous = (_score(part) for part in self._means_cut_at(1.0, exposure))
        return (1.0 - self.dial) * ordinary + self.dial * exogenous

    def mean_cut_at(self, cut: float, exposure: Exposure) -> FloatArray:
        """E[min(W, t)] of the watched fraction W, for t in (0, 1]: its integrated survival function."""
        ordinary, exogenous = self._means_cut_at(cut, exposure)
        return (1.0 - self.dial) * ordinary + self.dial * exogenous

    def _means_cut_at(self, cut: float, exposure: Exposure) -> tuple[FloatArray, FloatArray]:
        """E[min(W, t)] of an ordinary and of an exogenous event."""
        ordinary = cut * _mean_cut_lognormal(_fraction(exposure.satisfaction) / cut, self.small_noise)
        ratio = exposure.duration / exposure.free_time
        return ordinary, -np.expm1(-ratio * cut) / ratio  # E min(t, T/D) = (τ/D)(1 − exp(−tD/τ))

    def survival(self, fraction: float, exposure: Exposure) -> FloatArray:
        """P(W ≥ w) of the watched fraction, for w in (0, 1]; at 1 the probability that the title is finished."""
        with np.errstate(divide="ignore"):
            ordinary = ndtr((np.log(_fraction(exposure.satisfaction)) - np.log(fraction)) / self.small_noise)
        exogenous = np.exp(-fraction * exposure.duration / exposure.free_time)
        return (1.0 - self.dial) * ordinary + self.dial * exogenous

    def second_moment(self, exposure: Exposure) -> FloatArray:
        first = self.mean_cut_at(1.0, exposure)
        ordinary = _square_cut_lognormal(_fraction(exposure.satisfaction), self.small_noise)
        ratio = exposure.duration / exposure.free_time
        exogenous = 2.0 * (-np.expm1(-ratio) - ratio * np.exp(-ratio)) / ratio**2  # E min(1, T/D)²
        square = (1.0 - self.dial) * ordinary + self.dial * exogenous
        return LOWEST_SCORE**2 + 2.0 * LOWEST_SCORE * RANGE * first + RANGE**2 * square

    def log_likelihood(self, score: FloatArray, exposure: Exposure, hours: FloatArray) -> FloatArray:
        return self.log_density(_fraction(score), exposure) - np.log(RANGE) * (score < HIGHEST_SCORE)

    def log_density(self, watched: FloatArray, exposure: Exposure) -> FloatArray:
        """Of the watched fraction; the probability of finishing where it is 1."""
        finished = watched >= 1.0
        inside = np.where(finished, 1.0, np.maximum(watched, np.finfo(np.float64).tiny))
        with np.errstate(divide="ignore", invalid="ignore"):
            z = (np.log(inside) - np.log(_fraction(exposure.satisfaction))) / self.small_noise
            density = -0.5 * z * z - HALF_LOG_2PI - np.log(self.small_noise * inside)
            ordinary = np.log1p(-self.dial) + np.where(finished, log_ndtr(-z), density)
            rate = exposure.duration / exposure.free_time
            exogenous = np.log(self.dial) - rate * inside + np.where(finished, 0.0, np.log(rate))
        return np.logaddexp(ordinary, exogenous)


class _Additive:
    """Score = s + an error of mean 0 (or a bias): what the models below share. Scores are not cut, which would bias
    them; the watched fraction is what a score in [1, 5] would be."""

    dial: float
    scale: float
    uniforms_per_event: ClassVar[int] = 3
    """As many as watch time draws, so that worlds which differ in the model alone share titles and choices."""
    bounded: ClassVar[bool] = False
    uses: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        _check_dial(self)
        require(self.scale > 0, self, "scale", "positive")

    def _scores(self, score: FloatArray) -> Scores:
        return Scores(score, np.clip(_fraction(score), 0.0, 1.0), np.zeros(score.shape, dtype=bool))

    def _deviation(self) -> float:
        """Of the error."""
        return self.dial * self.scale

    def expected(self, exposure: Exposure) -> FloatArray:
        shape = np.broadcast_shapes(*(np.shape(part) for part in exposure))
        return np.broadcast_to(np.asarray(exposure.satisfaction, dtype=np.float64), shape).copy()

    def second_moment(self, exposure: Exposure) -> FloatArray:
        mean: FloatArray = self.expected(exposure)
        return mean**2 + self._deviation() ** 2


@dataclass(frozen=True)
class GaussianNoise(_Additive):
    """Additive Gaussian noise, unbiased: score = s + dial·scale·z."""

    dial: float
    scale: float = 4.0
    """Deviation at dial 1: the whole range of satisfaction, which leaves a squared correlation of a few percent. No
    finite unbiased noise reaches 0, so at dial 1 a little signal is left."""

    def sample(self, exposure: Exposure, uniforms: FloatArray) -> Scores:
        return self._scores(exposure.satisfaction + self.dial * self.scale * ndtri(uniforms[..., 1]))

    def log_likelihood(self, score: FloatArray, exposure: Exposure, hours: FloatArray) -> FloatArray:
        return _normal_log_density(score - exposure.satisfaction, max(self._deviation(), RESOLUTION))


@dataclass(frozen=True)
class StudentNoise(_Additive):
    """Additive heavy-tailed noise, unbiased: score = s + dial·scale·t/√2, t Student with 4 degrees of freedom.

    Four is the least whole number with a finite variance and a quantile function in closed form (Shaw, "Sampling
    Student's T distribution", J. Comput. Finance 2006); its fourth moment is infinite, so squared errors are ruled by
    outliers.
    """

    dial: float
    scale: float = 4.0
    """Deviation at dial 1, the Gaussian model's, so that the two differ in the tails alone."""

    VARIANCE: ClassVar[float] = 2.0
    """Of Student's t with 4 degrees of freedom, ν/(ν − 2)."""

    def sample(self, exposure: Exposure, uniforms: FloatArray) -> Scores:
        t = student_4_quantile(uniforms[..., 1]) / np.sqrt(self.VARIANCE)
        return self._scores(exposure.satisfaction + self.dial * self.scale * t)

    def log_likelihood(self, score: FloatArray, exposure: Exposure, hours: FloatArray) -> FloatArray:
        unit = max(self._deviation(), RESOLUTION) / np.sqrt(self.VARIANCE)
        t = (score - exposure.satisfaction) / unit
        return np.log(0.375 / unit) - 2.5 * np.log1p(t * t / 4.0)  # density ⅜·(1 + t²/4)^(−5/2)


@dataclass(frozen=True)
class DriftNoise(_Additive):
    """A user's leniency wanders: score = s + dial·scale·mood, mood an Ornstein–Uhlenbeck process in hours.

    What two neighbouring events share says nothing of their titles; a mean over few days does not remove it. At one
    moment it is the same for all titles, so it misleads learning from logs and never a ranking at a moment.
    """

    dial: float
    scale: float = 4.0
    """Deviation at dial 1, the Gaussian model's."""

    uses: ClassVar[frozenset[str]] = frozenset({"mood"})

    def sample(self, exposure: Exposure, uniforms: FloatArray) -> Scores:
        score = exposure.satisfaction + self.dial * self.scale * exposure.mood
        shape = np.broadcast_shapes(score.shape, uniforms.shape[:-1])
        return self._scores(np.broadcast_to(score, shape).astype(np.float64))

    def log_likelihood(self, score: FloatArray, exposure: Exposure, hours: FloatArray) -> FloatArray:
        deviation = max(self._deviation(), RESOLUTION)
        mood = (score - exposure.satisfaction) / deviation
        kept = mood_persistence(np.diff(hours, axis=-1))
        rest = np.sqrt(-np.expm1(2.0 * np.log(np.maximum(kept, np.finfo(np.float64).tiny))))
        rest = np.maximum(rest, RESOLUTION / deviation)  # of two events at one moment the second repeats the first
        later = _normal_log_density(mood[..., 1:] - kept * mood[..., :-1], rest)
        first = _normal_log_density(mood[..., :1], 1.0)
        return np.concatenate([first, later], axis=-1) - np.log(deviation)


@dataclass(frozen=True)
class ClickbaitNoise(_Additive):
    """A title's bias rises with its appeal: score = s + dial·scale·allure, and a little noise.

    The bias is the same for everyone, so no average over users removes it: a perfect model of the score is misled.
    """

    dial: float
    scale: float = 4.0
    """Deviation of the bias over titles at dial 1: the Gaussian model's deviation, all of it systematic."""
    small_noise: float = 0.1
    """Points: the imprecision of where people stop, that of watch time (5 % of the range is .2 at the top, 0 at the
    bottom)."""

    uses: ClassVar[frozenset[str]] = frozenset({"allure"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.small_noise > 0, self, "small_noise", "positive")

    def sample(self, exposure: Exposure, uniforms: FloatArray) -> Scores:
        biased = exposure.satisfaction + self.dial * self.scale * exposure.allure
        return self._scores(biased + self.small_noise * ndtri(uniforms[..., 1]))

    def _deviation(self) -> float:
        return self.small_noise

    def expected(self, exposure: Exposure) -> FloatArray:
        mean: FloatArray = super().expected(exposure)
        return mean + self.dial * self.scale * exposure.allure

    def log_likelihood(self, score: FloatArray, exposure: Exposure, hours: FloatArray) -> FloatArray:
        return _normal_log_density(score - self.expected(exposure), self.small_noise)


@dataclass(frozen=True, eq=False)
class DurationDebiasedNoise:
    """Watch time, scored by its quantile among titles of like duration.

    The duration groups of D2Q: Zhan et al., "Deconfounding Duration Bias in Watch-time Prediction for Video
    Recommendation", KDD 2022, arXiv:2206.06003.

    The score is 1 + 4·F_g(W), with F_g the distribution of the watched fraction in the title's duration group g
    under the logging policy: piecewise linear between knots, and at W = 1 the middle of its last jump.

    Attributes:
        base: the watch time that is scored.
        edges: (G − 1,) minutes, ascending: where one group ends and the next begins.
        knots: (K + 1,) fractions from 0 to 1.
        levels: (G, K + 1) F_g at the knots, the last one just below 1.
    """

    base: WatchTimeNoise
    edges: FloatArray
    knots: FloatArray
    levels: FloatArray

    uniforms_per_event: ClassVar[int] = WatchTimeNoise.uniforms_per_event
    bounded: ClassVar[bool] = True
    uses: ClassVar[frozenset[str]] = frozenset()

    def group(self, duration: FloatArray) -> NDArray[np.int64]:
        """Of titles, by their minutes."""
        return np.searchsorted(self.edges, duration, side="right")

    def quantile(self, watched: FloatArray, duration: FloatArray) -> FloatArray:
        """F_g(W), elementwise."""
        group, watched = np.broadcast_arrays(self.group(duration), watched)
        place = np.clip(np.searchsorted(self.knots, watched, side="right") - 1, 0, len(self.knots) - 2)
        low, high = self.levels[group, place], self.levels[group, place + 1]
        share = (watched - self.knots[place]) / (self.knots[place + 1] - self.knots[place])
        return np.where(watched >= 1.0, self._finished(group), low + share * (high - low))

    def sample(self, exposure: Exposure, uniforms: FloatArray) -> Scores:
        drawn = self.base.sample(exposure, uniforms)
        return drawn._replace(score=_score(self.quantile(drawn.watched, exposure.duration)))

    def expected(self, exposure: Exposure) -> FloatArray:
        """Σ_k slope_k·E[length of (knot_k, knot_k+1) that is watched], and the jump at the end."""
        group = self.group(exposure.duration)
        below: FloatArray = np.zeros(())
        mean: FloatArray = self.levels[group, 0]
        for k, slope in enumerate((np.diff(self.levels, axis=1) / np.diff(self.knots)).T):
            up_to = self.base.mean_cut_at(float(self.knots[k + 1]), exposure)
            mean = mean + slope[group] * (up_to - below)
            below = up_to
        jump = self._finished(group) - self.levels[group, -1]
        return _score(mean + jump * self.base.survival(1.0, exposure))

    def second_moment(self, exposure: Exposure) -> FloatArray:
        """E[F²] = ∫ 2·F·F′·P(W > w) dw and the jump, by Gauss–Legendre between knots: F is linear there."""
        group = self.group(exposure.duration)
        nodes, weights = np.polynomial.legendre.leggauss(8)
        square = self.levels[group, 0] ** 2
        for k in range(len(self.knots) - 1):
            low, width = self.knots[k], self.knots[k + 1] - self.knots[k]
            slope = (self.levels[group, k + 1] - self.levels[group, k]) / width
            for node, weight in zip(nodes, weights, strict=True):
                w = low + 0.5 * width * (node + 1.0)
                level = self.levels[group, k] + slope * (w - low)
                square = square + weight * width * slope * level * self.base.survival(float(w), exposure)
        jump = self._finished(group) ** 2 - self.levels[group, -1] ** 2
        square = square + jump * self.base.survival(1.0, exposure)
        first = (self.expected(exposure) - LOWEST_SCORE) / RANGE
        return LOWEST_SCORE**2 + 2.0 * LOWEST_SCORE * RANGE * first + RANGE**2 * square

    def log_likelihood(self, score: FloatArray, exposure: Exposure, hours: FloatArray) -> FloatArray:
        """The base's, at the fraction whose quantile the score is, over the slope of F_g there."""
        group, level = np.broadcast_arrays(self.group(exposure.duration), _fraction(score))
        levels = self.levels[group]  # (..., K + 1)
        finished = level > levels[..., -1] + 0.25 * (1.0 - levels[..., -1])
        place = np.clip((levels <= level[..., None]).sum(axis=-1) - 1, 0, len(self.knots) - 2)
        low = np.take_along_axis(levels, place[..., None], axis=-1)[..., 0]
        high = np.take_along_axis(levels, place[..., None] + 1, axis=-1)[..., 0]
        width = self.knots[place + 1] - self.knots[place]
        slope = np.maximum((high - low) / width, np.finfo(np.float64).tiny)
        watched = np.where(finished, 1.0, self.knots[place] + np.clip((level - low) / slope, 0.0, width))
        log_slope = np.where(finished, 0.0, np.log(RANGE * slope))
        return self.base.log_density(watched, exposure) - log_slope

    def _finished(self, group: NDArray[np.int64]) -> FloatArray:
        """The middle of the jump at the end: the mean rank of those who finished."""
        return 0.5 * (1.0 + self.levels[group, -1])


NoiseModel = WatchTimeNoise | GaussianNoise | StudentNoise | DriftNoise | ClickbaitNoise

NOISE_MODELS: dict[str, type[NoiseModel]] = {
    "watch_time": WatchTimeNoise,
    "gaussian": GaussianNoise,
    "student_t": StudentNoise,
    "drift": DriftNoise,
    "clickbait": ClickbaitNoise,
}
"""By the name that a config gives."""


def noise_model(name: str, dial: float) -> NoiseModel:
    """The noise model of that name with its dial set.

    Raises:
        UnknownNameError: no such model.
        ConfigError: a dial outside [0, 1].
    """
    if name not in NOISE_MODELS:
        raise UnknownNameError(f"no noise model {name!r}; there are {', '.join(NOISE_MODELS)}")
    return NOISE_MODELS[name](dial=dial)


def student_4_quantile(p: FloatArray) -> FloatArray:
    """The quantile function of Student's t with 4 degrees of freedom (Shaw 2006, §2): p in (0, 1), elementwise."""
    tail = np.minimum(p, 1.0 - p)
    root = np.sqrt(np.minimum(4.0 * tail * (1.0 - tail), 1.0))
    q = np.cos(np.arccos(root) / 3.0) / root
    return np.sign(p - 0.5) * 2.0 * np.sqrt(np.maximum(q - 1.0, 0.0))


MOOD_MEMORY_HOURS = 48.0
"""e-folding time of a user's mood: it lasts through a session and is another one after a few days."""


def mood_persistence(gap_hours: FloatArray) -> FloatArray:
    """Correlation of a user's mood at two moments so many hours apart."""
    return np.exp(-np.asarray(gap_hours, dtype=np.float64) / MOOD_MEMORY_HOURS)


def moods(hours: FloatArray, uniforms: FloatArray) -> FloatArray:
    """(n, T) standard normal moods at ascending ``hours``, from as many uniforms: an Ornstein–Uhlenbeck process,
    exact at any gaps (its conditional law is Gaussian)."""
    z = ndtri(uniforms)
    mood = z.copy()
    kept = mood_persistence(np.diff(hours, axis=1))
    for t in range(1, z.shape[1]):
        mood[:, t] = kept[:, t - 1] * mood[:, t - 1] + np.sqrt(1.0 - kept[:, t - 1] ** 2) * z[:, t]
    return mood


def _check_dial(model: object) -> None:
    require_finite_numbers(model)
    require(0.0 <= model.dial <= 1.0, model, "dial", "between 0 and 1")  # type: ignore[attr-defined]


def _fraction(score: FloatArray) -> FloatArray:
    return (np.asarray(score, dtype=np.float64) - LOWEST_SCORE) / RANGE


def _score(fraction: FloatArray) -> FloatArray:
    return LOWEST_SCORE + RANGE * fraction


def _normal_log_density(error: FloatArray, deviation: FloatArray | float) -> FloatArray:
    return -0.5 * (error / deviation) ** 2 - HALF_LOG_2PI - np.log(deviation)


def _mean_cut_lognormal(median: FloatArray, sigma: float) -> FloatArray:
    """E[min(1, m·exp(σZ))], elementwise; 0 where m is 0.

    The part below the cut is m·exp(σ²/2)·Φ(c − σ) and the part above it Φ(−c), with c = −ln(m)/σ.
    """
    with np.errstate(divide="ignore"):
        cut = -np.log(median) / sigma
    return median * np.exp(0.5 * sigma**2) * ndtr(cut - sigma) + ndtr(-cut)


def _square_cut_lognormal(median: FloatArray, sigma: float) -> FloatArray:
    """E[min(1, m·exp(σZ))²]: m²·exp(2σ²)·Φ(c − 2σ) + Φ(−c)."""
    with np.errstate(divide="ignore"):
        cut = -np.log(median) / sigma
    return median**2 * np.exp(2.0 * sigma**2) * ndtr(cut - 2.0 * sigma) + ndtr(-cut)
