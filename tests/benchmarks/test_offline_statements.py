"""The study's statements on made-up rows: what holds, what does not, what three seeds cannot say."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from recsim_gr.benchmarks.offline_choices import DEFAULT
from recsim_gr.benchmarks.offline_report import regions, statements, table2
from recsim_gr.benchmarks.offline_statements import (
    FAILS,
    HOLDS,
    MISSING,
    OTHERWISE,
    SEEMS,
    STATEMENTS,
    UNTESTED,
    caution,
    readings,
    sentence,
    verdicts,
)
from recsim_gr.benchmarks.offline_trials import REFERENCE, Trials

MOST, CLIMB, ROBUST = STATEMENTS.values()
METRICS = ("ndcg10", "judge_return", "score_return", "value_return", "value_top10")


def trials(levels: int, seeds: int, **gains: Any) -> Trials:
    """Agents with what they have above the reference: metric to a number, to (N,), or to (N, S)."""
    base = {metric: 3.0 + 0.1 * np.arange(seeds) for metric in METRICS}
    values = {}
    for agent, of_agent in {REFERENCE: {}, **gains}.items():
        for metric in METRICS:
            gain = np.asarray(of_agent.get(metric, 0.0), dtype=float)
            gain = gain[:, None] if gain.ndim == 1 else gain
            values[agent, 0, metric] = np.broadcast_to(base[metric] + gain, (levels, seeds))
    agents = (REFERENCE, *gains)
    noise = np.linspace(0, 1, levels)
    chosen = {(agent, DEFAULT): np.zeros((levels, seeds), dtype=int) for agent in agents}
    strengths = {agent: (float("nan"),) for agent in agents}
    return Trials(noise, 1.0 - noise, tuple(range(seeds)), agents, strengths, {}, values, {}, chosen)


def about(gain: float, seeds: int = 3, spread: float = 0.01, levels: int = 1) -> np.ndarray:
    """(N, S) around a gain."""
    return np.tile(gain + spread * np.linspace(-1, 1, seeds), (levels, 1))


def words(statement: Any, made: Trials) -> list[int]:
    return [verdict.word for verdict in verdicts(statement, made, DEFAULT)]


def test_better_than_each_is_as_sure_as_against_the_closest() -> None:
    made = trials(1, 3, ASFT={"value_top10": about(0.5)}, PPO={"value_top10": 0.3}, CQL={"value_top10": 0.1})
    (found,) = verdicts(MOST[2], made, DEFAULT)
    assert found.word == HOLDS
    # the differences are .5 (reference), .2 and .4, all with the same spread of .01: the largest p is PPO's
    p = stats.ttest_1samp([0.19, 0.2, 0.21], 0, alternative="greater").pvalue
    assert found.p_holds == pytest.approx(p)
    assert [title for title, _, _ in found.parts] == ["above PPO", "above CQL", f"above {REFERENCE}"]
    assert found.parts[0][1] == pytest.approx(0.2)
    assert found.parts[0][2] == pytest.approx(4.302653 * 0.01 / np.sqrt(3), rel=1e-6)


def test_one_that_is_better_refutes_it() -> None:
    made = trials(1, 3, ASFT={"value_top10": about(0.5)}, CQL={"value_top10": 0.9}, PPO={"value_top10": 0.1})
    (found,) = verdicts(MOST[2], made, DEFAULT)
    assert found.word == FAILS
    p = stats.ttest_1samp([-0.41, -0.4, -0.39], 0, alternative="less").pvalue
    assert found.p_fails == pytest.approx(3 * p)  # of three differences, any might have been below
    assert found.parts[0][0] == "above CQL"


def test_what_seeds_cannot_tell_is_undecided_and_leans() -> None:
    wide = about(0.05, spread=0.2)
    assert words(MOST[2], trials(1, 3, ASFT={"value_top10": wide})) == [SEEMS]
    assert words(MOST[2], trials(1, 3, ASFT={"value_top10": -wide})) == [OTHERWISE]
    assert words(MOST[2], trials(1, 1, ASFT={"value_top10": 0.5})) == [UNTESTED]
    lost = about(0.5)
    lost[0, 1:] = np.nan
    assert words(MOST[2], trials(1, 3, ASFT={"value_top10": np.full((1, 3), np.nan)})) == [MISSING]
    assert words(MOST[2], trials(1, 3, ASFT={"value_top10": lost})) == [UNTESTED]


def test_holm_runs_over_agents_and_levels() -> None:
    gain = np.concatenate([about(0.05, spread=0.025), about(0.5), about(0.4)])
    # the first level: t = .05/(.025/√3) = 3.46, p = .037, and it is Holm's last step; beside a level that does not
    # pass, it is the last but one, and p = .074
    assert words(MOST[2], trials(3, 3, ASFT={"value_top10": gain})) == [HOLDS] * 3
    gain[2] = [0.3, -0.2, 0.0]
    assert words(MOST[2], trials(3, 3, ASFT={"value_top10": gain})) == [SEEMS, HOLDS, SEEMS]


def test_a_good_judge_s_score_alone_is_no_overfitting() -> None:
    good = {"judge_return": about(0.5), "score_return": about(0.5, spread=0.02), "ndcg10": about(-0.2)}
    seen, kept, harmed = CLIMB
    assert words(seen, trials(1, 3, PPO=good)) == [HOLDS]
    assert words(kept, trials(1, 3, PPO=good)) == [OTHERWISE]  # what is promised is scored
    assert words(kept, trials(1, 3, PPO=good | {"score_return": about(0.1)})) == [HOLDS]
    assert words(harmed, trials(1, 3, PPO=good | {"value_return": about(-0.3)})) == [HOLDS]
    assert words(harmed, trials(1, 3, PPO=good | {"value_return": about(0.3)})) == [FAILS]
    # and no gain by the judge is no good score, whatever is lost
    assert words(seen, trials(1, 3, PPO=good | {"judge_return": about(-0.5)})) == [FAILS]


def test_robust_is_less_promised_that_is_not_kept() -> None:
    climbs = {"judge_return": about(0.9), "score_return": about(0.1, spread=0.012)}
    modest = {"judge_return": about(0.3, spread=0.02), "score_return": about(0.2)}
    ranking, promises, left_judge, left = ROBUST
    made = trials(1, 3, PPO=climbs, CQL=modest | {"ndcg10": about(-0.1)}, ASFT={"value_top10": about(0.4)})
    assert words(promises, made) == [HOLDS]  # .1 against .8
    assert words(ranking, made) == [FAILS]
    assert words(left, made) == [HOLDS]
    assert words(left_judge, made) == [FAILS]
    assert words(left, trials(1, 3, CQL={"value_top10": 0.1})) == []  # A-SFT is missing


LEFT_OUT = ". Not asked against BC, CQL, PPO, RSDPO, RSIPO, which the run leaves out"


def test_a_sentence_names_regions_and_a_caution_the_seeds() -> None:
    gain = np.concatenate([about(0.5), about(0.3), about(-0.5)])
    made = trials(3, 3, ASFT={"value_top10": gain})
    said = sentence(MOST[2], verdicts(MOST[2], made, DEFAULT), made)
    assert said == (
        "A-SFT improves satisfaction most (in truth): ASFT holds (3 seeds) at ν 0 (reliability 1.00), "
        "ν 0.5 (reliability 0.50); does not hold (3 seeds) at ν 1 (reliability 0.00)" + LEFT_OUT
    )
    whole = trials(2, 3, ASFT={"ndcg10": about(0.5, levels=2)})
    assert sentence(MOST[0], verdicts(MOST[0], whole, DEFAULT), whole).endswith(
        "ASFT holds (3 seeds) at all 2 noise levels" + LEFT_OUT
    )
    claimed = trials(1, 10, ASFT={"ndcg10": about(0.5, seeds=10)})
    assert sentence(MOST[0], verdicts(MOST[0], claimed, DEFAULT), claimed).endswith(
        "ASFT holds at ν 0 (reliability 1.00)" + LEFT_OUT
    )
    assert "no claim" in caution(made)
    assert "no claim" not in caution(trials(1, 10, ASFT={}))
    assert "nothing here is tested" in caution(trials(1, 1, ASFT={}))
    assert readings(trials(1, 1, ASFT={}), DEFAULT) == [caution(trials(1, 1, ASFT={}))]
    assert readings(made, DEFAULT)[0] == caution(made)
    assert len(readings(made, DEFAULT)) == 1 + sum(map(len, STATEMENTS.values()))


def test_statements_without_their_agents_are_not_asked() -> None:
    made = trials(1, 3, BC={})
    for group in STATEMENTS.values():
        for statement in group:
            assert verdicts(statement, made, DEFAULT) == []
            assert sentence(statement, [], made).endswith("not asked, agents are missing")
    assert statements(made, DEFAULT).count("agents are missing") == 11


def test_an_agent_of_a_user_counts_against_most_of_all_alone() -> None:
    made = trials(1, 3, ASFT={"value_top10": about(0.5)}, Mine={"value_top10": 0.9})
    assert words(MOST[2], made) == [HOLDS]
    assert words(MOST[3], made) == [FAILS]


def test_tables_mark_what_is_sure_and_tell_the_truth_in_italics() -> None:
    ours = {"value_top10": about(0.5), "ndcg10": about(-0.6)}
    made = trials(1, 3, ASFT=ours, PPO={"value_top10": about(0.1, spread=1)})
    html = table2(made, DEFAULT)
    # .49/3, .5/3.1, .51/3.2: 16.33, 16.13, 15.94 %, mean 16.13, deviation .198, half width 4.303·.198/√3 = .49
    assert "<i><b>+16.1</b></i><small>± 0.5</small></td>" in html
    assert "<b>−19.4</b>" in html
    assert '<tr><th class="learner"' in html
    assert f">{REFERENCE}</th><td" not in html
    assert "“A-SFT improves most”" in statements(made, DEFAULT)


def test_regions_tell_each_verdict_in_its_place() -> None:
    sure, lost = {"value_top10": about(0.5)}, {"value_top10": about(-0.5)}
    other = {"value_top10": 0.1}
    found = {
        name: replace(trials(1, 3, ASFT=ours, CQL=other), env="e", noise_model="n", log_size=size)
        for name, ours, size in (("small", sure, 1_000), ("large", lost, 4_000))
    }
    html = regions(found)
    start = html.index("A-SFT improves satisfaction most <small>in truth, ASFT")
    row = html[start : html.index("</tr>", start)]
    holds, fails = row.index('class="yes"'), row.index('class="no"')
    assert holds < fails
    assert "above CQL" in row[:fails]
    assert html.index('<th colspan="1">1,000 training users</th>') < html.index("4,000 training users")
    assert '<th colspan="1">e · n · 1,000 training users</th>' in regions({"small": found["small"]})


def test_what_a_run_leaves_out_is_told_and_what_failed_leaves_no_verdict() -> None:
    made = trials(1, 10, CQL={"ndcg10": about(0.5, seeds=10)}, RSDPO={"ndcg10": 0.1}, RSIPO={"ndcg10": 0.1})
    assert words(ROBUST[0], made) == [HOLDS]
    told = sentence(ROBUST[0], verdicts(ROBUST[0], made, DEFAULT), made)
    assert told.endswith("Not asked against PPO, which the run leaves out")
    assert "not asked against PPO" in statements(made, DEFAULT)
    failed = replace(made, failed=("PPO",))
    assert words(ROBUST[0], failed) == [MISSING]
    assert "Not asked" not in sentence(ROBUST[0], verdicts(ROBUST[0], failed, DEFAULT), failed)
    assert verdicts(ROBUST[0], failed, DEFAULT)[0].parts[0][0] == "above PPO"
    ours = trials(1, 10, ASFT={"value_top10": about(0.5, seeds=10)})
    assert words(MOST[3], ours) == [HOLDS]
    assert words(MOST[3], replace(ours, failed=("Mine",))) == [MISSING]
    assert words(MOST[3], replace(ours, failed=("Mine",), informed=("Mine",))) == [HOLDS]


def test_few_seeds_of_one_comparison_are_told_in_a_run_of_many() -> None:
    gain = about(0.5, seeds=10)
    gain[0, 3:] = np.nan
    made = trials(1, 10, ASFT={"judge_return": gain}, PPO={"judge_return": 0.1})
    (found,) = verdicts(MOST[1], made, DEFAULT)
    assert (found.word, found.n_seeds) == (HOLDS, 3)
    assert "holds (3 seeds)" in sentence(MOST[1], [found], made)


def test_a_test_without_result_makes_no_other_surer() -> None:
    gain = np.concatenate([about(0.05, spread=0.025), np.full((1, 3), np.nan)])
    # p = .037 alone; beside one that failed it is .074
    assert words(MOST[2], trials(2, 3, ASFT={"value_top10": gain})) == [SEEMS, MISSING]
    assert words(MOST[2], trials(1, 3, ASFT={"value_top10": gain[:1]})) == [HOLDS]


def test_gains_are_over_the_reference_at_its_default_whatever_a_rule_took() -> None:
    made = trials(1, 3, PPO={"judge_return": about(0.5), "ndcg10": about(-0.2)})
    chosen = {**made.chosen, ("PPO", "judge"): made.chosen["PPO", DEFAULT]}
    (found,) = verdicts(CLIMB[0], replace(made, chosen=chosen), "judge")  # the rule took nothing of the reference
    assert found.word == HOLDS


def test_a_failed_agent_stays_in_the_family_of_what_is_said_of_it() -> None:
    gain = {"judge_return": about(0.5), "value_return": about(-0.05, spread=0.025)}
    alone = trials(1, 3, PPO=gain)
    failed = replace(alone, failed=("RSDPO", "RSIPO"))
    (before,) = verdicts(CLIMB[2], alone, DEFAULT)
    after = verdicts(CLIMB[2], failed, DEFAULT)
    assert [verdict.agent for verdict in after] == ["PPO", "RSDPO", "RSIPO"]
    assert after[0].p_holds == pytest.approx(3 * before.p_holds)
    assert [verdict.word for verdict in after[1:]] == [MISSING, MISSING]
    without_ours = replace(trials(1, 3, CQL=gain), failed=("ASFT",))
    assert words(ROBUST[2], without_ours) == [MISSING]
    assert words(MOST[0], without_ours) == [MISSING]


def test_the_map_tells_what_was_not_asked() -> None:
    made = trials(1, 3, ASFT={"value_top10": about(0.5)})
    html = regions({"part": replace(made, env="e", noise_model="n", log_size=9)})
    assert "ASFT, not asked against BC, CQL, PPO, RSDPO, RSIPO</small>" in html
    assert html.count("agents are missing") == 7
