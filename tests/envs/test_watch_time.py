"""WatchTime-v0 against the world it stands for."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest

from recsim_gr.errors import ConfigError
from recsim_gr.world import World, WorldConfig

Make = Callable[..., Any]

WATCH_TIME = "recsim_gr/WatchTime-v0"


def exposures(envs: Any, steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """(users, titles, rewards, infos) of forced exposures to random titles."""
    rng = np.random.default_rng(seed)
    _, infos = envs.reset(seed=seed)
    parts: list[tuple[Any, ...]] = []
    for _ in range(steps):
        titles = rng.integers(envs.bandit.n_titles, size=envs.num_envs)
        users = infos["user"]
        _, rewards, _, _, infos = envs.step(titles)
        parts.append((users, titles, rewards, infos["final_info"]))
    users, titles, rewards, finals = zip(*parts, strict=True)
    final = {key: np.concatenate([f[key] for f in finals]) for key in finals[0]}
    return np.concatenate(users), np.concatenate(titles), np.concatenate(rewards), final


def test_contexts_are_the_worlds(make: Make) -> None:
    env = make(WATCH_TIME, world_seed=3)
    world = World(WorldConfig(n_titles=40, history_length=6, seed=3))
    for i in range(5):
        observation, info = env.reset(seed=0 if i == 0 else None)
        contexts = world.contexts_of(np.array([info["user"]])).observations
        for key in observation:
            np.testing.assert_array_equal(observation[key], getattr(contexts, key)[0])


@pytest.mark.parametrize("split", ["train", "test"])
def test_users_are_those_of_the_split(make_vec: Make, split: str) -> None:
    envs = make_vec(WATCH_TIME, 400, split=split, pool_users=50)
    observations, infos = envs.reset(seed=0)
    world = envs.bandit.world
    assert set(infos["user"]) == set(world.users(split, 50))
    assert (observations["epoch"] == world.config.n_epochs - 1).all() == (split == "test")


@pytest.mark.parametrize("model", ["watch_time", "gaussian"])
def test_rewards_average_to_the_expected_score(make_vec: Make, model: str) -> None:
    envs = make_vec(WATCH_TIME, 2_000, noise_model=model, reward_noise=0.5, pool_users=50)
    users, titles, rewards, final = exposures(envs, 50)
    world = envs.bandit.world
    legal = ~final["invalid"]
    table = world.expected_score(world.users("train", 50))
    error = (rewards - table[users - world.users("train", 1)[0], titles])[legal]
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(legal.sum())
    for half in (titles[legal] % 2 == 0, titles[legal] % 2 == 1):
        assert abs(error[half].mean()) < 4 * error[half].std() / np.sqrt(half.sum())


def test_info_is_the_worlds_truth(make_vec: Make) -> None:
    envs = make_vec(WATCH_TIME, 500, regret=True)
    users, titles, rewards, final = exposures(envs, 2)
    world, legal, rows = envs.bandit.world, ~final["invalid"], np.arange(1_000)
    truth = world.satisfaction(users)
    np.testing.assert_allclose(final["satisfaction"][legal], truth[rows, titles][legal], atol=1e-6)
    log_probs = world.logging_log_probs(users, world.contexts_of(users).observations.titles)
    np.testing.assert_allclose(final["propensity"], np.exp(log_probs[rows, titles]), rtol=1e-9)
    best = np.where(np.isfinite(log_probs), truth, -np.inf).max(axis=1)
    np.testing.assert_array_equal(final["best_satisfaction"], best)
    np.testing.assert_array_equal(final["duration_minutes"], world.durations[titles])
    watched = final["watch_minutes"] / final["duration_minutes"]
    np.testing.assert_allclose(rewards, 1 + 4 * watched, atol=1e-9)
    assert 0.4 < final["exogenous"][legal].mean() < 0.6


def test_propensities_of_all_titles_sum_to_one(make: Make) -> None:
    env, total = make(WATCH_TIME), 0.0
    for title in range(40):
        env.reset(seed=9)
        total += env.step(title)[4]["propensity"]
    assert total == pytest.approx(1.0, abs=1e-12)


def test_noise_is_independent_of_user_and_action(make_vec: Make) -> None:
    envs = make_vec(WATCH_TIME, 4_000, pool_users=64, reward_noise=0.5)
    users, titles, _, final = exposures(envs, 25)
    legal = ~final["invalid"]
    noise = final["exogenous"][legal].astype(float)
    bound = 4 / np.sqrt(legal.sum())
    for other in (users, titles, np.roll(final["exogenous"], 1)):
        assert abs(np.corrcoef(noise, other[legal])[0, 1]) < bound
    for user in np.unique(users)[:8]:
        assert abs(np.corrcoef(noise[users[legal] == user], titles[legal & (users == user)])[0, 1]) < 0.12


def test_dials_share_users_and_nest_their_noise(make_vec: Make) -> None:
    low, high = (exposures(make_vec(WATCH_TIME, 300, reward_noise=dial), 3, seed=8) for dial in (0.2, 0.6))
    np.testing.assert_array_equal(low[0], high[0])
    assert not (low[3]["exogenous"] & ~high[3]["exogenous"]).any()
    both_ordinary = ~high[3]["exogenous"]
    np.testing.assert_array_equal(low[2][both_ordinary], high[2][both_ordinary])


def test_a_repeated_context_gets_fresh_noise(make: Make) -> None:
    env = make(WATCH_TIME, pool_users=1, reward_noise=1.0)
    rewards = []
    for i in range(20):
        _, info = env.reset(seed=0 if i == 0 else None)
        rewards.append(env.step(int(np.argmax(info["action_mask"])))[1])
    assert len(set(rewards)) > 5


def test_an_observation_holds_the_history_and_nothing_else(make: Make) -> None:
    """Worlds that differ in hidden free time alone show the same where no session is exogenous."""
    observations = [
        make(WATCH_TIME, reward_noise=0.0, free_time_median_minutes=minutes).reset(seed=1)[0]
        for minutes in (5.0, 500.0)
    ]
    assert set(observations[0]) == {"titles", "scores", "times", "length", "epoch"}
    for key in observations[0]:
        np.testing.assert_array_equal(observations[0][key], observations[1][key])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"split": "holdout"}, "no split 'holdout'"),
        ({"pool_users": 0}, "pool_users must be an integer of at least 1, got 0"),
        ({"pool_users": 7.5}, "pool_users must be an integer of at least 1, got 7.5"),
        ({"n_titles": 40.0}, "n_titles must be an integer"),
        ({"reward_noise": 1.5}, "reward_noise must be between 0 and 1"),
        ({"history_length": 40}, "smaller than the catalogue"),
        ({"world_seed": -1}, "seed must be 0 or more"),
    ],
)
def test_bad_values_are_named(make: Make, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(WATCH_TIME, **wrong)


def test_seed_is_told_apart_from_world_seed(make: Make) -> None:
    with pytest.raises(TypeError, match="the seed of the world is world_seed"):
        make(WATCH_TIME, seed=3)


# "-v0 means bytes": where this turns red, either the change is a mistake, or it needs WatchTime-v1.
FROZEN = "16e028ce7c655d134b10866d96d46b0ae9e2bb105e8e58a9167f68585fcf9cec"


def test_the_frozen_world_has_not_changed(checksum: Callable[..., str]) -> None:
    assert checksum(gymnasium.make(WATCH_TIME).unwrapped) == FROZEN
