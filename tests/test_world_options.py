"""What a world can be beyond the plain one: lengths that vary, titles that come out, drift, order, acceptance."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from recsim_gr.behaviour import SPLITS, acceptance_probability
from recsim_gr.catalogue import Catalogue
from recsim_gr.errors import ConfigError, LogFormatError
from recsim_gr.log import COLUMNS, InteractionLog
from recsim_gr.noise import NOISE_MODELS
from recsim_gr.observations import Observations
from recsim_gr.randomness import uniforms
from recsim_gr.scoring import Examination
from recsim_gr.world import World, WorldConfig
from recsim_gr.world_base import CARRY_OVER_HOURS

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
STATISTICAL = settings(max_examples=6, deadline=None, derandomize=True)

FloatArray = NDArray[np.float64]
splits = st.sampled_from(SPLITS)


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> WorldConfig:
    """Small worlds with every option on or off."""
    n_titles = fixed.pop("n_titles", draw(st.integers(8, 20)))
    cold = draw(st.sampled_from([0.0, 0.25, 0.5]))
    length = draw(st.integers(1, n_titles - round(cold * n_titles) - 1))
    noise = draw(st.sampled_from(list(NOISE_MODELS)))
    drawn = {
        "n_titles": n_titles,
        "history_length": length,
        "history_median": draw(st.integers(0, length)),
        "history_log_deviation": draw(st.sampled_from([0.0, 1.0])),
        "n_epochs": draw(st.integers(2, 4)),
        "cold_share": cold,
        "order_effect": draw(st.sampled_from([0.0, 0.0, 1.0, 5.0])),
        "population_drift": draw(st.sampled_from([0.0, 1.0])),
        "accept": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "pull_strength": draw(st.sampled_from([0.0, 2.0, 20.0])),
        "taste_dimensions": 3,
        "n_genres": 3,
        "reward_noise": draw(st.floats(0.0, 1.0)),
        "noise_model": noise,
        "duration_debiased": noise == "watch_time" and draw(st.booleans()),
        "seed": draw(st.integers(0, 2**40)),
    }
    return WorldConfig(**(drawn | fixed))


def log_of(config: WorldConfig, n_users: int = 9, split: str = "train", **options: Any) -> InteractionLog:
    return World(config).generate_log(n_users, split, expose_propensities=True, **options)


def histories_of(log: InteractionLog) -> list[list[int]]:
    """The rows of each user's events."""
    starts = np.flatnonzero(log.step == 0)
    return [list(range(a, b)) for a, b in zip(starts, [*starts[1:], len(log)], strict=True)]


# -------------------------------------------------------------------------------------------- any combination


@PROPERTY
@given(configs(), splits)
def test_propensities_are_those_of_first_principles(config: WorldConfig, split: str) -> None:
    # u_i = κ⟨φ, v_i⟩ + (1 − δ)·appeal + ω·Σ_j exp(−gap_j/2 h)⟨v_j, v_i⟩ over what is out and unseen, in fsum
    world = World(config)
    log = log_of(config, 6, split)
    hours = world.hours(world.users(split, 6)).astype(np.float32).astype(np.float64)  # as the log has them
    for row, events in enumerate(histories_of(log)):
        user = log.user[events[:1]]
        delta = world.behaviour(user).discernment[0]
        epoch = int(log.epoch[events[0]])
        pull = world.traits @ world.pull_vectors(user)[0]
        base = config.pull_strength * pull + (1.0 - delta) * world.appeal[epoch]
        for step, event in enumerate(events):
            seen = log.title[events[:step]]
            fading = np.exp(-(hours[row, step] - hours[row, :step]) / CARRY_OVER_HOURS)
            carried = config.order_effect * (world.traits @ (fading @ world.traits[seen]))
            there = [i for i in range(config.n_titles) if i not in seen and world.release[i] <= epoch]
            utility = base + carried
            top = max(utility[there])
            mass = math.fsum(math.exp(utility[i] - top) for i in there)
            expected = math.exp(utility[log.title[event]] - top) / mass
            assert log.require_propensities()[event] == pytest.approx(expected, rel=1e-8)


