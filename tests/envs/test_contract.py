"""One contract, run over every registered environment."""

import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3
from stable_baselines3.common.env_util import make_vec_env

from recsim_gr._registration import ENVIRONMENTS, register_environments
from recsim_gr.envs import ReplayEnv, ReplayVectorEnv, RewardModelVectorEnv, WatchTimeEnv, WatchTimeVectorEnv
from recsim_gr.errors import ConfigError

Make = Callable[..., Any]

INFO_OF_WORLDS = {
    "satisfaction": float,
    "best_satisfaction": float,
    "regret": float,
    "propensity": float,
    "watch_minutes": float,
    "duration_minutes": float,
    "exogenous": bool,
    "invalid": bool,
}


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    else:
        np.testing.assert_array_equal(one, other)


def test_every_registered_environment_is_tested(arguments: dict[str, Any]) -> None:
    assert set(ENVIRONMENTS) == set(arguments) == {name for name in gymnasium.registry if "recsim_gr" in name}


def test_registering_twice_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_environments()


def test_gymnasium_checker_passes_without_a_warning(env_id: str, make: Make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(env_id))


def test_sb3_checker_passes_without_a_warning(env_id: str, make: Make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env_for_sb3(make(env_id))


def test_unbounded_scores_pass_both_checkers(make: Make) -> None:
    env = make("recsim_gr/WatchTime-v0", noise_model="gaussian", reward_noise=1.0)
    with pytest.warns(UserWarning, match="infinity"):
        check_env(env)
    check_env_for_sb3(env)


def test_reset_and_step_give_what_the_data_sheet_says(env_id: str, make: Make) -> None:
    env = make(env_id)
    observation, info = env.reset(seed=3)
    length, n_titles = observation["titles"].shape[0], int(env.action_space.n)
    kinds = {key: (value.shape, value.dtype) for key, value in observation.items()}
    assert kinds == {
        "titles": ((length,), np.dtype(np.int64)),
        "scores": ((length,), np.dtype(np.float32)),
        "times": ((length,), np.dtype(np.float32)),
        "length": ((), np.dtype(np.int64)),
        "epoch": ((), np.dtype(np.int64)),
    }
    assert set(info) == {"action_mask", "user"}
    assert info["action_mask"].dtype == np.int8
    assert info["action_mask"].shape == (n_titles,)
    assert type(info["user"]) is int
    past = np.arange(length) < observation["length"]
    assert (observation["titles"][~past] == n_titles).all()
    assert (observation["scores"][~past] == 0).all()
    assert set(np.flatnonzero(info["action_mask"] == 0)) == set(observation["titles"][past].tolist())
    after, reward, terminated, truncated, info = env.step(int(np.flatnonzero(info["action_mask"])[0]))
    assert_same(after, observation)
    assert (type(reward), terminated, truncated) == (float, True, False)
    expected = {"invalid": bool} if "RewardModel" in env_id else INFO_OF_WORLDS
    assert {key: type(value) for key, value in info.items()} == expected


def test_equal_seeds_equal_episodes(env_id: str, make: Make) -> None:
    runs = []
    for _ in range(2):
        env = make(env_id)
        episodes = []
        for episode in range(6):
            episodes.append(env.reset(seed=11 if episode == 0 else None))
            episodes.append(env.step(episode))
        runs.append(episodes)
    for one, other in zip(*runs, strict=True):
        for part, twin in zip(one, other, strict=True):
            assert_same(part, twin)


def test_without_a_seed_episodes_differ(env_id: str, make: Make) -> None:
    users = [make(env_id).reset()[1]["user"] for _ in range(6)]
    assert len(set(users)) > 1


def test_no_global_random_state_is_touched(env_id: str, make: Make) -> None:
    env = make(env_id)
    before = np.random.get_state(legacy=False)["state"]["key"].copy()  # noqa: NPY002 (what is tested)
    env.reset(seed=0)
    env.step(1)
    after = np.random.get_state(legacy=False)["state"]["key"]  # noqa: NPY002
    np.testing.assert_array_equal(before, after)


def test_observations_are_the_callers_own(env_id: str, make: Make) -> None:
    env = make(env_id)
    observation, info = env.reset(seed=0)
    kept = {key: value.copy() for key, value in observation.items()}
    for key in ("titles", "scores", "times"):
        observation[key][:] = -1
    info["action_mask"][:] = -1
    assert_same(env.step(0)[0], kept)
    assert_same(env.reset(seed=0)[0], kept)


def test_a_seen_title_is_legal_and_worth_nothing(env_id: str, make: Make) -> None:
    env = make(env_id)
    observation, _ = env.reset(seed=0)
    while observation["length"] == 0:
        observation, _ = env.reset()
    _, reward, terminated, _, info = env.step(observation["titles"][0])
    assert (reward, terminated, info["invalid"]) == (1.0, True, True)
    if "RewardModel" not in env_id:
        assert (info["satisfaction"], info["propensity"], info["watch_minutes"]) == (1.0, 0.0, 0.0)
        assert info["regret"] == info["best_satisfaction"] - 1.0
        assert not info["exogenous"]


@pytest.mark.parametrize("action", [-1, 10**6, 1.5, "3", None, np.array([1, 2])])
def test_what_is_no_title_is_refused(env_id: str, make: Make, action: Any) -> None:
    env = make(env_id)
    env.reset(seed=0)
    with pytest.raises(InvalidAction, match="an integer in 0 to"):
        env.step(action)


def test_a_step_needs_a_reset(env_id: str, make: Make) -> None:
    env = make(env_id)
    for method in (lambda: env.step(0), env.action_masks):
        with pytest.raises(ResetNeeded, match=r"call reset\(\) before"):
            method()
    env.reset(seed=0)
    env.step(0)
    with pytest.raises(ResetNeeded):
        env.step(0)


def test_action_masks_say_what_the_info_says(env_id: str, make: Make) -> None:
    env = make(env_id)
    _, info = env.reset(seed=0)
    masks = env.action_masks()
    assert masks.dtype == bool
    np.testing.assert_array_equal(masks, info["action_mask"] == 1)
    assert env.action_space.sample(info["action_mask"]) in np.flatnonzero(masks)


def test_every_context_comes(env_id: str, make: Make) -> None:
    env = make(env_id)
    users = {env.reset(seed=0 if i == 0 else None)[1]["user"] for i in range(400)}
    assert len(users) > 80


@pytest.mark.parametrize("keyword", ["horizons", "seed", "n_title"])
def test_an_unknown_keyword_is_refused(env_id: str, make: Make, keyword: str) -> None:
    with pytest.raises(TypeError, match=keyword):
        make(env_id, **{keyword: 3})


@pytest.mark.filterwarnings("ignore:.*render_mode:UserWarning")  # make_vec_env asks for one, then does without
def test_sb3_learns_from_it(env_id: str, arguments: dict[str, Any]) -> None:
    envs = make_vec_env(env_id, n_envs=2, seed=0, env_kwargs=arguments[env_id])
    learner = PPO("MultiInputPolicy", envs, n_steps=8, batch_size=16, n_epochs=1, seed=0, device="cpu")
    learner.learn(16)
    assert learner.num_timesteps == 16


def test_a_fresh_interpreter_finds_them_by_module_name() -> None:
    code = "import gymnasium; print(gymnasium.make('recsim_gr:recsim_gr/WatchTime-v0', pool_users=2).spec.id)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "recsim_gr/WatchTime-v0\n", done.stderr


@pytest.mark.parametrize(
    "example", [WatchTimeEnv, WatchTimeVectorEnv, ReplayEnv, ReplayVectorEnv, RewardModelVectorEnv]
)
def test_the_examples_run(example: type, ratings_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (example.__doc__ or "").split("Example::\n\n")[1].split("\n\n")[0]
    exec(textwrap.dedent(lines).replace('"ratings.npz"', repr(str(ratings_file))), {})
    assert capsys.readouterr().out


def test_a_world_and_its_fields_exclude_each_other(make: Make) -> None:
    world = make("recsim_gr/WatchTime-v0").bandit.world
    env = gymnasium.make("recsim_gr/WatchTime-v0", world=world, pool_users=5)
    assert env.unwrapped.bandit.world is world  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="n_titles"):
        make("recsim_gr/WatchTime-v0", world=world)
