"""Suite reward_model: its figures against brute force, its logs and test users, its laws, and a small run."""

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from recsim_gr.benchmarks import RewardModel
from recsim_gr.benchmarks.experiment import log_sizes_of
from recsim_gr.benchmarks.report import read_results
from recsim_gr.benchmarks.reward_model import Bench
from recsim_gr.benchmarks.reward_model_measures import (
    BASELINES,
    FLOOR,
    floor_statistic,
    rmse_gain,
)
from recsim_gr.benchmarks.reward_model_report import Grid, checks, figure, gain_of, gain_table, summary
from recsim_gr.benchmarks.runner import run
from recsim_gr.benchmarks.statistics import WORLD, Results
from recsim_gr.cli import main
from recsim_gr.errors import ConfigError, RunDirectoryError
from recsim_gr.pretraining import pretrain
from recsim_gr.reward_baselines import Additive, TitleMean, UserMean
from recsim_gr.reward_truth import agreement, spearman_within
from recsim_gr.rewards import fit_reward_ensemble

SMOKE = RewardModel.presets["smoke"]


# ------------------------------------------------------------------------------------------------------- measures


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(2, 7), st.integers(2, 9))
def test_errors_and_ranks_are_scipy_s_user_by_user(seed: int, users: int, length: int) -> None:
    random = np.random.default_rng(seed)
    # few distinct values, so that there are ties, and rows that do not vary at all
    predicted, target = (random.integers(0, 4, (users, length)).astype(float) for _ in range(2))
    valid = np.arange(length) < random.integers(1, length + 1, users)[:, None]
    predicted[~valid] = random.choice([np.nan, 1e9], size=(~valid).sum())  # what stands on padding plays no part
    found = agreement(predicted, target, valid)._asdict()
    errors = [predicted[u, t] - target[u, t] for u in range(users) for t in range(length) if valid[u, t]]
    assert found["rmse"] == pytest.approx(np.sqrt(sum(e * e for e in errors) / len(errors)))
    assert found["mae"] == pytest.approx(sum(map(abs, errors)) / len(errors))
    expected = [_spearman(predicted[u][valid[u]], target[u][valid[u]]) for u in range(users)]
    kept = [rho for rho in expected if rho is not None]
    if kept:
        assert found["spearman_within"] == pytest.approx(np.mean(kept), abs=1e-12)
    else:
        assert np.isnan(found["spearman_within"])
    assert found["spearman"] == pytest.approx(_spearman(predicted[valid], target[valid]) or 0.0, abs=1e-12)


def _spearman(predicted: Any, target: Any) -> float | None:
    """Scipy's; None where the target does not vary, 0 where the prediction does not."""
    if len(set(target)) < 2:
        return None
    return float(stats.spearmanr(predicted, target).statistic) if len(set(predicted)) > 1 else 0.0


def test_gain_is_the_difference_of_errors_and_its_error_that_of_resampled_users() -> None:
    random = np.random.default_rng(0)
    target = random.normal(size=(400, 6))
    valid = np.arange(6) < random.integers(1, 7, 400)[:, None]
    good, bad = target + 0.5 * random.normal(size=(400, 6)), target + random.normal(size=(400, 1))
    gain, error = rmse_gain(good, bad, target, valid)

    def difference(rows: Any) -> float:
        roots = [np.sqrt(((x - target)[rows][valid[rows]] ** 2).mean()) for x in (bad, good)]
        return float(roots[0] - roots[1])

    assert gain == pytest.approx(difference(np.arange(400)))
    bootstrap = [difference(random.integers(400, size=400)) for _ in range(2_000)]
    assert error == pytest.approx(np.std(bootstrap), rel=0.1)
    assert rmse_gain(good, good, target, valid) == (0.0, 0.0)


def test_the_floor_s_law_finds_who_knows_the_noise() -> None:
    random = np.random.default_rng(1)
    expected = random.normal(size=(500, 5))
    score = expected + random.normal(size=expected.shape)
    valid = np.ones(expected.shape, dtype=bool)
    guess = expected + random.normal(size=expected.shape)
    assert abs(floor_statistic(guess, expected, score, valid)[0]) < 4
    assert floor_statistic(0.8 * guess + 0.2 * score, expected, score, valid)[0] < -5  # a leak of a fifth
    assert floor_statistic(expected, expected, score, valid) == (0.0, 0.0)


