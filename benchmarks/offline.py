"""Suite ``offline``: the study's Table 2, every agent over `RewardWeightedBC`, with the truth beside it, and what a
choice of its strength by what a practitioner sees costs."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from recsim_gr import __version__, configs
from recsim_gr.agents import Agent, find_agent
from recsim_gr.benchmarks.experiment import cell_name, experiment_identity, log_sizes_of, seconds_per_step
from recsim_gr.benchmarks.laboratory import SMOKE, AgentsConfig, Laboratory
from recsim_gr.benchmarks.offline_choices import DEFAULT, NDCG, RULES, choose
from recsim_gr.benchmarks.offline_report import write_table2
from recsim_gr.benchmarks.suite import Cell, CellResult, Notify, Suite, register
from recsim_gr.configs import require
from recsim_gr.errors import RecsimError
from recsim_gr.estimators import effective_sample_size, estimate_from, logged_terms
from recsim_gr.log import InteractionLog
from recsim_gr.logged_truth import log_truth
from recsim_gr.scoring import Examination
from recsim_gr.world_base import WorldBase

REFERENCES = ("BC", "RewardWeightedBC")
"""Agents that the table cannot do without: what others cost is beside the first, what they gain over the second."""


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(AgentsConfig):
    """The experiment, which agents take part, and whether their strengths are swept."""

    noise_levels: tuple[float, ...] = (0.0, 0.35, 1.0)
    """All but the truth, half way down in reliability, none of it: five levels, as the landscape has them, are preset
    ``full``'s."""
    log_sizes: tuple[int, ...] = ()
    """Training users of each table, ascending, in place of ``n_users``: a smaller log is the first users of a larger
    one. Schedules are the same at every size, and so is the judge's log. Empty: ``n_users`` alone. A replayed world has
    no more than its own."""
    sweep: bool = False
    """Whether every agent that has a strength is fitted at each of its five values, and one of them chosen by each
    rule of design §8; otherwise each is fitted once, at its default."""
    selection_users: int = 1_000
    """Validation users on whom strengths are chosen: others than those of early stopping, where the world has so many.
    A standard error of about .006 of NDCG@10, and far less of the difference between two strengths of an agent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.sweep, bool), self, "sweep", "true or false")
        require(self.selection_users >= 2, self, "selection_users", "at least 2")
        sizes = self.log_sizes
        require(all(isinstance(n, int) and n >= 2 for n in sizes), self, "log_sizes", "2 users or more each")
        require(list(sizes) == sorted(set(sizes)), self, "log_sizes", "ascending, no repeats")
        for name in REFERENCES:
            require(name in self.agents, self, "agents", f"a list with {name} in it, which others are measured by")

    def trials(self) -> "list[Trial]":
        """Every fit of a cell, agent after agent, from the weakest strength to the strongest."""
        return [trial for name in self.agents for trial in self._trials_of(name)]

    def _trials_of(self, name: str) -> "list[Trial]":
        kind = find_agent(name)
        if kind.strength is None:
            return [Trial(name, kind.name)]
        option = kind.strength.option
        default = getattr(kind.config_type(), option)
        if not self.sweep:
            return [Trial(name, kind.name, option, default)]
        grid = list(dict.fromkeys(_like(default, value) for value in kind.strength.grid(default)))
        tried = [Trial(name, kind.name, option, value, in_grid=True, is_default=value == default) for value in grid]
        # a default that is not tried is fitted beside the grid, and no rule takes it
        return tried if default in grid else [*tried, Trial(name, kind.name, option, default)]


def _like(default: Any, value: float) -> float:
    """A strength of the kind of number that the option is."""
    return int(value) if isinstance(default, int) and float(value).is_integer() else value


@dataclass(frozen=True)
class Trial:
    """One fit of an agent.

    Attributes:
        given: the agent as the config names it.
        agent: its own name.
        option, strength: of the strength; None and NaN for an agent that has none.
        in_grid: whether rules may choose it among others.
        is_default: whether it is what the agent comes with.
    """

    given: str
    agent: str
    option: str | None = None
    strength: float = float("nan")
    in_grid: bool = False
    is_default: bool = True

    @property
    def label(self) -> str:
        """What progress, costs and failures call it."""
        return f"{self.agent} {self.option}={self.strength:g}" if self.in_grid else self.agent

    def new(self, config: AgentsConfig) -> Agent:
        """The agent, not fitted.

        Raises:
            ConfigError: its config refuses the strength.
        """
        options = {} if self.option is None or self.is_default else {self.option: self.strength}
        return config.new_agent(self.given, **options)


@register
class Offline(Suite):
    """The study's Table 2: all agents over RewardWeightedBC, beside the truth; and strengths, chosen by five rules.

    Cells are worlds, as in suite ``landscape``."""

    name = "offline"
    presets: ClassVar[dict[str, Any]] = {
        "quick": OfflineConfig(),
        "sweep": OfflineConfig(preset="sweep", sweep=True),
        "full": OfflineConfig(
            preset="full", sweep=True, seeds=tuple(range(10)), noise_levels=(0.0, 0.15, 0.35, 0.6, 1.0)
        ),
        "smoke": OfflineConfig(**SMOKE | {"selection_users": 40}),
    }
    config: OfflineConfig

    def identity(self) -> dict[str, Any]:
        agents = self.config.new_agents()
        grids: dict[str, dict[str, Any]] = {}
        for trial in self.config.trials():
            if trial.in_grid:
                grids.setdefault(trial.agent, {"option": trial.option, "values": []})["values"].append(trial.strength)
        return {
            "suite": self.name,
            "version": __version__,
            **experiment_identity(self.config),
            "agent_configs": {name: configs.to_dict(agent.config) for name, agent in agents.items()},
            "informed": [name for name, agent in agents.items() if agent.informed or agent.referee],
            "grids": grids,
        }

    def cells(self) -> list[Cell]:
        sizes = log_sizes_of(self.config, self.config.log_sizes or (self.config.n_users,))
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
        config, trials = self.config, self.config.trials()
        steps: float = config.pretraining.steps + config.judge_pretraining.steps
        for ensemble in (config.rewards, config.judge):
            steps += ensemble.members * ensemble.training.steps
        learning = sum("training" in vars(trial.new(config).config) for trial in trials)
        steps += learning * config.training.steps * STEPS_WORTH
        return steps * seconds_per_step(config) + len(trials) * EVALUATION_SECONDS

    def run_cell(self, cell: Cell, notify: Notify) -> CellResult:
        noise, seed, size = (cell.settings[name] for name in ("reward_noise", "seed", "log_size"))
        laboratory = Laboratory(replace(self.config, n_users=size), noise, seed, notify)
        reliability = laboratory.world.reliability()
        columns = {
            "suite": self.name,
            "env": laboratory.world.env_id,
            "config_id": configs.config_id(self.identity()),
            "reward_noise": noise,
            "noise_model": self.config.noise_model,
            "reliability": reliability.within_user,
            "seed": seed,
            "log_size": size,
            "option": "",
            "strength": float("nan"),
            "choice": "",
        }
        result = CellResult()
        figures = laboratory.world_figures() | {
            "reliability_pooled": reliability.pooled,
            "reliability_within": reliability.within_user,
        }
        result.rows += [{**columns, "agent": "", "metric": m, "value": float(v)} for m, v in figures.items()]
        measured = self._measure(laboratory, result, notify)
        for trial, choice in zip(measured, choices(measured), strict=True):
            agent = trial.new(self.config)
            own = columns | {
                "agent": trial.agent,
                "config_id": configs.config_id({"agent": trial.agent, "config": configs.to_dict(agent.config)}),
                "option": trial.option or "",
                "strength": float(trial.strength),
                "choice": " ".join(choice),
            }
            result.rows += [{**own, "metric": m, "value": float(v)} for m, v in measured[trial].items()]
        return result

    def _measure(self, laboratory: Laboratory, result: CellResult, notify: Notify) -> dict[Trial, dict[str, float]]:
        """Fits and scores every trial; fills costs and failures."""
        trials = self.config.trials()
        selection = Selection(laboratory, self.config)
        result.costs[SHARED] = {"fit_seconds": _seconds_of_tables(laboratory)}
        measured = {}
        for k, trial in enumerate(trials):
            notify(TRIALS_START + (1 - TRIALS_START) * k / len(trials), trial.label)
            try:
                agent = trial.new(self.config)
                costs = laboratory.fit(agent)
                measured[trial] = laboratory.examination.evaluate(agent).metrics | selection.figures(agent)
            except (Exception, SystemExit) as error:
                # one agent's failure, a user's own perhaps, must not cost the others' hours
                result.failed[trial.label] = f"{type(error).__name__}: {error}"
                continue
            result.costs[trial.label] = costs
        return measured

    def report(self, run_dir: Path) -> tuple[Path, list[str]]:
        return write_table2(run_dir)


STEPS_WORTH = 1.5
"""What a step of an agent costs, in steps of imitation, for the estimate of `--dry-run` only."""

EVALUATION_SECONDS = 3.0
"""Scoring of a trial on test and validation users: likewise."""

TRIALS_START = 0.4
"""The share of a cell's time that is over before the first trial, for the progress bar only."""

