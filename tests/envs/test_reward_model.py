"""RewardModel-v0 against the log and the reward model it is made of."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from numpy.typing import NDArray

from recsim_gr.envs.reward_model import tiny_reward_model
from recsim_gr.errors import ConfigError
from recsim_gr.log import InteractionLog
from recsim_gr.observations import Observations
from recsim_gr.world import World, WorldConfig

Make = Callable[..., Any]

REWARD_MODEL = "recsim_gr/RewardModel-v0"


class Arithmetic:
    """A reward model whose answers can be read: 100·row + 10·step + title/10."""

    n_titles = 12

    def on(self, log: InteractionLog) -> "Arithmetic":
        return self

    def at(self, rows: NDArray[np.int64], steps: NDArray[np.int64], titles: NDArray[np.int64]) -> NDArray[np.float32]:
        return (100 * rows + 10 * steps + titles / 10).astype(np.float32)


@pytest.fixture(scope="module")
def log() -> InteractionLog:
    return World(WorldConfig(n_titles=12, history_length=4)).generate_log(7)


def test_contexts_are_prefixes_and_rewards_the_models(log: InteractionLog) -> None:
    env: Any = gymnasium.make(REWARD_MODEL, rewards=Arithmetic(), log=log).unwrapped
    whole = log.sequences()
    came = set()
    for episode in range(300):
        observation, info = env.reset(seed=0 if episode == 0 else None)
        row = int(np.flatnonzero(log.user[log.step == 0] == info["user"])[0])
        step = int(observation["length"])
        came.add((row, step))
        np.testing.assert_array_equal(observation["titles"][:step], whole.titles[row, :step])
        np.testing.assert_array_equal(observation["scores"][:step], whole.scores[row, :step])
        np.testing.assert_array_equal(observation["times"][:step], whole.times[row, :step])
        assert (observation["titles"][step:] == 12).all()
        assert not observation["scores"][step:].any()
        assert observation["epoch"] == whole.epoch[row]
        title = int(np.argmax(info["action_mask"]))
        assert env.step(title)[1] == pytest.approx(100 * row + 10 * step + title / 10)
    assert came == {(row, step) for row in range(7) for step in range(4)}


def test_titles_that_are_not_out_are_masked_and_worth_nothing() -> None:
    late = World(WorldConfig(n_titles=12, history_length=4, cold_share=0.5)).generate_log(40)
    env: Any = gymnasium.make(REWARD_MODEL, rewards=Arithmetic(), log=late).unwrapped
    envs: Any = gymnasium.make_vec(REWARD_MODEL, num_envs=100, rewards=Arithmetic(), log=late, action_mask=True)
    observations, infos = envs.reset(seed=0)
    expected = Observations(**observations, n_titles=12, catalogue=late.catalogue).unavailable()
    np.testing.assert_array_equal(infos["action_mask"] == 0, expected)
    titles = np.arange(100) % 12
    _, rewards, _, _, infos = envs.step(titles)
    invalid = expected[np.arange(100), titles]
    assert not (expected == expected[0]).all()
    np.testing.assert_array_equal(infos["final_info"]["invalid"], invalid)
    assert (rewards[invalid] == 1.0).all()
    for i in range(100):
        np.testing.assert_array_equal(env.reset(seed=0 if i == 0 else None)[1]["action_mask"] == 0, expected[i])


def test_contexts_are_uniform(log: InteractionLog) -> None:
    envs = gymnasium.make_vec(REWARD_MODEL, num_envs=28_000, rewards=Arithmetic(), log=log)
    observations, infos = envs.reset(seed=0)
    for value in (observations["length"], infos["user"] - log.user[0]):
        counts = np.bincount(value)
        share = 1 / len(counts)
        assert np.abs(counts - 28_000 * share).max() < 4 * np.sqrt(28_000 * share * (1 - share))


def test_the_tiny_one_pays_its_ensembles_mean(make_vec: Make) -> None:
    rewards, log = tiny_reward_model()
    envs = make_vec(REWARD_MODEL, 64, action_mask=True)
    observations, infos = envs.reset(seed=0)
    titles = infos["action_mask"].argmax(axis=1)
    contexts = Observations(**observations, n_titles=log.n_titles)
    predicted = rewards.mean(contexts)[np.arange(64), titles]  # type: ignore[attr-defined]
    np.testing.assert_allclose(envs.step(titles)[1], predicted, atol=1e-4)


def test_the_truth_is_not_in_it(make: Make) -> None:
    env = make(REWARD_MODEL)
    env.reset(seed=0)
    assert set(env.step(0)[4]) == {"invalid"}


def test_it_has_no_sessions(log: InteractionLog) -> None:
    with pytest.raises(TypeError, match="horizon"):
        gymnasium.make(REWARD_MODEL, rewards=Arithmetic(), log=log, horizon=2)


def test_both_or_neither(log: InteractionLog) -> None:
    with pytest.raises(ConfigError, match="log is missing"):
        gymnasium.make(REWARD_MODEL, rewards=Arithmetic())
    with pytest.raises(ConfigError, match="rewards is missing"):
        gymnasium.make(REWARD_MODEL, log=log)


def test_catalogues_must_agree() -> None:
    other = World(WorldConfig(n_titles=13, history_length=4)).generate_log(2)
    with pytest.raises(ConfigError, match="the log has 13 titles, the reward model 12"):
        gymnasium.make(REWARD_MODEL, rewards=Arithmetic(), log=other)
