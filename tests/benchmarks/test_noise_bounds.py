"""Suite noise_bounds: its arithmetic by hand, the theorem as a property, and a small run from end to end."""

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.optimize import minimize

from recsim_gr.benchmarks import NoiseBounds
from recsim_gr.benchmarks.noise_bounds import HELD_OUT, TrainedBench, tables_of, tabular_figures
from recsim_gr.benchmarks.noise_bounds_charts import trained_figure
from recsim_gr.benchmarks.noise_bounds_measures import (
    ContextLog,
    Tables,
    certificate,
    draw,
    largest_deviation,
    promised_loss,
    tilted,
)
from recsim_gr.benchmarks.noise_bounds_report import (
    _factor,
    advice_table,
    bound_table,
    checks,
    stopping_table,
    summary,
)
from recsim_gr.benchmarks.noise_bounds_results import (
    ENDLESS,
    ONE_SCORE,
    Grid,
    Way,
    advised,
    in_hindsight,
    nearest,
    shape_of,
    trained_ways,
    untrained_end,
    ways,
)
from recsim_gr.benchmarks.report import read_run
from recsim_gr.benchmarks.runner import run
from recsim_gr.benchmarks.statistics import WORLD, Results
from recsim_gr.benchmarks.suite import CellResult
from recsim_gr.errors import ConfigError, RunDirectoryError

SMOKE = NoiseBounds.presets["smoke"]

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


# ---------------------------------------------------------------------------------------------------------- a cell


def test_figures_of_a_tabular_cell_are_those_of_loops_over_its_contexts() -> None:
    config = replace(SMOKE, tabular_contexts=6)
    world = config.world_of(30, 1.0, 0)
    found = tabular_figures(config, world, 30)
    tables = tables_of(world, 6)
    assert tables.sigma == 4.0
    scores, log, judged = tables.scores_of_all("one score"), tables.log(40, "log"), tables.log(40, HELD_OUT)
    assert (np.exp(tables.log_mu) == 0).sum(axis=1).tolist() == [6] * 6  # those seen
    values: dict[str, list[float]] = {ENDLESS: [], ONE_SCORE: [], "ExpRSFT, log of 10": [], "judged": []}
    for n in range(6):
        s, mu = tables.satisfaction[n], np.exp(tables.log_mu[n])
        for name, r in ((ENDLESS, s), (ONE_SCORE, scores[n])):
            weights = mu * np.exp(r / 0.5)
            values[name].append(float(weights @ s / weights.sum()))
        by_event = np.exp(log.scores[n, :10] / 0.5)
        titles = log.titles[n, :10]
        values["ExpRSFT, log of 10"].append(float(by_event @ s[titles] / by_event.sum()))
        means = judged.first(10).title_means()[n]
        values["judged"].append(float(by_event @ means[titles] / by_event.sum()))
    for name in (ENDLESS, ONE_SCORE, "ExpRSFT, log of 10"):
        assert found[name]["value@0.5"] == pytest.approx(np.mean(values[name])), name
    assert found["ExpRSFT, log of 10"]["judged@0.5"] == pytest.approx(np.mean(values["judged"]))
    assert found[WORLD]["promised_loss"] == pytest.approx(promised_loss(4.0, 30, 0.05))
    harmed = np.mean([v < float(np.exp(tables.log_mu[n]) @ tables.satisfaction[n])
                      for n, v in enumerate(values[ONE_SCORE])])  # fmt: skip
    assert found[ONE_SCORE]["harmed@0.5"] == harmed
    assert found[WORLD]["value_least"] < found[WORLD]["value_mu"] < found[WORLD]["value_best"]