SHARED = "r̂ on the log"
"""In the table of costs: what the agents that learn from the reward ensemble share."""


def _seconds_of_tables(laboratory: Laboratory) -> float:
    """Puts the ensemble's scores on the logs, so that no agent pays for what the next one gets for nothing."""
    start = time.perf_counter()
    for log in (laboratory.plain_logs.train, laboratory.plain_logs.validation):
        laboratory.rewards.on(log)
    return time.perf_counter() - start


ON_VALIDATION = ("judge_return", "ndcg10", "hr10", "mrr", "value_top10", "value_sampled", "score_value_sampled")
"""Figures of an examination that are kept of validation users: criteria, and what they are estimates of."""


class Selection:
    """What strengths are chosen by: validation users, of the epochs of the log, never test users.

    Args:
        laboratory: the world and the judge.
        config: how many users.
    """

    def __init__(self, laboratory: Laboratory, config: OfflineConfig) -> None:
        world = laboratory.world
        offset, n = selection_users(world, config)
        contexts = world.contexts_of(world.users("validation", n, offset))
        rollouts = config.rollout_contexts
        self.examination = Examination(world, contexts, laboratory.judge, None, laboratory.seed, rollouts)
        self._world = world
        self._log_of_world = world.generate_log(n, "validation", expose_propensities=True, offset=offset)
        self.log: InteractionLog = replace(self._log_of_world, provenance=None)

    def figures(self, agent: Agent) -> dict[str, float]:
        """`ON_VALIDATION`, the estimate of the score from the log of the same users, and what it should have said: the
        exact mean over the log's own contexts, which are all prefixes and no full histories."""
        found = self.examination.evaluate(agent).metrics
        found = {f"validation_{name}": found[name] for name in ON_VALIDATION}
        if agent.referee:  # answers only where the truth is known, so not on a log
            return found
        terms = logged_terms(agent, self.log)
        assert terms.weights is not None
        found["validation_snips"] = found["validation_snips_se"] = float("nan")
        found["validation_snips_share"] = effective_sample_size(terms.weights) / len(terms.weights)
        exact = log_truth(self._world, agent, self._log_of_world).score_value
        found["validation_snips_target"] = float(exact.mean())
        try:
            estimate = estimate_from(terms, "snips")
        except RecsimError:  # no logged title has weight: the log does not tell about this policy
            return found
        return found | {"validation_snips": estimate.value, "validation_snips_se": estimate.standard_error}


