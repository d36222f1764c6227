"""What the agents of a world share in a suite, and how each is fitted and scored: the equal footing."""

import time
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch

from recsim_gr.agents import AGENTS, Agent, InformedAgent, agent_type, find_agent
from recsim_gr.backbones import Backbone
from recsim_gr.benchmarks.experiment import SHORT, ExperimentConfig, Logs, build_world
from recsim_gr.benchmarks.suite import Notify
from recsim_gr.configs import require
from recsim_gr.errors import ConfigError, RecsimError
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
class AgentsConfig(ExperimentConfig):
    """An experiment in which agents take part."""

    agents: tuple[str, ...] = tuple(AGENTS)
    """Registered agents by name, and your own as ``module:Class``."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The schedule of every agent that learns: the equal footing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [find_agent(name).name for name in self.agents]
        require(len(set(names)) == len(names), self, "agents", "free of repeats")
        # a row without an agent is the world's own
        require(all(name.strip() for name in names), self, "agents", "agents whose name is not empty")

    def new_agents(self) -> dict[str, Agent]:
        """The agents by their names, in order, not fitted."""
        return {agent.name: agent for agent in map(self.new_agent, self.agents)}

    def new_agent(self, name: str, **options: object) -> Agent:
        """An agent with its own defaults, but for these options, and the suite's schedule.

        Raises:
            ConfigError: a value that it refuses, or whatever else its class raises.
        """
        kind = find_agent(name)
        learns = any(field.name == "training" for field in fields(kind.config_type))
        try:
            return kind(**({"training": self.training} if learns else {}), **options)
        except RecsimError:
            raise
        except Exception as error:  # whatever a user's own agent raises
            raise ConfigError(f"agent {name} cannot be made ({type(error).__name__}: {error})") from error


SMOKE: dict[str, Any] = {
    "preset": "smoke",
    "noise_levels": (0.0, 1.0),
    "seeds": (0,),
    "n_titles": 40,
    "history_length": 6,
    "n_users": 150,
    "validation_users": 40,
    "judge_users": 100,
    "test_contexts": 60,
    "rollout_contexts": 20,
    "pretraining": SHORT,
    "judge_pretraining": SHORT,
    "training": SHORT,
    "rewards": RewardEnsembleConfig(members=2, training=SHORT),
    "judge": RewardEnsembleConfig(members=2, training=SHORT),
}
"""Preset ``smoke`` of an `AgentsConfig`; a suite sets its own fields beside these, or others in their place."""


class Laboratory:
    """One world with everything that its agents share: logs, backbone, reward ensemble, judge, contexts.

    Args:
        config: sizes and schedules.
        noise, seed: which world.
        notify: told how far the shared work is.
    """

    def __init__(self, config: AgentsConfig, noise: float, seed: int, notify: Notify) -> None:
        self.config, self.seed = config, seed
        notify(0.0, "world")
        self.world: WorldBase = build_world(config, noise, seed)
        agents = config.new_agents().values()
        self.logs = Logs.of(self.world, config, any(agent.needs_propensities for agent in agents))
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

    @cached_property
    def plain_logs(self) -> Logs:
        """The logs without propensities, the same objects for all agents: what is worked out once a log is shared."""
        return self.logs.without_propensities()

    def fit_judge(self) -> RewardEnsemble | None:
        """The reward model of other users."""
        config, seed = self.config, self.seed + 500_000  # other initial weights than the agents' own
        judge_log = self.logs.judge  # its last tenth is what the judge stops on: it shares no user with the agents
        judge_backbone = pretrain(judge_log, config.backbone, config.judge_pretraining, seed=seed)
        return fit_reward_ensemble(judge_log, judge_backbone, config.judge, seed=seed)

    def examine(self, agent: Agent) -> tuple[dict[str, float], dict[str, float]]:
        """Fits an agent and scores it: its figures and its costs."""
        costs = self.fit(agent)
        return self.examination.evaluate(agent).metrics, costs

    def fit(self, agent: Agent) -> dict[str, float]:
        """Fits an agent: its costs."""
        logs = self.logs if agent.needs_propensities else self.plain_logs
        if isinstance(agent, InformedAgent):
            agent.meet(self.world)
        wall, processor = time.perf_counter(), time.process_time()
        agent.fit(logs.train, self.backbone, self.rewards, logs.validation, seed=self.seed)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        return {
            "fit_seconds": wall,
            "fit_processor_seconds": processor,
            "preparation_seconds": agent.record.preparation_seconds,
            "gradient_steps": agent.record.gradient_steps,
            "best_step": agent.record.best_step,
            "samples": agent.record.samples,
        }

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
