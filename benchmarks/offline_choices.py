"""How an agent's strength is chosen on validation users: by what a practitioner sees, and by the truth (design §8)."""

from collections.abc import Mapping, Sequence

import numpy as np

DEFAULT = "default"
"""The trial at the strength that the agent comes with: chosen by nobody."""

JUDGE, NDCG, TRUTH, SNIPS = ("validation_" + name for name in ("judge_return", "ndcg10", "value_top10", "snips"))
"""Figures of a trial on validation users."""

RULES: Mapping[str, str] = {
    "judge": "the highest score by the judge",
    "ndcg": "the highest NDCG@10",
    "judge_ndcg": "the highest score by the judge among those with NDCG@10 of at least 95 % of RewardWeightedBC's",
    "snips": "the highest self-normalised estimate of the score, by the logging policy's propensities",
    "truth": "the highest true top-10 value, which no practitioner has",
}
"""The five choices of design §8, and what each takes."""

CRITERIA: Mapping[str, str] = {"judge": JUDGE, "ndcg": NDCG, "judge_ndcg": JUDGE, "snips": SNIPS, "truth": TRUTH}
"""What each of the rules looks at."""

NDCG_SHARE = 0.95
"""Of `RewardWeightedBC`'s NDCG@10 on the same users, which `judge_ndcg` asks for."""


def choose(rule: str, trials: Sequence[Mapping[str, float]], reference_ndcg: float) -> int | None:
    """Which trial a rule takes.

    Where no trial keeps 95 % of the reference's NDCG, ``judge_ndcg`` takes the one that keeps most: nearest to what was
    asked for. Of equal trials the first is taken, which is the weakest.

    Args:
        rule: a key of `RULES`.
        trials: figures on validation users, a mapping a trial, from the weakest to the strongest.
        reference_ndcg: `RewardWeightedBC`'s on the same users.

    Returns:
        its place in ``trials``; None where a figure that the rule asks for is missing in all.
    """
    judged = [trial.get(CRITERIA[rule], np.nan) for trial in trials]
    if rule == "judge_ndcg":
        kept = [trial.get(NDCG, np.nan) for trial in trials]
        if not np.isfinite(reference_ndcg):
            return None
        allowed = [value >= NDCG_SHARE * reference_ndcg for value in kept]
        if not any(a and np.isfinite(j) for a, j in zip(allowed, judged, strict=True)):
            return _highest(kept)
        judged = [j if a else np.nan for a, j in zip(allowed, judged, strict=True)]
    return _highest(judged)


def at_the_end(place: int, n_trials: int) -> bool:
    """Whether a choice is the weakest or the strongest that was tried: the best may lie beyond."""
    return n_trials > 1 and place in (0, n_trials - 1)


def _highest(values: Sequence[float]) -> int | None:
    known = np.asarray(values, dtype=np.float64)
    return int(np.nanargmax(known)) if np.isfinite(known).any() else None
