"""``recsim_gr/WatchTime-v0``: simulated users, rewards from watch time."""

import dataclasses
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from recsim_gr.behaviour import BehaviourConfig, FloatArray, Users
from recsim_gr.envs.bandit import BanditEnv, Rows, UnknownArgumentError, require_count
from recsim_gr.envs.population import POOL_USERS
from recsim_gr.envs.vector import BanditVectorEnv
from recsim_gr.envs.world_bandit import WorldBandit
from recsim_gr.errors import ConfigError
from recsim_gr.world import World, WorldConfig

ConfigT = TypeVar("ConfigT", bound=BehaviourConfig)


class WatchTimeEnv(BanditEnv):
    """Recommend one title to a simulated user; the reward is what the user's watch time says of it.

    A contextual bandit: one step an episode, unless ``horizon`` makes it a session. The user is shown the title
    whatever they would have chosen (a forced exposure, unless ``accept`` is on), and their score mixes true
    satisfaction with exogenous sessions, as the noise model says.

    **Observation**, a dictionary; L is ``history_length`` (20) + ``horizon`` (1) − 1, I is ``n_titles`` (1,000):

    | key | type | shape | what |
    |---|---|---|---|
    | ``titles`` | int64 | (L,) | titles watched, in order; 0 to I − 1, padding I |
    | ``scores`` | float32 | (L,) | scores they got, points (``watch_time``: in [1, 5]), padding 0 |
    | ``times`` | float32 | (L,) | hours since the epoch began, padding 0 |
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

    **Info** at reset: ``action_mask``, int8 (I,), 1 for titles that are out and not seen; ``user``, int, for referees:
    it names the user in `World`. At a step (of a session with the ``action_mask`` of what follows):

    | key | type | what |
    |---|---|---|
    | ``satisfaction`` | float | the truth, points in [1, 5] |
    | ``best_satisfaction`` | float | that of the best title left; with ``accept`` on, its worth on average |
    | ``regret`` | float | their difference; 0 or more, with ``accept`` on only on average |
    | ``propensity`` | float | the logging policy's probability of the title after this history, [0, 1] |
    | ``watch_minutes`` | float | minutes watched |
    | ``duration_minutes`` | float | minutes the title lasts |
    | ``exogenous`` | bool | whether the score had nothing to do with satisfaction |
    | ``invalid`` | bool | whether the title had been seen before, or is not out |
    | ``accepted`` | bool | whether the user watched it; there only where ``accept`` is on, false where invalid |

    **Randomness**: ``reset(seed=s)`` starts independent streams, of users, noise and acceptance. Every episode owns a
    stretch of each, so what comes in it does not depend on what was done in those before it. Users are drawn uniformly
    from the first ``pool_users`` of the split, with their histories as in a log of as many users. The world itself
    follows from ``world_seed``.

    Example::

        import gymnasium as gym, recsim_gr
        env = gym.make("recsim_gr/WatchTime-v0", n_titles=1000, reward_noise=0.5)
        obs, info = env.reset(seed=0)
        action = env.action_space.sample(info["action_mask"])
        obs, reward, terminated, truncated, info = env.step(action)
        print(reward, info["satisfaction"], info["regret"])

    Args:
        split: whose users: ``train``, ``validation``, ``test`` or ``judge``.
        pool_users: how many users come; each is held in some 500 bytes, and prepared when it first comes.
        horizon: H, the steps of an episode. Histories and sessions together must fit into the titles that are out.
        world_seed: the seed of the world, ``WorldConfig.seed``. (Seeds of episodes go to ``reset``.)
        world: an existing world, instead of ``world_seed`` and ``config``.
        **config: any other fields of `WorldConfig`.

    Raises:
        ConfigError: a value that makes no sense, or both a world and the fields of one.
        UnknownArgumentError: a keyword that is no field of `WorldConfig`.

    Versions:
        v0: first version. Its bytes are frozen by a checksum in the tests. Sessions, acceptance and the world's other
            options came later; they are off by default, and then change no byte of
            worlds of up to 10,000 titles; larger ones draw their histories by a faster sampler since.
    """

    def __init__(
        self,
        *,
        split: str = "train",
        pool_users: int = POOL_USERS,
        horizon: int = 1,
        world_seed: int = 0,
        world: World | None = None,
        **config: Any,
    ) -> None:
        super().__init__(watch_time_bandit(split, pool_users, horizon, world_seed, world, config))


