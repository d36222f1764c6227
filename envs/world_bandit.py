"""The bandit over a world."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsim_gr.behaviour import Users, n_cold
from recsim_gr.envs.bandit import Bandit, FloatArray, Observation, Played, Rows, observation_space, require_count
from recsim_gr.envs.population import Pairs, Population
from recsim_gr.envs.sessions import WorldSessions
from recsim_gr.errors import ConfigError
from recsim_gr.scoring import ROLLOUT_GAP_HOURS
from recsim_gr.world_base import HOURS_BETWEEN_SESSIONS, WorldBase

LONGEST_GAP_HOURS = float(np.log(2.0**53)) * HOURS_BETWEEN_SESSIONS
"""Gaps between events are exponential and drawn from uniforms of 53 bits: none can be longer than this."""


class WorldBandit(Bandit):
    """Users of a world after their history; the reward is the observed score of a forced exposure.

    Args:
        world: simulated or replayed.
        users: (P,) the users who come, each as often as every other.
        pairs: the same users.
        horizon: H, the steps of an episode.

    Raises:
        ConfigError: a horizon that is no positive integer, or for which the catalogue is too small.
    """

    def __init__(self, world: WorldBase, users: Users, pairs: Pairs, horizon: int = 1) -> None:
        config = world.config
        require_count("horizon", horizon)
        there = world.n_titles - n_cold(config, world.n_titles)
        if config.history_length + horizon > there:
            raise ConfigError(
                f"horizon must be at most {there - config.history_length}: {there} titles are out in the first epoch, "
                f"histories take {config.history_length}, and none is worth recommending twice; got {horizon}"
            )
        self.world, self.horizon = world, int(horizon)
        self.population = Population(world, users, pairs, n_best=self.horizon)
        self.n_titles, self.n_contexts = world.n_titles, len(users)
        self._shown: tuple[Rows, NDArray[Any]] | None = None  # histories last observed, and whose
        self.streams = {"noise": world.noise.uniforms_per_event}
        if config.accept > 0:
            self.streams["accept"] = 1
        self.observation_space = observation_space(
            world.n_titles,
            config.history_length + self.horizon - 1,
            config.n_epochs,
            world.noise.bounded,
            LONGEST_GAP_HOURS * (config.history_length + (self.horizon > 1)) + ROLLOUT_GAP_HOURS * (self.horizon - 1),
        )

    def users(self, rows: Rows) -> Rows:
        return self.population.users.take(rows)

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
        invalid = who.invalid(rows, titles, self._histories(rows))
        played = who.show(rows, titles, u, invalid, who.standing(rows))
        if regret:
            best = who.best[:, 0].take(rows)
            played.info["best_satisfaction"], played.info["regret"] = best, best - played.info["satisfaction"]
        return played

    def action_mask(self, rows: Rows) -> NDArray[np.int8]:
        who = self.population
        who.require(rows)
        return who.action_mask(rows, who.titles.take(rows, axis=0))

    def sessions(self, n: int, *, regret: bool) -> WorldSessions:
        return WorldSessions(self.population, n, self.horizon, self.uniforms_per_step, regret=regret)

    def _histories(self, rows: Rows) -> NDArray[Any]:
        """(n, L) titles seen; those just shown, where they are the same rows, need no second look-up."""
        if self._shown is not None and self._shown[0] is rows:
            return self._shown[1]
        return self.population.titles.take(rows, axis=0)

    # -- one context at a time ------------------------------------------------------------------------------------

    def user_one(self, row: int) -> int:
        return self.population.users.item(row)

    def observe_one(self, row: int) -> Observation:
        return self.population.observe_one(row)

    def play_one(self, row: int, title: int, u: list[float]) -> tuple[float, dict[str, Any]]:
        return self.population.show_one(row, title, u) if self.population.plain else super().play_one(row, title, u)

    def action_mask_one(self, row: int) -> NDArray[np.int8]:
        return self.population.action_mask_one(row)
