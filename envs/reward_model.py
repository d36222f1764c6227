"""``recsim_gr/RewardModel-v0``: contexts of a log, paid by a fitted reward model."""

from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from recsim_gr.backbones import HSTUConfig
from recsim_gr.envs.bandit import (
    Bandit,
    BanditEnv,
    FloatArray,
    Played,
    Rows,
    at,
    observation_space,
    seen_before,
)
from recsim_gr.envs.vector import BanditVectorEnv
from recsim_gr.errors import ConfigError
from recsim_gr.log import InteractionLog
from recsim_gr.observations import LOWEST_SCORE
from recsim_gr.pretraining import pretrain
from recsim_gr.rewards import RewardEnsembleConfig, fit_reward_ensemble
from recsim_gr.training import TrainingConfig
from recsim_gr.world import World, WorldConfig


class Table(Protocol):
    """What is asked of `recsim_gr.rewards.RewardTable`."""

    def at(self, rows: Rows, steps: Rows, titles: Rows) -> NDArray[np.float32]:
        """(n,): the reward of one title after the first ``steps`` events of the users at ``rows`` of the log."""
        ...


class Rewards(Protocol):
    """What is asked of `recsim_gr.rewards.RewardEnsemble`."""

    @property
    def n_titles(self) -> int:
        """I."""
        ...

    def on(self, log: InteractionLog) -> Table:
        """The rewards on every prefix of a log."""
        ...


class RewardModelEnv(BanditEnv):
    """Recommend one title in a context of a log; the reward is what a reward model predicts.

    A contextual bandit: one step an episode. Everything in it follows from the log, so this is where an algorithm may
    train that must not see the truth.

    **Observation**, a dictionary; L is the log's longest history, I its ``n_titles``:

    | key | type | shape | what |
    |---|---|---|---|
    | ``titles`` | int64 | (L,) | the first t titles of a user, in order; 0 to I − 1, padding I |
    | ``scores`` | float32 | (L,) | scores they got, points in [1, 5] (or as the log's), padding 0 |
    | ``times`` | float32 | (L,) | hours since the epoch began, padding 0 |
    | ``length`` | int64 | () | t, 0 to L − 1: how many are real |
    | ``epoch`` | int64 | () | 0 to the log's last epoch |

    **Action**: ``Discrete(I)``, the title. A title among the t seen, or not out yet in the epoch, is legal and worth
    nothing: reward 1, ``invalid`` true.

    **Reward**: float, r̂(x, a): the ensemble's mean prediction of the score, in points. It is not cut to [1, 5].

    **Termination**: always after the one step; never truncated. The observation returned with it is the same context.

    **Info** at reset: ``action_mask``, int8 (I,), 1 for titles that are out and not seen; ``user``, int, the log's. At
    the step: ``invalid``, bool, whether the title had been seen before, or is not out. The truth is not in it, since
    nobody knows it here.

    **Randomness**: ``reset(seed=s)`` starts a stream of contexts: uniform over the events of the log, each standing
    for the history before it. The reward has none.

    Example::

        import gymnasium as gym, recsim_gr
        log = recsim_gr.World().generate_log(n_users=4_000)
        rewards = recsim_gr.fit_reward_ensemble(log, recsim_gr.pretrain(log))
        env = gym.make("recsim_gr/RewardModel-v0", rewards=rewards, log=log)
        obs, info = env.reset(seed=0)
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample(info["action_mask"]))

    Args:
        rewards: a fitted `recsim_gr.RewardEnsemble`. Without it (and without a log) the environment makes a tiny world
            itself, logs it, and fits a small ensemble, see `tiny_reward_model`: for trying things out.
        log: whose contexts come.

    Raises:
        ConfigError: only one of the two, an empty log, or catalogues of different size.

    Versions:
        v0: first version.
    """

    def __init__(self, *, rewards: Rewards | None = None, log: InteractionLog | None = None) -> None:
        super().__init__(reward_model_bandit(rewards, log))


