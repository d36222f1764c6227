"""Worlds and the samplers: the log has one law and one set of bytes, however and in whatever chunks it is drawn."""

import os
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recsim_gr import choosing
from recsim_gr.behaviour import LARGE_CATALOGUE, SAMPLERS, SPLITS
from recsim_gr.log import COLUMNS, InteractionLog
from recsim_gr.world import STEEPEST_PULL_IN_FLOAT32, World, WorldConfig
from recsim_gr.world_base import products

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)

splits = st.sampled_from(SPLITS)
every_sampler = pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "auto"])

LARGE = WorldConfig(n_titles=LARGE_CATALOGUE + 700, history_length=12, seed=3)


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> WorldConfig:
    """Worlds of 2 to 200 titles, flat or peaked, with or without releases and drift."""
    n_titles = draw(st.integers(12, 200))
    drawn = {
        "n_titles": n_titles,
        "history_length": draw(st.integers(1, 8)),
        "n_epochs": draw(st.integers(2, 4)),
        "pull_strength": draw(st.sampled_from([0.0, 2.0, 40.0])),
        "appeal_tail": draw(st.sampled_from([0.0, 1.0, 3.0])),
        "taste_dimensions": draw(st.integers(1, 9)),
        "cold_share": draw(st.sampled_from([0.0, 0.2])),
        "population_drift": draw(st.sampled_from([0.0, 0.5])),
        "seed": draw(st.integers(0, 2**40)),
    }
    return WorldConfig(**(drawn | fixed))


def assert_same_log(one: InteractionLog, other: InteractionLog) -> None:
    for name in (*COLUMNS, "propensities"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name


def log_of(config: WorldConfig, n_users: int, **options: Any) -> InteractionLog:
    return World(config).generate_log(n_users, expose_propensities=True, **options)


# ------------------------------------------------------------------------------------------------ one title at a time


@PROPERTY
@given(configs(), splits, st.integers(1, 9), st.data())
@example(WorldConfig(n_titles=50, taste_dimensions=1), "test", 1, None)
@example(WorldConfig(n_titles=1_000, taste_dimensions=16), "train", 9, None)
def test_satisfaction_with_some_titles_is_that_with_all(
    config: WorldConfig, split: str, n: int, data: st.DataObject | None
) -> None:
    world = World(config)
    users = world.users(split, n)
    width = data.draw(st.integers(1, 30), label="width") if data else 7
    titles = np.random.default_rng(config.seed).integers(config.n_titles, size=(n, width))
    some = world.satisfaction_with(users, titles)
    assert some.dtype == np.float32
    assert some.tobytes() == np.take_along_axis(world.satisfaction(users), titles, axis=1).tobytes()


@PROPERTY
@given(configs(), splits)
def test_utilities_are_the_same_in_blocks(config: WorldConfig, split: str) -> None:
    world = World(config)
    users = world.users(split, 7)
    fill = world.utility_rows(users)
    out, scratch = np.full((2, 3, config.n_titles), np.nan)
    fill(slice(2, 5), out, scratch)
    np.testing.assert_array_equal(out, world.utilities(users)[2:5])
    who = world.behaviour(users)
    by_hand = config.pull_strength * world.pull(users) + (1.0 - who.discernment)[:, None] * world.appeal[who.epoch]
    by_hand[world.catalogue.unreleased(who.epoch)] = -np.inf
    np.testing.assert_array_equal(world.utilities(users), by_hand)


# --------------------------------------------------------------------------------------------------- every sampler


@every_sampler
@PROPERTY
@given(configs(), splits)
def test_logged_propensities_are_those_of_the_prefixes(sampler: str, config: WorldConfig, split: str) -> None:
    world = World(replace(config, sampler=sampler))
    users = world.users(split, 5)
    events = world.draw_events(users, config.history_length)
    tolerance = 1e-5 if sampler == "inverse_cdf" else 1e-9
    for step in range(config.history_length):
        history = events.titles.copy()
        history[:, step:] = config.n_titles
        asked = np.take_along_axis(world.logging_log_probs(users, history), events.titles[:, [step]], axis=1)
        np.testing.assert_allclose(events.log_propensities[:, [step]], asked, rtol=0, atol=tolerance)


@every_sampler
@PROPERTY
@given(configs(), st.integers(1, 24), st.integers(1, 25))
def test_neither_chunks_nor_blocks_change_a_bit(sampler: str, config: WorldConfig, n_users: int, chunk: int) -> None:
    config = replace(config, sampler=sampler)
    whole = log_of(config, n_users)
    assert_same_log(log_of(config, n_users, chunk_users=chunk), whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "BLOCK_CELLS", 1)
        patch.setattr(choosing, "LEAST_BLOCK_USERS", 3)
        assert_same_log(log_of(config, n_users), whole)


@every_sampler
@PROPERTY
@given(configs())
def test_contexts_are_the_log_and_one_event_more(sampler: str, config: WorldConfig) -> None:
    world = World(replace(config, sampler=sampler))
    log, contexts = world.generate_log(5, "test"), world.contexts(5)
    np.testing.assert_array_equal(contexts.observations.titles, log.sequences().titles)
    np.testing.assert_array_equal(contexts.observations.scores, log.sequences().scores)


@every_sampler
def test_samplers_agree_on_what_is_popular(sampler: str) -> None:
    # 1[chosen = a] − p(a | before), summed over users, in deviations; the last event of five
    world = World(WorldConfig(n_titles=15, history_length=5, sampler=sampler, seed=11))
    users = world.users("train", 8_000)
    titles = world.draw_events(users, 5).titles
    before = np.pad(titles[:, :4], ((0, 0), (0, 1)), constant_values=15)
    p = np.exp(world.logging_log_probs(users, before))
    z = ((titles[:, [4]] == np.arange(15)) - p).sum(axis=0) / np.sqrt((p * (1.0 - p)).sum(axis=0))
    assert np.abs(z).max() < 4.0


# ------------------------------------------------------------------------------------------------- large catalogues


def test_large_catalogues_are_drawn_by_inverse_cdf() -> None:
    assert_same_log(log_of(LARGE, 20), log_of(replace(LARGE, sampler="inverse_cdf"), 20))
    small = replace(LARGE, n_titles=LARGE_CATALOGUE, history_length=3)
    assert_same_log(log_of(small, 3), log_of(replace(small, sampler="gumbel"), 3))


@pytest.mark.parametrize("chunk", [1, 5, 16, 17, 32])
@pytest.mark.parametrize("pull_strength", [2.0, 20.0])
def test_the_chunk_changes_no_bit_of_a_large_catalogue(chunk: int, pull_strength: float) -> None:
    # 37 users are two full blocks of the products and a part of one; chunks put users at other places in them
    config = replace(LARGE, pull_strength=pull_strength)  # weighed in float32, and in float64
    assert_same_log(log_of(config, 37, chunk_users=chunk), log_of(config, 37))


@pytest.mark.parametrize("kernels", ["", "Haswell", "Zen", "SkylakeX", "Sandybridge", "Nehalem"])
def test_no_place_in_a_product_changes_a_bit_whatever_the_kernels(kernels: str) -> None:
    """OpenBLAS has kernels for many processors, and takes those of another one where it is told to."""
    program = (
        "import numpy as np\n"
        "from recsim_gr.world import PRODUCT_ROWS\n"
        "rng = np.random.default_rng(0)\n"
        "for kind in (np.float32, np.float64):\n"
        "    rows = rng.normal(size=(PRODUCT_ROWS, 21)).astype(kind)\n"
        "    columns = rng.normal(size=(21, 10_701)).astype(kind)\n"
        "    for k in range(PRODUCT_ROWS):\n"
        "        turned = np.roll(rows, k, axis=0)\n"
        "        assert np.roll(turned @ columns, -k, axis=0).tobytes() == (rows @ columns).tobytes(), (kind, k)\n"
    )
    told = os.environ | ({"OPENBLAS_CORETYPE": kernels} if kernels else {})
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, env=told, capture_output=True, text=True, timeout=120)
    if kernels and done.returncode == -signal.SIGILL:
        pytest.skip(f"this processor lacks the instructions of {kernels}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("cold_share", [0.0, 0.3])
@pytest.mark.parametrize("split", SPLITS)
def test_utilities_of_a_large_catalogue_are_those_of_pull_and_appeal(cold_share: float, split: str) -> None:
    world = World(replace(LARGE, cold_share=cold_share))
    users = world.users(split, 19)
    who = world.behaviour(users)
    pull = products(world.pull_vectors(users), world.traits)
    exact = world.config.pull_strength * pull + (1.0 - who.discernment)[:, None] * world.appeal[who.epoch]
    exact[world.catalogue.unreleased(who.epoch)] = -np.inf
    np.testing.assert_allclose(world.utilities(users), exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pull_strength": STEEPEST_PULL_IN_FLOAT32, "appeal_tail": 1.5},  # the steepest that float32 may weigh
        {"pull_strength": 60.0, "appeal_tail": 4.0},  # weighed in float64
        {"cold_share": 0.3},
    ],
)
def test_propensities_of_a_large_catalogue_are_those_of_the_prefixes(changes: dict[str, Any]) -> None:
    config = replace(LARGE, **changes)
    world = World(config)
    users = world.users("train", 40)
    events = world.draw_events(users, 12)
    assert not np.isneginf(np.take_along_axis(world.utilities(users), events.titles, axis=1)).any()
    for step in (0, 5, 11):
        history = events.titles.copy()
        history[:, step:] = config.n_titles
        asked = np.take_along_axis(world.logging_log_probs(users, history), events.titles[:, [step]], axis=1)
        np.testing.assert_allclose(events.log_propensities[:, [step]], asked, rtol=0, atol=5e-6)


