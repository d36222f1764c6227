"""What a reward model is worth against the truth: its errors, its ranks, and the coverage of its intervals.

A model of scores learns from titles that users **chose**, and is used for titles that are **forced** on them, as those
that a policy recommends are. Both are measured on the same users after the same histories, against the score (what a
study can see of the chosen ones), its exact expectation and the satisfaction behind it. Where the two kinds of titles
differ, choices depend on what no model is told of the user: hidden confounding.

Arrays are (U, L): users of a log and the places of their events, as `InteractionLog.sequences` has them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from recsim_gr.errors import ConfigError
from recsim_gr.histories import Histories
from recsim_gr.log import InteractionLog
from recsim_gr.noise import Scores
from recsim_gr.randomness import generator, uniforms
from recsim_gr.reward_intervals import INTERVALS, Interval, Prediction

FloatArray = NDArray[np.float64]

TARGETS = ("score", "expected", "satisfaction")
"""The observed score, which is what anybody sees; its exact expectation for the user; the exact satisfaction."""

LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Of the intervals whose coverage is measured."""


class ScoringTruth(Protocol):
    """What is asked of a world."""

    @property
    def n_titles(self) -> int: ...

    @property
    def uniforms_per_exposure(self) -> int: ...

    def generate_log(self, n_users: int, split: str) -> InteractionLog: ...

    def satisfaction_with(self, users: NDArray[np.int64], titles: NDArray[np.int64]) -> NDArray[np.float32]: ...

    def expected_score(self, users: NDArray[np.int64]) -> FloatArray: ...

    def expected_score_watched(self, users: NDArray[np.int64]) -> FloatArray: ...

    def sample_scores(self, users: NDArray[np.int64], titles: NDArray[np.int64], u: FloatArray) -> Scores: ...


class Calibrated(Protocol):
    """What is asked of a reward ensemble."""

    @property
    def n_titles(self) -> int: ...

    def at(self, histories: InteractionLog | Histories, titles: NDArray[np.int64] | None = None) -> Prediction: ...

    def around(self, prediction: Prediction, level: float = 0.9, of: str = "score") -> Interval: ...


# -- titles that were chosen, and titles that are forced --------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Exposures:
    """A title a place, and what came or would have come of it.

    Attributes:
        titles: (U, L) int64, 0 where there is none.
        valid: (U, L), whether there is a title.
        targets: name of `TARGETS` to (U, L) float64, in points of the score.
    """

    titles: NDArray[np.int64]
    valid: NDArray[np.bool_]
    targets: Mapping[str, FloatArray]


def chosen_exposures(world: ScoringTruth, log: InteractionLog) -> Exposures:
    """The titles that users chose, each after the history before it: the log's own events."""
    histories, users = Histories(log), _users_of(log)
    valid = histories.valid.numpy()
    titles = np.where(valid, histories.observations.titles, 0)
    scores = histories.observations.scores.astype(np.float64)
    return Exposures(titles, valid, _targets(world, users, titles, scores, world.expected_score_watched(users)))


def forced_exposures(world: ScoringTruth, log: InteractionLog, seed: int) -> Exposures:
    """At each place of the log a title that its user never saw, drawn uniformly without repetition.

    As many as were chosen, after the same histories: the two differ in who picked the title, and in that a title which
    the user chose later is never forced earlier (so that never-shown titles are a little less liked early on than all
    that could be forced there). Where fewer titles are left unseen than were seen, the places left over hold none.
    Scores are drawn as the environments draw those of a recommendation.

    Args:
        world: that made the log.
        log: of test users.
        seed: of titles and scores.
    """
    histories, users = Histories(log), _users_of(log)
    keys = generator(seed, "forced titles").random((len(users), world.n_titles))
    keys[histories.observations.unavailable()] = np.inf
    width = histories.longest
    titles = np.argsort(keys, axis=1)[:, :width]
    there = np.isfinite(np.take_along_axis(keys, titles, axis=1))
    more = ((0, 0), (0, width - titles.shape[1]))
    valid = np.pad(there, more) & histories.valid.numpy()
    titles = np.where(valid, np.pad(titles, more), 0)
    n = world.uniforms_per_exposure
    u = uniforms(seed, "forced scores", users, width * n).reshape(len(users), width, n)
    drawn = [world.sample_scores(users, titles[:, t], u[:, t]).score for t in range(width)]
    scores = np.stack(drawn, axis=1).astype(np.float64)
    return Exposures(titles, valid, _targets(world, users, titles, scores, world.expected_score(users)))


def _users_of(log: InteractionLog) -> NDArray[np.int64]:
    """(U,) ids, in the order of `InteractionLog.sequences`."""
    return log.user[log.step == 0]


def _targets(
    world: ScoringTruth, users: NDArray[np.int64], titles: NDArray[np.int64], scores: FloatArray, expected: FloatArray
) -> dict[str, FloatArray]:
    return {
        "score": scores,
        "expected": np.take_along_axis(expected, titles, axis=1).astype(np.float64),
        "satisfaction": world.satisfaction_with(users, titles).astype(np.float64),
    }


# -- errors and ranks --------------------------------------------------------------------------------------------------


class Agreement(NamedTuple):
    """How well predictions agree with a target.

    Attributes:
        rmse, mae: in points of the score.
        spearman: rank correlation over all events.
        spearman_within: mean over users of the rank correlation within the user: no leniency helps there.
    """

    rmse: float
    mae: float
    spearman: float
    spearman_within: float


