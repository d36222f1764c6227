"""What a portrait of a world is drawn from: some users, everything that they could watch, and what they did."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from recsim_gr.behaviour import FloatArray, Users
from recsim_gr.noise import Exposure
from recsim_gr.observations import HIGHEST_SCORE, LOWEST_SCORE
from recsim_gr.randomness import uniforms
from recsim_gr.world_base import WorldBase

Notify = Callable[[float, str], None]
"""Told the share of the work that is done, in [0, 1], and what is being done."""

CHUNK_CELLS = 1_000_000
"""(user, title) pairs handled at a time: 8 MB a temporary. Changes no result but for rounding."""

TERCILES = 3
"""Groups of users by discernment, equally large."""

SATISFACTION_EDGES = np.linspace(LOWEST_SCORE, HIGHEST_SCORE, 41)


@dataclass(frozen=True, eq=False)
class Events:
    """Events of n users, (n, T) arrays; what was logged, or as many forced exposures at the same moments.

    Attributes:
        titles: int64.
        hours: since the epoch began.
        facts: what the score may depend on, allure and mood included.
        score: what was observed.
        watched: the fraction of the title.
        logged: which of them are in the log; histories may be shorter than T.
    """

    titles: NDArray[np.int64]
    hours: FloatArray
    facts: Exposure
    score: FloatArray
    watched: FloatArray
    logged: NDArray[np.bool_]

    def of(self, values: NDArray[Any]) -> NDArray[Any]:
        """The values of the events that are logged, one after the other; ``values`` broadcasts to (n, T)."""
        return np.broadcast_to(values, self.logged.shape)[self.logged]


@dataclass(frozen=True, eq=False)
class PerUser:
    """Facts of n users over all titles that are out in their epoch; (n,) each.

    Attributes:
        epoch, discernment: of the user.
        tercile: which third of the users by discernment, 0 the least.
        perplexity: exp(entropy) of the logging policy's first choice.
        likeness: within-user correlation of utility and satisfaction over titles.
        acceptance: mean probability that a title shown at random is watched.
    """

    epoch: NDArray[np.int64]
    discernment: FloatArray
    tercile: NDArray[np.int64]
    perplexity: FloatArray
    likeness: FloatArray
    acceptance: FloatArray


@dataclass(eq=False)
class Sums:
    """Sums over users, title by title, of training users; added to chunk by chunk.

    Attributes:
        n: (I,) users to whom the title is open.
        satisfaction, score, square: (I,) sums of s, E[score] and s² over them.
        weight, chosen_satisfaction, chosen_score: (3, I) sums of p, p·s and p·E[score] over users of each tercile, p
            the propensity of the first choice.
        histogram: (40,) pairs by satisfaction, see `SATISFACTION_EDGES`.
        first_choices: (epochs, 2, I) sums of p over two halves of each epoch's users, test users included.
        user_means: means of s over titles, one array a chunk.
    """

    n: FloatArray
    satisfaction: FloatArray
    score: FloatArray
    square: FloatArray
    weight: FloatArray
    chosen_satisfaction: FloatArray
    chosen_score: FloatArray
    histogram: FloatArray
    first_choices: FloatArray
    user_means: list[FloatArray] = field(default_factory=list)

    @classmethod
    def zero(cls, n_titles: int, n_epochs: int) -> "Sums":
        one, three = (lambda: np.zeros(n_titles)), (lambda: np.zeros((TERCILES, n_titles)))
        bins = np.zeros(len(SATISFACTION_EDGES) - 1)
        first = np.zeros((n_epochs, 2, n_titles))
        return cls(one(), one(), one(), one(), three(), three(), three(), bins, first)


@dataclass(frozen=True, eq=False)
class Sample:
    """Users of a world and what can be known of them.

    Attributes:
        train, test: ids of the users.
        log, test_log: what they did.
        forced: forced exposure of the training users: titles drawn uniformly from those that are out.
        users: facts of each training user.
        sums: over users.
    """

    world: WorldBase
    train: Users
    test: Users
    log: Events
    test_log: Events
    forced: Events
    users: PerUser
    sums: Sums


def draw_sample(world: WorldBase, n_users: int, notify: Notify) -> Sample:
    """Draws up to ``n_users`` training and as many test users, all that the split has where it has fewer."""
    train = world.users("train", world.at_most("train", n_users))
    test = world.users("test", world.at_most("test", n_users))
    rank = np.argsort(np.argsort(world.behaviour(train).discernment, kind="stable"), kind="stable")
    tercile = rank * TERCILES // len(train)
    sums = Sums.zero(world.n_titles, world.config.n_epochs)
    chunks, test_chunks = chunks_of(world, train), chunks_of(world, test)
    steps = 2 * len(chunks) + 2 * len(test_chunks)
    done = 0

    def advance(what: str) -> None:
        nonlocal done
        done += 1
        notify(done / steps, what)

    people: list[PerUser] = []
    start = 0
    for chunk in chunks:
        people.append(_look_at_all(world, chunk, tercile[start : start + len(chunk)], start, sums))
        start += len(chunk)
        advance("all titles of every user")
    start = 0
    for chunk in test_chunks:
        _add_first_choices(world, chunk, start, sums)
        start += len(chunk)
        advance("all titles of every user")
    log = []
    for chunk in chunks:
        log.append(_logged_events(world, chunk))
        advance("histories")
    test_log = []
    for chunk in test_chunks:
        test_log.append(_logged_events(world, chunk))
        advance("histories")
    forced = [_forced_events(world, chunk) for chunk in chunks]
    users = PerUser(*(np.concatenate(parts) for parts in zip(*(vars(p).values() for p in people), strict=True)))
    return Sample(world, train, test, _joined(log), _joined(test_log), _joined(forced), users, sums)


def chunks_of(world: WorldBase, users: Users) -> list[Users]:
    """The users in groups whose pairs fit `CHUNK_CELLS`."""
    size = int(np.clip(CHUNK_CELLS // world.n_titles, 8, 2_048))
    return [users[start : start + size] for start in range(0, len(users), size)]


def first_choice(utilities: FloatArray) -> FloatArray:
    """(n, I): the logging policy's propensities before anything is seen."""
    probabilities: FloatArray = softmax(utilities, axis=1)
    return probabilities


