"""The floors of suite ``throughput``: for each job a NumPy program that does the least work the job needs.

A floor is a measure, not a rival. It checks nothing, keeps nothing, takes what can be prepared as given, and draws from
one fast sequential generator (SFC64, float32), so that what it draws depends on chunks and order, as a log of
`World.generate_log` must not. What it draws is of the world's own law (a test holds that), so the work is the same.
Each docstring says what is left out.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from numpy.typing import NDArray

from recsim_gr.noise import WatchTimeNoise
from recsim_gr.observations import HIGHEST_SCORE, LOWEST_SCORE
from recsim_gr.world import World

Float32s = NDArray[np.float32]
Ints = NDArray[np.int64]
Columns = dict[str, NDArray[Any]]

RACE_CHUNK, BLOCK_CHUNK = 512, 16
"""Users that the two floors of logs handle at a time: about the fastest here, where more or fewer cost some percent."""

BLOCK_TITLES = 256
"""Titles of a block of the floor for large catalogues."""

SPARE_DRAWS = 12
"""Draws beyond the history's length, since some repeat; users who need still more get as many again."""

RANGE = HIGHEST_SCORE - LOWEST_SCORE


class Taste(NamedTuple):
    """Users as the floors want them: vectors in float32.

    Attributes:
        features: (n, d + E): κ·φ, and 1 − δ in the place of the user's epoch: utilities are one matrix product.
        taste: (n, d).
        leniency: (n,).
        free_time: (n,).
    """

    features: Float32s
    taste: Float32s
    leniency: Float32s
    free_time: Float32s

    def rows(self, rows: slice) -> "Taste":
        """Some of the users."""
        return Taste(*(part[rows] for part in self))


@dataclass(frozen=True)
class Catalogue:
    """Titles as the floors want them.

    Attributes:
        features: (d + E, I): traits, and the appeal in each epoch.
        traits: (I, d).
        quality, durations: (I,).
    """

    features: Float32s
    traits: Float32s
    quality: Float32s
    durations: Float32s


def users_of(world: World, users: Ints) -> Taste:
    """The vectors of some users."""
    who = world.behaviour(users)
    trend = np.zeros((len(users), world.config.n_epochs))
    trend[np.arange(len(users)), who.epoch] = 1.0 - who.discernment
    pull = world.config.pull_strength * world.pull_vectors(users)
    parts = (np.concatenate([pull, trend], axis=1), world.taste(users), world.leniency(users), who.free_time)
    return Taste(*(part.astype(np.float32) for part in parts))


def titles_of(world: World) -> Catalogue:
    """The vectors of all titles."""
    features = np.concatenate([world.traits.T, world.appeal])
    parts = (features, world.traits, world.quality, world.durations)
    return Catalogue(*(np.ascontiguousarray(part, dtype=np.float32) for part in parts))


# -- logs --------------------------------------------------------------------------------------------------------


def race_log(world: World, users: Taste, seed: int) -> Columns:
    """A log by one pass over the catalogue, a chunk of users at a time, in float32.

    One matrix product for the utilities, exp, exponential keys over the weights (the smallest come first: an
    exponential race is Plackett–Luce), argpartition and sort of the first L; the propensities from the sum of the
    weights less those already chosen; scores by gathers.

    Left out: drawing the users, float64, exactness where nearly all mass is chosen (the normaliser is a subtraction),
    random numbers that are a user's own, the columns ``user``, ``epoch`` and ``step``, putting chunks together, and
    the checks of a log.

    Returns:
        the columns of the last chunk.
    """
    titles, rng = titles_of(world), np.random.Generator(np.random.SFC64(seed))
    length, columns = world.config.history_length, {}
    room = np.empty((2, RACE_CHUNK, world.n_titles), dtype=np.float32)
    for start in range(0, len(users.taste), RACE_CHUNK):
        some = users.rows(slice(start, start + RACE_CHUNK))
        weights, keys = room[:, : len(some.taste)]
        np.matmul(some.features, titles.features, out=weights)
        np.exp(weights, out=weights)
        rng.standard_exponential(dtype=np.float32, out=keys)
        keys /= weights
        first = np.argpartition(keys, length, axis=1)[:, :length]
        order = np.argsort(np.take_along_axis(keys, first, axis=1), axis=1)
        history = np.take_along_axis(first, order, axis=1)
        chosen = np.take_along_axis(weights, history, axis=1)
        columns = scored(world, titles, some, history, chosen, weights.sum(axis=1), rng)
    return columns