def agreement(predicted: NDArray[np.floating], target: FloatArray, valid: NDArray[np.bool_]) -> Agreement:
    """Errors and rank correlations of predictions, one a row and place.

    Args:
        predicted, target: (U, L) at events; or (n, I), every title of n contexts.
        valid: of the same shape, what counts.

    Raises:
        ValueError: nothing counts, or shapes differ.
    """
    if not predicted.shape == target.shape == valid.shape or not valid.any():
        shapes = f"{predicted.shape}, {target.shape}, {valid.shape}"
        raise ValueError(f"agreement takes three arrays of one shape with something valid, got {shapes}")
    x, y = predicted[valid].astype(np.float64), target[valid]
    return Agreement(
        rmse=float(np.sqrt(np.mean((x - y) ** 2))),
        mae=float(np.mean(np.abs(x - y))),
        spearman=_correlation(stats.rankdata(x), stats.rankdata(y)),
        spearman_within=spearman_within(predicted, target, valid),
    )


def spearman_within(predicted: NDArray[np.floating], target: FloatArray, valid: NDArray[np.bool_]) -> float:
    """Mean over rows of Spearman's rank correlation, ties given their mean rank.

    A row whose predictions do not vary counts 0, since they rank nothing; one whose target does not vary (a single
    event, say) is left out. NaN where all are.
    """
    x, y = (_centred_ranks(values, valid) for values in (predicted, target))
    covariance, of_x, of_y = (x * y).sum(axis=1), (x * x).sum(axis=1), (y * y).sum(axis=1)
    counted = of_y > 0
    if not counted.any():
        return float("nan")
    spread = np.sqrt(of_x * of_y)
    each = np.divide(covariance, spread, out=np.zeros(len(x)), where=spread > 0)
    return float(each[counted].mean())


def _centred_ranks(values: NDArray[np.floating], valid: NDArray[np.bool_]) -> FloatArray:
    """Ranks within each row, less their mean; 0 where nothing counts."""
    ranks = stats.rankdata(np.where(valid, values, np.inf), axis=1)  # what does not count ranks last
    count = valid.sum(axis=1, keepdims=True)
    return np.where(valid, ranks - (count + 1) / 2, 0.0)


def _correlation(x: FloatArray, y: FloatArray) -> float:
    """Pearson's; 0 where one does not vary."""
    x, y = x - x.mean(), y - y.mean()
    spread = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / spread if spread > 0 else 0.0


# -- coverage ----------------------------------------------------------------------------------------------------------


class Coverage(NamedTuple):
    """How often an interval held what it is about.

    Attributes:
        exposure: ``chosen`` or ``forced``.
        of: ``score``: intervals of one score, and the score drawn; ``mean``: of the mean reward, and E[score | user,
            title].
        level: what the interval says.
        coverage: the share of events in it; a user's events weigh 1 together, as the guarantee has it.
        standard_error: of the coverage, over users.
        width: mean width in points of the score, weighted likewise; infinite where an interval is.
    """

    exposure: str
    of: str
    level: float
    coverage: float
    standard_error: float
    width: float


def reward_calibration(
    world: ScoringTruth,
    ensemble: Calibrated,
    n_users: int = 2_000,
    seed: int = 0,
    levels: Sequence[float] = LEVELS,
    split: str = "test",
) -> list[Coverage]:
    """Coverage of an ensemble's intervals on titles that users chose and on titles forced on them.

    Args:
        world: that the ensemble's log is from.
        ensemble: fitted and calibrated.
        n_users: how many.
        seed: of the forced titles and their scores.
        levels: of the intervals.
        split: whose users; those of ``test`` live in a later epoch, so that drift counts too.

    Returns:
        A row a kind of exposure, kind of interval and level, in that order.

    Raises:
        ConfigError: the ensemble is over another catalogue, or is not calibrated.
    """
    if ensemble.n_titles != world.n_titles:
        raise ConfigError(f"the world has {world.n_titles} titles and the ensemble {ensemble.n_titles}")
    log = world.generate_log(n_users, split)
    return log_calibration(world, ensemble, log, seed, levels)


def log_calibration(
    world: ScoringTruth,
    ensemble: Calibrated,
    log: InteractionLog,
    seed: int = 0,
    levels: Sequence[float] = LEVELS,
) -> list[Coverage]:
    """`reward_calibration` on the users of a log that is there already."""
    histories, rows = Histories(log), []
    exposures = {"chosen": chosen_exposures(world, log), "forced": forced_exposures(world, log, seed)}
    for name, exposed in exposures.items():
        prediction = ensemble.at(histories, exposed.titles)
        for of in INTERVALS:
            target = exposed.targets["score" if of == "score" else "expected"]
            for level in levels:
                interval = ensemble.around(prediction, level, of)
                rows.append(Coverage(name, of, float(level), *coverage(interval, target, exposed.valid)))
    return rows


def coverage(interval: Interval, target: FloatArray, valid: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Share of targets within their interval, its standard error over users, and the mean width; a user weighs 1.

    Args:
        interval: ends, (U, L) each.
        target: (U, L).
        valid: (U, L); users with nothing valid do not count.
    """
    inside = (interval.low <= target) & (target <= interval.high)
    width = interval.high.astype(np.float64) - interval.low
    by_user = [_row_means(values, valid) for values in (inside, width)]
    spread = by_user[0].std(ddof=1) if len(by_user[0]) > 1 else float("nan")
    return float(by_user[0].mean()), float(spread / np.sqrt(len(by_user[0]))), float(by_user[1].mean())


def _row_means(values: NDArray[np.generic], valid: NDArray[np.bool_]) -> FloatArray:
    """Means of the valid values of each row that has some."""
    count = valid.sum(axis=1)
    return np.where(valid, values, 0.0).sum(axis=1)[count > 0] / count[count > 0]


__all__ = [
    "Agreement",
    "Coverage",
    "Exposures",
    "agreement",
    "chosen_exposures",
    "coverage",
    "forced_exposures",
    "log_calibration",
    "reward_calibration",
    "spearman_within",
]
