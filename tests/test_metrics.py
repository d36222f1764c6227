"""The metrics against ir-measures, by hand, and against their definitions."""

import math

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import RR, Success, nDCG
from numpy.typing import NDArray

from recsim_gr import metrics

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)

FloatArray = NDArray[np.float64]

MEASURES = {nDCG @ 10: "ndcg", Success @ 10: "hr", RR: "mrr"}


@st.composite
def rankings(draw: st.DrawFn, ties: bool = True) -> tuple[FloatArray, NDArray[np.int64]]:
    """(n, I) scores of any sign, some of them -inf for titles already seen, and a relevant unseen title a row."""
    n, n_titles = draw(st.integers(1, 6)), draw(st.integers(1, 25))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    low = draw(st.sampled_from([-50, -20, 0]))  # of eighths, exact also in the oracle's float32
    scores = rng.integers(low, low + 40, size=(n, n_titles)) / 8.0
    if not ties:
        scores = np.argsort(rng.random((n, n_titles)), axis=1) / 8.0 + low
    relevant = rng.integers(n_titles, size=n)
    seen = rng.random((n, n_titles)) < draw(st.sampled_from([0.0, 0.3]))
    np.put_along_axis(seen, relevant[:, None], False, axis=1)
    return np.where(seen, -np.inf, scores), relevant


def by_the_oracle(scores: FloatArray, relevant: NDArray[np.int64]) -> dict[str, FloatArray]:
    """trec_eval's figures, a row each. It breaks ties by the document's name, the last in the alphabet first, so the
    lowest index gets the last name."""
    names = [f"{999 - title}" for title in range(scores.shape[1])]
    qrels = {str(row): {names[title]: 1} for row, title in enumerate(relevant)}
    run = {
        str(row): {name: float(score) for name, score in zip(names, own, strict=True) if np.isfinite(score)}
        for row, own in enumerate(scores)
    }
    found = {name: np.full(len(scores), np.nan) for name in MEASURES.values()}
    for result in ir_measures.pytrec_eval.iter_calc(list(MEASURES), qrels, run):
        found[MEASURES[result.measure]][int(result.query_id)] = result.value
    return found


@pytest.mark.parametrize("ties", [False, True])
def test_ranking_metrics_are_trec_evals(ties: bool) -> None:
    @PROPERTY
    @given(rankings(ties=ties))
    def check(drawn: tuple[FloatArray, NDArray[np.int64]]) -> None:
        ranks, expected = metrics.rank_of(*drawn), by_the_oracle(*drawn)
        np.testing.assert_allclose(metrics.ndcg(ranks, 10), expected["ndcg"], atol=1e-9)
        np.testing.assert_allclose(metrics.hit_rate(ranks, 10), expected["hr"], atol=1e-9)
        np.testing.assert_allclose(metrics.reciprocal_rank(ranks), expected["mrr"], atol=1e-9)

    check()


def test_ranking_metrics_by_hand() -> None:
    """Scores below zero, a tie at the top: ranks 1, 2 (the lower index first) and 3."""
    scores = np.array([[-1.0, -2.0, -3.0], [0.0, 0.0, -1.0], [5.0, 4.0, 3.0]])
    ranks = metrics.rank_of(scores, np.array([0, 1, 2]))
    assert ranks.tolist() == [1, 2, 3]
    # 1/log2(2), 1/log2(3), 1/log2(4)
    np.testing.assert_allclose(metrics.ndcg(ranks, 10), [1.0, 1 / math.log2(3), 0.5])
    np.testing.assert_allclose(metrics.ndcg(ranks, 2), [1.0, 1 / math.log2(3), 0.0])
    assert metrics.hit_rate(ranks, 2).tolist() == [1.0, 1.0, 0.0]
    np.testing.assert_allclose(metrics.reciprocal_rank(ranks), [1.0, 0.5, 1 / 3])
    edge = np.array([10, 11])
    np.testing.assert_allclose(metrics.ndcg(edge, 10), [1 / math.log2(11), 0.0])
    assert metrics.hit_rate(edge, 10).tolist() == [1.0, 0.0]


@PROPERTY
@given(rankings())
def test_a_title_stands_in_the_list_at_its_rank(drawn: tuple[FloatArray, NDArray[np.int64]]) -> None:
    scores, _ = drawn
    n_titles = scores.shape[1]
    order = metrics.top_k(scores, n_titles)
    for title in range(n_titles):
        rank = metrics.rank_of(scores, np.full(len(scores), title))
        assert (order[np.arange(len(scores)), rank - 1] == title).all()
    for k in (1, 3, n_titles + 5):
        np.testing.assert_array_equal(metrics.top_k(scores, k), order[:, :k])
    listed = np.take_along_axis(scores, order, axis=1)
    assert (listed[:, :-1] >= listed[:, 1:]).all()


# -- descriptions of a policy -------------------------------------------------------------------------------------


@st.composite
def policies(draw: st.DrawFn, n: int = 3) -> FloatArray:
    """(n, I) log-probabilities, some of them -inf."""
    n_titles = draw(st.integers(2, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = draw(st.sampled_from([0.1, 1.0, 10.0])) * rng.standard_normal((n, n_titles))
    logits[:, 1:][rng.random((n, n_titles - 1)) < draw(st.sampled_from([0.0, 0.4]))] = -np.inf
    return np.asarray(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))


def of(*rows: list[float]) -> FloatArray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows))


def test_entropy_by_hand() -> None:
    got = metrics.entropy(of([0.5, 0.25, 0.25, 0.0], [0.25] * 4, [0.0, 1.0, 0.0, 0.0]))
    # ½ ln 2 + 2·¼ ln 4 = 1½ ln 2
    np.testing.assert_allclose(got, [1.5 * math.log(2), math.log(4), 0.0], atol=1e-12)


