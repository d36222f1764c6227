"""Suite ``noise_bounds``: what arXiv:2603.10279 says of exponential weighting under noise, checked.

As its abstract and notes on it have it (the full text is not at hand): under σ-sub-Gaussian reward noise
V(π_λ) ≥ V(μ) − 2σ·sqrt(2 ln(2|A|/δ)), and the temperature λ trades robustness against improvement, so that truth over
λ is an inverted U. Here is truth over λ: in tabular contexts, where optimum and value are exact, and of trained agents.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from recsim_gr import __version__, configs
from recsim_gr.agents import Agent, find_agent
from recsim_gr.behaviour import Users
from recsim_gr.benchmarks.experiment import build_world, cell_name, experiment_identity, seconds_per_step
from recsim_gr.benchmarks.laboratory import SMOKE, AgentsConfig, Laboratory
from recsim_gr.benchmarks.noise_bounds_measures import (
    ContextLog,
    Tables,
    certificate,
    promised_loss,
    tilted,
)
from recsim_gr.benchmarks.noise_bounds_report import write_noise_bounds
from recsim_gr.benchmarks.noise_bounds_results import ENDLESS, ONE_SCORE, log_name
from recsim_gr.benchmarks.suite import Cell, CellResult, Notify, Suite, register
from recsim_gr.configs import require
from recsim_gr.errors import ConfigError
from recsim_gr.metrics import top_k
from recsim_gr.noise import GaussianNoise
from recsim_gr.observations import Contexts
from recsim_gr.scoring import TOP_K, FloatArray
from recsim_gr.world_base import WorldBase

Figures = dict[str, dict[str, float]]
"""Agent to metric to value; the world's own under an empty name."""

LEVELS = ("tabular", "trained")
HELD_OUT = "held out"
"""Purpose of the events that a practitioner in a tabular context chooses λ by."""

TEMPERATURES = ("temperature", "beta")
"""Options that are one: an agent's own has either name. A weight of a penalty, a share or a target is none."""

IMITATION = "BC"
"""λ = ∞ of a trained agent."""


@dataclass(frozen=True, kw_only=True)
class NoiseBoundsConfig(AgentsConfig):
    """The experiment. Noise is `gaussian`, as the theorem needs it: unbiased, sub-Gaussian with σ its deviation."""

    agents: tuple[str, ...] = ("ExpRSFT", "ASFT")
    """Agents whose strength is a temperature."""
    noise_model: str = "gaussian"
    noise_levels: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5, 1.0)
    """σ = .25, .5, 1, 2, 4: the bound says something below about .47 at 200 titles. All on the grid of temperatures."""
    seeds: tuple[int, ...] = tuple(range(10))
    """Of tabular contexts, which are cheap."""
    temperatures: tuple[float, ...] = tuple(2.0**k for k in range(-4, 5))
    """λ (β of A-SFT): from a quarter of the least σ to four times the range of satisfaction."""
    catalogues: tuple[int, ...] = (50, 200, 1_000)
    """Titles of a world: the bound grows with the root of their logarithm."""
    events: tuple[int, ...] = (20, 200, 2_000)
    """Of each tabular context's log: a history's length, and ten and a hundred times that."""
    tabular_contexts: int = 300
    delta: float = 0.05
    """δ, the probability with which the bound may fail: the usual one."""
    trained_seeds: int = 3
    """The first so many seeds have trained agents too, which take most of the time."""
    trained_noise_levels: tuple[float, ...] = (0.0625, 0.25, 1.0)
    """Likewise, those of `noise_levels` that are among them: σ = .25, 1, 4."""
    trained_catalogues: tuple[int, ...] = (200, 1_000)
    """Likewise."""
    trained_temperatures: tuple[float, ...] = (0.0625, 0.25, 0.5, 1.0, 4.0, 16.0)
    """Likewise: the ends of the grid, the agents' default and each σ."""
    test_contexts: int = 1_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.world != "simulated" or self.noise_model != "gaussian":
            raise ConfigError(
                "suite noise_bounds needs simulated worlds with gaussian noise: the theorem is of unbiased noise of "
                "known σ, and catalogues are made to size"
            )
        for name, least in (("temperatures", 0.0), ("catalogues", 10), ("events", 1)):
            values = getattr(self, name)
            good = bool(values) and list(values) == sorted(set(values)) and values[0] >= least and values[0] > 0
            require(good, self, name, f"ascending, no repeats, positive and at least {least:g}")
        require(self.n_titles in self.catalogues, self, "n_titles", f"one of catalogues {self.catalogues}")
        require(0 < self.delta < 1, self, "delta", "between 0 and 1")
        require(self.tabular_contexts >= 2, self, "tabular_contexts", "at least 2")
        require(self.trained_seeds >= 0, self, "trained_seeds", "0 or more")
        for name, all_of in (("trained_catalogues", "catalogues"), ("trained_temperatures", "temperatures")):
            known = set(getattr(self, name)) <= set(getattr(self, all_of))
            require(known, self, name, f"a part of {all_of}")
        for name in self.agents:
            strength = find_agent(name).strength
            fits = strength is not None and strength.option in TEMPERATURES and not strength.rises
            require(fits, self, "agents", f"agents whose strength is a temperature, which {name}'s is not")
        # refused before any cell is run: no title is seen twice
        fills = self.history_length < self.catalogues[0]
        require(fills, self, "history_length", f"smaller than every catalogue {self.catalogues}")

    def world_of(self, n_titles: int, noise: float, seed: int) -> WorldBase:
        """The world of a cell."""
        return build_world(replace(self, n_titles=n_titles), noise, seed)

    def defaults(self) -> dict[str, float]:
        """Agent to its temperature where nothing is chosen."""
        return {name: float(getattr(self.new_agent(name).config, option_of(name))) for name in self.agents}


