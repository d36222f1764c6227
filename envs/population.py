"""The users of a world, prepared once so that a step looks up a few numbers a user."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recsim_gr.envs.bandit import Observation, Played, Rows, at
from recsim_gr.noise import RewardNoise
from recsim_gr.observations import LOWEST_SCORE
from recsim_gr.world import FloatArray, Users, WorldBase

POOL_USERS = 4_096
"""Users of an environment unless told otherwise: as many as the quick preset logs, prepared in 0.9 s at 1,000 titles
and held in 2 MB."""

BLOCK_USERS = 256
"""Users prepared together, when the first of them comes: 60 ms at 1,000 titles, so that a first reset is quick."""


class Pairs(Protocol):
    """A group of users, ready to be asked about single titles without the tables of all titles."""

    def at(self, rows: Rows, titles: Rows) -> tuple[NDArray[np.float32], FloatArray]:
        """s(u, i), (n,), of the users at ``rows`` of the group, and what `WorldBase.pull` has there, (n,)."""
        ...

    def at_one(self, row: int, title: int) -> tuple[float, float]:
        """The same of one, to the last bit."""
        ...


class Population:
    """What a step needs of each user: history, epoch, free time, the logging policy's normaliser, the best titles.

    Args:
        world: the world.
        users: (P,) its users, a row each.
        pairs: the same users.
        n_best: how many of the best unseen titles are kept of each user; an episode that can use up so many asks for
            no more.
    """

    def __init__(self, world: WorldBase, users: Users, pairs: Pairs, n_best: int = 1) -> None:
        n, length = len(users), world.config.history_length
        self.world, self.users, self.pairs = world, users, pairs
        self.epoch, self.discernment, self.free_time = world.behaviour(users)
        # narrow, since what a step costs is what it reads; 0 to n_titles
        self.titles = np.empty((n, length), dtype=np.int16 if world.n_titles < 2**15 else np.int32)
        self.scores = np.empty((n, length), dtype=np.float32)
        self.times = np.empty((n, length), dtype=np.float32)
        self.length = np.empty(n, dtype=np.int64)
        self.normaliser = np.empty(n)  # log of the summed exp(utility) of unseen titles
        self.best_titles = np.empty((n, n_best), dtype=np.int64)
        self.best = np.empty((n, n_best))  # satisfaction with them, descending
        self._conformity = 1.0 - self.discernment
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

    def utility(self, rows: Rows, titles: Rows, pull: FloatArray) -> FloatArray:
        """(n,): what `WorldBase.utilities` has at (user, title), from the pull there, which is spoilt."""
        places = self.epoch.take(rows)
        places *= self.world.n_titles
        places += titles
        trend = self.world.appeal.take(places)
        trend *= self._conformity.take(rows)
        pull *= self.world.config.pull_strength
        pull += trend
        return pull

    def log_mass(self, rows: Rows, histories: Rows) -> FloatArray:
        """(n,) log of the summed exp(utility) of the titles that (n, L) histories leave, over the whole catalogue."""
        mass = np.empty(len(rows))
        for start in range(0, len(rows), BLOCK_USERS):
            block = slice(start, start + BLOCK_USERS)
            log_probs = self.world.logging_log_probs(self.users[rows[block]], histories[block])
            mass[block] = self._log_mass(rows[block], log_probs, log_probs.argmax(axis=1))
        return mass

    def action_mask(self, rows: Rows, histories: NDArray[Any]) -> NDArray[np.int8]:
        """(n, I): 1 for titles that can be chosen after (n, L) histories."""
        mask = np.ones((len(rows), self.world.n_titles + 1), dtype=np.int8)  # with a place for padding
        np.put_along_axis(mask, histories, 0, axis=1)
        return np.ascontiguousarray(mask[:, :-1])

    def show(self, rows: Rows, titles: Rows, u: FloatArray, invalid: Rows, log_mass: FloatArray) -> Played:
        """Shows each user a title.

        Args:
            rows: (n,) users.
            titles: (n,).
            u: (n, uniforms_per_step).
            invalid: the places where the title cannot be chosen.
            log_mass: (n,) log of the summed exp(utility) of what can be chosen; the caller's own, and spoilt.
        """
        truth, pull = self.pairs.at(rows, titles)
        satisfaction = truth.astype(np.float64)
        duration = self.world.durations.take(titles)
        outcome = self.world.noise.sample(satisfaction, self.free_time.take(rows), duration, u)
        log_propensity = np.subtract(self.utility(rows, titles, pull), log_mass, out=log_mass)
        propensity = np.exp(np.minimum(log_propensity, 0.0, out=log_propensity), out=log_propensity)
        info = {
            "satisfaction": satisfaction,
            "propensity": propensity,
            "watch_minutes": outcome.watched * duration,
            "duration_minutes": duration,
            "exogenous": outcome.exogenous,
        }
        nothing = {"satisfaction": LOWEST_SCORE, "propensity": 0.0, "watch_minutes": 0.0, "exogenous": False}
        for name, value in nothing.items():
            info[name][invalid] = value
        outcome.score[invalid] = LOWEST_SCORE
        return Played(outcome.score, at(invalid, len(rows)), info)

    # -- one user at a time: the same numbers, without arrays of length 1 ------------------------------------------

    def require_one(self, row: int) -> None:
        """`require` for one."""
        if not self._complete and self._missing[row // BLOCK_USERS]:
            self.require(np.array([row]))

    def observe_one(self, row: int) -> Observation:
        """Fresh arrays of one user's history."""
        self.require_one(row)
        return {
            "titles": self.titles[row].astype(np.int64),
            "scores": self.scores[row].copy(),
            "times": self.times[row].copy(),
            "length": self.length[row],
            "epoch": self.epoch[row],
        }

    def utility_one(self, row: int, title: int, pull: float) -> float:
        """`utility` of one."""
        trend = self._conformity.item(row) * self.world.appeal.item(self.epoch.item(row), title)
        return self.world.config.pull_strength * pull + trend

    def show_one(self, row: int, title: int, u: list[float]) -> tuple[float, dict[str, Any]]:
        """`show` to one user after the history, with the regret."""
        self.require_one(row)
        invalid = title in self.titles[row].tolist()
        duration, best = self.world.durations.item(title), self.best.item(row, 0)
        if invalid:
            satisfaction, propensity, watched, exogenous, score = LOWEST_SCORE, 0.0, 0.0, False, LOWEST_SCORE
        else:
            satisfaction, pull = self.pairs.at_one(row, title)
            score, watched, exogenous = sample_one(self.world.noise, satisfaction, self.free_time.item(row), duration, u)
            propensity = float(np.exp(min(self.utility_one(row, title, pull) - self.normaliser.item(row), 0.0)))
        return score, {
            "satisfaction": satisfaction,
            "propensity": propensity,
            "watch_minutes": watched * duration,
            "duration_minutes": duration,
            "exogenous": exogenous,
            "best_satisfaction": best,
            "regret": best - satisfaction,
            "invalid": invalid,
        }

    # -- inside ----------------------------------------------------------------------------------------------------

    def _prepare(self, block: slice) -> None:
        users, rows = self.users[block], np.arange(block.start, block.stop)
        contexts = self.world.contexts_of(users)
        seen = contexts.observations
        self.titles[block], self.scores[block], self.times[block] = seen.titles, seen.scores, seen.times
        self.length[block] = seen.length
        log_probs = self.world.logging_log_probs(users, seen.titles)
        self.normaliser[block] = self._log_mass(rows, log_probs, contexts.next_titles)
        worth = np.where(log_probs > -np.inf, self.world.satisfaction(users), -np.inf)
        best = np.argpartition(-worth, self.best.shape[1] - 1, axis=1)[:, : self.best.shape[1]]
        order = np.argsort(-np.take_along_axis(worth, best, axis=1), axis=1)
        self.best_titles[block] = np.take_along_axis(best, order, axis=1)
        self.best[block] = np.take_along_axis(worth, self.best_titles[block], axis=1)

    def _log_mass(self, rows: Rows, log_probs: FloatArray, titles: Rows) -> FloatArray:
        """(n,): the utility of some title, less its log-probability, (n, I)."""
        _, pull = self.pairs.at(rows, titles)
        return self.utility(rows, titles, pull) - np.take_along_axis(log_probs, titles[:, None], axis=1)[:, 0]


def sample_one(
    noise: RewardNoise, satisfaction: float, free_time: float, duration: float, u: list[float]
) -> tuple[float, float, bool]:
    """Score, watched fraction and exogenous flag of one event."""
    outcome = noise.sample(np.float64(satisfaction), np.float64(free_time), np.float64(duration), np.array(u))
    return float(outcome.score), float(outcome.watched), bool(outcome.exogenous)
