"""A run of suite ``offline`` as arrays: every trial of every agent, and which of them each rule took."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsim_gr.benchmarks.charts import learners_of, styles_of
from recsim_gr.benchmarks.offline_choices import DEFAULT, NDCG, NDCG_SHARE, RULES, at_the_end
from recsim_gr.benchmarks.results import TRIAL_SCHEMA
from recsim_gr.benchmarks.statistics import WORLD, FloatArray, Results, holm, t_interval, t_test
from recsim_gr.errors import RunDirectoryError

REFERENCE = "RewardWeightedBC"
"""What the study's percentages are over."""

Key = tuple[str, int, str]  # agent, place of the trial among the agent's own, metric


@dataclass(frozen=True)
class Trials:
    """The results of one kind of world and one log size.

    Attributes:
        noise, reliability, seeds: as in `Results`.
        agents: in the order of their first appearance.
        strengths: agent to the strengths that were tried, in order; NaN for one that has none.
        options: agent to the option that is its strength; empty for one that has none.
        values: (N, S) of each trial's metrics.
        world: (N, S) of the world's own.
        chosen: (agent, rule) to (N, S) places in ``strengths``, -1 where the rule took none.
        informed: agents that know more than a log holds: references, no competitors.
        swept: agent to the strengths that rules chose from, from the weakest to the strongest.
        failed: agents that the run asked for, and that have no result here.
        env, noise_model: which kind of world.
        log_size: training users.
    """

    noise: FloatArray
    reliability: FloatArray
    seeds: tuple[int, ...]
    agents: tuple[str, ...]
    strengths: Mapping[str, tuple[float, ...]]
    options: Mapping[str, str]
    values: Mapping[Key, FloatArray]
    world: Mapping[str, FloatArray]
    chosen: Mapping[tuple[str, str], np.ndarray]
    informed: tuple[str, ...] = ()
    swept: Mapping[str, tuple[float, ...]] | None = None
    failed: tuple[str, ...] = ()
    env: str = ""
    noise_model: str = ""
    log_size: int = 0

    @property
    def title(self) -> tuple[str, str, str]:
        """Which part of a run it is, in words."""
        return self.env, self.noise_model, f"{self.log_size:,} training users"

    @property
    def shape(self) -> tuple[int, int]:
        """N, S."""
        return len(self.noise), len(self.seeds)

    @property
    def rules(self) -> tuple[str, ...]:
        """`DEFAULT`, and the rules that were applied."""
        there = {rule for (_, rule), taken in self.chosen.items() if (taken >= 0).any()}
        return tuple(rule for rule in (DEFAULT, *RULES) if rule in there)

    @property
    def competitors(self) -> tuple[str, ...]:
        """Those that a claim is made about: they learn, from what a practitioner has. The reference is one."""
        return tuple(agent for agent in ("BC", *learners_of(self.agents)) if self._competes(agent, self.agents))

    @property
    def failed_competitors(self) -> tuple[str, ...]:
        """Those of them that have no result."""
        return tuple(agent for agent in ("BC", *learners_of(self.failed)) if self._competes(agent, self.failed))

    def _competes(self, agent: str, among: tuple[str, ...]) -> bool:
        return agent in among and agent not in self.informed

    @property
    def ordered(self) -> tuple[str, ...]:
        """All agents: ceilings, competitors, baselines."""
        return tuple(styles_of(self.agents))

    def asked(self, agent: str) -> bool:
        """Whether the run asked for an agent, which may have failed."""
        return agent in (*self.agents, *self.failed)

    def of(self, agent: str, rule: str, metric: str) -> FloatArray:
        """(N, S): a metric of the trial that a rule took, world by world; NaN where it took none."""
        taken = self.chosen.get((agent, rule))
        found = np.full(self.shape, np.nan)
        if taken is None:
            return found
        for k in range(len(self.strengths[agent])):
            values = self.values.get((agent, k, metric))
            if values is not None:
                found = np.where(taken == k, values, found)
        return found

    def strength(self, agent: str, rule: str) -> FloatArray:
        """(N, S): the strength that a rule took."""
        taken = self.chosen.get((agent, rule), np.full(self.shape, -1))
        tried = np.array([*self.strengths[agent], np.nan])  # -1 is the last
        return tried[taken]

    def results(self, rule: str) -> Results:
        """All agents as a rule chose them."""
        metrics = dict.fromkeys(metric for _, _, metric in self.values)
        values = {(a, m): self.of(a, rule, m) for a in self.agents for m in metrics}
        world = {(WORLD, metric): array for metric, array in self.world.items()}
        return Results(self.noise, self.reliability, self.seeds, self.agents, world | values)

    # -- what choices cost ----------------------------------------------------------------------------------------

    @property
    def selected(self) -> tuple[str, ...]:
        """Competitors of whom there was something to choose."""
        swept = self.swept or {}
        return tuple(agent for agent in self.competitors if len(swept.get(agent, ())) > 1)

    def best(self, agent: str, metric: str) -> FloatArray:
        """(N, S): of all that rules could choose, the best in hindsight, on test users."""
        swept = (self.swept or {}).get(agent, ())
        trials = [
            self.values[agent, k, metric]
            for k, strength in enumerate(self.strengths[agent])
            if strength in swept and (agent, k, metric) in self.values
        ]
        return np.max(trials, axis=0) if trials else np.full(self.shape, np.nan)

    def regret(self, agent: str, rule: str, metric: str = "value_top10") -> FloatArray:
        """(N, S): what the best strength is worth on test users, less what the chosen one is. Negative only for a
        default that was not among what rules chose from."""
        return self.best(agent, metric) - self.of(agent, rule, metric)

    def at_the_end(self, agent: str, rule: str) -> tuple[int, int]:
        """In how many worlds the weakest and the strongest that were tried are taken: the best may lie beyond."""
        swept = (self.swept or {}).get(agent, ())
        taken = self.strength(agent, rule)
        ends = [k for k in (0, len(swept) - 1) if swept and at_the_end(k, len(swept))]
        counts = [int((taken == swept[k]).sum()) for k in ends]
        return (counts[0], counts[1]) if counts else (0, 0)

    def short_of_ndcg(self, agent: str) -> int:
        """In how many worlds no strength keeps 95 % of the reference's NDCG@10 on validation users."""
        swept = (self.swept or {}).get(agent, ())
        kept = [
            self.values[agent, k, NDCG]
            for k, strength in enumerate(self.strengths[agent])
            if strength in swept and (agent, k, NDCG) in self.values
        ]
        if not kept:
            return 0
        return int((np.max(kept, axis=0) < NDCG_SHARE * self.of(REFERENCE, DEFAULT, NDCG)).sum())


