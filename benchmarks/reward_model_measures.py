"""What a reward model is measured by: errors, ranks and coverage, against what was seen and against the truth.

Arrays are (U, L): users and the places of their events. Places without an event are False in ``valid``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from recsim_gr.histories import Histories
from recsim_gr.log import InteractionLog
from recsim_gr.randomness import generator, uniforms
from recsim_gr.world_base import WorldBase

FloatArray = NDArray[np.float64]

TARGETS = ("score", "expected", "satisfaction")
"""The observed score, which is what anybody sees; its exact expectation for the user; the exact satisfaction."""

BASELINES = ("UserMean", "TitleMean")
"""The study's two."""

ADDITIVE = "Additive"
"""The two means together, which the study does not have: a title's mean and by how much the user scored above the
titles' means so far."""

FLOOR, CONSTANT = "ExpectedScore", "GlobalMean"
"""The exact expectation, which no model beats on observed scores, and the mean of the training log."""


@dataclass(frozen=True)
class Exposures:
    """A title a place, and what came or would have come of it.

    Attributes:
        titles: (U, L).
        valid: (U, L), whether there is a title.
        targets: name of `TARGETS` to (U, L).
    """

    titles: NDArray[np.int64]
    valid: NDArray[np.bool_]
    targets: Mapping[str, FloatArray]


def chosen_exposures(world: WorldBase, log: InteractionLog) -> Exposures:
    """The titles that users chose, each after the history before it: the log's own events."""
    histories = Histories(log)
    valid, users = histories.valid.numpy(), _users_of(log)
    titles = np.where(valid, histories.observations.titles, 0)
    scores = histories.observations.scores.astype(np.float64)
    return Exposures(titles, valid, _targets(world, users, titles, scores, world.expected_score_watched(users)))


def forced_exposures(world: WorldBase, log: InteractionLog, seed: int) -> Exposures:
    """At each place of the log a title that the user was never shown, drawn uniformly without repetition.

    As many as were chosen, after the same histories, so that the two differ in who picked the title and nothing else.
    Where a user has not seen fewer titles than seen, the places that are left over are not valid. The scores are
    drawn from the world as those of recommendations are.
    """
    histories = Histories(log)
    observations, users = histories.observations, _users_of(log)
    keys = generator(seed, "titles never shown").random((len(users), world.n_titles))
    keys[observations.unavailable()] = np.inf
    titles = np.argsort(keys, axis=1)[:, : histories.longest]
    valid = np.zeros(histories.valid.shape, dtype=bool)
    valid[:, : titles.shape[1]] = np.isfinite(np.take_along_axis(keys, titles, axis=1))
    valid &= histories.valid.numpy()
    titles = np.pad(titles, ((0, 0), (0, valid.shape[1] - titles.shape[1])))
    per_event = world.uniforms_per_exposure
    u = uniforms(seed, "scores never shown", users, valid.shape[1] * per_event).reshape(len(users), -1, per_event)
    drawn = [world.sample_scores(users, titles[:, t], u[:, t]).score for t in range(valid.shape[1])]
    scores = np.stack(drawn, axis=1).astype(np.float64)
    return Exposures(titles, valid, _targets(world, users, titles, scores, world.expected_score(users)))


def _users_of(log: InteractionLog) -> NDArray[np.int64]:
    """(U,) ids, in the order of `InteractionLog.sequences`."""
    return log.user[log.step == 0]


def _targets(
    world: WorldBase, users: NDArray[np.int64], titles: NDArray[np.int64], scores: FloatArray, expected: FloatArray
) -> dict[str, FloatArray]:
    return {
        "score": scores,
        "expected": np.take_along_axis(expected, titles, axis=1).astype(np.float64),
        "satisfaction": world.satisfaction_with(users, titles).astype(np.float64),
    }


# ------------------------------------------------------------------------------------------------------- measures


def errors_and_ranks(predicted: FloatArray, target: FloatArray, valid: NDArray[np.bool_]) -> dict[str, float]:
    """RMSE and MAE in points of the score; Spearman's rank correlation over all events, and within users.

    Args:
        predicted, target, valid: (U, L).
    """
    error = (predicted - target)[valid]
    return {
        "rmse": float(np.sqrt(np.mean(error**2))),
        "mae": float(np.mean(np.abs(error))),
        "spearman": _correlation(stats.rankdata(predicted[valid]), stats.rankdata(target[valid])),
        "spearman_within": spearman_within(predicted, target, valid),
    }


