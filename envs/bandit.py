"""What all environments share: the contextual bandit behind them, and the single environment in front of it.

An episode is one step: a context (a user's history), a title, its reward. `Bandit` knows contexts and
rewards, for many episodes at a time and without state. `Episodes` says which context comes in an episode and
with which noise: both follow from (seed, number of the episode) alone, by independent streams. So the
single environment and the vector environment beside it, whatever its width, play the same episodes.

With a horizon above 1 an episode is a session of several steps, and `Sessions` holds what was shown in it so far.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from numbers import Integral
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import InvalidAction, ResetNeeded
from numpy.typing import NDArray

from recsim_gr.errors import ConfigError
from recsim_gr.observations import HIGHEST_SCORE, seen_mask
from recsim_gr.randomness import HALF_STEP, generator

FloatArray = NDArray[np.float64]
Rows = NDArray[np.int64]
Observation = dict[str, Any]


class UnknownArgumentError(ConfigError, TypeError):
    """A keyword that an environment does not have; a TypeError too, as Python's own is."""


class Played(NamedTuple):
    """What n actions earned.

    Attributes:
        rewards: (n,) float64.
        invalid: (n,) bool; whether the title had been seen before.
        info: further arrays, (n,) each, by their name in the info of a step.
    """

    rewards: NDArray[np.float64]
    invalid: NDArray[np.bool_]
    info: dict[str, NDArray[Any]]


class Sessions(Protocol):
    """n sessions that run at once, each at its own step."""

    @property
    def over(self) -> NDArray[np.bool_]:
        """(n,): whether each has ended, and waits for `start`."""
        ...

    def start(self, lanes: Rows, rows: Rows, u: FloatArray) -> None:
        """Begins sessions in the given lanes, (k,): with the contexts at (k,) ``rows`` and the noise of all their
        steps, (k, horizon, uniforms_per_step)."""
        ...

    def observe(self) -> dict[str, NDArray[Any]]:
        """Fresh arrays of n rows, as the bandit's `observation_space` describes them."""
        ...

    def action_mask(self) -> NDArray[np.int8]:
        """(n, I): 1 for titles that are out and have not been seen yet."""
        ...

    def step(self, titles: Rows) -> Played:
        """Shows each user one of (n,) titles. Where the session goes on, the title joins the history."""
        ...


class Bandit(ABC):
    """Contexts, named by their rows, and what actions earn in them.

    Attributes:
        n_titles: I.
        n_contexts: how many rows there are; each is as likely as every other.
        streams: how many random numbers a step takes, by what they are for.
        horizon: H, the steps of an episode at most.
        observation_space: of one observation.
    """

    n_titles: int
    n_contexts: int
    streams: dict[str, int]
    horizon: int = 1
    observation_space: spaces.Dict

    @property
    def uniforms_per_step(self) -> int:
        """How many random numbers a step takes; may be 0."""
        return sum(self.streams.values())

    @abstractmethod
    def users(self, rows: Rows) -> Rows:
        """(n,) whose contexts they are; for the info, never for an observation."""

    @abstractmethod
    def observe(self, rows: Rows) -> dict[str, NDArray[Any]]:
        """Fresh arrays of n rows, as `observation_space` describes them where the horizon is 1."""

    @abstractmethod
    def play(self, rows: Rows, titles: Rows, u: FloatArray, *, regret: bool) -> Played:
        """Shows each context a title.

        Args:
            rows: (n,) contexts.
            titles: (n,) in 0 to I − 1.
            u: (n, uniforms_per_step) uniforms in (0, 1), for the noise.
            regret: whether the info must say the regret, where it is known.
        """

    def action_mask(self, rows: Rows) -> NDArray[np.int8]:
        """(n, I): 1 for titles not seen yet."""
        mask: NDArray[np.int8] = (~seen_mask(self.observe(rows)["titles"], self.n_titles)).view(np.int8)
        return mask

    def sessions(self, n: int, *, regret: bool) -> Sessions:
        """Room for n sessions, asked for where the horizon is above 1; ``regret`` as in `play`."""
        raise NotImplementedError(f"{type(self).__name__} has no sessions")

    # One context at a time. Arrays of length 1 are slow; a bandit may do better, with the same results.

    def user_one(self, row: int) -> int:
        """Whose context it is."""
        return int(self.users(np.array([row]))[0])

    def observe_one(self, row: int) -> Observation:
        """The observation of one context."""
        return {name: values[0] for name, values in self.observe(np.array([row])).items()}

    def play_one(self, row: int, title: int, u: list[float]) -> tuple[float, dict[str, Any]]:
        """The reward of one title, and the info of the step, as Python's numbers."""
        played = self.play(np.array([row]), np.array([title]), np.array([u]), regret=True)
        return float(played.rewards[0]), info_of(played, 0)

    def action_mask_one(self, row: int) -> NDArray[np.int8]:
        """(I,)."""
        return self.action_mask(np.array([row]))[0]


