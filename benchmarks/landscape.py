"""Suite ``landscape``: every agent on worlds that differ in their reward noise alone (the study's Figure 1)."""

import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from recsim_gr import __version__, configs
from recsim_gr.agents import AGENTS, Agent, agent_type
from recsim_gr.backbones import Backbone
from recsim_gr.benchmarks.experiment import (
    ExperimentConfig,
    Logs,
    build_world,
    cell_name,
    experiment_identity,
    seconds_per_step,
)
from recsim_gr.benchmarks.report import checks_of, read_run, write_report
from recsim_gr.benchmarks.suite import Cell, CellResult, Notify, Suite, register
from recsim_gr.configs import require
from recsim_gr.histories import Histories
from recsim_gr.metrics import signed_squared_correlation
from recsim_gr.observations import Contexts
from recsim_gr.prefixes import negative_log_likelihood
from recsim_gr.pretraining import pretrain
from recsim_gr.reward_baselines import TitleMean, UserMean
from recsim_gr.rewards import RewardEnsemble, RewardEnsembleConfig, fit_reward_ensemble, mean_squared_error
from recsim_gr.scoring import Examination
from recsim_gr.training import TrainingConfig
from recsim_gr.world_base import WorldBase


@dataclass(frozen=True, kw_only=True)
class LandscapeConfig(ExperimentConfig):
    """The experiment, and which agents take part."""

    agents: tuple[str, ...] = tuple(AGENTS)
    """All registered agents; `BC` and `Oracle` are the two ends of the scale and cannot be left out."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The schedule of every agent that learns: the equal footing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.agents:
            agent_type(name)
        require(len(set(self.agents)) == len(self.agents), self, "agents", "free of repeats")
        for name in ("BC", "Oracle"):
            require(name in self.agents, self, "agents", f"a list with {name} in it, an end of the scale")
        for seed in self.seeds:
            for noise in self.noise_levels:
                if self.world == "simulated":
                    build_world(self, noise, seed)


SHORT = TrainingConfig(steps=20, learning_rate=1e-2, warmup_steps=5, checks=2)
"""Of preset ``smoke``: long enough to run through everything, too short to mean anything."""


@register
class Landscape(Suite):
    """Cells are worlds (a noise level and a seed); in each, all agents are fitted on one log and scored on the same
    contexts. Worlds of one seed share users, titles, choices and contexts, whatever the noise."""

    name = "landscape"
    presets: ClassVar[dict[str, Any]] = {
        "quick": LandscapeConfig(),
        "smoke": LandscapeConfig(
            preset="smoke",
            noise_levels=(0.0, 1.0),
            seeds=(0,),
            n_titles=40,
            history_length=6,
            n_users=150,
            validation_users=40,
            judge_users=100,
            test_contexts=60,
            rollout_contexts=20,
            pretraining=SHORT,
            judge_pretraining=SHORT,
            training=SHORT,
            rewards=RewardEnsembleConfig(members=2, training=SHORT),
            judge=RewardEnsembleConfig(members=2, training=SHORT),
        ),
    }
    config: LandscapeConfig

    def identity(self) -> dict[str, Any]:
        agents = {name: configs.to_dict(self.agent(name).config) for name in self.config.agents}
        return {
            "suite": self.name,
            "version": __version__,
            **experiment_identity(self.config),
            "agent_configs": agents,
        }

    def cells(self) -> list[Cell]:
        return [
            Cell(cell_name(noise, seed), {"reward_noise": float(noise), "seed": seed})
            for seed in self.config.seeds
            for noise in self.config.noise_levels
        ]

    def estimate_cell_seconds(self) -> float:
        config = self.config
        steps: float = config.pretraining.steps + config.judge_pretraining.steps
        for ensemble in (config.rewards, config.judge):
            steps += ensemble.members * ensemble.training.steps
        steps += config.training.steps * sum(STEPS_WORTH.get(name, 0.0) for name in config.agents)
        return steps * seconds_per_step(config) + len(config.agents) * EVALUATION_SECONDS

    def run_cell(self, cell: Cell, notify: Notify) -> CellResult:
        noise, seed = cell.settings["reward_noise"], cell.settings["seed"]
        laboratory = self.laboratory(noise, seed, notify)
        reliability = laboratory.world.reliability()
        columns = {
            "suite": self.name,
            "env": laboratory.world.env_id,
            "config_id": configs.config_id(self.identity()),
            "reward_noise": noise,
            "noise_model": self.config.noise_model,
            "reliability": reliability.within_user,
            "seed": seed,
        }
        result = CellResult()
        world_figures = laboratory.world_figures() | {
            "reliability_pooled": reliability.pooled,
            "reliability_within": reliability.within_user,
        }
        _add_rows(result, columns, "", world_figures)
        for k, name in enumerate(self.config.agents):
            notify(AGENTS_START + (1 - AGENTS_START) * k / len(self.config.agents), name)
            try:
                agent = self.agent(name)
                figures, costs = laboratory.examine(agent)
            except Exception as error:
                # one agent's failure, a user's own perhaps, must not cost the others' hours
                result.failed[name] = f"{type(error).__name__}: {error}"
                continue
            own = {"config_id": configs.config_id({"agent": name, "config": configs.to_dict(agent.config)})}
            _add_rows(result, columns | own, name, figures)
            result.costs[name] = costs
        return result

    def laboratory(self, noise: float, seed: int, notify: Notify) -> "Laboratory":
        """What the agents of a cell share."""
        return Laboratory(self.config, noise, seed, notify)

    def agent(self, name: str) -> Agent:
        """An agent with its own defaults and the suite's schedule."""
        kind = agent_type(name)
        learns = any(field.name == "training" for field in fields(kind.config_type))
        return kind(training=self.config.training) if learns else kind()

    def report(self, run_dir: Path) -> tuple[Path, list[str]]:
        page = write_report(run_dir)
        checks = {name: checks_of(name, results) for name, results in read_run(run_dir).worlds.items()}
        return page, [line for lines in checks.values() for line in lines]


