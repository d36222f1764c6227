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
        if not catalogues or ENDLESS not in results.agents or ONE_SCORE not in results.agents:
            raise RunDirectoryError("the results hold no truth by temperature; run suite noise_bounds again")
        _refuse_damaged(config)
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
        return tuple(sorted(_temperature(match[1]) for match in found if match))

    def curve(self, way: Way, metric: str, titles: int, level: int) -> FloatArray:
        """(K, S): a metric by temperature, of the seeds of a noise level that have the truth at every temperature."""
        return self._by_temperature(way, metric, titles, level)[:, self._whole(way, titles, level)]

    def above(self, way: Way, base: FloatArray, titles: int, level: int, metric: str = "") -> FloatArray:
        """(K, S): the truth by temperature less a figure of the same world, of the seeds that have both.

        Args:
            way: whose truth.
            base: of every seed of the run, NaN where it is missing, as `imitation` and `of_seeds` give it.
            titles, level: which world.
            metric: another figure in place of the truth, of the same seeds.
        """
        both = self._whole(way, titles, level) & np.isfinite(base)
        return self._by_temperature(way, metric or way.value, titles, level)[:, both] - base[both]

    def _by_temperature(self, way: Way, metric: str, titles: int, level: int) -> FloatArray:
        """(K, all seeds)."""
        temperatures = self.temperatures(way, titles)
        found = [self.results.of(way.agent, f"{metric}@{t:g}@{titles}")[level] for t in temperatures]
        return np.array(found, dtype=np.float64).reshape(-1, len(self.results.seeds))

    def _whole(self, way: Way, titles: int, level: int) -> Any:
        """(all seeds,): whether the truth is there at every temperature."""
        truth = self._by_temperature(way, way.value, titles, level)
        return np.isfinite(truth).all(axis=0) & (len(truth) > 0)

    def of_seeds(self, metric: str, titles: int, level: int) -> FloatArray:
        """(all seeds,): a figure of the world itself; NaN where it is missing."""
        return self.results.of(WORLD, f"{metric}@{titles}")[level]

    def of_way(self, way: Way, metric: str, titles: int, level: int) -> FloatArray:
        """(S,): a figure of a way over all temperatures."""
        values = self.results.of(way.agent, f"{metric}@{titles}")[level]
        return values[np.isfinite(values)]

    def imitation(self, way: Way, titles: int, level: int) -> FloatArray:
        """(all seeds,): what λ = ∞ is worth: V(μ), of trained agents plain imitation; NaN where it is missing."""
        if not way.value.startswith("trained"):
            return self.of_seeds("value_mu", titles, level)
        return self.results.of("BC", f"{way.value}@{titles}")[level]

    def default(self, way: Way) -> float | None:
        """The learner's temperature where nothing is chosen."""
        config = self.config["agent_configs"].get(way.learner)
        found = config.get("temperature", config.get("beta")) if isinstance(config, dict) else None
        return float(found) if isinstance(found, (int, float)) and found > 0 else None


def _temperature(text: str) -> float:
    """Of a metric's name.

    Raises:
        RunDirectoryError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (np.isfinite(value) and value > 0):
        raise RunDirectoryError(f"the results hold a truth at temperature {text!r}; run suite noise_bounds again")
    return value


def _refuse_damaged(config: Mapping[str, Any]) -> None:
    """What the page reads of a run's config is there, and of its kind.

    Raises:
        RunDirectoryError: it is not.
    """
    delta, agents, events = (config.get(key) for key in ("delta", "agents", "events"))
    good = {
        "delta": isinstance(delta, float) and 0 < delta < 1,
        "agents": isinstance(agents, list) and all(isinstance(name, str) for name in agents),
        "events": isinstance(events, list) and bool(events) and all(isinstance(n, int) for n in events),
        "tabular_contexts": isinstance(config.get("tabular_contexts"), int),
        "agent_configs": isinstance(config.get("agent_configs"), dict),
    }
    for key, fits in good.items():
        if not fits:
            raise RunDirectoryError(
                f"config.json is not that of a run of suite noise_bounds ({key}: {config.get(key)!r}); "
                "restore it, or run the suite again"
            )


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


def untrained_end(grid: Grid, way: Way, titles: int, level: int) -> bool:
    """Whether the lowest λ of a trained agent is worth what the pretrained policy is: in no seed did a step lower its
    loss on validation users, so that the low arm of the shape is the stopping rule's and not the noise's."""
    steps = grid.curve(way, "trained_best_step", titles, level)
    return way.value.startswith("trained") and steps.size > 0 and bool((steps[0] == 0).all())


def in_hindsight(values: FloatArray) -> float:
    """How much more the best of (K, S) values is worth on the seeds that it was picked on than one which is picked for
    each seed on the others; NaN below two seeds."""
    if values.shape[1] < 2:
        return float("nan")
    return float((values[best_of(values)] - chosen_on_others(values)).mean())


def chosen_on_others(values: FloatArray) -> FloatArray:
    """(S,): of (K, S) values, each seed's at the temperature that is best in the mean of the other seeds."""
    others = values.sum(axis=1, keepdims=True) - values
    return values[others.argmax(axis=0), np.arange(values.shape[1])]


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
    chosen = chosen_on_others(values)
    above_low, above_high = (_surely_positive(chosen - values[end]) for end in (0, -1))
    best = best_of(values)
    if above_low and above_high and 0 < best < len(values) - 1:
        return "inverted U"
    if above_high:
        return "falls"
    return "rises" if above_low else "flat"


SHAPES = {
    "inverted U": "inverted U: the best is inside, and both ends of the grid are surely below it (what lies between is "
    "not tested)",
    "falls": "falls with λ: the highest λ is surely below the best, the lowest is not",
    "rises": "rises with λ: the lowest λ is surely below the best, the highest is not",
    "flat": "neither end is surely below the best, which does not say that they are as good",
    "?": "untested: fewer than two seeds, or than three temperatures",
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
        lost: value of the best in the mean of these same seeds, less that of the chosen; negative where a seed's own
            choice is better there.
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