def test_trained_agents_end_in_imitation_where_the_temperature_is_endless() -> None:
    config = replace(SMOKE, temperatures=(0.5, 1e7), trained_temperatures=(0.5, 1e7))
    result = CellResult()
    found = TrainedBench(config, 0.0625, 0, lambda share, what: None).figures(lambda share, what: None, result)
    assert not result.failed
    for agent in ("ExpRSFT", "ASFT"):
        for metric in ("trained_value", "trained_top10", "trained_judged"):
            assert found[agent][f"{metric}@1e+07"] == pytest.approx(found["BC"][metric], abs=2e-3), (agent, metric)
        assert found[agent]["trained_value@0.5"] != pytest.approx(found["BC"]["trained_value"], abs=1e-5)
    assert result.costs["ASFT"]["gradient_steps"] == 2 * config.training.steps


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noise_model": "watch_time"}, "gaussian"),
        ({"temperatures": (1.0, 0.5)}, "temperatures"),
        ({"temperatures": (0.0, 0.5)}, "temperatures"),
        ({"catalogues": (5, 60)}, "catalogues"),
        ({"n_titles": 61}, "n_titles"),
        ({"delta": 1.0}, "delta"),
        ({"trained_catalogues": (61,)}, "trained_catalogues"),
        ({"trained_temperatures": (3.0,)}, "trained_temperatures"),
        ({"agents": ("BC",)}, "agents"),
        ({"agents": ("ASFT", "PPO")}, "a temperature, which PPO's is not"),  # the weight of a penalty
        ({"agents": ("CQL",)}, "a temperature, which CQL's is not"),
        ({"history_length": 30}, "smaller than every catalogue"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(SMOKE, **changes)


# ------------------------------------------------------------------------------------------------------ what it says


def test_shapes_are_told_from_seeds_that_did_not_choose() -> None:
    up_and_down = np.array([[1.0, 1.1, 1.0], [2.0, 2.1, 2.0], [1.5, 1.6, 1.5]])
    assert shape_of(up_and_down) == "inverted U"
    assert shape_of(up_and_down[[1, 2, 0]]) == "falls"
    assert shape_of(up_and_down[[0, 2, 1]]) == "rises"
    assert shape_of(up_and_down[:, :1]) == "?"
    # each seed has its own best: what is best in hindsight, by .1, is nothing to the others
    luck = np.array([[0.0, 0.0, 0.1], [0.1, 0.0, 0.0], [0.0, 0.1, 0.0]])
    assert shape_of(luck) == "flat"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(-3, 3))
def test_a_shape_does_not_depend_on_where_a_seed_s_values_lie(seed: int, shift: float) -> None:
    random = np.random.default_rng(seed)
    values = random.normal(size=(5, 4)) + 2 * random.normal(size=(5, 1))
    assert shape_of(values) == shape_of(values + shift * np.arange(4))


CONFIG = {
    "suite": "noise_bounds",
    "agents": ["ExpRSFT", "ASFT"],
    "events": [20],
    "delta": 0.05,
    "tabular_contexts": 9,
    "agent_configs": {"ExpRSFT": {"temperature": 0.5}, "ASFT": {"beta": 0.5}},
}
TRUTH = {0.25: [3.0, 3.2], 1.0: [3.4, 3.6], 4.0: [3.1, 3.3]}
"""By temperature and seed; V(μ) is 3.0 and 3.2. Best at 1."""


def by_hand(**changes: Any) -> Grid:
    """One catalogue of 200 titles, one σ of 4, two seeds."""
    values: dict[tuple[str, str], Any] = {}
    judged = {0.25: [9.0, 1.0], 1.0: [2.0, 2.0], 4.0: [3.0, 3.0]}  # by seed: .25, and 4
    certified = {0.25: [-9.0, -9.0], 1.0: [-5.0, -5.0], 4.0: [-1.0, -1.0]}
    endless = {0.25: [4.0, 4.0], 1.0: [3.5, 3.5], 4.0: [3.2, 3.2]}
    for t in TRUTH:
        for agent, table in ((ENDLESS, endless), (ONE_SCORE, TRUTH), ("ASFT, log of 20", TRUTH)):
            values[agent, f"value@{t:g}@200"] = np.array([table[t]])
        values[ONE_SCORE, f"judged@{t:g}@200"] = np.array([judged[t]])
        values[ONE_SCORE, f"certified@{t:g}@200"] = np.array([certified[t]])
        values[ONE_SCORE, f"harmed@{t:g}@200"] = np.array([[0.25, 0.75]])
        values["ASFT, log of 20", f"judged@{t:g}@200"] = np.array([judged[t]])
        values["ASFT", f"trained_value@{t:g}@200"] = np.array([[TRUTH[t][0], np.nan]])  # one seed was trained
        values["ASFT", f"trained_judged@{t:g}@200"] = np.array([[judged[t][0], np.nan]])
    values[ONE_SCORE, "violated@200"], values[ONE_SCORE, "lowest@200"] = np.array([[0.0, 0.04]]), -np.ones((1, 2))
    for name, here in (("value_mu", [3.0, 3.2]), ("value_least", [1.0, 1.2]), ("promised_loss", [33.9, 33.9])):
        values[WORLD, f"{name}@200"] = np.array([here])
    values[WORLD, "trained_value_mu@200"] = np.array([[3.5, np.nan]])
    values[WORLD, "trained_promised_loss@200"] = np.array([[33.9, np.nan]])
    for t, step in ((0.25, 0.0), (1.0, 64.0), (4.0, 256.0)):
        values["ASFT", f"trained_best_step@{t:g}@200"] = np.array([[step, np.nan]])
    values["BC", "trained_value@200"] = np.array([[3.0, np.nan]])
    values |= {key: np.array([table]) for key, table in changes.get("values", {}).items()}
    agents = tuple(dict.fromkeys(agent for agent, _ in values if agent))
    return Grid.of(Results(np.array([1.0]), np.array([np.nan]), (0, 1), agents, values), CONFIG)


