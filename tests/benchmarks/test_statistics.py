"""Statistics against arithmetic by hand, scipy, and the properties that their sources prove."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from recsim_gr.benchmarks.statistics import (
    FloatArray,
    Results,
    compare,
    holm,
    interquartile_mean,
    place,
    stratified_bootstrap,
    t_interval,
    t_test,
)

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def results_of(values: dict[str, list[list[float]]]) -> Results:
    """Results of ``value_top10`` only: agent to (levels, seeds)."""
    arrays = {(agent, "value_top10"): np.array(rows, dtype=float) for agent, rows in values.items()}
    levels, seeds = next(iter(arrays.values())).shape
    noise = np.linspace(0, 1, levels)
    return Results(noise, 1 - noise, tuple(range(seeds)), tuple(values), arrays)


# --------------------------------------------------------------------------------------- intervals and tests


def test_interval_by_hand() -> None:
    # 1, 2, 3: mean 2, deviation 1, standard error 1/√3; t(.975, 2) = 4.302653, so half = 2.484138.
    mean, half, count = t_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert count == 3
    assert half == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)


def test_interval_agrees_with_scipy() -> None:
    samples = np.random.default_rng(0).normal(size=(4, 7))
    mean, half, _ = t_interval(samples, level=0.9)
    low, high = stats.t.interval(0.9, 6, loc=samples.mean(axis=1), scale=stats.sem(samples, axis=1))
    np.testing.assert_allclose(mean - half, low)
    np.testing.assert_allclose(mean + half, high)


def test_missing_samples_are_left_out() -> None:
    mean, half, count = t_interval([[1.0, np.nan, 3.0, 5.0], [np.inf, np.nan, np.nan, 2.0], [np.nan] * 4])
    assert count.tolist() == [3, 1, 0]
    assert mean[0] == 3.0
    assert mean[1] == 2.0
    assert half[0] == pytest.approx(t_interval([1.0, 3.0, 5.0])[1])
    assert np.isnan([half[1], mean[2], half[2]]).all()


def test_one_sample_has_no_interval_and_no_p_value() -> None:
    mean, half, _ = t_interval([0.3])
    assert mean == 0.3
    assert np.isnan(half)
    assert np.isnan(t_test([0.3])).all()


def test_interval_covers_as_often_as_it_says() -> None:
    samples = np.random.default_rng(1).normal(loc=5.0, size=(20_000, 3))
    mean, half, _ = t_interval(samples)
    covered = float(np.mean(np.abs(mean - 5.0) <= half))
    assert abs(covered - 0.95) < 3 * np.sqrt(0.95 * 0.05 / 20_000)


def test_p_values_agree_with_scipy() -> None:
    differences = np.random.default_rng(2).normal(0.4, 1.0, size=(5, 6))
    two_sided, greater = t_test(differences)
    np.testing.assert_allclose(two_sided, stats.ttest_1samp(differences, 0, axis=1).pvalue)
    np.testing.assert_allclose(greater, stats.ttest_1samp(differences, 0, axis=1, alternative="greater").pvalue)


def test_p_values_without_spread_are_their_limits() -> None:
    two_sided, greater = t_test([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [-0.5, -0.5, -0.5]])
    assert two_sided.tolist() == [1.0, 0.0, 0.0]
    assert greater.tolist() == [0.5, 0.0, 1.0]


# ------------------------------------------------------------------------------------------------------ Holm


def test_holm_by_hand() -> None:
    # Ascending: .005·4 = .02, .01·3 = .03, .03·2 = .06, then .04·1 = .04, raised to the .06 before it.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


def test_holm_of_one_is_itself_and_of_none_is_none() -> None:
    assert holm([0.04]).tolist() == [0.04]
    assert holm([]).shape == (0,)


def test_holm_leaves_missing_p_values_out_of_the_family() -> None:
    adjusted = holm([0.02, np.nan, 0.03])
    np.testing.assert_allclose(adjusted, [0.04, np.nan, 0.04])


@given(P_VALUES)
def test_holm_lies_between_the_raw_value_and_bonferroni(p: list[float]) -> None:
    adjusted = holm(p)
    assert (adjusted >= np.array(p)).all()
    assert (adjusted <= np.minimum(1.0, len(p) * np.array(p))).all()


@given(P_VALUES)
def test_holm_keeps_the_order(p: list[float]) -> None:
    order = np.argsort(p, kind="stable")
    assert (np.diff(holm(p)[order]) >= 0).all()


@given(P_VALUES, st.integers(0, 99))
def test_holm_does_not_depend_on_the_order_given(p: list[float], seed: int) -> None:
    permutation = np.random.default_rng(seed).permutation(len(p))
    np.testing.assert_allclose(holm(np.array(p)[permutation]), holm(p)[permutation])


@given(P_VALUES, st.floats(0, 1))
def test_a_larger_family_never_helps(p: list[float], other: float) -> None:
    assert (holm([*p, other])[:-1] >= holm(p)).all()


# -------------------------------------------------------------------------------------------- place, compare


def test_place_by_hand() -> None:
    # (3.8 − 3.6) / (4.6 − 3.6) = .2; the reference is at 0, the ceiling at 1, (3.1 − 3.6) / 1 = −.5.
    np.testing.assert_allclose(place([3.8, 3.6, 4.6, 3.1], [3.6] * 4, [4.6] * 4), [0.2, 0, 1, -0.5])


def test_place_needs_a_ceiling_above_the_reference() -> None:
    assert np.isnan(place([3.8, 3.8, 3.8], [3.6, 3.6, 3.6], [3.6, 3.5, np.nan])).all()


@given(st.floats(-5, 5), st.floats(0.1, 10))
def test_place_does_not_depend_on_the_scale(shift: float, scale: float) -> None:
    x = np.array([3.8, 3.6, 4.6])
    np.testing.assert_allclose(place(*(shift + scale * x)), place(*x), atol=1e-9)


def test_comparison_by_hand() -> None:
    # Paired differences of A: .1, .2, .3, so mean .2, standard error .1/√3, t = 2√3, 2 degrees of freedom.
    # The seeds themselves differ by whole points: unpaired, nothing could be told.
    results = results_of(
        {"A": [[1.1, 2.2, 3.3]], "B": [[1.0, 2.1, 2.9]], "BC": [[1.0, 2.0, 3.0]], "Oracle": [[2.0, 3.0, 4.0]]}
    )
    compared = compare(results, "value_top10", "BC", "Oracle", family=("A", "B"))
    a, b = compared["A"], compared["B"]
    assert a.mean[0] == pytest.approx(2.2)
    assert a.difference[0] == pytest.approx(0.2)
    assert a.half_width[0] == pytest.approx(4.302653 * 0.1 / np.sqrt(3), rel=1e-6)
    assert a.place[0] == pytest.approx(0.2)
    assert a.p_greater[0] == pytest.approx(stats.t.sf(2 * np.sqrt(3), 2))
    assert a.p_holm[0] == pytest.approx(2 * a.p_greater[0])
    assert b.p_holm[0] == pytest.approx(max(2 * a.p_greater[0], b.p_greater[0]))
    assert np.isnan(compared["Oracle"].p_holm[0]), "a referee is no member of the family"
    assert compared["Oracle"].place[0] == 1.0
    assert compared["BC"].difference[0] == 0.0


def test_comparison_pairs_only_seeds_that_both_have() -> None:
    results = results_of({"A": [[1.1, np.nan, 3.3]], "BC": [[1.0, 2.0, np.nan]]})
    a = compare(results, "value_top10", "BC", "Oracle", family=("A",))["A"]
    assert a.n_seeds[0] == 1
    assert a.difference[0] == pytest.approx(0.1)
    assert np.isnan([a.half_width[0], a.p_holm[0], a.place[0]]).all()


def test_comparison_without_the_reference_is_unknown_not_an_error() -> None:
    a = compare(results_of({"A": [[1.0, 2.0]]}), "value_top10", "BC", "Oracle", family=("A",))["A"]
    assert a.mean[0] == 1.5
    assert np.isnan(a.difference[0])


def test_results_give_nan_for_what_is_not_there() -> None:
    results = results_of({"A": [[1.0, 2.0]]})
    assert np.isnan(results.of("A", "no such metric")).all()
    assert results.of("nobody", "value_top10").shape == (1, 2)
    assert results.metrics() == ("value_top10",)
    assert results.metrics(world=True) == ()


# ---------------------------------------------------------------------------------------- interquartile mean


def test_interquartile_mean_by_hand() -> None:
    # Of eight scores the two lowest and the two highest go: (3 + 4 + 5 + 6) / 4.
    assert interquartile_mean(np.array([[1, 100], [3, 4], [5, 6], [2, 7]], dtype=float)) == 4.5


@pytest.mark.parametrize("shape", [(10, 1), (3, 3), (7, 5), (12, 11)])
def test_interquartile_mean_agrees_with_scipy(shape: tuple[int, int]) -> None:
    scores = np.random.default_rng(5).normal(size=shape)
    assert interquartile_mean(scores) == pytest.approx(stats.trim_mean(scores, 0.25, axis=None))


def mean(scores: FloatArray) -> float:
    return float(scores.mean())


def test_bootstrap_resamples_runs_within_their_task() -> None:
    # With constant columns every stratified resample is the matrix itself; an unstratified one would vary.
    scores = np.tile([0.0, 100.0], (10, 1))
    assert stratified_bootstrap(scores, mean, resamples=50) == (50.0, 50.0, 50.0)


def test_bootstrap_interval_holds_the_statistic_and_repeats() -> None:
    scores = np.random.default_rng(3).normal(size=(12, 5))
    point, low, high = stratified_bootstrap(scores, resamples=300)
    assert low < point < high
    assert stratified_bootstrap(scores, resamples=300) == (point, low, high)
    assert stratified_bootstrap(scores, resamples=300, seed=1) != (point, low, high)


def test_bootstrap_of_the_mean_is_about_as_wide_as_the_normal_interval() -> None:
    scores = np.random.default_rng(4).normal(size=(40, 4))
    _, low, high = stratified_bootstrap(scores, mean, resamples=1000)
    normal = 2 * 1.96 * np.sqrt(scores.var(axis=0).sum() / 40) / 4
    assert (high - low) == pytest.approx(normal, rel=0.1)


@pytest.mark.parametrize("scores", [np.zeros(3), np.zeros((0, 2)), np.array([[1.0, np.nan]])])
def test_bootstrap_refuses_what_is_no_finite_matrix(scores: FloatArray) -> None:
    with pytest.raises(ValueError, match="finite"):
        stratified_bootstrap(scores)
