"""Suite offline: who is asked what, that choices see no test user, and a small run from end to end."""

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from recsim_gr.agents import AGENTS, ASFT, BC, RewardWeightedBC
from recsim_gr.benchmarks import Offline
from recsim_gr.benchmarks.experiment import build_world
from recsim_gr.benchmarks.first_principles import learns_from_rewards
from recsim_gr.benchmarks.laboratory import Laboratory
from recsim_gr.benchmarks.offline import OfflineConfig, Selection, Trial, selection_users
from recsim_gr.benchmarks.offline_choices import DEFAULT, JUDGE, NDCG, RULES, SNIPS, TRUTH
from recsim_gr.benchmarks.offline_report import cost_table, write_table2
from recsim_gr.benchmarks.offline_trials import REFERENCE, read_trials
from recsim_gr.benchmarks.results import SCHEMA, TRIAL_SCHEMA, is_row
from recsim_gr.benchmarks.runner import run
from recsim_gr.cli import main
from recsim_gr.errors import ConfigError, RunDirectoryError, TrainingError
from recsim_gr.estimators import estimate
from recsim_gr.files import read_json
from recsim_gr.logged_truth import log_truth

FEW = ("Pretrained", "BC", REFERENCE, "ASFT", "ScoreOracle", "Oracle")
SMOKE: OfflineConfig = replace(Offline.preset("smoke"), agents=FEW)
SWEPT = replace(SMOKE, sweep=True, noise_levels=(0.35,))


