"""The bandit over a world."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsim_gr.envs.bandit import Bandit, FloatArray, Observation, Played, Rows, observation_space, seen_before
from recsim_gr.envs.population import Pairs, Population
from recsim_gr.world import HOURS_BETWEEN_SESSIONS, Users, WorldBase

LONGEST_GAP_HOURS = float(np.log(2.0**53)) * HOURS_BETWEEN_SESSIONS
"""Gaps between events are exponential and drawn from uniforms of 53 bits: none can be longer than this."""


class WorldBandit(Bandit):
    """Users of a world after their history; the reward is the observed score of a forced exposure.

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
        self._shown: tuple[Rows, NDArray[Any]] | None = None
        self._ones = np.ones(world.n_titles, dtype=np.int8)
        self.streams = {"noise": world.noise.uniforms_per_event}
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
        self._shown = rows, who.titles.take(rows, axis=0)  # faster than who.titles[rows]
        return {
            "titles": self._shown[1].astype(np.int64),
            "scores": who.scores.take(rows, axis=0),
            "times": who.times.take(rows, axis=0),
            "length": who.length.take(rows),
            "epoch": who.epoch.take(rows),
        }

    def play(self, rows: Rows, titles: Rows, u: FloatArray, *, regret: bool) -> Played:
        who = self.population
        who.require(rows)
        played = who.show(rows, titles, u, seen_before(titles, self._histories(rows)), who.normaliser.take(rows))
        if regret:
            best = who.best[:, 0].take(rows)
            played.info["best_satisfaction"], played.info["regret"] = best, best - played.info["satisfaction"]
        return played

    def action_mask(self, rows: Rows) -> NDArray[np.int8]:
        who = self.population
        who.require(rows)
        mask = np.ones((len(rows), self.n_titles), dtype=np.int8)
        np.put_along_axis(mask, who.titles.take(rows, axis=0), 0, axis=1)
        return mask

    def _histories(self, rows: Rows) -> NDArray[Any]:
        """(n, L) titles seen; those just shown, where they are the same rows, need no second look-up."""
        if self._shown is not None and self._shown[0] is rows:
            return self._shown[1]
        return self.population.titles.take(rows, axis=0)

    # -- one context at a time ------------------------------------------------------------------------------------

    def observe_one(self, row: int) -> Observation:
        return self.population.observe_one(row)

    def play_one(self, row: int, title: int, u: list[float]) -> tuple[float, dict[str, Any]]:
        return self.population.show_one(row, title, u)

    def action_mask_one(self, row: int) -> NDArray[np.int8]:
        who = self.population
        who.require_one(row)
        mask = self._ones.copy()
        mask[who.titles[row]] = 0
        return mask
