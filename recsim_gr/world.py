"""Worlds: who the users are, what satisfies them, what they choose, and what is observed of it.

`WorldBase` holds all that a simulated and a replayed world share: the logging policy, logs, contexts, exact
propensities, noise and scoring. `World` supplies simulated users and titles; `recsim_gr.replay.ReplayWorld` real ones.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, expit, ndtr, ndtri

from recsim_gr import configs, metrics
from recsim_gr.configs import require
from recsim_gr.errors import ConfigError
from recsim_gr.log import InteractionLog
from recsim_gr.noise import NOISE_MODELS, RewardNoise, Scores, noise_model
from recsim_gr.observations import HIGHEST_SCORE, LOWEST_SCORE, Contexts, Observations, seen_mask
from recsim_gr.policy import Policy
from recsim_gr.randomness import generator, uniforms
from recsim_gr.scoring import Evaluation, Judge, evaluate

FloatArray = NDArray[np.float64]
Users = NDArray[np.int64]

SPLITS = ("train", "validation", "test", "judge")
"""Disjoint groups of users: what agents learn from, select on, are tested on, and what the judge learns from."""

CHUNK_USERS = 2_048
"""Users handled at a time: bounds memory at CHUNK_USERS × I × 8 bytes a temporary, and changes no result."""


@dataclass(frozen=True, kw_only=True)
class BehaviourConfig:
    """How users choose and what is observed of it: what simulated and replayed worlds have in common."""

    history_length: int = 20
    """Events logged a user, and the length of a test context: short enough for the quick preset, long enough that
    tastes can be inferred."""
    n_epochs: int = 4
    """Epochs; training, validation and judge users come from all but the last, test users from the last."""
    pull_strength: float = 2.0
    """κ, the weight of a user's pull in the choice. With the other defaults the logging policy's perplexity at 200
    titles is about 60: choices are personal, but far from predictable."""
    discernment_alpha: float = 0.5
    discernment_beta: float = 0.5
    """Beta law of discernment δ; (½, ½) is U-shaped: many users choose almost only what they will love, as many
    follow trends and outside suggestions, and few are in between."""
    appeal_tail: float = 1.0
    """Base appeal is exponential with this mean, so that exp(appeal) is Pareto of tail index 1/appeal_tail; 1 is
    Zipf's law, the popularity curve of most catalogues."""
    appeal_persistence: float = 0.8
    """AR(1) coefficient of appeal (on its Gaussian scale) from one epoch to the next: trends that outlive an epoch
    and are mostly gone after five."""
    duration_median_minutes: float = 40.0
    duration_log_deviation: float = 0.6
    """Log-normal durations; 40 minutes with 90 % between 15 and 107: episodes and films."""
    free_time_median_minutes: float = 40.0
    free_time_log_deviation: float = 0.5
    """Log-normal over users: mean free time τ of an exogenous session, of the order of a title's duration."""
    reward_noise: float = 0.5
    """ν, the dial of the noise model: the share of exogenous events under ``watch_time``."""
    noise_model: str = "watch_time"
    """Name of the noise model, see `recsim_gr.noise`."""
    seed: int = 0
    """Names the world: everything random in it follows from the seed."""

    def __post_init__(self) -> None:
        configs.require_finite_numbers(self)
        require(self.history_length >= 1, self, "history_length", "at least 1")
        require(self.n_epochs >= 1, self, "n_epochs", "at least 1")
        require(self.seed >= 0, self, "seed", "0 or more")
        require(0.0 <= self.reward_noise <= 1.0, self, "reward_noise", "between 0 and 1")
        known = tuple(NOISE_MODELS)  # a tuple: also what has no hash is refused by name
        require(self.noise_model in known, self, "noise_model", f"one of {', '.join(known)}")
        require(self.pull_strength >= 0, self, "pull_strength", "0 or more")
        require(self.appeal_tail >= 0, self, "appeal_tail", "0 or more")
        require(0.0 <= self.appeal_persistence <= 1.0, self, "appeal_persistence", "between 0 and 1")
        for name in ("discernment_alpha", "discernment_beta"):
            require(getattr(self, name) > 0, self, name, "positive")
        for name in ("duration", "free_time"):
            require(getattr(self, f"{name}_median_minutes") > 0, self, f"{name}_median_minutes", "positive")
            require(getattr(self, f"{name}_log_deviation") >= 0, self, f"{name}_log_deviation", "0 or more")


