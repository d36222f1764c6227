"""What a reward model has to beat: the user's own mean, the title's mean (the study's two), and the two added up.

Means of few scores are shrunk to what is known without them, by credibility (Bühlmann 1967; empirical Bayes under
squared error): n scores weigh n/(n + k), with k = σ²/τ², σ² the variance of scores within a group and τ² that of the
groups' true means, both estimated from the training log by the moments of the one-way analysis of variance (Bühlmann
and Straub 1970, equal weights). So nothing is tuned: where groups do not differ beyond chance (τ² ≤ 0), k is infinite
and the mean is the log's.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from recsim_gr.histories import Histories
from recsim_gr.log import InteractionLog
from recsim_gr.observations import Observations

FloatArray = NDArray[np.float64]

MOST_SWEEPS, SWEPT = 100, 1e-4
"""Of `Additive.fit`: it ends when no title's effect moves by a ten-thousandth of a point, after some ten sweeps."""


class RewardBaseline(ABC):
    """A reward model that knows means and nothing else; it answers what an ensemble answers."""

    @classmethod
    @abstractmethod
    def fit(cls, log: InteractionLog) -> Self:
        """From a training log."""

    @abstractmethod
    def mean(self, observations: Observations) -> NDArray[np.float32]:
        """(n, I): the score it expects of every title."""

    @abstractmethod
    def mean_at(
        self, histories: InteractionLog | Histories, titles: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """(U, L): the score of one title after each prefix, as `RewardEnsemble.mean_at`; whatever on padding."""


@dataclass(frozen=True)
class UserMean(RewardBaseline):
    """The user's own mean score so far: (Σ r + k·m)/(n + k).

    Attributes:
        overall: m, the log's mean score.
        strength: k.
    """

    overall: float
    strength: float

    @classmethod
    def fit(cls, log: InteractionLog) -> Self:
        return cls(float(log.score.mean(dtype=np.float64)), credibility(log.score, np.cumsum(log.step == 0) - 1))

    def mean(self, observations: Observations) -> NDArray[np.float32]:
        above = _above_so_far(observations.scores - np.float32(self.overall), _real(observations), self.strength)[:, -1]
        return np.repeat(self.overall + above[:, None], observations.n_titles, axis=1).astype(np.float32)

    def mean_at(
        self, histories: InteractionLog | Histories, titles: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        seen = as_histories(histories).observations
        above = _above_so_far(seen.scores - np.float32(self.overall), _real(seen), self.strength)
        return (self.overall + above[:, :-1]).astype(np.float32)


@dataclass(frozen=True, eq=False)
class TitleMean(RewardBaseline):
    """The title's mean score over all users: (Σ r + k·m)/(n + k); m where nobody has watched it.

    Attributes:
        by_title: (I,).
        strength: k.
    """

    by_title: FloatArray
    strength: float

    @classmethod
    def fit(cls, log: InteractionLog) -> Self:
        overall, strength = float(log.score.mean(dtype=np.float64)), credibility(log.score, log.title)
        return cls(overall + _effects(log.score - overall, log.title, log.n_titles, strength), strength)

    def mean(self, observations: Observations) -> NDArray[np.float32]:
        return np.tile(self.by_title.astype(np.float32), (len(observations), 1))

    def mean_at(
        self, histories: InteractionLog | Histories, titles: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        return self.by_title[asked(as_histories(histories), titles)].astype(np.float32)


@dataclass(frozen=True, eq=False)
class Additive(RewardBaseline):
    """Both: m + c_a + Σ (r − m − c)/(n + k), the title's effect and by how much the user is above those so far.

    Effects of users and titles are fitted to each other in turns, each shrunk by the credibility of what the other
    leaves: backfitting of the random-effects model r = m + b_u + c_a + noise. The effect of a user is then that of the
    history before an event, with users of the log and others treated alike.

    Attributes:
        overall: m.
        by_title: (I,) c.
        strength: k of users.
        title_strength: k of titles.
    """

    overall: float
    by_title: FloatArray
    strength: float
    title_strength: float

    @classmethod
    def fit(cls, log: InteractionLog) -> Self:
        user, title = np.cumsum(log.step == 0) - 1, log.title
        overall = float(log.score.mean(dtype=np.float64))
        above = log.score - overall
        by_user, by_title = np.zeros(int(user[-1]) + 1), np.zeros(log.n_titles)
        k_user = k_title = np.inf
        for _ in range(MOST_SWEEPS):
            left = above - by_user[user]
            k_title, before = credibility(left, title), by_title
            by_title = _effects(left, title, log.n_titles, k_title)
            left = above - by_title[title]
            k_user = credibility(left, user)
            by_user = _effects(left, user, len(by_user), k_user)
            if np.abs(by_title - before).max() < SWEPT:
                break
        return cls(overall, by_title, k_user, k_title)

    def mean(self, observations: Observations) -> NDArray[np.float32]:
        above = self._above(observations)[:, -1]
        return (self.overall + self.by_title + above[:, None]).astype(np.float32)

    def mean_at(
        self, histories: InteractionLog | Histories, titles: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        known = as_histories(histories)
        above = self._above(known.observations)[:, :-1]
        return (self.overall + self.by_title[asked(known, titles)] + above).astype(np.float32)

    def _above(self, seen: Observations) -> FloatArray:
        effects = np.append(self.by_title, 0.0)[seen.titles]
        return _above_so_far(seen.scores - self.overall - effects, _real(seen), self.strength)


BASELINES: tuple[type[RewardBaseline], ...] = (UserMean, TitleMean, Additive)
"""The study's two, and the one that a hostile reader would ask for."""


def credibility(scores: NDArray[np.floating], group: NDArray[np.int64]) -> float:
    """k = σ²/τ² of the head of the module; infinite where groups do not differ beyond chance.

    Args:
        scores: (E,).
        group: (E,) int64, 0 or more.
    """
    values = scores.astype(np.float64)
    count = np.bincount(group)
    there = count > 0
    count = count[there].astype(np.float64)
    mean = np.bincount(group, weights=values)[there] / count
    n, groups = len(values), len(count)
    if groups < 2 or n == groups:  # one group, or one score each: nothing to tell the two variances apart
        return float("inf")
    between = float(count @ (mean - values.mean()) ** 2)
    total = float(((values - values.mean()) ** 2).sum())
    within = max(total - between, 0.0) / (n - groups)
    variance = (between - (groups - 1) * within) / (n - float(count @ count) / n)
    return within / variance if variance > 0 else float("inf")


def _effects(above: NDArray[np.floating], group: NDArray[np.int64], groups: int, strength: float) -> FloatArray:
    """(groups,): means shrunk to 0; 0 for groups without a score."""
    count = np.bincount(group, minlength=groups)
    total = np.bincount(group, weights=above.astype(np.float64), minlength=groups)
    return np.divide(total, count + strength, out=np.zeros(groups), where=count > 0)


def _above_so_far(above: NDArray[np.floating], real: NDArray[np.bool_], strength: float) -> FloatArray:
    """(U, L + 1): Σ above/(n + k) over the events before each place; where there is none, over all."""
    before = ((0, 0), (1, 0))
    total = np.pad(np.where(real, above, 0.0).astype(np.float64).cumsum(axis=1), before)
    count = np.pad(real.cumsum(axis=1), before)
    return np.divide(total, count + strength, out=np.zeros(total.shape), where=count > 0)


def _real(observations: Observations) -> NDArray[np.bool_]:
    """(n, L): which places hold an event."""
    return np.arange(observations.titles.shape[1]) < observations.length[:, None]


def as_histories(histories: InteractionLog | Histories) -> Histories:
    """A log's histories, or these themselves."""
    return histories if isinstance(histories, Histories) else Histories(histories)


def asked(histories: Histories, titles: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """(U, L) titles to be scored, below I: the given ones, or the log's own; title 0 on padding, which is I.

    Raises:
        ValueError: titles of another shape, below 0, or above I.
    """
    own = histories.observations.titles
    titles = own if titles is None else np.asarray(titles)
    if titles.shape != own.shape or titles.min(initial=0) < 0 or titles.max(initial=0) > histories.n_titles:
        got = f"{titles.shape} from {titles.min(initial=0)} to {titles.max(initial=0)}"
        raise ValueError(f"titles must be (U, L) = {own.shape}, from 0 to {histories.n_titles} (padding), got {got}")
    return np.where(titles < histories.n_titles, titles, 0)