def block_log(world: World, users: Taste, seed: int) -> Columns:
    """A log over a large catalogue: draws with replacement by the inverse CDF of block sums, repeats skipped.

    One matrix product, exp, sums of blocks of titles; each draw finds its block and then its title. Skipping what was
    drawn before is Plackett–Luce. Left out: as in `race_log`.

    Returns:
        the columns of the last chunk.
    """
    titles, rng = titles_of(world), np.random.Generator(np.random.SFC64(seed))
    spare = -len(titles.quality) % BLOCK_TITLES
    features = np.pad(titles.features, ((0, 0), (0, spare)))
    columns: Columns = {}
    room = np.empty((BLOCK_CHUNK, features.shape[1]), dtype=np.float32)
    for start in range(0, len(users.taste), BLOCK_CHUNK):
        some = users.rows(slice(start, start + BLOCK_CHUNK))
        weights = room[: len(some.taste)]
        np.matmul(some.features, features, out=weights)
        np.exp(weights, out=weights)
        if spare:
            weights[:, -spare:] = 0.0
        blocks = weights.reshape(len(weights), -1, BLOCK_TITLES)
        cumulative = np.cumsum(np.einsum("nbt->nb", blocks), axis=1, dtype=np.float64)
        history = _distinct_draws(blocks, cumulative, world.config.history_length, rng)
        chosen = np.take_along_axis(weights, history, axis=1)
        columns = scored(world, titles, some, history, chosen, cumulative[:, -1], rng)
    return columns


def _distinct_draws(blocks: Float32s, cumulative: NDArray[np.float64], length: int, rng: np.random.Generator) -> Ints:
    """(n, length) titles without repeats, in the order drawn."""
    draws = _draws(blocks, cumulative, length + SPARE_DRAWS, rng)
    while True:
        same = draws[:, :, None] == draws[:, None, :]
        new = same.argmax(axis=2) == np.arange(draws.shape[1])  # the first of its like is itself
        rank = np.cumsum(new, axis=1)
        if rank[:, -1].min() >= length:
            break
        draws = np.concatenate([draws, _draws(blocks, cumulative, draws.shape[1], rng)], axis=1)
    kept: Ints = draws[new & (rank <= length)].reshape(len(draws), length)
    return kept


def _draws(blocks: Float32s, cumulative: NDArray[np.float64], k: int, rng: np.random.Generator) -> Ints:
    """(n, k) titles drawn with replacement."""
    n, rows = len(blocks), np.arange(len(blocks))[:, None]
    target = rng.random((n, k)) * cumulative[:, -1:]
    block = np.stack([np.searchsorted(c, t, side="right") for c, t in zip(cumulative, target, strict=True)])
    target -= np.where(block > 0, cumulative[rows, block - 1], 0.0)
    inside = np.cumsum(blocks[rows, block], axis=2)
    inner = (inside <= target[:, :, None]).sum(axis=2)
    return block * BLOCK_TITLES + np.minimum(inner, BLOCK_TITLES - 1)


def scored(
    world: World,
    titles: Catalogue,
    users: Taste,
    history: Ints,
    chosen: Float32s,
    mass: NDArray[Any],
    rng: np.random.Generator,
) -> Columns:
    """Propensities, hours, watch times and scores of chosen titles: (n, L) each.

    Args:
        world: whose dials hold.
        titles, users: the vectors.
        history: (n, L) titles.
        chosen: (n, L) exp(utility) of them.
        mass: (n,) exp(utility) summed over all titles.
        rng: of the noise.
    """
    assert isinstance(world.noise, WatchTimeNoise)
    shape = history.shape
    before = np.cumsum(chosen, axis=1)
    before -= chosen
    duration = titles.durations.take(history)
    affinity = np.einsum("nd,nld->nl", users.taste, titles.traits.take(history, axis=0))
    affinity += titles.quality.take(history)
    affinity += users.leniency[:, None]
    watched = _sigmoid(affinity, world.config.satisfaction_slope)
    watched *= np.exp(world.noise.small_noise * rng.standard_normal(shape, dtype=np.float32))
    exogenous = rng.random(shape, dtype=np.float32) < world.noise.dial
    session = rng.standard_exponential(shape, dtype=np.float32)
    session *= users.free_time[:, None]
    session /= duration
    np.copyto(watched, session, where=exogenous)
    np.minimum(watched, 1.0, out=watched)
    gaps = rng.standard_exponential(shape, dtype=np.float32)
    gaps *= np.where(rng.random(shape, dtype=np.float32) < 0.25, np.float32(22.0), np.float32(0.7))
    return {
        "title": history,
        "propensity": chosen / (mass[:, None] - before),
        "hours": np.cumsum(gaps, axis=1),
        "duration_minutes": duration,
        "watch_minutes": watched * duration,
        "score": LOWEST_SCORE + RANGE * watched,
    }


