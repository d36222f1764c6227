"""``recsim_gr/Replay-v0``: real users and real ratings, synthetic choices."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsim_gr.behaviour import FloatArray, Users
from recsim_gr.envs.bandit import BanditEnv, Rows, UnknownArgumentError, require_count
from recsim_gr.envs.vector import BanditVectorEnv
from recsim_gr.envs.watch_time import world_config
from recsim_gr.envs.world_bandit import WorldBandit
from recsim_gr.errors import ConfigError
from recsim_gr.replay import ReplayConfig, ReplayWorld


class ReplayEnv(BanditEnv):
    """Recommend one title to a real user, whose rating of every title is known.

    A contextual bandit: one step an episode, unless ``horizon`` makes it a session. The history is synthetic (the
    logging policy of `ReplayWorld` chose from the user's real ratings), what the user thinks of the shown title is
    real, and the reward is that rating behind the noise of watch time.

    **Observation**, a dictionary; L is ``history_length`` (20) + ``horizon`` (1) − 1, I the number of titles in the
    data (Jester 100, KuaiRec 3,327):

    | key | type | shape | what |
    |---|---|---|---|
    | ``titles`` | int64 | (L,) | titles watched, in order; 0 to I − 1, the columns of the matrix, padding I |
    | ``scores`` | float32 | (L,) | scores they got, points (``watch_time``: in [1, 5]), padding 0 |
    | ``times`` | float32 | (L,) | hours since the epoch began, padding 0; synthetic |
    | ``length`` | int64 | () | how many are real; they come first |
    | ``epoch`` | int64 | () | 0 to n_epochs − 1; test users live in the last |

    **Action**: ``Discrete(I)``, the title shown. A title seen before, or not out yet in the user's epoch, is legal and
    worth nothing: reward and satisfaction 1, propensity 0, watch time 0, ``invalid`` true.

    **Reward**: float, the observed score in points: 1 + 4·(watched fraction), in [1, 5]; other noise models than
    ``watch_time`` do not keep to [1, 5]. With ``accept`` on, a title that the user abandons is worth 1.

    **Termination**: after ``horizon`` steps, by default one; never truncated, since the horizon is part of the task.
    With ``accept`` on, a session also ends when the user abandons a title. The observation returned with the last step
    is the context that it was taken in.

    **Sessions** (``horizon`` H > 1): the title shown joins the history with its score, the first at the hour at which
    the user really chose next, the others 0.7 hours after the one before; masks, propensities and the best title are
    those of the longer history. An invalid title joins nothing, and the step counts; nor does the title of the last
    step, since nobody chooses after it. The user's mood (``drift``) stays what it was at the first.

    **Info** at reset: ``action_mask``, int8 (I,), 1 for titles that are out and not seen; ``user``, int, the row of the
    matrix, for referees. At a step (of a session with the ``action_mask`` of what follows):

    | key | type | what |
    |---|---|---|
    | ``satisfaction`` | float | the real rating, rescaled to points in [1, 5] |
    | ``best_satisfaction`` | float | that of the best title left; with ``accept`` on, its worth on average |
    | ``regret`` | float | their difference; 0 or more, with ``accept`` on only on average |
    | ``propensity`` | float | the (synthetic) logging policy's probability of the title, in [0, 1] |
    | ``watch_minutes`` | float | minutes watched |
    | ``duration_minutes`` | float | minutes the title lasts; synthetic where the data have none |
    | ``exogenous`` | bool | whether the score had nothing to do with satisfaction |
    | ``invalid`` | bool | whether the title had been seen before, or is not out |
    | ``accepted`` | bool | whether the user watched it; there only where ``accept`` is on, false where invalid |

    **Randomness**: ``reset(seed=s)`` starts independent streams, of users, noise and acceptance. Every episode owns a
    stretch of each, so what comes in it does not depend on what was done in those before it. Users are drawn uniformly
    from those of the split. The split, the choices and the durations follow from ``world_seed``.

    Example::

        import gymnasium as gym, recsim_gr
        env = gym.make("recsim_gr/Replay-v0", data="ratings.npz", reward_noise=0.5)
        obs, info = env.reset(seed=0)
        action = env.action_space.sample(info["action_mask"])
        obs, reward, terminated, truncated, info = env.step(action)
        print(reward, info["satisfaction"], info["regret"])

    Args:
        data: path of the data file, see `recsim_gr.replay.load_matrix`.
        split: whose users: ``train``, ``validation``, ``test`` or ``judge``.
        pool_users: how many users come; by default all of the split.
        horizon: H, the steps of an episode. Histories and sessions together must fit into the titles that are out.
        world_seed: the seed of the world, ``ReplayConfig.seed``. (Seeds of episodes go to ``reset``.)
        world: an existing world, instead of ``data``, ``world_seed`` and ``config``.
        **config: any other fields of `ReplayConfig`.

    Raises:
        DataFileError: the file is missing, truncated, foreign, or incomplete.
        ConfigError: a value that makes no sense, or neither data nor a world.
        UnknownArgumentError: a keyword that is no field of `ReplayConfig`.

    Versions:
        v0: first version.
    """

    def __init__(
        self,
        *,
        data: str | Path | None = None,
        split: str = "train",
        pool_users: int | None = None,
        horizon: int = 1,
        world_seed: int = 0,
        world: ReplayWorld | None = None,
        **config: Any,
    ) -> None:
        super().__init__(replay_bandit(data, split, pool_users, horizon, world_seed, world, config))


class ReplayVectorEnv(BanditVectorEnv):
    """`ReplayEnv`, ``num_envs`` users at a time: see there for every key, with n in front of every shape.

    See `BanditVectorEnv` for what its infos hold and for ``action_mask``, ``regret`` and ``final_obs``.

    Example::

        import gymnasium as gym, recsim_gr
        envs = gym.make_vec("recsim_gr/Replay-v0", num_envs=1024, data="ratings.npz")
        obs, infos = envs.reset(seed=0)
        actions = envs.action_space.sample()
        obs, rewards, terminated, truncated, infos = envs.step(actions)
        print(rewards.mean(), infos["final_info"]["satisfaction"].mean())

    Args:
        num_envs: n.
        action_mask, regret, final_obs: what is given on request.
        data, split, pool_users, horizon, world_seed, world, **config: as in `ReplayEnv`.

    Versions:
        v0: first version.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        action_mask: bool = False,
        regret: bool = False,
        final_obs: bool = False,
        data: str | Path | None = None,
        split: str = "train",
        pool_users: int | None = None,
        horizon: int = 1,
        world_seed: int = 0,
        world: ReplayWorld | None = None,
        **config: Any,
    ) -> None:
        bandit = replay_bandit(data, split, pool_users, horizon, world_seed, world, config)
        super().__init__(bandit, num_envs, action_mask=action_mask, regret=regret, final_obs=final_obs)


