"""What every world can do: the logging policy, logs, contexts, exact propensities, noise and scoring.

`WorldBase` holds all that a simulated and a replayed world share. `recsim_gr.world.World` supplies simulated users and
titles; `recsim_gr.replay.ReplayWorld` real ones.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtr, ndtri

from recsim_gr import configs, metrics
from recsim_gr.behaviour import (
    Behaviour,
    BehaviourConfig,
    FloatArray,
    Users,
    acceptance_probability,
    n_cold,
)
from recsim_gr.catalogue import Catalogue
from recsim_gr.choosing import LEAST_BLOCK_USERS, RoughUtilities, Rows, choose
from recsim_gr.debiasing import scored_by_quantile
from recsim_gr.errors import ConfigError
from recsim_gr.log import InteractionLog
from recsim_gr.noise import (
    Exposure,
    RewardNoise,
    Scores,
    moods,
    noise_model,
)
from recsim_gr.observations import LOWEST_SCORE, Contexts, Observations, seen_mask
from recsim_gr.policy import Policy
from recsim_gr.randomness import generator, uniforms
from recsim_gr.scoring import Evaluation, Judge, evaluate

CHUNK_USERS, CHUNK_CELLS = 2_048, 2_048_000
"""Users handled at a time, and users × titles where all titles of each are looked at: bounds memory, and changes no
result."""

NEW_SESSION_PROBABILITY, HOURS_WITHIN_SESSION, HOURS_BETWEEN_SESSIONS = 0.25, 0.7, 22.0
"""Times of events: one event in four opens a new session, about a day later; the others follow at the length of a
title. Times carry information where ``order_effect`` is on, and where moods drift."""

CARRY_OVER_HOURS = 2.0
"""e-folding time of what a title carries over to later choices (``order_effect``): through a session, not to the next
day."""

USERS_PER_SPLIT = 1_000_000_000
USERS_PER_CONTEXT_SEED = 1_000_000
"""Simulated users are unlimited: each split owns a block of ids, each seed of `contexts` a part of the block."""


class Reliability(NamedTuple):
    """Squared correlations that carry the sign of the correlation, in [-1, 1]."""

    pooled: float
    within_user: float


class Events(NamedTuple):
    """Drawn events of n users, (n, T) each, in the order in which they happened.

    Attributes:
        titles: int64, no repeats in a row.
        log_propensities: log-probability of each title given those before it.
        hours: since the epoch began.
        outcome: scores, watched fractions and exogenous flags.
    """

    titles: NDArray[np.int64]
    log_propensities: FloatArray
    hours: FloatArray
    outcome: Scores


class WorldBase(ABC):
    """What every world can do. All of it is a function of the config; nothing is stored a user.

    Users are named by integers; `users` hands them out, a split at a time, and no user is in two splits.
    """

    env_id: ClassVar[str]
    """The id of the Gymnasium environment over this kind of world."""
    config: BehaviourConfig

    # -- what a kind of world supplies ----------------------------------------------------------------------------

    @property
    @abstractmethod
    def n_titles(self) -> int:
        """I, the size of the catalogue."""

    @abstractmethod
    def users(self, split: str, n: int, offset: int = 0) -> Users:
        """(n,) ids of users of a split, the same for the same arguments.

        Raises:
            ConfigError: no such split, or a world of real users that has not so many.
        """

    @abstractmethod
    def in_split(self, users: Users, split: str) -> NDArray[np.bool_]:
        """(n,) whether each user belongs to the split."""

    @abstractmethod
    def satisfaction(self, users: Users) -> NDArray[np.float32]:
        """(n, I) in [1, 5]: the truth, s(u, i)."""

    def satisfaction_with(self, users: Users, titles: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n, T): `satisfaction` of each user with (n, T) titles, bit for bit, without the rest of the catalogue."""
        return np.take_along_axis(self.satisfaction(users), titles, axis=1)

    @abstractmethod
    def pull(self, users: Users) -> FloatArray:
        """(n, I), a new array: what attracts each user, of unit variance over titles and users, before κ."""

    @property
    @abstractmethod
    def directions(self) -> FloatArray:
        """(I, d) unit vectors: titles that point the same way are alike, and carry over to each other."""

    @property
    def genres(self) -> NDArray[np.int64]:
        """(I,) the genre of each title; one genre where the data have none."""
        return np.zeros(self.n_titles, dtype=np.int64)

    # -- titles ---------------------------------------------------------------------------------------------------

    @cached_property
    def durations(self) -> FloatArray:
        """(I,) minutes."""
        z = generator(self.config.seed, "durations").standard_normal(self.n_titles)
        return self.config.duration_median_minutes * np.exp(self.config.duration_log_deviation * z)

    @cached_property
    def release(self) -> NDArray[np.int64]:
        """(I,) the epoch that each title comes out in: 0 for all but ``cold_share`` of them, which are spread evenly
        over the later epochs."""
        late = generator(self.config.seed, "release").permutation(self.n_titles)[: n_cold(self.config, self.n_titles)]
        release = np.zeros(self.n_titles, dtype=np.int64)
        release[late] = 1 + np.arange(len(late)) % max(self.config.n_epochs - 1, 1)
        return release

    @cached_property
    def catalogue(self) -> Catalogue:
        """What everyone may know of the titles."""
        return Catalogue(self.genres, self.durations.astype(np.float32), self.release)

    @cached_property
    def allure(self) -> FloatArray:
        """(n_epochs, I): the appeal of each title on its normal scale; AR(1), standard normal over titles."""
        normals = generator(self.config.seed, "appeal").standard_normal((self.config.n_epochs, self.n_titles))
        rho = self.config.appeal_persistence
        path = normals.copy()
        for epoch in range(1, len(path)):
            path[epoch] = rho * path[epoch - 1] + np.sqrt(1.0 - rho**2) * normals[epoch]
        return path

    @cached_property
    def appeal(self) -> FloatArray:
        """(n_epochs, I): what makes a title popular in each epoch; exponential margins over `allure`, its copula."""
        return -self.config.appeal_tail * np.log(ndtr(-self.allure))

    @cached_property
    def noise(self) -> RewardNoise:
        """The noise model with its dial."""
        model = noise_model(self.config.noise_model, self.config.reward_noise)
        return scored_by_quantile(self, model) if self.config.duration_debiased else model

    # -- users ----------------------------------------------------------------------------------------------------

    def behaviour(self, users: Users) -> Behaviour:
        """Epoch, discernment and free time of users, a row each."""
        u = uniforms(self.config.seed, "behaviour", users, 3)
        test = self.in_split(users, "test")
        early = np.floor(u[:, 0] * max(self.config.n_epochs - 1, 1)).astype(np.int64)
        discernment = betaincinv(self.config.discernment_alpha, self.config.discernment_beta, u[:, 1])
        minutes = self.config.free_time_median_minutes
        free_time = minutes * np.exp(self.config.free_time_log_deviation * ndtri(u[:, 2]))
        return Behaviour(np.where(test, self.config.n_epochs - 1, early), discernment, free_time)

    def history_lengths(self, users: Users) -> NDArray[np.int64]:
        """(n,) events logged of each user, 1 to ``history_length``."""
        config = self.config
        if config.history_median == 0:
            return np.full(len(users), config.history_length, dtype=np.int64)
        z = ndtri(uniforms(config.seed, "history length", users, 1)[:, 0])
        length = np.rint(config.history_median * np.exp(config.history_log_deviation * z))
        return np.clip(length, 1, config.history_length).astype(np.int64)

    def utilities(self, users: Users) -> FloatArray:
        """(n, I) float64: κ·pull + (1−δ)·appeal of the user's epoch, -inf for titles that are not out yet; the logging
        policy is their softmax (but for what earlier titles carry over, see `carry_over`)."""
        out = np.empty((len(users), self.n_titles))
        self.utility_rows(users)(slice(0, len(users)), out, np.empty_like(out))
        return out

    def utility_rows(self, users: Users) -> Rows:
        """`utilities` a block of users at a time: what does not depend on titles is worked out here, once."""
        who, pull = self.behaviour(users), self.pull_rows(users)
        leaning = (1.0 - who.discernment)[:, None]

        def fill(part: slice, out: FloatArray, scratch: FloatArray) -> None:
            pull(part, out, scratch)
            out *= self.config.pull_strength
            np.take(self.appeal, who.epoch[part], axis=0, out=scratch, mode="clip")  # "raise" would copy
            np.multiply(scratch, leaning[part], out=scratch)
            np.add(out, scratch, out=out)
            if self.config.cold_share > 0:
                out[self.catalogue.unreleased(who.epoch[part])] = -np.inf

        return fill

    def rough_utilities(self, users: Users) -> RoughUtilities | None:
        """Utilities in float32, where a world has them more cheaply and float32 is enough."""
        return None

    def pull_rows(self, users: Users) -> Rows:
        """`pull` a block of users at a time."""

        def fill(part: slice, out: FloatArray, scratch: FloatArray) -> None:
            out[...] = self.pull(users[part])

        return fill

    def carry_over(self, histories: NDArray[np.int64], times: NDArray[Any], now: NDArray[Any]) -> FloatArray:
        """What the titles of the last hours add to every title's utility: ω·Σ_j exp(−(now − t_j)/2 h)·⟨v_j, v_i⟩.

        Args:
            histories: (n, L) titles seen, padded with ``n_titles``.
            times: (n, L) hours at which they were.
            now: (n,) hours at which the next is chosen.

        Returns:
            (n, I).
        """
        return self.config.order_effect * products(self.carried(histories, times, now), self.directions)

    def carried(self, histories: NDArray[np.int64], times: NDArray[Any], now: NDArray[Any]) -> FloatArray:
        """(n, d): Σ_j exp(−(now − t_j)/2 h)·v_j, whose products with the titles' directions `carry_over` weighs."""
        vectors = np.concatenate([self.directions, np.zeros((1, self.directions.shape[1]))])  # padding carries nothing
        fading = np.exp(-np.maximum(np.asarray(now, dtype=np.float64)[:, None] - times, 0.0) / CARRY_OVER_HOURS)
        return np.einsum("nl,nld->nd", fading, vectors[histories])

    def acceptance(self, users: Users) -> FloatArray:
        """(n, I): P(a recommended title is watched); 1 where the dial ``accept`` is 0."""
        if self.config.accept == 0:
            return np.ones((len(users), self.n_titles))
        utilities = self.utilities(users)
        return acceptance_probability(utilities, outside_utility(utilities)[:, None], self.config.accept)

    def worth(self, users: Users) -> NDArray[np.float32]:
        """(n, I): what recommending a title is truly worth: its satisfaction, or the lowest where it is abandoned."""
        satisfaction = self.satisfaction(users)
        if self.config.accept == 0:
            return satisfaction
        gained = self.acceptance(users) * (satisfaction.astype(np.float64) - LOWEST_SCORE)
        return (LOWEST_SCORE + gained).astype(np.float32)

    def expected_score(self, users: Users) -> FloatArray:
        """(n, I): E[score | u, i] of a recommendation, in closed form; abandoned ones score the lowest."""
        watched = self.expected_score_watched(users)
        if self.config.accept == 0:
            return watched
        return LOWEST_SCORE + self.acceptance(users) * (watched - LOWEST_SCORE)

    def expected_score_watched(self, users: Users) -> FloatArray:
        """(n, I): E[score | u, i] of a title that is watched, as the logged ones are."""
        return self.noise.expected(self.exposure(users))

    def exposure(self, users: Users) -> Exposure:
        """The facts of every title, (n, I) or broadcasting to it; the mood of the moment is left out."""
        who = self.behaviour(users)
        allure = self.allure[who.epoch] if "allure" in self.noise.uses else np.zeros(())
        satisfaction = self.satisfaction(users).astype(np.float64)
        return Exposure(satisfaction, who.free_time[:, None], self.durations[None], allure)

    def logging_log_probs(
        self,
        users: Users,
        histories: NDArray[np.int64],
        times: NDArray[Any] | None = None,
        now: NDArray[Any] | None = None,
    ) -> FloatArray:
        """Log-propensity of every title given what was seen.

        Args:
            users: (n,).
            histories: (n, L) titles seen, padded with ``n_titles``; their order does not matter, unless
                ``order_effect`` is on.
            times: (n, L) hours at which they were seen; needed where ``order_effect`` is on, and only there.
            now: (n,) hours at which the next is chosen; likewise.

        Returns:
            (n, I) float64, -inf for titles already seen or not out yet.

        Raises:
            ConfigError: ``order_effect`` is on, and times are missing; or histories that are none.
        """
        histories = np.asarray(histories)
        if histories.ndim != 2 or len(histories) != len(users):
            raise ConfigError(
                f"histories must be (users, events), a row for each of {len(users)}, got {histories.shape}"
            )
        if histories.size and not 0 <= histories.min() <= histories.max() <= self.n_titles:
            wrong = histories.min() if histories.min() < 0 else histories.max()
            raise ConfigError(f"histories hold titles 0 to {self.n_titles - 1}, padding {self.n_titles}, got {wrong}")
        utilities = self.utilities(users)
        if self.config.order_effect > 0 and histories.shape[1] > 0:
            if times is None or now is None:
                raise ConfigError("order_effect is on: logging_log_probs needs times and now to know what carries over")
            utilities += self.carry_over(histories, times, now)
        utilities[seen_mask(histories, self.n_titles)] = -np.inf
        mass = _log_sum_exp(utilities)[:, None]
        return utilities - np.where(np.isfinite(mass), mass, 0.0)  # nothing left unseen: -inf, not NaN

    @property
    def uniforms_per_exposure(self) -> int:
        """How many random numbers `sample_scores` takes: the noise's, and one for acceptance where that is on."""
        return self.noise.uniforms_per_event + (self.config.accept > 0)

    def sample_scores(self, users: Users, titles: NDArray[np.int64], u: FloatArray) -> Scores:
        """Scores of recommendations made after the history: of forced exposures, unless ``accept`` is on.

        Args:
            users: (n,).
            titles: (n,) the title each is shown.
            u: (n, uniforms_per_exposure) uniforms in (0, 1).
        """
        column = titles[:, None]
        satisfaction = self.satisfaction_with(users, column)
        after = self.history_lengths(users)[:, None]
        mood = np.take_along_axis(self.moods(users), after, axis=1) if "mood" in self.noise.uses else np.zeros(())
        drawn = self._outcome(users, satisfaction, column, mood, u[:, None, : self.noise.uniforms_per_event])
        outcome = Scores(drawn.score[:, 0], drawn.watched[:, 0], drawn.exogenous[:, 0])
        if self.config.accept == 0:
            return outcome
        accepted = u[:, -1] < np.take_along_axis(self.acceptance(users), column, axis=1)[:, 0]
        return Scores(
            np.where(accepted, outcome.score, LOWEST_SCORE),
            np.where(accepted, outcome.watched, 0.0),
            outcome.exogenous & accepted,
        )

    # -- logs and contexts ----------------------------------------------------------------------------------------

    def draw_events(self, users: Users, length: int) -> Events:
        """Histories of ``length`` events each, at most ``history_length`` + 1.

        A history is a Plackett–Luce sequence: the logging policy's choices, one after the other, without repetition.
        Where histories vary in length, the events past a user's own are what the user would have gone on with.
        """
        config = self.config
        hours = self.hours(users)[:, :length]
        titles, log_propensities = choose(self, users, hours)
        per_event = self.noise.uniforms_per_event
        u = uniforms(config.seed, "noise", users, (config.history_length + 1) * per_event)
        u = u.reshape(len(users), -1, per_event)[:, :length]
        satisfaction = self.satisfaction_with(users, titles)
        mood = self.moods(users)[:, :length] if "mood" in self.noise.uses else np.zeros(())
        return Events(titles, log_propensities, hours, self._outcome(users, satisfaction, titles, mood, u))

    def generate_log(
        self,
        n_users: int,
        split: str = "train",
        *,
        expose_propensities: bool = False,
        chunk_users: int = CHUNK_USERS,
        offset: int = 0,
    ) -> InteractionLog:
        """Logs users of a split, ``history_length`` events each (or fewer, where lengths vary).

        Args:
            n_users: how many, at least 1.
            split: which group of users.
            expose_propensities: whether the log carries the logging policy's propensities.
            chunk_users: users handled at a time; changes memory, never the result.
            offset: how many users of the split are passed over.

        Raises:
            ConfigError: no such split, or not so many users.
        """
        if chunk_users < 1:
            raise ConfigError(f"chunk_users must be at least 1, got {chunk_users}")
        users = self.users(split, n_users, offset)
        chunks = [self._log_columns(users[i : i + chunk_users]) for i in range(0, len(users), chunk_users)]
        columns = {name: np.concatenate([chunk.pop(name) for chunk in chunks]) for name in list(chunks[0])}
        for values in columns.values():
            values.flags.writeable = False  # the log need not copy them
        propensities = columns.pop("propensities")
        return InteractionLog(
            **columns,
            n_titles=self.n_titles,
            bounded_scores=self.noise.bounded,
            propensities=propensities if expose_propensities else None,
            provenance={"world": type(self).__name__, "split": split, "config": configs.to_dict(self.config)},
            catalogue=self.catalogue,
        )

    def _log_columns(self, users: Users) -> dict[str, NDArray[Any]]:
        """The columns of a log of these users, in their types: what is kept of a chunk while others are drawn."""
        length, lengths = self.config.history_length, self.history_lengths(users)
        events = self.draw_events(users, length)
        full = bool((lengths == length).all())
        logged = (np.arange(length) < lengths[:, None]).ravel()  # which events of full histories are in the log

        def column(values: NDArray[Any]) -> NDArray[Any]:
            return values.ravel() if full else values.ravel()[logged]

        titles = column(events.titles)
        durations = self.durations[titles].astype(np.float32)
        return {
            "user": np.repeat(users, lengths),
            "epoch": np.repeat(self.behaviour(users).epoch, lengths),
            "step": column(np.tile(np.arange(length), (len(users), 1))),
            "hours": column(events.hours).astype(np.float32),
            "title": titles,
            "duration_minutes": durations,
            "watch_minutes": column(events.outcome.watched).astype(np.float32) * durations,
            "score": column(events.outcome.score).astype(np.float32),
            "propensities": np.exp(column(events.log_propensities)),
        }

    def contexts(self, n: int, seed: int = 0, split: str = "test") -> Contexts:
        """Users of a split after a full history, and what they really chose next.

        Args:
            n: how many users.
            seed: another seed gives other users of the same split.
            split: ``test`` by default, whose users live in the last epoch.

        Raises:
            ConfigError: no such split, or not so many users.
        """
        return self.contexts_of(self._sample_users(split, n, seed))

    def contexts_of(self, users: Users) -> Contexts:
        """The contexts of the given users."""
        length, rows = self.history_lengths(users), np.arange(len(users))
        chunks = [users[i : i + CHUNK_USERS] for i in range(0, len(users), CHUNK_USERS)]
        events = [self.draw_events(chunk, self.config.history_length + 1) for chunk in chunks]
        titles = np.concatenate([e.titles for e in events])
        scores = np.concatenate([e.outcome.score for e in events]).astype(np.float32)
        times = np.concatenate([e.hours for e in events]).astype(np.float32)
        past = np.arange(self.config.history_length) < length[:, None]
        observations = Observations(
            titles=np.where(past, titles[:, :-1], self.n_titles),
            scores=np.where(past, scores[:, :-1], np.float32(0)),
            times=np.where(past, times[:, :-1], np.float32(0)),
            length=length,
            epoch=np.concatenate([self.behaviour(c).epoch for c in chunks]),
            n_titles=self.n_titles,
            catalogue=self.catalogue,
        )
        return Contexts(observations, users, titles[rows, length], scores[rows, length], times[rows, length])

    # -- measures and scoring -------------------------------------------------------------------------------------

    def reliability(self, n_users: int = 2_000) -> Reliability:
        """corr²(score, satisfaction) under the logging policy, with its sign; measured on training users. Within a
        user it is NaN where histories are one event long."""
        users = self.users("train", self.at_most("train", n_users))
        score, truth = [], []
        for start in range(0, len(users), CHUNK_USERS):
            chunk = users[start : start + CHUNK_USERS]
            events = self.draw_events(chunk, self.config.history_length)
            truth.append(self.satisfaction_with(chunk, events.titles).astype(np.float64))
            score.append(events.outcome.score)
        x, y = np.concatenate(score), np.concatenate(truth)
        lengths = self.history_lengths(users)
        logged = np.arange(x.shape[1]) < lengths[:, None]
        pooled = metrics.signed_squared_correlation(x[logged], y[logged])
        if lengths.max() == 1:
            return Reliability(pooled, float("nan"))
        x, y = (z - (z * logged).sum(axis=1, keepdims=True) / lengths[:, None] for z in (x, y))
        return Reliability(pooled, metrics.signed_squared_correlation(x[logged], y[logged]))

    def alignment(self, n_users: int = 2_000) -> float:
        """corr²(E[score], satisfaction) within user, with its sign, titles weighted by the logging policy's first
        choice: what a perfect model of the score could know of the truth. Exact for the users it averages."""
        users = self.users("train", self.at_most("train", n_users))
        sums = np.zeros(3)
        size = max(LEAST_BLOCK_USERS, min(CHUNK_USERS, CHUNK_CELLS // self.n_titles))
        for start in range(0, len(users), size):
            chunk = users[start : start + size]
            weight = np.exp(self.logging_log_probs(chunk, np.empty((len(chunk), 0), dtype=np.int64)))
            x, y = self.expected_score_watched(chunk), self.satisfaction(chunk).astype(np.float64)
            x = x - (weight * x).sum(axis=1, keepdims=True)
            y = y - (weight * y).sum(axis=1, keepdims=True)
            sums += [(weight * x * y).sum(), (weight * x * x).sum(), (weight * y * y).sum()]
        covariance, spread = sums[0], sums[1] * sums[2]
        return float(np.sign(covariance) * covariance**2 / spread) if spread > 0 else 0.0

    def evaluate(self, agent: Policy, n_users: int = 2_000, seed: int = 0, judge: Judge | None = None) -> Evaluation:
        """Scores an agent on ``n_users`` test contexts, see `recsim_gr.scoring.evaluate`.

        Raises:
            ConfigError: an agent that knows another world than this.
        """
        known = getattr(agent, "world", None)
        if isinstance(known, WorldBase) and known.config != self.config:
            raise ConfigError(
                f"{type(agent).__name__} knows another world than the one that scores it; make it of this one"
            )
        return evaluate(self, agent, self.contexts(n_users, seed), judge=judge)

    # -- inside ---------------------------------------------------------------------------------------------------

    def moods(self, users: Users) -> FloatArray:
        """(n, history_length + 1): how lenient each user is at each event, where the noise model asks for it."""
        u = uniforms(self.config.seed, "mood", users, self.config.history_length + 1)
        return moods(self.hours(users), u)

    def hours(self, users: Users) -> FloatArray:
        """(n, history_length + 1) hours since the epoch began, of each event and of the recommendation after a full
        history; gaps from a mixture of two exponentials."""
        n_events = self.config.history_length + 1
        u = uniforms(self.config.seed, "times", users, 2 * n_events).reshape(len(users), n_events, 2)
        mean = np.where(u[..., 0] < NEW_SESSION_PROBABILITY, HOURS_BETWEEN_SESSIONS, HOURS_WITHIN_SESSION)
        return np.cumsum(-mean * np.log1p(-u[..., 1]), axis=1)

    def _outcome(
        self,
        users: Users,
        satisfaction: NDArray[np.float32],
        titles: NDArray[np.int64],
        mood: FloatArray,
        u: FloatArray,
    ) -> Scores:
        """Scores of (n, T) events whose satisfaction is given."""
        who = self.behaviour(users)
        allure = self.allure[who.epoch[:, None], titles] if "allure" in self.noise.uses else np.zeros(())
        exposure = Exposure(
            satisfaction.astype(np.float64), who.free_time[:, None], self.durations[titles], allure, mood
        )
        return self.noise.sample(exposure, u)

    def at_most(self, split: str, n: int) -> int:
        """``n``, or as many users as the split has."""
        return n

    def _sample_users(self, split: str, n: int, seed: int) -> Users:
        """(n,) users of a split, others for another seed."""
        require_integers(n, seed)
        if n > USERS_PER_CONTEXT_SEED or seed < 0:
            limit = f"at most {USERS_PER_CONTEXT_SEED} a seed, and a seed of 0 or more"
            raise ConfigError(f"contexts({n}, seed={seed}): must be {limit}")
        return self.users(split, n, offset=seed * USERS_PER_CONTEXT_SEED)


def require_integers(*counts: object) -> None:
    """Refuses what is no whole number: numbers of users and seeds are not rounded.

    Raises:
        ConfigError: says what was got.
    """
    for count in counts:
        if not isinstance(count, Integral) or isinstance(count, bool):
            raise ConfigError(f"numbers of users, offsets and seeds must be integers, got {count!r}")


def products(rows: FloatArray, columns: FloatArray, out: FloatArray | None = None) -> FloatArray:
    """(n, I) inner products of (n, d) and (I, d), each row the same whatever rows stand beside it.

    BLAS chooses its kernel by the number of rows, so the last bits of a user would depend on the chunk.
    """
    result: FloatArray = np.einsum("nd,di->ni", rows, np.ascontiguousarray(columns.T), out=out)
    return result


def outside_utility(utilities: FloatArray) -> FloatArray:
    """(n,) of (n, I): log of the mean of exp(utility) over the titles that are out, what else there is for a user."""
    return _log_sum_exp(utilities) - np.log(np.isfinite(utilities).sum(axis=1))


def _log_sum_exp(values: FloatArray) -> FloatArray:
    """(n,) of (n, I); -inf for a row of nothing but -inf."""
    top = values.max(axis=1)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return safe + np.log(np.exp(values - safe[:, None]).sum(axis=1))
