"""How satisfaction becomes an observed score: one interface, one dial from 0 to 1.

A model draws from a fixed number of uniforms an event, so that worlds which differ in the dial alone share all their
random numbers, and it knows the mean of what it draws in closed form.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from recsim_gr.configs import require, require_finite_numbers
from recsim_gr.errors import UnknownNameError
from recsim_gr.observations import HIGHEST_SCORE, LOWEST_SCORE

FloatArray = NDArray[np.float64]


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
    """A model of the noise between satisfaction and score. All arrays of one call broadcast against each other."""

    uniforms_per_event: ClassVar[int]
    bounded: ClassVar[bool]
    """Whether scores stay in [1, 5]."""

    def sample(
        self, satisfaction: FloatArray, free_time: FloatArray, duration: FloatArray, uniforms: FloatArray
    ) -> Scores:
        """Draws scores from ``uniforms`` of shape (..., uniforms_per_event); times in minutes."""
        ...

    def expected(self, satisfaction: FloatArray, free_time: FloatArray, duration: FloatArray) -> FloatArray:
        """E[score | satisfaction, free time, duration], exact."""
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

    def __post_init__(self) -> None:
        _check_dial(self)
        require(0 < self.small_noise <= 5, self, "small_noise", "positive and at most 5")

    def sample(
        self, satisfaction: FloatArray, free_time: FloatArray, duration: FloatArray, uniforms: FloatArray
    ) -> Scores:
        exogenous = uniforms[..., 0] < self.dial  # nested: what is exogenous at one dial is so at every higher one
        jitter = np.exp(self.small_noise * ndtri(uniforms[..., 1]))
        session = -free_time * np.log1p(-uniforms[..., 2])
        ordinary = _fraction(satisfaction) * jitter
        watched = np.minimum(1.0, np.where(exogenous, session / duration, ordinary))
        return Scores(_score(watched), watched, exogenous)

    def expected(self, satisfaction: FloatArray, free_time: FloatArray, duration: FloatArray) -> FloatArray:
        ordinary = _score(_mean_cut_lognormal(_fraction(satisfaction), self.small_noise))
        ratio = duration / free_time
        exogenous = _score(-np.expm1(-ratio) / ratio)  # E min(1, T/D) = (τ/D)(1 − exp(−D/τ))
        return (1.0 - self.dial) * ordinary + self.dial * exogenous


@dataclass(frozen=True)
class GaussianNoise:
    """Additive Gaussian noise, unbiased: score = s + dial·scale·z, not cut (cutting would bias it)."""

    dial: float
    scale: float = 4.0
    """Deviation at dial 1: the whole range of satisfaction, which leaves a squared correlation of a few percent. No
    finite unbiased noise reaches 0, so at dial 1 a little signal is left."""

    uniforms_per_event: ClassVar[int] = 3
    """As many as watch time draws, so that worlds which differ in the model alone share titles and choices."""
    bounded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_dial(self)
        require(self.scale > 0, self, "scale", "positive")

    def sample(
        self, satisfaction: FloatArray, free_time: FloatArray, duration: FloatArray, uniforms: FloatArray
    ) -> Scores:
        score = satisfaction + self.dial * self.scale * ndtri(uniforms[..., 1])
        watched = np.clip(_fraction(score), 0.0, 1.0)
        return Scores(score, watched, np.zeros(score.shape, dtype=bool))

    def expected(self, satisfaction: FloatArray, free_time: FloatArray, duration: FloatArray) -> FloatArray:
        shape = np.broadcast_shapes(satisfaction.shape, free_time.shape, duration.shape)
        return np.broadcast_to(np.asarray(satisfaction, dtype=np.float64), shape).copy()


NOISE_MODELS: dict[str, type[WatchTimeNoise] | type[GaussianNoise]] = {
    "watch_time": WatchTimeNoise,
    "gaussian": GaussianNoise,
}


def noise_model(name: str, dial: float) -> RewardNoise:
    """The noise model of that name with its dial set.

    Raises:
        UnknownNameError: no such model.
        ConfigError: a dial outside [0, 1].
    """
    if name not in NOISE_MODELS:
        raise UnknownNameError(f"no noise model {name!r}; there are {', '.join(NOISE_MODELS)}")
    return NOISE_MODELS[name](dial=dial)


def _check_dial(model: WatchTimeNoise | GaussianNoise) -> None:
    require_finite_numbers(model)
    require(0.0 <= model.dial <= 1.0, model, "dial", "between 0 and 1")


def _fraction(score: FloatArray) -> FloatArray:
    return (np.asarray(score, dtype=np.float64) - LOWEST_SCORE) / (HIGHEST_SCORE - LOWEST_SCORE)


def _score(fraction: FloatArray) -> FloatArray:
    return LOWEST_SCORE + (HIGHEST_SCORE - LOWEST_SCORE) * fraction


def _mean_cut_lognormal(median: FloatArray, sigma: float) -> FloatArray:
    """E[min(1, m·exp(σZ))], elementwise; 0 where m is 0.

    The part below the cut is m·exp(σ²/2)·Φ(c − σ) and the part above it Φ(−c), with c = −ln(m)/σ.
    """
    with np.errstate(divide="ignore"):
        cut = -np.log(median) / sigma
    return median * np.exp(0.5 * sigma**2) * ndtr(cut - sigma) + ndtr(-cut)
