"""The bandit over a world: its users, prepared once so that a step looks up a few numbers a user."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recsim_gr.behaviour import FloatArray, Users
from recsim_gr.envs.bandit import Bandit, Played, Rows, lowest_where_invalid, observation_space, seen_before
from recsim_gr.noise import Exposure
from recsim_gr.world_base import HOURS_BETWEEN_SESSIONS, WorldBase

POOL_USERS = 4_096
"""Users of an environment unless told otherwise: as many as the quick preset logs, prepared in 0.9 s at 1,000 titles
and held in 2 MB."""

BLOCK_USERS = 256
"""Users prepared together, when the first of them comes: 60 ms at 1,000 titles, so that a first reset is quick."""

LONGEST_GAP_HOURS = float(np.log(2.0**53)) * HOURS_BETWEEN_SESSIONS
"""Gaps between events are exponential and drawn from uniforms of 53 bits: none can be longer than this."""


class Pairs(Protocol):
    """A group of users, ready to be asked about single titles without the tables of all titles."""

    def satisfaction(self, rows: Rows, titles: Rows) -> NDArray[np.float32]:
        """(n,): s(u, i) of the users at ``rows`` of the group."""
        ...

    def pull(self, rows: Rows, titles: Rows) -> FloatArray:
        """(n,): what `WorldBase.pull` has at (user, title)."""
        ...


class Population:
    """What a step needs of each user: history, epoch, free time, the logging policy's normaliser, the best title.

    Args:
        world: the world.
        users: (P,) its users, a row each.
        pairs: the same users.
    """

    def __init__(self, world: WorldBase, users: Users, pairs: Pairs) -> None:
        n, length = len(users), world.config.history_length
        self.world, self.users, self.pairs = world, users, pairs
        self.epoch, self.discernment, self.free_time = world.behaviour(users)
        self.titles = np.empty((n, length), dtype=np.int64)
        self.scores = np.empty((n, length), dtype=np.float32)
        self.times = np.empty((n, length), dtype=np.float32)
        self.normaliser = np.empty(n)  # log of the summed exp(utility) of unseen titles
        self.best = np.empty(n)  # satisfaction with the best unseen title
        self._missing = np.ones(-(-n // BLOCK_USERS), dtype=bool)
        self._complete = False

    def require(self, rows: Rows) -> None:
        """Makes sure that the users at ``rows`` are prepared."""
        if self._complete:
            return
        for block in np.unique(rows // BLOCK_USERS):
            if self._missing[block]:
                self._prepare(slice(block * BLOCK_USERS, min((block + 1) * BLOCK_USERS, len(self.users))))
                self._missing[block] = False
        self._complete = not self._missing.any()

    def utility(self, rows: Rows, titles: Rows) -> FloatArray:
        """(n,): what `WorldBase.utilities` has at (user, title)."""
        trend = (1.0 - self.discernment[rows]) * self.world.appeal[self.epoch[rows], titles]
        return self.world.config.pull_strength * self.pairs.pull(rows, titles) + trend

    def _prepare(self, block: slice) -> None:
        users, rows = self.users[block], np.arange(block.start, block.stop)
        contexts = self.world.contexts_of(users)
        seen = contexts.observations
        self.titles[block], self.scores[block], self.times[block] = seen.titles, seen.scores, seen.times
        log_probs = self.world.logging_log_probs(users, seen.titles)
        next_log_prob = np.take_along_axis(log_probs, contexts.next_titles[:, None], axis=1)[:, 0]
        self.normaliser[block] = self.utility(rows, contexts.next_titles) - next_log_prob
        self.best[block] = np.where(log_probs > -np.inf, self.world.satisfaction(users), -np.inf).max(axis=1)


class WorldBandit(Bandit):
    """Users of a world after a full history; the reward is the observed score of a forced exposure.

    Args:
        world: simulated or replayed.
        users: (P,) the users who come, each as often as every other.
        pairs: the same users.
    """

    def __init__(self, world: WorldBase, users: Users, pairs: Pairs) -> None:
        config = world.config
        self.world = world
        self.population = Population(world, users, pairs)
        self.n_titles, self.n_contexts = world.n_titles, len(users)
        self.uniforms_per_episode = world.noise.uniforms_per_event
        self.observation_space = observation_space(
            world.n_titles,
            config.history_length,
            config.n_epochs,
            world.noise.bounded,
            LONGEST_GAP_HOURS * config.history_length,
        )

    def users(self, rows: Rows) -> Rows:
        return self.population.users[rows]

    def observe(self, rows: Rows) -> dict[str, NDArray[Any]]:
        who = self.population
        who.require(rows)
        return {
            "titles": who.titles.take(rows, axis=0),  # faster than who.titles[rows]
            "scores": who.scores.take(rows, axis=0),
            "times": who.times.take(rows, axis=0),
            "length": np.full(len(rows), self.world.config.history_length, dtype=np.int64),
            "epoch": who.epoch[rows],
        }

    def play(self, rows: Rows, titles: Rows, u: FloatArray, *, regret: bool) -> Played:
        who = self.population
        who.require(rows)
        invalid = seen_before(titles, who.titles.take(rows, axis=0))
        satisfaction = who.pairs.satisfaction(rows, titles).astype(np.float64)
        duration = self.world.durations[titles]
        outcome = self.world.noise.sample(Exposure(satisfaction, who.free_time[rows], duration), u)
        satisfaction = lowest_where_invalid(satisfaction, invalid)
        propensity = np.exp(np.minimum(who.utility(rows, titles) - who.normaliser[rows], 0.0))
        info = {
            "satisfaction": satisfaction,
            "propensity": np.where(invalid, 0.0, propensity),
            "watch_minutes": np.where(invalid, 0.0, outcome.watched * duration),
            "duration_minutes": duration,
            "exogenous": outcome.exogenous & ~invalid,
        }
        if regret:
            best = who.best[rows]
            info |= {"best_satisfaction": best, "regret": best - satisfaction}
        return Played(lowest_where_invalid(outcome.score, invalid), invalid, info)
