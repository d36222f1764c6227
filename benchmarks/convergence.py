"""Suite ``convergence``: are the preset's short trainings long enough? Each is set beside one ten times as long."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq

from recsim_gr import __version__, configs
from recsim_gr.benchmarks.experiment import (
    ExperimentConfig,
    Logs,
    build_world,
    cell_name,
    experiment_identity,
    seconds_per_step,
)
from recsim_gr.benchmarks.suite import Cell, CellResult, Notify, Suite, register
from recsim_gr.errors import RunDirectoryError
from recsim_gr.files import write_text
from recsim_gr.histories import Histories
from recsim_gr.prefixes import negative_log_likelihood
from recsim_gr.pretraining import pretrain_with_record
from recsim_gr.rewards import fit_reward_ensemble, mean_squared_error
from recsim_gr.training import TrainingConfig

TIMES = 10
"""How many times as long the long run is."""

CHECKS = 40
"""Measurements on test users along the long run, whose best counts: more than early stopping would see."""

LEAST = 0.05
"""Nats of the test likelihood that the preset may be short of the best along the long run."""


@dataclass(frozen=True, kw_only=True)
class ConvergenceConfig(ExperimentConfig):
    """The landscape's worlds and schedules, at the ends and the middle of the dial."""

    noise_levels: tuple[float, ...] = (0.0, 0.35, 1.0)
    seeds: tuple[int, ...] = (0,)


@register
class Convergence(Suite):
    """A cell pretrains a backbone and fits a reward ensemble by the preset's schedule, and again ten times as long,
    the long ones measured on the *test* users all along: the best figure found there is what nobody could have
    picked."""

    name = "convergence"
    presets: ClassVar[dict[str, Any]] = {
        "quick": ConvergenceConfig(),
        "smoke": ConvergenceConfig(
            preset="smoke",
            noise_levels=(0.0,),
            n_titles=40,
            history_length=6,
            n_users=150,
            validation_users=40,
            pretraining=TrainingConfig(steps=20, learning_rate=1e-2, warmup_steps=5, checks=2),
        ),
    }
    config: ConvergenceConfig

    def identity(self) -> dict[str, Any]:
        return {"suite": self.name, "version": __version__, **experiment_identity(self.config)}

    def cells(self) -> list[Cell]:
        return [
            Cell(cell_name(noise, seed), {"reward_noise": float(noise), "seed": seed})
            for seed in self.config.seeds
            for noise in self.config.noise_levels
        ]

    def estimate_cell_seconds(self) -> float:
        config = self.config
        steps = config.pretraining.steps + config.rewards.members * config.rewards.training.steps
        return (1 + TIMES) * steps * seconds_per_step(config)

    def run_cell(self, cell: Cell, notify: Notify) -> CellResult:
        config = self.config
        noise, seed = cell.settings["reward_noise"], cell.settings["seed"]
        world = build_world(config, noise, seed)
        logs = Logs.of(world, config)
        n_test = world.at_most("test", config.validation_users)
        test_log = world.generate_log(n_test, "test", expose_propensities=True)
        test = Histories(test_log)
        figures = {"nll_logging": float(-np.log(test_log.require_propensities()).mean())}

        notify(0.0, "pretraining")
        backbone, _ = pretrain_with_record(logs.train, config.backbone, config.pretraining, logs.validation, seed)
        figures["nll_test"] = negative_log_likelihood(backbone, test)
        notify(0.03, "pretraining, long")
        _, record = pretrain_with_record(logs.train, config.backbone, longer(config.pretraining), test_log, seed)
        figures["nll_test_long_best"] = record.best_objective

        notify(0.5, "rewards")
        ensemble = fit_reward_ensemble(logs.train, backbone, config.rewards, logs.validation, seed)
        members = [float(np.sqrt(mean_squared_error([m], test))) for m in ensemble.members]
        figures["reward_rmse_test_member"] = float(np.mean(members))
        figures["reward_rmse_test"] = float(np.sqrt(mean_squared_error(ensemble.members, test)))
        notify(0.55, "rewards, long")
        long_config = replace(config.rewards, training=longer(config.rewards.training))
        long_ensemble = fit_reward_ensemble(logs.train, backbone, long_config, test_log, seed)
        best = [float(np.sqrt(record.best_objective)) for record in long_ensemble.records]
        figures["reward_rmse_test_member_long_best"] = float(np.mean(best))
        columns = {
            "suite": self.name,
            "env": world.env_id,
            "agent": "",
            "config_id": configs.config_id(self.identity()),
            "reward_noise": noise,
            "noise_model": config.noise_model,
            "reliability": world.reliability().within_user,
            "seed": seed,
        }
        return CellResult(rows=[{**columns, "metric": name, "value": v} for name, v in figures.items()])

    def report(self, run_dir: Path) -> tuple[Path, list[str]]:
        lines = summary(run_dir)
        page = run_dir / "convergence.txt"
        write_text(page, "\n".join(lines) + "\n")
        return page, lines


def longer(training: TrainingConfig) -> TrainingConfig:
    """The schedule drawn out: as many times the steps and the warm-up, measured more often."""
    return replace(training, steps=TIMES * training.steps, warmup_steps=TIMES * training.warmup_steps, checks=CHECKS)


def summary(run_dir: Path) -> list[str]:
    """A line a cell, from the table.

    Raises:
        RunDirectoryError: the table cannot be read.
    """
    path = run_dir / "results.parquet"
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path} cannot be read ({error}); run the suite again") from error
    cells: dict[tuple[float, int], dict[str, float]] = {}
    try:
        for row in rows:
            cells.setdefault((row["reward_noise"], row["seed"]), {})[row["metric"]] = row["value"]
        return [_line(noise, seed, figures) for (noise, seed), figures in sorted(cells.items())]
    except KeyError as error:
        raise RunDirectoryError(
            f"{path} is not a table of this suite: it has no {error}; run the suite again"
        ) from error


def _line(noise: float, seed: int, f: dict[str, float]) -> str:
    """What a cell says."""
    short = f["nll_test"] - f["nll_test_long_best"]
    verdict = "holds" if short <= LEAST else "FAILS"
    member, long_member = f["reward_rmse_test_member"], f["reward_rmse_test_member_long_best"]
    return (
        f"{verdict}: dial {noise:g}, seed {seed}: test NLL {f['nll_test']:.3f}, best of {TIMES}x as long "
        f"{f['nll_test_long_best']:.3f} (short by {short:+.3f}, at most {LEAST}; logging policy "
        f"{f['nll_logging']:.3f}); reward RMSE of a member {member:.3f}, best of {TIMES}x {long_member:.3f}, "
        f"of the ensemble {f['reward_rmse_test']:.3f}"
    )
