"""What all environments share: the contextual bandit behind them, and the single environment in front of it.

An episode is one step: a context (a user's history), a title, its reward. `Bandit` knows contexts and
rewards, for many episodes at a time and without state. `Episodes` says which context comes in an episode and
with which noise: both follow from (seed, number of the episode) alone, by two independent streams. So the
single environment and the vector environment beside it, whatever its width, play the same episodes.
"""

from abc import ABC, abstractmethod
from numbers import Integral
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import InvalidAction, ResetNeeded
from numpy.typing import NDArray

from recsim_gr.errors import ConfigError
from recsim_gr.observations import HIGHEST_SCORE, LOWEST_SCORE, seen_mask
from recsim_gr.randomness import uniforms

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


class Bandit(ABC):
    """Contexts, named by their rows, and what actions earn in them.

    Attributes:
        n_titles: I.
        n_contexts: how many rows there are; each is as likely as every other.
        uniforms_per_episode: how many random numbers the noise of a reward takes; may be 0.
        observation_space: of one observation.
    """

    n_titles: int
    n_contexts: int
    uniforms_per_episode: int
    observation_space: spaces.Dict

    @abstractmethod
    def users(self, rows: Rows) -> Rows:
        """(n,) whose contexts they are; for the info, never for an observation."""

    @abstractmethod
    def observe(self, rows: Rows) -> dict[str, NDArray[Any]]:
        """Fresh arrays of n rows, as `observation_space` describes them."""

    @abstractmethod
    def play(self, rows: Rows, titles: Rows, u: FloatArray, *, regret: bool) -> Played:
        """Shows each context a title.

        Args:
            rows: (n,) contexts.
            titles: (n,) in 0 to I − 1.
            u: (n, uniforms_per_episode) uniforms in (0, 1), for the noise.
            regret: whether the info must say the regret, where it is known.
        """

    def action_mask(self, rows: Rows) -> NDArray[np.int8]:
        """(n, I): 1 for titles not seen yet."""
        mask: NDArray[np.int8] = (~seen_mask(self.observe(rows)["titles"], self.n_titles)).view(np.int8)
        return mask


EPISODES_AT_A_TIME = 256
"""Episodes that share a stretch of a stream: numbers are drawn that many ahead, since starting a stream takes as long
as drawing a thousand of them."""


class Episodes:
    """The episodes of a seed, in order: the context and the noise of each.

    Args:
        bandit: what is played.
        seed: names the two streams.
    """

    def __init__(self, bandit: Bandit, seed: int) -> None:
        self.bandit, self.seed = bandit, seed
        self._drawn = 0  # groups of EPISODES_AT_A_TIME
        self._rows = np.empty(0, dtype=np.int64)
        self._noise = np.empty((0, bandit.uniforms_per_episode))

    def take(self, n: int) -> tuple[Rows, FloatArray]:
        """(n,) contexts of the next n episodes, and (n, uniforms_per_episode) for their noise."""
        if len(self._rows) < n:
            self._draw(-(-(n - len(self._rows)) // EPISODES_AT_A_TIME))
        rows, self._rows = self._rows[:n], self._rows[n:]
        noise, self._noise = self._noise[:n], self._noise[n:]
        return rows, noise

    def _draw(self, groups: int) -> None:
        n, last = self.bandit.n_contexts, self.bandit.n_contexts - 1
        rows = np.floor(self._uniforms("context", groups, 1)[:, 0] * n).astype(np.int64)
        noise = self._uniforms("noise", groups, self.bandit.uniforms_per_episode)
        self._rows = np.concatenate([self._rows, np.minimum(rows, last)])
        self._noise = np.concatenate([self._noise, noise])
        self._drawn += groups

    def _uniforms(self, purpose: str, groups: int, each: int) -> FloatArray:
        if each == 0:
            return np.empty((groups * EPISODES_AT_A_TIME, 0))
        which = np.arange(self._drawn, self._drawn + groups)
        u = uniforms(self.seed, f"environment/{purpose}", which, EPISODES_AT_A_TIME * each)
        return u.reshape(-1, each)


def observation_space(
    n_titles: int, length: int, n_epochs: int, bounded_scores: bool, longest_hours: float
) -> spaces.Dict:
    """The space of one context: the history padded behind to ``length`` = L.

    Args:
        n_titles: I, which is also the padding of ``titles``.
        length: L.
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
        self._episodes: Episodes | None = None
        self._now: tuple[Rows, FloatArray] | None = None  # of the running episode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """The next context.

        Args:
            seed: starts both streams, of contexts and of noise, anew; equal seeds, equal episodes. None goes on with
                the streams as they stand, and takes a seed from the system at the first call.
            options: none are known; they are ignored.
        """
        super().reset(seed=seed)
        if seed is not None or self._episodes is None:
            seed = seed if seed is not None else int(self.np_random.integers(2**63))
            self._episodes = Episodes(self.bandit, seed)
        self._now = row, _ = self._episodes.take(1)
        user = int(self.bandit.users(row)[0])
        return self._observe(row), {"action_mask": self.bandit.action_mask(row)[0], "user": user}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Shows the user a title; the episode ends with it, and the observation stays what it was.

        Raises:
            InvalidAction: not an integer in 0 to I − 1. (A seen title is legal, and earns the lowest score.)
            ResetNeeded: there was no reset since the last step.
        """
        row, u = self._current("step")
        if not self.action_space.contains(action):
            raise InvalidAction(f"an action is a title, an integer in 0 to {self.bandit.n_titles - 1}, got {action!r}")
        titles = np.array([action], dtype=np.int64).reshape(1)
        played = self.bandit.play(row, titles, u, regret=True)
        self._now = None
        info = {name: values[0].item() for name, values in played.info.items()}
        info["invalid"] = bool(played.invalid[0])
        return self._observe(row), float(played.rewards[0]), True, False, info

    def action_masks(self) -> NDArray[np.bool_]:
        """(I,) bool: which titles the user has not seen; sb3-contrib's masked algorithms look for this name.

        Raises:
            ResetNeeded: there is no episode.
        """
        row, _ = self._current("action_masks")
        return self.bandit.action_mask(row)[0].astype(bool)

    def _current(self, method: str) -> tuple[Rows, FloatArray]:
        if self._now is None:
            raise ResetNeeded(f"call reset() before {method}(): an episode is one step long")
        return self._now

    def _observe(self, row: Rows) -> Observation:
        return {name: values[0] for name, values in self.bandit.observe(row).items()}


def require_count(name: str, value: object) -> None:
    """Refuses what is no positive integer.

    Raises:
        ConfigError: says which keyword it is and what was got.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")


def seen_before(titles: Rows, histories: Rows) -> NDArray[np.bool_]:
    """(n,): whether each title stands in its history, (n, L)."""
    seen = np.zeros(len(titles), dtype=bool)
    seen[np.flatnonzero(histories == titles[:, None]) // histories.shape[1]] = True
    return seen


def lowest_where_invalid(values: NDArray[Any], invalid: NDArray[np.bool_]) -> FloatArray:
    """(n,) float64: 1, the lowest score, where a title had been seen before."""
    return np.where(invalid, LOWEST_SCORE, values.astype(np.float64))