# ---------------------------------------------------------------------------------------------------- all pairs


def _look_at_all(world: WorldBase, users: Users, tercile: NDArray[np.int64], start: int, sums: Sums) -> PerUser:
    """Adds every title of every user to the sums."""
    who = world.behaviour(users)
    utilities = world.utilities(users)
    p = first_choice(utilities)
    is_out = np.isfinite(utilities)
    satisfaction = world.satisfaction(users).astype(np.float64)
    score = np.broadcast_to(world.expected_score_watched(users), satisfaction.shape)
    sums.n += is_out.sum(axis=0)
    for total, values in ((sums.satisfaction, satisfaction), (sums.score, score), (sums.square, satisfaction**2)):
        total += (values * is_out).sum(axis=0)
    member = (tercile == np.arange(TERCILES)[:, None]).astype(np.float64)
    sums.weight += member @ p
    sums.chosen_satisfaction += member @ (p * satisfaction)
    sums.chosen_score += member @ (p * score)
    sums.histogram += np.histogram(satisfaction[is_out], SATISFACTION_EDGES)[0]
    sums.user_means.append((satisfaction * is_out).sum(axis=1) / is_out.sum(axis=1))
    _add_halves(sums, p, who.epoch, start)
    log_p = np.log(np.where(p > 0, p, 1.0))
    return PerUser(
        who.epoch,
        who.discernment,
        tercile,
        np.exp(-(p * log_p).sum(axis=1)),
        _row_correlations(np.where(is_out, utilities, 0.0), satisfaction, is_out),
        (world.acceptance(users) * is_out).sum(axis=1) / is_out.sum(axis=1),
    )


def _add_first_choices(world: WorldBase, users: Users, start: int, sums: Sums) -> None:
    _add_halves(sums, first_choice(world.utilities(users)), world.behaviour(users).epoch, start)


def _add_halves(sums: Sums, p: FloatArray, epoch: NDArray[np.int64], start: int) -> None:
    half = (start + np.arange(len(epoch))) % 2
    np.add.at(sums.first_choices, (epoch, half), p)


def _row_correlations(x: FloatArray, y: FloatArray, kept: NDArray[np.bool_]) -> FloatArray:
    """(n,) correlations over the kept entries of each row; 0 where one does not vary."""
    n = kept.sum(axis=1, keepdims=True)
    x, y = (np.where(kept, z - (z * kept).sum(axis=1, keepdims=True) / n, 0.0) for z in (x, y))
    spread = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    return np.where(spread > 0, (x * y).sum(axis=1) / np.where(spread > 0, spread, 1.0), 0.0)


# ------------------------------------------------------------------------------------------------------- events


def _logged_events(world: WorldBase, users: Users) -> Events:
    drawn = world.draw_events(users, world.config.history_length)
    facts = _facts(world, users, drawn.titles)
    return Events(drawn.titles, drawn.hours, facts, drawn.outcome.score, drawn.outcome.watched, _logged(world, users))


def _forced_events(world: WorldBase, users: Users) -> Events:
    """Titles drawn uniformly from those that are out, each at the moment of a logged event and with its own noise."""
    length, per_event = world.config.history_length, world.noise.uniforms_per_event
    u = uniforms(world.config.seed, "portrait: forced exposure", users, length * (1 + per_event))
    u = u.reshape(len(users), length, 1 + per_event)
    by_release = np.argsort(world.release, kind="stable")
    n_out = np.searchsorted(world.release[by_release], world.behaviour(users).epoch, side="right")
    titles = by_release[np.floor(u[..., 0] * n_out[:, None]).astype(np.int64)]
    facts = _facts(world, users, titles)
    scores = world.noise.sample(facts, u[..., 1:])
    return Events(titles, world.hours(users)[:, :length], facts, scores.score, scores.watched, _logged(world, users))


def _facts(world: WorldBase, users: Users, titles: NDArray[np.int64]) -> Exposure:
    """Everything that any noise model asks for."""
    who = world.behaviour(users)
    return Exposure(
        np.take_along_axis(world.satisfaction(users), titles, axis=1).astype(np.float64),
        np.broadcast_to(who.free_time[:, None], titles.shape),
        world.durations[titles],
        world.allure[who.epoch[:, None], titles],
        world.moods(users)[:, : titles.shape[1]],
    )


def _logged(world: WorldBase, users: Users) -> NDArray[np.bool_]:
    logged: NDArray[np.bool_] = np.arange(world.config.history_length) < world.history_lengths(users)[:, None]
    return logged


def _joined(parts: list[Events]) -> Events:
    facts = Exposure(*(np.concatenate(column) for column in zip(*(part.facts for part in parts), strict=True)))
    titles, hours, score, watched, logged = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("titles", "hours", "score", "watched", "logged")
    )
    return Events(titles, hours, facts, score, watched, logged)
