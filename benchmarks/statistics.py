"""Labelled results, and what may be claimed from them: paired differences over seeds.

Seeds are replications. Every comparison is paired: both agents of a pair were fitted on the log of one seed
and scored on the same test users, so the spread between worlds cancels. Shapes: ``N`` noise levels, ``S``
seeds, ``T`` tasks. A missing result is NaN, and every function here leaves NaN out instead of spreading it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

FloatArray = npt.NDArray[np.float64]

WORLD = ""
"""The agent of the rows that describe the world itself."""

ROBUST_SEEDS = 10
"""Seeds from which the interquartile mean and its bootstrap say more than the mean and Student's t."""


@dataclass(frozen=True)
class Results:
    """The results of one world as arrays: one ``(N, S)`` array an (agent, metric).

    Attributes:
        noise: ``(N,)`` the settings of the noise dial, ascending.
        reliability: ``(N,)`` within-user reliability, the mean over seeds; NaN where it was not measured.
        seeds: the ``S`` seeds, ascending.
        agents: the agents in the order of their first appearance, the world's rows (``""``) left out.
        values: ``(agent, metric)`` to ``(N, S)``, NaN where a result is missing.
    """

    noise: FloatArray
    reliability: FloatArray
    seeds: tuple[int, ...]
    agents: tuple[str, ...]
    values: Mapping[tuple[str, str], FloatArray]

    def of(self, agent: str, metric: str) -> FloatArray:
        """``(N, S)`` values of one agent's metric; all NaN when there are none."""
        found = self.values.get((agent, metric))
        return found if found is not None else np.full((len(self.noise), len(self.seeds)), np.nan)

    def metrics(self, world: bool = False) -> tuple[str, ...]:
        """Names of the agents' metrics (or the world's), in the order of their first appearance."""
        names = (metric for agent, metric in self.values if (agent == WORLD) == world)
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class Comparison:
    """One agent against the reference on one metric; every array ``(N,)``, NaN where it cannot be said.

    Attributes:
        mean: the metric itself, averaged over seeds.
        difference: its paired difference to the reference, averaged over seeds.
        half_width: of the Student-t interval of that difference; NaN with one seed.
        p_greater: one-sided p-value of "the difference is above zero", uncorrected.
        p_holm: the same after Holm's correction over the family; NaN for agents outside of it.
        place: 0 at the reference, 1 at the ceiling, averaged over seeds.
        place_half_width: of the Student-t interval of the place.
        n_seeds: seeds with a pair.
    """

    mean: FloatArray
    difference: FloatArray
    half_width: FloatArray
    p_greater: FloatArray
    p_holm: FloatArray
    place: FloatArray
    place_half_width: FloatArray
    n_seeds: npt.NDArray[np.int64]


def compare(
    results: Results, metric: str, reference: str, ceiling: str, family: Iterable[str]
) -> dict[str, Comparison]:
    """Every agent against ``reference`` on ``metric``, level by level.

    Args:
        results: of one world.
        metric: such as ``value_top10``.
        reference: the agent at place 0.
        ceiling: the agent at place 1.
        family: the agents that a claim is made about; Holm's correction runs over them, level by level.
    """
    base, top = results.of(reference, metric), results.of(ceiling, metric)
    family = [agent for agent in results.agents if agent in set(family)]
    p_greater = {a: t_test(results.of(a, metric) - base)[1] for a in results.agents}
    adjusted = {a: np.full(len(results.noise), np.nan) for a in results.agents}
    for level in range(len(results.noise) if family else 0):
        for agent, p in zip(family, holm([p_greater[a][level] for a in family]), strict=True):
            adjusted[agent][level] = p
    out = {}
    for agent in results.agents:
        values = results.of(agent, metric)
        difference, half_width, n_seeds = t_interval(values - base)
        share, share_half_width, _ = t_interval(place(values, base, top))
        out[agent] = Comparison(
            mean=t_interval(values)[0],
            difference=difference,
            half_width=half_width,
            p_greater=p_greater[agent],
            p_holm=adjusted[agent],
            place=share,
            place_half_width=share_half_width,
            n_seeds=n_seeds,
        )
    return out


def t_interval(samples: npt.ArrayLike, level: float = 0.95) -> tuple[FloatArray, FloatArray, npt.NDArray[np.int64]]:
    """Mean and half width of Student's t interval over the last axis.

    Args:
        samples: ``(…, S)``; NaN is left out.
        level: coverage, in (0, 1).

    Returns:
        mean, half width (NaN below two samples: one seed says nothing about spread) and count, each ``(…)``.
    """
    mean, error, count = _moments(samples)
    quantile = stats.t.ppf(0.5 + level / 2, np.maximum(count - 1, 1))
    return mean, quantile * error, count


