"""What a run of suite ``noise_bounds`` says: truth by temperature, the best one, the shape, and what rules advise."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from recsim_gr.benchmarks.statistics import WORLD, FloatArray, Results, t_interval
from recsim_gr.errors import RunDirectoryError

ENDLESS = "Exp-RSFT, endless log"
ONE_SCORE = "Exp-RSFT, one score a title"
NAMES = {"ExpRSFT": "Exp-RSFT", "ASFT": "A-SFT"}
"""As their papers write them."""


def log_name(agent: str, events: int) -> str:
    """An agent's exact optimum on a log of so many events a context, as the table of results names it."""
    return f"{agent}, log of {events}"


class Way(NamedTuple):
    """One way to make a policy of a temperature, and where the table has it.

    Attributes:
        agent: of the table.
        label: of the page.
        value: metric of the truth.
        judged, certified: metrics of what a practitioner goes by; empty where there is none.
        learner: the shipped agent whose default temperature applies; empty for none.
    """

    agent: str
    label: str
    value: str = "value"
    judged: str = "judged"
    certified: str = ""
    learner: str = ""


@dataclass(frozen=True)
class Grid:
    """A run's results by catalogue and temperature.

    Attributes:
        results: labelled arrays; metrics end in ``@temperature@titles`` or ``@titles``.
        config: of the run.
        catalogues: ascending.
    """

    results: Results
    config: Mapping[str, Any]
    catalogues: tuple[int, ...]

    @classmethod
    def of(cls, results: Results, config: Mapping[str, Any]) -> "Grid":
        """From a run's table.

        Raises:
            RunDirectoryError: the table is not this suite's.
        """
        sizes = {metric.rpartition("@")[2] for metric in results.metrics() if metric.startswith(("value@", "trained_"))}
        catalogues = tuple(sorted(int(size) for size in sizes if size.isdigit()))
        if not catalogues or ENDLESS not in results.agents:
            raise RunDirectoryError("the results hold no truth by temperature; run suite noise_bounds again")
        return cls(results, config, catalogues)

    @property
    def delta(self) -> float:
        """δ."""
        return float(self.config["delta"])

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Deviations of the noise: of `gaussian`, four times the dial."""
        return tuple(float(4.0 * dial) for dial in self.results.noise)

    def temperatures(self, way: Way, titles: int) -> tuple[float, ...]:
        """Those that have a value of it, ascending."""
        pattern = re.compile(rf"{re.escape(way.value)}@([^@]+)@{titles}")
        found = (pattern.fullmatch(metric) for agent, metric in self.results.values if agent == way.agent)
        return tuple(sorted(float(match[1]) for match in found if match))

    def curve(self, way: Way, metric: str, titles: int, level: int) -> FloatArray:
        """(K, S): a metric by temperature, of the seeds of a noise level that have the truth at every temperature."""
        temperatures, shape = self.temperatures(way, titles), (-1, len(self.results.seeds))
        truth, found = (
            np.array([self.results.of(way.agent, f"{name}@{t:g}@{titles}")[level] for t in temperatures]).reshape(shape)
            for name in (way.value, metric)
        )
        return found[:, np.isfinite(truth).all(axis=0) & (len(truth) > 0)]

    def of_world(self, metric: str, titles: int, level: int) -> FloatArray:
        """(S,): a figure of the world itself, of the seeds that have it."""
        values = self.results.of(WORLD, f"{metric}@{titles}")[level]
        return values[np.isfinite(values)]

    def of_way(self, way: Way, metric: str, titles: int, level: int) -> FloatArray:
        """(S,): a figure of a way over all temperatures."""
        values = self.results.of(way.agent, f"{metric}@{titles}")[level]
        return values[np.isfinite(values)]

    def imitation(self, way: Way, titles: int, level: int) -> FloatArray:
        """(S,): what λ = ∞ is worth: V(μ), of trained agents plain imitation."""
        if not way.value.startswith("trained"):
            return self.of_world("value_mu", titles, level)
        values = self.results.of("BC", f"{way.value}@{titles}")[level]
        return values[np.isfinite(values)]

    def default(self, way: Way) -> float | None:
        """The learner's temperature where nothing is chosen."""
        config = self.config.get("agent_configs", {}).get(way.learner, {})
        found = config.get("temperature", config.get("beta"))
        return None if found is None else float(found)


