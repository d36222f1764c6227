"""Sessions over a world: episodes of several steps, in which what was shown joins the history."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsim_gr.envs.bandit import FloatArray, Played, Rows, seen_before
from recsim_gr.envs.population import Population
from recsim_gr.scoring import ROLLOUT_GAP_HOURS

LEAST_SHARE = 1e-3
"""Of the probability mass that was last summed over the whole catalogue: where less of it is left, it is summed again.
Taking titles away one by one costs a rounding error each, of the mass that there was; so no more than three of
sixteen digits are lost."""


class WorldSessions:
    """n sessions that run at once, each at its own step: `recsim_gr.envs.bandit.Sessions` of a world.

    Where a session goes on after a step, the title shown joins the history: with its score, `ROLLOUT_GAP_HOURS` after
    the event before it. A title seen before, in the history or in the session, joins nothing, and the step counts. The
    title of the last step joins nothing either, since nobody chooses after it.

    Args:
        population: whose sessions they are.
        n: how many there is room for.
        horizon: H, the steps of a session.
        uniforms_per_step: how many random numbers a step takes.
    """

    def __init__(self, population: Population, n: int, horizon: int, uniforms_per_step: int) -> None:
        world, width = population.world, population.titles.shape[1] + horizon - 1
        self.population, self.world, self.horizon = population, world, horizon
        self._rows = np.zeros(n, dtype=np.int64)
        self._u = np.empty((n, horizon, uniforms_per_step))
        self._steps = np.zeros(n, dtype=np.int64)
        self._over = np.ones(n, dtype=bool)
        self._titles = np.full((n, width), world.n_titles, dtype=np.int64)
        self._scores, self._times = (np.zeros((n, width), dtype=np.float32) for _ in range(2))
        self._length = np.zeros(n, dtype=np.int64)
        self._log_mass = np.zeros(n)  # log of the summed exp(utility) of what can still be chosen
        self._summed_log_mass = np.zeros(n)  # the same when it was last summed over the catalogue
        self._best_left = np.ones((n, population.best.shape[1]), dtype=bool)

    @property
    def over(self) -> NDArray[np.bool_]:
        """(n,): see `Sessions`."""
        return self._over

    def start(self, lanes: Rows, rows: Rows, u: FloatArray) -> None:
        """See `Sessions`."""
        who = self.population
        who.require(rows)
        history = who.titles.shape[1]
        self._rows[lanes], self._u[lanes], self._steps[lanes], self._over[lanes] = rows, u, 0, False
        for own, theirs, padding in (
            (self._titles, who.titles, self.world.n_titles),
            (self._scores, who.scores, 0.0),
            (self._times, who.times, 0.0),
        ):
            own[lanes, :history] = theirs.take(rows, axis=0)
            own[lanes, history:] = padding
        self._length[lanes] = who.length.take(rows)
        self._log_mass[lanes] = self._summed_log_mass[lanes] = who.normaliser.take(rows)
        self._best_left[lanes] = True

    def observe(self) -> dict[str, NDArray[Any]]:
        """See `Sessions`."""
        return {
            "titles": self._titles.copy(),
            "scores": self._scores.copy(),
            "times": self._times.copy(),
            "length": self._length.copy(),
            "epoch": self.population.epoch.take(self._rows),
        }

    def action_mask(self) -> NDArray[np.int8]:
        """(n, I): see `Sessions`."""
        return self.population.action_mask(self._rows, self._titles)

    def step(self, titles: Rows, *, regret: bool) -> Played:
        """See `Sessions`."""
        who = self.population
        u = self._u[np.arange(len(titles)), self._steps]
        invalid = seen_before(titles, self._titles)
        played = who.show(self._rows, titles, u, invalid, self._log_mass.copy())
        if regret:
            best = who.best[self._rows, self._best_left.argmax(axis=1)]
            played.info["best_satisfaction"], played.info["regret"] = best, best - played.info["satisfaction"]
        self._steps += 1
        self._over = self._steps >= self.horizon
        joins = np.flatnonzero(~self._over & ~played.invalid)
        self._append(joins, titles[joins], played.rewards[joins])
        self._take_away(joins, titles[joins], played.info["propensity"][joins])
        return played

    def _append(self, lanes: Rows, titles: Rows, scores: FloatArray) -> None:
        """The event after the last real one, as `recsim_gr.observations.Observations.append` puts it."""
        length = self._length[lanes]
        self._titles[lanes, length], self._scores[lanes, length] = titles, scores
        last = self._times[lanes, np.maximum(length - 1, 0)]  # 0, the padding, where there was no event
        self._times[lanes, length] = last + np.float32(ROLLOUT_GAP_HOURS)
        self._length[lanes] += 1

    def _take_away(self, lanes: Rows, titles: Rows, propensity: FloatArray) -> None:
        """Titles that can no longer be chosen: from the logging policy's normaliser, and from the best of each user."""
        rows = self._rows[lanes]
        self._best_left[lanes] &= self.population.best_titles[rows] != titles[:, None]
        with np.errstate(divide="ignore"):  # a title that is all of the mass: summed again
            self._log_mass[lanes] += np.log1p(-propensity)
        lost = self._log_mass[lanes] < self._summed_log_mass[lanes] + np.log(LEAST_SHARE)
        again = lanes[lost]
        if len(again) > 0:
            summed = self.population.log_mass(rows[lost], self._titles[again])
            self._log_mass[again] = self._summed_log_mass[again] = summed