@PROPERTY
@given(configs(), splits, st.integers(1, 9))
def test_the_chunk_size_changes_no_bit(config: WorldConfig, split: str, chunk: int) -> None:
    whole, other = log_of(config, 9, split), log_of(config, 9, split, chunk_users=chunk)
    for name in (*COLUMNS, "propensities"):
        assert getattr(whole, name).tobytes() == getattr(other, name).tobytes(), name


@PROPERTY
@given(configs(), splits)
def test_contexts_are_the_log_and_the_event_that_follows(config: WorldConfig, split: str) -> None:
    world = World(config)
    contexts, log = world.contexts(7, split=split), log_of(config, 7, split)
    seen, rows = contexts.observations, np.arange(7)
    for row, events in enumerate(histories_of(log)):
        assert seen.length[row] == len(events)
        assert seen.titles[row, : len(events)].tolist() == log.title[events].tolist()
        assert seen.scores[row, : len(events)].tolist() == log.score[events].tolist()
        assert (seen.titles[row, len(events) :] == config.n_titles).all()
        assert not seen.scores[row, len(events) :].any()
        assert not seen.times[row, len(events) :].any()
        assert contexts.next_times[row] >= log.hours[events[-1]]
    assert not seen.unavailable()[rows, contexts.next_titles].any()
    log_probs = world.logging_log_probs(contexts.users, seen.titles, seen.times, contexts.next_times)
    assert (np.isneginf(log_probs) == seen.unavailable()).all()
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1.0, rtol=1e-12)


@STATISTICAL
@given(configs(n_titles=10))
def test_sampled_scores_have_the_expected_score_and_worth(config: WorldConfig) -> None:
    # Moods have mean 0 over users and moments, not for one user at one moment: each user is asked about one moment,
    # so the mean over many users is what is compared.
    world = World(config)
    users = world.users("test", 6_000)
    titles = (users % config.n_titles).astype(np.int64)
    u = uniforms(3, "test", users, world.uniforms_per_exposure)
    drawn = world.sample_scores(users, titles, u)
    pick = titles[:, None]
    error = drawn.score - np.take_along_axis(world.expected_score(users), pick, axis=1)[:, 0]
    assert abs(error.mean()) < 4.5 * error.std() / math.sqrt(len(users)) + 1e-9
    satisfaction = np.take_along_axis(world.satisfaction(users), pick, axis=1)[:, 0].astype(np.float64)
    accepted = np.take_along_axis(world.acceptance(users), pick, axis=1)[:, 0]
    worth = np.take_along_axis(world.worth(users), pick, axis=1)[:, 0]
    np.testing.assert_allclose(worth, 1.0 + accepted * (satisfaction - 1.0), rtol=1e-5)
    assert drawn.score.shape == (6_000,)


@PROPERTY
@given(configs())
def test_a_log_survives_the_disk_with_its_catalogue(tmp_path_factory: Any, config: WorldConfig) -> None:
    log = log_of(config)
    path = tmp_path_factory.mktemp("log") / "log.parquet"
    log.write(path)
    read = InteractionLog.read(path)
    assert read.catalogue is not None
    assert log.catalogue is not None
    for name in ("genre", "duration_minutes", "release"):
        assert getattr(read.catalogue, name).tobytes() == getattr(log.catalogue, name).tobytes()
    assert read.title.tobytes() == log.title.tobytes()


# ---------------------------------------------------------------------------------------------------- lengths


