"""A world in numbers: how good its scores are, what is popular, who chooses what, and how it changes.

These are the records; `recsim_gr.benchmarks.portrait_measures.portray` fills them.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsim_gr.behaviour import FloatArray

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
"""Quantiles that are kept of every spread."""

BINS = 40
"""Of histograms."""

TAIL = 0.002
"""Share of an unbounded quantity that stands in the first and in the last bin of its histogram."""


@dataclass(frozen=True, eq=False)
class Spread:
    """How a positive quantity varies.

    Attributes:
        edges: (B + 1,) of its histogram.
        shares: (B,).
        quantiles: at `LEVELS`.
        mean: of it.
    """

    edges: FloatArray
    shares: FloatArray
    quantiles: tuple[float, ...]
    mean: float

    @classmethod
    def of(cls, values: NDArray[Any], edges: FloatArray | None = None) -> "Spread":
        """Of values above 0; without ``edges`` in bins of equal ratio, the tails in the first and the last."""
        if edges is None:
            low, high = (float(q) for q in np.quantile(values, [TAIL, 1.0 - TAIL]))
            edges = np.geomspace(low, max(high, 1.05 * low), BINS + 1)
        shares = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)
        quantiles = tuple(float(q) for q in np.quantile(values, LEVELS))
        return cls(edges, shares, quantiles, float(values.mean()))

    def at(self, level: float) -> float:
        """One of the quantiles."""
        return self.quantiles[LEVELS.index(level)]


@dataclass(frozen=True, eq=False)
class Distribution:
    """One quantity under random exposure (``forced``) and in the log (``chosen``).

    Attributes:
        edges: (B + 1,); what lies outside counts to the first or the last bin.
        forced, chosen: (B,) shares, the atom apart.
        atom: ``(forced, chosen)`` shares at exactly 5.
        mean, deviation: likewise.
    """

    edges: FloatArray
    forced: FloatArray
    chosen: FloatArray
    atom: tuple[float, float]
    mean: tuple[float, float]
    deviation: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Signal:
    """How good scores are, for each noise model at each dial, the world being the same otherwise.

    Attributes:
        models: M names.
        dials: (D,).
        within_user, pooled: (M, D) reliability: signed corr² of score and satisfaction over logged events.
        alignment: (M, D): the same of the expected score, what a perfect model of the score could know.
        own: the model and dial of this world, and its three figures.
    """

    models: tuple[str, ...]
    dials: tuple[float, ...]
    within_user: FloatArray
    pooled: FloatArray
    alignment: FloatArray
    own: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Popularity:
    """Events by title.

    Attributes:
        train, test, forced: (I,) events of each title, descending: logged, and as many under random exposure, which
            shows what counting so few events does.
        gini, top: of the three: Gini coefficient, and share of the top 1 % of the titles.
        rating_correlation: of log(events) and mean score over titles with 5 training events or more.
    """

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    forced: NDArray[np.int64]
    gini: tuple[float, ...]
    top: tuple[float, ...]
    rating_correlation: float


@dataclass(frozen=True, eq=False)
class Histories:
    """How long histories are and how their events lie in time, training users.

    Attributes:
        lengths: (history_length,) share of the users with 1, 2, … events.
        length: events a user.
        gap: hours between neighbouring events; None where histories are one event long.
        days: from the first event to the last of a user; likewise.
        neighbours: mean cosine of neighbouring titles' directions, after short and after long gaps, where
            ``order_effect`` is on.
    """

    lengths: FloatArray
    length: Spread
    gap: Spread | None
    days: Spread | None
    neighbours: tuple[float, float] | None


@dataclass(frozen=True, eq=False)
class Completion:
    """Watching against duration, titles in equally large groups by duration; (G,) each.

    Attributes:
        minutes: median duration of the group.
        events: logged events.
        observed, forced: share of events watched to the end: logged, and under random exposure.
        exact: its expectation over the logged events, given their users and titles; NaN where scores are no watch time.
        watched: median minutes watched of a logged event.
        quantiles: 5, 25, 50, 75 and 95 % of the catalogue's durations.
    """

    minutes: FloatArray
    events: NDArray[np.int64]
    observed: FloatArray
    forced: FloatArray
    exact: FloatArray
    watched: FloatArray
    quantiles: FloatArray


@dataclass(frozen=True, eq=False)
class Drift:
    """How epochs differ; (T,) or (T, T).

    Attributes:
        appeal: correlation of appeal, on its normal scale, between epochs.
        popularity: Spearman correlation of titles' first-choice shares among different users of two epochs; within an
            epoch among its two halves, which is as high as sampling allows.
        taste: length of the population's mean taste, in deviations of taste along an axis; None without tastes.
        released: share of the titles that are out.
        cold_exposure: share of the choices that go to titles which came out after the first epoch.
    """

    appeal: FloatArray
    popularity: FloatArray
    taste: FloatArray | None
    released: FloatArray
    cold_exposure: FloatArray


@dataclass(frozen=True, eq=False)
class Confounding:
    """What a title is worth to those who choose it, against what it is worth to everybody.

    Titles in groups by what they are worth to everybody; users in terciles of discernment. Exact for these users.

    Attributes:
        forced: (G,) mean satisfaction of the group's titles over all users.
        chosen: (3, G) the same over those who choose a title, weighted by first-choice propensities.
        forced_score, chosen_score: the same of the expected score.
        discernment: (3,) mean of each tercile.
        gap, gap_score: (3,) chosen − forced, mean over titles, for each tercile.
        overall: ``(satisfaction, score)``: the gap over all users.
    """

    forced: FloatArray
    chosen: FloatArray
    forced_score: FloatArray
    chosen_score: FloatArray
    discernment: FloatArray
    gap: FloatArray
    gap_score: FloatArray
    overall: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Choices:
    """Who chooses how, training users.

    Attributes:
        perplexity: of the first choice, in titles.
        discernment: of the users.
        bins: (K,) mean discernment of groups of users, ascending.
        likeness: (K, 3) 10, 50 and 90 % quantiles of the within-user correlation of utility and satisfaction there.
        acceptance: mean probability that a title shown at random is watched.
    """

    perplexity: Spread
    discernment: Spread
    bins: FloatArray
    likeness: FloatArray
    acceptance: float


@dataclass(frozen=True, eq=False)
class Portrait:
    """All that is known of a world.

    Attributes:
        env_id: of the environment over this kind of world.
        n_titles, n_users, n_test_users: what was looked at.
        variance: shares of the variance of satisfaction over pairs: user, title, rest.
    """

    env_id: str
    n_titles: int
    n_users: int
    n_test_users: int
    n_events: int
    variance: tuple[float, float, float]
    satisfaction: Distribution
    score: Distribution
    signal: Signal
    popularity: Popularity
    histories: Histories
    completion: Completion
    drift: Drift
    confounding: Confounding
    choices: Choices

    def to_json(self) -> dict[str, Any]:
        """All numbers as JSON values."""
        values: dict[str, Any] = _plain(dataclasses.asdict(self))
        return values


def _plain(value: Any) -> Any:
    """Arrays as lists."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value