def option_of(agent: str) -> str:
    """The option that is an agent's temperature."""
    strength = find_agent(agent).strength
    assert strength is not None
    return strength.option


@register
class NoiseBounds(Suite):
    """Cells are a level (tabular or trained), a catalogue, a noise level and a seed. Cells of one seed and catalogue
    share users, titles, choices and draws of the noise, whatever σ."""

    name = "noise_bounds"
    presets: ClassVar[dict[str, Any]] = {
        "quick": NoiseBoundsConfig(),
        "full": NoiseBoundsConfig(
            preset="full",
            trained_seeds=10,
            trained_noise_levels=NoiseBoundsConfig.noise_levels,
            trained_catalogues=NoiseBoundsConfig.catalogues,
            trained_temperatures=NoiseBoundsConfig.temperatures,
        ),
        "smoke": NoiseBoundsConfig(
            **SMOKE
            | {
                "noise_levels": (0.0625, 1.0),
                "seeds": (0, 1),
                "n_titles": 60,
                "catalogues": (30, 60),
                "temperatures": (0.0625, 0.5, 4.0),
                "events": (10, 40),
                "tabular_contexts": 30,
                "trained_seeds": 1,
                "trained_noise_levels": (1.0,),
                "trained_catalogues": (60,),
                "trained_temperatures": (0.0625, 4.0),
            }
        ),
    }
    config: NoiseBoundsConfig

    def identity(self) -> dict[str, Any]:
        agents = {name: configs.to_dict(agent.config) for name, agent in self.config.new_agents().items()}
        return {"suite": self.name, "version": __version__, **experiment_identity(self.config), "agent_configs": agents}

    def cells(self) -> list[Cell]:
        config = self.config
        tabular = [
            ("tabular", titles, noise, seed)
            for seed in config.seeds
            for titles in config.catalogues
            for noise in config.noise_levels
        ]
        trained = [
            ("trained", titles, noise, seed)
            for seed in config.seeds[: config.trained_seeds]
            for titles in config.trained_catalogues
            for noise in config.noise_levels
            if noise in config.trained_noise_levels
        ]
        return [
            Cell(
                f"{level}-titles-{titles}-{cell_name(noise, seed)}",
                {"level": level, "n_titles": titles, "reward_noise": float(noise), "seed": seed},
            )
            for level, titles, noise, seed in tabular + trained
        ]

    def estimate_cell_seconds(self) -> float:
        config, cells = self.config, self.cells()
        trained = sum(cell.settings["level"] == "trained" for cell in cells) / len(cells)
        steps: float = config.pretraining.steps + config.judge_pretraining.steps
        for ensemble in (config.rewards, config.judge):
            steps += ensemble.members * ensemble.training.steps
        steps += config.training.steps * (1 + STEPS_WORTH * len(config.agents) * len(config.trained_temperatures))
        policies = len(config.temperatures) * config.tabular_contexts * (2 + len(config.agents) * len(config.events))
        tabular = SECONDS_PER_ENTRY * policies * float(np.mean(config.catalogues))
        return trained * steps * seconds_per_step(config) + (1 - trained) * tabular

    def run_cell(self, cell: Cell, notify: Notify) -> CellResult:
        level, titles, noise, seed = (cell.settings[k] for k in ("level", "n_titles", "reward_noise", "seed"))
        result = CellResult()
        if level == "tabular":
            notify(0.0, "tables")
            world = self.config.world_of(titles, noise, seed)
            found = tabular_figures(self.config, world, titles)
        else:
            bench = TrainedBench(replace(self.config, n_titles=titles), noise, seed, notify)
            world = bench.world
            found = bench.figures(notify, result)
        columns = {
            "suite": self.name,
            "env": world.env_id,
            "config_id": configs.config_id(self.identity()),
            "reward_noise": noise,
            "noise_model": self.config.noise_model,
            "reliability": float("nan"),  # of one catalogue, where a row of the table has several
            "seed": seed,
        }
        result.rows = [
            {**columns, "agent": agent, "metric": f"{metric}@{titles}", "value": float(value)}
            for agent, figures in found.items()
            for metric, value in figures.items()
        ]
        return result

    def report(self, run_dir: Path) -> tuple[Path, list[str]]:
        return write_noise_bounds(run_dir)


