"""Measures a world: draws a sample of users and fills a portrait.

Everything follows from the world's config and the number of users looked at. What is said of *pairs* of a user and a
title is exact for those users; what is said of *events* is counted in their histories.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from recsim_gr import metrics
from recsim_gr.behaviour import FloatArray
from recsim_gr.benchmarks.portrait import (
    BINS,
    TAIL,
    Choices,
    Completion,
    Confounding,
    Distribution,
    Drift,
    Histories,
    Popularity,
    Portrait,
    Signal,
    Spread,
)
from recsim_gr.benchmarks.world_sample import (
    SATISFACTION_EDGES,
    TERCILES,
    Events,
    Notify,
    Sample,
    draw_sample,
    first_choice,
)
from recsim_gr.noise import NOISE_MODELS, DurationDebiasedNoise, Exposure, RewardNoise, WatchTimeNoise
from recsim_gr.observations import HIGHEST_SCORE
from recsim_gr.randomness import uniforms
from recsim_gr.replay import ReplayWorld
from recsim_gr.world import World
from recsim_gr.world_base import WorldBase

DIALS = tuple(k / 10 for k in range(11))
"""Settings of the noise dial at which every model is measured."""

ALIGNMENT_CELLS = 500_000
"""Pairs that the alignment of every model and dial is averaged over: 500 users of 1,000 titles, a standard error of
about .005, at two seconds for 55 settings."""

DEBIASED_CELLS = 100_000
"""The same for the duration-debiased score, whose mean takes thirty times as long."""

DURATION_BINS, TITLE_GROUPS, LIKENESS_BINS = 10, 20, 15
"""Groups of titles by duration and by worth, and of users by discernment."""

TOP_SHARE, OFTEN = 0.01, 5
"""The most popular titles; events from which on a title's mean score says something."""


def portray(world: WorldBase, n_users: int, notify: Notify = lambda share, what: None) -> Portrait:
    """Looks at up to ``n_users`` training users of a world, and as many test users.

    Args:
        world: of either kind.
        n_users: at least 2.
        notify: told how far it is.
    """
    sample = draw_sample(world, n_users, lambda share, what: notify(0.6 * share, what))
    signal = _signal(sample, lambda share, what: notify(0.6 + 0.4 * share, what))
    return Portrait(
        env_id=world.env_id,
        n_titles=world.n_titles,
        n_users=len(sample.train),
        n_test_users=len(sample.test),
        n_events=int(sample.log.logged.sum()),
        variance=_variance_shares(sample),
        satisfaction=_satisfaction(sample),
        score=_score(sample),
        signal=signal,
        popularity=_popularity(sample),
        histories=_histories(sample),
        completion=_completion(sample),
        drift=_drift(sample),
        confounding=_confounding(sample),
        choices=_choices(sample),
    )


# ------------------------------------------------------------------------------------------------ distributions


def _satisfaction(sample: Sample) -> Distribution:
    """Of all pairs, exact, beside the logged events."""
    sums, chosen = sample.sums, sample.log.of(sample.log.facts.satisfaction)
    n = sums.n.sum()
    mean = sums.satisfaction.sum() / n
    return Distribution(
        SATISFACTION_EDGES,
        sums.histogram / n,
        np.histogram(chosen, SATISFACTION_EDGES)[0] / len(chosen),
        atom=(0.0, 0.0),
        mean=(float(mean), float(chosen.mean())),
        deviation=(float(np.sqrt(sums.square.sum() / n - mean**2)), float(chosen.std())),
    )


def _score(sample: Sample) -> Distribution:
    forced, chosen = (events.of(events.score) for events in (sample.forced, sample.log))
    edges = SATISFACTION_EDGES
    if not sample.world.noise.bounded:
        both = np.concatenate([forced, chosen])
        low, high = (float(q) for q in np.quantile(both, [TAIL, 1.0 - TAIL]))
        edges = np.linspace(low, high, BINS + 1)
    at_top = [values == HIGHEST_SCORE for values in (forced, chosen)]
    shares = [
        np.histogram(np.clip(values[~top], edges[0], edges[-1]), edges)[0] / len(values)
        for values, top in zip((forced, chosen), at_top, strict=True)
    ]
    return Distribution(
        edges,
        shares[0],
        shares[1],
        atom=(float(at_top[0].mean()), float(at_top[1].mean())),
        mean=(float(forced.mean()), float(chosen.mean())),
        deviation=(float(forced.std()), float(chosen.std())),
    )