STEPS_WORTH = {"BC": 1.0, "RewardWeightedBC": 1.0, "ASFT": 1.2, "CQL": 1.2, "RSDPO": 1.4, "PPO": 3.0}
"""What a step of the shipped agents costs, in steps of imitation, for the estimate of `--dry-run` only."""

EVALUATION_SECONDS = 0.6
"""Scoring of an agent: likewise."""

AGENTS_START = 0.55
"""The share of a cell's time that is over before the first agent, for the progress bar only."""


class Laboratory:
    """One world with everything that its agents share: logs, backbone, reward ensemble, judge, contexts.

    Args:
        config: sizes and schedules.
        noise, seed: which world.
        notify: told how far the shared work is.
    """

    def __init__(self, config: LandscapeConfig, noise: float, seed: int, notify: Notify) -> None:
        self.config, self.seed = config, seed
        notify(0.0, "world")
        self.world: WorldBase = build_world(config, noise, seed)
        self.logs = Logs.of(self.world, config)
        held_out = self.logs.validation
        notify(0.01, "pretraining")
        self.backbone: Backbone = pretrain(self.logs.train, config.backbone, config.pretraining, held_out, seed=seed)
        notify(0.2, "rewards")
        self.rewards: RewardEnsemble = fit_reward_ensemble(
            self.logs.train, self.backbone, config.rewards, held_out, seed=seed
        )
        notify(0.35, "judge")
        self.judge = self.fit_judge()
        self.contexts: Contexts = self.world.contexts(self.world.at_most("test", config.test_contexts))
        reference = agent_type("Pretrained")().fit(self.logs.train, self.backbone)
        self.examination = Examination(self.world, self.contexts, self.judge, reference, seed, config.rollout_contexts)

    def fit_judge(self) -> RewardEnsemble | None:
        """The reward model of other users."""
        config, seed = self.config, self.seed + 500_000  # other initial weights than the agents' own
        judge_log = self.logs.judge  # its last tenth is what the judge stops on: it shares no user with the agents
        judge_backbone = pretrain(judge_log, config.backbone, config.judge_pretraining, seed=seed)
        return fit_reward_ensemble(judge_log, judge_backbone, config.judge, seed=seed)

    def examine(self, agent: Agent) -> tuple[dict[str, float], dict[str, float]]:
        """Fits an agent and scores it: its figures and its costs."""
        start = time.perf_counter()
        agent.fit(self.logs.train, self.backbone, self.rewards, self.logs.validation, seed=self.seed)
        seconds = time.perf_counter() - start
        figures = self.examination.evaluate(agent).metrics
        costs = {
            "fit_seconds": seconds,
            "gradient_steps": agent.record.gradient_steps,
            "best_step": agent.record.best_step,
            "samples": agent.record.samples,
        }
        return figures, costs

    @torch.no_grad()
    def world_figures(self) -> dict[str, float]:
        """How well the shared parts learned, beside what they are measured against."""
        world = self.world
        n_test = world.at_most("test", self.config.validation_users)
        test_log = world.generate_log(n_test, "test", expose_propensities=True)
        test = Histories(test_log)
        user, title = UserMean.fit(self.logs.train), TitleMean.fit(self.logs.train)
        valid, scores = test.valid.numpy(), test.observations.scores
        errors = {model: (model.mean_at(test) - scores)[valid] for model in (user, title)}
        truth = np.where(self.contexts.observations.unavailable(), np.nan, world.satisfaction(self.contexts.users))
        return {
            "alignment": world.alignment(),
            "nll_validation": negative_log_likelihood(self.backbone, Histories(self.logs.validation)),
            "nll_test": negative_log_likelihood(self.backbone, test),
            "nll_logging": float(-np.log(test_log.require_propensities()).mean()),
            "reward_rmse_test": float(np.sqrt(mean_squared_error(self.rewards.members, test))),
            "reward_rmse_user_mean": float(np.sqrt(np.mean(errors[user] ** 2))),
            "reward_rmse_title_mean": float(np.sqrt(np.mean(errors[title] ** 2))),
            "reward_truth_corr2": _within_user(self.rewards.mean(self.contexts.observations), truth),
            "title_mean_truth_corr2": _within_user(title.mean(self.contexts.observations), truth),
        }


def _within_user(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Signed corr² between (n, I) predictions and the truth within users, over titles where the truth is not NaN."""
    predicted = np.where(np.isnan(truth), np.nan, predicted.astype(np.float64))
    x = predicted - np.nanmean(predicted, axis=1, keepdims=True)
    y = truth - np.nanmean(truth, axis=1, keepdims=True)
    kept = ~np.isnan(truth)
    return signed_squared_correlation(x[kept], y[kept])


def _add_rows(result: CellResult, columns: dict[str, Any], agent: str, figures: dict[str, float]) -> None:
    for metric, value in figures.items():
        result.rows.append({**columns, "agent": agent, "metric": metric, "value": float(value)})