@dataclass(frozen=True)
class Percentage:
    """An agent's percentage over the reference; every array ``(N,)``, NaN where it cannot be said.

    Attributes:
        mean: over seeds of the percentages of each seed, which pair agent and reference.
        half: of the 95 % Student-t interval.
        p: two-sided, after Holm's correction over the level's competitors; NaN for others.
        n_seeds: in which both have a result.
    """

    mean: FloatArray
    half: FloatArray
    p: FloatArray
    n_seeds: np.ndarray


def percent_over(values: FloatArray, reference: FloatArray) -> FloatArray:
    """(N, S): 100·(value/reference − 1), seed by seed; NaN where the reference is not positive."""
    ratio = np.divide(values, reference, out=np.full(values.shape, np.nan), where=reference > 0)
    return 100.0 * (ratio - 1.0)


def percentages(trials: Trials, rule: str, metric: str) -> dict[str, Percentage]:
    """Every agent as a rule chose it, over the reference at its default."""
    base = trials.of(REFERENCE, DEFAULT, metric)
    over = {agent: percent_over(trials.of(agent, rule, metric), base) for agent in trials.agents}
    family = [agent for agent in trials.competitors if agent != REFERENCE]
    n_failed = len(trials.failed_competitors)
    none = np.full(len(trials.noise), np.nan)
    p = np.array([t_test(over[agent])[0] for agent in family] + [none] * n_failed)
    adjusted = np.array([whole_family(p[:, level]) for level in range(len(trials.noise))]).T if family else p
    by_agent = dict(zip(family, adjusted, strict=False))  # behind them those that have no result
    found = {}
    for agent, values in over.items():
        mean, half, count = t_interval(values)
        found[agent] = Percentage(mean, half, by_agent.get(agent, none), count)
    return found


def whole_family(p: FloatArray) -> FloatArray:
    """Holm's correction in which a test without a result counts as one that was made: who fails must not make what
    others show surer. NaN stays where it was."""
    adjusted = holm(np.where(np.isnan(p), 1.0, p))
    return np.where(np.isnan(p), np.nan, adjusted)


