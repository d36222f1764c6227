"""What went wrong in peers, each shut out by a test; and closed forms against a second, independent simulator.

A test that shuts something out is worth what it would catch. So where a defect can be put into this package with a few
lines, the test puts it in, and sees itself turn red.
"""

import hashlib
import itertools
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

import recsim_gr
from recsim_gr import randomness, world_base
from recsim_gr.agents import Random
from recsim_gr.agents.rsdpo import _draw
from recsim_gr.agents.sb3 import inverse_cdf
from recsim_gr.choosing import Rows
from recsim_gr.envs import bandit
from recsim_gr.errors import EstimationError
from recsim_gr.estimators import importance_weights, interval, ips, logged_terms
from recsim_gr.log import InteractionLog
from recsim_gr.noise import NOISE_MODELS, Exposure
from recsim_gr.randomness import uniforms
from recsim_gr.world import World, WorldConfig

PROPERTY = settings(max_examples=12, deadline=None, derandomize=True)

FloatArray = NDArray[np.float64]
Users = NDArray[np.int64]
Uniforms = Callable[[int, str, Users, int], FloatArray]

SAMPLERS = ("gumbel", "stepwise", "inverse_cdf")
EVERYTHING: dict[str, Any] = {
    "history_median": 3,
    "cold_share": 0.25,
    "order_effect": 1.0,
    "population_drift": 1.0,
    "accept": 0.5,
}
"""Every option of a world that draws or chooses."""

models = pytest.mark.parametrize("model", NOISE_MODELS)


def draw_through(monkeypatch: pytest.MonkeyPatch, stand_in: Uniforms, beneath: Uniforms = uniforms) -> None:
    """Every module of the package that draws by ``beneath``, wherever it lives, draws by ``stand_in`` instead."""
    loaded = {name: module for name, module in sys.modules.items() if name.startswith("recsim_gr.")}
    found = {name for name, m in loaded.items() if m is not randomness and getattr(m, "uniforms", None) is beneath}
    assert {"recsim_gr.world", "recsim_gr.world_base"} <= found

    def drawn(seed: int, purpose: str, users: Users, per_user: int, out: FloatArray | None = None) -> FloatArray:
        u = stand_in(seed, purpose, users, per_user)
        if out is None:
            return u
        out[...] = u
        return out

    for name in found:
        monkeypatch.setattr(loaded[name], "uniforms", drawn)


# ------------------------------------------------------------- one seed for the choice and for the noise of its score
# Open Bandit Pipeline's continuous logs: action and reward noise drawn with one seed; correlation .85 to .95, and the
# IPS of the uniform policy 1.93 where its own truth is 1.65.


def correlations_with_the_choice(world: World, n_users: int, monkeypatch: pytest.MonkeyPatch) -> FloatArray:
    """In standard errors: the residual score of every event against every number that its user's choices came from."""
    luck: dict[str, list[tuple[Users, FloatArray]]] = {}
    beneath = world_base.uniforms  # the real thing, or a defect put in its place

    def spy(seed: int, purpose: str, users: Users, per_user: int) -> FloatArray:
        u = beneath(seed, purpose, users, per_user)
        if purpose.startswith("choice"):
            luck.setdefault(purpose, []).append((np.array(users), u))
        return u

    users = world.users("train", n_users)
    with monkeypatch.context() as patch:
        draw_through(patch, spy, beneath)
        events = world.draw_events(users, world.config.history_length)
    assert luck
    expected = np.take_along_axis(world.expected_score_watched(users), events.titles, axis=1)
    residual = events.outcome.score - expected
    z = []
    for blocks in luck.values():
        rows = np.concatenate([who for who, _ in blocks]) - users[0]  # later rounds are for some users only
        u = np.concatenate([numbers for _, numbers in blocks])
        product = residual[rows, :, None] * (u - 0.5)[:, None, :]  # (n, T, numbers)
        z.append(product.sum(axis=0) / np.sqrt((product**2).sum(axis=0)))
    return np.concatenate([part.ravel() for part in z])