def test_kl_by_hand() -> None:
    got = metrics.kl_divergence(of([0.5, 0.5], [1.0, 0.0], [0.5, 0.5]), of([0.25, 0.75], [0.25, 0.75], [1.0, 0.0]))
    # ½ ln(½/¼) + ½ ln(½/¾) = ½ ln(4/3); ln 4; infinite where the reference has nothing
    np.testing.assert_allclose(got, [0.5 * math.log(4 / 3), math.log(4), np.inf], atol=1e-12)


@PROPERTY
@given(policies(), st.integers(0, 2**32))
def test_kl_is_positive_and_zero_only_for_the_same_policy(log_probs: FloatArray, seed: int) -> None:
    np.testing.assert_allclose(metrics.kl_divergence(log_probs, log_probs), 0.0, atol=1e-9)
    noise = np.random.default_rng(seed).standard_normal(log_probs.shape)
    other = log_probs + noise
    other -= np.logaddexp.reduce(other, axis=1, keepdims=True)
    divergence = metrics.kl_divergence(log_probs, other)
    assert (divergence > -1e-9).all()
    uniform = np.full_like(log_probs, -math.log(log_probs.shape[1]))
    np.testing.assert_allclose(
        metrics.kl_divergence(log_probs, uniform), math.log(log_probs.shape[1]) - metrics.entropy(log_probs), atol=1e-9
    )


def test_effective_sample_share_by_hand() -> None:
    """π = (¾, ¼) on a log of (¼, ¾): w = (3, ⅓), E_μ[w²] = ¼·9 + ¾·⅑ = 7/3, so 3/7; with a second context of
    π = μ, whose E_μ[w²] is 1: 1/((7/3 + 1)/2) = 3/5."""
    one = metrics.effective_sample_share(of([0.75, 0.25]), of([0.25, 0.75]))
    assert one == pytest.approx(3 / 7)
    two = metrics.effective_sample_share(of([0.75, 0.25], [0.4, 0.6]), of([0.25, 0.75], [0.4, 0.6]))
    assert two == pytest.approx(3 / 5)
    assert metrics.effective_sample_share(of([0.5, 0.5]), of([1.0, 0.0])) == 0.0  # nothing is known of title 1
    assert metrics.effective_sample_share(of([1.0, 0.0]), of([1.0, 0.0])) == pytest.approx(1.0)


@PROPERTY
@given(policies(), st.integers(0, 2**32))
def test_effective_sample_share_is_its_definition(log_probs: FloatArray, seed: int) -> None:
    logging = np.random.default_rng(seed).standard_normal(log_probs.shape)
    logging -= np.logaddexp.reduce(logging, axis=1, keepdims=True)
    first, second = [], []
    for pi, mu in zip(np.exp(log_probs), np.exp(logging), strict=True):
        first.append(sum(m * (p / m) for p, m in zip(pi, mu, strict=True)))
        second.append(sum(m * (p / m) ** 2 for p, m in zip(pi, mu, strict=True)))
    share = metrics.effective_sample_share(log_probs, logging)
    assert share == pytest.approx(np.mean(first) ** 2 / np.mean(second), rel=1e-9)
    assert 0 < share <= 1 + 1e-9
    assert metrics.effective_sample_share(log_probs, log_probs) == pytest.approx(1.0)


# -- gini and correlation -----------------------------------------------------------------------------------------


def test_gini_by_hand() -> None:
    assert metrics.gini(np.array([3, 3, 3])) == pytest.approx(0.0)
    assert metrics.gini(np.array([0, 0, 5])) == pytest.approx(2 / 3)  # one of n has all: 1 − 1/n
    # |1−2| + |1−3| + |2−3| = 4, twice is 8; over 2·n²·mean = 2·9·2 = 36
    assert metrics.gini(np.array([3, 1, 2])) == pytest.approx(8 / 36)
    assert metrics.gini(np.zeros(4)) == 0.0


@PROPERTY
@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.floats(0.1, 10))
def test_gini_is_the_mean_difference(counts: list[int], factor: float) -> None:
    x = np.array(counts, dtype=np.float64)
    if x.sum() == 0:
        return
    expected = np.abs(x[:, None] - x).mean() / (2 * x.mean())
    assert metrics.gini(x) == pytest.approx(expected, abs=1e-12)
    assert metrics.gini(factor * x[::-1]) == pytest.approx(expected, abs=1e-9)


def test_signed_squared_correlation_by_hand() -> None:
    """x − mean = (−1, 0, 1), y − mean = (−1, 1, 0): covariance 1, spread 2·2, so ¼."""
    x, y = np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 1.0])
    assert metrics.signed_squared_correlation(x, y) == pytest.approx(0.25)
    assert metrics.signed_squared_correlation(x, -y) == pytest.approx(-0.25)
    assert metrics.signed_squared_correlation(x, np.full(3, 7.0)) == 0.0


@PROPERTY
@given(st.integers(0, 2**32), st.integers(2, 40), st.floats(-5, 5), st.floats(0.1, 10))
def test_signed_squared_correlation_is_pearsons(seed: int, n: int, shift: float, scale: float) -> None:
    x, y = np.random.default_rng(seed).standard_normal((2, n))
    r = np.corrcoef(x, y)[0, 1]
    got = metrics.signed_squared_correlation(x, y)
    assert got == pytest.approx(r * abs(r), abs=1e-9)
    assert metrics.signed_squared_correlation(shift + scale * x, y) == pytest.approx(got, abs=1e-9)
    assert metrics.signed_squared_correlation(x.reshape(1, -1), y.reshape(1, -1)) == pytest.approx(got, abs=1e-12)
