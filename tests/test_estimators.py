"""Off-policy estimators: by hand, against brute force, and against the exact value on our own logs."""

import itertools
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

import recsim_gr
from recsim_gr import estimators
from recsim_gr.agents import Pretrained, Random
from recsim_gr.agents.referees import Oracle
from recsim_gr.errors import ConfigError, EstimationError, MissingPropensitiesError, PolicyError, UnknownNameError
from recsim_gr.estimators import (
    ESTIMATORS,
    Terms,
    clipped,
    dm,
    dr,
    effective_sample_size,
    estimate,
    estimate_from,
    importance_weights,
    interval,
    ips,
    logged_terms,
    prefixes,
    sndr,
    snips,
)
from recsim_gr.log import InteractionLog
from recsim_gr.logged_truth import LogTruth, log_truth
from recsim_gr.observations import Observations
from recsim_gr.rewards import RewardEnsembleConfig
from recsim_gr.training import TrainingConfig
from recsim_gr.world import World, WorldConfig

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)

FloatArray = NDArray[np.float64]

names = pytest.mark.parametrize("name", ESTIMATORS)


class ByTaste:
    """Softmax of popularity and of likeness to what was liked: a function of titles and scores seen, nothing else."""

    def __init__(self, log: InteractionLog, temperature: float, likeness: float = 0.3) -> None:
        seen = log.sequences().seen().astype(np.float64)
        together, count = seen.T @ seen, seen.sum(axis=0)
        np.fill_diagonal(together, 0.0)
        self.popularity = np.log1p(count)
        self.likeness = likeness * np.log((together + 1.0) * len(seen) / (np.outer(count, count) + len(seen)))
        self.temperature = temperature

    def log_probs(self, observations: Observations) -> FloatArray:
        liked = np.zeros((len(observations), observations.n_titles + 1))
        np.put_along_axis(liked, observations.titles, observations.scores.astype(np.float64) - 1.0, axis=1)
        logits = (self.popularity + liked[:, :-1] @ self.likeness) / self.temperature
        logits[observations.unavailable()] = -np.inf
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logits


class ByMeans:
    """A reward model without training: the title's mean score in another log, and the user's own level so far."""

    def __init__(self, log: InteractionLog) -> None:
        count = np.bincount(log.title, minlength=log.n_titles)
        total = np.bincount(log.title, weights=log.score.astype(np.float64), minlength=log.n_titles)
        self.level = float(log.score.mean())
        self.titles = (total + 5.0 * self.level) / (count + 5.0)

    def mean(self, observations: Observations) -> FloatArray:
        own = (observations.scores.sum(axis=1, dtype=np.float64) + 3.0 * self.level) / (observations.length + 3.0)
        return self.titles + (own - self.level)[:, None]


def small_log(n_users: int = 12, **changes: Any) -> tuple[World, InteractionLog]:
    world = World(WorldConfig(**({"n_titles": 9, "history_length": 4, "pull_strength": 1.0} | changes)))
    return world, world.generate_log(n_users, "judge", expose_propensities=True)