@models
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_noise_of_a_score_knows_nothing_of_the_choice(
    model: str, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = WorldConfig(n_titles=12, history_length=3, seed=3, noise_model=model, sampler=sampler)
    assert np.abs(correlations_with_the_choice(World(config), 6_000, monkeypatch)).max() < 4.5


@pytest.mark.parametrize("model", ["watch_time", "gaussian", "student_t"])
def test_noise_from_the_choices_own_numbers_would_be_seen(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_stream(seed: int, purpose: str, users: Users, per_user: int) -> FloatArray:
        return uniforms(seed, "choice" if purpose == "noise" else purpose, users, per_user)

    world = World(WorldConfig(n_titles=12, history_length=3, seed=3, noise_model=model))
    draw_through(monkeypatch, one_stream)
    assert np.abs(correlations_with_the_choice(world, 6_000, monkeypatch)).max() > 10


class Miss(NamedTuple):
    """IPS of the uniform policy against its exact value: by how much, in standard errors."""

    estimate: float
    truth: float
    deviations: float


def uniform_by_ips(world: World, log: InteractionLog) -> Miss:
    truth = recsim_gr.log_truth(world, Random(), log).score_value
    terms = logged_terms(Random(), log)
    assert terms.weights is not None
    values = ips(terms.weights, terms.scores)
    error = interval(values, terms.users, about="contexts", centres=truth).standard_error
    return Miss(values.mean(), truth.mean(), (values - truth).mean() / error)


def flat_world(model: str, **changes: Any) -> World:
    """Logging that is all but uniform, so that IPS of the uniform policy has no excuse."""
    flat = {"n_titles": 20, "history_length": 4, "pull_strength": 0.3, "appeal_tail": 0.2}
    return World(WorldConfig(**(flat | {"noise_model": model} | changes)))


@models
def test_ips_of_the_uniform_policy_is_its_own_truth(model: str) -> None:
    world = flat_world(model)
    found = uniform_by_ips(world, world.generate_log(10_000, "judge", expose_propensities=True))
    assert abs(found.deviations) < 4, found


@pytest.mark.parametrize("model", ["gaussian", "student_t"])
def test_with_one_seed_for_both_it_would_miss_its_own_truth(model: str) -> None:
    # The noise of each score from the number that made its title win: winners are lucky, so scores are too high.
    # (Watch time hides it: there luck makes an event ordinary as well as long. The correlations above see it.)
    world = flat_world(model, sampler="gumbel")
    log = world.generate_log(10_000, "judge", expose_propensities=True)
    users = world.users("judge", 10_000)
    titles = log.title.reshape(len(users), -1)
    luck = np.take_along_axis(uniforms(world.config.seed, "choice", users, world.n_titles), titles, axis=1)
    facts = world.exposure(users)
    of_chosen = Exposure(
        np.take_along_axis(facts.satisfaction, titles, axis=1), facts.free_time, world.durations[titles]
    )
    scores = world.noise.sample(of_chosen, np.repeat(luck[..., None], world.noise.uniforms_per_event, axis=2)).score
    shared = replace(log, score=scores.ravel().astype(np.float32), watch_minutes=np.zeros(len(log), dtype=np.float32))
    assert abs(uniform_by_ips(world, shared).deviations) > 10


# ------------------------------------------------- a claimed expectation that is not the mean of what is sampled
# A second simulator, from the design's formulas and NumPy's own distributions: it chooses title by title with
# probabilities, never by Gumbel keys, and draws noise without inverse CDFs.

BATCHES, USERS = 20, 250


class Population(NamedTuple):
    """People of the second simulator, (n, I) or (n,)."""

    satisfaction: FloatArray
    utility: FloatArray
    free_time: FloatArray
    epoch: NDArray[np.int64]


def populated(world: World, rng: np.random.Generator, n: int) -> Population:
    """n users of the early epochs, with the world's own titles."""
    c = world.config
    epoch = rng.integers(0, max(c.n_epochs - 1, 1), n)
    centre = world.taste_centres[epoch]
    theta = centre + rng.standard_normal((n, c.taste_dimensions))
    delta = rng.beta(c.discernment_alpha, c.discernment_beta, n)[:, None]
    phi = delta * theta + np.sqrt(1 - delta**2) * rng.standard_normal((n, c.taste_dimensions))
    leniency = c.leniency_deviation * rng.standard_normal((n, 1))
    logit = c.satisfaction_slope * (theta @ world.traits.T + world.quality + leniency)
    utility = c.pull_strength * phi @ world.traits.T + (1 - delta) * world.appeal[epoch]
    free_time = c.free_time_median_minutes * np.exp(c.free_time_log_deviation * rng.standard_normal(n))
    return Population(1 + 4 / (1 + np.exp(-logit)), utility, free_time, epoch)


def chosen(people: Population, rng: np.random.Generator, length: int) -> NDArray[np.int64]:
    """(n, T) titles, one choice after the other from what is left."""
    left, titles = np.exp(people.utility - people.utility.max(axis=1, keepdims=True)), []
    rows = np.arange(len(left))
    for _ in range(length):
        cumulative = np.cumsum(left, axis=1)
        title = (cumulative <= rng.random(len(left))[:, None] * cumulative[:, -1:]).sum(axis=1)
        titles.append(title)
        left[rows, title] = 0.0
    return np.stack(titles, axis=1)


def scored(
    world: World, people: Population, titles: NDArray[np.int64], rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Scores and satisfaction of (n, T) exposures in order, by the design's words for each model."""
    s, nu = np.take_along_axis(people.satisfaction, titles, axis=1), world.config.reward_noise
    match world.config.noise_model:
        case "watch_time":
            ordinary = (s - 1) / 4 * rng.lognormal(0.0, 0.05, s.shape)
            session = rng.exponential(people.free_time[:, None], s.shape) / world.durations[titles]
            return 1 + 4 * np.minimum(1.0, np.where(rng.random(s.shape) < nu, session, ordinary)), s
        case "gaussian":
            return rng.normal(s, 4 * nu), s
        case "student_t":
            return s + 4 * nu * rng.standard_t(4, s.shape) / math.sqrt(2), s
        case "clickbait":
            return s + 4 * nu * world.allure[people.epoch[:, None], titles] + rng.normal(0, 0.1, s.shape), s
        case _:
            mood = rng.standard_normal(len(s))
            moods = []
            for _ in range(s.shape[1]):
                gap = np.where(rng.random(len(s)) < 0.25, rng.exponential(22.0, len(s)), rng.exponential(0.7, len(s)))
                kept = np.exp(-gap / 48.0)
                mood = kept * mood + np.sqrt(1 - kept**2) * rng.standard_normal(len(s))
                moods.append(mood)
            return s + 4 * nu * np.stack(moods, axis=1), s


def centred(x: FloatArray, weight: FloatArray | None = None) -> FloatArray:
    return x - np.asarray(np.average(x, axis=1, weights=weight))[:, None]


def signed_square(xy: float, xx: float, yy: float) -> float:
    return math.copysign(xy**2 / (xx * yy), xy)


def simulated(world: World, rng: np.random.Generator) -> FloatArray:
    """(3,) pooled and within-user reliability and alignment of USERS fresh users."""
    people = populated(world, rng, USERS)
    score, truth = scored(world, people, chosen(people, rng, world.config.history_length), rng)
    x, y = centred(score), centred(truth)
    pooled = np.corrcoef(score.ravel(), truth.ravel())[0, 1]
    within = signed_square((x * y).sum(), (x * x).sum(), (y * y).sum())
    # E[score] by averages: two halves, since the noise of one average is not in its product with the other
    everything = np.tile(np.arange(world.n_titles), (USERS, 1))
    halves = [np.mean([scored_alone(world, people, everything, rng) for _ in range(60)], axis=0) for _ in range(2)]
    weight = np.exp(people.utility)
    weight /= weight.sum(axis=1, keepdims=True)
    a, b = (centred(half, weight) for half in halves)
    t = centred(people.satisfaction, weight)
    aligned = signed_square((weight * (a + b) / 2 * t).sum(), (weight * a * b).sum(), (weight * t * t).sum())
    return np.array([math.copysign(pooled**2, pooled), within, aligned])


def scored_alone(world: World, people: Population, titles: NDArray[np.int64], rng: np.random.Generator) -> FloatArray:
    """Scores of exposures each at a moment of its own: a mood lasts, and would be one noise for a row of titles."""
    if world.config.noise_model != "drift":
        return scored(world, people, titles, rng)[0]
    s = np.take_along_axis(people.satisfaction, titles, axis=1)
    return rng.normal(s, 4 * world.config.reward_noise)


@models
@pytest.mark.parametrize(("seed", "changes"), [(1, {}), (2, {"population_drift": 1.0, "pull_strength": 1.0})])
def test_reliability_and_alignment_are_those_of_a_second_simulator(
    model: str, seed: int, changes: dict[str, Any]
) -> None:
    fixed: dict[str, Any] = {"n_titles": 15, "history_length": 5, "taste_dimensions": 4, "reward_noise": 0.3}
    world = World(WorldConfig(**(fixed | {"noise_model": model, "seed": seed} | changes)))
    rng = np.random.default_rng(seed)
    batches = np.stack([simulated(world, rng) for _ in range(BATCHES)])
    error = batches.std(axis=0, ddof=1) / math.sqrt(BATCHES)
    n = BATCHES * USERS  # the world's own figures are of as many users, so their error is as large
    claimed = np.array([*world.reliability(n), world.alignment(n)])
    # .002: a squared correlation of 250 users is too large by about one in 250
    assert (np.abs(batches.mean(axis=0) - claimed) < 4 * math.sqrt(2) * error + 0.002).all(), (batches.mean(0), claimed)


@models
@PROPERTY
@given(seed=st.integers(0, 2**40), dial=st.sampled_from([0.1, 0.5, 1.0]))
def test_the_expected_score_is_the_mean_of_the_log_title_by_title(model: str, seed: int, dial: float) -> None:
    # of logged scores and of nothing else: residuals of each title, and of each step, have mean 0
    world = World(WorldConfig(n_titles=8, history_length=3, noise_model=model, reward_noise=dial, seed=seed))
    log = world.generate_log(3_000)
    residual = log.score - world.expected_score_watched(log.user)[np.arange(len(log)), log.title]
    for group in (*(log.title == title for title in range(8)), *(log.step == step for step in range(3))):
        own = residual[group]
        assert abs(own.mean()) < 4.5 * own.std() / math.sqrt(own.size) + 1e-6  # a log holds float32


# ------------------------------------------------------------------ repeated draws that repeat the same uniforms


def test_no_number_is_ever_drawn_for_two_things(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every uniform of two worlds of neighbouring seeds, of their logs and contexts, and of environments with
    # neighbouring seeds, by what it was drawn for. Numbers have 53 bits: two of 10⁶ agree by chance once in 20,000.
    drawn: dict[tuple[int, str], dict[int, FloatArray]] = {}

    def recorder(seed: int, purpose: str, users: Users, per_user: int) -> FloatArray:
        u = uniforms(seed, purpose, users, per_user)
        stream = drawn.setdefault((seed, purpose), {})
        for user, row in zip(np.asarray(users).tolist(), u, strict=True):
            before = stream.setdefault(user, row)
            assert np.array_equal(before, row), (purpose, user)
        return u

    played: list[FloatArray] = []  # environments read their streams on, a step after the other

    def read_on(stream: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
        u = beneath(stream, shape)
        played.append(u.ravel().copy())
        return u

    beneath = bandit._uniforms
    monkeypatch.setattr(bandit, "_uniforms", read_on)
    draw_through(monkeypatch, recorder)
    for seed, model in itertools.product((0, 1), ("watch_time", "drift")):
        world = World(WorldConfig(n_titles=12, history_length=3, seed=seed, noise_model=model, history_median=2))
        for split in ("train", "judge"):
            world.generate_log(100, split)
        for other in (0, 1):
            world.contexts(100, other)
    stepwise = World(WorldConfig(n_titles=12, history_length=3, order_effect=1.0))
    stepwise.generate_log(100)
    for seed in (0, 1, 2):
        env = gymnasium.make("recsim_gr/WatchTime-v0", n_titles=12, history_length=3)
        for episode in range(300):  # more than are drawn at a time
            env.reset(seed=seed if episode == 0 else None)
            env.step(0)
    purposes = {purpose for _, purpose in drawn}
    assert {"choice", "choice in steps", "noise", "mood", "times", "history length"} <= purposes
    assert sum(map(len, played)) > 3 * 300 * 4  # a context and the three numbers of a score, each episode
    numbers = np.concatenate([*played, *(row for stream in drawn.values() for row in stream.values())])
    assert len(numbers) > 30_000
    assert len(np.unique(numbers)) == len(numbers)


def test_logs_and_contexts_of_other_seeds_share_no_event() -> None:
    def events(log: InteractionLog) -> set[tuple[float, float]]:
        return set(zip(log.hours.tolist(), log.score.tolist(), strict=True))

    logs = [
        World(WorldConfig(n_titles=12, history_length=3, noise_model="gaussian", seed=seed)).generate_log(200, split)
        for seed in (0, 1, 2**32, 2**32 + 1)  # a seed cut to 32 bits would repeat itself
        for split in ("train", "test")
    ]
    for one, other in itertools.combinations(logs, 2):
        assert not events(one) & events(other)


def test_an_environment_that_is_reset_without_a_seed_goes_on() -> None:
    env = gymnasium.make("recsim_gr/WatchTime-v0", n_titles=12, history_length=3, noise_model="gaussian", pool_users=1)
    rewards = []
    for episode in range(600):  # beyond what is drawn at a time
        env.reset(seed=5 if episode == 0 else None)
        rewards.append(float(env.step(7)[1]))
    assert len(set(rewards)) == len(rewards)
    lagged = [abs(np.corrcoef(rewards[:-lag], rewards[lag:])[0, 1]) for lag in (1, 2, 255, 256, 257)]
    assert max(lagged) < 4.5 / math.sqrt(len(rewards) - 257)


# ------------------------------------------------------------------------------------------- global random state
# SARDINE, RecSim: equal seeds, different data, because somebody else drew from the same global generator.

DIGEST = """
import hashlib, sys
import recsim_gr
options = dict(history_median=3, cold_share=0.25, order_effect=1.0)
config = recsim_gr.WorldConfig(n_titles=20, history_length=4, seed=9, **options)
log = recsim_gr.World(config).generate_log(50, expose_propensities=True)
print(hashlib.sha256(b"".join(getattr(log, n).tobytes() for n in ("user", "hours", "title", "score"))).hexdigest())
"""


def digest(log: InteractionLog) -> str:
    return hashlib.sha256(b"".join(getattr(log, n).tobytes() for n in ("user", "hours", "title", "score"))).hexdigest()


def test_another_process_with_other_hashes_draws_the_same_log() -> None:
    config = WorldConfig(n_titles=20, history_length=4, history_median=3, cold_share=0.25, order_effect=1.0, seed=9)
    here = digest(World(config).generate_log(50, expose_propensities=True))
    for hash_seed in ("0", "1"):
        there = subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert there.stdout.strip() == here


@models
def test_global_seeds_change_nothing_and_are_not_disturbed(model: str) -> None:
    def everything() -> list[Any]:
        config = WorldConfig(n_titles=20, history_length=4, noise_model=model, seed=9, **EVERYTHING)
        world = World(config)
        log = world.generate_log(60, expose_propensities=True)
        contexts = world.contexts(30)
        env = gymnasium.make("recsim_gr/WatchTime-v0", world=World(replace(config, order_effect=0.0)))
        _, info = env.reset(seed=4)
        reward = env.step(int(np.argmax(info["action_mask"])))[1]
        found = recsim_gr.estimate(Random(), log, "snips")
        return [digest(log), contexts.next_titles.tolist(), info["user"], reward, found.value, world.reliability(40)]

    def states() -> tuple[str, str, bytes]:
        return str(random.getstate()), str(np.random.get_state()), torch.get_rng_state().numpy().tobytes()  # noqa: NPY002

    before = states()
    first = everything()
    assert states() == before
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - whatever a user seeds, the data are the same
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        assert everything() == first


# --------------------------------------------------------------------------------------------- ids that are cut
# RecoGym: user ids cut to 16 bits, so that user 65,536 is user 0 again.


@PROPERTY
@given(st.integers(0, 2**15), st.sampled_from([8, 15, 16, 24, 31, 32, 33, 40, 53]))
def test_users_whose_ids_end_in_the_same_bits_are_different_people(user: int, bits: int) -> None:
    world = World(WorldConfig(n_titles=12, history_length=3, seed=2, noise_model="drift", **EVERYTHING))
    one, other = np.array([user]), np.array([user + 2**bits])
    for of in (world.satisfaction, world.pull, world.hours, world.moods, world.utilities):
        assert not np.array_equal(of(one), of(other))
    both = np.array([user + 2**bits, user, user + 2**bits])
    np.testing.assert_array_equal(world.satisfaction(both), world.satisfaction(np.array([*other, *one, *other])))
    a, b = world.draw_events(one, 3), world.draw_events(other, 3)
    assert not np.array_equal(a.outcome.score, b.outcome.score)
    together = world.draw_events(both, 3)
    np.testing.assert_array_equal(together.outcome.score[1], a.outcome.score[0])
    np.testing.assert_array_equal(together.outcome.score[2], b.outcome.score[0])


def test_large_user_ids_survive_log_disk_estimates_and_environments(tmp_path: Path) -> None:
    world = World(WorldConfig(n_titles=12, history_length=3, pull_strength=0.5))
    log = world.generate_log(40, "judge", expose_propensities=True)
    assert log.user.min() >= 3 * 10**9  # beyond 31 bits as they are
    ids = np.array([0, 2**16, 2**32, 2**48, 2**62, 2**63 - 1, *range(1, 35)])
    renamed = replace(log, user=np.repeat(ids, 3))
    renamed.write(tmp_path / "log.parquet")
    back = InteractionLog.read(tmp_path / "log.parquet")
    assert back.user.dtype == np.int64
    np.testing.assert_array_equal(back.user, renamed.user)
    assert back.n_users == len(ids)
    # clustered by forty users, whatever they are called
    here, there = (recsim_gr.estimate(Random(), one, "ips") for one in (log, back))
    assert (here.value, here.standard_error) == pytest.approx((there.value, there.standard_error))
    env = gymnasium.make("recsim_gr/WatchTime-v0", world=world, split="judge", pool_users=40)
    users = {env.reset(seed=0 if i == 0 else None)[1]["user"] for i in range(60)}
    assert users <= set(log.user.tolist())
    vector = gymnasium.make_vec("recsim_gr/WatchTime-v0", num_envs=60, world=world, split="judge", pool_users=40)
    assert set(vector.reset(seed=0)[1]["user"].tolist()) <= set(log.user.tolist())


# ----------------------------------------------------------- numbers at the ends, and keys that become infinite

ENDS = (2.0**-54, 1.0 - 2.0**-53)
"""The least and the greatest number that `uniforms` can return."""


def at_the_ends(pattern: int) -> Uniforms:
    """Uniforms that are always one of the two ends: the one, the other, or each at random."""

    def extreme(seed: int, purpose: str, users: Users, per_user: int) -> FloatArray:
        return to_the_ends(uniforms(seed, purpose, users, per_user), pattern)

    return extreme


def to_the_ends(u: FloatArray, pattern: int) -> FloatArray:
    which = {0: np.zeros(u.shape, dtype=bool), 1: np.ones(u.shape, dtype=bool)}.get(pattern, u > 0.5)
    return np.where(which, ENDS[1], ENDS[0])


@models
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("pattern", [0, 1, 2])
def test_numbers_at_the_ends_make_a_finite_and_legal_world(
    model: str, sampler: str, pattern: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EVERYTHING | {"order_effect": 0.0, "sampler": sampler}
    config = WorldConfig(n_titles=20, history_length=4, noise_model=model, **options)
    extreme, beneath = at_the_ends(pattern), bandit._uniforms
    draw_through(monkeypatch, extreme)
    monkeypatch.setattr(bandit, "_uniforms", lambda stream, shape: to_the_ends(beneath(stream, shape), pattern))
    world = World(config)
    log = world.generate_log(30, expose_propensities=True)  # a legal log: finite, in range, propensities in (0, 1]
    contexts = world.contexts(30)
    for part in (world.satisfaction(contexts.users), world.expected_score(contexts.users), log.score, log.hours):
        assert np.isfinite(part).all()
    assert not (contexts.observations.unavailable()[np.arange(30), contexts.next_titles]).any()
    assert math.isfinite(world.alignment(20))
    u = np.full((30, world.uniforms_per_exposure), ENDS[pattern % 2])
    assert np.isfinite(world.sample_scores(contexts.users, contexts.next_titles, u).score).all()
    env = gymnasium.make("recsim_gr/WatchTime-v0", world=world, pool_users=30)
    _, info = env.reset(seed=0)
    assert math.isfinite(float(env.step(int(np.argmax(info["action_mask"])))[1]))


@PROPERTY
@given(st.integers(0, 2**32), st.floats(0.0, 0.9))
def test_torch_at_its_ends_draws_no_title_without_weight(seed: int, barred: float) -> None:
    # torch.rand is a float32 in [0, 1 − 2^-24]: both ends come, the lower one once in 16 million
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(8 * rng.standard_normal((40, 30))).float()
    gone = torch.from_numpy(rng.random((40, 30)) < barred)
    gone[torch.arange(40), torch.from_numpy(rng.integers(0, 30, 40))] = False
    log_probs = torch.log_softmax(logits.masked_fill(gone, -torch.inf), dim=-1)
    for end in (0.0, 1.0 - 2.0**-24):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda *shape, end=end, **_: torch.full(_flat(shape), end))
            drawn = (inverse_cdf(log_probs)[:, None], _draw(log_probs[None], 2, seed)[0])
        for titles in drawn:
            assert torch.isfinite(log_probs.gather(1, titles)).all()


def _flat(shape: tuple[Any, ...]) -> tuple[int, ...]:
    """``rand(3, 4)`` and ``rand((3, 4))`` are the same."""
    return tuple(shape[0]) if isinstance(shape[0], tuple) else shape


def test_weights_are_finite_or_refused() -> None:
    tiny = np.nextafter(0.0, 1.0)  # the least number above 0
    assert np.isfinite(importance_weights(np.array([-300.0]), np.array([tiny]))).all()
    with pytest.raises(EstimationError, match="weights must be finite, got inf at event 0"):
        importance_weights(np.array([0.0]), np.array([tiny]))
    with pytest.raises(EstimationError, match=r"propensities must be in \(0, 1\], got 0.0"):
        importance_weights(np.array([0.0]), np.array([0.0]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_samplers_choose_with_the_frequencies_of_their_propensities(sampler: str) -> None:
    # One user's utilities for everybody, so that every user repeats one experiment: first choices, then pairs.
    class OneMind(World):
        fixed = np.array([2.0, -1.0, 0.3, 0.9, -0.4, 0.0])

        def utility_rows(self, users: Users) -> Rows:
            def fill(part: slice, out: FloatArray, scratch: FloatArray) -> None:
                out[...] = self.fixed

            return fill

    n = 300_000
    world = OneMind(WorldConfig(n_titles=6, history_length=2, taste_dimensions=1, sampler=sampler))
    log = world.generate_log(n, expose_propensities=True, chunk_users=50_000)
    titles, p = log.title.reshape(n, 2), np.exp(OneMind.fixed) / np.exp(OneMind.fixed).sum()
    assert stats.chisquare(np.bincount(titles[:, 0], minlength=6), n * p).pvalue > 1e-3
    pairs = np.array([0.0 if a == b else p[a] * p[b] / (1 - p[a]) for a in range(6) for b in range(6)])
    counts = np.bincount(titles[:, 0] * 6 + titles[:, 1], minlength=36)
    assert counts[pairs == 0].sum() == 0
    assert stats.chisquare(counts[pairs > 0], n * pairs[pairs > 0]).pvalue > 1e-3
    np.testing.assert_allclose(
        log.require_propensities().reshape(n, 2).prod(axis=1),
        pairs[titles[:, 0] * 6 + titles[:, 1]],
        rtol=1e-6 if sampler == "inverse_cdf" else 1e-9,
    )