def test_advice_is_measured_from_the_best_in_lambda_and_in_value() -> None:
    grid = by_hand()
    assert grid.sigmas == (4.0,)
    found = advised(grid, ways(grid)[0], 200, 0)
    assert found["default"].temperature.tolist() == [0.25, 0.25]  # .5 lies halfway to 1: the lower one
    assert found["default"].doublings.tolist() == [-2.0, -2.0]
    np.testing.assert_allclose(found["default"].lost, [0.4, 0.4])
    assert found["sigma"].temperature.tolist() == [4.0, 4.0]
    np.testing.assert_allclose(found["sigma"].lost, [0.3, 0.3])
    assert found["judge"].temperature.tolist() == [0.25, 4.0]
    np.testing.assert_allclose(found["judge"].lost, [0.4, 0.3])
    assert found["certificate"].temperature.tolist() == [4.0, 4.0]
    assert "certificate" not in advised(grid, ways(grid)[1], 200, 0)
    (trained,) = trained_ways(grid)
    assert grid.curve(trained, trained.value, 200, 0).tolist() == [[3.0], [3.4], [3.1]]
    assert advised(grid, trained, 200, 0)["judge"].temperature.tolist() == [0.25]
    assert nearest(np.array([0.25, 1.0]), 0.0) == 0
    assert [_factor(x) for x in (2.0, -1.0, 0.0)] == ["× 4", "÷ 2", "the best"]


def test_the_reading_says_best_shape_and_loss() -> None:
    lines = summary(by_hand())
    assert lines[0].startswith(
        "200 titles: the bound says something below σ = 0.47 against the range of 4, and below 0.24"
    )
    assert f"{ONE_SCORE}, titles × σ → best λ: inverted U: 200 × σ 4 → 1" in lines
    assert "A-SFT, trained, as sampled, titles × σ → best λ: ?: 200 × σ 4 → 1 (lowest λ: never trained)" in lines
    told = "A-SFT, trained, as sampled, V(π) − V(μ) at the worst λ and seed: 200 titles σ 4: −0.500 (promised −33.92)"
    assert told in lines
    lost = next(line for line in lines if line.startswith(f"{ONE_SCORE}, value lost"))
    assert "the agent's default 0.400 (largest 0.400), λ = σ 0.300" in lost
    assert [line.split(":")[0] for line in lines[-3:]] == ["holds"] * 3
    assert "<td>0</td><td>64</td><td>256</td>" in stopping_table(by_hand())
    table = bound_table(by_hand())
    assert "<td>33.92</td><td>above</td><td>2.00</td><td>no</td>" in table
    assert "<td>2.0%</td>" in table
    assert "<td>50%</td>" in table


@pytest.mark.parametrize(
    ("key", "table", "place"),
    [
        ((ONE_SCORE, "violated@200"), [0.1, 0.1], -3),
        ((ENDLESS, "value@4@200"), [3.9, 3.9], -2),
        ((ONE_SCORE, "certified@1@200"), [0.5, -1.0], -1),
    ],
)
def test_what_breaks_a_law_fails_its_check(key: tuple[str, str], table: list[float], place: int) -> None:
    said = [line.split(":")[0] for line in checks(by_hand(values={key: table}))]
    assert said[place] == "FAILS"
    assert said.count("FAILS") == 1