def selection_users(world: WorldBase, config: OfflineConfig) -> tuple[int, int]:
    """How many validation users are passed over, and how many are taken: others than those of early stopping, or all
    there are where a replayed world has not half as many others as are asked for."""
    stopping = world.at_most("validation", config.validation_users)
    others = world.at_most("validation", stopping + config.selection_users) - stopping
    if 2 * others >= config.selection_users:
        return stopping, others
    return 0, world.at_most("validation", config.selection_users)


def choices(measured: dict[Trial, dict[str, float]]) -> list[list[str]]:
    """For each trial, what it is chosen by: it is its agent's default, and rules of `RULES` take it.

    An agent that was fitted once is chosen by every rule where strengths are swept; where none is, there is no choice.
    """
    chosen: dict[Trial, list[str]] = {trial: [DEFAULT] if trial.is_default else [] for trial in measured}
    reference = next((figures for trial, figures in measured.items() if trial.agent == REFERENCES[1]), {})
    if not any(trial.in_grid for trial in measured):
        return list(chosen.values())
    for agent in dict.fromkeys(trial.agent for trial in measured):
        own = [trial for trial in measured if trial.agent == agent]
        tried = [trial for trial in own if trial.in_grid] or own
        for rule in RULES:
            taken = 0 if len(tried) == 1 else choose(rule, [measured[t] for t in tried], reference.get(NDCG, np.nan))
            if taken is not None:
                chosen[tried[taken]].append(rule)
    return list(chosen.values())