def quiet() -> Console:
    return Console(file=StringIO())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A swept run of one world."""
    out = tmp_path_factory.mktemp("offline") / "run"
    outcome = run(Offline(SWEPT), out, workers=1, console=quiet())
    assert outcome.failures == []
    return out


@pytest.fixture(scope="module")
def rows(finished: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(finished / "results.parquet").to_pylist())


# ----------------------------------------------------------------------------------------------------------- trials


def test_every_agent_with_a_strength_has_five_trials_from_weak_to_strong() -> None:
    trials = OfflineConfig(sweep=True, agents=("BC", REFERENCE, "ASFT", "PPO")).trials()
    assert [t.label for t in trials[:3]] == ["BC", REFERENCE, "ASFT beta=2"]
    for agent, option, default in (("ASFT", "beta", 0.5), ("PPO", "kl_weight", 0.1)):
        own = [trial for trial in trials if trial.agent == agent]
        assert [t.strength for t in own] == [4 * default, 2 * default, default, default / 2, default / 4]
        assert [t.is_default for t in own] == [False, False, True, False, False]
        assert {t.option for t in own} == {option}
        assert all(getattr(t.new(SMOKE).config, option) == t.strength for t in own)
    assert all(vars(trial.new(SMOKE).config)["training"] == SMOKE.training for trial in trials)


def test_without_a_sweep_every_agent_is_fitted_once() -> None:
    trials = SMOKE.trials()
    assert [trial.label for trial in trials] == list(FEW)
    assert all(trial.is_default and not trial.in_grid for trial in trials)
    assert trials[3].strength == 0.5


@pytest.mark.parametrize("lost", ["BC", REFERENCE])
def test_what_others_are_measured_by_cannot_be_left_out(lost: str) -> None:
    with pytest.raises(ConfigError, match=f"with {lost} in it"):
        replace(SMOKE, agents=tuple(name for name in FEW if name != lost))


def test_presets_say_what_they_sweep() -> None:
    presets = Offline.presets
    assert {name: preset.sweep for name, preset in presets.items()} == {
        "quick": False,
        "sweep": True,
        "full": True,
        "smoke": False,
    }
    assert all(preset.preset == name for name, preset in presets.items())
    assert len(presets["full"].seeds) == 10
    assert replace(presets["sweep"], preset="quick", sweep=False) == presets["quick"]


# --------------------------------------------------------------------------------------------------- who sees whom


@pytest.fixture(scope="module")
def laboratory() -> Laboratory:
    return Laboratory(SMOKE, 0.35, 0, lambda share, doing: None)


def test_strengths_are_chosen_on_users_of_nobody_else(laboratory: Laboratory) -> None:
    selection = Selection(laboratory, SMOKE)
    world, chosen_on = laboratory.world, selection.examination.contexts.users
    assert world.in_split(chosen_on, "validation").all()
    assert set(selection.log.user.tolist()) == set(chosen_on.tolist())
    logs = laboratory.logs
    for others in (logs.train.user, logs.validation.user, logs.judge.user, laboratory.contexts.users):
        assert not set(others.tolist()) & set(chosen_on.tolist())
    later = laboratory.contexts.observations.epoch.min()
    assert selection.examination.contexts.observations.epoch.max() < later


def test_figures_of_selection_are_those_of_the_parts(laboratory: Laboratory) -> None:
    selection = Selection(laboratory, SMOKE)
    agent = Trial("BC", "BC").new(SMOKE)
    laboratory.fit(agent)
    found = selection.figures(agent)
    examined = selection.examination.evaluate(agent)
    assert (found[JUDGE], found[NDCG], found[TRUTH]) == (
        examined["judge_return"], examined["ndcg10"], examined["value_top10"]
    )  # fmt: skip
    said = estimate(agent, selection.log, "snips")
    assert found[SNIPS] == said.value
    assert found["validation_snips_se"] == said.standard_error
    # on the log's own contexts, of which the first have a history of nothing, and not where the judge's figures are
    log = laboratory.world.generate_log(SMOKE.selection_users, "validation", offset=SMOKE.validation_users)
    assert set(log.user.tolist()) == set(selection.log.user.tolist())
    assert found["validation_snips_target"] == log_truth(laboratory.world, agent, log).score_value.mean()
    assert found["validation_snips_target"] != found["validation_score_value_sampled"]
    assert found["validation_snips_share"] == pytest.approx(said.effective_sample_size / len(selection.log))


def test_the_estimate_is_the_referee_s_and_agents_see_no_propensities(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed = []
    fit = BC.fit

    def spied(self: BC, log: Any, *arguments: Any, **options: Any) -> Any:
        handed.append(log.propensities)
        return fit(self, log, *arguments, **options)

    monkeypatch.setattr(BC, "fit", spied)
    laboratory.fit(Trial("BC", "BC").new(SMOKE))
    assert handed == [None]
    assert Selection(laboratory, SMOKE).log.propensities is not None


def test_a_replayed_world_with_few_validation_users_gives_all_of_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "ratings.npz", ratings=np.random.default_rng(0).random((300, 30)))
    config = replace(SMOKE, world="replay", data=str(tmp_path / "ratings.npz"), history_length=5)
    world = build_world(config, 0.0, 0)
    there = world.at_most("validation", 10**6)
    few = replace(config, validation_users=there, selection_users=there)
    assert selection_users(world, few) == (0, there)
    assert selection_users(world, replace(few, validation_users=2, selection_users=3)) == (2, 3)


# ------------------------------------------------------------------------------------------------------------ a run


def test_rows_are_tidy_and_every_rule_takes_one_trial_an_agent(rows: list[dict[str, Any]]) -> None:
    assert set(rows[0]) == set(TRIAL_SCHEMA.names)
    assert {row["agent"] for row in rows} == {"", *FEW}
    taken: dict[str, list[str]] = {}
    for row in rows:
        if row["metric"] == "value_top10":
            taken.setdefault(row["agent"], []).extend(row["choice"].split())
    assert all(sorted(rules) == sorted((DEFAULT, *RULES)) for rules in taken.values())
    trials = {(row["agent"], repr(row["strength"])) for row in rows if row["agent"] == "ASFT"}
    assert trials == {("ASFT", repr(beta)) for beta in (2.0, 1.0, 0.5, 0.25, 0.125)}
    assert {row["option"] for row in rows if row["agent"] == "ASFT"} == {"beta"}
    assert len({row["config_id"] for row in rows if row["agent"] == "ASFT"}) == 5
    assert {row["option"] for row in rows if row["agent"] == "BC"} == {""}
    keys = [(row["agent"], repr(row["strength"]), row["metric"]) for row in rows]
    assert len(set(keys)) == len(keys)


def test_choices_in_the_table_are_those_of_the_figures_in_it(rows: list[dict[str, Any]]) -> None:
    ours = [row for row in rows if row["agent"] == "ASFT"]
    for rule, metric in (("judge", JUDGE), ("ndcg", NDCG), ("snips", SNIPS), ("truth", TRUTH)):
        found = {row["strength"]: (row["value"], row["choice"].split()) for row in ours if row["metric"] == metric}
        assert len(found) == 5
        (taken,) = [strength for strength, (_, rules) in found.items() if rule in rules]
        assert found[taken][0] == max(value for value, _ in found.values())


def test_the_page_and_its_pictures(finished: Path) -> None:
    page, lines = write_table2(finished)
    html = page.read_text()
    for heading in (
        "Table 2, every agent at its default",
        "“A-SFT improves most”",
        "Choosing the strength",
        "What it cost",
    ):
        assert heading in html
    for name in ("promise", "regret"):
        assert f'<figure id="{name}">' in html
        assert {f"{name}.svg", f"{name}.png"} <= {path.name for path in (finished / "figures").iterdir()}
    assert "nothing here is tested" in lines[0]
    assert any(line.startswith("holds: Oracle is first in true value") for line in lines)
    assert not [line for line in lines if line.startswith("FAILS")]
    assert "default-src 'none'" in html
    assert "ASFT beta=0.125" in html  # what each fit cost


def test_a_run_goes_on_where_it_stopped(finished: Path) -> None:
    before = (finished / "results.parquet").read_bytes()
    told = StringIO()
    run(Offline(SWEPT), finished, workers=1, console=Console(file=told))
    assert "1 of 1 cells are finished already" in told.getvalue()
    assert (finished / "results.parquet").read_bytes() == before


def test_costs_say_what_a_step_takes_and_who_shares_what(finished: Path) -> None:
    costs = read_json(finished / "cells" / "noise-0.35-seed-0-users-150.json")["agents"]
    assert costs["BC"]["gradient_steps"] == 20
    assert costs["BC"]["fit_processor_seconds"] > 0
    assert costs["r̂ on the log"]["fit_seconds"] > 0
    assert {f"ASFT beta={beta:g}" for beta in (2, 1, 0.5, 0.25, 0.125)} <= set(costs)


def test_reading_a_table_of_another_suite_is_refused(tmp_path: Path, finished: Path) -> None:
    table = pq.read_table(finished / "results.parquet")
    pq.write_table(table.select(SCHEMA.names), tmp_path / "results.parquet")
    with pytest.raises(RunDirectoryError, match="no column 'log_size'"):
        read_trials(tmp_path / "results.parquet", {})
    (tmp_path / "results.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunDirectoryError, match="not Parquet"):
        read_trials(tmp_path / "results.parquet", {})
    with pytest.raises(RunDirectoryError, match="missing"):
        read_trials(tmp_path / "none.parquet", {})
    nobody = table.set_column(table.column_names.index("agent"), "agent", pa.nulls(len(table), pa.string()))
    pq.write_table(nobody, tmp_path / "nobody.parquet")
    with pytest.raises(RunDirectoryError, match="no agent in some row"):
        read_trials(tmp_path / "nobody.parquet", {})


def test_trials_as_arrays_are_the_rows(finished: Path, rows: list[dict[str, Any]]) -> None:
    (trials,) = read_trials(finished / "results.parquet", read_json(finished / "config.json")).values()
    assert trials.swept == {"ASFT": (2.0, 1.0, 0.5, 0.25, 0.125)}
    assert trials.informed == ("ScoreOracle", "Oracle")
    assert trials.competitors == ("BC", REFERENCE, "ASFT")
    assert trials.rules == (DEFAULT, *RULES)
    for row in rows:
        if row["agent"] and DEFAULT in row["choice"].split():
            assert trials.of(row["agent"], DEFAULT, row["metric"]) == pytest.approx(row["value"], nan_ok=True)
    assert (trials.regret("ASFT", "judge") >= 0).all()


def test_a_failing_trial_costs_no_other_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    fit: Any = ASFT.fit

    def sometimes(self: ASFT, *arguments: Any, **options: Any) -> Any:
        if self.config.beta == 2.0:
            raise KeyError("x")
        return fit(self, *arguments, **options)

    def never(*_: Any, **__: Any) -> None:
        raise TrainingError("it diverged")

    monkeypatch.setattr(ASFT, "fit", sometimes)
    monkeypatch.setattr(RewardWeightedBC, "fit", never)
    suite = Offline(replace(SWEPT, agents=("BC", REFERENCE, "ASFT")))
    result = suite.run_cell(suite.cells()[0], lambda share, doing: None)
    assert result.failed == {"ASFT beta=2": "KeyError: 'x'", REFERENCE: "TrainingError: it diverged"}
    ours = [row for row in result.rows if row["agent"] == "ASFT"]
    assert {row["strength"] for row in ours} == {1.0, 0.5, 0.25, 0.125}
    # what asks for the reference's NDCG takes none
    assert {rule for row in ours for rule in row["choice"].split()} == {DEFAULT, "judge", "ndcg", "snips", "truth"}


# -------------------------------------------------------------------------------------------------------- log sizes


def test_every_log_size_is_a_table_of_its_own(tmp_path: Path) -> None:
    config = replace(SMOKE, agents=("BC", REFERENCE, "ASFT", "CQL"), noise_levels=(0.0,), log_sizes=(30, 60))
    suite = Offline(config)
    assert [cell.name for cell in suite.cells()] == ["noise-0-seed-0-users-30", "noise-0-seed-0-users-60"]
    outcome = run(suite, tmp_path / "run", workers=1, console=quiet())
    assert outcome.failures == []
    found = read_trials(tmp_path / "run" / "results.parquet", read_json(tmp_path / "run" / "config.json"))
    assert [trials.log_size for trials in found.values()] == [30, 60]
    small, large = (trials.of("BC", DEFAULT, "nll_logged") for trials in found.values())
    assert small.shape == large.shape == (1, 1)
    assert small != large
    page, lines = write_table2(tmp_path / "run")
    html = page.read_text()
    assert html.count("Table 2, every agent at its default") == 2
    for size in (30, 60):
        assert f"recsim_gr/WatchTime-v0 · watch_time · {size} training users" in html
        assert f"recsim_gr/WatchTime-v0 · watch_time · {size} training users:" in lines
    assert {"promise.svg", "promise-2.svg"} <= {path.name for path in (tmp_path / "run" / "figures").iterdir()}


def test_a_log_has_as_many_users_as_the_cell_says(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Stop(Exception):
        pass

    def spied(self: Laboratory, config: OfflineConfig, *_: Any) -> None:
        sizes.append(config.n_users)
        raise Stop

    monkeypatch.setattr(Laboratory, "__init__", spied)
    for config in (SMOKE, replace(SMOKE, log_sizes=(30, 60))):
        suite = Offline(replace(config, noise_levels=(0.0,)))
        for cell in suite.cells():
            with pytest.raises(Stop):
                suite.run_cell(cell, lambda share, doing: None)
    assert sizes == [150, 30, 60]


@pytest.mark.parametrize("sizes", [(60, 30), (30, 30), (1,), (30.5,)])
def test_log_sizes_that_make_no_sense_are_refused(sizes: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match="log_sizes"):
        replace(SMOKE, log_sizes=sizes)


# ------------------------------------------------------------------------------------------------------- small parts


def test_costs_by_hand() -> None:
    bc = {"fit_seconds": 3.0, "fit_processor_seconds": 2.5, "preparation_seconds": 0.5, "gradient_steps": 100}
    mine = {"fit_seconds": 9.0, "fit_processor_seconds": 8.0, "preparation_seconds": 3.0, "gradient_steps": 100}
    longer = mine | {"fit_seconds": 11.0, "samples": 2048}
    cells: list[dict[str, Any]] = [{"agents": {"BC": bc, "Mine": mine}}, {"agents": {"Mine": longer}}, {"agents": None}]
    html = cost_table(cells)
    # of 8 s of the processor 3 were spent on preparation: 100 steps took 5, BC's 2
    assert "<th>Mine</th><td>10.00</td><td>3.00</td><td>100</td><td>50.00</td><td>2.50</td><td>2,048</td>" in html
    assert "<th>BC</th><td>3.00</td><td>0.50</td><td>100</td><td>20.00</td><td>1.00</td><td>–</td>" in html
    assert cost_table([]) == ""


def test_a_row_has_all_columns_of_its_table_or_is_none() -> None:
    row = {"suite": "offline", "env": "e", "agent": "BC", "config_id": "1", "reward_noise": 0.0, "noise_model": "n",
           "reliability": None, "seed": 0, "metric": "m", "value": 1.0}  # fmt: skip
    assert is_row(row)
    trial = {**row, "log_size": 100, "option": "", "strength": None, "choice": ""}
    assert is_row(trial)
    assert not is_row({name: value for name, value in trial.items() if name != "choice"})
    assert not is_row(trial | {"option": None})
    assert not is_row(trial | {"log_size": 100.5})


def test_sweeping_is_an_option_of_this_suite_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", str(tmp_path / "run"), "--dry-run", "--sweep", "True"]
    assert main(["run", "offline", "--preset", "smoke", "--agents", "BC", REFERENCE, *options]) == 0
    assert "noise-0-seed-0" in capsys.readouterr().out
    assert main(["run", "landscape", *options]) == 2
    assert "--sweep" in capsys.readouterr().err


def test_who_knows_the_world_is_no_competitor_at_dial_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Knowing(ASFT):
        name = "Knowing"
        informed = True

    monkeypatch.setitem(AGENTS, "Knowing", Knowing)
    assert learns_from_rewards("ASFT")
    assert not any(map(learns_from_rewards, ("Knowing", "ScoreOracle", "BC")))


@pytest.mark.parametrize("asked", [["offline", "--log-sizes", "30", "60"], ["reward_model"]])
def test_a_number_of_users_that_would_be_ignored_is_refused(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--preset", "smoke", "--out", str(tmp_path / "run"), "--dry-run"]
    assert main(["run", *asked, *options, "--n-users", "50"]) == 2
    assert "--n-users has no effect here" in capsys.readouterr().err
    assert main(["run", "offline", *options, "--n-users", "50"]) == 0
    assert "users-50" in capsys.readouterr().out