STEPS_WORTH = 1.15
"""What a step of the weighted agents costs, in steps of imitation, for the estimate of `--dry-run` only."""

SECONDS_PER_ENTRY = 4e-7
"""Of a tabular policy, likewise: contexts × titles × temperatures."""


def sigma_of(world: WorldBase) -> float:
    """Deviation of a world's Gaussian noise, in points."""
    assert isinstance(world.noise, GaussianNoise)
    return world.noise.dial * world.noise.scale


# --------------------------------------------------------------------------------------------------------- tabular


def tables_of(world: WorldBase, n: int) -> Tables:
    """Test contexts of a world, with their exact propensities."""
    contexts = world.contexts(n)
    seen, users = contexts.observations, contexts.users
    log_mu = world.logging_log_probs(users, seen.titles, seen.times, contexts.next_times)
    return Tables(world.config.seed, users, log_mu, world.satisfaction(users).astype(np.float64), sigma_of(world))


def tabular_figures(config: NoiseBoundsConfig, world: WorldBase, n_titles: int) -> Figures:
    """Value of the exact optimum at every temperature: with an endless log, with one score a title (the theorem's
    case), and with a log of so many events of each context."""
    tables = tables_of(world, config.tabular_contexts)
    sweep = Sweep(tables, promised_loss(tables.sigma, n_titles, config.delta), config)
    mu, best = tables.value(tables.mu), np.where(tables.mu > 0, tables.satisfaction, -np.inf).max(axis=1)
    least = np.where(tables.mu > 0, tables.satisfaction, np.inf).min(axis=1)
    found: Figures = {
        "": {
            "value_mu": float(mu.mean()),
            "value_best": float(best.mean()),
            "value_least": float(least.mean()),
            "promised_loss": sweep.promise,
        },
        # the noise multiplies all weights by one factor, exp(σ²/2λ²): an endless log knows nothing of it
        ENDLESS: sweep.figures(lambda t: tilted(tables.log_mu, tables.satisfaction, t)),
        ONE_SCORE: one_score_figures(sweep),
    }
    largest = max(config.events)
    learned, held_out = (tables.log(largest, purpose) for purpose in ("log", HELD_OUT))
    for events in config.events:
        log, judge = learned.first(events), held_out.first(events).title_means()
        found |= log_figures(sweep, log, judge, config.agents)
    return found


@dataclass(frozen=True, eq=False)
class Sweep:
    """One set of contexts, and the temperatures tried on it."""

    tables: Tables
    promise: float
    config: NoiseBoundsConfig

    def figures(
        self,
        policy_at: Callable[[float], FloatArray],
        judge: FloatArray | None = None,
        certified: Callable[[float, FloatArray], FloatArray] | None = None,
    ) -> dict[str, float]:
        """Of one way to make a policy.

        Args:
            policy_at: temperature to (n, I) probabilities.
            judge: (n, I) what a practitioner holds each title's score to be, on events that nothing was learned from.
            certified: temperature and policy to (n,) what V(π) − V(μ) is proved to be at least.
        """
        tables, found = self.tables, {}
        base = tables.value(tables.mu)
        lowest = np.full(len(base), np.inf)
        for temperature in self.config.temperatures:
            policy, at = policy_at(temperature), f"@{temperature:g}"
            gained = tables.value(policy) - base
            lowest = np.minimum(lowest, gained)
            found[f"value{at}"] = float(tables.value(policy).mean())
            found[f"greedy{at}"] = float(tables.greedy_value(policy).mean())
            found[f"harmed{at}"] = float((gained < 0).mean())
            if judge is not None:
                found[f"judged{at}"] = float((policy * judge).sum(axis=1).mean())
            if certified is not None:
                proved = certified(temperature, policy)
                found[f"certified{at}"] = float(proved.mean())
        # over all temperatures at once, since the bound holds for all at once
        found["lowest"] = float(np.quantile(lowest, self.config.delta))
        found["violated"] = float((lowest < -self.promise).mean())
        return found


