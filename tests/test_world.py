"""The simulated world against what it claims: exact propensities, shared random numbers, known moments."""

import itertools
import math
import pickle
import random
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from scipy.special import logit

from recsim_gr import choosing
from recsim_gr import world as world_module
from recsim_gr import world_base as world_base_module
from recsim_gr.behaviour import SPLITS
from recsim_gr.choosing import Rows
from recsim_gr.configs import to_dict
from recsim_gr.errors import ConfigError
from recsim_gr.log import COLUMNS, InteractionLog
from recsim_gr.noise import NOISE_MODELS, Exposure, Scores
from recsim_gr.randomness import uniforms
from recsim_gr.world import World, WorldConfig

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)
STATISTICAL = settings(max_examples=8, deadline=None, derandomize=True)

FloatArray = NDArray[np.float64]
Users = NDArray[np.int64]


@st.composite
def configs(draw: st.DrawFn, max_titles: int = 12, **fixed: Any) -> WorldConfig:
    """Small worlds of every shape: one epoch or more, flat or peaked choices, histories up to I − 1."""
    n_titles = fixed.pop("n_titles", draw(st.integers(2, max_titles)))
    drawn = {
        "n_titles": n_titles,
        "history_length": draw(st.integers(1, n_titles - 1)),
        "n_epochs": draw(st.integers(1, 4)),
        "pull_strength": draw(st.sampled_from([0.0, 1.0, 2.0, 20.0])),
        "appeal_tail": draw(st.sampled_from([0.0, 1.0, 3.0])),
        "appeal_persistence": draw(st.floats(0.0, 1.0)),
        "taste_dimensions": draw(st.integers(1, 5)),
        "n_genres": draw(st.integers(1, 4)),
        "reward_noise": draw(st.floats(0.0, 1.0)),
        "noise_model": draw(st.sampled_from(list(NOISE_MODELS))),
        "seed": draw(st.integers(0, 2**40)),
    }
    return WorldConfig(**(drawn | fixed))


splits = st.sampled_from(SPLITS)


