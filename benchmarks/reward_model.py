"""Suite ``reward_model``: the study's Table 1, the reward model against two means, with the truth beside it."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from recsim_gr import __version__, configs
from recsim_gr.benchmarks.experiment import (
    SHORT,
    ExperimentConfig,
    build_world,
    cell_name,
    experiment_identity,
    log_sizes_of,
    seconds_per_step,
)
from recsim_gr.benchmarks.reward_model_measures import CONSTANT, FLOOR, floor_statistic, measures
from recsim_gr.benchmarks.reward_model_report import write_table1
from recsim_gr.benchmarks.suite import Cell, CellResult, Notify, Suite, register
from recsim_gr.configs import require
from recsim_gr.histories import Histories
from recsim_gr.prefixes import negative_log_likelihood
from recsim_gr.pretraining import pretrain_with_record
from recsim_gr.reward_baselines import BASELINES
from recsim_gr.reward_heads import FORMS
from recsim_gr.reward_intervals import Prediction
from recsim_gr.reward_truth import Exposures, FloatArray, chosen_exposures, coverage, forced_exposures
from recsim_gr.rewards import RewardEnsemble, RewardEnsembleConfig, fit_reward_ensemble
from recsim_gr.training import TrainingConfig
from recsim_gr.world_base import WorldBase

MODELS = {"shallow": "Shallow", "appended": "Appended"}
"""Forms of the head, and the names of their models in the table."""

COVERAGE = 0.9
"""Nominal, of the intervals."""


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(ExperimentConfig):
    """The experiment, and how many users each reward model learns from."""

    log_sizes: tuple[int, ...] = (250, 1_000, 4_000, 16_000)
    """Training users: with 20 events each and 200 titles, 25 to 1,600 events a title. A smaller log is the first users
    of a larger one. A replayed world has no more than its own."""
    forms: tuple[str, ...] = tuple(FORMS)
    """Of the head."""
    steps_for_users: int = 4_000
    """The log size that the schedules are written for; another has √(n / this) times their steps and warm-up: a
    64-fold log is gone through 8 times as long, by 8 times fewer passes. The kept state is the best on validation
    users, whatever the size."""
    checks: int = 16
    """Of the schedules here, on validation users: two to four times as many as elsewhere, since a small log is
    overfitted within a few passes, and the best state lies between two of the usual checks, or before the first."""
    stretch: float = 1.0
    """Times the steps of everything. With 4, as in preset ``full``, clean scores are learned markedly better (ν = 0 and
    4,000 users: RMSE .694 to .645, as much as four times the users bring), noisy ones are not (ν = .6: 1.262 to 1.264,
    the best state comes early): at ν = 0 preset ``quick`` understates the gain. Shallow head, seed 0, by
    ``Bench(replace(RewardModelConfig(), stretch=4.0), noise, 0, 4_000).examine(print)``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self.log_sizes
        require(bool(sizes) and all(isinstance(n, int) and n >= 2 for n in sizes), self, "log_sizes", "2 users or more")
        require(list(sizes) == sorted(set(sizes)), self, "log_sizes", "ascending, no repeats")
        known = bool(self.forms) and set(self.forms) <= set(FORMS) and len(set(self.forms)) == len(self.forms)
        require(known, self, "forms", f"of {', '.join(FORMS)}, no repeats")
        require(self.steps_for_users >= 1, self, "steps_for_users", "at least 1")
        require(self.checks >= 1, self, "checks", "at least 1")
        require(self.stretch > 0, self, "stretch", "positive")

    def schedule(self, training: TrainingConfig, n_users: int) -> TrainingConfig:
        """A schedule drawn out, or cut, for a log of that size."""
        factor = self.stretch * float(np.sqrt(n_users / self.steps_for_users))
        steps = max(self.checks, round(training.steps * factor))
        return replace(training, steps=steps, warmup_steps=round(training.warmup_steps * factor), checks=self.checks)


@register
class RewardModel(Suite):
    """Cells are a noise level, a log size and a seed. Cells of one seed share users, titles, choices and test events,
    whatever the noise and the size."""

    name = "reward_model"
    presets: ClassVar[dict[str, Any]] = {
        "quick": RewardModelConfig(),
        "full": RewardModelConfig(
            preset="full", seeds=tuple(range(10)), log_sizes=(250, 1_000, 4_000, 16_000, 64_000), stretch=4.0
        ),
        "smoke": RewardModelConfig(
            preset="smoke",
            noise_levels=(0.0, 1.0),
            seeds=(0, 1),
            log_sizes=(40, 120),
            steps_for_users=120,
            checks=2,
            n_titles=40,
            history_length=6,
            validation_users=40,
            test_contexts=60,
            pretraining=SHORT,
            rewards=RewardEnsembleConfig(members=2, training=SHORT),
        ),
    }
    config: RewardModelConfig

    def identity(self) -> dict[str, Any]:
        return {"suite": self.name, "version": __version__, **experiment_identity(self.config)}

    def cells(self) -> list[Cell]:
        sizes = log_sizes_of(self.config, self.config.log_sizes)
        return [
            Cell(
                f"{cell_name(noise, seed)}-users-{size}",
                {"reward_noise": float(noise), "seed": seed, "log_size": size},
            )
            for seed in self.config.seeds
            for size in sizes
            for noise in self.config.noise_levels
        ]

    def estimate_cell_seconds(self) -> float:
        config, sizes = self.config, log_sizes_of(self.config, self.config.log_sizes)
        steps = 0.0
        for size in sizes:
            members = config.rewards.members * len(config.forms)
            steps += config.schedule(config.pretraining, size).steps
            steps += members * config.schedule(config.rewards.training, size).steps
        return steps / len(sizes) * seconds_per_step(config)

    def run_cell(self, cell: Cell, notify: Notify) -> CellResult:
        noise, seed, size = (cell.settings[name] for name in ("reward_noise", "seed", "log_size"))
        bench = Bench(self.config, noise, seed, size)
        columns = {
            "suite": self.name,
            "env": bench.world.env_id,
            "config_id": configs.config_id(self.identity()),
            "reward_noise": noise,
            "noise_model": self.config.noise_model,
            "reliability": bench.world.reliability().within_user,
            "seed": seed,
        }
        found, costs = bench.examine(notify)
        rows = [
            {**columns, "agent": model, "metric": f"{metric}@{size}", "value": float(value)}
            for model, figures in found.items()
            for metric, value in figures.items()
        ]
        return CellResult(rows=rows, costs=costs)

    def report(self, run_dir: Path) -> tuple[Path, list[str]]:
        return write_table1(run_dir)