@dataclass(frozen=True, kw_only=True)
class WorldConfig(BehaviourConfig):
    """A simulated world."""

    n_titles: int = 1_000
    """I, the size of the catalogue."""
    taste_dimensions: int = 8
    """d of tastes, pulls and traits: more than a popularity bias, few enough to be inferred from 20 events."""
    n_genres: int = 10
    """Clusters of traits."""
    genre_spread: float = 0.6
    """Deviation of a title's traits around its genre's centre, whose length is 1, before normalisation: genres
    overlap."""
    quality_deviation: float = 0.5
    """Deviation of q, half of what personal taste contributes (1): quality matters, taste matters more."""
    leniency_deviation: float = 0.5
    """Deviation of b over users: a nuisance of the size of quality that no ranking can use."""
    satisfaction_slope: float = 1.25
    """a of the sigmoid: satisfaction under random exposure fills its range (deviation about 1 of 4) without
    piling up at the ends."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.n_titles >= 2, self, "n_titles", "at least 2")
        require(
            self.history_length < self.n_titles,
            self,
            "history_length",
            f"smaller than the catalogue ({self.n_titles} titles), since no title is seen twice",
        )
        require(self.taste_dimensions >= 1, self, "taste_dimensions", "at least 1")
        require(self.n_genres >= 1, self, "n_genres", "at least 1")
        for name in ("genre_spread", "quality_deviation", "leniency_deviation", "satisfaction_slope"):
            require(getattr(self, name) >= 0, self, name, "0 or more")


class Reliability(NamedTuple):
    """Squared correlations that carry the sign of the correlation, in [-1, 1]."""

    pooled: float
    within_user: float


class Behaviour(NamedTuple):
    """What moves a group of users beside their taste; a row a user.

    Attributes:
        epoch: (n,) int64.
        discernment: (n,) in [0, 1].
        free_time: (n,) minutes, the mean of an exogenous session.
    """

    epoch: NDArray[np.int64]
    discernment: FloatArray
    free_time: FloatArray


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

    @abstractmethod
    def pull(self, users: Users) -> FloatArray:
        """(n, I): what attracts each user, of unit variance over titles and users, before κ."""

    # -- titles ---------------------------------------------------------------------------------------------------

    @cached_property
    def durations(self) -> FloatArray:
        """(I,) minutes."""
        z = generator(self.config.seed, "durations").standard_normal(self.n_titles)
        return self.config.duration_median_minutes * np.exp(self.config.duration_log_deviation * z)

    @cached_property
    def appeal(self) -> FloatArray:
        """(n_epochs, I): what makes a title popular in each epoch; exponential margins, AR(1) through a copula."""
        normals = generator(self.config.seed, "appeal").standard_normal((self.config.n_epochs, self.n_titles))
        rho = self.config.appeal_persistence
        path = normals.copy()
        for epoch in range(1, len(path)):
            path[epoch] = rho * path[epoch - 1] + np.sqrt(1.0 - rho**2) * normals[epoch]
        return -self.config.appeal_tail * np.log(ndtr(-path))

    @cached_property
    def noise(self) -> RewardNoise:
        """The noise model with its dial."""
        return noise_model(self.config.noise_model, self.config.reward_noise)

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

    def utilities(self, users: Users) -> FloatArray:
        """(n, I) float64: κ·pull + (1−δ)·appeal of the user's epoch; the logging policy is their softmax."""
        who = self.behaviour(users)
        trend = (1.0 - who.discernment)[:, None] * self.appeal[who.epoch]
        return self.config.pull_strength * self.pull(users) + trend

    def expected_score(self, users: Users) -> FloatArray:
        """(n, I): E[score | u, i], in closed form."""
        free_time = self.behaviour(users).free_time[:, None]
        return self.noise.expected(self.satisfaction(users).astype(np.float64), free_time, self.durations)

    def logging_log_probs(self, users: Users, histories: NDArray[np.int64]) -> FloatArray:
        """Log-propensity of every title given the set already seen.

        Args:
            users: (n,).
            histories: (n, L) titles seen, padded with ``n_titles``; their order does not matter.

        Returns:
            (n, I) float64, -inf for titles already seen.
        """
        utilities = self.utilities(users)
        utilities[seen_mask(histories, self.n_titles)] = -np.inf
        mass = _log_sum_exp(utilities)[:, None]
        return utilities - np.where(np.isfinite(mass), mass, 0.0)  # nothing left unseen: -inf, not NaN

    def sample_scores(self, users: Users, titles: NDArray[np.int64], u: FloatArray) -> Scores:
        """Scores of forced exposures.

        Args:
            users: (n,).
            titles: (n,) the title each is shown.
            u: (n, uniforms_per_event) uniforms in (0, 1).
        """
        titles = titles[:, None]
        satisfaction = np.take_along_axis(self.satisfaction(users), titles, axis=1)
        outcome = self._outcome(users, satisfaction, titles, u[:, None, :])
        return Scores(outcome.score[:, 0], outcome.watched[:, 0], outcome.exogenous[:, 0])

    # -- logs and contexts ----------------------------------------------------------------------------------------

    def draw_events(self, users: Users, length: int) -> Events:
        """Histories of ``length`` events, each user's in one pass over the catalogue.

        Gumbel noise on the utilities and the top ``length`` in order is a Plackett–Luce sequence (Yellott 1977).
        The propensity of each event divides by the mass not yet chosen, summed from the tail (never by
        subtraction), so it stays exact for peaked utilities.
        """
        config = self.config
        utilities = self.utilities(users)
        keys = utilities - np.log(-np.log(uniforms(config.seed, "choice", users, self.n_titles)))
        titles = _top_in_order(keys, length)
        chosen = np.take_along_axis(utilities, titles, axis=1)
        np.put_along_axis(utilities, titles, -np.inf, axis=1)
        rest = _log_sum_exp(utilities)[:, None]
        mass = np.logaddexp.accumulate(np.concatenate([rest, chosen[:, ::-1]], axis=1), axis=1)[:, :0:-1]
        per_event = self.noise.uniforms_per_event
        u = uniforms(config.seed, "noise", users, (config.history_length + 1) * per_event)
        u = u.reshape(len(users), -1, per_event)[:, :length]
        satisfaction = np.take_along_axis(self.satisfaction(users), titles, axis=1)
        outcome = self._outcome(users, satisfaction, titles, u)
        return Events(titles, chosen - mass, self._hours(users)[:, :length], outcome)

    def generate_log(
        self,
        n_users: int,
        split: str = "train",
        *,
        expose_propensities: bool = False,
        chunk_users: int = CHUNK_USERS,
    ) -> InteractionLog:
        """Logs users of a split, ``history_length`` events each.

        Args:
            n_users: how many, at least 1.
            split: which group of users.
            expose_propensities: whether the log carries the logging policy's propensities.
            chunk_users: users handled at a time; changes memory, never the result.

        Raises:
            ConfigError: no such split, or not so many users.
        """
        if chunk_users < 1:
            raise ConfigError(f"chunk_users must be at least 1, got {chunk_users}")
        length = self.config.history_length
        users = self.users(split, n_users)
        chunks = [users[i : i + chunk_users] for i in range(0, len(users), chunk_users)]
        events = [self.draw_events(chunk, length) for chunk in chunks]
        titles = np.concatenate([e.titles.ravel() for e in events])
        durations = self.durations[titles].astype(np.float32)
        watched = np.concatenate([e.outcome.watched.ravel() for e in events])
        propensities = np.exp(np.concatenate([e.log_propensities.ravel() for e in events]))
        return InteractionLog(
            user=np.repeat(users, length),
            epoch=np.repeat(np.concatenate([self.behaviour(c).epoch for c in chunks]), length),
            step=np.tile(np.arange(length), len(users)),
            hours=np.concatenate([e.hours.ravel() for e in events]).astype(np.float32),
            title=titles,
            duration_minutes=durations,
            watch_minutes=watched.astype(np.float32) * durations,
            score=np.concatenate([e.outcome.score.ravel() for e in events]).astype(np.float32),
            n_titles=self.n_titles,
            bounded_scores=self.noise.bounded,
            propensities=propensities if expose_propensities else None,
            provenance={"world": type(self).__name__, "split": split, "config": configs.to_dict(self.config)},
        )

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
        length = self.config.history_length
        chunks = [users[i : i + CHUNK_USERS] for i in range(0, len(users), CHUNK_USERS)]
        events = [self.draw_events(chunk, length + 1) for chunk in chunks]
        titles = np.concatenate([e.titles for e in events])
        scores = np.concatenate([e.outcome.score for e in events]).astype(np.float32)
        observations = Observations(
            titles=titles[:, :length].copy(),
            scores=scores[:, :length].copy(),
            times=np.concatenate([e.hours[:, :length] for e in events]).astype(np.float32),
            length=np.full(len(users), length, dtype=np.int64),
            epoch=np.concatenate([self.behaviour(c).epoch for c in chunks]),
            n_titles=self.n_titles,
        )
        return Contexts(observations, users, titles[:, length].copy(), scores[:, length].copy())

    # -- measures and scoring -------------------------------------------------------------------------------------

    def reliability(self, n_users: int = 2_000) -> Reliability:
        """corr²(score, satisfaction) under the logging policy, with its sign; measured on training users. Within a
        user it is NaN where histories are one event long."""
        users = self.users("train", self.at_most("train", n_users))
        score, truth = [], []
        for start in range(0, len(users), CHUNK_USERS):
            chunk = users[start : start + CHUNK_USERS]
            events = self.draw_events(chunk, self.config.history_length)
            truth.append(np.take_along_axis(self.satisfaction(chunk), events.titles, axis=1).astype(np.float64))
            score.append(events.outcome.score)
        x, y = np.concatenate(score), np.concatenate(truth)
        if x.shape[1] == 1:
            return Reliability(metrics.signed_squared_correlation(x, y), float("nan"))
        within = metrics.signed_squared_correlation(
            x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
        )
        return Reliability(metrics.signed_squared_correlation(x, y), within)

    def alignment(self, n_users: int = 2_000) -> float:
        """corr²(E[score], satisfaction) within user, with its sign, titles weighted by the logging policy's first
        choice: what a perfect model of the score could know of the truth. Exact for the users it averages."""
        users = self.users("train", self.at_most("train", n_users))
        sums = np.zeros(3)
        for start in range(0, len(users), CHUNK_USERS):
            chunk = users[start : start + CHUNK_USERS]
            weight = np.exp(self.logging_log_probs(chunk, np.empty((len(chunk), 0), dtype=np.int64)))
            x, y = self.expected_score(chunk), self.satisfaction(chunk).astype(np.float64)
            x = x - (weight * x).sum(axis=1, keepdims=True)
            y = y - (weight * y).sum(axis=1, keepdims=True)
            sums += [(weight * x * y).sum(), (weight * x * x).sum(), (weight * y * y).sum()]
        covariance, spread = sums[0], sums[1] * sums[2]
        return float(np.sign(covariance) * covariance**2 / spread) if spread > 0 else 0.0

    def evaluate(self, agent: Policy, n_users: int = 2_000, seed: int = 0, judge: Judge | None = None) -> Evaluation:
        """Scores an agent on ``n_users`` test contexts, see `recsim_gr.scoring.evaluate`."""
        return evaluate(self, agent, self.contexts(n_users, seed), judge=judge)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _outcome(
        self, users: Users, satisfaction: NDArray[np.float32], titles: NDArray[np.int64], u: FloatArray
    ) -> Scores:
        """Scores of (n, T) events whose satisfaction is given."""
        free_time = self.behaviour(users).free_time[:, None]
        return self.noise.sample(satisfaction.astype(np.float64), free_time, self.durations[titles], u)

    def _hours(self, users: Users) -> FloatArray:
        """(n, history_length + 1) hours since the epoch began; gaps from a mixture of two exponentials."""
        n_events = self.config.history_length + 1
        u = uniforms(self.config.seed, "times", users, 2 * n_events).reshape(len(users), n_events, 2)
        mean = np.where(u[..., 0] < NEW_SESSION_PROBABILITY, HOURS_BETWEEN_SESSIONS, HOURS_WITHIN_SESSION)
        return np.cumsum(-mean * np.log1p(-u[..., 1]), axis=1)

    def at_most(self, split: str, n: int) -> int:
        """``n``, or as many users as the split has."""
        return n

    def _sample_users(self, split: str, n: int, seed: int) -> Users:
        """(n,) users of a split, others for another seed."""
        if n > USERS_PER_CONTEXT_SEED or seed < 0:
            limit = f"at most {USERS_PER_CONTEXT_SEED} a seed, and a seed of 0 or more"
            raise ConfigError(f"contexts({n}, seed={seed}): must be {limit}")
        return self.users(split, n, offset=seed * USERS_PER_CONTEXT_SEED)


