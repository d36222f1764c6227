"""The samplers against the law they claim: Plackett–Luce, by brute force, by frequencies, and by each other."""

import itertools
import math
import time
from collections.abc import Callable
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from recsim_gr import sampling
from recsim_gr.errors import ConfigError
from recsim_gr.randomness import uniforms
from recsim_gr.sampling import Choices, draws_a_round, gumbel, inverse_cdf, stepwise

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
STATISTICAL = settings(max_examples=5, deadline=None, derandomize=True)

FloatArray = NDArray[np.float64]
Sampler = Callable[..., Choices]


def by_gumbel(utilities: FloatArray, length: int, seed: int = 0, first_user: int = 0) -> Choices:
    users = np.arange(first_user, first_user + len(utilities))
    return gumbel(utilities, uniforms(seed, "choice", users, utilities.shape[1]), length)


def by_inverse_cdf(utilities: FloatArray, length: int, seed: int = 0, first_user: int = 0, longest: int = 0) -> Choices:
    per_round = draws_a_round(longest or length)

    def draw(turn: int, rows: NDArray[np.int64]) -> FloatArray:
        return uniforms(seed, f"choice/{turn}", first_user + rows, 2 * per_round).reshape(len(rows), per_round, 2)

    return inverse_cdf(utilities, draw, length)


def by_steps(utilities: FloatArray, length: int, seed: int = 0, first_user: int = 0) -> Choices:
    users = np.arange(first_user, first_user + len(utilities))
    return stepwise(utilities, uniforms(seed, "choice", users, utilities.shape[1]), length)


SAMPLERS: dict[str, Sampler] = {"gumbel": by_gumbel, "inverse_cdf": by_inverse_cdf, "stepwise": by_steps}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())

ACCURACY = {by_gumbel: 1e-12, by_inverse_cdf: 1e-5, by_steps: 1e-12}
"""Largest relative error of a propensity against brute force; float32 weights have the 1e-5."""