def ways(grid: Grid) -> list[Way]:
    """The tabular ones: the theorem's case first, then logs from the shortest."""
    found = [Way(ONE_SCORE, ONE_SCORE, certified="certified", learner="ExpRSFT")]
    for agent in grid.config["agents"]:
        for events in grid.config["events"]:
            name = log_name(agent, events)
            if name in grid.results.agents:
                label = f"{NAMES.get(agent, agent)}, log of {events:,} events a context"
                certified = "certified" if agent == "ExpRSFT" else ""
                found.append(Way(name, label, certified=certified, learner=agent))
    return found


def trained_ways(grid: Grid) -> list[Way]:
    """Trained agents, by what their policies are worth as sampled and by their ten first titles."""
    kinds = {"trained_value": "as sampled", "trained_top10": "top 10"}
    found = [
        Way(agent, f"{NAMES.get(agent, agent)}, trained, {said}", kind, "trained_judged", "", agent)
        for kind, said in kinds.items()
        for agent in grid.config["agents"]
    ]
    return [way for way in found if any(grid.temperatures(way, titles) for titles in grid.catalogues)]


# ------------------------------------------------------------------------------------------------------------ shape


def best_of(values: FloatArray) -> int:
    """Of (K, S) values by temperature: which is best in the mean over seeds."""
    return int(values.mean(axis=1).argmax())


def shape_of(values: FloatArray) -> str:
    """A key of `SHAPES`: of (K, S) true values by temperature, ascending.

    The best temperature for a seed is chosen on the others, so that the choice is not tested on what it was made on;
    its differences to both ends of the grid are tested by their 95 % Student-t intervals over seeds.
    """
    if values.shape[1] < 2 or len(values) < 3:
        return "?"
    others = (values.sum(axis=1, keepdims=True) - values) / (values.shape[1] - 1)
    seeds = np.arange(values.shape[1])
    chosen = values[others.argmax(axis=0), seeds]
    above_low, above_high = (_surely_positive(chosen - values[end]) for end in (0, -1))
    best = best_of(values)
    if above_low and above_high and 0 < best < len(values) - 1:
        return "inverted U"
    if above_high:
        return "falls"
    return "rises" if above_low else "flat"


SHAPES = {
    "inverted U": "inverted U: the best is inside, and both ends of the grid are surely below it",
    "falls": "falls with λ: the highest λ is surely below the best, the lowest is not",
    "rises": "rises with λ: the lowest λ is surely below the best, the highest is not",
    "flat": "neither end is surely below the best",
    "?": "untested, fewer than two seeds",
}


def _surely_positive(differences: FloatArray) -> bool:
    mean, half, _ = t_interval(differences)
    return bool(mean > 0 and mean > half)


# ----------------------------------------------------------------------------------------------------------- advice

RULES = {
    "default": "the agent's default",
    "sigma": "λ = σ",
    "judge": "chosen by the judge",
    "certificate": "chosen by the certificate",
}


class Advice(NamedTuple):
    """What a rule chose, against the best: per seed (S,).

    Attributes:
        temperature: chosen, of the grid.
        doublings: log2(chosen / best).
        lost: value of the best in the mean, less that of the chosen.
    """

    temperature: FloatArray
    doublings: FloatArray
    lost: FloatArray


def advised(grid: Grid, way: Way, titles: int, level: int) -> dict[str, Advice]:
    """Rule to its advice, where the rule has something to go by."""
    temperatures = np.array(grid.temperatures(way, titles))
    values = grid.curve(way, way.value, titles, level)
    if not values.size:
        return {}
    best, seeds = best_of(values), np.arange(values.shape[1])
    chosen = dict(_choices(grid, way, titles, level, temperatures, values.shape[1]))
    return {
        rule: Advice(
            temperatures[place], np.log2(temperatures[place] / temperatures[best]), values[best] - values[place, seeds]
        )
        for rule, place in chosen.items()
    }


def _choices(
    grid: Grid, way: Way, titles: int, level: int, temperatures: FloatArray, n_seeds: int
) -> Iterator[tuple[str, Any]]:
    """Rule and the (S,) places on the grid that it chooses."""
    default = grid.default(way)
    if default is not None:
        yield "default", np.full(n_seeds, nearest(temperatures, default))
    yield "sigma", np.full(n_seeds, nearest(temperatures, grid.sigmas[level]))
    for rule, metric in (("judge", way.judged), ("certificate", way.certified)):
        if metric:
            yield rule, grid.curve(way, metric, titles, level).argmax(axis=0)


def nearest(temperatures: FloatArray, wanted: float) -> int:
    """The place on the grid nearest to a temperature, in its logarithm; the lowest for 0."""
    with np.errstate(divide="ignore"):
        return int(np.abs(np.log(temperatures) - max(float(np.log(wanted)), -1e9)).argmin())