def test_history_lengths_have_the_quantiles_that_the_config_says() -> None:
    config = WorldConfig(n_titles=400, history_length=300, history_median=40, history_log_deviation=1.0)
    lengths = World(config).history_lengths(World(config).users("train", 20_000))
    # exp(1.2816) = 3.602: quantiles 10, 50, 90 % of a log-normal of median 40 are 11.1, 40 and 144
    assert np.quantile(lengths, [0.1, 0.5, 0.9]) == pytest.approx([11.1, 40, 144], rel=0.05)
    # P(40·exp(z) >= 299.5) = P(z >= 2.013) = 2.2 % are cut
    assert (lengths == 300).mean() == pytest.approx(0.022, abs=0.004)
    assert lengths.min() >= 1


# ----------------------------------------------------------------------------------------------------- releases


def test_titles_come_out_evenly_over_the_later_epochs() -> None:
    release = World(WorldConfig(n_titles=100, n_epochs=4, cold_share=0.31)).release
    assert np.bincount(release).tolist() == [69, 11, 10, 10]


@PROPERTY
@given(configs(cold_share=0.5, history_length=3, history_median=0))
def test_nobody_watches_what_is_not_out(config: WorldConfig) -> None:
    world = World(config)
    for split in SPLITS:
        log = world.generate_log(30, split)
        assert (world.release[log.title] <= log.epoch).all()


def test_an_event_before_the_release_is_no_legal_log() -> None:
    log = log_of(WorldConfig(n_titles=10, history_length=3))
    assert log.catalogue is not None
    late = log.catalogue.release.copy()
    late[log.title[4]] = 9
    with pytest.raises(LogFormatError, match=r"row \d+ of the log: title must be one that is out"):
        replace(log, catalogue=Catalogue(log.catalogue.genre, log.catalogue.duration_minutes, late))
    part = Catalogue(log.catalogue.genre[1:], log.catalogue.duration_minutes[1:], log.catalogue.release[1:])
    with pytest.raises(LogFormatError, match="must have its 10 titles, got 9"):
        replace(log, catalogue=part)


@pytest.mark.parametrize(
    ("genre", "minutes", "release", "complaint"),
    [
        ([0, -1], [1.0, 1.0], [0, 0], "genre of title 1 must be 0 or more, got -1"),
        ([0, 0], [1.0, 0.0], [0, 0], "duration_minutes of title 1 must be more than 0, got 0.0"),
        ([0, 0], [math.nan, 1.0], [0, 0], "duration_minutes of title 0 must be more than 0, got nan"),
        ([0, 0], [1.0, 1.0], [0, -2], "release of title 1 must be 0 or more, got -2"),
        ([0, 0], [1.0], [0, 0], "duration_minutes must be one number a title"),
    ],
)
def test_a_catalogue_that_is_none_is_refused(genre: Any, minutes: Any, release: Any, complaint: str) -> None:
    with pytest.raises(LogFormatError, match=complaint):
        Catalogue(np.array(genre), np.array(minutes), np.array(release))


# -------------------------------------------------------------------------------------------------------- drift


def test_the_population_moves_by_what_the_config_says() -> None:
    world = World(WorldConfig(n_titles=30, population_drift=1.5, taste_dimensions=4, seed=3))
    users = world.users("train", 30_000)
    epoch, taste = world.behaviour(users).epoch, world.taste(users)
    for e in range(3):
        error = taste[epoch == e].mean(axis=0) - world.taste_centres[e]
        assert np.abs(error).max() < 4.5 / math.sqrt((epoch == e).sum())
        assert taste[epoch == e].std(axis=0) == pytest.approx(np.ones(4), abs=0.03)
    steps = np.concatenate(
        [np.diff(World(WorldConfig(population_drift=1.5, seed=s)).taste_centres, axis=0) for s in range(200)]
    )
    # squared lengths of 600 steps: 1.5² times a chi-square of 8 degrees over 8, whose deviation is 1/2
    assert np.square(steps).sum(axis=1).mean() == pytest.approx(2.25, abs=4 * 2.25 * 0.5 / math.sqrt(600))