def test_who_ranks_nothing_counts_nought_and_who_cannot_be_ranked_not_at_all() -> None:
    valid = np.ones((3, 3), dtype=bool)
    target = np.array([[1.0, 2, 3], [1, 2, 3], [2, 2, 2]])
    predicted = np.array([[1.0, 2, 3], [5, 5, 5], [1, 2, 3]])
    assert spearman_within(predicted, target, valid) == pytest.approx(0.5)


# ---------------------------------------------------------------------------------------------------------- a cell


@pytest.fixture(scope="module")
def benches() -> dict[int, Bench]:
    return {size: Bench(SMOKE, 0.35, 0, size) for size in SMOKE.log_sizes}


def test_logs_are_nested_and_test_users_trained_nothing(benches: dict[int, Bench]) -> None:
    small, large = (benches[size] for size in SMOKE.log_sizes)
    for column in ("user", "title", "score", "hours"):
        values = getattr(small.log, column)
        np.testing.assert_array_equal(values, getattr(large.log, column)[: len(values)])
    assert len(small.log) < len(large.log)
    seen = set(large.log.user.tolist()) | set(large.validation.user.tolist())
    assert not seen & set(large.test.user.tolist())
    assert not set(large.log.user.tolist()) & set(large.validation.user.tolist())
    for place in ("chosen", "forced"):
        a, b = (bench.exposures[place] for bench in (small, large))
        np.testing.assert_array_equal(a.titles, b.titles)
        for target in a.targets:
            np.testing.assert_array_equal(a.targets[target], b.targets[target])


def test_targets_are_the_world_s_and_forced_titles_were_never_shown(benches: dict[int, Bench]) -> None:
    bench = benches[40]
    users = bench.test.user[bench.test.step == 0]
    satisfaction, expected = bench.world.satisfaction(users), bench.world.expected_score(users)
    histories = bench.test.sequences()
    for place, exposures in bench.exposures.items():
        for u in range(len(users)):
            titles = exposures.titles[u][exposures.valid[u]]
            assert len(set(titles.tolist())) == len(titles) == histories.length[u]
            shown = set(histories.titles[u, : histories.length[u]].tolist())
            assert set(titles.tolist()) == shown if place == "chosen" else not set(titles.tolist()) & shown
        rows = np.arange(len(users))[:, None]
        for name, truth in (("satisfaction", satisfaction), ("expected", expected)):
            np.testing.assert_allclose(exposures.targets[name], truth[rows, exposures.titles], rtol=1e-6)
    np.testing.assert_allclose(bench.exposures["chosen"].targets["score"], histories.scores)


def test_forced_scores_have_the_mean_that_the_world_expects() -> None:
    bench = Bench(replace(SMOKE, test_contexts=2_000), 0.6, 0, 40)
    targets = bench.exposures["forced"].targets
    off = (targets["score"] - targets["expected"]).mean(axis=1)
    assert abs(off.mean()) < 4 * off.std() / np.sqrt(len(off))


def test_figures_of_a_cell_are_those_of_loops_over_its_events(benches: dict[int, Bench]) -> None:
    bench = benches[120]
    found, _ = bench.examine(lambda share, what: None)
    histories, log = bench.test.sequences(), bench.log
    mean = float(log.score.mean())
    k_user, k_title = UserMean.fit(log).strength, TitleMean.fit(log).strength
    additive = Additive.fit(log)
    by_title = [
        (float(log.score[log.title == i].sum()) + k_title * mean) / (int((log.title == i).sum()) + k_title)
        for i in range(40)
    ]
    errors: dict[str, list[float]] = {"UserMean": [], "TitleMean": [], "Additive": [], "GlobalMean": []}
    for u in range(len(histories.length)):
        titles = histories.titles[u, : histories.length[u]].tolist()
        scores = histories.scores[u, : histories.length[u]].tolist()
        for t, (title, score) in enumerate(zip(titles, scores, strict=True)):
            own = (sum(scores[:t]) + k_user * mean) / (t + k_user)
            left = [s - mean - additive.by_title[i] for s, i in zip(scores[:t], titles[:t], strict=True)]
            above = sum(left) / (t + additive.strength)
            errors["UserMean"].append(own - score)
            errors["TitleMean"].append(by_title[title] - score)
            errors["Additive"].append(mean + additive.by_title[title] + above - score)
            errors["GlobalMean"].append(mean - score)
    for model, off in errors.items():
        rmse = np.sqrt(np.mean(np.square(off)))
        assert found[model]["chosen_score_rmse"] == pytest.approx(rmse, rel=1e-5), model
        assert found[model]["chosen_score_mae"] == pytest.approx(np.mean(np.abs(off)), rel=1e-5)
    best = min(found[model]["chosen_score_rmse"] for model in BASELINES)
    shallow = found["Shallow"]
    assert shallow["chosen_score_gain"] == pytest.approx(best - shallow["chosen_score_rmse"])
    further = found["Additive"]["chosen_score_rmse"] - shallow["chosen_score_rmse"]
    assert shallow["chosen_score_additive_gain"] == pytest.approx(further)
    assert found[FLOOR]["chosen_expected_rmse"] == 0
    assert found[FLOOR]["forced_expected_spearman"] == pytest.approx(1)
    assert found[FLOOR]["chosen_score_rmse"] < min(found[m]["chosen_score_rmse"] for m in found if m not in ("", FLOOR))
    assert found[WORLD]["events_per_title"] == len(log) / 40