@st.composite
def random_terms(draw: st.DrawFn) -> Terms:
    """Events of a few users, in any order, with weights of which some are 0."""
    n = draw(st.integers(4, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    users = rng.integers(0, max(2, n // 3), n)
    users[:2] = 0, 1
    weights = np.where(rng.random(n) < 0.2, 0.0, rng.gamma(0.5, 2.0, n))
    weights[0] = 1.0
    return Terms(users, 1 + 4 * rng.random(n), weights, 1 + 4 * rng.random(n), 1 + 4 * rng.random(n))


# ----------------------------------------------------------------------------------------------------- by hand


def test_every_estimator_by_hand() -> None:
    # w = π/μ = (.5/.25, .1/.2, 0/.5) = (2, ½, 0); w·r = (6, ½, 0), mean 6.5/3.
    # SNIPS: 6.5/2.5 = 2.6; w̄ = 5/6; values 2.6 + w(r − 2.6)/w̄ = (2.6 + 2·.4·1.2, 2.6 − ½·1.6·1.2, 2.6).
    # DR: q̂(x,a) = (2, 2, 2), Σπq̂ = (3, 1, 2): (3 + 2·1, 1 − ½, 2) = (5, ½, 2).
    # SNDR: Σw(r − q̂)/Σw = (2 − ½)/2.5 = .6; (3 + .6 + 2·.4·1.2, 1 + .6 − ½·1.6·1.2, 2 + .6).
    w = importance_weights(np.log([0.5, 0.1, 1e-300]), np.array([0.25, 0.2, 0.5]))
    np.testing.assert_allclose(w, [2.0, 0.5, 0.0], atol=1e-15)
    r, q, v = np.array([3.0, 1.0, 5.0]), np.full(3, 2.0), np.array([3.0, 1.0, 2.0])
    np.testing.assert_allclose(ips(w, r), [6.0, 0.5, 0.0], atol=1e-12)
    np.testing.assert_allclose(snips(w, r), [3.56, 1.64, 2.6])
    np.testing.assert_allclose(dm(v), v)
    np.testing.assert_allclose(dr(w, r, q, v), [5.0, 0.5, 2.0])
    np.testing.assert_allclose(sndr(w, r, q, v), [4.56, 0.64, 2.6])
    np.testing.assert_allclose(ips(clipped(w, 1.0), r), [3.0, 0.5, 0.0], atol=1e-12)
    assert effective_sample_size(w) == pytest.approx(2.5**2 / 4.25)


def test_a_title_that_the_policy_never_plays_has_weight_0() -> None:
    np.testing.assert_array_equal(importance_weights(np.array([-np.inf, 0.0]), np.array([1e-300, 1.0])), [0.0, 1.0])


@PROPERTY
@given(random_terms())
def test_the_self_normalised_values_have_the_ratio_as_their_mean(terms: Terms) -> None:
    w, r, q, v = terms.weights, terms.scores, terms.logged_prediction, terms.policy_prediction
    assert w is not None
    assert q is not None
    assert v is not None
    assert snips(w, r).mean() == pytest.approx((w * r).sum() / w.sum())
    assert sndr(w, r, q, v).mean() == pytest.approx(v.mean() + (w * (r - q)).sum() / w.sum())


@PROPERTY
@given(random_terms(), st.floats(-10.0, 10.0), st.floats(0.1, 10.0))
def test_what_each_estimator_is_blind_to(terms: Terms, shift: float, scale: float) -> None:
    w, r, q, v = terms.weights, terms.scores, terms.logged_prediction, terms.policy_prediction
    assert w is not None
    assert q is not None
    assert v is not None
    # self-normalised: the scale of the weights is nothing, a shift of the scores is a shift of the estimate
    np.testing.assert_allclose(snips(scale * w, r), snips(w, r), rtol=1e-9)
    np.testing.assert_allclose(snips(w, r + shift), snips(w, r) + shift, atol=1e-9)
    assert r.min() - 1e-9 <= snips(w, r).mean() <= r.max() + 1e-9
    # of the policy's own log everything is the mean score
    one = np.ones_like(r)
    assert ips(one, r).mean() == pytest.approx(r.mean())
    assert snips(one, r).mean() == pytest.approx(r.mean())
    # a reward model that says nothing leaves DR nothing but IPS; one that knows the scores leaves DM
    zero = np.zeros_like(r)
    np.testing.assert_array_equal(dr(w, r, zero, zero), ips(w, r))
    np.testing.assert_allclose(sndr(w, r, zero, zero), snips(w, r))
    np.testing.assert_array_equal(dr(w, r, r, v), dm(v))
    # a clip that nothing reaches clips nothing
    np.testing.assert_array_equal(ips(clipped(w, w.max() + 1.0), r), ips(w, r))
    assert ips(clipped(w, 0.5), r).mean() <= ips(w, r).mean()


# -------------------------------------------------------------------------------------------------- the interval


def by_loops(values: FloatArray, users: NDArray[np.int64]) -> float:
    """The standard error clustered by user, a user at a time."""
    mean = sum(values) / len(values)
    square = 0.0
    for user in set(users.tolist()):
        square += sum(v - mean for v, u in zip(values, users, strict=True) if u == user) ** 2
    n = len(set(users.tolist()))
    return math.sqrt(square * n / (n - 1)) / len(values)


@PROPERTY
@given(random_terms(), st.floats(0.5, 0.99))
def test_the_clustered_interval_is_what_it_says(terms: Terms, level: float) -> None:
    values, users = terms.scores, terms.users
    found = interval(values, users, level=level)
    assert found.value == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(by_loops(values, users))
    reach = stats.t(len(np.unique(users)) - 1).ppf(0.5 + level / 2) * found.standard_error
    assert (found.low, found.high) == pytest.approx((values.mean() - reach, values.mean() + reach))
    order = np.random.default_rng(0).permutation(len(users))
    assert interval(values[order], users[order], level=level) == pytest.approx(found)
    renamed = users * 2**40 + 7  # ids are names: nothing is cut from them
    assert interval(values, renamed, level=level) == pytest.approx(found)


@PROPERTY
@given(random_terms())
def test_one_event_a_user_is_the_plain_standard_error(terms: Terms) -> None:
    values = terms.scores
    found = interval(values, np.arange(len(values)))
    assert found.standard_error == pytest.approx(stats.sem(values))


@PROPERTY
@given(random_terms())
def test_the_interval_about_the_contexts_by_loops(terms: Terms) -> None:
    values, users, centres = terms.scores, terms.users, terms.policy_prediction
    assert centres is not None
    with_centres = interval(values, users, about="contexts", centres=centres)
    assert with_centres.value == pytest.approx(values.mean())
    assert with_centres.standard_error == pytest.approx(by_loops(values - centres, users))
    square = 0.0
    for user in set(users.tolist()):
        own = values[users == user]
        square += (own[0] - values.mean()) ** 2 if len(own) == 1 else len(own) * own.var(ddof=1)
    within = interval(values, users, about="contexts")
    assert within.standard_error == pytest.approx(math.sqrt(square) / len(values))


@PROPERTY
@given(st.integers(0, 2**32))
def test_the_delta_method_agrees_with_the_jackknife_over_users(seed: int) -> None:
    # an oracle that knows no formula: leave one user out at a time; the two agree to the order of 1/users
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(150), rng.integers(2, 7, 150))
    level = rng.normal(size=150)[users]
    w, r, q, v = rng.gamma(2.0, 0.5, len(users)), 3 + level, 3 + rng.normal(size=len(users)), 3 + 0.5 * level
    for values in (
        lambda keep: snips(w[keep], r[keep]),
        lambda keep: sndr(w[keep], r[keep], q[keep], v[keep]),
        lambda keep: dr(w[keep], r[keep], q[keep], v[keep]),
    ):
        left_out = np.array([values(users != user).mean() for user in range(150)])
        jackknife = math.sqrt(149 / 150 * ((left_out - left_out.mean()) ** 2).sum())
        assert interval(values(users >= 0), users).standard_error == pytest.approx(jackknife, rel=0.05)


# ------------------------------------------------------------------------------------------------- from a log


@PROPERTY
@given(st.integers(1, 6), st.integers(0, 3), st.data())
def test_the_contexts_of_a_log_are_its_prefixes(n_users: int, seed: int, data: st.DataObject) -> None:
    _, log = small_log(n_users, seed=seed)
    start = data.draw(st.integers(0, len(log) - 1), label="start")
    stop = data.draw(st.integers(start + 1, len(log)), label="stop")
    observations = prefixes(log, slice(start, stop))
    assert len(observations) == stop - start
    for row, event in enumerate(range(start, stop)):
        before = slice(event - log.step[event], event)
        n = int(observations.length[row])
        assert n == log.step[event]
        assert observations.epoch[row] == log.epoch[event]
        for name, column, padding in (("titles", "title", log.n_titles), ("scores", "score", 0), ("times", "hours", 0)):
            seen = getattr(observations, name)[row]
            np.testing.assert_array_equal(seen[:n], getattr(log, column)[before])
            assert (seen[n:] == padding).all()
            assert seen.dtype == getattr(log.sequences(), name).dtype


@names
def test_an_estimate_is_that_of_a_loop_over_events(name: str) -> None:
    world, log = small_log(20)
    policy, model = ByTaste(world.generate_log(50), 0.7), ByMeans(world.generate_log(50))
    w, q, v = [], [], []
    for event in range(len(log)):
        x, a = prefixes(log, slice(event, event + 1)), log.title[event]
        pi, predicted = np.exp(policy.log_probs(x))[0], model.mean(x)[0]
        mu = np.exp(world.logging_log_probs(log.user[[event]], x.titles))[0]
        w.append(pi[a] / mu[a])
        q.append(predicted[a])
        v.append((pi * predicted).sum())
    terms = Terms(log.user, log.score.astype(np.float64), np.array(w), np.array(q), np.array(v))
    by_loop = ESTIMATORS[name].per_event(terms)
    found = estimate(policy, log, name, reward_model=model)
    np.testing.assert_allclose(found.values, by_loop, rtol=1e-9)
    assert found.value == pytest.approx(by_loop.mean())
    assert found.standard_error == pytest.approx(by_loops(by_loop, log.user))
    assert found.low < found.value < found.high
    assert (found.estimator, found.about, found.level) == (name, "users", 0.95)
    if ESTIMATORS[name].needs_propensities:
        assert found.effective_sample_size == pytest.approx(sum(w) ** 2 / sum(x * x for x in w))


class Spy:
    """A policy that writes down how many contexts it is asked for at once."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def log_probs(self, observations: Observations) -> NDArray[np.float32]:
        self.asked.append(len(observations))
        return Random().log_probs(observations)


def test_contexts_times_titles_are_never_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    world, log = small_log(30)
    whole = estimate(Spy(), log)
    monkeypatch.setattr(estimators, "CHUNK_ENTRIES", 7 * log.n_titles)
    spy = Spy()
    parts = estimate(spy, log)
    assert max(spy.asked) == 7
    assert sum(spy.asked) == len(log)
    np.testing.assert_array_equal(parts.values, whole.values)
    truth = log_truth(world, spy, log)
    assert max(spy.asked) == 7
    monkeypatch.undo()
    for field in fields(LogTruth)[:-1]:
        whole_truth = getattr(log_truth(world, Spy(), log), field.name)
        np.testing.assert_allclose(getattr(truth, field.name), whole_truth, rtol=1e-12)


def test_only_what_needs_propensities_asks_for_them() -> None:
    _, log = small_log()
    hidden = replace(log, propensities=None)
    model = ByMeans(log)
    for name, method in ESTIMATORS.items():
        if method.needs_propensities:
            with pytest.raises(MissingPropensitiesError, match="expose_propensities=True"):
                estimate(Random(), hidden, name, reward_model=model)
            with pytest.raises(EstimationError, match=f"{name} needs weights"):
                estimate_from(logged_terms(Random(), hidden, model), name)
        else:
            found = estimate(Random(), hidden, name, reward_model=model)
            assert found.value == estimate(Random(), log, name, reward_model=model).value
            assert math.isnan(found.effective_sample_size)


def test_a_log_over_a_real_backbone_and_its_rewards() -> None:
    # the shipped learners, end to end: they are policies and reward models like any other, the empty history included
    world, log = small_log(40)
    other = world.generate_log(60)
    quick = TrainingConfig(steps=20, warmup_steps=2, checks=1)
    backbone = recsim_gr.pretrain(other, recsim_gr.HSTUConfig(dimensions=8, n_layers=1), quick)
    rewards = recsim_gr.fit_reward_ensemble(other, backbone, RewardEnsembleConfig(members=2, training=quick))
    agent = Pretrained().fit(other, backbone)
    found = recsim_gr.estimate(agent, log, "dr", reward_model=rewards)
    w, table = np.exp(agent.log_probs(prefixes(log, slice(0, len(log))))), rewards.on(log)
    rows, a = np.cumsum(log.step == 0) - 1, log.title
    q = np.stack([table.at(rows, log.step.copy(), np.full(len(log), title)) for title in range(log.n_titles)], axis=1)
    own = np.arange(len(log))
    by_table = (w * q).sum(axis=1) + w[own, a] / log.require_propensities() * (log.score - q[own, a])
    np.testing.assert_allclose(found.values, by_table, rtol=1e-4)


# --------------------------------------------------------------------------------------------------- bad input


ONE = np.ones(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ips([1.0, math.nan, 1.0], ONE), "weights must be finite, got nan at event 1"),
        (lambda: ips([1.0, math.inf, 1.0], ONE), "weights must be finite, got inf at event 1"),
        (lambda: snips([1.0, 1.0, -0.5], ONE), "weights must be 0 or more, got -0.5 at event 2"),
        (lambda: ips(ONE, [math.nan, 1.0, 1.0]), "scores must be finite, got nan at event 0"),
        (lambda: ips(ONE, np.ones(4)), r"one number an event, got weights \(3,\), scores \(4,\)"),
        (lambda: ips(np.ones((3, 2)), ONE), r"weights must be one number an event, got shape \(3, 2\)"),
        (lambda: ips([], []), "weights must hold at least one event, got none"),
        (lambda: snips(np.zeros(3), ONE), "gives no logged title any weight"),
        (lambda: dr(ONE, ONE, ONE, np.ones(2)), r"policy_prediction \(2,\)"),
        (lambda: sndr(ONE, ONE, [1.0, math.inf, 1.0], ONE), "logged_prediction must be finite, got inf at event 1"),
        (lambda: dm([math.nan]), "policy_prediction must be finite"),
        (lambda: importance_weights([0.0], [0.0]), r"propensities must be in \(0, 1\], got 0.0 at event 0"),
        (lambda: importance_weights([0.0], [1.5]), r"propensities must be in \(0, 1\], got 1.5 at event 0"),
        (lambda: importance_weights([0.0], [math.nan]), r"propensities must be in \(0, 1\], got nan at event 0"),
        (lambda: importance_weights([0.5], [0.5]), "log_probs must be at most 0, got 0.5 at event 0"),
        (lambda: importance_weights([math.nan], [0.5]), "log_probs must be at most 0, got nan at event 0"),
        (lambda: importance_weights([0.0, 0.0], [0.5]), r"log_probs \(2,\), propensities \(1,\)"),
        (lambda: clipped(ONE, 0.0), "clip must be positive, got 0.0"),
        (lambda: clipped(ONE, math.nan), "clip must be positive, got nan"),
        (lambda: interval(ONE, np.zeros(3, dtype=int)), "at least two users, got 1"),
        (lambda: interval(ONE, np.arange(2)), r"values \(3,\), users \(2,\)"),
        (lambda: interval(ONE, np.arange(3), about="contexts", centres=np.ones(2)), r"centres must be of shape \(3,\)"),
        (lambda: interval([1.0, math.nan], np.arange(2)), "values must be finite, got nan at event 1"),
        (lambda: effective_sample_size([-1.0]), "weights must be 0 or more"),
    ],
)
def test_bad_numbers_are_refused_by_name(call: Callable[[], object], message: str) -> None:
    with pytest.raises(EstimationError, match=message):
        call()


def test_options_that_make_no_sense_are_refused_by_name() -> None:
    _, log = small_log()
    with pytest.raises(UnknownNameError, match="no estimator 'isp'; there are ips, snips, dm, dr, sndr"):
        estimate(Random(), log, "isp")
    for name in ("dm", "dr", "sndr"):
        with pytest.raises(ConfigError, match=f"{name} needs a reward model"):
            estimate(Random(), log, name)
    with pytest.raises(ConfigError, match="no target 'titles' of an interval; there are users, contexts"):
        estimate(Random(), log, about="titles")
    for level in (0.0, 1.0, math.nan):
        with pytest.raises(ConfigError, match="level must be between 0 and 1"):
            estimate(Random(), log, level=level)
    with pytest.raises(ConfigError, match="centres belong to an interval"):
        interval(ONE, np.arange(3), centres=ONE)
    with pytest.raises(EstimationError, match="the log is empty"):
        estimate(Random(), log.rows(slice(0, 0)))
    with pytest.raises(PolicyError, match="Oracle is a referee"):
        estimate(Oracle(), log)


def test_a_policy_or_a_reward_model_that_answers_nonsense_is_refused() -> None:
    _, log = small_log()

    class Broken:
        def log_probs(self, observations: Observations) -> FloatArray:
            return np.zeros((len(observations), observations.n_titles))

        def mean(self, observations: Observations) -> FloatArray:
            return np.full((len(observations), observations.n_titles), np.nan)

    with pytest.raises(PolicyError, match="Broken"):
        estimate(Broken(), log)
    with pytest.raises(EstimationError, match="predictions of the reward model must be finite, got nan at event 0"):
        estimate(Random(), log, "dr", reward_model=Broken())


# ---------------------------------------------------------------------------------------------- the exact truth


def test_the_truth_of_a_log_by_brute_force() -> None:
    # a context and a title at a time, from what the world says of each
    world, log = small_log(5, noise_model="watch_time")
    policy, model = ByTaste(world.generate_log(50), 0.7), ByMeans(world.generate_log(50))
    truth = log_truth(world, policy, log, model)
    grand = truth.score_value.mean()
    for event in range(len(log)):
        x, user = prefixes(log, slice(event, event + 1)), log.user[[event]]
        pi, mu = np.exp(policy.log_probs(x))[0], np.exp(world.logging_log_probs(user, x.titles))[0]
        facts = world.exposure(user)
        mean, square = world.expected_score(user)[0], world.noise.second_moment(facts)[0]
        s, q = world.satisfaction(user)[0], model.mean(x)[0]
        value = satisfaction = w2 = dr_mean = 0.0
        second = dict.fromkeys(("ips", "snips", "dr"), 0.0)
        for a in range(log.n_titles):
            if pi[a] == 0:
                continue
            w = pi[a] / mu[a]
            value += pi[a] * mean[a]
            satisfaction += pi[a] * s[a]
            w2 += mu[a] * w**2
            dr_mean += pi[a] * (mean[a] - q[a])
            for name, c in (("ips", 0.0), ("snips", grand), ("dr", q[a])):
                second[name] += mu[a] * w**2 * (square[a] - 2 * c * mean[a] + c**2)
        assert truth.score_value[event] == pytest.approx(value)
        assert truth.value[event] == pytest.approx(satisfaction)
        assert truth.weight_square[event] == pytest.approx(w2)
        assert truth.variance("ips")[event] == pytest.approx(second["ips"] - value**2)
        assert truth.variance("snips")[event] == pytest.approx(second["snips"] - (value - grand) ** 2)
        assert truth.variance("dr")[event] == pytest.approx(second["dr"] - dr_mean**2)
    assert truth.standard_error("ips") == pytest.approx(math.sqrt(truth.variance("ips").sum()) / len(log))
    with pytest.raises(UnknownNameError, match="no exact variance of 'dm'; there are ips, snips, dr"):
        truth.variance("dm")
    with pytest.raises(ConfigError, match="needs the reward model"):
        log_truth(world, policy, log).variance("dr")


def test_the_truth_of_a_referee_is_its_best_title() -> None:
    world, log = small_log(5)
    truth = log_truth(world, Oracle(), log)
    unseen = np.where(prefixes(log, slice(0, len(log))).seen(), -np.inf, world.satisfaction(log.user))
    np.testing.assert_allclose(truth.value, unseen.max(axis=1))


# -------------------------------------------------------------------------- coverage and variance over 200 logs


LOGS, USERS, LENGTH = 200, 400, 6


class Case(NamedTuple):
    """A policy on a world: exact figures and the terms of LOGS logs of USERS fresh users each."""

    terms: Terms
    truth: LogTruth
    world: World


MILD = {"pull_strength": 0.8, "appeal_tail": 0.4}
FLAT = {"pull_strength": 0.3, "appeal_tail": 0.2}
"""Logging policies: personal but nowhere near certain; and all but uniform."""


class Tempered:
    """A policy at another temperature. It remembers its answers, since the truth asks what the estimators asked."""

    def __init__(self, policy: Any, temperature: float) -> None:
        self.policy, self.temperature = policy, temperature
        self.answers: dict[bytes, NDArray[np.float32]] = {}

    def log_probs(self, observations: Observations) -> NDArray[np.float32]:
        key = observations.titles.tobytes() + observations.scores.tobytes()
        if key not in self.answers:
            logits = self.policy.log_probs(observations) / np.float32(self.temperature)
            self.answers[key] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return self.answers[key]


def pretrained(other: InteractionLog) -> Tempered:
    """A small HSTU that imitates another log, sharpened a little."""
    quick = TrainingConfig(steps=60, learning_rate=1e-2, warmup_steps=5, checks=1)
    backbone = recsim_gr.pretrain(other, recsim_gr.HSTUConfig(dimensions=8, n_layers=1), quick)
    return Tempered(Pretrained().fit(other, backbone), 0.7)


CASES: dict[str, tuple[dict[str, Any], Callable[[InteractionLog], Any]]] = {
    "tempered popularity": (MILD, lambda other: ByTaste(other, 0.5, likeness=0.0)),
    "liked titles": (MILD | {"noise_model": "gaussian"}, lambda other: ByTaste(other, 0.5)),
    "liked titles, all but greedy": (FLAT | {"n_titles": 50}, lambda other: ByTaste(other, 0.02)),
    "pretrained": (MILD, pretrained),
    "uniform under flattened logging": (FLAT, lambda other: Random()),
}


def drawn(changes: dict[str, Any], policy: Callable[[InteractionLog], Any], logs: int = LOGS) -> Case:
    """Policy and reward model learn from training users; the logs are of judge users: none is in two of them."""
    world = World(WorldConfig(**({"n_titles": 25, "history_length": LENGTH, "seed": 11} | changes)))
    other = world.generate_log(2_000)
    log = world.generate_log(logs * USERS, "judge", expose_propensities=True)
    target, model = policy(other), ByMeans(other)
    return Case(logged_terms(target, log, model), log_truth(world, target, log, model), world)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return drawn(*CASES[request.param])


def rows_of(whole: Any, part: slice) -> list[Any]:
    """The columns of terms or of a truth, cut to some events."""
    columns: list[Any] = list(whole) if isinstance(whole, Terms) else [getattr(whole, f.name) for f in fields(whole)]
    return [column[part] for column in columns]


def logs_of(case: Case) -> list[tuple[Terms, LogTruth]]:
    """The case, a log at a time."""
    size = USERS * LENGTH
    parts = [slice(start, start + size) for start in range(0, len(case.terms.users), size)]
    return [(Terms(*rows_of(case.terms, part)), LogTruth(*rows_of(case.truth, part))) for part in parts]


def binomially_compatible(hits: int, of: int, level: float, alternative: str = "two-sided") -> bool:
    """Whether so many of so many intervals are what chance makes of ``level``: at one in ten thousand, since some 160
    such questions are asked here."""
    return bool(stats.binomtest(hits, of, level, alternative=alternative).pvalue > 1e-4)


@pytest.mark.parametrize("name", ["ips", "snips", "dr", "sndr"])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_cover_the_exact_value_as_often_as_they_say(case: Case, name: str, level: float) -> None:
    assert case.truth.weight_square.mean() <= 50
    everybody = float(case.truth.score_value.mean())  # 80,000 users: what is left of their luck is 1/14 of one log's
    hits = dict.fromkeys(("users", "own, as users", "own, within", "own, exact centres"), 0)
    errors = []
    for terms, truth in logs_of(case):
        own = float(truth.score_value.mean())
        values = ESTIMATORS[name].per_event(terms)
        about_users = interval(values, terms.users, level=level)
        within = interval(values, terms.users, about="contexts", level=level)
        exact = interval(values, terms.users, about="contexts", centres=truth.score_value, level=level)
        hits["users"] += about_users.low <= everybody <= about_users.high
        hits["own, as users"] += about_users.low <= own <= about_users.high
        hits["own, within"] += within.low <= own <= within.high
        hits["own, exact centres"] += exact.low <= own <= exact.high
        errors.append(about_users.value - own)
    for target in ("users", "own, within", "own, exact centres"):
        assert binomially_compatible(hits[target], LOGS, level), (target, hits[target])
    # users differ, and the interval about other users has room for it: wider than own contexts need, never narrower
    assert binomially_compatible(hits["own, as users"], LOGS, level, "less"), hits
    # the mean error over all logs is within 4 of its own standard errors of 0
    assert abs(np.mean(errors)) < 4 * np.std(errors, ddof=1) / math.sqrt(LOGS)


def event_errors(case: Case, name: str) -> FloatArray:
    """(E,) each event's part, less its exact mean given the context; ``snips`` linearised at the exact value."""
    terms, truth = case.terms, case.truth
    assert terms.weights is not None
    assert terms.logged_prediction is not None
    assert terms.policy_prediction is not None
    grand = float(truth.score_value.mean())
    baseline: Any = {"ips": 0.0, "snips": grand, "dr": terms.logged_prediction}[name]
    added: Any = {"ips": 0.0, "snips": grand, "dr": terms.policy_prediction}[name]
    error: FloatArray = terms.weights * (terms.scores - baseline) + added - truth.score_value
    return error


def by_user(case: Case, values: FloatArray) -> FloatArray:
    """(users,) sums of per-event values."""
    _, row = np.unique(case.terms.users, return_inverse=True)
    return np.bincount(row, weights=values).astype(np.float64)


def deviations_from_0(values: FloatArray) -> float:
    """The mean of independent values, in its standard errors."""
    return float(values.mean() / values.std() * math.sqrt(len(values)))


@pytest.mark.parametrize("name", ["ips", "snips", "dr"])
def test_the_variance_about_the_own_contexts_is_the_exact_one(case: Case, name: str) -> None:
    # Over 80,000 users: each user's squared error has the user's summed conditional variances as its mean, because
    # the events' errors are uncorrelated.
    error, variance = event_errors(case, name), case.truth.variance(name)
    assert abs(deviations_from_0(by_user(case, error))) < 4
    assert abs(deviations_from_0(by_user(case, error) ** 2 - by_user(case, variance))) < 4
    assert abs(deviations_from_0(error**2 - variance)) < 4
    for one, other in itertools.combinations(error.reshape(-1, LENGTH).T, 2):
        assert abs(deviations_from_0(one * other)) < 4.5  # martingale differences are uncorrelated


@pytest.mark.parametrize("name", ["ips", "snips", "dr"])
def test_the_variance_over_logs_is_the_exact_one(case: Case, name: str) -> None:
    # Errors over their exact standard errors have variance 1; over 200 logs the sum of their squares is chi-square
    # with 200 degrees of freedom, as far as an average of 2,400 events is normal.
    z = []
    for terms, truth in logs_of(case):
        estimated = ESTIMATORS[name].per_event(terms).mean()
        z.append((estimated - truth.score_value.mean()) / truth.standard_error(name))
    total = float(np.square(z).sum())
    assert 1e-3 < stats.chi2(LOGS).cdf(total) < 1 - 1e-3


WORLDS: dict[str, dict[str, Any]] = {
    "watch_time": {},
    "gaussian": {"noise_model": "gaussian"},
    "student_t": {"noise_model": "student_t", "reward_noise": 0.3},
    "clickbait": {"noise_model": "clickbait"},
    "lengths vary": {"history_median": 3},
    "order matters": {"order_effect": 1.0},
    "cold titles": {"cold_share": 0.4},
    "tastes drift": {"population_drift": 1.0, "accept": 0.5},
    "inverse CDF": {"sampler": "inverse_cdf"},
    "all at once": {
        "history_median": 4,
        "order_effect": 1.0,
        "cold_share": 0.4,
        "population_drift": 1.0,
        "accept": 0.5,
        "duration_debiased": True,
    },
}


@pytest.mark.parametrize("world", WORLDS)
def test_estimates_hit_the_exact_value_whatever_the_world(world: str) -> None:
    # 12 logs' worth of users: mean error 0 and mean squared error the exact variance, user by user
    case = drawn(MILD | WORLDS[world], lambda other: ByTaste(other, 0.5), logs=12)
    for name in ("ips", "snips", "dr"):
        error, variance = event_errors(case, name), case.truth.variance(name)
        assert abs(deviations_from_0(by_user(case, error))) < 4
        assert abs(deviations_from_0(by_user(case, error) ** 2 - by_user(case, variance))) < 4


def test_where_moods_last_only_intervals_clustered_by_user_are_right() -> None:
    # Under ``drift`` the errors of a user's events share a mood: still of mean 0, no longer uncorrelated.
    n = 100
    case = drawn(MILD | {"noise_model": "drift"}, lambda other: ByTaste(other, 0.5), logs=n)
    hits = {"ips": [0, 0], "snips": [0, 0]}
    for name, counts in hits.items():
        error = by_user(case, event_errors(case, name))
        assert abs(deviations_from_0(error)) < 4
        assert (error**2).mean() > 1.5 * by_user(case, case.truth.variance(name)).mean()
        for terms, truth in logs_of(case):
            values, own = ESTIMATORS[name].per_event(terms), truth.score_value.mean()
            clustered = interval(values, terms.users, about="contexts", centres=truth.score_value)
            within = interval(values, terms.users, about="contexts")
            counts[0] += clustered.low <= own <= clustered.high
            counts[1] += within.low <= own <= within.high
        assert binomially_compatible(counts[0], n, 0.95), counts
        assert not binomially_compatible(counts[1], n, 0.95), counts


def test_where_a_policy_is_hardly_ever_logged_a_right_estimator_misses() -> None:
    # The uniform policy under a logging policy twice as personal as the default: E[w²] is above 10⁴, carried by titles
    # that these logs do not hold. The intervals lie below the truth, and nothing in the log says so.
    peaked = drawn({"pull_strength": 4.0, "appeal_tail": 1.0}, lambda other: Random(), logs=50)
    assert peaked.truth.weight_square.mean() > 10_000
    hits, shares = 0, []
    for terms, truth in logs_of(peaked):
        assert terms.weights is not None
        found = interval(ips(terms.weights, terms.scores), terms.users)
        own = truth.score_value.mean()
        hits += found.low <= own <= found.high
        shares.append(found.standard_error / truth.standard_error("ips"))
    assert hits < 0.8 * 50  # of 95 % intervals
    assert np.median(shares) < 0.1  # what the interval takes for the error is a small part of it


def test_another_worlds_log_is_refused() -> None:
    world = World(WorldConfig(n_titles=12, history_length=3))
    log = world.generate_log(5)
    for other in (WorldConfig(n_titles=12, history_length=3, seed=1), WorldConfig(n_titles=13, history_length=3)):
        with pytest.raises(EstimationError, match="the log is another world's"):
            log_truth(World(other), Random(), log)