def info_of(played: Played, i: int) -> dict[str, Any]:
    """The info of one of the actions, as Python's numbers."""
    return {name: values[i].item() for name, values in played.info.items()} | {"invalid": played.invalid[i].item()}


BELOW_ONE = float(np.nextafter(1.0, 0.0))

EPISODES_AT_A_TIME = 256
"""Episodes that the single environment draws ahead."""


class Episodes:
    """The episodes of a seed, in order: the context of each, and the noise of its steps.

    Each purpose has its stream, of which every episode owns a stretch of fixed length. Streams are read on from where
    they stand: the numbers are those of `recsim_gr.randomness.uniforms` for one stretch after the other.

    Args:
        bandit: what is played.
        seed: names the streams.
    """

    def __init__(self, bandit: Bandit, seed: int) -> None:
        self.bandit, self.seed = bandit, seed
        self._contexts = generator(seed, "environment/context")
        self._noise = [(generator(seed, f"environment/{name}"), each) for name, each in bandit.streams.items()]

    def take(self, n: int) -> tuple[Rows, FloatArray]:
        """(n,) contexts of the next n episodes, and (n, horizon, uniforms_per_step) for their noise."""
        rows = (_uniforms(self._contexts, (n,)) * self.bandit.n_contexts).astype(np.int64)
        np.minimum(rows, self.bandit.n_contexts - 1, out=rows)
        parts = [_uniforms(stream, (n, self.bandit.horizon, each)) for stream, each in self._noise]
        if len(parts) == 1:
            return rows, parts[0]
        return rows, np.concatenate([np.empty((n, self.bandit.horizon, 0)), *parts], axis=2)

    def one_by_one(self) -> Iterator[tuple[int, list[list[float]]]]:
        """The same episodes, as Python's numbers."""
        while True:
            rows, u = self.take(EPISODES_AT_A_TIME)
            yield from zip(rows.tolist(), u.tolist(), strict=True)