class WatchTimeVectorEnv(BanditVectorEnv):
    """`WatchTimeEnv`, ``num_envs`` users at a time: see there for every key, with n in front of every shape.

    See `BanditVectorEnv` for what its infos hold and for ``action_mask``, ``regret`` and ``final_obs``.

    Example::

        import gymnasium as gym, recsim_gr
        envs = gym.make_vec("recsim_gr/WatchTime-v0", num_envs=4096, n_titles=1000, regret=True)
        obs, infos = envs.reset(seed=0)
        actions = envs.action_space.sample()
        obs, rewards, terminated, truncated, infos = envs.step(actions)
        print(rewards.mean(), infos["final_info"]["regret"].mean())

    Args:
        num_envs: n.
        action_mask, regret, final_obs: what is given on request.
        split, pool_users, horizon, world_seed, world, **config: as in `WatchTimeEnv`.

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
        split: str = "train",
        pool_users: int = POOL_USERS,
        horizon: int = 1,
        world_seed: int = 0,
        world: World | None = None,
        **config: Any,
    ) -> None:
        bandit = watch_time_bandit(split, pool_users, horizon, world_seed, world, config)
        super().__init__(bandit, num_envs, action_mask=action_mask, regret=regret, final_obs=final_obs)


def watch_time_bandit(
    split: str, pool_users: int, horizon: int, world_seed: int, world: World | None, config: dict[str, Any]
) -> WorldBandit:
    """The bandit behind both; arguments as in `WatchTimeEnv`."""
    if world is None:
        world = World(world_config(WorldConfig, world_seed, config))
    elif config or world_seed:
        raise ConfigError(f"give either a world or its fields, got both: {', '.join(config) or 'world_seed'}")
    require_count("pool_users", pool_users)
    users = world.users(split, pool_users)
    return WorldBandit(world, users, FactorPairs(world, users), horizon)


def world_config(kind: type[ConfigT], world_seed: int, fields: dict[str, Any]) -> ConfigT:
    """A world's config from an environment's keywords.

    Raises:
        UnknownArgumentError: a keyword that is no field.
        ConfigError: a value that the config refuses.
    """
    known = {field.name for field in dataclasses.fields(kind)} - {"seed"}
    unknown = sorted(set(fields) - known)
    if unknown:
        hint = "the seed of the world is world_seed" if unknown[0] == "seed" else f"known: {', '.join(sorted(known))}"
        raise UnknownArgumentError(f"got an unexpected keyword argument {unknown[0]!r}; {hint}")
    return kind(**fields, seed=world_seed)


class FactorPairs:
    """Users of a simulated world by their vectors: 2·d + 1 numbers a user.

    Args:
        world: the world.
        users: (P,) the group.
    """

    def __init__(self, world: World, users: Users) -> None:
        self.world = world
        self.vectors = np.stack([world.taste(users), world.pull_vectors(users)], axis=1)  # together, so read together
        self.leniency = world.leniency(users)

    def at(self, rows: Rows, titles: Rows) -> tuple[NDArray[np.float32], FloatArray]:
        """(n,) and (n,): see `Pairs`."""
        vectors, traits = self.vectors.take(rows, axis=0), self.world.traits.take(titles, axis=0)
        logit, pull = (np.einsum("nd,nd->n", vectors[:, i], traits) for i in (0, 1))
        logit += self.world.quality.take(titles)
        logit += self.leniency.take(rows)
        return self.world.satisfaction_at(logit), pull

    def at_one(self, row: int, title: int) -> tuple[float, float]:
        """See `Pairs`."""
        # einsum too, since another product adds up in another order
        product, pull = np.einsum("kd,d->k", self.vectors[row], self.world.traits[title]).tolist()
        logit = product + self.world.quality.item(title) + self.leniency.item(row)
        return float(self.world.satisfaction_at(np.asarray(logit))), pull
