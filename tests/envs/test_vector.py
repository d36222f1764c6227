"""The native vector environments: Gymnasium's conventions, and the single environment's episodes."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics

from recsim_gr.envs import BanditVectorEnv
from recsim_gr.errors import ConfigError

Make = Callable[..., Any]

EVERYTHING = {"action_mask": True, "regret": True, "final_obs": True}
FOR_REWARD_MODELS = {"action_mask": True, "final_obs": True}


def everything(env_id: str) -> dict[str, bool]:
    return FOR_REWARD_MODELS if "RewardModel" in env_id else EVERYTHING


def kinds(value: Any) -> Any:
    """The structure of an info: keys, shapes, types."""
    if isinstance(value, dict):
        return {key: kinds(part) for key, part in value.items()}
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [kinds(part) for part in value]
    if isinstance(value, tuple):
        return [kinds(part) for part in value]
    return (np.shape(value), np.asarray(value).dtype)


def test_it_is_native_and_resets_in_the_same_step(env_id: str, make_vec: Make) -> None:
    envs = make_vec(env_id, 5)
    assert isinstance(envs, BanditVectorEnv)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    observations, _ = envs.reset(seed=0)
    assert observations in envs.observation_space
    for _ in range(3):
        observations, rewards, ended, truncated, infos = envs.step(envs.action_space.sample())
        assert observations in envs.observation_space
        assert kinds(rewards) == ((5,), np.dtype(np.float64))
        assert ended.all()
        assert not truncated.any()
        assert infos["_final_info"].all()


def test_infos_have_the_structure_of_gymnasiums_own(
    env_id: str, make_vec: Make, arguments: dict[str, dict[str, Any]]
) -> None:
    native = make_vec(env_id, 3, **everything(env_id))
    sync = gymnasium.make_vec(
        env_id,
        num_envs=3,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        **arguments[env_id],
    )
    assert native.single_observation_space == sync.single_observation_space
    assert native.observation_space == sync.observation_space
    assert native.action_space == sync.action_space
    assert kinds(native.reset(seed=0)) == kinds(sync.reset(seed=0))
    actions = np.array([0, 1, 2])
    assert kinds(native.step(actions)) == kinds(sync.step(actions))


@pytest.mark.parametrize("num_envs", [1, 3, 300])
def test_it_plays_the_single_environments_episodes(env_id: str, make: Make, make_vec: Make, num_envs: int) -> None:
    env, envs = make(env_id), make_vec(env_id, num_envs, **everything(env_id))
    observations, infos = envs.reset(seed=4)
    for step in range(3):
        actions = (np.arange(num_envs) * 7 + step) % env.bandit.n_titles
        following = envs.step(actions)
        for i in range(num_envs):
            observation, info = env.reset(seed=4 if step == i == 0 else None)
            for key, value in observation.items():
                np.testing.assert_array_equal(observations[key][i], value)
            np.testing.assert_array_equal(infos["action_mask"][i], info["action_mask"])
            assert infos["user"][i] == info["user"]
            final, reward, _, _, final_info = env.step(actions[i])
            assert following[1][i] == reward
            assert {key: following[4]["final_info"][key][i] for key in final_info} == final_info
            np.testing.assert_array_equal(following[4]["final_obs"][i]["titles"], final["titles"])
        observations, infos = following[0], following[4]


def test_what_costs_is_there_on_request_only(make_vec: Make) -> None:
    envs = make_vec("recsim_gr/WatchTime-v0", 4)
    _, infos = envs.reset(seed=0)
    assert set(infos) == {"user", "_user"}
    infos = envs.step(np.arange(4))[4]
    assert set(infos) == {"user", "_user", "final_info", "_final_info"}
    assert not {"regret", "best_satisfaction"} & set(infos["final_info"])
    envs = make_vec("recsim_gr/WatchTime-v0", 4, regret=True)
    envs.reset(seed=0)
    final = envs.step(np.arange(4))[4]["final_info"]
    np.testing.assert_allclose(final["regret"], final["best_satisfaction"] - final["satisfaction"])
    assert (final["regret"] >= 0).all()


def test_nothing_kept_grows_with_environments_times_titles(make_vec: Make) -> None:
    envs = make_vec("recsim_gr/WatchTime-v0", 64, n_titles=2_000, history_length=5, pool_users=64)
    envs.reset(seed=0)
    envs.step(np.zeros(64, dtype=np.int64))
    kept = [*vars(envs.bandit.population).values(), *vars(envs.bandit.population.pairs).values()]
    sizes = [part.size for part in kept if isinstance(part, np.ndarray)]
    assert len(sizes) > 8
    assert max(sizes) < 64 * 20


def test_observations_are_the_callers_own(env_id: str, make_vec: Make) -> None:
    envs, untouched = make_vec(env_id, 3), make_vec(env_id, 3)
    observations, _ = envs.reset(seed=0)
    untouched.reset(seed=0)
    for _ in range(3):
        for value in observations.values():
            value[:] = 0
        observations, rewards, _, _, _ = envs.step(np.arange(3))
        expected, expected_rewards, _, _, _ = untouched.step(np.arange(3))
        np.testing.assert_array_equal(observations["titles"], expected["titles"])
        np.testing.assert_array_equal(rewards, expected_rewards)


def test_action_masks(env_id: str, make_vec: Make) -> None:
    envs = make_vec(env_id, 3, action_mask=True)
    _, infos = envs.reset(seed=0)
    np.testing.assert_array_equal(envs.action_masks(), infos["action_mask"] == 1)
    _, _, _, _, infos = envs.step(np.arange(3))
    np.testing.assert_array_equal(envs.action_masks(), infos["action_mask"] == 1)


@pytest.mark.parametrize(
    "actions", [[0, 1], [0, 1, -1], [0, 1, 10**6], [0.0, 1.0, 2.0], ["a", "b", "c"], [[0, 1, 2]], 5]
)
def test_what_are_no_titles_is_refused(env_id: str, make_vec: Make, actions: Any) -> None:
    envs = make_vec(env_id, 3)
    envs.reset(seed=0)
    with pytest.raises(InvalidAction, match="integers in 0 to"):
        envs.step(actions)


def test_a_step_needs_a_reset(env_id: str, make_vec: Make) -> None:
    envs = make_vec(env_id, 3)
    with pytest.raises(ResetNeeded, match=r"before step\(\)"):
        envs.step([0, 1, 2])


def test_there_is_at_least_one(make_vec: Make) -> None:
    with pytest.raises(ConfigError, match="num_envs must be an integer of at least 1, got 0"):
        make_vec("recsim_gr/WatchTime-v0", 0)


def test_gymnasiums_wrappers_take_it(make_vec: Make) -> None:
    envs = RecordEpisodeStatistics(make_vec("recsim_gr/WatchTime-v0", 3, final_obs=True))
    envs.reset(seed=0)
    _, rewards, _, _, infos = envs.step(np.arange(3))
    np.testing.assert_allclose(infos["episode"]["r"], rewards)
    listed = DictInfoToList(make_vec("recsim_gr/WatchTime-v0", 3, regret=True, final_obs=True))
    listed.reset(seed=0)
    of_each: Any = listed.step(np.arange(3))[4]
    assert [set(info) for info in of_each] == [{"user", "final_info", "final_obs"}] * 3
    assert "regret" in of_each[2]["final_info"]
