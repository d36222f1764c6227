"""Intervals of a reward model: quantiles by hand, and the coverage that they promise where users are exchangeable."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from recsim_gr.errors import ConfigError
from recsim_gr.reward_intervals import Calibration, Prediction, hierarchical_quantile, mean_interval


def calibration(
    residual: list[float], user: list[int], deviation: float = 0.0, noise: float = 1.0, bounded: bool = False
) -> Calibration:
    return Calibration(
        np.array(user),
        np.array(residual, dtype=np.float32),
        np.full(len(user), deviation, dtype=np.float32),
        noise,
        (1.0, 5.0) if bounded else None,
    )


def prediction(mean: list[float], deviation: list[float]) -> Prediction:
    return Prediction(np.array(mean, dtype=np.float32), np.array(deviation, dtype=np.float32))


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_the_quantile_by_hand() -> None:
    """Three users of 1, 2 and 1 events: an event weighs 1/4, 1/8, 1/8, 1/4, and 1/4 stands at infinity.

    Sorted: 0.1 (1/8), 0.2 (1/4), 0.3 (1/4), 0.4 (1/8): weights up to there 1/8, 3/8, 5/8, 3/4.
    """
    scores, user = np.array([0.2, 0.1, 0.4, 0.3]), np.array([7, 8, 8, 9])
    found = {level: hierarchical_quantile(scores, user, level) for level in (0.1, 0.125, 0.2, 0.5, 0.7, 0.75, 0.76)}
    assert found == {0.1: 0.1, 0.125: 0.1, 0.2: 0.2, 0.5: 0.3, 0.7: 0.4, 0.75: 0.4, 0.76: np.inf}


def test_nine_users_are_enough_for_nine_tenths_whatever_the_rounding() -> None:
    assert hierarchical_quantile(np.arange(9.0), np.arange(9), 0.9) == 8.0
    assert hierarchical_quantile(np.arange(8.0), np.arange(8), 0.9) == np.inf


def test_the_interval_of_a_score_by_hand() -> None:
    """Residuals of ±1 to ±9 of nine users at scale sqrt(3² + 4²) = 5: q = 8/5 at level .8; scale is 5 again, or 3."""
    given = calibration([1, -2, 3, -4, 5, -6, 7, -8, 9], list(range(9)), deviation=4.0, noise=3.0)
    assert given.quantile(0.8) == pytest.approx(8 / 5)
    low, high = given.interval(prediction([2.0, 0.0], [4.0, 0.0]), 0.8)
    np.testing.assert_allclose(low, [2 - 8, -24 / 5], rtol=1e-6)
    np.testing.assert_allclose(high, [2 + 8, 24 / 5], rtol=1e-6)
    assert low.dtype == high.dtype == np.float32


def test_scores_have_bounds_and_so_have_their_intervals() -> None:
    given = calibration([0.5] * 9, list(range(9)), bounded=True)
    low, high = given.interval(prediction([1.25, 3.0, 4.75], [0.0] * 3), 0.9)
    np.testing.assert_allclose(low, [1.0, 2.5, 4.25])
    np.testing.assert_allclose(high, [1.75, 3.5, 5.0])
    low, high = given.interval(prediction([3.0], [0.0]), 0.95)  # more than nine users can tell
    assert (low[0], high[0]) == (1.0, 5.0)
    low, high = calibration([0.5] * 9, list(range(9))).interval(prediction([3.0], [0.0]), 0.95)
    assert (low[0], high[0]) == (-np.inf, np.inf)


def test_the_interval_of_the_mean_by_hand() -> None:
    """M = 3, level .9: t with 2 degrees of freedom is 2.9200, times sqrt(4/3) = 3.3717."""
    low, high = mean_interval(prediction([3.0, 2.0], [0.1, 0.0]), 3, 0.9)
    np.testing.assert_allclose(high - 3.0, [0.33717, -1.0], atol=1e-5)
    np.testing.assert_allclose(low, [3.0 - 0.33717, 2.0], atol=1e-5)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, 90, float("nan")])
def test_a_level_that_is_none_is_refused(level: float) -> None:
    with pytest.raises(ConfigError, match="level of an interval must be in"):
        mean_interval(prediction([3.0], [0.1]), 3, level)
    with pytest.raises(ConfigError, match="level of an interval must be in"):
        calibration([0.5] * 9, list(range(9))).interval(prediction([3.0], [0.0]), level)


# -- what they promise ------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(0.05, 0.95))
def test_the_quantile_is_the_smallest_that_weighs_enough(seed: int, level: float) -> None:
    rng = np.random.default_rng(seed)
    user = rng.integers(6, size=rng.integers(1, 25))
    scores = rng.integers(8, size=len(user)).astype(float)  # with ties
    q = hierarchical_quantile(scores, user, level)
    users = np.unique(user)
    weights = np.array([1 / ((len(users) + 1) * (user == u).sum()) for u in user])
    if np.isinf(q):
        assert weights.sum() < level
    else:
        assert weights[scores <= q].sum() >= level - 1e-9
        assert weights[scores < q].sum() < level
    order = rng.permutation(len(user))
    assert hierarchical_quantile(scores[order], user[order], level) == q


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
def test_a_new_user_is_covered_at_the_level_though_events_of_a_user_hang_together(level: float) -> None:
    """400 times 39 users and a new one. A user's residuals share a bias, and eager users are the noisier ones, so that
    counting events alike would cover too seldom; lengths differ. The mean coverage lies within level and
    level + 1/(K + 1), and 3.5 standard errors beside."""
    rng = np.random.default_rng(1)
    covered, pooled = [], []
    for _ in range(400):
        width = rng.uniform(0.2, 2.0, 40)
        length = np.where(width > 1.5, 2, 12)
        user = np.repeat(np.arange(40), length)
        residual = width[user] * (rng.normal(size=40)[user] + rng.normal(size=len(user)))
        deviation = rng.uniform(0.1, 0.4, len(user)).astype(np.float32)
        known, new = user < 39, user == 39
        given_users = Calibration(user[known], residual[known].astype(np.float32), deviation[known], 0.5)
        low, high = given_users.interval(Prediction(np.zeros(new.sum(), dtype=np.float32), deviation[new]), level)
        covered.append(((low <= residual[new]) & (residual[new] <= high)).mean())
        scale = given_users.scale(deviation)
        q = np.quantile(np.abs(residual[known]) / scale[known], level)
        pooled.append((np.abs(residual[new]) <= q * scale[new]).mean())
    error = np.std(covered) / np.sqrt(len(covered))
    assert level - 3.5 * error < np.mean(covered) < level + 1 / 40 + 3.5 * error
    assert np.mean(pooled) < level - 0.01


def test_the_interval_of_the_mean_covers_one_more_draw() -> None:
    """M = 3 draws and a fourth, all normal: exactly the level, 20,000 times."""
    draws = np.random.default_rng(2).normal(2.0, 0.7, (4, 20_000)).astype(np.float32)
    low, high = mean_interval(Prediction(draws[:3].mean(axis=0), draws[:3].std(axis=0, ddof=1)), 3, 0.8)
    covered = ((low <= draws[3]) & (draws[3] <= high)).sum()
    assert stats.binomtest(int(covered), 20_000, 0.8).pvalue > 0.001