def spearman_within(predicted: FloatArray, target: FloatArray, valid: NDArray[np.bool_]) -> float:
    """Mean over users of Spearman's rank correlation, ties given their mean rank.

    A user whose predictions do not vary counts 0, since they rank nothing; one with a single event, or whose target
    does not vary, is left out. NaN where all are.
    """
    x, y = (_centred_ranks(values, valid) for values in (predicted, target))
    covariance, of_x, of_y = (x * y).sum(axis=1), (x * x).sum(axis=1), (y * y).sum(axis=1)
    counted = of_y > 0
    if not counted.any():
        return float("nan")
    spread = np.sqrt(of_x * of_y)
    each = np.divide(covariance, spread, out=np.zeros(len(x)), where=spread > 0)
    return float(each[counted].mean())


def _centred_ranks(values: FloatArray, valid: NDArray[np.bool_]) -> FloatArray:
    """(U, L) ranks within each user, less their mean; 0 where there is no event."""
    ranks = stats.rankdata(np.where(valid, values, np.inf), axis=1)  # what is no event ranks last
    count = valid.sum(axis=1, keepdims=True)
    return np.where(valid, ranks - (count + 1) / 2, 0.0)


def _correlation(x: FloatArray, y: FloatArray) -> float:
    """Pearson's; 0 where one does not vary."""
    x, y = x - x.mean(), y - y.mean()
    spread = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / spread if spread > 0 else 0.0


def rmse_gain(
    predicted: FloatArray, opponent: FloatArray, target: FloatArray, valid: NDArray[np.bool_]
) -> tuple[float, float]:
    """RMSE of the opponent less that of the prediction on the same events, and its standard error over users.

    The error is the delta method's, with users as clusters: what a study of one data set would test with.
    """
    sums = [np.where(valid, (x - target) ** 2, 0.0).sum(axis=1) for x in (opponent, predicted)]
    count = valid.sum(axis=1)
    total = count.sum()
    roots = [float(np.sqrt(s.sum() / total)) for s in sums]
    parts = [(s - count * root**2) / (2 * max(root, 1e-12)) for s, root in zip(sums, roots, strict=True)]
    return roots[0] - roots[1], float(np.sqrt(((parts[0] - parts[1]) ** 2).sum()) / total)


def floor_statistic(
    predicted: FloatArray, expected: FloatArray, score: FloatArray, valid: NDArray[np.bool_]
) -> tuple[float, float]:
    """How far (r̂ − r)² = (r̂ − E r)² + (E r − r)² is off in the mean, in standard errors over users, and the share of
    the left side.

    A score's noise is independent of all that a model knows before it, so that the cross term 2(r̂ − E r)(E r − r)
    has mean 0 whatever the model: the first number is about standard normal, and far below zero means that a model
    knew the score before it came.
    """
    cross = np.where(valid, 2 * (predicted - expected) * (expected - score), 0.0).sum(axis=1)
    error = float(np.sqrt((cross**2).sum()))
    whole = float(np.where(valid, (predicted - score) ** 2, 0.0).sum())
    return (float(cross.sum()) / error if error > 0 else 0.0), float(cross.sum()) / max(whole, 1e-12)


def measures(predictions: Mapping[str, FloatArray], exposures: Exposures) -> dict[str, dict[str, float]]:
    """All figures of each model on one set of exposures: model to ``TARGET_STATISTIC``.

    Models but for the baselines have also their gain in RMSE over the better of `BASELINES` on that very target (an
    opponent chosen in hindsight, so that no gain is owed to the weaker one), with its standard error over users, and
    over `ADDITIVE`.

    Args:
        predictions: model to (U, L); the baselines among them.
        exposures: where.
    """
    found: dict[str, dict[str, float]] = {model: {} for model in predictions}
    for name, target in exposures.targets.items():
        for model, predicted in predictions.items():
            figures = errors_and_ranks(predicted, target, exposures.valid)
            found[model] |= {f"{name}_{statistic}": value for statistic, value in figures.items()}
        best = min(BASELINES, key=lambda model: found[model][f"{name}_rmse"])
        ranked = max(found[model][f"{name}_spearman_within"] for model in BASELINES)
        for model, predicted in predictions.items():
            if model not in BASELINES:
                gain, error = rmse_gain(predicted, predictions[best], target, exposures.valid)
                further = found[ADDITIVE][f"{name}_rmse"] - found[model][f"{name}_rmse"]
                found[model] |= {f"{name}_gain": gain, f"{name}_gain_se": error, f"{name}_additive_gain": further}
                found[model][f"{name}_rank_gain"] = found[model][f"{name}_spearman_within"] - ranked
    return found