def one_score_figures(sweep: Sweep) -> dict[str, float]:
    """The theorem's case: every title has one observed score, known to the learner together with μ."""
    tables = sweep.tables
    scores, again = (tables.scores_of_all(purpose) for purpose in ("one score", HELD_OUT))
    half = sweep.promise / 2
    return sweep.figures(
        lambda t: tilted(tables.log_mu, scores, t),
        again,
        lambda t, policy: certificate(policy, tables.mu, scores, half),
    )


def log_figures(sweep: Sweep, log: ContextLog, judge: FloatArray, agents: tuple[str, ...]) -> Figures:
    """Of the shipped agents' exact optima on a log of each context."""
    n, events = log.scores.shape
    half = promised_loss(sweep.tables.sigma, events, sweep.config.delta) / 2  # the union is over events
    even = np.full((n, events), 1.0 / events)
    means, found = log.title_means(), {}
    ways: dict[str, Any] = {
        "ExpRSFT": (
            log.exp_weighted,
            lambda t, policy: certificate(log.event_weights(t), even, log.scores, half),
        ),
        "ASFT": (lambda t: log.advantage_weighted(means, t), None),
    }
    for agent in agents:
        if agent in ways:
            policy_at, certified = ways[agent]
            found[log_name(agent, events)] = sweep.figures(policy_at, judge, certified)
    return found


# --------------------------------------------------------------------------------------------------------- trained


class TrainedBench(Laboratory):
    """A laboratory whose agents are swept over temperatures, and scored by the truth and by the judge."""

    config: NoiseBoundsConfig

    def figures(self, notify: Notify, result: CellResult) -> Figures:
        """Agent to metric; costs and failures go into ``result``."""
        world, config = self.world, self.config
        validation = world.contexts_of(judged_users(world, config.validation_users))
        assert self.judge is not None
        judge = self.judge.mean(validation.observations).astype(np.float64)
        truth = world.satisfaction(self.contexts.users).astype(np.float64)
        mu = np.exp(self.examination.logging)
        found: Figures = {
            "": {
                "trained_value_mu": float((mu * truth).sum(axis=1).mean()),
                "trained_promised_loss": promised_loss(sigma_of(world), world.n_titles, config.delta),
            }
        }
        plan = [(IMITATION, float("inf"))]
        plan += [(name, t) for name in config.agents for t in config.trained_temperatures]
        for k, (name, temperature) in enumerate(plan):
            notify(0.4 + 0.6 * k / len(plan), f"{name} {temperature:g}")
            options = {} if name == IMITATION else {option_of(name): temperature}
            try:
                agent = self._fitted(config.new_agent(name, **options), result)
            except (Exception, SystemExit) as error:
                result.failed[f"{name} {temperature:g}"] = f"{type(error).__name__}: {error}"
                continue
            at = "" if name == IMITATION else f"@{temperature:g}"
            found.setdefault(name, {}).update(
                {
                    f"{metric}{at}": value
                    for metric, value in trained_values(agent, self.contexts, truth, validation, judge).items()
                }
            )
            found[name][f"trained_best_step{at}"] = float(agent.record.best_step)
        return found

    def _fitted(self, agent: Agent, result: CellResult) -> Agent:
        start = time.perf_counter()
        agent.fit(self.logs.train, self.backbone, self.rewards, self.logs.validation, seed=self.seed)
        spent = result.costs.setdefault(agent.name, {"fit_seconds": 0.0, "gradient_steps": 0.0})
        spent["fit_seconds"] += time.perf_counter() - start
        spent["gradient_steps"] += agent.record.gradient_steps
        return agent


def judged_users(world: WorldBase, n: int) -> Users:
    """Validation users on whom the judge chooses λ: those after the ones on whom agents stop."""
    return world.users("validation", n, offset=n)


def trained_values(
    agent: Agent, contexts: Contexts, truth: FloatArray, validation: Contexts, judge: FloatArray
) -> dict[str, float]:
    """True value as sampled and of the ten first titles on test users; the judge's on validation users."""
    log_probs = agent.log_probs(contexts.observations).astype(np.float64)
    top = np.take_along_axis(truth, top_k(log_probs, TOP_K), axis=1)
    held = np.exp(agent.log_probs(validation.observations).astype(np.float64))
    return {
        "trained_value": float((np.exp(log_probs) * truth).sum(axis=1).mean()),
        "trained_top10": float(top.mean()),
        "trained_judged": float((held * judge).sum(axis=1).mean()),
    }
