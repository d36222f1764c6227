"""Sessions over a world: episodes of several steps, in which what was shown joins the history."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsim_gr.envs.bandit import BELOW_ONE, FloatArray, Played, Rows
from recsim_gr.envs.population import Population, Standing
from recsim_gr.scoring import ROLLOUT_GAP_HOURS

LEAST_SHARE = 1e-3
"""Of the probability mass that was last summed over the whole catalogue: where less of it is left, it is summed again.
Taking titles away one by one costs a rounding error each, of the mass that there was; so no more than three of
sixteen digits are lost."""


class WorldSessions:
    """n sessions that run at once, each at its own step: `recsim_gr.envs.bandit.Sessions` of a world.

    Where a session goes on after a step, the title shown joins the history with its score: the first at the hour at
    which the user comes back (`recsim_gr.observations.Contexts.next_times`), the others `ROLLOUT_GAP_HOURS` after the
    event before them. A title seen before, in the history or in the session, joins nothing, and the step counts. The
    title of the last step joins nothing either, since nobody chooses after it.

    Args:
        population: whose sessions they are.
        n: how many there is room for.
        horizon: H, the steps of a session.
        uniforms_per_step: how many random numbers a step takes.
        regret: whether infos say it.
    """

    def __init__(self, population: Population, n: int, horizon: int, uniforms_per_step: int, *, regret: bool) -> None:
        world, width = population.world, population.titles.shape[1] + horizon - 1
        self.population, self.world, self.horizon = population, world, horizon
        self._rows = np.zeros(n, dtype=np.int64)
        self._u = np.empty((n, horizon, uniforms_per_step))
        self._steps = np.zeros(n, dtype=np.int64)
        self._over = np.ones(n, dtype=bool)
        self._titles = np.full((n, width), world.n_titles, dtype=population.titles.dtype)
        self._scores, self._times = (np.zeros((n, width), dtype=np.float32) for _ in range(2))
        self._length = np.zeros(n, dtype=np.int64)
        self._log_mass = np.zeros(n)  # `Standing.log_mass` of each
        self._carried = None if population.carried is None else np.zeros((n, population.carried.shape[1]))
        self._summed_log_mass = np.zeros(n)  # the same when it was last summed over the catalogue
        self._best_left = np.ones((n, population.best.shape[1]), dtype=bool) if regret else None

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
        self._set_standing(lanes, who.standing(rows))
        if self._best_left is not None:
            self._best_left[lanes] = True

    def observe(self) -> dict[str, NDArray[Any]]:
        """See `Sessions`."""
        return {
            "titles": self._titles.astype(np.int64),
            "scores": self._scores.copy(),
            "times": self._times.copy(),
            "length": self._length.copy(),
            "epoch": self.population.epoch.take(self._rows),
        }

    def action_mask(self) -> NDArray[np.int8]:
        """(n, I): see `Sessions`."""
        return self.population.action_mask(self._rows, self._titles)

    def step(self, titles: Rows) -> Played:
        """See `Sessions`."""
        who, first = self.population, self._steps[0]
        together = bool((self._steps == first).all())  # nearly always, unless users may leave
        u = self._u[:, first] if together else self._u[np.arange(len(titles)), self._steps]
        invalid = who.invalid(self._rows, titles, self._titles)
        carried = None if self._carried is None else self._carried.copy()
        played = who.show(self._rows, titles, u, invalid, Standing(self._log_mass.copy(), carried))
        if self._best_left is not None:
            best = who.best[self._rows, self._best_left.argmax(axis=1)]
            played.info["best_satisfaction"], played.info["regret"] = best, best - played.info["satisfaction"]
        self._steps += 1
        self._over = self._steps >= self.horizon
        if "accepted" in played.info:
            self._over |= ~played.info["accepted"] & ~played.invalid
        joins = np.flatnonzero(~self._over & ~played.invalid)
        self._append(joins, titles[joins], played.rewards[joins])
        if self._best_left is not None:
            self._best_left[joins] &= who.best_titles[self._rows[joins]] != titles[joins, None]
        self._take_away(joins, played.info["propensity"][joins])
        return played

    def _append(self, lanes: Rows, titles: Rows, scores: FloatArray) -> None:
        """The event after the last real one, as `recsim_gr.observations.Observations.append` puts it."""
        length = self._length[lanes]
        self._titles[lanes, length], self._scores[lanes, length] = titles, scores
        self._times[lanes, length] = self._next_hour(lanes)
        self._length[lanes] += 1

    def _next_hour(self, lanes: Rows) -> NDArray[np.float32]:
        """(k,): when the next title follows: the first of a session when the user comes back, the others at once."""
        who, rows, length = self.population, self._rows[lanes], self._length[lanes]
        soon: NDArray[np.float32] = self._times[lanes, length - 1] + np.float32(ROLLOUT_GAP_HOURS)
        return np.where(length == who.length[rows], who.next_time[rows], soon)

    def _take_away(self, lanes: Rows, propensity: FloatArray) -> None:
        """The logging policy without the titles just shown in the given lanes, (k,), of the given propensities."""
        self._log_mass[lanes] += np.log1p(-np.minimum(propensity, BELOW_ONE))  # all of it: summed again
        again = lanes[self._log_mass[lanes] < self._summed_log_mass[lanes] + np.log(LEAST_SHARE)]
        if self._carried is not None:  # every title's utility has changed
            again = lanes
        if len(again) > 0:
            rows, hours = self._rows[again], self._next_hour(again)
            standing = self.population.standing_after(rows, self._titles[again], self._times[again], hours)
            self._set_standing(again, standing)

    def _set_standing(self, lanes: Rows, standing: Standing) -> None:
        self._log_mass[lanes] = self._summed_log_mass[lanes] = standing.log_mass
        if self._carried is not None:
            self._carried[lanes] = standing.carried
