"""The simulated world: who its users and titles are, and what satisfies them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtri

from recsim_gr.behaviour import LARGE_CATALOGUE, SPLITS, BehaviourConfig, FloatArray, Users, require_room
from recsim_gr.choosing import RoughUtilities, Rows
from recsim_gr.configs import require
from recsim_gr.errors import ConfigError
from recsim_gr.observations import HIGHEST_SCORE, LOWEST_SCORE
from recsim_gr.randomness import generator, uniforms
from recsim_gr.world_base import USERS_PER_SPLIT, WorldBase, products, require_integers

PRODUCT_ROWS = 8
"""Users of a product of utilities and catalogue. BLAS takes more rows in groups of its own, and the rest by kernels
that add in another order, so that a user's last bits would depend on the place among others: in OpenBLAS from 12 rows
on (float32 on Haswell and Zen) or 16 (float64 on SkylakeX). Of 8 no place differs in any kernels of it for x86-64."""

MOST_TITLES = 10_000_000
"""A hundred times what throughput is measured at: traits and appeals of so many titles take a gigabyte (10⁷ × (8 + 4)
numbers of 8 bytes), and more would end in a lack of memory."""

STEEPEST_PULL_IN_FLOAT32, HIGHEST_APPEAL_IN_FLOAT32, FARTHEST_DRIFT_IN_FLOAT32 = 4.0, 24.0, 16.0
"""Large catalogues are weighed in float32 up to here: pulls rarely exceed 5 deviations, so utilities stay below about
32 (16 more where the population has drifted as far), where float32 is good to 2e-6. Steeper ones take float64."""


@dataclass(frozen=True, kw_only=True)
class WorldConfig(BehaviourConfig):
    """A simulated world."""

    n_titles: int = 1_000
    """I, the size of the catalogue: enough that most titles are rare, few enough to enumerate for every user."""
    taste_dimensions: int = 8
    """d of tastes, pulls and traits: more than a popularity bias, few enough to be inferred from 20 events."""
    n_genres: int = 10
    """Clusters of traits: a few more than there are dimensions, so that genres are no axes."""
    genre_spread: float = 0.6
    """Deviation of a title's traits around its genre's centre, whose length is 1, before normalisation: genres
    overlap."""
    quality_deviation: float = 0.5
    """Deviation of q, half of what personal taste contributes (1): quality matters, taste matters more."""
    leniency_deviation: float = 0.5
    """Deviation of b over users: a nuisance of the size of quality that no ranking can use."""
    population_drift: float = 0.0
    """How far the mean taste of the users moves from one epoch to the next (a random walk), in units of the deviation
    of tastes along one axis. 0: users of later epochs are like those of earlier ones, and only appeal drifts."""
    satisfaction_slope: float = 1.25
    """a of the sigmoid: satisfaction under random exposure fills its range (deviation about 1 of 4) without
    piling up at the ends."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(2 <= self.n_titles <= MOST_TITLES, self, "n_titles", f"at least 2, and at most {MOST_TITLES}")
        require_room(self, self.n_titles)
        for name in ("taste_dimensions", "n_genres"):
            require(1 <= getattr(self, name) <= 100_000, self, name, "at least 1, and at most 100000")
        for name in (
            "genre_spread",
            "quality_deviation",
            "leniency_deviation",
            "population_drift",
            "satisfaction_slope",
        ):
            require(0 <= getattr(self, name) <= 1e6, self, name, "0 or more, and at most a million")