def _sigmoid(values: Float32s, slope: float) -> Float32s:
    """1/(1 + exp(−slope·x)), in place."""
    values *= -slope
    np.exp(values, out=values)
    values += 1.0
    return np.reciprocal(values, out=values)


# -- environments ------------------------------------------------------------------------------------------------


def vector_steps(world: World, n_envs: int, pool_users: int, seed: int) -> Callable[[Ints], tuple[Columns, Columns]]:
    """A step of ``n_envs`` users out of a prepared pool: the gathers that the job needs, and nothing else.

    For the actions: satisfaction, from one dot product, and propensity, from another and the normaliser, in float32.
    For the next users: fresh arrays of the observations, of the environment's shapes and types.

    Left out: drawing the users (they come round in an order prepared beforehand), the noise of the reward, the check
    of the actions, whether a title had been seen, all else that is in the info.

    Returns:
        a function of (n_envs,) titles that gives what the step is worth, and the next observations.
    """
    users = world.users("train", pool_users)
    contexts, vectors, titles = world.contexts_of(users), users_of(world, users), titles_of(world)
    seen, epoch = contexts.observations, contexts.observations.epoch
    log_probs = [
        world.logging_log_probs(users[i : i + 256], seen.titles[i : i + 256]) for i in range(0, pool_users, 256)
    ]
    next_log_prob = np.take_along_axis(np.concatenate(log_probs), contexts.next_titles[:, None], axis=1)[:, 0]
    d = vectors.taste.shape[1]
    pull, conformity = np.ascontiguousarray(vectors.features[:, :d]), vectors.features[:, d:].max(axis=1)
    appeal, n_titles = titles.features[d:].ravel(), world.n_titles
    chosen = np.einsum("nd,nd->n", pull, titles.traits[contexts.next_titles])
    chosen += conformity * appeal[epoch * n_titles + contexts.next_titles]
    normaliser = (chosen - next_log_prob).astype(np.float32)
    narrow = seen.titles.astype(np.int16 if n_titles < 2**15 else np.int32)  # what a step costs is what it reads
    offset = epoch * n_titles
    slope = world.config.satisfaction_slope
    rng = np.random.Generator(np.random.SFC64(seed))
    orders = [rng.integers(pool_users, size=n_envs) for _ in range(64)]
    turn = 0

    def step(actions: Ints) -> tuple[Columns, Columns]:
        nonlocal turn
        rows, turn = orders[turn % len(orders)], turn + 1
        after = orders[turn % len(orders)]
        traits = titles.traits.take(actions, axis=0)
        truth = np.einsum("nd,nd->n", vectors.taste.take(rows, axis=0), traits)
        utility = np.einsum("nd,nd->n", pull.take(rows, axis=0), traits)
        truth += titles.quality.take(actions)
        truth += vectors.leniency.take(rows)
        _sigmoid(truth, slope)
        truth *= RANGE
        truth += LOWEST_SCORE
        trend = appeal.take(offset.take(rows) + actions)
        trend *= conformity.take(rows)
        utility += trend
        utility -= normaliser.take(rows)
        worth = {"satisfaction": truth, "propensity": np.exp(utility, out=utility)}
        return worth, {
            "titles": narrow.take(after, axis=0).astype(np.int64),
            "scores": seen.scores.take(after, axis=0),
            "times": seen.times.take(after, axis=0),
            "length": seen.length.take(after),
            "epoch": epoch.take(after),
        }

    return step


class Nothing(gymnasium.Env[dict[str, Any], np.int64]):
    """An environment that does nothing: it returns the same prepared observation and infos, of the right kinds.

    Args:
        like: the environment whose spaces and returns it has.
    """

    def __init__(self, like: gymnasium.Env[Any, Any]) -> None:
        self.observation_space, self.action_space = like.observation_space, like.action_space
        self.observation, self.reset_info = like.reset(seed=0)
        _, self.reward, _, _, self.step_info = like.step(np.int64(0))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The prepared observation and info."""
        return self.observation, self.reset_info

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """The prepared observation, reward and info."""
        return self.observation, float(self.reward), True, False, self.step_info


def nothing_like(env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    """`Nothing` behind the wrappers that `gymnasium.make` puts around every environment."""

    def make(**_: Any) -> Nothing:
        return Nothing(env.unwrapped)

    nothing = gymnasium.make(gymnasium.envs.registration.EnvSpec(id="recsim_gr/Nothing-v0", entry_point=make))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the first calls, which are checked: it returns one object again and again
        for _ in range(3):
            nothing.reset()
            nothing.step(np.int64(0))
    return nothing
