"""Replay-v0 against the matrix it replays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from recsim_gr.errors import ConfigError, DataFileError

Make = Callable[..., Any]

REPLAY = "recsim_gr/Replay-v0"


def test_counterfactuals_are_the_matrix(make: Make, ratings_file: Path) -> None:
    ratings = np.load(ratings_file)["ratings"]
    env = make(REPLAY)
    for episode in range(60):
        _, info = env.reset(seed=0 if episode == 0 else None)
        title = int(np.flatnonzero(info["action_mask"])[episode % 20])
        final = env.step(title)[4]
        assert final["satisfaction"] == pytest.approx(1 + 4 * ratings[info["user"], title] / 10, abs=1e-6)
        best = 1 + 4 * ratings[info["user"], info["action_mask"] == 1].max() / 10
        assert final["best_satisfaction"] == pytest.approx(best, abs=1e-6)


def test_durations_are_the_datas(make: Make, ratings_file: Path) -> None:
    env = make(REPLAY)
    env.reset(seed=0)
    assert env.step(7)[4]["duration_minutes"] == np.load(ratings_file)["duration_minutes"][7]


def test_propensities_are_the_worlds(make_vec: Make) -> None:
    envs = make_vec(REPLAY, 200)
    _, infos = envs.reset(seed=0)
    users, titles = infos["user"], np.arange(200) % 30
    final = envs.step(titles)[4]["final_info"]
    world = envs.bandit.world
    log_probs = world.logging_log_probs(users, world.contexts_of(users).observations.titles)
    # the pull of a pair is the table's, up to the order of float32 products
    np.testing.assert_allclose(final["propensity"], np.exp(log_probs[np.arange(200), titles]), rtol=1e-9)


def test_rewards_average_to_the_expected_score(make_vec: Make) -> None:
    envs = make_vec(REPLAY, 1_000, pool_users=20, reward_noise=0.4)
    world, rng = envs.bandit.world, np.random.default_rng(0)
    _, infos = envs.reset(seed=0)
    errors = []
    for _ in range(20):
        users, titles = infos["user"], rng.integers(30, size=1_000)
        _, rewards, _, _, infos = envs.step(titles)
        expected = world.expected_score(users)[np.arange(1_000), titles]
        errors.append((rewards - expected)[~infos["final_info"]["invalid"]])
    error = np.concatenate(errors)
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(len(error))


def test_by_default_all_users_of_the_split_come(make_vec: Make) -> None:
    envs = make_vec(REPLAY, 2_000, split="judge")
    _, infos = envs.reset(seed=0)
    world = envs.bandit.world
    assert set(infos["user"]) == set(world.users("judge", world.n_users("judge")))


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"pool_users": 10_000}, ConfigError, "has 112 there"),
        ({"data": None}, ConfigError, "data is missing"),
        ({"data": "nowhere.npz"}, DataFileError, "nowhere.npz is missing"),
        ({"history_length": 30}, ConfigError, "smaller than the catalogue"),
        ({"path": "x"}, TypeError, "the path of the data is data"),
    ],
)
def test_bad_values_are_named(make: Make, wrong: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make(REPLAY, **wrong)


def test_a_world_may_be_given(make: Make, ratings_file: Path) -> None:
    world = make(REPLAY).bandit.world
    assert gymnasium.make(REPLAY, world=world).unwrapped.bandit.world is world  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="either a world, or data"):
        make(REPLAY, world=world)


# "-v0 means bytes": where this turns red, either the change is a mistake, or it needs Replay-v1.
FROZEN = "ba3c199009ac9af4bff0b16cc494ddfcdcc5123714258c57c44310e53a961b3d"


def test_the_frozen_world_has_not_changed(tmp_path: Path, checksum: Callable[..., str]) -> None:
    users, titles = np.ogrid[:90, :31]
    np.savez(tmp_path / "frozen.npz", ratings=(users * 7 + titles * 13 + users * titles) % 11)
    env = gymnasium.make(REPLAY, data=tmp_path / "frozen.npz", history_length=6).unwrapped
    assert checksum(env) == FROZEN