def three_seeds(trained: list[list[float]], imitated: list[float], mu: list[float]) -> Grid:
    """A-SFT trained at three temperatures in three seeds, NaN where it failed."""
    few = by_hand()
    values = {
        key: np.array([[*table[0], table[0][0]]])
        for key, table in few.results.values.items()
        if not (key[0] in ("ASFT", "BC") or key[1].startswith("trained"))
    }
    for t, of_seeds in zip(TRUTH, trained, strict=True):
        values["ASFT", f"trained_value@{t:g}@200"] = np.array([of_seeds])
        values["ASFT", f"trained_judged@{t:g}@200"] = np.array([of_seeds])
        values["ASFT", f"trained_best_step@{t:g}@200"] = np.array([[0.0 if t < 1 else 64.0] * 3])
    values["BC", "trained_value@200"] = np.array([imitated])
    values[WORLD, "trained_value_mu@200"] = np.array([mu])
    agents = tuple(dict.fromkeys(agent for agent, _ in values if agent))
    return Grid.of(Results(np.array([1.0]), np.array([np.nan]), (0, 1, 2), agents, values), CONFIG)


def test_a_seed_that_failed_is_left_out_of_both_sides_of_a_pair() -> None:
    nan = np.nan
    # seeds lie one point apart; in each, A-SFT is .1, .2 and .3 above BC and .5 more above μ
    mu = np.array([1.0, 2.0, 3.0])
    imitated = mu + 0.5
    trained = np.array([imitated + gain for gain in (0.1, 0.2, 0.3)])
    trained[0, 0] = nan  # in seed 0 it failed at one temperature
    grid = three_seeds(trained.tolist(), imitated.tolist(), mu.tolist())
    (way,) = trained_ways(grid)
    above = grid.above(way, grid.imitation(way, 200, 0), 200, 0)
    np.testing.assert_allclose(above, [[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]])
    (told,) = (line for line in summary(grid) if "at the worst λ and seed" in line)
    assert "200 titles σ 4: +0.600" in told
    # and where BC failed in another seed, one seed has both
    imitated[2] = nan
    grid = three_seeds(trained.tolist(), imitated.tolist(), mu.tolist())
    above = grid.above(way, grid.imitation(way, 200, 0), 200, 0)
    np.testing.assert_allclose(above, [[0.1], [0.2], [0.3]])
    assert "(1 of 2 seeds)" in advice_table(grid, [way])
    drawn = trained_figure(grid, "")
    assert drawn is not None
    points = drawn.spec["datasets"]["points"]
    assert [point["mean"] for point in points] == pytest.approx([0.1, 0.2, 0.3])


def test_a_low_end_that_never_trained_is_told() -> None:
    rises = np.array([[3.0, 3.0, 3.01], [3.5, 3.51, 3.5], [3.1, 3.12, 3.1]])
    grid = three_seeds(rises.tolist(), [3.0] * 3, [3.0] * 3)
    (way,) = trained_ways(grid)
    assert shape_of(rises) == "inverted U"
    assert untrained_end(grid, way, 200, 0)
    assert "inverted U: 200 × σ 4 → 1 (lowest λ: never trained)" in "\n".join(summary(grid))
    table = advice_table(grid, [way])
    assert "lowest λ: never trained" in table
    assert 'class="best"' not in table
    assert not untrained_end(grid, ways(grid)[0], 200, 0)  # a tabular optimum has no steps


def test_what_the_best_owes_to_hindsight() -> None:
    # each seed has its own best, by .1; on the others, ties go to the lowest, where two of three seeds have 0
    luck = np.array([[0.0, 0.0, 0.1], [0.1, 0.0, 0.0], [0.0, 0.1, 0.0]])
    assert in_hindsight(luck) == pytest.approx(0.1 / 3)
    assert in_hindsight(np.array([[1.0, 2.0], [0.0, 1.0]])) == 0.0
    assert np.isnan(in_hindsight(luck[:, :1]))
    lost = next(line for line in summary(by_hand()) if line.startswith(f"{ONE_SCORE}, value lost"))
    assert lost.endswith("of it the best owes 0.000 to being picked on these seeds")