# --------------------------------------------------------------------------------------------------------- reading


def read_trials(path: Path, config: Mapping[str, Any]) -> dict[str, Trials]:
    """Reads the table of a run: `Trials` by a name of environment and noise model, and of log size where the run has
    several.

    Args:
        path: of ``results.parquet``.
        config: of the run, which says what was swept and who is informed.

    Raises:
        RunDirectoryError: it is no table of trials.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise RunDirectoryError(f"{path} is missing, truncated or not Parquet; run the suite again") from error
    missing = [name for name in TRIAL_SCHEMA.names if name not in table.column_names]
    if missing or table.num_rows == 0:
        lacks = f"no column {missing[0]!r}" if missing else "no row"
        raise RunDirectoryError(
            f"{path} has {lacks}: it is no table of trials, or of a version before log sizes; run suite offline again"
        )
    try:
        columns = table.select(TRIAL_SCHEMA.names).cast(TRIAL_SCHEMA)
        rows = columns.to_pylist()
    except pa.ArrowException as error:
        raise RunDirectoryError(f"{path} has columns of other types ({error}); run suite offline again") from error
    known = [name for name in TRIAL_SCHEMA.names if name not in ("reliability", "strength", "value")]
    for name in known:
        if columns.column(name).null_count:
            raise RunDirectoryError(f"{path} has no {name} in some row; run suite offline again")
    parts: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        parts.setdefault((row["env"], row["noise_model"], row["log_size"]), []).append(row)
    asked, informed, swept = _asked(config), _informed(config), _swept(config)
    found = [
        replace(_trials(of_part, asked, informed, swept), env=env, noise_model=noise_model, log_size=size)
        for (env, noise_model, size), of_part in sorted(parts.items())
    ]
    shown = 3 if len({trials.log_size for trials in found}) > 1 else 2
    return {" · ".join(trials.title[:shown]): trials for trials in found}


def _asked(config: Mapping[str, Any]) -> tuple[str, ...]:
    asked = config.get("agent_configs")
    return tuple(map(str, asked)) if isinstance(asked, dict) else ()


def _informed(config: Mapping[str, Any]) -> tuple[str, ...]:
    informed = config.get("informed")
    return tuple(name for name in informed if isinstance(name, str)) if isinstance(informed, list) else ()


def _swept(config: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    grids = config.get("grids")
    found = {}
    for agent, grid in grids.items() if isinstance(grids, dict) else ():
        values = grid.get("values") if isinstance(grid, dict) else None
        if isinstance(values, list) and all(isinstance(value, (int, float)) for value in values):
            found[str(agent)] = tuple(float(value) for value in values)
    return found


def _trials(
    rows: Sequence[Mapping[str, Any]],
    asked: tuple[str, ...],
    informed: tuple[str, ...],
    swept: Mapping[str, tuple[float, ...]],
) -> Trials:
    noise = sorted({row["reward_noise"] for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    shape = len(noise), len(seeds)
    reliability = np.full(shape, np.nan)
    world: dict[str, FloatArray] = {}
    tried: dict[str, dict[str, float]] = {}
    options: dict[str, str] = {}
    values: dict[Key, FloatArray] = {}
    chosen: dict[tuple[str, str], np.ndarray] = {}
    for row in rows:
        at = noise.index(row["reward_noise"]), seeds.index(row["seed"])
        reliability[at] = np.nan if row["reliability"] is None else row["reliability"]
        value = np.nan if row["value"] is None else row["value"]
        agent, strength = row["agent"], row["strength"]
        if agent == WORLD:
            world.setdefault(row["metric"], np.full(shape, np.nan))[at] = value
            continue
        own = tried.setdefault(agent, {})
        own.setdefault(repr(strength), np.nan if strength is None else strength)
        options.setdefault(agent, row["option"])
        place = list(own).index(repr(strength))
        values.setdefault((agent, place, row["metric"]), np.full(shape, np.nan))[at] = value
        for rule in row["choice"].split():
            chosen.setdefault((agent, rule), np.full(shape, -1))[at] = place
    strengths = {agent: tuple(own.values()) for agent, own in tried.items()}
    return Trials(
        np.array(noise), t_interval(reliability)[0], tuple(seeds), tuple(tried), strengths, options, values, world,
        chosen, informed, swept, tuple(name for name in asked if name not in tried),
    )  # fmt: skip