# -------------------------------------------------------------------------------------------------------- order


def test_what_carries_over_is_alike_and_fades() -> None:
    world = World(WorldConfig(n_titles=50, order_effect=2.0))
    history, times = np.array([[7, 3]]), np.array([[10.0, 11.0]])
    soon, late = (world.carry_over(history, times, np.array([now]))[0] for now in (11.0, 511.0))
    by_hand = 2.0 * (world.traits @ (math.exp(-0.5) * world.traits[7] + world.traits[3]))
    np.testing.assert_allclose(soon, by_hand, rtol=1e-12)
    assert np.abs(late).max() < 1e-60
    padded = world.carry_over(np.array([[7, 3, 50]]), np.array([[10.0, 11.0, 0.0]]), np.array([11.0]))[0]
    np.testing.assert_array_equal(soon, padded)


def test_order_and_gaps_matter_when_the_dial_is_up_and_only_then() -> None:
    users = World(WorldConfig()).users("train", 1)
    one, other = np.array([[1, 2]]), np.array([[2, 1]])
    hours, now = np.array([[1.0, 1.5]]), np.array([2.0])
    for effect, differs in ((0.0, False), (1.0, True)):
        world = World(WorldConfig(n_titles=40, order_effect=effect))
        a, b = (world.logging_log_probs(users, h, hours, now) for h in (one, other))
        assert (not np.array_equal(a, b)) == differs
    with pytest.raises(ConfigError, match="needs times and now"):
        world.logging_log_probs(users, one)


def test_consecutive_titles_are_more_alike_within_a_session_than_across() -> None:
    world = World(WorldConfig(n_titles=200, order_effect=3.0, pull_strength=0.0, appeal_tail=0.0))
    log = world.generate_log(1_500).sequences()
    alike = np.einsum("nld,nld->nl", world.traits[log.titles[:, 1:]], world.traits[log.titles[:, :-1]])
    gap = np.diff(log.times, axis=1)
    assert alike[gap < 1].mean() > alike[gap > 20].mean() + 0.1


def test_the_samplers_of_order_and_of_sets_have_one_law() -> None:
    # first choices of the step-wise sampler are those of the softmax; 12 titles of one kind of user
    config = WorldConfig(n_titles=6, history_length=3, sampler="stepwise", pull_strength=1.0)
    world = World(config)
    users = world.users("train", 20_000)
    events = world.draw_events(users, 3)
    histories = np.full((len(users), 3), 6)
    for step in range(3):
        p = np.exp(world.logging_log_probs(users, histories))
        chosen = events.titles[:, [step]] == np.arange(6)
        z = (chosen - p).sum(axis=0) / np.sqrt((p * (1.0 - p)).sum(axis=0))
        assert np.abs(z).max() < 4.5
        histories[:, step] = events.titles[:, step]


# --------------------------------------------------------------------------------------------------- acceptance


def test_acceptance_by_hand() -> None:
    # an average title is accepted with 1 − dial/2; one that is worth e^ln 3 times as much with 1 − dial/4
    probability = acceptance_probability(np.array([0.0, math.log(3.0)]), np.array(0.0), 1.0)
    np.testing.assert_allclose(probability, [0.5, 0.75])
    np.testing.assert_allclose(acceptance_probability(np.array([0.0]), np.array(0.0), 0.5), [0.75])
    np.testing.assert_array_equal(acceptance_probability(np.array([-50.0]), np.array(0.0), 0.0), [1.0])


@PROPERTY
@given(configs(accept=1.0, cold_share=0.25, history_length=2, history_median=0))
def test_the_outside_option_is_the_mean_of_what_is_out(config: WorldConfig) -> None:
    world = World(config)
    users = world.users("test", 3)
    for row, utilities in enumerate(world.utilities(users)):
        out = utilities[np.isfinite(utilities)]
        weight = np.exp(out - out.max())
        expected = weight / (weight + weight.mean())
        np.testing.assert_allclose(world.acceptance(users)[row, np.isfinite(utilities)], expected, atol=1e-12)