def _variance_shares(sample: Sample) -> tuple[float, float, float]:
    """Of satisfaction over pairs: between users, between titles, and the rest (noise-free personal taste)."""
    sums = sample.sums
    n, there = sums.n.sum(), sums.n > 0
    mean = sums.satisfaction.sum() / n
    total = sums.square.sum() / n - mean**2
    if total <= 0:
        return 0.0, 0.0, 0.0
    user = np.concatenate(sums.user_means).var() / total
    title_means = sums.satisfaction[there] / sums.n[there]
    title = (sums.n[there] * (title_means - mean) ** 2).sum() / n / total
    return float(user), float(title), float(1.0 - user - title)


# ------------------------------------------------------------------------------------------------------- signal


def _signal(sample: Sample, notify: Notify) -> Signal:
    """Every model at every dial, on the same choices and the same random numbers."""
    world = sample.world
    names = list(NOISE_MODELS)
    if world.config.duration_debiased:
        names.insert(0, DEBIASED)
    figures = np.full((3, len(names), len(DIALS)), np.nan)
    pairs, few = _Pairs.of(sample, ALIGNMENT_CELLS), _Pairs.of(sample, DEBIASED_CELLS)
    for m, name in enumerate(names):
        for d, dial in enumerate(DIALS):
            figures[:, m, d] = _figures(sample, few if name == DEBIASED else pairs, _noise(world, name, dial))
            notify((m + (d + 1) / len(DIALS)) / len(names), "reliability of every noise model")
    name = DEBIASED if world.config.duration_debiased else world.config.noise_model
    of_own = _figures(sample, few if name == DEBIASED else pairs, world.noise)
    own = dict(zip(("within_user", "pooled", "alignment"), of_own, strict=True))
    facts = {"model": name, "dial": world.config.reward_noise, **own}
    return Signal(tuple(names), DIALS, figures[0], figures[1], figures[2], facts)


DEBIASED = "watch_time, debiased"
"""Watch time scored by its quantile among titles of like duration, where the world has it so."""