def _uniforms(stream: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """The stream's next numbers, moved into the open interval (0, 1) as `recsim_gr.randomness.uniforms` does it."""
    u = stream.random(shape)
    u += HALF_STEP
    return np.minimum(u, BELOW_ONE, out=u)


def observation_space(
    n_titles: int, length: int, n_epochs: int, bounded_scores: bool, longest_hours: float
) -> spaces.Dict:
    """The space of one context: the history padded behind to ``length`` = L.

    Args:
        n_titles: I, which is also the padding of ``titles``.
        length: L, the columns.
        n_epochs: epochs are 0 to n_epochs − 1.
        bounded_scores: whether scores stay in [1, 5]; with the padding they are then in [0, 5].
        longest_hours: the latest time of an event.
    """
    low, high = (0.0, HIGHEST_SCORE) if bounded_scores else (-np.inf, np.inf)
    return spaces.Dict(
        {
            "titles": spaces.Box(0, n_titles, (length,), np.int64),
            "scores": spaces.Box(low, high, (length,), np.float32),
            "times": spaces.Box(0.0, longest_hours, (length,), np.float32),
            "length": spaces.Discrete(length + 1),
            "epoch": spaces.Discrete(n_epochs),
        }
    )


class BanditEnv(gymnasium.Env[Observation, np.int64]):
    """One user at a time; its subclasses are the registered environments, with their data sheets.

    Args:
        bandit: contexts and rewards.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (as Gymnasium declares it)

    def __init__(self, bandit: Bandit) -> None:
        self.bandit = bandit
        self.observation_space = bandit.observation_space
        self.action_space = spaces.Discrete(bandit.n_titles)
        self._sessions = bandit.sessions(1, regret=True) if bandit.horizon > 1 else None
        self._episodes: Episodes | None = None
        self._following: Iterator[tuple[int, list[list[float]]]] = iter(())
        self._now: tuple[int, list[list[float]]] | None = None  # context and noise of the running episode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """The next context.

        Args:
            seed: starts all streams, of contexts and of noise, anew; equal seeds, equal episodes. None goes on with
                the streams as they stand, and takes a seed from the system at the first call.
            options: none are known; they are ignored.
        """
        if seed is not None or self._episodes is None:
            super().reset(seed=seed)
            seed = seed if seed is not None else int(self.np_random.integers(2**63))
            self._episodes = Episodes(self.bandit, seed)
            self._following = self._episodes.one_by_one()
        self._now = row, u = next(self._following)
        if self._sessions is not None:
            self._sessions.start(FIRST, np.array([row]), np.array([u]))
        return self._observe(row), {"action_mask": self._action_mask(row), "user": self.bandit.user_one(row)}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Shows the user a title. The episode may end with it; the observation then stays what it was.

        Raises:
            InvalidAction: not an integer in 0 to I − 1. (A seen title is legal, and earns the lowest score.)
            ResetNeeded: there was no reset since the episode ended.
        """
        row, u = self._current("step")
        title = self._title(action)
        if self._sessions is not None:
            return self._step_session(title)
        self._now = None
        reward, info = self.bandit.play_one(row, title, u[0])
        return self.bandit.observe_one(row), reward, True, False, info

    def _step_session(self, title: int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        row, _ = self._current("step")
        assert self._sessions is not None
        played = self._sessions.step(np.array([title]))
        over = bool(self._sessions.over[0])
        info = info_of(played, 0) | {"action_mask": self._action_mask(row)}
        if over:
            self._now = None
        return self._observe(row), float(played.rewards[0]), over, False, info

    def action_masks(self) -> NDArray[np.bool_]:
        """(I,) bool: which titles the user has not seen; sb3-contrib's masked algorithms look for this name.

        Raises:
            ResetNeeded: there is no episode.
        """
        row, _ = self._current("action_masks")
        return self._action_mask(row).astype(bool)

    def _current(self, method: str) -> tuple[int, list[list[float]]]:
        if self._now is None:
            raise ResetNeeded(f"call reset() before {method}(): the episode is over, or none has begun")
        return self._now

    def _title(self, action: Any) -> int:
        if type(action) is int or type(action) is np.int64:  # what nearly always comes; `contains` takes 2 µs
            valid = 0 <= action < self.bandit.n_titles
        else:
            valid = self.action_space.contains(action)
        if not valid:
            raise InvalidAction(f"an action is a title, an integer in 0 to {self.bandit.n_titles - 1}, got {action!r}")
        return int(action)

    def _action_mask(self, row: int) -> NDArray[np.int8]:
        return self.bandit.action_mask_one(row) if self._sessions is None else self._sessions.action_mask()[0]

    def _observe(self, row: int) -> Observation:
        if self._sessions is None:
            return self.bandit.observe_one(row)
        return {name: values[0] for name, values in self._sessions.observe().items()}


FIRST = np.zeros(1, dtype=np.int64)
"""The lane of the single environment's only session."""


def require_count(name: str, value: object) -> None:
    """Refuses what is no positive integer.

    Raises:
        ConfigError: says which keyword it is and what was got.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")


def seen_before(titles: Rows, histories: NDArray[Any]) -> Rows:
    """Which of (n,) titles stand in their histories, (n, L): their places, ascending."""
    seen: Rows = np.flatnonzero(histories == titles.astype(histories.dtype, copy=False)[:, None])
    seen //= histories.shape[1]
    return seen  # no title comes twice in a history


def at(places: Rows, n: int) -> NDArray[np.bool_]:
    """(n,): True at the given places."""
    flags = np.zeros(n, dtype=bool)
    flags[places] = True
    return flags