# ----------------------------------------------------------------------------------------------- debiased score


def test_a_debiased_score_is_uniform_whatever_the_duration() -> None:
    # a quantile is uniform within its group: mean 3, and no correlation with duration, of the first choices
    plain = WorldConfig(n_titles=300, history_length=1, reward_noise=0.5)
    correlation = {}
    for config in (plain, replace(plain, duration_debiased=True)):
        log = World(config).generate_log(20_000)
        correlation[config.duration_debiased] = stats.spearmanr(log.duration_minutes, log.score).statistic
        if config.duration_debiased:
            assert log.score.mean() == pytest.approx(3.0, abs=0.1)  # the quantiles are those of some 400 users
            grid = np.linspace(0.1, 0.9, 9)
            assert np.quantile((log.score - 1) / 4, grid) == pytest.approx(grid, abs=0.1)  # but for the atom
    assert correlation[False] < -0.2
    assert abs(correlation[True]) < 0.05


def test_debiasing_takes_away_bias_and_not_noise() -> None:
    plain = WorldConfig(n_titles=200, reward_noise=0.5)
    raw, debiased = World(plain), World(replace(plain, duration_debiased=True))
    assert debiased.alignment(300) > raw.alignment(300) + 0.15
    assert debiased.reliability(400).within_user < 2 * raw.reliability(400).within_user


def test_the_second_moment_of_every_model_is_that_of_its_samples() -> None:
    for changes in [{"noise_model": name} for name in NOISE_MODELS] + [{"duration_debiased": True}]:
        world = World(WorldConfig(n_titles=40, history_length=2, reward_noise=0.5, **changes))
        users = world.users("train", 2_000)
        u = uniforms(1, "moment", users, 40 * 3).reshape(2_000, 40, 3)
        exposure = world.exposure(users)
        if "mood" in world.noise.uses:
            exposure = exposure._replace(mood=np.asarray(world.moods(users)[:, -1:]))
        square = np.square(world.noise.sample(exposure, u).score) - world.noise.second_moment(exposure)
        error = square.mean(axis=1)  # users are independent, their titles are not where a mood is shared
        assert abs(error.mean()) < 4.5 * error.std() / math.sqrt(len(users)), changes


# ------------------------------------------------------------------------------------------------ what was mended


@pytest.mark.parametrize("effect", [1.0, 5.0])
def test_a_log_explains_its_choices_where_order_matters(effect: float) -> None:
    # the hours that a log holds are float32, and propensities are those at these hours
    world = World(WorldConfig(n_titles=120, history_length=100, order_effect=effect))
    log = world.generate_log(20, expose_propensities=True)
    seen = log.sequences()
    users, rows = log.user[log.step == 0], np.arange(20)
    for step in (1, 30, 99):
        histories = np.where(np.arange(100) < step, seen.titles, world.n_titles)
        log_probs = world.logging_log_probs(users, histories, seen.times, seen.times[:, step])
        logged = log.require_propensities().reshape(20, 100)[:, step]
        np.testing.assert_allclose(np.exp(log_probs[rows, seen.titles[:, step]]), logged, rtol=1e-9)


