"""What Table 1 adds to `recsim_gr.reward_truth`: gains over the study's baselines, and the law of the floor.

Arrays are (U, L): users and the places of their events. Places without an event are False in ``valid``.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from recsim_gr.reward_truth import Exposures, FloatArray, agreement

BASELINES = ("UserMean", "TitleMean")
"""The study's two."""

ADDITIVE = "Additive"
"""The two means together, which the study does not have: a title's mean and by how much the user scored above the
titles' means so far."""

FLOOR, CONSTANT = "ExpectedScore", "GlobalMean"
"""The exact expectation, which no model beats on observed scores unless the noise has a memory (``drift``), and the
mean of the training log."""


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
            figures = agreement(predicted, target, exposures.valid)._asdict()
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
