"""Suite ``landscape``: every agent on worlds that differ in their reward noise alone (the study's Figure 1)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from recsim_gr import __version__, configs
from recsim_gr.benchmarks.experiment import (
    build_world,
    cell_name,
    experiment_identity,
    seconds_per_step,
)
from recsim_gr.benchmarks.laboratory import SMOKE, AgentsConfig, Laboratory
from recsim_gr.benchmarks.report import checks_of, read_run, write_report
from recsim_gr.benchmarks.suite import Cell, CellResult, Notify, Suite, register
from recsim_gr.configs import require

AGENTS_OF_FIGURE_1 = (
    "Random",
    "Popularity",
    "Pretrained",
    "BC",
    "RewardWeightedBC",
    "ASFT",
    "CQL",
    "PPO",
    "RSDPO",
    "ScoreOracle",
    "Oracle",
)
"""The study's, with baselines and ceilings: what fits into ten minutes. Suite ``offline`` has all."""


@dataclass(frozen=True, kw_only=True)
class LandscapeConfig(AgentsConfig):
    """The experiment, and which agents take part."""

    agents: tuple[str, ...] = AGENTS_OF_FIGURE_1
    """`BC` and `Oracle` are the two ends of the scale and cannot be left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("BC", "Oracle"):
            require(name in self.agents, self, "agents", f"a list with {name} in it, an end of the scale")
        for seed in self.seeds:
            for noise in self.noise_levels:
                if self.world == "simulated":
                    build_world(self, noise, seed)


@register
class Landscape(Suite):
    """Cells are worlds (a noise level and a seed); in each, all agents are fitted on one log and scored on the same
    contexts. Worlds of one seed share users, titles, choices and contexts, whatever the noise."""

    name = "landscape"
    presets: ClassVar[dict[str, Any]] = {
        "quick": LandscapeConfig(),
        "smoke": LandscapeConfig(**SMOKE),
    }
    config: LandscapeConfig

    def identity(self) -> dict[str, Any]:
        agents = {name: configs.to_dict(agent.config) for name, agent in self.config.new_agents().items()}
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
        for k, (name, agent) in enumerate(self.config.new_agents().items()):
            notify(AGENTS_START + (1 - AGENTS_START) * k / len(self.config.agents), name)
            try:
                figures, costs = laboratory.examine(agent)
            except (Exception, SystemExit) as error:
                # one agent's failure, a user's own perhaps, must not cost the others' hours
                result.failed[name] = f"{type(error).__name__}: {error}"
                continue
            own = {"config_id": configs.config_id({"agent": name, "config": configs.to_dict(agent.config)})}
            _add_rows(result, columns | own, name, figures)
            result.costs[name] = costs
        return result

    def laboratory(self, noise: float, seed: int, notify: Notify) -> Laboratory:
        """What the agents of a cell share."""
        return Laboratory(self.config, noise, seed, notify)

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


def _add_rows(result: CellResult, columns: dict[str, Any], agent: str, figures: dict[str, float]) -> None:
    for metric, value in figures.items():
        result.rows.append({**columns, "agent": agent, "metric": metric, "value": float(value)})