def _noise(world: WorldBase, name: str, dial: float) -> RewardNoise:
    if name != DEBIASED:
        return NOISE_MODELS[name](dial=dial)
    if dial == world.config.reward_noise:
        return world.noise
    if isinstance(world, ReplayWorld):
        return ReplayWorld(replace(world.config, reward_noise=dial), world.matrix).noise
    assert isinstance(world, World)
    return World(replace(world.config, reward_noise=dial)).noise


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Some users' titles, for alignment: facts (n, I), satisfaction, and the weight of each pair."""

    facts: Exposure
    weight: FloatArray

    @classmethod
    def of(cls, sample: Sample, cells: int) -> "_Pairs":
        world = sample.world
        users = sample.train[: int(np.clip(cells // world.n_titles, 16, len(sample.train)))]
        who = world.behaviour(users)
        satisfaction = world.satisfaction(users).astype(np.float64)
        facts = Exposure(satisfaction, who.free_time[:, None], world.durations[None], world.allure[who.epoch])
        return cls(facts, first_choice(world.utilities(users)))


def _figures(sample: Sample, pairs: _Pairs, noise: RewardNoise) -> tuple[float, float, float]:
    """Reliability within user and pooled, and alignment, as `WorldBase.reliability` and `alignment` define them."""
    events, n_events = sample.log, sample.world.config.history_length + 1
    u = uniforms(sample.world.config.seed, "noise", sample.train, n_events * noise.uniforms_per_event)
    u = u.reshape(len(sample.train), n_events, -1)[:, :-1]
    score = np.broadcast_to(noise.sample(events.facts, u).score, events.logged.shape)
    truth = events.facts.satisfaction
    pooled = metrics.signed_squared_correlation(events.of(score), events.of(truth))
    within = float("nan")
    if events.logged.sum(axis=1).max() > 1:
        weight = events.logged.astype(np.float64)
        within = metrics.signed_squared_correlation(
            events.of(_centred(score, weight)), events.of(_centred(truth, weight))
        )
    x, y = (_centred(z, pairs.weight) for z in (noise.expected(pairs.facts), pairs.facts.satisfaction))
    covariance = (pairs.weight * x * y).sum()
    spread = (pairs.weight * x * x).sum() * (pairs.weight * y * y).sum()
    alignment = np.sign(covariance) * min(1.0, covariance**2 / spread) if spread > 0 else 0.0
    return within, pooled, float(alignment)


def _centred(values: FloatArray, weight: FloatArray) -> FloatArray:
    """(n, T) values less their weighted mean in each row."""
    centred: FloatArray = values - (weight * values).sum(axis=1, keepdims=True) / weight.sum(axis=1, keepdims=True)
    return centred


# --------------------------------------------------------------------------------------- popularity and histories


def _popularity(sample: Sample) -> Popularity:
    n_titles = sample.world.n_titles
    every = [
        np.bincount(events.of(events.titles), minlength=n_titles)
        for events in (sample.log, sample.test_log, sample.forced)
    ]
    ordered = [np.sort(counts)[::-1] for counts in every]
    top = max(1, round(TOP_SHARE * n_titles))
    train = every[0]
    score = np.bincount(sample.log.of(sample.log.titles), sample.log.of(sample.log.score), minlength=n_titles)
    often = train >= OFTEN
    correlation = float("nan")
    if often.sum() > 2:
        correlation = _correlation(np.log(train[often]), score[often] / train[often])
    return Popularity(
        train=ordered[0],
        test=ordered[1],
        forced=ordered[2],
        gini=tuple(metrics.gini(counts) for counts in every),
        top=tuple(float(counts[:top].sum() / counts.sum()) for counts in ordered),
        rating_correlation=correlation,
    )


NEAR_HOURS, FAR_HOURS = 1.0, 8.0
"""Gaps after which ``order_effect`` is still at 60 % of its weight or more, and at 2 % or less."""


def _histories(sample: Sample) -> Histories:
    log, world = sample.log, sample.world
    gap, both = np.diff(log.hours, axis=1), log.logged[:, 1:]
    lengths = log.logged.sum(axis=1)
    last = np.take_along_axis(log.hours, lengths[:, None] - 1, axis=1)[:, 0]
    neighbours = None
    if world.config.order_effect > 0:
        direction = world.directions
        cosine = (direction[log.titles[:, 1:]] * direction[log.titles[:, :-1]]).sum(axis=2)
        near, far = both & (gap < NEAR_HOURS), both & (gap > FAR_HOURS)
        neighbours = (_mean(cosine[near]), _mean(cosine[far]))
    several = lengths > 1
    gaps = Spread.of(gap[both]) if several.any() else None
    days = Spread.of((last - log.hours[:, 0])[several] / 24.0) if several.any() else None
    shares = np.bincount(lengths, minlength=log.logged.shape[1] + 1)[1:] / len(lengths)
    return Histories(shares, Spread.of(lengths), gaps, days, neighbours)


def _completion(sample: Sample) -> Completion:
    world, log = sample.world, sample.log
    n_groups = min(DURATION_BINS, max(world.n_titles // 2, 1))
    group = np.empty(world.n_titles, dtype=np.int64)
    for k, titles in enumerate(np.array_split(np.argsort(world.durations, kind="stable"), n_groups)):
        group[titles] = k

    def mean(events: Events, values: NDArray[Any]) -> FloatArray:
        return _group_means(group[events.of(events.titles)], events.of(values), n_groups)

    finished = mean(log, _finishing_probability(world.noise, log.facts)) if _has_watch_time(world.noise) else None
    of_event = group[log.of(log.titles)]
    minutes = log.of(log.watched * log.facts.duration)
    median = [np.median(minutes[of_event == k]) if (of_event == k).any() else np.nan for k in range(n_groups)]
    return Completion(
        minutes=np.array([np.median(world.durations[group == k]) for k in range(n_groups)]),
        events=np.bincount(of_event, minlength=n_groups),
        observed=mean(log, log.watched >= 1.0),
        forced=mean(sample.forced, sample.forced.watched >= 1.0),
        exact=np.full(n_groups, np.nan) if finished is None else finished,
        watched=np.array(median),
        quantiles=np.quantile(world.durations, [0.05, 0.25, 0.5, 0.75, 0.95]),
    )


def _has_watch_time(noise: RewardNoise) -> bool:
    return isinstance(noise, (WatchTimeNoise, DurationDebiasedNoise))


def _finishing_probability(noise: RewardNoise, facts: Exposure) -> FloatArray:
    base = noise.base if isinstance(noise, DurationDebiasedNoise) else noise
    assert isinstance(base, WatchTimeNoise)
    return base.survival(1.0, facts)


def _group_means(group: NDArray[np.int64], values: NDArray[Any], n_groups: int) -> FloatArray:
    """(G,) means by group; NaN for an empty one."""
    with np.errstate(invalid="ignore"):
        means: FloatArray = np.bincount(group, values, minlength=n_groups) / np.bincount(group, minlength=n_groups)
    return means


# ------------------------------------------------------------------------------------------------ drift and choice


def _drift(sample: Sample) -> Drift:
    world, first = sample.world, sample.sums.first_choices
    n_epochs = world.config.n_epochs
    popularity = np.full((n_epochs, n_epochs), np.nan)
    for e in range(n_epochs):
        for f in range(n_epochs):
            out = world.release <= min(e, f)
            pairs = [(first[e, a][out], first[f, b][out]) for a, b in ((0, 1), (1, 0))]
            popularity[e, f] = np.mean([_spearman(x, y) for x, y in pairs])
    late = world.release > 0
    total = first.sum(axis=(1, 2))
    return Drift(
        appeal=np.atleast_2d(np.corrcoef(world.allure)),
        popularity=popularity,
        taste=np.linalg.norm(world.taste_centres, axis=1) if isinstance(world, World) else None,
        released=np.array([(world.release <= epoch).mean() for epoch in range(n_epochs)]),
        cold_exposure=first[:, :, late].sum(axis=(1, 2)) / np.where(total > 0, total, np.nan),
    )


def _confounding(sample: Sample) -> Confounding:
    sums, users = sample.sums, sample.users
    there = np.flatnonzero((sums.n > 0) & (sums.weight.sum(axis=0) > 0))
    forced, forced_score = (total[there] / sums.n[there] for total in (sums.satisfaction, sums.score))
    parts = sums.weight[:, there], sums.chosen_satisfaction[:, there], sums.chosen_score[:, there]
    with np.errstate(invalid="ignore", divide="ignore"):
        chosen, chosen_score = parts[1] / parts[0], parts[2] / parts[0]
        everyone = [part.sum(axis=0) / parts[0].sum(axis=0) for part in parts[1:]]
    n_groups = int(np.clip(len(there) // 5, 1, TITLE_GROUPS))
    groups = np.array_split(np.argsort(forced, kind="stable"), n_groups)
    groups_score = np.array_split(np.argsort(forced_score, kind="stable"), n_groups)
    return Confounding(
        forced=np.array([forced[g].mean() for g in groups]),
        chosen=np.array([[_mean(row[g]) for g in groups] for row in chosen]),
        forced_score=np.array([forced_score[g].mean() for g in groups_score]),
        chosen_score=np.array([[_mean(row[g]) for g in groups_score] for row in chosen_score]),
        discernment=_group_means(users.tercile, users.discernment, TERCILES),
        gap=np.array([_mean(row - forced) for row in chosen]),
        gap_score=np.array([_mean(row - forced_score) for row in chosen_score]),
        overall=(float(np.mean(everyone[0] - forced)), float(np.mean(everyone[1] - forced_score))),
    )


def _choices(sample: Sample) -> Choices:
    users = sample.users
    order = np.argsort(users.discernment, kind="stable")
    groups = np.array_split(order, min(LIKENESS_BINS, len(order)))
    return Choices(
        perplexity=Spread.of(users.perplexity),
        discernment=Spread.of(users.discernment, np.linspace(0.0, 1.0, BINS // 2 + 1)),
        bins=np.array([users.discernment[g].mean() for g in groups]),
        likeness=np.array([np.quantile(users.likeness[g], [0.1, 0.5, 0.9]) for g in groups]),
        acceptance=float(users.acceptance.mean()),
    )


# ------------------------------------------------------------------------------------------------------- figures


def _mean(values: FloatArray) -> float:
    """Over finite values; NaN without any."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _correlation(x: FloatArray, y: FloatArray) -> float:
    squared = metrics.signed_squared_correlation(x, y)
    return float(np.sign(squared) * np.sqrt(abs(squared)))


def _spearman(x: FloatArray, y: FloatArray) -> float:
    """NaN where one does not vary, as where nobody was sampled."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(spearmanr(x, y).statistic)