def test_an_inverted_u_is_seldom_announced_where_there_is_none() -> None:
    random = np.random.default_rng(0)
    for truth in (np.zeros(6), np.array([0.0, 0, 0, -5, -5, -5]), -0.3 * np.arange(6)):
        draws = truth[:, None] + random.normal(size=(400, 6, 10))
        announced = np.mean([shape_of(values) == "inverted U" for values in draws])
        assert announced <= 0.08  # 5 % at a plateau before a fall, less elsewhere; three deviations above


def test_users_of_the_judge_are_not_those_of_early_stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def seen(agent: Any, contexts: Any, truth: Any, validation: Any, judge: Any) -> dict[str, float]:
        asked.append(validation)
        return {"trained_value": 0.0}

    monkeypatch.setattr("recsim_gr.benchmarks.noise_bounds.trained_values", seen)
    bench = TrainedBench(replace(SMOKE, trained_temperatures=()), 0.0625, 0, lambda share, what: None)
    bench.figures(lambda share, what: None, CellResult())
    (contexts,) = asked
    assert len(contexts) == SMOKE.validation_users
    assert bench.world.in_split(contexts.users, "validation").all()
    for log in (bench.logs.train, bench.logs.validation, bench.logs.judge):
        assert not set(contexts.users.tolist()) & set(log.user.tolist())


@pytest.mark.parametrize(
    "changes",
    [{"delta": 7.0}, {"delta": None}, {"agents": 7}, {"events": []}, {"events": ["x"]}, {"tabular_contexts": None},
     {"agent_configs": []}],
)  # fmt: skip
def test_a_config_that_was_damaged_is_refused(changes: dict[str, Any]) -> None:
    (key,) = changes
    with pytest.raises(RunDirectoryError, match=f"not that of a run of suite noise_bounds .{key}"):
        Grid.of(by_hand().results, CONFIG | changes)
    with pytest.raises(RunDirectoryError, match=key):
        Grid.of(by_hand().results, {k: v for k, v in CONFIG.items() if k != key})


@pytest.mark.parametrize("temperature", ["abc", "nan", "-1"])
def test_a_table_with_a_temperature_that_is_none_is_refused(temperature: str) -> None:
    grid = by_hand(values={(ONE_SCORE, f"value@{temperature}@200"): [3.0, 3.0]})
    with pytest.raises(RunDirectoryError, match="truth at temperature"):
        summary(grid)


def test_a_check_with_nothing_to_check_does_not_hold() -> None:
    lost = {(ONE_SCORE, f"value@{t:g}@200"): [np.nan, np.nan] for t in TRUTH}
    said = [line.split(":")[0] for line in checks(by_hand(values=lost))]
    assert said == ["open", "holds", "open"]


def test_a_table_of_another_suite_is_refused() -> None:
    with pytest.raises(RunDirectoryError, match="no truth by temperature"):
        Grid.of(Results(np.array([0.0]), np.array([0.9]), (0,), ("BC",), {("BC", "nll"): np.zeros((1, 1))}), CONFIG)


def test_a_small_run_from_end_to_end(tmp_path: Path) -> None:
    suite = NoiseBounds(replace(SMOKE, noise_levels=(1.0,), catalogues=(60,), tabular_contexts=12))
    outcome = run(suite, tmp_path / "run", 1, Console(file=StringIO()))
    assert not outcome.failures
    kinds = ("tabular", 0), ("tabular", 1), ("trained", 0)
    assert outcome.finished == [f"{level}-titles-60-noise-1-seed-{seed}" for level, seed in kinds]
    assert [line.split(":")[0] for line in outcome.lines[-3:]] == ["holds"] * 3
    page = (tmp_path / "run" / "report.html").read_text()
    for name in ("truth", "log_size", "trained", "bound"):
        assert f'<figure id="{name}">' in page
        assert (tmp_path / "run" / "figures" / f"{name}.png").stat().st_size > 10_000
    assert "the full text is not at hand" in page
    assert "default-src 'none'" in page
    (results,) = read_run(tmp_path / "run").worlds.values()
    grid = Grid.of(results, read_run(tmp_path / "run").config)
    trained = Way("ExpRSFT", "", "trained_value", "trained_judged")
    assert grid.curve(trained, trained.value, 60, 0).shape == (2, 1)