def replay_bandit(
    data: str | Path | None,
    split: str,
    pool_users: int | None,
    horizon: int,
    world_seed: int,
    world: ReplayWorld | None,
    config: dict[str, Any],
) -> WorldBandit:
    """The bandit behind both; arguments as in `ReplayEnv`."""
    if world is not None and (data or config or world_seed):
        raise ConfigError("give either a world, or data with the fields of one, not both")
    if "path" in config:
        raise UnknownArgumentError("got an unexpected keyword argument 'path'; the path of the data is data")
    if world is None:
        if data is None:
            raise ConfigError("data is missing: give the path of a data file, data='ratings.npz'")
        world = ReplayWorld(world_config(ReplayConfig, world_seed, {"path": str(data), **config}))
    pool_users = world.n_users(split) if pool_users is None else pool_users
    require_count("pool_users", pool_users)
    users = world.users(split, pool_users)
    return WorldBandit(world, users, MatrixPairs(world, users), horizon)


class MatrixPairs:
    """Real users, looked up in the matrix.

    Args:
        world: the world.
        users: (P,) the group.
    """

    def __init__(self, world: ReplayWorld, users: Users) -> None:
        self.world, self.users = world, users
        self.partners = world.partners(users)
        self.own, self.outside = world.pull_weights(users)

    def at(self, rows: Rows, titles: Rows) -> tuple[NDArray[np.float32], FloatArray]:
        """(n,) and (n,): see `Pairs`."""
        users, z = self.users.take(rows), self.world.standardised
        pull = self.own.take(rows) * z[users, titles]
        pull += self.outside.take(rows) * z[self.partners.take(rows), titles]
        return self.world.matrix.satisfaction[users, titles], pull

    def at_one(self, row: int, title: int) -> tuple[float, float]:
        """See `Pairs`."""
        user, z = self.users.item(row), self.world.standardised
        own = self.own.item(row) * z.item(user, title)
        pull = own + self.outside.item(row) * z.item(self.partners.item(row), title)
        return self.world.matrix.satisfaction.item(user, title), pull
