"""The duration-debiased score of a world: the distribution of watched fractions in each duration group."""

from typing import TYPE_CHECKING

import numpy as np

from recsim_gr.noise import DurationDebiasedNoise, Exposure, NoiseModel, WatchTimeNoise

if TYPE_CHECKING:
    from recsim_gr.world_base import WorldBase

DURATION_GROUPS, QUANTILE_KNOTS, CALIBRATION_CELLS, CALIBRATION_USERS = 10, 32, 128_000, 512
"""Of the duration-debiased score: deciles of the catalogue's durations, pieces of each group's distribution, and the
(user, title) pairs that it is averaged over, of at most so many users: a second's work, and the same for every log."""

CALIBRATION_CHUNK = 16_000
"""Pairs at a time: what a core's cache holds."""


def scored_by_quantile(world: "WorldBase", model: NoiseModel) -> DurationDebiasedNoise:
    """Watch time scored by its quantile in duration groups, averaged exactly over the first choices of some
    training users."""
    assert isinstance(model, WatchTimeNoise)  # the config has seen to it
    n_groups = min(DURATION_GROUPS, world.n_titles // 2)
    edges = np.quantile(world.durations, np.arange(1, n_groups) / n_groups)
    group = np.searchsorted(edges, world.durations, side="right")
    knots = np.linspace(0.0, 1.0, QUANTILE_KNOTS + 1)
    below, mass = np.zeros((n_groups, len(knots))), np.zeros(n_groups)
    n_users = int(np.clip(CALIBRATION_CELLS // world.n_titles, 8, CALIBRATION_USERS))
    users = world.users("train", world.at_most("train", n_users))
    for chunk in np.array_split(users, -(-len(users) * world.n_titles // CALIBRATION_CHUNK)):
        weight = np.exp(world.logging_log_probs(chunk, np.empty((len(chunk), 0), dtype=np.int64)))
        satisfaction, minutes = world.satisfaction(chunk).astype(np.float64), world.behaviour(chunk).free_time
        facts = Exposure(satisfaction, minutes[:, None], world.durations)
        mass += np.bincount(group, weight.sum(axis=0), minlength=n_groups)
        for k, knot in enumerate(knots):
            reached = model.survival(max(float(knot), 1e-9), facts)  # just above 0: some never watch
            below[:, k] += np.bincount(group, (weight * (1.0 - reached)).sum(axis=0), minlength=n_groups)
    levels = below / np.maximum(mass, np.finfo(np.float64).tiny)[:, None]
    return DurationDebiasedNoise(model, edges, knots, np.maximum.accumulate(levels, axis=1))