@st.composite
def catalogues(draw: st.DrawFn, rows: int = 3, most: int = 60) -> tuple[FloatArray, int]:
    """Utilities of every kind, flat to peaked, near and far from 0, with titles that cannot be chosen; and a length."""
    n_titles = draw(st.integers(2, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = np.array([draw(st.sampled_from([0.0, 1.0, 5.0, 80.0, 2_000.0])) for _ in range(rows)])
    offset = np.array([draw(st.sampled_from([0.0, 0.0, 30.0, -700.0, 1e5])) for _ in range(rows)])
    utilities = scale[:, None] * rng.standard_normal((rows, n_titles)) + offset[:, None]
    ruled_out = rng.random((rows, n_titles)) < draw(st.sampled_from([0.0, 0.0, 0.3]))
    utilities[ruled_out] = -np.inf
    possible = int(np.isfinite(utilities).sum(axis=1).min())
    assume(possible >= 1)
    return utilities, draw(st.integers(1, possible))


# --------------------------------------------------------------------------------------------------- propensities


def in_sixty_digits(utilities: FloatArray, titles: NDArray[np.int64]) -> list[float]:
    """ln(e^{u_a} / Σ_left e^u) of each choice of one row."""
    with localcontext(prec=60):
        weights = [Decimal(float(u)).exp() if u > -np.inf else Decimal(0) for u in utilities]
        left = set(range(len(weights)))
        out = []
        for title in titles.tolist():
            out.append(float((weights[title] / sum(weights[i] for i in left)).ln()))
            left.remove(title)
        return out


@every_sampler
@PROPERTY
@given(catalogues(most=30))
def test_propensities_are_exact(sampler: Sampler, catalogue: tuple[FloatArray, int]) -> None:
    utilities, length = catalogue
    titles, log_propensities = sampler(utilities, length)
    assert titles.shape == log_propensities.shape == (len(utilities), length)
    assert titles.dtype == np.int64
    assert log_propensities.dtype == np.float64
    assert (log_propensities <= 0).all()
    for row, u in enumerate(utilities):
        assert len(set(titles[row].tolist())) == length
        assert np.isfinite(u[titles[row]]).all()
        # float64 utilities near 1e5 are themselves good to 1e-11
        tolerance = ACCURACY[sampler] + 4e-16 * np.abs(u[np.isfinite(u)]).max()
        np.testing.assert_allclose(log_propensities[row], in_sixty_digits(u, titles[row]), rtol=1e-13, atol=tolerance)


def by_exact_sums(utilities: FloatArray, titles: NDArray[np.int64]) -> FloatArray:
    """The same in float64: at each step the titles left are exponentiated anew and summed without rounding."""
    left = utilities.copy()
    out = np.empty(len(titles))
    for step, title in enumerate(titles):
        top = left.max()
        out[step] = utilities[title] - top - math.log(math.fsum(np.exp(left - top).tolist()))
        left[title] = -np.inf
    return out


def wide(n_titles: int, scale: float) -> FloatArray:
    """(1, I) utilities with a long tail, one of them alone far above the others."""
    rng = np.random.default_rng(int(n_titles + scale))
    utilities = scale * rng.standard_normal(n_titles) + rng.exponential(size=n_titles)
    utilities[7] += 3.0 * scale
    return utilities[None]


@pytest.mark.parametrize(
    ("sampler", "n_titles", "length", "scale"),
    [
        (by_gumbel, 1_000, 20, 2.0),
        (by_gumbel, 10_000, 20, 2.0),
        (by_gumbel, 10_000, 500, 1.0),
        (by_gumbel, 10_000, 500, 60.0),
        (by_steps, 10_000, 100, 2.0),
        (by_steps, 10_000, 100, 60.0),
        (by_inverse_cdf, 100_000, 200, 2.0),
        (by_inverse_cdf, 100_000, 60, 200.0),
        (by_inverse_cdf, 30_000, 200, 20.0),
    ],
)
def test_propensities_are_exact_in_large_catalogues(sampler: Sampler, n_titles: int, length: int, scale: float) -> None:
    utilities = wide(n_titles, scale)
    titles, log_propensities = sampler(utilities, length)
    exact = by_exact_sums(utilities[0], titles[0])
    np.testing.assert_allclose(log_propensities[0], exact, rtol=0, atol=ACCURACY[sampler])


# --------------------------------------------------------------------------------------- the titles of the definition


@PROPERTY
@given(catalogues(rows=6, most=300), st.integers(0, 2**32))
@example((np.tile(np.linspace(0.0, 700.0, 200), (2, 1)), 150), 0)
@example((np.stack([np.zeros(200), np.full(200, -800.0), np.linspace(-1e4, 0.0, 200)]), 20), 0)
def test_gumbel_takes_the_largest_keys_in_order(catalogue: tuple[FloatArray, int], seed: int) -> None:
    utilities, length = catalogue
    u = uniforms(seed, "choice", np.arange(len(utilities)), utilities.shape[1])
    keys = utilities - np.log(-np.log(u))
    np.testing.assert_array_equal(gumbel(utilities, u, length).titles, np.argsort(-keys, axis=1)[:, :length])


@pytest.mark.parametrize("n_titles", [60, 1_000, 10_000])
def test_rows_of_ordinary_worlds_are_not_sorted_whole(monkeypatch: pytest.MonkeyPatch, n_titles: int) -> None:
    rng = np.random.default_rng(n_titles)
    popular = rng.exponential(size=n_titles) * rng.random((40, 1)) + 2.0 * rng.standard_normal((40, n_titles))
    monkeypatch.setattr(sampling, "_by_sorting", lambda *_: pytest.fail("a row was sorted whole"))
    by_gumbel(popular, 20)


# ------------------------------------------------------------------------------------------------------------- laws


def plackett_luce(utilities: FloatArray, length: int) -> dict[tuple[int, ...], float]:
    """P(a, b, …) = w_a/Z · w_b/(Z − w_a) · … of every ordered tuple."""
    weights = np.exp(utilities - utilities.max())
    law = {}
    for titles in itertools.permutations(range(len(weights)), length):
        left, probability = weights.copy(), 1.0
        for title in titles:
            probability *= left[title] / left.sum() if left.sum() > 0 else 0.0
            left[title] = 0.0
        law[titles] = probability
    return law


def assert_frequencies(titles: NDArray[np.int64], law: dict[tuple[int, ...], float], n_titles: int) -> None:
    """Chi-square of (n, k) drawn titles; tuples expected fewer than ten times are counted together, and tuples that
    cannot come must not have."""
    n, length = titles.shape
    base = n_titles ** np.arange(length)
    counts = np.bincount(titles @ base, minlength=n_titles**length)
    cells = np.array([np.dot(t, base) for t in law])
    observed, expected = counts[cells], n * np.array(list(law.values()))
    assert observed.sum() == n
    assert (observed[expected == 0] == 0).all()
    rare = expected < 10
    if expected[rare].sum() >= 10:
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    else:  # too few even together: they may only be as few as that
        assert stats.poisson.sf(observed[rare].sum() - 1, expected[rare].sum()) > 1e-6 or observed[rare].sum() == 0
        observed, expected = observed[~rare], expected[~rare]
    if len(expected) > 1:
        assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4


@st.composite
def small(draw: st.DrawFn) -> FloatArray:
    """Four to six utilities, flat to peaked, at most two of them -inf."""
    n_titles = draw(st.integers(4, 6))
    scale = draw(st.sampled_from([0.0, 1.0, 2.0, 4.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    utilities = scale * rng.standard_normal(n_titles) + draw(st.sampled_from([0.0, 500.0]))
    ruled_out = draw(st.integers(0, n_titles - 3))
    utilities[rng.permutation(n_titles)[: min(ruled_out, 2)]] = -np.inf
    return utilities


@every_sampler
@STATISTICAL
@given(small(), st.integers(0, 2**32))
@example(np.array([9.2, 0.0, -1.0, 0.3, -np.inf]), 1)  # one title has 99.98 % of the mass
def test_the_first_one_two_and_three_choices_have_their_frequencies(
    sampler: Sampler, utilities: FloatArray, seed: int
) -> None:
    drawn = sampler(np.tile(utilities, (20_000, 1)), 3, seed).titles
    for length in (1, 2, 3):
        assert_frequencies(drawn[:, :length], plackett_luce(utilities, length), len(utilities))


@every_sampler
@STATISTICAL
@given(st.integers(0, 2**32), st.sampled_from([1.0, 3.0]))
def test_the_first_choice_is_the_softmax(sampler: Sampler, seed: int, scale: float) -> None:
    # Each row has its own utilities: 1[chosen = a] − p(a) has mean 0 and variance p(1 − p), summed over rows.
    utilities = scale * np.random.default_rng(seed).standard_normal((6_000, 40))
    first = sampler(utilities, 1, seed).titles
    p = np.exp(utilities - utilities.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    z = ((first == np.arange(40)) - p).sum(axis=0) / np.sqrt((p * (1.0 - p)).sum(axis=0))
    assert np.abs(z).max() < 4.5  # 40 cells in a few worlds


def test_ten_million_draws_have_their_frequencies() -> None:
    # 2.5 million users, four choices each over 12 titles: 11,880 ordered tuples.
    utilities = np.array([1.2, -0.3, 0.8, 0.0, -1.5, 0.4, 2.0, -0.7, 0.1, 0.9, -0.2, 0.5])
    law = plackett_luce(utilities, 4)
    rows = np.tile(utilities, (50_000, 1))
    drawn = np.concatenate([by_gumbel(rows, 4, 5, first_user=50_000 * i).titles for i in range(50)])
    assert drawn.size == 10_000_000
    assert_frequencies(drawn, law, 12)


def test_search_has_no_gaps_and_finds_no_empty_place() -> None:
    # 312 blocks of 3.2e-6 behind one of 1: a float32 cumulative sum moves in steps of 1.2e-7 there and would make
    # some of them 0.7 % larger than others. Evenly spaced uniforms must fall into them equally often.
    weights = np.array([[1.0, *[3.2e-6] * 312]])
    heavy = 1.0 / weights.sum()
    u = heavy + (1.0 - heavy) * (np.arange(312_000) + 0.5) / 312_000
    places, shares = sampling._search(weights, u[None])
    counts = np.bincount(places[0], minlength=313)
    assert counts[0] <= 1
    assert np.abs(counts[1:] - 1_000).max() <= 1
    assert np.bincount(np.floor(10 * shares[0]).astype(int), minlength=10) == pytest.approx(31_200, abs=400)
    # on the border of two places, and at the ends of the open interval
    ends = np.array([[2.0**-54, 0.5, np.nextafter(0.5, 0.0), 1.0 - 2.0**-53]])
    places, shares = sampling._search(np.array([[0.0, 1.5, 0.0, 1.5, 0.0]]), ends)
    assert places.tolist() == [[1, 3, 1, 3]]
    assert ((shares >= 0.0) & (shares < 1.0)).all()
    places, _ = sampling._search(np.array([[0.0, 5e-324, 0.0]]), ends)  # the least weight that there is
    assert places.tolist() == [[1, 1, 1, 1]]


def test_small_titles_of_a_large_catalogue_are_drawn() -> None:
    # One title has nearly all the mass and 99,999 have 1e-8 of it each, 1e-3 together. A cumulative sum in float32
    # would not move for any of them: 1 + 1e-8 is 1 there.
    utilities = np.full((1, 100_000), math.log(1e-8))
    utilities[0, 31] = 0.0
    assert np.float32(1.0) + np.float32(1e-8) == np.float32(1.0)
    blocks = sampling._Blocks(utilities, lambda rows, titles: utilities[rows, titles])
    n, small_mass = 500_000, 99_999e-8 / (1.0 + 99_999e-8)
    titles = np.concatenate(
        [
            blocks.draw(np.array([0]), uniforms(0, "choice", np.array([i]), n // 5).reshape(1, -1, 2))[0]
            for i in range(10)
        ]
    )
    assert len(titles) == n
    rare = titles[titles != 31]
    assert abs(len(rare) - n * small_mass) < 4 * math.sqrt(n * small_mass)
    # and evenly: over the catalogue, within blocks of 320 titles, within sixteens; title 31 missing from each
    for places, without in ((rare // 1_000, 0), (rare % 320, 31), (rare % 16, 15)):
        counts = np.bincount(places)
        counts = np.delete(counts, without)
        assert stats.chisquare(counts).pvalue > 1e-4


# ------------------------------------------------------------------------------- the same whatever is drawn with it


@every_sampler
@PROPERTY
@given(catalogues(rows=7, most=40), st.integers(1, 7))
def test_a_row_is_the_same_whatever_stands_beside_it(
    sampler: Sampler, catalogue: tuple[FloatArray, int], chunk: int
) -> None:
    utilities, length = catalogue
    whole = sampler(utilities, length)
    parts = [sampler(utilities[i : i + chunk], length, first_user=i) for i in range(0, 7, chunk)]
    for together, *apart in zip(whole, *parts, strict=True):
        assert together.tobytes() == np.concatenate(apart).tobytes()


@every_sampler
@PROPERTY
@given(catalogues(most=40), st.data())
def test_fewer_choices_are_the_beginning_of_more(
    sampler: Sampler, catalogue: tuple[FloatArray, int], data: st.DataObject
) -> None:
    utilities, length = catalogue
    fewer = data.draw(st.integers(1, length), label="fewer")
    longest = {"longest": length} if sampler is by_inverse_cdf else {}
    short, long = sampler(utilities, fewer, **longest), sampler(utilities, length, **longest)
    np.testing.assert_array_equal(short.titles, long.titles[:, :fewer])
    tolerance = ACCURACY[sampler] + 4e-16 * np.abs(utilities[np.isfinite(utilities)]).max()
    np.testing.assert_allclose(short.log_propensities, long.log_propensities[:, :fewer], rtol=0, atol=tolerance)


@every_sampler
def test_what_is_handed_in_is_not_written_to(sampler: Sampler) -> None:
    utilities = np.random.default_rng(0).standard_normal((5, 100))
    utilities.flags.writeable = False
    sampler(utilities, 60)


def test_large_blocks_are_handled_in_parts_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    utilities = np.random.default_rng(0).standard_normal((40, 200))
    whole = by_gumbel(utilities, 5)
    monkeypatch.setattr(sampling, "BLOCK_CELLS", 1_400)
    for one, other in zip(whole, by_gumbel(utilities, 5), strict=True):
        assert one.tobytes() == other.tobytes()


# -------------------------------------------------------------------------------------------------- rounds and steps


@pytest.mark.parametrize(("scale", "most_rounds"), [(1.0, 2), (200.0, 30)])
def test_rounds_end(scale: float, most_rounds: int) -> None:
    utilities = np.sort(scale * np.random.default_rng(0).standard_normal((8, 2_000)), axis=1)
    rounds = []

    def draw(turn: int, rows: NDArray[np.int64]) -> FloatArray:
        rounds.append((turn, len(rows)))
        return uniforms(0, f"choice/{turn}", rows, 2 * draws_a_round(30)).reshape(len(rows), -1, 2)

    inverse_cdf(utilities, draw, 30)
    assert [turn for turn, _ in rounds] == list(range(len(rounds)))
    assert len(rounds) <= most_rounds


@PROPERTY
@given(catalogues(most=20), st.floats(-3.0, 3.0))
def test_what_is_carried_over_changes_choices_and_propensities(
    catalogue: tuple[FloatArray, int], strength: float
) -> None:
    utilities, length = catalogue
    n_titles = utilities.shape[1]

    def carry(step: int, titles: NDArray[np.int64]) -> FloatArray:
        assert titles.shape == (len(utilities), step)
        return strength * (np.arange(n_titles) == (titles[:, -1:] + 1) % n_titles)  # the title after the last one

    u = uniforms(0, "choice", np.arange(len(utilities)), length)
    titles, log_propensities = stepwise(utilities, u, length, carry)
    for row, step in np.ndindex(titles.shape):
        now = utilities[row].copy()
        if step > 0:
            now[(titles[row, step - 1] + 1) % n_titles] += strength
        now[titles[row, :step]] = -np.inf
        exact = in_sixty_digits(now, titles[row, step : step + 1])[0]
        tolerance = 1e-12 + 4e-16 * np.abs(now[np.isfinite(now)]).max()
        assert log_propensities[row, step] == pytest.approx(exact, rel=1e-13, abs=tolerance)


def test_pairs_under_carry_over_have_their_frequencies() -> None:
    utilities, strength = np.array([0.3, -0.5, 1.0, 0.0]), 2.0
    law: dict[tuple[int, ...], float] = {}
    for a, b in itertools.permutations(range(4), 2):
        now = np.exp(utilities + strength * (np.arange(4) == (a + 1) % 4))
        law[a, b] = np.exp(utilities[a]) / np.exp(utilities).sum() * now[b] / (now.sum() - now[a])
    u = uniforms(3, "choice", np.arange(40_000), 2)
    drawn = stepwise(
        np.tile(utilities, (40_000, 1)), u, 2, lambda _, t: strength * (np.arange(4) == (t[:, -1:] + 1) % 4)
    )
    assert_frequencies(drawn.titles, law, 4)


# ---------------------------------------------------------------------------------------------------------- refusals


@every_sampler
@pytest.mark.parametrize("n_titles", [6, 300])
def test_a_row_with_too_few_titles_is_refused(sampler: Sampler, n_titles: int) -> None:
    utilities = np.zeros((3, n_titles))
    utilities[1, 2:] = -np.inf
    sampler(utilities, 2)
    with pytest.raises(ConfigError, match="fewer titles to choose from"):
        sampler(utilities, 3)
    with pytest.raises(ConfigError, match="fewer titles to choose from"):
        sampler(np.full((2, n_titles), -np.inf), 1)


@every_sampler
@pytest.mark.parametrize("n_titles", [6, 300])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_utilities_that_are_no_numbers_are_refused(sampler: Sampler, n_titles: int, value: float) -> None:
    utilities = np.zeros((3, n_titles))
    utilities[1, 2] = value
    with pytest.raises(ConfigError, match="NaN or inf"):
        sampler(utilities, 3)


@every_sampler
@pytest.mark.parametrize("length", [0, 7])
def test_an_impossible_length_is_refused(sampler: Sampler, length: int) -> None:
    with pytest.raises(ConfigError, match="1 to 6, got"):
        sampler(np.zeros((2, 6)), length)


# --------------------------------------------------------------------------------------------------------------- time


def microseconds_a_row(call: Callable[[], object], rows: int) -> float:
    call()
    times = []
    for _ in range(10):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1e6 * min(times) / rows


@pytest.mark.benchmark
def test_the_samplers_keep_to_their_budgets() -> None:
    rng = np.random.default_rng(0)
    narrow = rng.standard_normal((256, 1_000)) + rng.exponential(size=1_000)
    u = rng.random(narrow.shape)
    large = rng.standard_normal((16, 100_000)) + rng.exponential(size=100_000)
    taken = {
        "gumbel, 1,000 titles": (microseconds_a_row(lambda: gumbel(narrow, u, 20), 256), 12),
        "inverse CDF, 100,000 titles": (microseconds_a_row(lambda: by_inverse_cdf(large, 20), 16), 300),
        "stepwise, 1,000 titles": (microseconds_a_row(lambda: by_steps(narrow, 20), 256), 150),
    }
    for name, (microseconds, budget) in taken.items():
        print(f"{name}: {microseconds:.1f} µs a user, at most {budget}")
    assert all(microseconds < budget for microseconds, budget in taken.values())