class RewardModelVectorEnv(BanditVectorEnv):
    """`RewardModelEnv`, ``num_envs`` contexts at a time: see there for every key, with n in front of every shape.

    See `BanditVectorEnv` for what its infos hold and for ``action_mask`` and ``final_obs``; regrets are not known
    here.

    Example::

        import gymnasium as gym, recsim_gr
        envs = gym.make_vec("recsim_gr/RewardModel-v0", num_envs=1024, action_mask=True)
        obs, infos = envs.reset(seed=0)
        actions = envs.action_space.sample()
        obs, rewards, terminated, truncated, infos = envs.step(actions)
        print(rewards.mean(), infos["final_info"]["invalid"].mean())

    Args:
        num_envs: n.
        action_mask, final_obs: what is given on request.
        rewards, log: as in `RewardModelEnv`.

    Versions:
        v0: first version.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        action_mask: bool = False,
        final_obs: bool = False,
        rewards: Rewards | None = None,
        log: InteractionLog | None = None,
    ) -> None:
        bandit = reward_model_bandit(rewards, log)
        super().__init__(bandit, num_envs, action_mask=action_mask, final_obs=final_obs)


class RewardModelBandit(Bandit):
    """Contexts are the events of a log: the histories before them.

    Args:
        rewards: the reward model.
        log: the events.

    Raises:
        ConfigError: an empty log, or catalogues of different size.
    """

    def __init__(self, rewards: Rewards, log: InteractionLog) -> None:
        if len(log) == 0:
            raise ConfigError("the log is empty; an environment needs at least one event")
        if log.n_titles != rewards.n_titles:
            raise ConfigError(
                f"the log has {log.n_titles} titles, the reward model {rewards.n_titles}; fit it on this log"
            )
        self.log, self.histories = log, log.sequences()
        self.table = rewards.on(log)
        catalogue = log.catalogue
        self.releases = catalogue.release if catalogue is not None and catalogue.has_releases else None
        self.rows = np.cumsum(log.step == 0) - 1  # of each event, the row of its user
        self.n_titles, self.n_contexts, self.streams = log.n_titles, len(log), {}
        self.observation_space = observation_space(
            log.n_titles,
            self.histories.titles.shape[1],
            int(log.epoch.max()) + 1,
            log.bounded_scores,
            float(log.hours.max()),
        )

    def users(self, rows: Rows) -> Rows:
        return self.log.user[rows]

    def observe(self, rows: Rows) -> dict[str, NDArray[Any]]:
        users, length = self.rows[rows], self.log.step[rows]
        past = np.arange(self.histories.titles.shape[1]) < length[:, None]
        return {
            "titles": np.where(past, self.histories.titles[users], self.n_titles),
            "scores": np.where(past, self.histories.scores[users], np.float32(0.0)),
            "times": np.where(past, self.histories.times[users], np.float32(0.0)),
            "length": length,
            "epoch": self.log.epoch[rows],
        }

    def action_mask(self, rows: Rows) -> NDArray[np.int8]:
        mask = super().action_mask(rows)
        if self.releases is not None:
            mask[self.releases > self.log.epoch[rows][:, None]] = 0
        return mask

    def play(self, rows: Rows, titles: Rows, u: FloatArray, *, regret: bool) -> Played:
        invalid = at(seen_before(titles, self.observe(rows)["titles"]), len(rows))
        if self.releases is not None:
            invalid |= self.releases[titles] > self.log.epoch[rows]
        predicted = self.table.at(self.rows[rows], self.log.step[rows], titles)
        return Played(np.where(invalid, LOWEST_SCORE, predicted.astype(np.float64)), invalid, {})


class RewardModel(NamedTuple):
    """A reward model and the log whose contexts it scores."""

    rewards: Rewards
    log: InteractionLog


TINY_WORLD = WorldConfig(n_titles=50, history_length=10, reward_noise=0.25, seed=0)
TINY_USERS = 256
TINY_PRETRAINING = TrainingConfig(steps=120, learning_rate=1e-2, warmup_steps=10, checks=4)
TINY_REWARDS = RewardEnsembleConfig(members=2, training=TrainingConfig(steps=40, warmup_steps=5, checks=2))
"""What `tiny_reward_model` is made of: a catalogue and a log small enough to be fitted in three seconds, at a noise
that leaves something to learn."""


@cache
def tiny_reward_model() -> RewardModel:
    """A reward model for trying things out: `TINY_WORLD`, logged and fitted, once a process."""
    log = World(TINY_WORLD).generate_log(TINY_USERS)
    backbone = pretrain(log, HSTUConfig(dimensions=16), TINY_PRETRAINING)
    return RewardModel(fit_reward_ensemble(log, backbone, TINY_REWARDS), log)


def reward_model_bandit(rewards: Rewards | None, log: InteractionLog | None) -> RewardModelBandit:
    """The bandit behind both; arguments as in `RewardModelEnv`."""
    if rewards is None and log is None:
        return RewardModelBandit(*tiny_reward_model())
    if rewards is None or log is None:
        missing = "rewards" if rewards is None else "log"
        raise ConfigError(f"{missing} is missing: give a reward model with the log whose contexts it is to score")
    return RewardModelBandit(rewards, log)
