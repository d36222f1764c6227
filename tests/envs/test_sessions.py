"""Sessions (horizon above 1), and the world's options, against brute force over the whole catalogue."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

from recsim_gr.envs import WatchTimeEnv, WatchTimeVectorEnv
from recsim_gr.envs.bandit import Episodes
from recsim_gr.errors import ConfigError
from recsim_gr.observations import Observations
from recsim_gr.randomness import uniforms
from recsim_gr.scoring import ROLLOUT_GAP_HOURS

Make = Callable[..., Any]

WATCH_TIME, REPLAY = "recsim_gr/WatchTime-v0", "recsim_gr/Replay-v0"
SESSIONS = (WATCH_TIME, REPLAY)

OPTIONS = st.fixed_dictionaries(
    {
        "n_titles": st.integers(16, 30),
        "history_length": st.integers(1, 5),
        "horizon": st.sampled_from([1, 1, 2, 3, 6]),
        "taste_dimensions": st.sampled_from([1, 3, 8]),
        "noise_model": st.sampled_from(["watch_time", "gaussian", "student_t", "drift", "clickbait"]),
        "pull_strength": st.sampled_from([0.0, 2.0, 40.0, 200.0]),  # at 200 one title has nearly all of the mass
        "accept": st.sampled_from([0.0, 0.0, 0.8]),
        "cold_share": st.sampled_from([0.0, 0.3]),
        "order_effect": st.sampled_from([0.0, 0.0, 1.5]),
        "history_median": st.sampled_from([0, 1]),
        "world_seed": st.integers(0, 5),
        "split": st.sampled_from(["train", "test"]),
    }
)
"""Keywords of small environments, of every option."""


MIDDLE = np.array([[0.5, 0.5, 0.5, 1e-9]])
"""Uniforms of an accepted exposure whose noise is in the middle."""


class Step(NamedTuple):
    """One step of an episode, and what came before it."""

    observation: dict[str, Any]
    mask: np.ndarray
    title: int
    reward: float
    over: bool
    info: dict[str, Any]
    after: dict[str, Any]


def action(episode: int, step: int, n_titles: int) -> int:
    """Some title; now and then one of the step before."""
    return (7 * episode + 5 * (step - step // 3)) % n_titles


def play(env: Any, episodes: int, choose: Callable[..., int]) -> Iterator[list[Step]]:
    """Episodes from seed 4 on; ``choose(episode, step, user, observation, mask)`` names the titles."""
    for episode in range(episodes):
        observation, info = env.reset(seed=4 if episode == 0 else None)
        user, mask = info["user"], info["action_mask"]
        steps: list[Step] = []
        while not steps or not steps[-1].over:
            title = choose(episode, len(steps), user, observation, mask)
            after, reward, over, truncated, info = env.step(title)
            assert not truncated
            steps.append(Step(observation, mask, title, reward, over, info | {"user": user}, after))
            observation, mask = after, info.get("action_mask", mask)
        yield steps


def some(n_titles: int) -> Callable[..., int]:
    """`action`, as `play` asks for it."""
    return lambda episode, step, user, observation, mask: action(episode, step, n_titles)


def likeliest(env: Any) -> Callable[..., int]:
    """What the logging policy would do, most of the time: takes away as much of the mass as can be."""

    def choose(episode: int, step: int, user: int, observation: dict[str, Any], mask: np.ndarray) -> int:
        utilities = env.bandit.world.utilities(np.array([user]))[0]
        return int(np.where(mask == 1, utilities, -np.inf).argmax())

    return choose


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, other[key], err_msg=key)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(OPTIONS)
def test_the_vector_environment_plays_the_single_environments_episodes(options: dict[str, Any]) -> None:
    env = WatchTimeEnv(**options, pool_users=40)
    envs = WatchTimeVectorEnv(3, **options, pool_users=40, action_mask=True, regret=True, final_obs=True)
    n_titles, n_episodes = env.bandit.n_titles, 9
    alone = list(play(env, n_episodes, some(n_titles)))
    observations, infos = envs.reset(seed=4)
    episode, step, following = np.arange(3), np.zeros(3, dtype=int), 3
    while (episode < n_episodes).any():
        actions = np.array([action(e, s, n_titles) for e, s in zip(episode.tolist(), step.tolist(), strict=True)])
        before, masks = observations, infos["action_mask"]
        observations, rewards, over, _, infos = envs.step(actions)
        for lane in range(3):
            if episode[lane] < n_episodes:
                expected = alone[episode[lane]][step[lane]]
                assert_equal({key: value[lane] for key, value in before.items()}, expected.observation)
                np.testing.assert_array_equal(masks[lane], expected.mask)
                assert (rewards[lane], over[lane]) == (expected.reward, expected.over)
                assert infos["_final_info"][lane] == expected.over if over.any() else "final_info" not in infos
                got = infos["final_info"] if over[lane] else infos
                for key, value in expected.info.items():
                    if key not in ("user", "action_mask"):
                        assert got[key][lane] == value, key
                        assert options["horizon"] == 1 or got[f"_{key}"][lane]
                if over[lane]:
                    assert_equal(infos["final_obs"][lane], expected.after)
                if "_user" in infos:
                    assert infos["_user"][lane] == over[lane]
            if over[lane]:
                episode[lane], step[lane], following = following, 0, following + 1
            else:
                step[lane] += 1


@settings(max_examples=80, deadline=None, derandomize=True)
@given(OPTIONS, st.booleans())
def test_every_figure_is_the_worlds(options: dict[str, Any], greedy: bool) -> None:
    env = WatchTimeEnv(**options, pool_users=20)
    assert_figures(env, likeliest(env) if greedy else some(env.bandit.n_titles), options["noise_model"])


@pytest.mark.parametrize("options", [{}, {"accept": 0.8, "cold_share": 0.3}, {"order_effect": 1.5, "split": "test"}])
def test_every_figure_is_the_replayed_worlds(make: Make, options: dict[str, Any]) -> None:
    env = make(REPLAY, horizon=4, pull_strength=20.0, **options)
    for choose in (likeliest(env), some(env.bandit.n_titles)):
        assert_figures(env, choose, "watch_time")


def assert_figures(env: Any, choose: Callable[..., int], noise_model: str) -> None:
    """That observations, masks and infos are what the world says, user by user over the whole catalogue."""
    world, horizon = env.bandit.world, env.bandit.horizon
    for steps in play(env, 5, choose):
        users = np.array([steps[0].info["user"]])
        contexts = world.contexts_of(users)
        now, seen = contexts.next_times, contexts.observations
        truth, worth = world.satisfaction(users)[0], world.worth(users)[0]
        for number, step in enumerate(steps):
            assert step.observation in env.observation_space
            assert_history(step.observation, seen, horizon)
            np.testing.assert_array_equal(step.mask == 0, seen.unavailable()[0])
            log_probs = world.logging_log_probs(users, seen.titles, seen.times, now)[0]
            probability = np.exp(log_probs[step.title])
            assert step.info["propensity"] == pytest.approx(probability, rel=1e-9, abs=1e-300)
            assert step.info["invalid"] == (step.mask[step.title] == 0)
            watched = step.info.get("accepted", not step.info["invalid"])
            assert step.info["satisfaction"] == (pytest.approx(truth[step.title], abs=1e-6) if watched else 1.0)
            assert watched or (step.reward, step.info["watch_minutes"], step.info["exogenous"]) == (1.0, 0.0, False)
            if watched:  # the noise's spread about its mean, given allure and mood, is 0.1 at most
                mean = world.sample_scores(users, np.array([step.title]), MIDDLE).score[0]
                assert noise_model not in ("drift", "clickbait") or step.reward == pytest.approx(mean, abs=0.5)
            best = worth[step.mask == 1].max()
            assert step.info["best_satisfaction"] == best
            assert step.info["regret"] == best - step.info["satisfaction"]
            leaves = "accepted" in step.info and not watched and not step.info["invalid"]
            assert step.over == (number + 1 == horizon or leaves)
            if not step.over and not step.info["invalid"]:
                seen = seen.append(np.array([step.title]), np.array([step.reward], np.float32), ROLLOUT_GAP_HOURS)
                seen.times[0, seen.length - 1] = now  # the first when the user came back, the others at once
                now = now + np.float32(ROLLOUT_GAP_HOURS)
        assert_history(steps[-1].after, seen, horizon)


def assert_history(observation: dict[str, Any], seen: Observations, horizon: int) -> None:
    """That an observation shows a history, with its padding."""
    length = int(seen.length[0])
    assert observation["length"] == length
    assert observation["epoch"] == seen.epoch[0]
    for key, padding in (("titles", seen.n_titles), ("scores", 0.0), ("times", 0.0)):
        np.testing.assert_array_equal(observation[key][:length], getattr(seen, key)[0, :length])
        assert (observation[key][length:] == padding).all()


@pytest.mark.parametrize("env_id", SESSIONS)
@pytest.mark.parametrize("further", [{}, {"accept": 0.9, "cold_share": 0.2, "history_median": 2}])
def test_both_checkers_pass(env_id: str, further: dict[str, Any], make: Make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(env_id, horizon=4, **further))
        check_env_for_sb3(make(env_id, horizon=4, **further))


@pytest.mark.parametrize("env_id", SESSIONS)
def test_a_session_ends_after_its_steps(env_id: str, make: Make) -> None:
    env = make(env_id, horizon=4)
    for steps in play(env, 6, some(env.bandit.n_titles)):
        assert [step.over for step in steps] == [False, False, False, True]
        assert steps[0].observation["titles"].shape == (9,)
        with pytest.raises(ResetNeeded):
            env.step(0)


@pytest.mark.parametrize("env_id", SESSIONS)
@pytest.mark.parametrize("accept", [0.0, 0.9])
def test_infos_have_the_structure_of_gymnasiums_own(
    env_id: str, accept: float, make_vec: Make, arguments: dict[str, dict[str, Any]]
) -> None:
    keywords = arguments[env_id] | {"horizon": 3, "accept": accept}
    native = gymnasium.make_vec(env_id, num_envs=4, action_mask=True, regret=True, final_obs=True, **keywords)
    vector_kwargs = {"autoreset_mode": AutoresetMode.SAME_STEP}
    sync = gymnasium.make_vec(env_id, num_envs=4, vectorization_mode="sync", vector_kwargs=vector_kwargs, **keywords)
    assert native.observation_space == sync.observation_space
    shapes: list[dict[tuple[bool, ...], Any]] = []
    for envs in (native, sync):
        envs.reset(seed=0)
        shapes.append({})
        for step in range(12):
            *_, over, _, infos = envs.step(np.arange(4) + step)
            shapes[-1][tuple(over)] = kinds(infos)
    both = shapes[0].keys() & shapes[1].keys()
    assert {(False,) * 4, (True,) * 4} <= both or (accept > 0 and len(both) > 1)
    for ended in both:
        assert shapes[0][ended] == shapes[1][ended]


def kinds(value: Any) -> Any:
    """The structure of an info: keys, shapes, types, and which environments it is of."""
    if isinstance(value, dict):
        return {key: part.tolist() if key.startswith("_") else kinds(part) for key, part in value.items()}
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [kinds(part) for part in value]
    return None if value is None else (np.shape(value), np.asarray(value).dtype)


def test_rewards_average_to_the_expected_score_also_late_in_a_session(make_vec: Make) -> None:
    envs = make_vec(WATCH_TIME, 2_000, pool_users=30, horizon=3, noise_model="watch_time", reward_noise=0.5)
    errors, n_titles = [[], [], []], envs.bandit.n_titles  # type: ignore[var-annotated]
    world, rng = envs.bandit.world, np.random.default_rng(0)
    _, infos = envs.reset(seed=0)
    users = infos["user"]
    table = world.expected_score(world.users("train", 30))
    for number in range(30):
        if number % 3 == 0:  # a session keeps its user
            users = infos["user"]
        titles = rng.integers(n_titles, size=2_000)
        _, rewards, _, _, infos = envs.step(titles)
        final = infos.get("final_info", infos)
        errors[number % 3].append((rewards - table[users - world.users("train", 1)[0], titles])[~final["invalid"]])
    for of_step in map(np.concatenate, errors):
        assert abs(of_step.mean()) < 4 * of_step.std() / np.sqrt(len(of_step))


@pytest.mark.parametrize("env_id", SESSIONS)
def test_acceptance_is_the_worlds(env_id: str, make_vec: Make) -> None:
    envs = make_vec(env_id, 2_000, pool_users=20, accept=0.9)
    world, rng = envs.bandit.world, np.random.default_rng(0)
    _, infos = envs.reset(seed=0)
    accepted, scores = [], []
    for _ in range(20):
        users, titles = infos["user"], rng.integers(world.n_titles, size=2_000)
        _, rewards, _, _, infos = envs.step(titles)
        final = infos["final_info"]
        legal, rows = ~final["invalid"], np.arange(2_000)
        accepted.append((final["accepted"] - world.acceptance(users)[rows, titles])[legal])
        scores.append((rewards - world.expected_score(users)[rows, titles])[legal])
        assert not final["accepted"][~legal].any()
        assert (rewards[~final["accepted"]] == 1.0).all()
    for error in map(np.concatenate, (accepted, scores)):
        assert abs(error.mean()) < 4 * error.std() / np.sqrt(len(error))


def test_acceptance_moves_nothing_else(make: Make) -> None:
    off, on = make(WATCH_TIME, horizon=1), make(WATCH_TIME, horizon=1, accept=0.5)
    several = 0
    for one, other in zip(play(off, 40, some(40)), play(on, 40, some(40)), strict=True):
        assert_equal(one[0].observation, other[0].observation)
        assert "accepted" not in one[0].info
        if other[0].info["accepted"]:
            several += 1
            assert (one[0].reward, one[0].info["exogenous"]) == (other[0].reward, other[0].info["exogenous"])
    assert several > 10


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"horizon": 0}, "horizon must be an integer of at least 1, got 0"),
        ({"horizon": 2.0}, "horizon must be an integer of at least 1, got 2.0"),
        ({"horizon": 35}, "horizon must be at most 34: 40 titles are out"),
        ({"horizon": 30, "cold_share": 0.2}, "horizon must be at most 26: 32 titles are out"),
    ],
)
def test_bad_horizons_are_named(make: Make, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(WATCH_TIME, **wrong)


def test_the_longest_session_uses_up_the_catalogue(make: Make) -> None:
    env = make(WATCH_TIME, n_titles=12, history_length=4, horizon=8)
    for steps in play(env, 3, lambda episode, step, user, observation, mask: int(mask.argmax())):
        assert len(steps) == 8
        assert steps[-1].mask.sum() == 1
        assert steps[-1].info["propensity"] == pytest.approx(1.0, rel=1e-9)
        assert steps[-1].info["regret"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("sizes", [(7, 1, 504), (512,)])
def test_episodes_are_positioned_in_their_streams(make: Make, sizes: tuple[int, ...]) -> None:
    bandit = make(WATCH_TIME, horizon=3, accept=0.5).bandit
    episodes = Episodes(bandit, seed=6)
    rows, u = (np.concatenate(parts) for parts in zip(*(episodes.take(n) for n in sizes), strict=True))
    halves = np.arange(2)  # stretches of 256 episodes

    def stream(purpose: str, each: int) -> np.ndarray:
        return uniforms(6, f"environment/{purpose}", halves, 256 * each).reshape(512, each)

    np.testing.assert_array_equal(rows, np.floor(stream("context", 1)[:, 0] * bandit.n_contexts))
    np.testing.assert_array_equal(u[..., :3], stream("noise", 9).reshape(512, 3, 3))
    np.testing.assert_array_equal(u[..., 3], stream("accept", 3))


def test_equal_seeds_equal_sessions(make_vec: Make) -> None:
    rewards = []
    for _ in range(2):
        envs = make_vec(WATCH_TIME, 5, horizon=3, accept=0.8)
        envs.reset(seed=7)
        rewards.append(np.stack([envs.step(np.arange(5) * 3 + step)[1] for step in range(9)]))
    np.testing.assert_array_equal(rewards[0], rewards[1])