def test_the_first_choice_of_a_large_catalogue_is_the_softmax() -> None:
    # Titles sorted by probability into 30 groups a user, of equal probability as far as it goes.
    world = World(LARGE)
    users = world.users("train", 1_000)
    first = world.draw_events(users, 1).titles[:, 0]
    observed, expected, variance = np.zeros((3, 30))
    for user, title in zip(users, first, strict=True):
        p = np.exp(world.logging_log_probs(np.array([user]), np.empty((1, 0), dtype=np.int64)))[0]
        order = np.argsort(p)
        group = np.empty(len(p), dtype=np.int64)
        group[order] = np.minimum((np.cumsum(p[order]) * 30).astype(np.int64), 29)
        share = np.bincount(group, p, minlength=30)
        observed[group[title]] += 1
        expected += share
        variance += share * (1.0 - share)
    assert np.abs((observed - expected) / np.sqrt(variance)).max() < 4.0


def peak_megabytes(config: WorldConfig, n_users: int) -> float:
    world = World(config)
    world.generate_log(1)
    tracemalloc.start()
    world.generate_log(n_users)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


@pytest.mark.parametrize("n_titles", [1_000, 9_000, 40_000])
def test_memory_does_not_grow_with_users_times_titles(n_titles: int) -> None:
    config = WorldConfig(n_titles=n_titles, history_length=10)
    dense = 1_024 * n_titles * 8 / 2**20
    peak = peak_megabytes(config, 1_024)
    assert peak < 16 + 16 * 40 * n_titles / 2**20  # sixteen users' numbers at a time, 40 bytes a title
    assert n_titles < 9_000 or peak < dense / 2
