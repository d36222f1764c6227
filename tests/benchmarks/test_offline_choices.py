"""How strengths are chosen, and what a choice costs: by hand on made-up trials."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from recsim_gr.benchmarks.offline import Trial, choices
from recsim_gr.benchmarks.offline_charts import RULE_NAMES, RULE_STYLES, gains, mean_regret, promise, regret
from recsim_gr.benchmarks.offline_choices import (
    CRITERIA,
    DEFAULT,
    JUDGE,
    NDCG,
    NDCG_SHARE,
    RULES,
    SNIPS,
    TRUTH,
    at_the_end,
    choose,
)
from recsim_gr.benchmarks.offline_report import _regret_cell, regret_table, selection_lines, table2
from recsim_gr.benchmarks.offline_trials import REFERENCE, Trials, percent_over, percentages

NAN = float("nan")

# from the weakest to the strongest: the judge rises all along, NDCG falls, SNIPS and the truth turn
GRID = [
    {JUDGE: 3.0, NDCG: 0.20, SNIPS: 3.1, TRUTH: 3.5},
    {JUDGE: 3.2, NDCG: 0.20, SNIPS: 3.3, TRUTH: 3.6},
    {JUDGE: 3.4, NDCG: 0.19, SNIPS: 3.2, TRUTH: 3.8},
    {JUDGE: 3.6, NDCG: 0.15, SNIPS: 3.0, TRUTH: 3.7},
    {JUDGE: 3.9, NDCG: 0.05, SNIPS: NAN, TRUTH: 3.4},
]


def test_each_rule_by_hand() -> None:
    # .95·.2 = .19: the third is just within, and of those within it has the highest judge; of equal NDCG the weaker
    assert {rule: choose(rule, GRID, 0.2) for rule in RULES} == {
        "judge": 4,
        "ndcg": 0,
        "judge_ndcg": 2,
        "snips": 1,
        "truth": 2,
    }


def test_the_95_percent_are_of_the_reference() -> None:
    assert choose("judge_ndcg", GRID, 0.201) == 1  # .19095 is asked for, .19 is not enough
    assert choose("judge_ndcg", GRID, 0.15) == 3  # .1425
    assert choose("judge_ndcg", GRID, 0.01) == 4
    assert choose("judge_ndcg", GRID, 0.5) == 0  # none keeps .475: what keeps most, the weaker of two
    assert choose("judge_ndcg", GRID, NAN) is None  # the reference failed


def test_what_is_missing_is_not_chosen() -> None:
    assert choose("snips", [{SNIPS: NAN}, {}], 0.2) is None
    assert choose("judge", [{}, {JUDGE: 1.0}, {JUDGE: NAN}], 0.2) == 1
    # the only one within 95 % has no judge's score: the nearest to what was asked for
    assert choose("judge_ndcg", [{JUDGE: NAN, NDCG: 0.3}, {JUDGE: 4.0, NDCG: 0.1}], 0.3) == 0


FIGURES = st.lists(
    st.tuples(st.floats(1, 5), st.floats(0.01, 1), st.floats(1, 5), st.floats(1, 5)), min_size=1, max_size=6
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(FIGURES, st.floats(0.01, 1), st.floats(0.1, 10))
def test_a_rule_takes_the_highest_that_it_allows_whatever_the_unit(
    figures: list[tuple[float, ...]], reference: float, unit: float
) -> None:
    trials = [dict(zip((JUDGE, NDCG, SNIPS, TRUTH), each, strict=True)) for each in figures]
    for rule, criterion in CRITERIA.items():
        taken = choose(rule, trials, reference)
        assert taken is not None
        allowed = [t for t in trials if rule != "judge_ndcg" or t[NDCG] >= NDCG_SHARE * reference]
        if allowed:
            assert trials[taken][criterion] == max(t[criterion] for t in allowed)
            assert trials[taken] in allowed
        else:
            assert trials[taken][NDCG] == max(t[NDCG] for t in trials)
        if rule != "judge_ndcg":
            scaled = [{name: unit * value for name, value in t.items()} for t in trials]
            assert scaled[choose(rule, scaled, reference) or 0][criterion] == unit * trials[taken][criterion]


def test_ends_of_a_grid() -> None:
    assert [at_the_end(k, 5) for k in range(5)] == [True, False, False, False, True]
    assert not at_the_end(0, 1)  # nothing to choose


# ------------------------------------------------------------------------------------------- choices of a whole cell


def swept(agent: str, default: float = 2.0) -> list[Trial]:
    values = (8.0, 4.0, 2.0, 1.0, 0.5)
    return [Trial(agent, agent, "beta", v, in_grid=True, is_default=v == default) for v in values]


def test_a_cell_s_choices() -> None:
    reference = Trial(REFERENCE, REFERENCE)
    measured = {reference: {NDCG: 0.2}} | dict(zip(swept("ASFT"), GRID, strict=True))
    assert choices(measured) == [
        [DEFAULT, *RULES],  # nothing to choose, so every rule takes it
        ["ndcg"],
        ["snips"],
        [DEFAULT, "judge_ndcg", "truth"],
        [],
        ["judge"],
    ]


def test_a_default_beside_the_grid_is_taken_by_no_rule() -> None:
    beside = Trial("ASFT", "ASFT", "beta", 100.0)
    measured = {Trial(REFERENCE, REFERENCE): {NDCG: 0.2}} | dict(zip(swept("ASFT", 100.0), GRID, strict=True))
    measured[beside] = dict.fromkeys((JUDGE, NDCG, SNIPS, TRUTH), 9.0)
    assert choices(measured)[-1] == [DEFAULT]
    assert [DEFAULT in taken for taken in choices(measured)[1:-1]] == [False] * 5


def test_without_a_sweep_there_is_no_choice() -> None:
    measured: dict[Trial, dict[str, float]] = {Trial(REFERENCE, REFERENCE): {NDCG: 0.2}}
    measured[Trial("ASFT", "ASFT", "beta", 2.0)] = GRID[0]
    assert choices(measured) == [[DEFAULT], [DEFAULT]]


def test_where_the_reference_failed_the_rule_that_asks_for_it_takes_none() -> None:
    taken = choices(dict(zip(swept("ASFT"), GRID, strict=True)))
    assert not any("judge_ndcg" in rules for rules in taken)
    assert sum("judge" in rules for rules in taken) == 1


# ----------------------------------------------------------------------------------------------- made-up results

SEEDS = (0, 1, 2)


def table(**agents: Any) -> Trials:
    """Of agents fitted once: agent to metric to (N, S)."""
    values = {(a, 0, m): np.array(v, dtype=float) for a, metrics in agents.items() for m, v in metrics.items()}
    shape = next(iter(values.values())).shape
    chosen = {(a, DEFAULT): np.zeros(shape, dtype=int) for a in agents}
    noise = np.linspace(0, 1, shape[0])
    return Trials(
        noise, 1 - noise, tuple(range(shape[1])), tuple(agents), dict.fromkeys(agents, (NAN,)), {}, values, {}, chosen
    )


def selected() -> Trials:
    """One noise level and three worlds: A-SFT at five strengths, and what rules took."""
    grid = (8.0, 4.0, 2.0, 1.0, 0.5)
    truth = [[3.5] * 3, [3.6, 3.6, 3.9], [3.8, 3.8, 3.7], [3.7] * 3, [3.4] * 3]
    kept = [[0.20, 0.20, 0.18], [0.2, 0.1, 0.1], *[[0.1] * 3] * 3]
    values = {("ASFT", k, "value_top10"): np.array([truth[k]]) for k in range(5)}
    values |= {("ASFT", k, NDCG): np.array([kept[k]]) for k in range(5)}
    values |= {(REFERENCE, 0, "value_top10"): np.full((1, 3), 3.5), (REFERENCE, 0, NDCG): np.full((1, 3), 0.2)}
    chosen = {("ASFT", DEFAULT): [2, 2, 2], ("ASFT", "judge"): [4, 4, 3], ("ASFT", "truth"): [2, 1, 1],
              ("ASFT", "ndcg"): [0, 0, -1], ("ASFT", "judge_ndcg"): [0, 0, 0],
              (REFERENCE, DEFAULT): [0, 0, 0], (REFERENCE, "judge"): [0, 0, 0]}  # fmt: skip
    return Trials(
        np.array([0.5]), np.array([0.2]), SEEDS, (REFERENCE, "ASFT"), {REFERENCE: (NAN,), "ASFT": grid},
        {"ASFT": "beta"}, values, {}, {key: np.array([taken]) for key, taken in chosen.items()}, (), {"ASFT": grid},
    )  # fmt: skip


def test_regret_is_to_the_best_on_test_users() -> None:
    trials = selected()
    # the best of the five: 3.8, 3.8, 3.9
    np.testing.assert_allclose(trials.regret("ASFT", "judge"), [[3.8 - 3.4, 3.8 - 3.4, 3.9 - 3.7]])
    np.testing.assert_allclose(trials.regret("ASFT", "truth"), [[0.0, 0.2, 0.0]], atol=1e-12)
    np.testing.assert_allclose(trials.regret("ASFT", DEFAULT), [[0.0, 0.0, 0.2]], atol=1e-12)
    np.testing.assert_allclose(trials.regret("ASFT", "ndcg"), [[0.3, 0.3, NAN]])
    np.testing.assert_allclose(mean_regret(trials, "judge"), trials.regret("ASFT", "judge"))
    np.testing.assert_array_equal(trials.strength("ASFT", "ndcg"), [[8.0, 8.0, NAN]])
    assert trials.selected == ("ASFT",)


def test_choices_at_an_end_are_flagged() -> None:
    trials = selected()
    assert trials.at_the_end("ASFT", "judge") == (0, 2)
    assert trials.at_the_end("ASFT", "ndcg") == (2, 0)
    assert trials.at_the_end("ASFT", "truth") == (0, 0)
    assert trials.at_the_end(REFERENCE, "judge") == (0, 0)
    assert "⚑ 2 of 3 at an end" in _regret_cell(trials, "ASFT", "judge", 0)
    assert "⚑" not in _regret_cell(trials, "ASFT", "truth", 0)
    assert "beta 0.5, 0.5, 1" in regret_table(trials)
    lines = {line.partition(":")[0].removeprefix("Strength by "): line for line in selection_lines(trials)}
    assert "at the weakest end 0, at the strongest 2 of 3" in lines["judge"]
    assert "end" not in lines[DEFAULT]
    # .95·.2 = .19 is kept in the first two worlds by the weakest, in the third by none
    assert trials.short_of_ndcg("ASFT") == 1
    assert "in 1 no strength keeps 95 %" in lines[RULE_NAMES["judge_ndcg"]]
    assert "lost 0.333 ± 0.287" in lines["judge"]  # (.4, .4, .2): deviation .1155 / √3 times 4.303


def test_pictures_show_what_tables_say() -> None:
    drawn = regret(selected(), "", "regret")
    assert drawn is not None
    points = drawn.spec["data"]["values"]  # one panel, whose data Altair moves to the top
    shown = {(row["agent"], row["rule"]): row["mean"] for row in points}
    assert shown["ASFT", "judge"] == pytest.approx(1 / 3)
    assert set(RULE_NAMES) == {DEFAULT, *RULES} == set(RULE_STYLES)
    once = table(**{REFERENCE: {"judge_return": [[3.0, 3.0]]}, "BC": {"judge_return": [[3.0, 3.0]]}})
    assert regret(once, "", "regret") is None
    assert promise(once, DEFAULT, "", "promise") is None  # no truth to draw it against


def test_gains_are_over_the_reference_at_its_default() -> None:
    metrics = {"judge_return": [[3.0, 3.2]], "score_return": [[3.0, 3.0]], "value_return": [[4.0, 4.0]]}
    more = {"judge_return": [[3.5, 3.8]], "score_return": [[3.1, 3.1]], "value_return": [[3.9, 3.9]]}
    trials = table(**{REFERENCE: metrics, "PPO": more, "Oracle": metrics})
    assert set(gains(trials, DEFAULT, "judge_return")) == {"PPO"}  # no ceiling, not itself
    np.testing.assert_allclose(gains(trials, DEFAULT, "judge_return")["PPO"], [[0.5, 0.6]])
    drawn = promise(trials, DEFAULT, "", "promise")
    assert drawn is not None
    drawn_points = [row for row in _rows_in(drawn.spec) if row.get("agent") == "PPO"]
    assert [(row["x"], row["y"]) for row in drawn_points] == [
        (pytest.approx(0.55), pytest.approx(0.1)),
        (pytest.approx(0.55), pytest.approx(-0.1)),
    ]


def _rows_in(spec: Any) -> list[dict[str, Any]]:
    """Of all data sets of a specification, in order."""
    if isinstance(spec, list):
        return [row for part in spec for row in _rows_in(part)]
    if not isinstance(spec, dict):
        return []
    own = spec.get("data", {}).get("values", [])
    return [*own, *(row for key, part in spec.items() if key != "data" for row in _rows_in(part))]


def test_percentages_by_hand_with_holm_over_competitors() -> None:
    np.testing.assert_allclose(percent_over(np.array([3.3, 0.5]), np.array([3.0, 0.0])), [10.0, NAN])
    base, first, second = [2.0, 2.0, 2.0], [2.2, 2.4, 2.6], [2.0, 2.2, 1.9]
    trials = table(
        **{REFERENCE: {"mrr": [base]}, "ASFT": {"mrr": [first]}, "PPO": {"mrr": [second]}, "Random": {"mrr": [first]}}
    )
    found = percentages(trials, DEFAULT, "mrr")
    # 10, 20, 30 %: mean 20, deviation 10, half width 4.303·10/√3 = 24.84
    assert found["ASFT"].mean[0] == pytest.approx(20.0)
    assert found["ASFT"].half[0] == pytest.approx(24.84, abs=0.01)
    p = [stats.ttest_1samp(x, 0).pvalue for x in ([10, 20, 30], [0, 10, -5])]
    assert found["ASFT"].p[0] == pytest.approx(2 * min(p))
    assert found["PPO"].p[0] == pytest.approx(max(p))
    failed = percentages(replace(trials, failed=("CQL", "Random")), DEFAULT, "mrr")
    assert failed["ASFT"].p[0] == pytest.approx(3 * min(p))  # who failed is in the family as before
    assert np.isnan(found["Random"].p[0])  # a baseline is no competitor: it has no part in the family
    assert found["Random"].mean[0] == pytest.approx(20.0)
    assert found[REFERENCE].mean[0] == 0


def test_who_is_too_far_out_to_be_drawn_is_named() -> None:
    metrics = {"judge_return": [[3.0, 3.0]], "score_return": [[3.0, 3.0]], "value_return": [[4.0, 4.0]]}
    near = {f"Near{k}": metrics | {"judge_return": [[3.0 + 0.01 * k] * 2]} for k in range(6)}
    far = {"PPO": metrics | {"judge_return": [[9.0, 9.0]]}}
    drawn = promise(table(**{REFERENCE: metrics}, **near, **far), DEFAULT, "three seeds", "promise")
    assert drawn is not None
    assert drawn.spec["title"]["subtitle"] == ["three seeds", "Too far out to be drawn: PPO at ν 0"]
    drawn = promise(table(**{REFERENCE: metrics}, **near), DEFAULT, "three seeds", "promise")
    assert drawn is not None
    assert drawn.spec["title"]["subtitle"] == ["three seeds"]


def test_a_table_without_a_truth_is_drawn_as_far_as_it_goes() -> None:
    metrics = {"judge_return": [[3.0, 3.2]], "score_return": [[3.0, 3.0]]}
    drawn = promise(table(**{REFERENCE: metrics, "PPO": metrics}), DEFAULT, "", "promise")
    assert drawn is not None


def test_a_failed_trial_leaves_no_regret_and_a_missing_agent_no_mean() -> None:
    trials = selected()
    values = dict(trials.values)
    values["ASFT", 2, "value_top10"] = np.array([[NAN, 3.8, 3.7]])
    lost = replace(trials, values=values)
    np.testing.assert_allclose(lost.regret("ASFT", "judge"), [[NAN, 3.8 - 3.4, 3.9 - 3.7]])
    both = replace(
        lost,
        agents=(*lost.agents, "CQL"),
        strengths={**lost.strengths, "CQL": lost.strengths["ASFT"]},
        values=values | {("CQL", k, m): array for (_, k, m), array in trials.values.items()},
        chosen={**lost.chosen, ("CQL", "judge"): lost.chosen["ASFT", "judge"]},
        swept={"ASFT": lost.strengths["ASFT"], "CQL": lost.strengths["ASFT"]},
    )
    assert np.isnan(mean_regret(both, "judge")[0, 0])
    assert np.isfinite(mean_regret(both, "judge")[0, 1:]).all()


def test_percentages_are_over_the_default_whatever_rule_took_of_the_reference() -> None:
    trials = selected()
    values = dict(trials.values)
    values[REFERENCE, 1, "value_top10"] = np.full((1, 3), 7.0)
    other = replace(
        trials,
        values=values,
        strengths={**trials.strengths, REFERENCE: (NAN, 1.0)},
        chosen={**trials.chosen, (REFERENCE, "judge"): np.ones((1, 3), dtype=int)},
    )
    found = percentages(other, "judge", "value_top10")
    # 3.4, 3.4, 3.7 over 3.5
    assert found["ASFT"].mean[0] == pytest.approx(100 * (3.5 / 3.5 - 1), abs=1e-9)
    assert found[REFERENCE].mean[0] == pytest.approx(100.0)
    np.testing.assert_allclose(percent_over(np.array([3.0]), np.array([-3.0])), [NAN])


def test_a_sure_loss_is_bold_and_not_marked_as_a_gain() -> None:
    base, less = [2.0, 2.0, 2.0], [1.0, 1.01, 0.99]
    metrics = {"value_top10": [base], "judge_return": [[3.0, 3.1, 3.2]], "judge_return_sd": [[0.3, 0.31, 0.32]]}
    trials = table(**{REFERENCE: metrics, "ASFT": metrics | {"value_top10": [less]}})
    html = table2(trials, DEFAULT)
    assert "<b>−50.0</b>" in html
    assert 'class="best"' not in html
    # users: .3/3, .31/3.1, .32/3.2; seeds: deviation .1 of 3.1
    assert "<td>10.0<small>3.2</small></td>" in html
