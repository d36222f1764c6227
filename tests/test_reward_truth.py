"""Reward models against the truth: by brute force, and with models whose coverage and errors are known."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

import recsim_gr
from recsim_gr.errors import ConfigError
from recsim_gr.histories import Histories
from recsim_gr.log import InteractionLog
from recsim_gr.reward_intervals import Calibration, Interval, Prediction, mean_interval
from recsim_gr.reward_truth import (
    LEVELS,
    agreement,
    chosen_exposures,
    coverage,
    forced_exposures,
    log_calibration,
    reward_calibration,
    spearman_within,
)
from recsim_gr.rewards import RewardEnsembleConfig
from recsim_gr.training import TrainingConfig
from recsim_gr.world import World, WorldConfig

SMALL = WorldConfig(n_titles=40, history_length=8, history_median=5, reward_noise=0.4, seed=1_000)


@pytest.fixture(scope="module")
def world() -> World:
    return World(SMALL)


@pytest.fixture(scope="module")
def log(world: World) -> InteractionLog:
    return world.generate_log(300, "test")


# -- exposures --------------------------------------------------------------------------------------------------------


def test_chosen_exposures_are_the_logs_events(world: World, log: InteractionLog) -> None:
    exposed = chosen_exposures(world, log)
    rows = np.cumsum(log.step == 0) - 1
    places = (rows, log.step)
    assert exposed.valid.sum() == len(log)
    np.testing.assert_array_equal(exposed.titles[places], log.title)
    np.testing.assert_array_equal(exposed.targets["score"][places], log.score)
    users = log.user[log.step == 0]
    expected, satisfaction = world.expected_score(users), world.satisfaction(users)
    np.testing.assert_allclose(exposed.targets["expected"][places], expected[rows, log.title], rtol=1e-6)
    np.testing.assert_allclose(exposed.targets["satisfaction"][places], satisfaction[rows, log.title], rtol=1e-6)


def test_forced_titles_are_unseen_uniform_and_never_twice(world: World, log: InteractionLog) -> None:
    exposed, seen = forced_exposures(world, log, 3), log.sequences()
    np.testing.assert_array_equal(exposed.valid, Histories(log).valid.numpy())
    for row in range(log.n_users):
        forced = exposed.titles[row, exposed.valid[row]]
        assert len(set(forced)) == len(forced)
        assert not set(forced) & set(seen.titles[row, : seen.length[row]])
    # uniform: what is forced of a title, less what would be by chance, over its standard error
    unseen = ~seen.seen()
    share = seen.length[:, None] / unseen.sum(axis=1, keepdims=True) * unseen
    count = np.bincount(exposed.titles[exposed.valid], minlength=40)
    z = (count - share.sum(axis=0)) / np.sqrt((share * (1 - share)).sum(axis=0))
    assert np.abs(z).max() < 4.0
    assert (forced_exposures(world, log, 3).titles == exposed.titles).all()
    assert (forced_exposures(world, log, 4).titles != exposed.titles).any()


def test_forced_scores_come_from_the_law_of_the_world(world: World, log: InteractionLog) -> None:
    """Over 20 seeds: scores less their exact expectation are noise of mean 0, for low and for high expectations."""
    low, high = [], []
    for seed in range(20):
        exposed = forced_exposures(world, log, seed)
        expected, score = (exposed.targets[name][exposed.valid] for name in ("expected", "score"))
        middle = np.median(expected)
        low.append((score - expected)[expected < middle])
        high.append((score - expected)[expected >= middle])
    for left in (np.concatenate(low), np.concatenate(high)):
        assert abs(left.mean()) < 4 * left.std() / np.sqrt(len(left))
        assert left.std() > 0.3


def test_where_few_titles_are_left_fewer_are_forced() -> None:
    world = World(WorldConfig(n_titles=10, n_genres=2, history_length=8, reward_noise=0.4, seed=1_001))
    log = world.generate_log(20, "test")
    exposed = forced_exposures(world, log, 0)
    assert (exposed.valid.sum(axis=1) == 2).all()
    assert (exposed.titles[~exposed.valid] == 0).all()


def test_titles_that_are_not_out_are_not_forced() -> None:
    world = World(WorldConfig(n_titles=40, history_length=6, cold_share=0.4, reward_noise=0.4, seed=1_002))
    log = world.generate_log(200, "validation")
    exposed = forced_exposures(world, log, 0)
    assert log.catalogue is not None
    unreleased = log.catalogue.unreleased(log.epoch[log.step == 0])
    assert unreleased.any()
    assert not np.take_along_axis(unreleased, exposed.titles, axis=1)[exposed.valid].any()


# -- errors and ranks -------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.booleans())
def test_agreement_is_scipys_row_by_row(seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 7)), int(rng.integers(2, 9)))
    x, y = (rng.integers(4, size=shape).astype(float) if ties else rng.normal(size=shape) for _ in range(2))
    valid = rng.random(shape) < 0.7
    valid[0, :2] = True
    got = agreement(x, y, valid)
    assert got.rmse == pytest.approx(np.sqrt(np.mean([(a - b) ** 2 for a, b in zip(x[valid], y[valid], strict=True)])))
    assert got.mae == pytest.approx(np.mean([abs(a - b) for a, b in zip(x[valid], y[valid], strict=True)]))
    if np.ptp(x[valid]) > 0 and np.ptp(y[valid]) > 0:
        assert got.spearman == pytest.approx(stats.spearmanr(x[valid], y[valid]).statistic)
    else:
        assert got.spearman == 0.0
    each = []
    for a, b, there in zip(x, y, valid, strict=True):
        a, b = a[there], b[there]
        if len(b) > 1 and np.ptp(b) > 0:
            each.append(stats.spearmanr(a, b).statistic if np.ptp(a) > 0 else 0.0)
    if each:
        assert got.spearman_within == pytest.approx(np.mean(each))
    else:
        assert np.isnan(got.spearman_within)


def test_ranks_within_a_user_do_not_know_leniency() -> None:
    rng = np.random.default_rng(0)
    x, y, valid = rng.normal(size=(20, 6)), rng.normal(size=(20, 6)), np.ones((20, 6), dtype=bool)
    lenient = y + rng.normal(size=(20, 1)) * 5
    assert spearman_within(x, lenient, valid) == pytest.approx(spearman_within(x, y, valid))
    assert agreement(x, lenient, valid).spearman != pytest.approx(agreement(x, y, valid).spearman)


def test_agreement_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="something valid"):
        agreement(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((2, 3), dtype=bool))
    with pytest.raises(ValueError, match="one shape"):
        agreement(np.zeros((2, 3)), np.zeros((2, 2)), np.ones((2, 3), dtype=bool))


# -- coverage ---------------------------------------------------------------------------------------------------------


def test_coverage_by_hand() -> None:
    """User 0: 1 of 2 within; user 1: 3 of 3, the ends included; user 2 has nothing. Mean 3/4, deviation of the two
    .3536, over sqrt 2: a quarter. Widths 2 and 4."""
    target = np.array([[1.0, 5.0, 9.0], [0.0, 4.0, 2.0], [0.0, 0.0, 0.0]])
    low = np.array([[0.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3], dtype=np.float32)
    high = np.array([[2.0, 2.0, 2.0], [4.0] * 3, [4.0] * 3], dtype=np.float32)
    valid = np.array([[True, True, False], [True] * 3, [False] * 3])
    assert coverage(Interval(low, high), target, valid) == pytest.approx((0.75, 0.25, 3.0))


class KnowsTheMean:
    """Predicts the exact expectation, off by a normal error of known size that its members have too.

    Args:
        world: whose.
        log: its users, at the places of the log.
        error: standard deviation of the error, of each member as well.
        shift: added to every prediction.
    """

    MEMBERS = 4

    def __init__(self, world: World, log: InteractionLog, error: float, shift: float = 0.0) -> None:
        self.n_titles = world.n_titles
        self.expected = world.expected_score(log.user[log.step == 0])
        self.error, self.shift, self.seed = error, shift, 0
        users = world.users("validation", 400)
        truth = world.expected_score(users)
        titles = np.random.default_rng(5).integers(self.n_titles, size=400)
        u = np.random.default_rng(6).random((400, world.uniforms_per_exposure))
        score = world.sample_scores(users, titles, u).score
        residual = (score - truth[np.arange(400), titles]).astype(np.float32)
        self.calibration = Calibration(np.arange(400), residual, np.zeros(400, dtype=np.float32), 1.0, (1.0, 5.0))

    def at(self, histories: InteractionLog | Histories, titles: NDArray[np.int64] | None = None) -> Prediction:
        assert titles is not None
        self.seed += 1
        rng = np.random.default_rng(self.seed)
        truth = np.take_along_axis(self.expected, titles, axis=1)
        centre = truth + self.shift + rng.normal(0, self.error, titles.shape)
        members = centre + rng.normal(0, self.error, (self.MEMBERS, *titles.shape))
        return Prediction(members.mean(axis=0).astype(np.float32), members.std(axis=0, ddof=1).astype(np.float32))

    def around(self, prediction: Prediction, level: float = 0.9, of: str = "score") -> Interval:
        if of == "mean":
            return mean_interval(prediction, self.MEMBERS, level)
        return self.calibration.interval(prediction, level)


def test_a_model_that_is_right_is_found_calibrated(world: World, log: InteractionLog) -> None:
    """Its truth is one more draw like its members, and its residuals on forced titles are the noise."""
    rows = log_calibration(world, KnowsTheMean(world, log, 0.2), log)
    found = {(row.exposure, row.of, row.level): row for row in rows}
    assert list(found) == [(e, of, level) for e in ("chosen", "forced") for of in ("score", "mean") for level in LEVELS]
    for (exposure, of, level), row in found.items():
        if of == "mean":
            assert abs(row.coverage - level) < 4 * row.standard_error
        elif exposure == "forced":
            assert abs(row.coverage - level) < 4 * row.standard_error + 0.05  # and what 400 residuals leave open


def test_a_model_that_is_biased_is_found_out(world: World, log: InteractionLog) -> None:
    rows = log_calibration(world, KnowsTheMean(world, log, 0.1, shift=0.6), log, levels=(0.9,))
    for row in rows:
        if row.of == "mean":
            assert row.coverage < 0.3
    with_spread = log_calibration(world, KnowsTheMean(world, log, 0.6, shift=0.0), log, levels=(0.9,))
    widths = {row.of: row.width for row in with_spread}
    assert widths["mean"] > {row.of: row.width for row in rows}["mean"]


def test_an_ensemble_on_its_own_world(world: World) -> None:
    """Chosen titles are covered at the level, users being exchangeable with those that calibrate; forced ones less."""
    train, held_out = world.generate_log(300), world.generate_log(150, "validation")
    steps = TrainingConfig(steps=60, batch_users=32, learning_rate=1e-2, warmup_steps=5, checks=2)
    backbone = recsim_gr.pretrain(train, recsim_gr.HSTUConfig(dimensions=16), steps, held_out)
    config = RewardEnsembleConfig(members=2, training=steps)
    ensemble = recsim_gr.fit_reward_ensemble(train, backbone, config, held_out)
    found: dict[Any, Any] = {
        (row.exposure, row.of): row
        for row in reward_calibration(world, ensemble, 400, seed=1, levels=(0.8,), split="judge")
    }
    own = found["chosen", "score"]
    assert abs(own.coverage - 0.8) < 4 * own.standard_error + 0.03
    assert found["forced", "score"].coverage < own.coverage
    assert found["chosen", "mean"].coverage < 0.8  # members agree on what the history does not tell
    again = reward_calibration(world, ensemble, 400, seed=1, levels=(0.8,), split="judge")
    assert [row.coverage for row in again] == [row.coverage for row in found.values()]


def test_another_catalogue_is_refused(world: World, log: InteractionLog) -> None:
    other = World(WorldConfig(n_titles=30, history_length=8))
    with pytest.raises(ConfigError, match="the world has 30 titles and the ensemble 40"):
        reward_calibration(other, KnowsTheMean(world, log, 0.1), 10)