NEW_SESSION_PROBABILITY, HOURS_WITHIN_SESSION, HOURS_BETWEEN_SESSIONS = 0.25, 0.7, 22.0
"""Times of events: one event in four opens a new session, about a day later; the others follow at the length of a
title. Times carry no information in this version (design, ``order_effect`` = 0)."""

USERS_PER_SPLIT = 1_000_000_000
USERS_PER_CONTEXT_SEED = 1_000_000
"""Simulated users are unlimited: each split owns a block of ids, each seed of `contexts` a part of the block."""


class World(WorldBase):
    """A simulated world (design §2).

    Satisfaction ``s(u,i) = 1 + 4·sigmoid(a(⟨θ_u, v_i⟩ + q_i + b_u))``, pull ``⟨φ_u, v_i⟩`` with
    ``φ_u = δ_u·θ_u + sqrt(1−δ_u²)·ε_u``; θ, ε standard normal, v of length 1, so both products have variance 1.
    """

    env_id = "recsim_gr/WatchTime-v0"
    config: WorldConfig

    def __init__(self, config: WorldConfig | None = None) -> None:
        self.config = config or WorldConfig()

    @property
    def n_titles(self) -> int:
        return self.config.n_titles

    @cached_property
    def genres(self) -> NDArray[np.int64]:
        """(I,) the genre of each title."""
        return generator(self.config.seed, "genres").integers(self.config.n_genres, size=self.n_titles)

    @cached_property
    def traits(self) -> FloatArray:
        """(I, d) unit vectors, clustered in genres."""
        rng = generator(self.config.seed, "traits")
        d = self.config.taste_dimensions
        centres = rng.standard_normal((self.config.n_genres, d))
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
        around = self.config.genre_spread / np.sqrt(d) * rng.standard_normal((self.n_titles, d))
        traits = centres[self.genres] + around
        return traits / np.linalg.norm(traits, axis=1, keepdims=True)

    @cached_property
    def quality(self) -> FloatArray:
        """(I,)."""
        z = generator(self.config.seed, "quality").standard_normal(self.n_titles)
        return self.config.quality_deviation * z

    def users(self, split: str, n: int, offset: int = 0) -> Users:
        if split not in SPLITS:
            raise ConfigError(f"no split {split!r}; there are {', '.join(SPLITS)}")
        if n < 1 or offset < 0 or offset + n > USERS_PER_SPLIT:
            raise ConfigError(f"users {offset} to {offset + n} of a split: must be 1 to {USERS_PER_SPLIT} users")
        start = SPLITS.index(split) * USERS_PER_SPLIT + offset
        return np.arange(start, start + n, dtype=np.int64)

    def in_split(self, users: Users, split: str) -> NDArray[np.bool_]:
        return np.asarray(users) // USERS_PER_SPLIT == SPLITS.index(split)

    def taste(self, users: Users) -> FloatArray:
        """(n, d): θ."""
        return ndtri(uniforms(self.config.seed, "taste", users, self.config.taste_dimensions))

    def leniency(self, users: Users) -> FloatArray:
        """(n,): b."""
        return ndtri(uniforms(self.config.seed, "leniency", users, 1))[:, 0] * self.config.leniency_deviation

    def pull_vectors(self, users: Users) -> FloatArray:
        """(n, d): φ."""
        delta = self.behaviour(users).discernment[:, None]
        outside = ndtri(uniforms(self.config.seed, "pull", users, self.config.taste_dimensions))
        return delta * self.taste(users) + np.sqrt(1.0 - delta**2) * outside

    def satisfaction_at(self, logit: FloatArray) -> NDArray[np.float32]:
        """Satisfaction of ``⟨θ_u, v_i⟩ + q_i + b_u``, elementwise."""
        fraction = expit(self.config.satisfaction_slope * logit)
        return (LOWEST_SCORE + (HIGHEST_SCORE - LOWEST_SCORE) * fraction).astype(np.float32)

    def satisfaction(self, users: Users) -> NDArray[np.float32]:
        products = _products(self.taste(users), self.traits)
        return self.satisfaction_at(products + self.quality + self.leniency(users)[:, None])

    def pull(self, users: Users) -> FloatArray:
        return _products(self.pull_vectors(users), self.traits)


def _products(rows: FloatArray, columns: FloatArray) -> FloatArray:
    """(n, I) inner products of (n, d) and (I, d), each row the same whatever rows stand beside it.

    BLAS chooses its kernel by the number of rows, so the last bits of a user would depend on the chunk.
    """
    return np.einsum("nd,di->ni", rows, np.ascontiguousarray(columns.T))


def _log_sum_exp(values: FloatArray) -> FloatArray:
    """(n,) of (n, I); -inf for a row of nothing but -inf."""
    top = values.max(axis=1)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return safe + np.log(np.exp(values - safe[:, None]).sum(axis=1))


def _top_in_order(keys: FloatArray, k: int) -> NDArray[np.int64]:
    """(n, k) columns of the k largest keys of each row, largest first."""
    top = np.argpartition(keys, keys.shape[1] - k, axis=1)[:, keys.shape[1] - k :]
    order = np.argsort(-np.take_along_axis(keys, top, axis=1), axis=1)
    return np.take_along_axis(top, order, axis=1)