def test_a_session_is_over_for_who_abandons_also_in_rollouts() -> None:
    # Everybody abandons all but one title, or nearly so: returns of three steps by exact recursion over one title's
    # policy. With acceptance p of the first title, and satisfaction 1 once the user is gone.
    world = World(WorldConfig(n_titles=30, history_length=5, accept=1.0, reward_noise=0.0))
    contexts = world.contexts(400)
    policy, judge = UniformPolicy(), FlatJudge()
    examination = Examination(world, contexts, judge)
    figures = examination.evaluate(policy).metrics
    plain = Examination(World(replace(world.config, accept=0.0)), contexts, judge).evaluate(policy).metrics
    assert 1.0 < figures["value_return"] < figures["value_sampled"] < plain["value_return"]
    # the first step is worth 1 + p(s − 1); the second counts only where the first was accepted, and so on
    p, s = world.acceptance(contexts.users), world.satisfaction(contexts.users).astype(np.float64)
    unseen = ~contexts.observations.seen()
    stays = (p * unseen).sum(axis=1) / unseen.sum(axis=1)
    gain = (p * (s - 1.0) * unseen).sum(axis=1) / unseen.sum(axis=1)
    weights = 0.9 ** np.arange(3)
    expected = 1.0 + (np.stack([gain, stays * gain, stays**2 * gain], axis=1) @ weights / weights.sum()).mean()
    assert figures["value_return"] == pytest.approx(expected, abs=0.1)  # sampled titles, and none twice


class UniformPolicy:
    """All titles alike, but those that cannot be chosen."""

    def log_probs(self, observations: Observations) -> FloatArray:
        barred = observations.unavailable()
        with np.errstate(divide="ignore"):
            return np.log(~barred / (~barred).sum(axis=1, keepdims=True))


class FlatJudge:
    """A judge to whom all is the same."""

    def mean(self, observations: Observations) -> NDArray[np.float32]:
        return np.full((len(observations), observations.n_titles), 3.0, dtype=np.float32)


def test_true_groups_go_by_satisfaction_whatever_is_accepted() -> None:
    plain = World(WorldConfig(n_titles=40, history_length=6))
    contexts = plain.contexts(200)
    figures = [
        Examination(World(replace(plain.config, accept=accept)), contexts).evaluate(UniformPolicy()).metrics
        for accept in (0.0, 1.0)
    ]
    for name in ("ndcg10_true", "hr10_true", "mrr_true"):
        assert figures[0][name] == figures[1][name]


@pytest.mark.parametrize("drift", [0.0, 3.0, 1e3])
def test_large_catalogues_stay_exact_however_far_tastes_drift(drift: float) -> None:
    config = WorldConfig(n_titles=12_000, history_length=5, pull_strength=4.0, population_drift=drift)
    world = World(config)
    log = world.generate_log(6, "test", expose_propensities=True)
    users, seen = log.user[log.step == 0], log.sequences()
    for step in range(5):
        histories = np.where(np.arange(5) < step, seen.titles, world.n_titles)
        log_probs = world.logging_log_probs(users, histories)[np.arange(6), seen.titles[:, step]]
        np.testing.assert_allclose(log.require_propensities().reshape(6, 5)[:, step], np.exp(log_probs), rtol=1e-5)


@pytest.mark.parametrize("n_users", [2.5, "5", True, None])
def test_numbers_of_users_are_whole(n_users: Any) -> None:
    with pytest.raises(ConfigError, match="must be integers, got"):
        World(WorldConfig()).generate_log(n_users)
    with pytest.raises(ConfigError, match="must be integers, got"):
        World(WorldConfig()).contexts(5, seed=n_users)


@pytest.mark.parametrize(
    ("histories", "says"),
    [
        (np.array([[50]]), "got 50"),
        (np.array([[-1]]), "got -1"),
        (np.array([3]), r"got \(1,\)"),
        (np.array([[1], [2]]), r"a row for each of 1, got \(2, 1\)"),
    ],
)
def test_histories_that_are_none_are_refused(histories: Any, says: str) -> None:
    world = World(WorldConfig(n_titles=40, history_length=3))
    with pytest.raises(ConfigError, match=says):
        world.logging_log_probs(world.users("train", 1), histories)


def test_a_share_of_no_title_is_refused() -> None:
    with pytest.raises(ConfigError, match="cold_share must be 0, or large enough for one of 50 titles"):
        WorldConfig(n_titles=50, cold_share=0.005)