class Bench:
    """A world, a log of some of its users, and the test events that are the same for every log.

    Args:
        config: sizes and schedules.
        noise, seed: which world.
        log_size: training users.
    """

    def __init__(self, config: RewardModelConfig, noise: float, seed: int, log_size: int) -> None:
        self.config, self.seed, self.log_size = config, seed, log_size
        self.world: WorldBase = build_world(config, noise, seed)
        self.log, self.validation, self.test = (
            replace(self.world.generate_log(self.world.at_most(split, n), split), provenance=None)
            for split, n in (
                ("train", log_size),
                ("validation", config.validation_users),
                ("test", config.test_contexts),
            )
        )
        self.histories = Histories(self.test)
        self.exposures: dict[str, Exposures] = {
            "chosen": chosen_exposures(self.world, self.test),
            "forced": forced_exposures(self.world, self.test, seed),
        }

    def examine(self, notify: Notify) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
        """Fits everything and measures it: figures and costs by model; the world's own under an empty name."""
        config, seed = self.config, self.seed
        notify(0.0, "pretraining")
        schedule = config.schedule(config.pretraining, self.log_size)
        backbone, record = pretrain_with_record(self.log, config.backbone, schedule, self.validation, seed)
        found: dict[str, dict[str, float]] = {
            "": {
                "users": self.log.n_users,
                "events_per_title": len(self.log) / self.log.n_titles,
                "nll_validation": record.best_objective,
                "nll_test": negative_log_likelihood(backbone, self.histories),
            }
        }
        predictions, costs = self.baselines(), {}
        for k, form in enumerate(config.forms):
            notify(0.4 + 0.55 * k / len(config.forms), form)
            model, start = MODELS[form], time.perf_counter()
            ensemble = fit_reward_ensemble(self.log, backbone, self.rewards_config(form), self.validation, seed)
            costs[model] = {
                "fit_seconds": time.perf_counter() - start,
                "gradient_steps": float(sum(record.steps for record in ensemble.records)),
            }
            found[model] = {"best_step_share": _best_step_share(ensemble)}
            for place, exposures in self.exposures.items():
                said = ensemble.at(self.histories, exposures.titles)
                predictions[place][model] = said.mean.astype(np.float64)
                found[model] |= _coverage_figures(place, exposures, ensemble, said)
        for place, exposures in self.exposures.items():
            for model, figures in measures(predictions[place], exposures).items():
                found.setdefault(model, {}).update({f"{place}_{name}": value for name, value in figures.items()})
        truth = self.exposures["chosen"]
        for model, predicted in predictions["chosen"].items():
            z, share = floor_statistic(predicted, truth.targets["expected"], truth.targets["score"], truth.valid)
            found[model] |= {"floor_z": z, "floor_share": share}
        return found, costs

    def rewards_config(self, form: str) -> RewardEnsembleConfig:
        """Of the ensemble in one form, its schedule fit to the log."""
        rewards = self.config.rewards
        return replace(rewards, form=form, training=self.config.schedule(rewards.training, self.log_size))

    def baselines(self) -> dict[str, dict[str, FloatArray]]:
        """Exposure to model to (U, L): means of the log and of the user's scores so far, and the exact expectation."""
        mean, made = float(self.log.score.mean()), {}
        fitted = {kind.__name__: kind.fit(self.log) for kind in BASELINES}
        for place, exposures in self.exposures.items():
            said = {
                name: model.mean_at(self.histories, exposures.titles).astype(np.float64)
                for name, model in fitted.items()
            }
            floor = exposures.targets["expected"]
            made[place] = {CONSTANT: np.full(floor.shape, mean), **said, FLOOR: floor}
        return made


def _coverage_figures(
    place: str, exposures: Exposures, ensemble: RewardEnsemble, predicted: Prediction
) -> dict[str, float]:
    """Coverage of the score and of its expectation by the ensemble's intervals of each; see
    `recsim_gr.reward_intervals`."""
    figures, expected = {}, exposures.targets["expected"]
    for name, of, target in (("score", "score", exposures.targets["score"]), ("expected", "mean", expected)):
        covered, _, width = coverage(ensemble.around(predicted, COVERAGE, of), target, exposures.valid)
        figures[f"{place}_{name}_coverage"], figures[f"{place}_{name}_half_width"] = covered, width / 2
    figures[f"{place}_expected_bias"] = float((predicted.mean - expected)[exposures.valid].mean())
    return figures


def _best_step_share(ensemble: RewardEnsemble) -> float:
    """Mean share of its steps after which a member stood at its best: 1 asks for a longer run."""
    return float(np.mean([record.best_step / record.steps for record in ensemble.records]))