def assert_same_log(one: InteractionLog, other: InteractionLog) -> None:
    for name in (*COLUMNS, "propensities"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype, name
        assert a.tobytes() == b.tobytes(), name


def log_of(config: WorldConfig, n_users: int = 9, split: str = "train", **options: Any) -> InteractionLog:
    return World(config).generate_log(n_users, split, expose_propensities=True, **options)


def prefixes(titles: NDArray[np.int64], n_titles: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each step with the histories before it, padded to the full width."""
    for step in range(titles.shape[1]):
        history = titles.copy()
        history[:, step:] = n_titles
        yield step, history


def assert_no_correlation(x: NDArray[Any], y: NDArray[Any]) -> None:
    """Of n independent pairs the correlation has a standard error of 1/sqrt(n); four of them are allowed."""
    assert abs(np.corrcoef(x, y)[0, 1]) < 4 / math.sqrt(len(x))


# ----------------------------------------------------------------------------------------------- propensities


@PROPERTY
@given(configs(), st.data())
def test_propensities_are_a_distribution_over_what_is_unseen(config: WorldConfig, data: st.DataObject) -> None:
    world, n_titles = World(config), config.n_titles
    users = world.users("test", 4)
    seen = data.draw(st.lists(st.integers(0, n_titles - 1), max_size=n_titles - 1, unique=True), label="seen")
    padding = data.draw(st.integers(0, 3), label="padding")
    histories = np.tile(np.array([*seen, *[n_titles] * padding], dtype=np.int64), (4, 1))
    log_probs = world.logging_log_probs(users, histories)
    assert log_probs.dtype == np.float64
    assert log_probs.shape == (4, n_titles)
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1.0, rtol=1e-12)
    assert np.isneginf(log_probs[:, seen]).all()
    assert np.isfinite(np.delete(log_probs, seen, axis=1)).all()


@PROPERTY
@given(configs())
def test_nothing_is_left_to_choose_after_the_whole_catalogue(config: WorldConfig) -> None:
    world = World(config)
    everything = np.arange(config.n_titles)[None]
    assert np.isneginf(world.logging_log_probs(world.users("train", 1), everything)).all()


@PROPERTY
@given(configs(), splits)
def test_logged_propensities_are_those_of_the_prefixes(config: WorldConfig, split: str) -> None:
    world = World(config)
    users = world.users(split, 5)
    events = world.draw_events(users, config.history_length)
    for step, history in prefixes(events.titles, config.n_titles):
        log_probs = world.logging_log_probs(users, history)
        asked = np.take_along_axis(log_probs, events.titles[:, [step]], axis=1)[:, 0]
        np.testing.assert_allclose(events.log_propensities[:, step], asked, rtol=0, atol=1e-9)


def exact_log_propensities(utilities: FloatArray, titles: NDArray[np.int64]) -> list[float]:
    """ln(e^{u_a} / Σ_unseen e^u) of each choice of one user, in 60 digits from the float64 utilities."""
    with localcontext(prec=60):
        weights = [Decimal(float(u)).exp() for u in utilities]
        left = set(range(len(weights)))
        out = []
        for title in titles.tolist():
            out.append(float((weights[title] / sum(weights[i] for i in left)).ln()))
            left.remove(title)
        return out


@PROPERTY
@given(configs())
@example(WorldConfig(n_titles=60, history_length=59, pull_strength=20.0, seed=1))
@example(WorldConfig(n_titles=60, history_length=59, pull_strength=200.0, seed=2))
def test_logged_propensities_are_exact(config: WorldConfig) -> None:
    # An error of 1e-9 in the logarithm is a relative error of 1e-9 in the propensity. The last of I − 1
    # choices is out of two titles, whose share of the whole catalogue may be e^-80: subtracting from Z would
    # leave nothing.
    world = World(config)
    users = world.users("train", 2)
    events = world.draw_events(users, config.history_length)
    for row, utilities in enumerate(world.utilities(users)):
        exact = exact_log_propensities(utilities, events.titles[row])
        np.testing.assert_allclose(events.log_propensities[row], exact, rtol=0, atol=1e-9)


@PROPERTY
@given(configs(), st.randoms(use_true_random=False))
def test_the_order_of_a_history_changes_nothing(config: WorldConfig, shuffler: random.Random) -> None:
    world = World(config)
    users = world.users("test", 5)
    histories = world.contexts_of(users).observations.titles
    order = list(range(histories.shape[1]))
    shuffler.shuffle(order)
    one, other = (world.logging_log_probs(users, h) for h in (histories, histories[:, order]))
    np.testing.assert_array_equal(one, other)


class FixedUtilities(World):
    """A world in which every user has the same utilities, so that users are repetitions of one experiment."""

    fixed = np.array([1.5, 0.0, -0.7, 0.4, 0.9])

    def utility_rows(self, users: Users) -> Rows:
        def fill(part: slice, out: FloatArray, scratch: FloatArray) -> None:
            out[...] = self.fixed

        return fill


def test_choices_have_the_frequencies_of_a_plackett_luce_sequence() -> None:
    # P(a, b, …) = e^{u_a}/Z · e^{u_b}/(Z − e^{u_a}) · …, over all ordered tuples of the first 1, 2 and 3
    # choices
    world = FixedUtilities(WorldConfig(n_titles=5, history_length=3, taste_dimensions=1))
    n = 40_000
    drawn = world.draw_events(world.users("train", n), 3).titles
    weights = np.exp(world.fixed)
    for length in (1, 2, 3):
        tuples = list(itertools.permutations(range(5), length))
        probability = np.array(
            [
                math.prod(weights[t[i]] / (weights.sum() - weights[list(t[:i])].sum()) for i in range(length))
                for t in tuples
            ]
        )
        index = {t: i for i, t in enumerate(tuples)}
        counts = np.bincount([index[tuple(row)] for row in drawn[:, :length].tolist()], minlength=len(tuples))
        assert probability.sum() == pytest.approx(1.0)
        assert n * probability.min() > 5  # below 5 expected the statistic is not chi-square
        assert stats.chisquare(counts, n * probability).pvalue > 1e-3


@STATISTICAL
@given(configs(n_titles=6, history_length=3, pull_strength=2.0))
def test_every_title_is_chosen_as_often_as_its_propensity_says(config: WorldConfig) -> None:
    # Given the prefix, 1[chosen = a] − p(a) has mean 0 and variance p(1 − p), whoever the user is; the sum
    # over users is normal. 18 cells in each of a few worlds: 4.5 deviations.
    world = World(config)
    users = world.users("train", 3_000)
    titles = world.draw_events(users, 3).titles
    for step, history in prefixes(titles, 6):
        p = np.exp(world.logging_log_probs(users, history))
        chosen = titles[:, [step]] == np.arange(6)
        z = (chosen - p).sum(axis=0) / np.sqrt((p * (1.0 - p)).sum(axis=0))
        assert np.abs(z).max() < 4.5


def test_a_propensity_by_hand() -> None:
    # weights e^ln 1, e^ln 2, e^ln 3: P(title 2 first) = 3/6; then P(title 0 | 2 seen) = 1/3; what is left is
    # sure
    class ByHand(FixedUtilities):
        fixed = np.log([1.0, 2.0, 3.0])

    world = ByHand(WorldConfig(n_titles=3, history_length=2))
    histories = np.array([[3, 3], [2, 3], [2, 0]])
    expected = [[1 / 6, 2 / 6, 3 / 6], [1 / 3, 2 / 3, 0.0], [0.0, 1.0, 0.0]]
    np.testing.assert_allclose(np.exp(world.logging_log_probs(np.arange(3), histories)), expected, rtol=1e-12)


# ------------------------------------------------------------------------- the same whatever is asked with it


@PROPERTY
@given(configs(), splits, st.integers(1, 24), st.integers(1, 25))
@example(WorldConfig(n_titles=50, history_length=5), "train", 24, 1)  # one row: where BLAS would change its kernel
@example(WorldConfig(n_titles=50, history_length=5, taste_dimensions=3), "test", 24, 23)
def test_the_chunk_size_changes_no_bit(config: WorldConfig, split: str, n_users: int, chunk: int) -> None:
    whole = log_of(config, n_users, split)
    assert_same_log(log_of(config, n_users, split, chunk_users=chunk), whole)


@PROPERTY
@given(configs(), splits, st.integers(1, 12), st.integers(1, 12))
def test_a_log_of_fewer_users_is_the_beginning_of_one_of_more(
    config: WorldConfig, split: str, one: int, other: int
) -> None:
    fewer, more = sorted((one, other))
    rows = slice(fewer * config.history_length)
    assert_same_log(log_of(config, fewer, split), log_of(config, more, split).rows(rows))


@PROPERTY
@given(configs(), st.data())
def test_fewer_events_are_the_beginning_of_more(config: WorldConfig, data: st.DataObject) -> None:
    world = World(config)
    users = world.users("train", 4)
    length = data.draw(st.integers(1, config.history_length), label="length")
    short, long = world.draw_events(users, length), world.draw_events(users, config.history_length + 1)
    np.testing.assert_array_equal(short.titles, long.titles[:, :length])
    np.testing.assert_array_equal(short.hours, long.hours[:, :length])
    for a, b in zip(short.outcome, long.outcome, strict=True):
        np.testing.assert_array_equal(a, b[:, :length])
    # the sum over what was not chosen is taken in another order, so the last bits may differ
    np.testing.assert_allclose(short.log_propensities, long.log_propensities[:, :length], rtol=0, atol=1e-12)


@PROPERTY
@given(configs(), splits, st.integers(1, 12))
def test_contexts_are_the_log_of_their_users_and_one_event_more(config: WorldConfig, split: str, n: int) -> None:
    world = World(config)
    contexts, log = world.contexts(n, split=split), log_of(config, n, split)
    seen = log.sequences()
    for name in ("titles", "scores", "times", "length", "epoch"):
        np.testing.assert_array_equal(getattr(contexts.observations, name), getattr(seen, name))
    np.testing.assert_array_equal(contexts.users, log.user[log.step == 0])
    events = world.draw_events(contexts.users, config.history_length + 1)
    np.testing.assert_array_equal(contexts.next_titles, events.titles[:, -1])
    np.testing.assert_array_equal(contexts.next_scores, events.outcome.score[:, -1].astype(np.float32))
    assert not contexts.observations.seen()[np.arange(n), contexts.next_titles].any()


@PROPERTY
@given(configs(), st.lists(st.integers(0, 7), min_size=1, max_size=12))
def test_users_may_be_asked_for_in_any_order_and_twice(config: WorldConfig, rows: list[int]) -> None:
    world = World(config)
    users, histories = world.users("judge", 8), np.empty((8, 0), dtype=np.int64)
    np.testing.assert_array_equal(world.satisfaction(users[rows]), world.satisfaction(users)[rows])
    np.testing.assert_array_equal(world.expected_score(users[rows]), world.expected_score(users)[rows])
    np.testing.assert_array_equal(
        world.logging_log_probs(users[rows], histories[rows]), world.logging_log_probs(users, histories)[rows]
    )
    np.testing.assert_array_equal(world.draw_events(users[rows], 1).titles, world.draw_events(users, 1).titles[rows])


@PROPERTY
@given(configs())
def test_equal_configs_give_equal_bytes_also_in_a_worker(config: WorldConfig) -> None:
    world = World(config)
    first = world.generate_log(5, expose_propensities=True)
    assert_same_log(world.generate_log(5, expose_propensities=True), first)
    assert_same_log(log_of(replace(config), 5), first)
    assert_same_log(pickle.loads(pickle.dumps(world)).generate_log(5, expose_propensities=True), first)


@PROPERTY
@given(configs(n_titles=12, history_length=6, taste_dimensions=3))
def test_another_seed_is_another_world(config: WorldConfig) -> None:
    one, other = World(config), World(replace(config, seed=config.seed + 1))
    users = one.users("train", 20)
    for name in ("durations", "quality", "traits"):
        assert not np.isin(getattr(one, name), getattr(other, name)).any(), name
    for name in ("satisfaction", "pull"):
        assert not np.array_equal(getattr(one, name)(users), getattr(other, name)(users)), name
    logs = [world.generate_log(20) for world in (one, other)]
    for name in ("title", "hours", "score"):
        assert not np.array_equal(getattr(logs[0], name), getattr(logs[1], name)), name


def test_no_global_random_state_is_touched_or_asked() -> None:
    def everything() -> list[Any]:
        world = World(WorldConfig(n_titles=12, history_length=3))
        log, contexts = world.generate_log(20, expose_propensities=True), world.contexts(20)
        return [log.title.tolist(), log.score.tolist(), contexts.next_titles.tolist(), world.reliability(50)]

    legacy = np.random.get_state
    before = [str(legacy()), str(random.getstate())]
    first = everything()
    assert [str(legacy()), str(random.getstate())] == before
    np.random.seed(12345)  # noqa: NPY002 - whatever a user seeds, the world is the same
    random.seed(12345)
    assert everything() == first


# ------------------------------------------------------------------------------- streams, and what they share


def test_every_purpose_is_one_stream_with_one_stretch_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two uses of a stream overlap, and a stream that is cut in two ways hands a user the numbers of another.
    asked: dict[str, set[tuple[str, int]]] = {}

    def spy(seed: int, purpose: str, users: Users, per_user: int, out: FloatArray | None = None) -> FloatArray:
        asked.setdefault(purpose, set()).add((sys._getframe(1).f_code.co_name, per_user))
        return uniforms(seed, purpose, users, per_user, out)

    monkeypatch.setattr(world_module, "uniforms", spy)
    monkeypatch.setattr(world_base_module, "uniforms", spy)
    monkeypatch.setattr(choosing, "uniforms", spy)
    world = World(WorldConfig(n_titles=12, history_length=3))
    world.generate_log(5, expose_propensities=True)
    world.generate_log(3, "judge")
    world.contexts(5)
    world.expected_score(world.users("test", 4))
    world.reliability(10)
    world.alignment(10)
    assert {purpose: len(uses) for purpose, uses in asked.items()} == dict.fromkeys(asked, 1)
    assert {"taste", "pull", "leniency", "behaviour", "choice", "noise", "times"} <= set(asked)


@PROPERTY
@given(configs(noise_model="watch_time"), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_worlds_that_differ_in_noise_alone_share_everything_else(config: WorldConfig, one: float, other: float) -> None:
    low, high = (World(replace(config, reward_noise=dial)) for dial in sorted((one, other)))
    users = low.users("train", 20)
    a, b = (world.draw_events(users, config.history_length) for world in (low, high))
    assert_same_but_for_the_noise(low, high)
    assert not (a.outcome.exogenous & ~b.outcome.exogenous).any()  # nested
    unchanged = a.outcome.exogenous == b.outcome.exogenous
    np.testing.assert_array_equal(a.outcome.score[unchanged], b.outcome.score[unchanged])


@PROPERTY
@given(configs())
def test_worlds_that_differ_in_the_noise_model_alone_share_everything_else(config: WorldConfig) -> None:
    first, *others = (World(replace(config, noise_model=name)) for name in NOISE_MODELS)
    for other in others:
        assert_same_but_for_the_noise(first, other)


def assert_same_but_for_the_noise(one: World, other: World) -> None:
    users, length = one.users("train", 20), one.config.history_length
    np.testing.assert_array_equal(one.satisfaction(users), other.satisfaction(users))
    np.testing.assert_array_equal(one.utilities(users), other.utilities(users))
    a, b = (world.draw_events(users, length) for world in (one, other))
    np.testing.assert_array_equal(a.titles, b.titles)
    np.testing.assert_array_equal(a.hours, b.hours)
    np.testing.assert_array_equal(a.log_propensities, b.log_propensities)


def aligned_world(**changes: Any) -> World:
    """A world whose streams would be as dependent as they can be if two purposes shared one.

    Choices of 12 titles and noise of 3 + 1 events take 12 uniforms each; taste, pull, leniency and behaviour
    take one counter each.
    """
    return World(WorldConfig(n_titles=12, history_length=3, taste_dimensions=4, seed=5, **changes))


def test_the_noise_of_a_reward_does_not_depend_on_the_choice() -> None:
    # Peers draw both from one stream. Here: the residual score against the rank of the chosen title's utility
    # and against the Gumbel luck of the choice (a small propensity that won), and exogenous flags against
    # titles.
    world, n = aligned_world(), 8_000
    users = world.users("train", n)
    events = world.draw_events(users, 3)
    expected = np.take_along_axis(world.expected_score(users), events.titles, axis=1)
    residual = events.outcome.score - expected
    utilities = world.utilities(users)
    own = np.take_along_axis(utilities, events.titles, axis=1)
    rank = (utilities[:, None, :] > own[..., None]).sum(axis=2)
    for x in (rank, events.log_propensities, np.log(events.hours)):
        centred = (x - x.mean()).ravel()
        product = residual.ravel() * centred  # mean 0; its deviation may differ from event to event
        assert abs(product.sum()) < 4 * math.sqrt((product**2).sum())
        assert_no_correlation(x.ravel(), events.outcome.exogenous.ravel())
    for step in range(3):
        table = np.zeros((12, 2))
        np.add.at(table, (events.titles[:, step], events.outcome.exogenous[:, step].astype(int)), 1)
        assert stats.chi2_contingency(table).pvalue > 1e-3


def test_the_logged_scores_of_a_title_are_those_of_forced_exposure() -> None:
    # §2, hidden confounding is in who chooses, never in the noise: given user and title, the log is unbiased
    world = aligned_world(reward_noise=0.7)
    users = world.users("train", 8_000)
    events = world.draw_events(users, 3)
    residual = events.outcome.score - np.take_along_axis(world.expected_score(users), events.titles, axis=1)
    for title in range(12):
        own = residual[events.titles == title]
        assert abs(own.mean()) < 4 * own.std() / math.sqrt(own.size)


def test_what_a_user_is_made_of_is_independent() -> None:
    world, n = aligned_world(), 8_000
    users = world.users("train", n)
    who = world.behaviour(users)
    parts = [who.epoch, who.discernment, np.log(who.free_time), leniency(world, users), *world.taste(users).T]
    events = world.draw_events(users, 3)
    parts += [events.hours[:, 0], events.outcome.exogenous[:, 0]]
    for x, y in itertools.combinations(parts, 2):
        assert_no_correlation(x, y)


# --------------------------------------------------------------------------------------------- the population


def leniency(world: World, users: Users) -> FloatArray:
    """b of the users, recovered from s = 1 + 4·sigmoid(a(⟨θ,v⟩ + q + b))."""
    z = logit((world.satisfaction(users).astype(np.float64) - 1.0) / 4.0) / world.config.satisfaction_slope
    rest = z - world.taste(users) @ world.traits.T - world.quality
    # the same for all titles of a user, up to float32 at the flat ends of the sigmoid
    np.testing.assert_allclose(rest, np.broadcast_to(rest.mean(axis=1, keepdims=True), rest.shape), atol=0.05)
    return rest.mean(axis=1)


def test_satisfaction_is_the_sigmoid_of_taste_quality_and_leniency() -> None:
    config = WorldConfig(n_titles=40, history_length=3, satisfaction_slope=0.5, leniency_deviation=0.8)
    world = World(config)
    users = world.users("train", 4_000)
    satisfaction = world.satisfaction(users)
    assert satisfaction.dtype == np.float32
    assert ((satisfaction > 1.0) & (satisfaction < 5.0)).all()
    assert stats.kstest(leniency(world, users) / 0.8, "norm").pvalue > 1e-3
    assert stats.kstest(world.taste(users).ravel(), "norm").pvalue > 1e-3


@PROPERTY
@given(configs(), st.sampled_from([0.0, 1.25, 1_000.0]))
def test_satisfaction_stays_on_its_scale(config: WorldConfig, slope: float) -> None:
    world = World(replace(config, satisfaction_slope=slope))
    satisfaction = world.satisfaction(world.users("train", 20))
    assert ((satisfaction >= 1.0) & (satisfaction <= 5.0)).all()


@PROPERTY
@given(configs())
def test_utilities_are_pull_and_what_discernment_leaves_of_appeal(config: WorldConfig) -> None:
    world = World(config)
    users = world.users("train", 5)
    who, pull = world.behaviour(users), world.pull(users)
    for row, utilities in enumerate(world.utilities(users)):
        appeal = world.appeal[who.epoch[row]]
        by_hand = config.pull_strength * pull[row] + (1.0 - who.discernment[row]) * appeal
        np.testing.assert_allclose(utilities, by_hand, rtol=1e-12, atol=1e-12)


def test_pull_agrees_with_taste_as_far_as_the_user_is_discerning() -> None:
    # ⟨θ,v⟩ and ⟨φ,v⟩ have mean 0, variance 1 and covariance δ; one title, so that users are independent
    world = World(WorldConfig(n_titles=2, history_length=1, taste_dimensions=6))
    users = world.users("train", 20_000)
    delta = world.behaviour(users).discernment
    liked, drawn = (world.taste(users) @ world.traits.T)[:, 0], world.pull(users)[:, 0]
    for product in (
        drawn,
        drawn**2 - 1.0,
        liked**2 - 1.0,
        liked * drawn - delta,
        (liked * drawn - delta) * delta,
    ):
        assert abs(product.mean()) < 4 * product.std() / math.sqrt(len(users))


def test_traits_have_length_1_and_cluster_in_genres() -> None:
    world = World(WorldConfig(n_titles=400, history_length=3))
    np.testing.assert_allclose(np.linalg.norm(world.traits, axis=1), 1.0, rtol=1e-12)
    likeness = world.traits @ world.traits.T
    same = world.genres[:, None] == world.genres
    np.fill_diagonal(same, False)
    apart = world.genres[:, None] != world.genres
    assert likeness[same].mean() > 0.5 > 0.2 > abs(likeness[apart].mean())


def test_discernment_is_u_shaped() -> None:
    # Beta(½, ½): mean ½, variance ⅛, and a third of the users below ¼ (arcsine law: (2/π)·asin(½) = ⅓), a
    # third above ¾
    delta = World(WorldConfig()).behaviour(np.arange(20_000)).discernment
    assert ((delta >= 0.0) & (delta <= 1.0)).all()
    assert stats.kstest(delta, stats.beta(0.5, 0.5).cdf).pvalue > 1e-3
    for sample, truth in (
        (delta, 0.5),
        ((delta - 0.5) ** 2, 0.125),
        (delta < 0.25, 1 / 3),
        (delta > 0.75, 1 / 3),
    ):
        assert abs(sample.mean() - truth) < 4 * sample.std() / math.sqrt(len(delta))


def test_times_of_users_and_titles_have_their_laws() -> None:
    config = WorldConfig(n_titles=4_000, history_length=5)
    world = World(config)
    free_time = world.behaviour(np.arange(4_000)).free_time
    for minutes, median, deviation in (
        (free_time, config.free_time_median_minutes, config.free_time_log_deviation),
        (world.durations, config.duration_median_minutes, config.duration_log_deviation),
    ):
        assert stats.kstest(np.log(minutes / median) / deviation, "norm").pvalue > 1e-3
    assert stats.kstest(world.quality / config.quality_deviation, "norm").pvalue > 1e-3


@pytest.mark.parametrize("persistence", [0.0, 0.8, 1.0])
def test_appeal_is_exponential_and_drifts_as_an_ar_1(persistence: float) -> None:
    config = WorldConfig(n_titles=4_000, n_epochs=4, appeal_tail=1.5, appeal_persistence=persistence)
    appeal = World(config).appeal
    assert appeal.shape == (4, 4_000)
    assert (appeal > 0).all()
    normal = stats.norm.ppf(-np.expm1(-appeal / 1.5))  # back to the Gaussian scale
    for epoch in range(4):
        assert stats.kstest(appeal[epoch], "expon", args=(0.0, 1.5)).pvalue > 1e-3
        for later in range(epoch + 1, 4):
            rho = persistence ** (later - epoch)
            # the standard error of a correlation is (1 − ρ²)/sqrt(n)
            off = np.corrcoef(normal[epoch], normal[later])[0, 1] - rho
            assert abs(off) <= 4 * (1.0 - rho**2) / math.sqrt(4_000) + 1e-9


def test_gaps_between_events_come_from_two_scales() -> None:
    # a quarter of exponentials of mean 22 hours and three quarters of mean 0.7: mean .25·22 + .75·.7 = 6.025
    world = World(WorldConfig(n_titles=12, history_length=3))
    hours = world.draw_events(world.users("train", 10_000), 4).hours
    gaps = np.diff(hours, axis=1, prepend=0.0).ravel()
    assert (gaps > 0).all()
    assert abs(gaps.mean() - 6.025) < 4 * gaps.std() / math.sqrt(gaps.size)

    def mixture(x: FloatArray) -> FloatArray:
        return np.asarray(1.0 - 0.25 * np.exp(-x / 22.0) - 0.75 * np.exp(-x / 0.7))

    assert stats.kstest(gaps, mixture).pvalue > 1e-3


# ----------------------------------------------------------------------------------------------------- splits


@PROPERTY
@given(configs(), st.integers(1, 500), st.integers(0, 10**8))
def test_no_user_is_in_two_splits(config: WorldConfig, n: int, offset: int) -> None:
    world = World(config)
    users = {split: world.users(split, n, offset) for split in SPLITS}
    assert len(np.unique(np.concatenate(list(users.values())))) == n * len(SPLITS)
    for split, ids in users.items():
        assert [bool(world.in_split(ids, other).any()) for other in SPLITS] == [o == split for o in SPLITS]
        assert world.in_split(ids, split).all()


@PROPERTY
@given(configs(n_epochs=4))
def test_test_users_live_in_the_last_epoch_and_the_others_before_it(config: WorldConfig) -> None:
    world = World(config)
    for split in SPLITS:
        epochs = world.behaviour(world.users(split, 200)).epoch
        assert set(epochs.tolist()) == ({3} if split == "test" else {0, 1, 2}), split
        np.testing.assert_array_equal(world.contexts(30, split=split).observations.epoch, epochs[:30])


def test_early_epochs_are_equally_likely() -> None:
    epochs = World(WorldConfig(n_epochs=5)).behaviour(np.arange(8_000)).epoch
    assert stats.chisquare(np.bincount(epochs, minlength=4)).pvalue > 1e-3


@PROPERTY
@given(configs(), st.lists(st.integers(0, 999), min_size=2, max_size=4, unique=True))
def test_another_seed_of_contexts_is_other_users_of_the_same_split(config: WorldConfig, seeds: list[int]) -> None:
    world = World(config)
    users = np.concatenate([world.contexts(5, seed).users for seed in seeds])
    assert len(np.unique(users)) == 5 * len(seeds)
    assert world.in_split(users, "test").all()


def test_users_that_do_not_exist_are_refused() -> None:
    world = World(WorldConfig(n_titles=12, history_length=3))
    with pytest.raises(ConfigError, match="no split 'tset'; there are train, validation, test, judge"):
        world.generate_log(3, "tset")
    for n, offset in ((0, 0), (-1, 0), (1, -1), (10**9, 1)):
        with pytest.raises(ConfigError, match=r"must be 1 to \d+ users"):
            world.users("train", n, offset)
    # a million contexts a seed: one more would be a user of the next seed
    for n, seed in ((3, -1), (10**6 + 1, 0)):
        with pytest.raises(ConfigError, match=rf"contexts\({n}, seed={seed}\): must be at most 1000000 a seed"):
            world.contexts(n, seed)


# ----------------------------------------------------------------------------------------------------- scores


@STATISTICAL
@given(configs(pull_strength=2.0), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_the_expected_score_is_the_mean_of_forced_exposures(config: WorldConfig, dial: float) -> None:
    # Every title is shown to every user, liked or not. Each residual has mean 0, and its deviation differs
    # from user to user; a product with what the user thinks of the title has mean 0 as well.
    world, n = World(replace(config, reward_noise=dial)), 4_000
    users = world.users("test", n)
    expected, satisfaction = world.expected_score(users), world.satisfaction(users).astype(np.float64)
    for title in range(config.n_titles):
        u = uniforms(title, "exposure", np.arange(n), world.noise.uniforms_per_event)
        residual = world.sample_scores(users, np.full(n, title), u).score - expected[:, title]
        for product in (residual, residual * (satisfaction[:, title] - 3.0)):
            assert abs(product.sum()) <= 4 * math.sqrt((product**2).sum()) + 1e-9 * n


def test_forced_exposures_of_one_user_to_one_title() -> None:
    world, n = aligned_world(), 2_000
    user, title = world.users("test", 1), 7
    u = uniforms(0, "exposure", np.arange(n), world.noise.uniforms_per_event)
    scores = world.sample_scores(np.repeat(user, n), np.full(n, title), u).score
    error = scores.std() / math.sqrt(n)
    assert abs(scores.mean() - world.expected_score(user)[0, title]) < 4 * error


@PROPERTY
@given(configs(noise_model="gaussian", reward_noise=0.0), st.randoms(use_true_random=False))
def test_without_noise_a_forced_exposure_is_the_satisfaction(config: WorldConfig, random: random.Random) -> None:
    world = World(config)
    users = world.users("train", 6)
    titles = np.array([random.randrange(config.n_titles) for _ in users])
    scores = world.sample_scores(users, titles, np.full((6, world.noise.uniforms_per_event), 0.3))
    assert scores.score.shape == scores.watched.shape == scores.exogenous.shape == (6,)
    np.testing.assert_array_equal(scores.score, world.satisfaction(users)[np.arange(6), titles])


# --------------------------------------------------------------------------------------- how good a reward is


def r_squared(x: FloatArray, y: FloatArray) -> float:
    r = float(np.corrcoef(x, y)[0, 1])
    return math.copysign(r * r, r)


def directly(world: World, n_users: int) -> tuple[float, float]:
    """Pooled and within-user reliability, from the log and the truth, a user at a time."""
    log = world.generate_log(n_users)
    users = np.unique(log.user)
    truth = world.satisfaction(users)[np.searchsorted(users, log.user), log.title].astype(np.float64)
    score = log.score.astype(np.float64)
    x, y = score.copy(), truth.copy()
    for user in users:
        own = log.user == user
        x[own] -= score[own].mean()
        y[own] -= truth[own].mean()
    return r_squared(score, truth), r_squared(x, y)


@PROPERTY
@given(configs(n_titles=12, history_length=5, pull_strength=2.0))
def test_reliability_is_the_squared_correlation_in_the_log(config: WorldConfig) -> None:
    world = World(config)
    reliability = world.reliability(60)
    np.testing.assert_allclose(reliability, directly(world, 60), atol=1e-5)  # the log is float32
    assert np.abs(reliability).max() <= 1.0 + 1e-12  # a score without noise may round to a little above 1


class Contrarian:
    """A score that is the satisfaction turned round."""

    uniforms_per_event = 3
    bounded = True
    uses: frozenset[str] = frozenset()

    def sample(self, exposure: Exposure, uniforms: FloatArray) -> Scores:
        score = 6.0 - exposure.satisfaction
        return Scores(score, (score - 1.0) / 4.0, np.zeros(score.shape, dtype=bool))

    def expected(self, exposure: Exposure) -> FloatArray:
        return 6.0 - exposure.satisfaction


def test_reliability_and_alignment_carry_the_sign_of_the_correlation() -> None:
    class Upside(World):
        noise = Contrarian()  # type: ignore[assignment]

    world = Upside(WorldConfig(n_titles=12, history_length=5))
    assert world.reliability(50) == pytest.approx((-1.0, -1.0))
    assert world.alignment(50) == pytest.approx(-1.0)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", NOISE_MODELS)
def test_reliability_falls_from_all_to_next_to_nothing(name: str, seed: int) -> None:
    config = WorldConfig(n_titles=300, history_length=10, noise_model=name, seed=seed)
    worlds = [World(replace(config, reward_noise=dial)) for dial in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for measured in zip(*(world.reliability(400) for world in worlds), strict=True):
        assert all(more > less for more, less in itertools.pairwise(measured))
        assert measured[0] > 0.97
        # Noise of deviation 4 leaves 1/(1 + 16/var(s)), a few percent; watch time leaves none of it. A slow mood is
        # partly taken out with the user's mean, so drift leaves more.
        assert abs(measured[-1]) < (0.2 if name == "drift" else 0.1)


def alignment_by_hand(world: World, n_users: int) -> float:
    """Within-user weighted correlation, a user and a title at a time."""
    xy = xx = yy = 0.0
    for user in world.users("train", n_users):
        alone = np.array([user])
        weight = np.exp(world.utilities(alone)[0])
        weight /= weight.sum()
        x, y = world.expected_score(alone)[0], world.satisfaction(alone)[0].astype(np.float64)
        mean_x, mean_y = np.average(x, weights=weight), np.average(y, weights=weight)
        for w, a, b in zip(weight, x, y, strict=True):
            xy += w * (a - mean_x) * (b - mean_y)
            xx += w * (a - mean_x) ** 2
            yy += w * (b - mean_y) ** 2
    return math.copysign(xy * xy / (xx * yy), xy)


@PROPERTY
@given(configs(n_titles=8, history_length=3, pull_strength=2.0))
def test_alignment_is_the_weighted_correlation(config: WorldConfig) -> None:
    world = World(config)
    alignment = world.alignment(12)
    assert abs(alignment) <= 1.0 + 1e-12
    assert alignment == pytest.approx(alignment_by_hand(world, 12), rel=1e-6, abs=1e-12)


@PROPERTY
@given(configs(pull_strength=2.0, noise_model="gaussian"))
def test_unbiased_noise_is_perfectly_aligned(config: WorldConfig) -> None:
    assert World(config).alignment(20) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_watch_time_is_aligned_at_0_and_not_at_1(seed: int) -> None:
    config = WorldConfig(n_titles=1_000, history_length=3, seed=seed)
    alignment = [World(replace(config, reward_noise=dial)).alignment(300) for dial in (0.0, 0.5, 1.0)]
    assert alignment[0] > 0.99
    assert alignment[0] > alignment[1] > alignment[2]
    # durations know nothing of satisfaction: by chance the squared correlation over the few hundred titles
    # that carry the weight is of the order of one over their number
    assert abs(alignment[2]) < 0.03


# ---------------------------------------------------------------------------------------------------- the log


@PROPERTY
@given(configs(), splits)
def test_a_log_of_the_world_holds_what_an_algorithm_may_see(config: WorldConfig, split: str) -> None:
    world = World(config)
    log = world.generate_log(6, split)
    assert {f.name for f in fields(log)} - set(COLUMNS) == {
        "n_titles",
        "bounded_scores",
        "propensities",
        "provenance",
        "catalogue",
    }
    assert log.propensities is None
    assert len(log) == 6 * config.history_length
    np.testing.assert_array_equal(log.duration_minutes, world.durations[log.title].astype(np.float32))
    assert log.n_titles == config.n_titles
    assert log.bounded_scores is world.noise.bounded
    assert log.provenance == {"world": "World", "split": split, "config": to_dict(config)}
    if log.bounded_scores:  # watch time is the score, and the score is watch time
        np.testing.assert_allclose(1 + 4 * log.watch_minutes / log.duration_minutes, log.score, rtol=1e-5)
    exposed = world.generate_log(6, split, expose_propensities=True)
    events = world.draw_events(world.users(split, 6), config.history_length)
    np.testing.assert_array_equal(exposed.require_propensities(), np.exp(events.log_propensities).ravel())


# ---------------------------------------------------------------------------------------------------- configs


ILLEGAL: list[tuple[str, object]] = [
    ("n_titles", 0),
    ("n_titles", -5),
    ("n_titles", 1),
    ("n_titles", 99_999_999_999),
    ("n_titles", 10.0),
    ("n_titles", "100"),
    ("n_titles", True),
    ("n_titles", None),
    ("history_length", 0),
    ("history_length", 1_000),
    ("history_length", 1_001),
    ("n_epochs", 0),
    ("seed", -1),
    ("seed", "zero"),
    ("seed", None),
    ("seed", False),
    ("reward_noise", 1.5),
    ("reward_noise", -0.1),
    ("reward_noise", math.nan),
    ("reward_noise", math.inf),
    ("reward_noise", True),
    ("reward_noise", "0.5"),
    ("noise_model", "laplace"),
    ("noise_model", 3),
    ("noise_model", []),
    ("pull_strength", -1.0),
    ("pull_strength", math.inf),
    ("appeal_tail", -1.0),
    ("appeal_persistence", 1.01),
    ("appeal_persistence", -0.01),
    ("discernment_alpha", 0.0),
    ("discernment_beta", -0.5),
    ("duration_median_minutes", 0.0),
    ("duration_log_deviation", -0.1),
    ("free_time_median_minutes", -1.0),
    ("free_time_log_deviation", math.nan),
    ("taste_dimensions", 0),
    ("n_genres", 0),
    ("genre_spread", -0.1),
    ("quality_deviation", -0.1),
    ("leniency_deviation", math.nan),
    ("satisfaction_slope", -1.0),
    ("history_median", -1),
    ("history_median", 21),
    ("history_log_deviation", -0.1),
    ("cold_share", 1.0),
    ("cold_share", -0.1),
    ("cold_share", math.nan),
    ("order_effect", -0.5),
    ("accept", 1.1),
    ("accept", -0.1),
    ("duration_debiased", 1),
    ("duration_debiased", "yes"),
    ("sampler", "alias"),
    ("sampler", []),
    ("population_drift", -1.0),
    ("population_drift", 1e200),
    ("population_drift", math.inf),
]


@pytest.mark.parametrize(("field", "value"), ILLEGAL)
def test_a_config_that_makes_no_sense_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as refusal:
        WorldConfig(**{field: value})  # type: ignore[arg-type]
    message = str(refusal.value)
    assert message.startswith(f"WorldConfig.{field} must be ")
    assert message.endswith(f", got {value!r}")


def test_every_field_of_the_config_has_its_refusal_above() -> None:
    assert {field for field, _ in ILLEGAL} == {f.name for f in fields(WorldConfig)}


@PROPERTY
@given(configs())
def test_every_legal_config_makes_a_world_that_works(config: WorldConfig) -> None:
    world = World(config)
    log_of(config, 2)
    contexts = world.contexts(2)
    assert np.isfinite(world.expected_score(contexts.users)).all()
    reliability = world.reliability(20)
    assert math.isfinite(reliability.pooled)
    # of one event a user nothing can be said within users
    assert math.isfinite(reliability.within_user) == (config.history_length > 1)
    assert math.isfinite(world.alignment(20))