def t_test(differences: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Student's t-test of paired differences against zero, over the last axis.

    Where all differences are equal the statistic is 0/0 or ±∞ and its limit is taken: p-values of 1
    (two-sided) and ½ for no difference at all, as of an agent to itself; 0 or 1 for a constant one.

    Args:
        differences: ``(…, S)``; NaN is left out.

    Returns:
        p-values ``(…)``, two-sided and one-sided (small when the mean is above zero); NaN below two samples.
    """
    mean, error, count = _moments(differences)
    without_spread = np.where(mean == 0, 0.0, np.copysign(np.inf, mean))
    statistic = np.divide(mean, error, out=without_spread, where=error > 0)
    freedom = np.maximum(count - 1, 1)
    known = count > 1
    greater = np.where(known, stats.t.sf(statistic, freedom), np.nan)
    two_sided = np.where(known, 2 * stats.t.sf(np.abs(statistic), freedom), np.nan)
    return two_sided, greater


def holm(p_values: npt.ArrayLike) -> FloatArray:
    """Holm's step-down adjustment: rejecting where it is at most α keeps the family-wise error at most α.

    With the m p-values ascending, ``p̃_(i) = max_{j ≤ i} min(1, (m − j + 1) p_(j))``. Holm (1979),
    Scandinavian Journal of Statistics 6, 65–70.

    Args:
        p_values: ``(m,)``; NaN is no member of the family: it stays NaN and does not count in m.

    Returns:
        ``(m,)`` adjusted p-values, in the order given.
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    members = np.flatnonzero(np.isfinite(p))
    order = members[np.argsort(p[members], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, factors * p[order])) if len(order) else []
    return adjusted


def place(values: npt.ArrayLike, reference: npt.ArrayLike, ceiling: npt.ArrayLike) -> FloatArray:
    """``(value − reference) / (ceiling − reference)``, seed by seed: 0 at the reference, 1 at the ceiling.

    All three are of one shape. NaN where the ceiling is not above the reference: no way, so no share of it.
    """
    value, low, high = (np.asarray(x, dtype=np.float64) for x in (values, reference, ceiling))
    gap = high - low
    return np.divide(value - low, gap, out=np.full(gap.shape, np.nan), where=gap > 0)


def interquartile_mean(scores: npt.ArrayLike) -> float:
    """Mean of the middle half of all ``(S, T)`` scores, a quarter cut at either end (Agarwal et al., §4)."""
    # scipy.stats.trim_mean does the same, 14 times slower: a bootstrap calls this thousands of times.
    ordered = np.sort(np.asarray(scores, dtype=np.float64), axis=None)
    cut = ordered.size // 4
    return float(ordered[cut : ordered.size - cut].mean())


def stratified_bootstrap(
    scores: npt.ArrayLike,
    statistic: Callable[[FloatArray], float] = interquartile_mean,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """A statistic of runs × tasks with its percentile interval, runs resampled within each task.

    Agarwal et al. (2021), "Deep RL at the edge of the statistical precipice", arXiv:2108.13264, §4.

    Args:
        scores: ``(S, T)`` normalised scores, a row a seed and a column a task; finite.
        statistic: of an ``(S, T)`` array.
        resamples: bootstrap resamples.
        level: coverage, in (0, 1).
        seed: of the resampling; equal seeds give equal intervals.

    Returns:
        the statistic, the lower and the upper end of its interval.

    Raises:
        ValueError: ``scores`` is not a finite, non-empty matrix.
    """
    runs = np.asarray(scores, dtype=np.float64)
    if runs.ndim != 2 or runs.size == 0 or not np.isfinite(runs).all():
        raise ValueError(f"scores must be a finite (seeds, tasks) matrix, got shape {runs.shape}")
    random = np.random.Generator(np.random.Philox(seed))
    tasks = np.arange(runs.shape[1])
    draws = [statistic(runs[random.integers(len(runs), size=runs.shape), tasks]) for _ in range(resamples)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return statistic(runs), float(low), float(high)


def _moments(samples: npt.ArrayLike) -> tuple[FloatArray, FloatArray, npt.NDArray[np.int64]]:
    """Mean, standard error of the mean (NaN below two samples) and count over the last axis, without NaN."""
    x = np.asarray(samples, dtype=np.float64)
    finite = np.isfinite(x)
    count = finite.sum(axis=-1)
    total = np.where(finite, x, 0.0).sum(axis=-1)
    mean = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    squares = np.where(finite, (x - mean[..., None]) ** 2, 0.0).sum(axis=-1)
    variance = np.divide(squares, count - 1, out=np.full(total.shape, np.nan), where=count > 1)
    return mean, np.sqrt(variance / np.maximum(count, 1)), count