class World(WorldBase):
    """A simulated world (design §2).

    Satisfaction ``s(u,i) = 1 + 4·sigmoid(a(⟨θ_u, v_i⟩ + q_i + b_u))``, pull ``⟨φ_u, v_i⟩`` with
    ``φ_u = δ_u·θ_u + sqrt(1−δ_u²)·ε_u``; θ (in the first epoch) and ε standard normal, v of length 1, so both products
    have variance 1.
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
    def _traits_by_axis(self) -> FloatArray:
        """(d, I): the same numbers in the order in which products read them."""
        return np.ascontiguousarray(self.traits.T)

    @property
    def directions(self) -> FloatArray:
        return self.traits

    @cached_property
    def quality(self) -> FloatArray:
        """(I,)."""
        z = generator(self.config.seed, "quality").standard_normal(self.n_titles)
        return self.config.quality_deviation * z

    def users(self, split: str, n: int, offset: int = 0) -> Users:
        if split not in SPLITS:
            raise ConfigError(f"no split {split!r}; there are {', '.join(SPLITS)}")
        require_integers(n, offset)
        if n < 1 or offset < 0 or offset + n > USERS_PER_SPLIT:
            raise ConfigError(f"users {offset} to {offset + n} of a split: must be 1 to {USERS_PER_SPLIT} users")
        start = SPLITS.index(split) * USERS_PER_SPLIT + offset
        return np.arange(start, start + n, dtype=np.int64)

    def in_split(self, users: Users, split: str) -> NDArray[np.bool_]:
        return np.asarray(users) // USERS_PER_SPLIT == SPLITS.index(split)

    @cached_property
    def taste_centres(self) -> FloatArray:
        """(n_epochs, d): the mean taste of each epoch's users, 0 in the first; steps of expected square length
        ``population_drift²``."""
        shape = (self.config.n_epochs - 1, self.config.taste_dimensions)
        steps = generator(self.config.seed, "population drift").standard_normal(shape)
        walk = np.cumsum(steps, axis=0) * self.config.population_drift / np.sqrt(shape[1])
        return np.concatenate([np.zeros((1, shape[1])), walk])

    def taste(self, users: Users) -> FloatArray:
        """(n, d): θ."""
        around = ndtri(uniforms(self.config.seed, "taste", users, self.config.taste_dimensions))
        if self.config.population_drift == 0:
            return around
        return around + self.taste_centres[self.behaviour(users).epoch]

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
        affinity = products(self.taste(users), self._traits_by_axis.T)
        return self.satisfaction_at(affinity + self.quality + self.leniency(users)[:, None])

    def satisfaction_with(self, users: Users, titles: NDArray[np.int64]) -> NDArray[np.float32]:
        # the sum runs along the axes one after another, as in `products`, or the last bit would differ
        affinity = np.einsum("nd,dnt->nt", self.taste(users), self._traits_by_axis.take(titles, axis=1))
        return self.satisfaction_at(affinity + self.quality[titles] + self.leniency(users)[:, None])

    def pull(self, users: Users) -> FloatArray:
        return products(self.pull_vectors(users), self._traits_by_axis.T)

    def pull_rows(self, users: Users) -> Rows:
        vectors, traits = self.pull_vectors(users), self._traits_by_axis

        def fill(part: slice, out: FloatArray, scratch: FloatArray) -> None:
            products(vectors[part], traits.T, out)

        return fill

    @cached_property
    def _utility_columns(self) -> dict[type[np.floating], NDArray[np.floating]]:
        """(d + n_epochs, I), in two precisions: traits and appeals, of which utilities are weighted sums."""
        columns = np.concatenate([self._traits_by_axis, self.appeal])
        return {np.float64: columns, np.float32: columns.astype(np.float32)}

    def _utility_weights(self, users: Users) -> tuple[FloatArray, NDArray[np.int64]]:
        """(n, d + n_epochs): how much each user makes of each column; and their epochs."""
        who, d = self.behaviour(users), self.config.taste_dimensions
        weights = np.zeros((len(users), d + self.config.n_epochs))
        weights[:, :d] = self.config.pull_strength * self.pull_vectors(users)
        weights[np.arange(len(users)), d + who.epoch] = 1.0 - who.discernment
        return weights, who.epoch

    def utility_rows(self, users: Users) -> Rows:
        if self.n_titles <= LARGE_CATALOGUE:
            return super().utility_rows(users)
        return self._utility_sums(*self._utility_weights(users), np.float64)

    def _utility_sums(self, weights: FloatArray, epoch: NDArray[np.int64], kind: type[np.floating]) -> Rows:
        """The sums, `PRODUCT_ROWS` at a time: products of one shape, or the last bits of a user would depend on the
        block (see `products`)."""
        columns, weights = self._utility_columns[kind], weights.astype(kind)

        def fill(part: slice, out: NDArray[Any], scratch: NDArray[Any]) -> None:
            for start in range(0, len(out), PRODUCT_ROWS):
                here, rows = out[start : start + PRODUCT_ROWS], weights[part][start : start + PRODUCT_ROWS]
                if len(rows) == PRODUCT_ROWS:
                    np.matmul(rows, columns, out=here)
                else:
                    padding = np.zeros((PRODUCT_ROWS - len(rows), len(columns)), dtype=kind)
                    here[...] = (np.concatenate([rows, padding]) @ columns)[: len(rows)]
            if self.config.cold_share > 0:
                out[self.catalogue.unreleased(epoch[part])] = -np.inf

        return fill

    def rough_utilities(self, users: Users) -> RoughUtilities | None:
        config = self.config
        steep = config.pull_strength > STEEPEST_PULL_IN_FLOAT32 or self.appeal.max() > HIGHEST_APPEAL_IN_FLOAT32
        moved = np.linalg.norm(self.taste_centres, axis=1).max() * config.pull_strength
        steep |= moved > FARTHEST_DRIFT_IN_FLOAT32
        if self.n_titles <= LARGE_CATALOGUE or steep:
            return None
        weights, epoch = self._utility_weights(users)
        columns = self._utility_columns[np.float64]

        def exact(rows: NDArray[np.int64], titles: NDArray[np.int64]) -> FloatArray:
            utilities: FloatArray = np.einsum("...j,j...->...", weights[rows], columns[:, titles])
            unreleased = self.catalogue.release[titles] > epoch[rows]
            return np.where(unreleased, -np.inf, utilities)

        return RoughUtilities(self._utility_sums(weights, epoch, np.float32), exact)