def test_a_prediction_at_a_place_knows_the_history_before_it_and_nothing_else(benches: dict[int, Bench]) -> None:
    bench = benches[40]
    backbone = pretrain(bench.log, SMOKE.backbone, SMOKE.pretraining, bench.validation, seed=0)
    ensemble = fit_reward_ensemble(bench.log, backbone, SMOKE.rewards, bench.validation, seed=0)
    titles = bench.exposures["forced"].titles
    said = ensemble.mean_at(bench.histories, titles)
    observations = bench.test.sequences()
    for t in (0, 1, 4):
        before = replace(
            observations,
            titles=observations.titles[:, :t],
            scores=observations.scores[:, :t],
            times=observations.times[:, :t],
            length=np.minimum(observations.length, t),
        )
        whole = ensemble.predict(before).mean
        np.testing.assert_allclose(said[:, t], np.take_along_axis(whole, titles[:, t : t + 1], axis=1)[:, 0], rtol=1e-4)


def test_a_rule_lengthens_schedules_with_the_root_of_the_log() -> None:
    config = RewardModel.presets["quick"]
    steps = [config.schedule(config.pretraining, n).steps for n in (1_000, 4_000, 16_000)]
    assert steps == [config.pretraining.steps // 2, config.pretraining.steps, 2 * config.pretraining.steps]
    assert replace(config, stretch=4.0).schedule(config.pretraining, 4_000).warmup_steps == 200


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"log_sizes": ()}, "log_sizes"),
        ({"log_sizes": (100, 50)}, "ascending"),
        ({"log_sizes": (1,)}, "2 users"),
        ({"forms": ("deep",)}, "forms"),
        ({"stretch": 0.0}, "stretch"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(SMOKE, **changes)


# ----------------------------------------------------------------------------------------------------------- a run


def by_hand(gains: list[list[list[float]]], floor_z: float = 0.5) -> Grid:
    """One model; (N, K, S) gains on every measure."""
    values: dict[tuple[str, str], Any] = {}
    for k, size in enumerate((100, 1_000)):
        here = np.array(gains)[:, k]
        for metric in (
            "chosen_score",
            "chosen_expected",
            "forced_expected",
            "forced_satisfaction_rank",
            "chosen_score_additive",
        ):
            values["Shallow", f"{metric}_gain@{size}"] = here
        values["Shallow", f"chosen_score_gain_se@{size}"] = np.full(here.shape, 0.01)
        values["Shallow", f"floor_z@{size}"] = np.full(here.shape, floor_z)
        values[FLOOR, f"chosen_score_rmse@{size}"] = np.full(here.shape, 1.0)
        values["GlobalMean", f"chosen_score_rmse@{size}"] = np.full(here.shape, 1.3)
        values["Shallow", f"chosen_score_rmse@{size}"] = np.full(here.shape, 1.1)
        values[WORLD, f"events_per_title@{size}"] = np.full(here.shape, size / 10)
    agents = ("GlobalMean", FLOOR, "Shallow")
    return Grid.of(Results(np.array([0.0, 1.0]), np.array([0.9, 0.0]), (0, 1, 2), agents, values))


def test_gains_are_tested_over_seeds_with_holm_over_all_cells() -> None:
    grid = by_hand([[[0.1, 0.1, 0.1], [0.2, 0.21, 0.19]], [[0.0, 0.01, -0.01], [-0.1, -0.1, -0.1]]])
    gain = gain_of(grid, "Shallow", "chosen_score_gain")
    p = stats.ttest_1samp([0.2, 0.21, 0.19], 0).pvalue
    assert gain.p[0, 1] == pytest.approx(2 * p)  # two others are certain, one is not significant
    verdicts = [[gain.verdict(n, k) for k in range(2)] for n in range(2)]
    assert verdicts == [["gain", "gain"], ["none", "loss"]]
    lines = summary(grid, "watch_time")
    assert "gain: ν 0 × 100, ν 0 × 1,000; no significant gain: ν 1 × 100; loss: ν 1 × 1,000" in lines[0]
    assert lines[-1].startswith("holds")
    assert "0.667" not in gain_table(grid, "Shallow")
    assert "+0.200 ± 0.025" in gain_table(grid, "Shallow")
    points = figure(grid, "Shallow", "").spec["datasets"]["panel 1"]
    assert [p["sure"] == "interval without 0" for p in points] == [True, True, False, True]


def test_a_model_that_knows_the_noise_fails_the_check() -> None:
    gains = [[[0.1] * 3] * 2] * 2
    assert checks(by_hand(gains, floor_z=-9.0), "watch_time")[-1].startswith("FAILS")
    assert len(checks(by_hand(gains, floor_z=-9.0), "drift")) == 1  # whose noise a history does tell of


def test_a_small_run_from_end_to_end_that_goes_on_where_it_stopped(tmp_path: Path) -> None:
    suite = RewardModel(replace(SMOKE, seeds=(0,), noise_levels=(1.0,)))
    outcome = run(suite, tmp_path / "run", 1, Console(file=StringIO()))
    assert not outcome.failures
    assert len(outcome.finished) == 2
    page = (tmp_path / "run" / "report.html").read_text()
    assert '<figure id="table1">' in page
    assert "never-shown titles" in page
    assert "default-src 'none'" in page
    assert {"table1.svg", "table1.png"} <= {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert not [line for line in outcome.lines if line.startswith("FAILS")]
    (results,) = read_results(tmp_path / "run" / "results.parquet").values()
    grid = Grid.of(results)
    assert grid.sizes == (40, 120)
    assert np.isfinite(grid.of_model("Shallow", "chosen_score_gain")).all()
    before = (tmp_path / "run" / "results.parquet").read_bytes()
    (tmp_path / "run" / "cells" / "noise-1-seed-0-users-40.json").unlink()
    told = StringIO()
    run(suite, tmp_path / "run", 1, Console(file=told))
    assert "1 of 2 cells are finished already" in told.getvalue()
    assert (tmp_path / "run" / "results.parquet").read_bytes() == before


def test_log_sizes_are_an_option_of_this_suite_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--log-sizes", "30", "50", "--out", str(tmp_path / "run"), "--dry-run"]
    assert main(["run", "reward_model", "--preset", "smoke", "--seeds", "3", *options]) == 0
    told = capsys.readouterr().out
    assert "noise-0-seed-3-users-30" in told
    assert "noise-1-seed-3-users-50" in told
    assert main(["run", "landscape", *options]) == 2
    assert "--log-sizes" in capsys.readouterr().err


def test_a_table_of_another_suite_is_refused() -> None:
    with pytest.raises(RunDirectoryError, match="no reward model"):
        Grid.of(Results(np.array([0.0]), np.array([0.9]), (0,), ("BC",), {("BC", "nll"): np.zeros((1, 1))}))


def test_a_replayed_world_gives_all_the_users_it_has(tmp_path: Path) -> None:
    np.savez(tmp_path / "ratings.npz", ratings=np.random.default_rng(0).random((300, 30)))
    config = replace(SMOKE, world="replay", data=str(tmp_path / "ratings.npz"), log_sizes=(40, 5_000, 9_000))
    suite = RewardModel(config)
    small, all_there_are = log_sizes_of(suite.config, suite.config.log_sizes)
    assert small == 40 < all_there_are < 300
    assert len(suite.cells()) == 2 * 2 * 2
    bench = Bench(config, 0.0, 0, all_there_are)
    assert bench.log.n_users == all_there_are
    np.testing.assert_array_equal(bench.log.user[:240], Bench(config, 0.0, 0, 40).log.user[:240])
    assert np.isfinite(bench.baselines()["forced"]["Additive"]).all()
