"""The users of a world, prepared once so that a step looks up a few numbers a user."""

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from recsim_gr.behaviour import FloatArray, Users, acceptance_probability
from recsim_gr.envs.bandit import Observation, Played, Rows, at, seen_before
from recsim_gr.noise import Exposure, WatchTimeNoise
from recsim_gr.observations import LOWEST_SCORE
from recsim_gr.world_base import WorldBase, outside_utility

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


class Standing(NamedTuple):
    """What the logging policy makes of n histories, beside the utilities of their users.

    Attributes:
        log_mass: (n,) log of the summed exp(utility) of the titles that can be chosen.
        carried: (n, d) what the last titles carry over (`WorldBase.carried`), None where ``order_effect`` is off.
    """

    log_mass: FloatArray
    carried: FloatArray | None = None


class Population:
    """What a step needs of each user: history, epoch, free time, the logging policy's normaliser, the best titles.

    Args:
        world: the world.
        users: (P,) its users, a row each.
        pairs: the same users.
        n_best: how many of the titles that are worth most are kept of each user; an episode that can use up so many
            asks for no more.
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
        self.next_time = np.empty(n, dtype=np.float32)  # hours at which the next title is chosen
        self.normaliser = np.empty(n)  # `Standing.log_mass` after the history
        self.best_titles = np.empty((n, n_best), dtype=np.int64)
        self.best = np.empty((n, n_best))  # what recommending them is worth, descending
        self._conformity = 1.0 - self.discernment
        self._missing = np.ones(-(-n // BLOCK_USERS), dtype=bool)
        self._complete = False
        self._prepare_options()

    def _prepare_options(self) -> None:
        """Further columns, of users of worlds whose options ask for them."""
        world, n = self.world, len(self.users)
        config, uses = world.config, world.noise.uses
        self.accept = config.accept
        self.outside = np.empty(n if config.accept > 0 else 0)
        self.mood = np.empty(n if "mood" in uses else 0)
        self.carried = np.empty((n, world.directions.shape[1])) if config.order_effect > 0 else None
        self._out: NDArray[np.int8] | None = None  # (n_epochs, I): whether a title is out; None where all are
        if world.catalogue.has_releases:
            self._out = (~world.catalogue.unreleased(np.arange(config.n_epochs))).view(np.int8)
        self.plain = config.accept == 0 and config.order_effect == 0

    def require(self, rows: Rows) -> None:
        """Makes sure that the users at ``rows`` are prepared."""
        if self._complete:
            return
        for block in np.unique(rows // BLOCK_USERS):
            if self._missing[block]:
                self._prepare(slice(block * BLOCK_USERS, min((block + 1) * BLOCK_USERS, len(self.users))))
                self._missing[block] = False
        self._complete = not self._missing.any()

    def standing(self, rows: Rows) -> Standing:
        """Of (n,) users after their histories; the arrays are the caller's own."""
        return Standing(self.normaliser.take(rows), None if self.carried is None else self.carried.take(rows, axis=0))

    def standing_after(self, rows: Rows, histories: Rows, times: NDArray[Any], now: NDArray[Any]) -> Standing:
        """Of (n,) users after other histories than their own, (n, L), summed over the whole catalogue.

        Args:
            rows: (n,) users.
            histories: (n, L) titles, padded with ``n_titles``.
            times: (n, L) hours at which they were seen.
            now: (n,) hours at which the next is chosen.
        """
        log_mass = np.empty(len(rows))
        carried = None if self.carried is None else self.world.carried(histories, times, now)
        for start in range(0, len(rows), BLOCK_USERS):
            block = slice(start, start + BLOCK_USERS)
            users = self.users[rows[block]]
            log_probs = self.world.logging_log_probs(users, histories[block], times[block], now[block])
            some = log_probs.argmax(axis=1)
            log_mass[block] = self._log_mass(rows[block], some, log_probs, None if carried is None else carried[block])
        return Standing(log_mass, carried)

    def invalid(self, rows: Rows, titles: Rows, histories: NDArray[Any]) -> Rows:
        """Which of (n,) titles cannot be chosen after (n, L) histories: their places, ascending."""
        seen = seen_before(titles, histories)
        if self._out is None:
            return seen
        not_out = np.flatnonzero(self.world.release.take(titles) > self.epoch.take(rows))
        return np.union1d(seen, not_out)

    def action_mask(self, rows: Rows, histories: NDArray[Any]) -> NDArray[np.int8]:
        """(n, I): 1 for titles that can be chosen after (n, L) histories."""
        n, n_titles = len(rows), self.world.n_titles
        mask = np.ones((n, n_titles), np.int8) if self._out is None else self._out.take(self.epoch.take(rows), axis=0)
        places = histories + n_titles * np.arange(n)[:, None]
        mask.reshape(-1)[places[histories < n_titles] if histories.max() == n_titles else places] = 0
        return mask

    def action_mask_one(self, row: int) -> NDArray[np.int8]:
        """(I,): the same of one user after the history."""
        self.require_one(row)
        mask = np.ones(self.world.n_titles, np.int8) if self._out is None else self._out[self.epoch.item(row)].copy()
        mask[self.titles[row, : self.length.item(row)]] = 0
        return mask

    def show(self, rows: Rows, titles: Rows, u: FloatArray, invalid: Rows, standing: Standing) -> Played:
        """Shows each user a title.

        Args:
            rows: (n,) users.
            titles: (n,).
            u: (n, uniforms_per_exposure), the last for acceptance where that is on.
            invalid: the places where the title cannot be chosen.
            standing: of the histories; its arrays are spoilt.
        """
        truth, pull = self.pairs.at(rows, titles)
        places = self._places(rows, titles)
        utility = self._utility(rows, places, pull)
        satisfaction, duration = truth.astype(np.float64), self.world.durations.take(titles)
        exposure = Exposure(satisfaction, self.free_time.take(rows), duration, *self._circumstances(rows, places))
        outcome = self.world.noise.sample(exposure, u[:, : self.world.noise.uniforms_per_event])
        info = {
            "satisfaction": satisfaction,
            "watch_minutes": outcome.watched * duration,
            "duration_minutes": duration,
            "exogenous": outcome.exogenous,
        }
        unwatched = invalid
        if self.accept > 0:
            accepted = u[:, -1] < acceptance_probability(utility, self.outside.take(rows), self.accept)
            accepted[invalid] = False
            info["accepted"], unwatched = accepted, np.flatnonzero(~accepted)
        for values, nothing in (
            (outcome.score, LOWEST_SCORE),
            (satisfaction, LOWEST_SCORE),
            (info["watch_minutes"], 0.0),
            (outcome.exogenous, False),
        ):
            values[unwatched] = nothing
        info["propensity"] = self._propensity(utility, titles, standing)
        info["propensity"][invalid] = 0.0
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

    def show_one(self, row: int, title: int, u: list[float]) -> tuple[float, dict[str, Any]]:
        """`show` to one user after the history, with the regret; for worlds that are `plain`."""
        self.require_one(row)
        epoch, duration, best = self.epoch.item(row), self.world.durations.item(title), self.best.item(row, 0)
        invalid = title in self.titles[row].tolist() or self.world.release.item(title) > epoch
        if invalid:
            satisfaction, propensity, watched, exogenous, score = LOWEST_SCORE, 0.0, 0.0, False, LOWEST_SCORE
        else:
            satisfaction, pull = self.pairs.at_one(row, title)
            score, watched, exogenous = self._sample_one(row, title, satisfaction, duration, u)
            trend = self._conformity.item(row) * self.world.appeal.item(epoch, title)
            utility = self.world.config.pull_strength * pull + trend
            propensity = float(np.exp(min(utility - self.normaliser.item(row), 0.0)))
        return score, {
            "satisfaction": satisfaction,
            "watch_minutes": watched * duration,
            "duration_minutes": duration,
            "exogenous": exogenous,
            "propensity": propensity,
            "best_satisfaction": best,
            "regret": best - satisfaction,
            "invalid": invalid,
        }

    def _sample_one(
        self, row: int, title: int, satisfaction: float, duration: float, u: list[float]
    ) -> tuple[float, float, bool]:
        """Score, watched fraction and exogenous flag of one event."""
        noise, free_time = self.world.noise, self.free_time.item(row)
        if isinstance(noise, WatchTimeNoise):
            return noise.sample_one(satisfaction, free_time, duration, u)
        allure = self.world.allure.item(self.epoch.item(row), title) if "allure" in noise.uses else 0.0
        mood = self.mood.item(row) if "mood" in noise.uses else 0.0
        exposure = Exposure(*map(np.asarray, (satisfaction, free_time, duration, allure, mood)))
        outcome = noise.sample(exposure, np.array(u))
        return float(outcome.score), float(outcome.watched), bool(outcome.exogenous)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _prepare(self, block: slice) -> None:
        users, rows = self.users[block], np.arange(block.start, block.stop)
        contexts = self.world.contexts_of(users)
        seen, now = contexts.observations, contexts.next_times
        self.titles[block], self.scores[block], self.times[block] = seen.titles, seen.scores, seen.times
        self.length[block], self.next_time[block] = seen.length, now
        if self.accept > 0:
            self.outside[block] = outside_utility(self.world.utilities(users))
        if len(self.mood) > 0:
            self.mood[block] = np.take_along_axis(self.world.moods(users), seen.length[:, None], axis=1)[:, 0]
        carried = None
        if self.carried is not None:
            carried = self.carried[block] = self.world.carried(seen.titles, seen.times, now)
        log_probs = self.world.logging_log_probs(users, seen.titles, seen.times, now)
        self.normaliser[block] = self._log_mass(rows, contexts.next_titles, log_probs, carried)
        worth = np.where(log_probs > -np.inf, self.world.worth(users), -np.inf)
        best = np.argpartition(-worth, self.best.shape[1] - 1, axis=1)[:, : self.best.shape[1]]
        order = np.argsort(-np.take_along_axis(worth, best, axis=1), axis=1)
        self.best_titles[block] = np.take_along_axis(best, order, axis=1)
        self.best[block] = np.take_along_axis(worth, self.best_titles[block], axis=1)

    def _log_mass(self, rows: Rows, titles: Rows, log_probs: FloatArray, carried: FloatArray | None) -> FloatArray:
        """(n,): the utility of some title that can be chosen, less its log-probability, from (n, I)."""
        _, pull = self.pairs.at(rows, titles)
        utility = self._utility(rows, self._places(rows, titles), pull)
        return (
            utility + self._carry_over(titles, carried) - np.take_along_axis(log_probs, titles[:, None], axis=1)[:, 0]
        )

    def _places(self, rows: Rows, titles: Rows) -> Rows:
        """(n,): of (epoch, title) in the flattened tables of an epoch a row."""
        places = self.epoch.take(rows)
        places *= self.world.n_titles
        places += titles
        return places

    def _utility(self, rows: Rows, places: Rows, pull: FloatArray) -> FloatArray:
        """(n,): what `WorldBase.utilities` has at (user, title), from the pull there, which is spoilt."""
        trend = self.world.appeal.take(places)
        trend *= self._conformity.take(rows)
        pull *= self.world.config.pull_strength
        pull += trend
        return pull

    def _carry_over(self, titles: Rows, carried: FloatArray | None) -> FloatArray | float:
        """(n,): what `WorldBase.carry_over` has at (history, title)."""
        if carried is None:
            return 0.0
        products: FloatArray = np.einsum("nd,nd->n", carried, self.world.directions.take(titles, axis=0))
        return self.world.config.order_effect * products

    def _propensity(self, utility: FloatArray, titles: Rows, standing: Standing) -> FloatArray:
        """(n,) of titles that can be chosen."""
        propensity = standing.log_mass
        np.subtract(utility, propensity, out=propensity)
        if standing.carried is not None:
            propensity += self._carry_over(titles, standing.carried)
        np.minimum(propensity, 0.0, out=propensity)
        return np.exp(propensity, out=propensity)

    def _circumstances(self, rows: Rows, places: Rows) -> tuple[FloatArray, ...]:
        """Allure and mood, where the noise reads them."""
        uses = self.world.noise.uses
        if not uses:
            return ()
        nothing = np.zeros(())
        allure = self.world.allure.take(places) if "allure" in uses else nothing
        return allure, self.mood.take(rows) if "mood" in uses else nothing
