"""Intervals of what a reward model says: of the mean reward, and of one observed score.

**Of the mean** (``of="mean"``), from the spread of the members alone: r̂ ± t · sqrt(1 + 1/M) · deviation, t Student's
with M − 1 degrees of freedom. It is the interval in which the exact expectation would lie, at the stated level, if it
were one more draw like the members, which are fits to resamples of the users. It knows of no error that all members
share (shrinkage, titles seen only by those who chose them) and of nothing that the history does not tell about the
user, so that it covers E[score | user, title] less often than its level says. How much less is measured, not assumed:
`recsim_gr.reward_truth.reward_calibration`.

**Of a score** (``of="score"``), by split conformal prediction with residuals scaled by the predicted spread (Lei,
G'Sell, Rinaldo, Tibshirani, Wasserman, JASA 2018, §5.2)::

    r̂ ± q · sqrt(noise² + deviation²),   q a quantile of |r − r̂| / sqrt(noise² + deviation²) over calibration users

Events of one user depend on each other, so the units that are exchangeable are users, and q is the quantile of the
hierarchical form (Lee, Barber, Willett, arXiv:2306.06342): of K users, each of their n_k events weighs
1/((K + 1) n_k), and the weight 1/(K + 1) that is left stands at infinity.

**What is guaranteed**: a score that a new user gives an event of their own, drawn uniformly from those they chose,
lies in the interval with probability ``level`` at least, over users; for users exchangeable with the calibration users
who had no part in the fit. Nothing is promised for a given title or history, for users of another epoch, nor for
titles that somebody else chose for the user: that is where hidden confounding shows. The validation users, which
calibrate by default, have chosen the kept state among a handful; give `RewardEnsemble.calibrate` others where that
matters.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from recsim_gr.errors import ConfigError

FloatArray = NDArray[np.float64]

INTERVALS = ("score", "mean")
"""What an interval can be of."""


class Prediction(NamedTuple):
    """What an ensemble says, of every title or of one a place; both of one shape, float32.

    Attributes:
        mean: over the members.
        deviation: over the members, with M − 1 degrees of freedom.
    """

    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]


class Interval(NamedTuple):
    """The ends of an interval a prediction, of the prediction's shape."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Events of users who had no part in the fit, and how wrong the ensemble was there.

    Attributes:
        user: (E,) int64, whose event it is, from 0.
        residual: (E,) float32, r − r̂.
        deviation: (E,) float32, of the members.
        noise: RMS of r − r̂ on training users, the part of the scale that members agree on. Not from the users above,
            since the scale of a conformal score must not depend on them.
        bounds: the range of scores, where the noise model keeps to one.
    """

    user: NDArray[np.int64]
    residual: NDArray[np.float32]
    deviation: NDArray[np.float32]
    noise: float
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.noise) and self.noise >= 0):
            raise ConfigError(f"the noise of a calibration must be finite and 0 or more, got {self.noise!r}")

    def scale(self, deviation: NDArray[np.floating]) -> FloatArray:
        """sqrt(noise² + deviation²), never 0."""
        return np.sqrt(self.noise**2 + np.asarray(deviation, dtype=np.float64) ** 2 + 1e-12)

    def quantile(self, level: float) -> float:
        """q of the head of the module; infinite where there are too few users for the level."""
        _require_level(level)
        scores = np.abs(self.residual.astype(np.float64)) / self.scale(self.deviation)
        return hierarchical_quantile(scores, self.user, level)

    def interval(self, prediction: Prediction, level: float) -> Interval:
        """Of one observed score, cut to the range of scores."""
        half = self.quantile(level) * self.scale(prediction.deviation)
        low, high = prediction.mean - half, prediction.mean + half
        if self.bounds is not None:
            low, high = (np.clip(end, *self.bounds) for end in (low, high))
        return Interval(low.astype(np.float32), high.astype(np.float32))


def hierarchical_quantile(scores: FloatArray, user: NDArray[np.int64], level: float) -> float:
    """The smallest s such that events with a score of at most s weigh ``level`` or more, an event 1/((K + 1) n_k).

    Args:
        scores: (E,).
        user: (E,) whose they are; K different users, the k-th with n_k events.
        level: in (0, 1).

    Returns:
        Infinity where all events together weigh less, K/(K + 1) < ``level``.
    """
    _, back, count = np.unique(user, return_inverse=True, return_counts=True)
    order = np.argsort(scores, kind="stable")
    weight = np.cumsum(1.0 / count[back][order]) / (len(count) + 1)
    place = int(np.searchsorted(weight, level - 1e-12))  # a sum of tenths may miss nine tenths by a rounding
    return float(scores[order[place]]) if place < len(order) else float("inf")


def mean_interval(prediction: Prediction, members: int, level: float) -> Interval:
    """Of the mean reward, see the head of the module.

    Args:
        prediction: of the members.
        members: M.
        level: in (0, 1).
    """
    _require_level(level)
    factor = float(stdtrit(members - 1, 0.5 + level / 2)) * np.sqrt(1.0 + 1.0 / members)
    half = np.float32(factor) * prediction.deviation
    return Interval(prediction.mean - half, prediction.mean + half)


def _require_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ConfigError(f"the level of an interval must be in (0, 1), got {level!r}; 0.9 means nine in ten")
