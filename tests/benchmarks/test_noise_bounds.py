"""Suite noise_bounds: its arithmetic by hand, the theorem as a property, and a small run from end to end."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from recsim_gr.benchmarks.noise_bounds_measures import (
    ContextLog,
    Tables,
    certificate,
    draw,
    largest_deviation,
    promised_loss,
    tilted,
)

# ------------------------------------------------------------------------------------------------------- the bound


def test_the_bound_by_hand() -> None:
    # ln(2·200/.05) = ln 8000 = 8.98720; sqrt(2·8.98720) = 4.23962; twice that is 8.47924
    assert promised_loss(1.0, 200, 0.05) == pytest.approx(8.47924, abs=1e-4)
    assert promised_loss(0.25, 200, 0.05) == pytest.approx(2.11981, abs=1e-4)
    assert promised_loss(0.0, 200, 0.05) == 0.0
    assert largest_deviation(4.0, 200, 0.05) == pytest.approx(4.0 / 8.47924, abs=1e-5)  # .47174
    for arguments in ((-1.0, 200, 0.05), (1.0, 0, 0.05), (1.0, 200, 1.0)):
        with pytest.raises(ValueError, match="promised_loss takes"):
            promised_loss(*arguments)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(0.02, 30.0), st.floats(0.0, 5.0))
def test_the_theorem_holds_where_noise_keeps_to_its_bound(seed: int, temperature: float, sigma: float) -> None:
    random = np.random.default_rng(seed)
    mu = random.dirichlet(np.full(12, 0.5), size=5)
    truth = random.uniform(1, 5, mu.shape)
    half = promised_loss(sigma, 12, 0.05) / 2
    noise = np.clip(sigma * random.normal(size=mu.shape), -half, half)  # the event of probability 1 − δ
    policy = tilted(np.log(mu), truth + noise, temperature)
    gained = ((policy - mu) * truth).sum(axis=1)
    proved = certificate(policy, mu, truth + noise, half)
    assert (gained >= proved - 1e-9).all()
    assert (gained >= -2 * half - 1e-9).all()
    # the identity of the module's head: E_π[r] − E_μ[r] = λ·(KL(π‖μ) + KL(μ‖π))
    both_ways = ((policy - mu) * (np.log(np.maximum(policy, 1e-300)) - np.log(mu))).sum(axis=1)
    moved = ((policy - mu) * (truth + noise)).sum(axis=1)
    if policy.min() > 1e-290:
        np.testing.assert_allclose(moved, temperature * both_ways, rtol=1e-6, atol=1e-9)


def test_a_certificate_by_hand() -> None:
    base, policy = np.array([[0.5, 0.5, 0.0]]), np.array([[0.8, 0.2, 0.0]])
    # E_π[r] − E_μ[r] = .3·4 − .3·2 = .6; ‖π − μ‖₁ = .6, times .5; the third title has no weight, whatever its score
    proved = certificate(policy, base, np.array([[4.0, 2.0, np.inf]]), 0.5)
    assert proved == pytest.approx(0.6 - 0.3)


# ---------------------------------------------------------------------------------------------------------- optima


def test_tilting_has_its_limits() -> None:
    mu = np.array([[0.2, 0.3, 0.5, 0.0]])
    with np.errstate(divide="ignore"):
        log_mu = np.log(mu)
    rewards = np.array([[3.0, 2.0, 1.0, 9.0]])
    np.testing.assert_allclose(tilted(log_mu, rewards, 1e9), mu, atol=1e-8)  # λ → ∞: imitation
    np.testing.assert_allclose(tilted(log_mu, rewards, 1e-3), [[1.0, 0.0, 0.0, 0.0]], atol=1e-12)  # λ → 0: the best
    # by hand at λ = 1/ln 2: weights .2·8, .3·4, .5·2 = 1.6, 1.2, 1.0 of 3.8
    np.testing.assert_allclose(tilted(log_mu, rewards, 1 / np.log(2)), [[16 / 38, 12 / 38, 10 / 38, 0.0]])
    with pytest.raises(ValueError, match="tilted takes"):
        tilted(log_mu, rewards[0], 1.0)


LOG = ContextLog(np.array([[0, 2, 2, 0, 3]]), np.array([[1.0, 2.0, 4.0, 3.0, 2.0]]), 5)
"""Title 0 scored 1 and 3, title 2 scored 2 and 4, title 3 scored 2."""


def test_the_optimum_on_a_log_by_hand() -> None:
    # λ = 1/ln 2: weights 2^r: title 0: 2 + 8, title 2: 4 + 16, title 3: 4; of 34
    found = LOG.exp_weighted(1 / np.log(2))
    np.testing.assert_allclose(found, [[10 / 34, 0.0, 20 / 34, 4 / 34, 0.0]])
    np.testing.assert_allclose(LOG.shares(), [[0.4, 0.0, 0.4, 0.2, 0.0]])
    # A-SFT weighs by the mean: .4·2^2, .4·2^3, .2·2^2 = 1.6, 3.2, .8 of 5.6
    means = np.array([[2.0, 7.0, 3.0, 2.0, 7.0]])
    np.testing.assert_allclose(LOG.advantage_weighted(means, 1 / np.log(2)), [[16 / 56, 0.0, 32 / 56, 8 / 56, 0.0]])


def test_the_optimum_on_a_log_is_what_minimises_the_loss() -> None:
    weights = np.exp(LOG.scores[0] / 0.7)

    def loss(logits: np.ndarray) -> float:
        return -float(weights @ (logits - np.log(np.exp(logits).sum()))[LOG.titles[0]])

    best = minimize(loss, np.zeros(5), method="BFGS").x
    np.testing.assert_allclose(np.exp(best) / np.exp(best).sum(), LOG.exp_weighted(0.7)[0], atol=1e-3)


def test_means_are_shrunk_by_credibility() -> None:
    random = np.random.default_rng(0)
    titles = random.integers(0, 4, (50, 40))
    truth = random.normal(size=(50, 4))
    scores = np.take_along_axis(truth, titles, axis=1) + 2.0 * random.normal(size=titles.shape)
    log = ContextLog(titles, scores, 5)
    means = log.title_means()
    overall = scores.mean(axis=1)
    np.testing.assert_allclose(means[:, 4], overall)  # never seen
    raw = log.spread(scores)[:, :4] / log.spread(np.ones(scores.shape))[:, :4]
    share = (means[:, :4] - overall[:, None]) / (raw - overall[:, None])
    count = log.spread(np.ones(scores.shape))[:, :4]
    k = count * (1 / share - 1)  # n/(n + k) = share
    np.testing.assert_allclose(k, k[0, 0])
    assert 2.0 < k[0, 0] < 8.0  # σ²/τ² = 4
    only_noise = ContextLog(titles, random.normal(size=titles.shape), 5)
    assert np.abs(only_noise.title_means() - only_noise.scores.mean(axis=1, keepdims=True)).max() < 0.2


def test_a_log_of_noise_free_scores_is_the_tilted_policy_in_the_limit() -> None:
    tables = _tables(0.0)
    log = tables.log(200_000, "log")
    endless = tilted(tables.log_mu, tables.satisfaction, 0.5)
    np.testing.assert_allclose(log.exp_weighted(0.5), endless, atol=0.01)
    np.testing.assert_allclose(log.advantage_weighted(log.title_means(), 0.5), endless, atol=0.01)


def test_gaussian_noise_leaves_the_endless_log_s_optimum_alone() -> None:
    # E[exp((s + σz)/λ)] = exp(s/λ)·exp(σ²/2λ²), the last factor the same for all titles
    tables = _tables(0.5)
    log = tables.log(400_000, "log")
    np.testing.assert_allclose(log.exp_weighted(1.0), tilted(tables.log_mu, tables.satisfaction, 1.0), atol=0.01)


def _tables(sigma: float) -> Tables:
    random = np.random.default_rng(3)
    mu = random.dirichlet(np.ones(6), size=2)
    mu[0, 2] = 0.0
    mu /= mu.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        return Tables(7, np.array([4, 9]), np.log(mu), random.uniform(1, 5, mu.shape), sigma)


def test_logs_share_titles_and_noise_whatever_sigma() -> None:
    quiet, loud = _tables(1.0).log(30, "log"), _tables(3.0).log(30, "log")
    np.testing.assert_array_equal(quiet.titles, loud.titles)
    truth = np.take_along_axis(_tables(1.0).satisfaction, quiet.titles, axis=1)
    np.testing.assert_allclose(3.0 * (quiet.scores - truth), loud.scores - truth, atol=1e-12)
    assert not (quiet.titles == _tables(1.0).log(30, "held out").titles).all()
    np.testing.assert_array_equal(quiet.first(10).titles, quiet.titles[:, :10])


def test_titles_are_drawn_as_often_as_they_are_likely_and_never_without_weight() -> None:
    tables = _tables(1.0)
    shares = tables.log(50_000, "log").shares()
    np.testing.assert_allclose(shares, tables.mu, atol=0.01)
    assert shares[0, 2] == 0.0
    edge = draw(np.array([[0.5, 0.5, 0.0]]), np.array([[1.0, 0.5, 0.4999]]))  # 1 is no uniform, but may be rounded to
    assert edge.tolist() == [[0, 1, 0]]


def test_values_are_expectations_of_satisfaction() -> None:
    tables = _tables(1.0)
    policy = tables.mu
    expected = [sum(policy[n, a] * tables.satisfaction[n, a] for a in range(6)) for n in range(2)]
    np.testing.assert_allclose(tables.value(policy), expected)
    greedy = [tables.satisfaction[n, int(policy[n].argmax())] for n in range(2)]
    np.testing.assert_allclose(tables.greedy_value(policy), greedy)
