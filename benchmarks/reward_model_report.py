"""Table 1 as a page: what the reward model gains over the study's baselines, as seen and in truth."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import altair as alt
import numpy as np

from recsim_gr.benchmarks.charts import Drawing, Figure, finished
from recsim_gr.benchmarks.page import config_table, document, figure_element, folded, number, signed, table
from recsim_gr.benchmarks.report import javascript, read_run, remove_stale, write_figure
from recsim_gr.benchmarks.reward_model_measures import ADDITIVE, BASELINES, CONSTANT, FLOOR
from recsim_gr.benchmarks.statistics import WORLD, FloatArray, Results, holm, t_interval, t_test
from recsim_gr.errors import RunDirectoryError
from recsim_gr.files import write_text

SIGNIFICANT = 0.05

FLOOR_ERRORS = 5.0
"""Standard errors by which a model may be off the law of the floor: of hundreds of cells none is, by chance alone."""

NOISE_WITH_MEMORY = ("drift",)
"""Noise that a history tells of: what a user's mood does to the next score can be learned, and the floor is none."""


class Measure(NamedTuple):
    """One comparison: its column in the cells' rows, and what it is."""

    metric: str
    heading: str
    unit: str


MEASURES = (
    Measure("chosen_score_gain", "observed score, chosen titles", "RMSE, points"),
    Measure("chosen_expected_gain", "expected score, chosen titles", "RMSE, points"),
    Measure("forced_expected_gain", "expected score, never-shown titles", "RMSE, points"),
    Measure("forced_satisfaction_rank_gain", "satisfaction, never-shown titles", "rank corr. within user"),
)
"""What the study could see first; then the truth of the same, and what nobody could see."""


BEYOND = Measure("chosen_score_additive_gain", "observed score, over both means added up", "RMSE, points")
"""Not the study's question: is there more than the user and the title apart? In the table, not in the picture."""


@dataclass(frozen=True)
class Grid:
    """A run's results by log size.

    Attributes:
        results: labelled arrays, metrics ending in ``@`` and the log size.
        sizes: the K log sizes, ascending.
        models: those that are compared with the baselines.
    """

    results: Results
    sizes: tuple[int, ...]
    models: tuple[str, ...]

    @classmethod
    def of(cls, results: Results) -> "Grid":
        """From a run's table.

        Raises:
            RunDirectoryError: the table is not this suite's.
        """
        names = [metric.rpartition("@") for metric in results.metrics()]
        sizes = sorted({int(size) for name, at, size in names if at and size.isdigit()})
        models = [a for a in results.agents if a not in (*BASELINES, CONSTANT, FLOOR, ADDITIVE)]
        if not sizes or not models:
            raise RunDirectoryError("the results hold no reward model by log size; run suite reward_model again")
        return cls(results, tuple(sizes), tuple(models))

    def of_model(self, model: str, metric: str) -> FloatArray:
        """(N, K, S): NaN where a cell is missing."""
        return np.stack([self.results.of(model, f"{metric}@{size}") for size in self.sizes], axis=1)

    def events_per_title(self) -> FloatArray:
        """(K,)."""
        return t_interval(self.of_model(WORLD, "events_per_title").transpose(1, 0, 2).reshape(len(self.sizes), -1))[0]


class Gain(NamedTuple):
    """A measure's gains, (N, K) each: mean over seeds, half of the 95 % interval, Holm's p over all cells."""

    mean: FloatArray
    half: FloatArray
    p: FloatArray

    def verdict(self, noise: int, size: int) -> str:
        """A key of `VERDICTS`."""
        mean, half, p = (float(values[noise, size]) for values in self)
        if not np.isfinite(p):
            return "?"
        if abs(mean) <= half:
            return "none"
        way = "gain" if mean > 0 else "loss"
        return way if p <= SIGNIFICANT else f"{way}?"


VERDICTS = {
    "gain": "gain",
    "gain?": "gain by its own interval, not after Holm",
    "none": "no significant gain",
    "loss?": "loss by its own interval, not after Holm",
    "loss": "loss",
    "?": "untested, one seed",
}
"""At 5 %: after Holm's correction; by the 95 % interval alone, which allows for no other cell; by neither."""


def gain_of(grid: Grid, model: str, metric: str) -> Gain:
    """Paired differences, tested two-sidedly by Student's t over seeds; Holm's family is all noise levels and log
    sizes of one model and measure."""
    values = grid.of_model(model, metric)
    mean, half, _ = t_interval(values)
    p = t_test(values)[0]
    return Gain(mean, half, holm(p.ravel()).reshape(p.shape))


def seen_by_users(grid: Grid, model: str) -> FloatArray:
    """(N, K): the share of worlds in which a study of that world alone, testing over its users, would report a gain
    on observed scores (z above 1.96)."""
    gain, error = (grid.of_model(model, f"chosen_score_gain{part}") for part in ("", "_se"))
    z = np.divide(gain, error, out=np.full(gain.shape, np.nan), where=error > 0)
    count = np.isfinite(z).sum(axis=-1)
    return np.divide((z > 1.96).sum(axis=-1), count, out=np.full(count.shape, np.nan), where=count > 0)


# ---------------------------------------------------------------------------------------------------------- lines


def summary(grid: Grid, noise_model: str) -> list[str]:
    """The reading of each model's table, then what must hold."""
    return [line for model in grid.models for line in _reading(grid, model)] + checks(grid, noise_model)


def _reading(grid: Grid, model: str) -> Iterator[str]:
    for measure in (*MEASURES, BEYOND):
        gain = gain_of(grid, model, measure.metric)
        said: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
        for level, noise in enumerate(grid.results.noise):
            for k, size in enumerate(grid.sizes):
                if np.isfinite(gain.mean[level, k]):
                    said[gain.verdict(level, k)].append(f"ν {noise:g} × {size:,}")
        parts = [f"{VERDICTS[verdict]}: {', '.join(cells)}" for verdict, cells in said.items() if cells]
        if parts:
            yield f"{model}, {measure.heading} ({measure.unit}): " + "; ".join(parts)


def checks(grid: Grid, noise_model: str) -> list[str]:
    """What holds whatever the models learned."""
    lines = [_same_floor(grid)]
    if noise_model not in NOISE_WITH_MEMORY:
        lines.append(_law_of_the_floor(grid))
    return lines


def _same_floor(grid: Grid) -> str:
    """One world's test events are the same for every log size."""
    floors = grid.of_model(FLOOR, "chosen_score_rmse")
    several = (np.isfinite(floors).sum(axis=1, keepdims=True) > 1) & np.isfinite(floors)
    if not several.any():
        return "open: the floor of a world is the same for every log size (one size, nothing to compare)"
    highest, lowest = np.where(several, floors, -np.inf).max(axis=1), np.where(several, floors, np.inf).min(axis=1)
    spread = float((highest - lowest)[several.any(axis=1)].max())
    verdict = "holds" if spread == 0 else "FAILS"
    return f"{verdict}: the floor of a world is the same for every log size (largest difference {spread:g})"


def _law_of_the_floor(grid: Grid) -> str:
    """Squared error against scores is that against their expectation plus the floor's, for every model."""
    worst, where = 0.0, ""
    for model in grid.results.agents:
        z = grid.of_model(model, "floor_z")
        if np.isfinite(z).any() and np.nanmax(np.abs(z)) > abs(worst):
            level, size, seed = np.unravel_index(np.nanargmax(np.abs(z)), z.shape)
            worst = float(z[level, size, seed])
            where = f"{model}, ν {grid.results.noise[level]:g}, {grid.sizes[size]:,} users"
    verdict = "holds" if abs(worst) < FLOOR_ERRORS else "FAILS"
    return (
        f"{verdict}: squared error against scores = squared error against their expectation + noise, so that no model "
        f"is below the floor (largest deviation {worst:+.1f} standard errors, fewer than {FLOOR_ERRORS:g}: {where})"
    )


# ---------------------------------------------------------------------------------------------------------- table


COLUMNS: Mapping[str, tuple[str, str]] = {
    "chosen_score": ("chosen titles, observed score", "RMSE, MAE, Spearman pooled and within user"),
    "chosen_expected": ("chosen titles, expected score", ""),
    "chosen_satisfaction": ("chosen titles, satisfaction", ""),
    "forced_expected": ("never-shown titles, expected score", ""),
    "forced_satisfaction": ("never-shown titles, satisfaction", ""),
}
STATISTICS = {"rmse": "RMSE", "mae": "MAE", "spearman": "Spearman", "spearman_within": "within user"}


def gain_table(grid: Grid, model: str, with_floor: bool = True) -> str:
    """A row a noise level and log size: the gains, whether the seeds show them, and how near to the ceiling.

    Args:
        grid: of the results.
        model: whose gains.
        with_floor: whether the exact expectation is a floor: not where noise has a memory.
    """
    measures = (*MEASURES, BEYOND)
    gains = [gain_of(grid, model, measure.metric) for measure in measures]
    seen, share = seen_by_users(grid, model), explained(grid, model)
    baseline = explained(grid, None)
    floor = t_interval(grid.of_model(FLOOR, "chosen_score_rmse"))[0]
    heads = "".join(f"<th>{escape(m.heading)}<small>{escape(m.unit)}</small></th>" for m in measures)
    ceiling = "<th>explained <small>baseline</small></th><th>floor <small>RMSE</small></th>" if with_floor else ""
    head = (
        f"<tr><th>users <small>events a title</small></th>{heads}<th>seen in one world</th>"
        f"<th>best step <small>of its steps</small></th>{ceiling}</tr>"
    )
    stopped = t_interval(grid.of_model(model, "best_step_share"))[0]
    body, coverage = [], grid.events_per_title()
    for level in range(len(grid.results.noise)):
        rows = []
        for k, size in enumerate(grid.sizes):
            cells = "".join(_gain_cell(gain, level, k) for gain in gains)
            rows.append(
                f"<tr><th>{size:,} <small>{number(coverage[k], 0)}</small></th>{cells}"
                f"<td>{_percent(seen[level, k])}</td><td>{_percent(stopped[level, k])}</td>"
                + (
                    f"<td>{_percent(share[level, k])}<small>{_percent(baseline[level, k])}</small></td>"
                    f"<td>{number(floor[level, k])}</td>"
                    if with_floor
                    else ""
                )
                + "</tr>"
            )
        columns = len(measures) + (5 if with_floor else 3)
        heading = f'<tr class="level"><th colspan="{columns}">{level_name(grid, level)}</th></tr>'
        body.append(f"<tbody>{heading}{''.join(rows)}</tbody>")
    return table(head, "".join(body), "headline")


def explained(grid: Grid, model: str | None) -> FloatArray:
    """(N, K): the share of the explainable variance of observed scores that a model explains, mean over seeds: 0 as
    the log's mean, 1 as the exact expectation; of the better baseline for None."""
    constant, floor = (grid.of_model(name, "chosen_score_rmse") ** 2 for name in (CONSTANT, FLOOR))
    names = (model,) if model else BASELINES
    error = np.min([grid.of_model(name, "chosen_score_rmse") ** 2 for name in names], axis=0)
    return t_interval((constant - error) / np.where(constant > floor, constant - floor, np.nan))[0]


CELL_WORDS = {
    "gain": "gain",
    "gain?": "gain, not after Holm",
    "none": "not significant",
    "loss?": "loss, not after Holm",
    "loss": "loss",
    "?": "one seed",
}


def _gain_cell(gain: Gain, level: int, size: int) -> str:
    if not np.isfinite(gain.mean[level, size]):
        return "<td>–</td>"
    verdict = gain.verdict(level, size)
    mark = ' class="best"' if verdict == "gain" else ""
    p = "" if verdict == "?" else f", p = {gain.p[level, size]:.3f}"
    said = signed(gain.mean[level, size], gain.half[level, size])
    return f"<td{mark}>{said}<small>{CELL_WORDS[verdict]}{p}</small></td>"


def model_table(grid: Grid) -> str:
    """Every model's errors and rank correlations, level by level and size by size."""
    names = [f"{group}_{statistic}" for group in COLUMNS for statistic in STATISTICS]
    means = {(a, n): t_interval(grid.of_model(a, n))[0] for a in grid.results.agents for n in names}
    groups = "".join(f'<th colspan="{len(STATISTICS)}">{escape(title)}</th>' for title, _ in COLUMNS.values())
    heads = "".join(f"<th>{title}</th>" for _ in COLUMNS for title in STATISTICS.values())
    body = []
    for level in range(len(grid.results.noise)):
        for k, size in enumerate(grid.sizes):
            title = f"{level_name(grid, level)} · {size:,} users"
            body.append(f'<tbody><tr class="level"><th colspan="{len(names) + 1}">{title}</th></tr>')
            for agent in grid.results.agents:
                cells = "".join(f"<td>{number(means[agent, n][level, k])}</td>" for n in names)
                body.append(f"<tr><th>{escape(agent)}</th>{cells}</tr>")
            body.append("</tbody>")
    return table(f"<tr><th></th>{groups}</tr><tr><th>model</th>{heads}</tr>", "".join(body))


COVERED = {
    "chosen_score_coverage": "score, chosen",
    "forced_score_coverage": "score, never shown",
    "chosen_expected_coverage": "expected score, chosen",
    "forced_expected_coverage": "expected score, never shown",
    "chosen_expected_bias": "bias, chosen",
    "forced_expected_bias": "bias, never shown",
}


def coverage_table(grid: Grid, model: str) -> str:
    """Coverage of the nominal 90 % intervals and the mean of prediction less expected score."""
    means = {name: t_interval(grid.of_model(model, name))[0] for name in COVERED}
    body = []
    for level in range(len(grid.results.noise)):
        heading = f'<tr class="level"><th colspan="{len(COVERED) + 1}">{level_name(grid, level)}</th></tr>'
        rows = "".join(
            f"<tr><th>{size:,}</th>" + "".join(f"<td>{number(means[n][level, k])}</td>" for n in COVERED) + "</tr>"
            for k, size in enumerate(grid.sizes)
        )
        body.append(f"<tbody>{heading}{rows}</tbody>")
    heads = "".join(f"<th>{title}</th>" for title in COVERED.values())
    return table(f"<tr><th>users</th>{heads}</tr>", "".join(body))


def level_name(grid: Grid, level: int) -> str:
    """A noise level with its reliability."""
    reliability = grid.results.reliability[level]
    named = f", reliability {reliability:z.2f}" if np.isfinite(reliability) else ""
    return f"ν = {grid.results.noise[level]:g}{named}"


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("-", "−") if np.isfinite(share) else "–"


# --------------------------------------------------------------------------------------------------------- figure


# From clean to noise: viridis cut before its yellow, which is too light on white; light and dark tell it to all eyes.
COLOURS = ("#440154", "#31688e", "#1f9e89", "#b5a000", "#d55e00")
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down")
SURE = "interval without 0"
DODGE = 0.03
"""Decades, between the whiskers of neighbouring noise levels."""


def figure(grid: Grid, model: str, subtitle: str, name: str = "table1") -> Figure:
    """A panel a measure: gain over the better baseline against log size, a line a noise level, hollow where the
    interval includes 0."""
    labels = [level_name(grid, level) for level in range(len(grid.results.noise))]
    shown = [k for k in range(len(labels)) if k < len(COLOURS)]
    colours = {labels[k]: COLOURS[_spread(k, len(shown))] for k in shown}
    rows: dict[str, list[dict[str, Any]]] = {}
    panels = []
    for number_of, measure in enumerate(MEASURES):
        data = f"panel {number_of + 1}"
        rows[data] = list(_points(grid, gain_of(grid, model, measure.metric), labels, shown))
        panels.append(_panel(grid, measure, data, colours, _domain(rows[data])))
    chart = alt.vconcat(
        alt.hconcat(*panels[:2], spacing=28), alt.hconcat(*panels[2:], spacing=28), spacing=22
    ).resolve_scale(color="shared", shape="shared")
    title = f"Table 1: gain of the reward model ({model}) over the better of the study's two baselines"
    return Figure(name, title, finished(Drawing(chart, rows), title, subtitle))


def _spread(k: int, n: int) -> int:
    """Of few levels, colours that are far apart."""
    return k if n < 2 else round(k * (len(COLOURS) - 1) / (n - 1))


def _points(grid: Grid, gain: Gain, labels: Sequence[str], shown: Sequence[int]) -> Iterator[dict[str, Any]]:
    middle = (len(shown) - 1) / 2
    for level in shown:
        for k, size in enumerate(grid.sizes):
            mean, half = float(gain.mean[level, k]), float(gain.half[level, k])
            if not np.isfinite(mean):
                continue
            known = bool(np.isfinite(half))
            yield {
                "level": labels[level],
                "noise": float(grid.results.noise[level]),
                "users": size,
                "x": float(size * 10 ** (DODGE * (level - middle))),
                "mean": mean,
                "low": mean - half if known else None,
                "high": mean + half if known else None,
                "sure": SURE if known and abs(mean) > half else "interval includes 0, or one seed",
                "verdict": gain.verdict(level, k),
            }


def _domain(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of the vertical axis: all means and 0, and whiskers as far as half that range: longer ones are cut off."""
    means = [0.0, *(row["mean"] for row in rows)]
    reach = 0.5 * max(max(means) - min(means), 1e-3)
    ends = [end for row in rows for end in (row["low"], row["high"]) if end is not None]
    low, high = max(min([*means, *ends]), min(means) - reach), min(max([*means, *ends]), max(means) + reach)
    return [low - 0.1 * reach, high + 0.1 * reach]


def _panel(grid: Grid, measure: Measure, data: str, colours: Mapping[str, str], y_domain: list[float]) -> Any:
    domain = [min(grid.sizes) / 1.5, max(grid.sizes) * 1.5]
    ratio = float(np.nanmean(grid.events_per_title() / np.array(grid.sizes)))
    axis = alt.Axis(
        values=list(grid.sizes),
        labelExpr=f"[format(datum.value, ','), format(datum.value * {ratio:g}, ',.0f')]",
        grid=False,
        labelOverlap=False,
    )
    x = alt.X(
        "x:Q", scale=alt.Scale(type="log", domain=domain, nice=False), axis=axis,
        title="training users (below: events a title)",
    )  # fmt: skip
    y_title = f"gain in {measure.unit}"
    present = list(colours)
    colour = alt.Color(
        "level:N", title="noise", scale=alt.Scale(domain=present, range=list(colours.values())),
        legend=alt.Legend(orient="right", labelLimit=260, symbolSize=80, symbolOpacity=1),
    )  # fmt: skip
    shape = alt.Shape(
        "level:N", title="noise",
        scale=alt.Scale(domain=present, range=[SHAPES[_spread(k, len(present))] for k in range(len(present))]),
        legend=alt.Legend(orient="right", labelLimit=260, symbolSize=80, symbolOpacity=1),
    )  # fmt: skip
    tooltip: list[Any] = [
        "level:N",
        alt.Tooltip("users:Q", format=","),
        alt.Tooltip("mean:Q", title=y_title, format="+.3f"),
        alt.Tooltip("low:Q", format="+.3f"),
        alt.Tooltip("high:Q", format="+.3f"),
        alt.Tooltip("verdict:N", title="at 5 % after Holm"),
    ]
    base = alt.Chart(alt.NamedData(name=data)).encode(x=x, color=colour, tooltip=tooltip)
    y = alt.Y("mean:Q", title=y_title, scale=alt.Scale(domain=y_domain, nice=False))
    low = alt.Y("low:Q", title=y_title)
    zero = alt.Chart(alt.Data(values=[{"y": 0.0}])).mark_rule(color="#999").encode(y=alt.Y("y:Q", title=y_title))
    whiskers = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.1, opacity=0.55, clip=True)
    lines = base.mark_line(strokeWidth=1.8, clip=True).encode(y=y)
    points = base.mark_point(size=62, strokeWidth=1.6, opacity=1, clip=True).encode(y=y, shape=shape)
    filled = points.transform_filter(f"datum.sure === '{SURE}'").encode(fill=colour)
    hollow = points.transform_filter(f"datum.sure !== '{SURE}'").encode(fill=alt.value("#ffffff"))
    layers = alt.layer(zero, whiskers.encode(y=low, y2="high:Q"), lines, hollow, filled)
    return layers.properties(width=330, height=230, title=measure.heading)


# ----------------------------------------------------------------------------------------------------------- page


HOW = """The study reports that its reward model had no significant gain over the user's mean and the title's mean in
error on held-out events, from O(millions) of users. Above left: that comparison here. Beside and below it, the same
predictions against what the study could not see. The means are taken over the training users; the model has validation
users beside them, for its kept state. Gains are RMSE of the better baseline (the better one on that very
measure, in hindsight) less RMSE of the model on the same events, ± half of the 95 % Student-t interval over seeds;
<i>gain</i> and <i>loss</i> are at 5 %, two-sided, after Holm's correction over all noise levels and log sizes of a
model and measure, which asks much of three seeds; <i>not after Holm</i>: the cell's own interval excludes 0. The gain
in Spearman's correlation within users is one that no bias of the score touches. The last gain is over a baseline that
the study does not have, the title's mean and the user's own above it added up: where it is 0, the model knows users and
titles apart, but nothing of this user with this title."""

SEEN = """<b>Seen in one world</b>: the share of worlds in which a test over the users of that world alone (z above
1.96), which is what a study of one data set has, finds the gain. <b>Best step</b>: after which share of its steps a
member stood at its best on validation users; a few percent mean that the log taught it next to nothing."""

EXPLAINED = """<b>Explained</b>: of the variance of observed scores
that could be explained at all, which is what the exact expectation explains; beside it the better baseline's.
<b>Floor</b>: RMSE of the exact expectation, which no model can go below. Since squared errors add up to the floor's, a
gain against the expectation shows in RMSE against scores only in proportion (RMSE to the expectation ÷ RMSE to the
score), about: noise hides it without there being less of it."""

NO_FLOOR = """This noise has a memory: a score tells of those to come, so that a model which reads the history may go
below the exact expectation, which leaves that out. There is no floor here, and a loss against the expected score may be
no fault."""

COVERAGE_NOTE = """Nominal 90 %. Score: split-conformal, by the ensemble's errors on validation users, who chose their
titles. Expected score: mean ± Student's t with M − 1 degrees of freedom × √(1 + 1/M) × the members' deviation, which
knows of no bias and of nothing that the history does not tell of the user. Bias: prediction less expected score. What
differs between chosen and never-shown titles is hidden confounding, and that models see only what was chosen."""

CAPTION = """Hollow: the 95 % interval over seeds includes 0. Whiskers: that interval. Above left is all that a study
of logged scores can see."""


def page(config: Mapping[str, Any], parts: Sequence[str], lines: Sequence[str], script: str) -> str:
    """The page.

    Args:
        config: of the run.
        parts: HTML of each world.
        lines: what must hold.
        script: defines ``vegaEmbed``.
    """
    title = " · ".join(str(config[key]) for key in ("suite", "preset") if config.get(key))
    marked = "".join(
        f"<li><b>{escape(line)}</b></li>" if line.startswith("FAILS") else f"<li>{escape(line)}</li>" for line in lines
    )
    body = [
        f"<h1>recsim_gr <span>{escape(title)}</span></h1><p class='note'>{HOW}</p>",
        *parts,
        f"<h3>Whatever the models learned</h3><ul>{marked}</ul>",
        config_table(config, "Configuration of the run"),
    ]
    return document(title, body, script)


def write_table1(run_dir: Path) -> tuple[Path, list[str]]:
    """Writes ``report.html`` and ``figures/``; the page, and lines worth printing.

    Raises:
        RunDirectoryError: the run cannot be read, or is another suite's.
    """
    run = read_run(run_dir)
    lines: list[str] = []
    laws: list[str] = []
    parts: list[str] = []
    written: set[str] = set()
    for name, results in run.worlds.items():
        grid, noise_model = Grid.of(results), name.split(" · ")[-1]
        with_floor = noise_model not in NOISE_WITH_MEMORY
        subtitle = _subtitle(run.config, noise_model, results)
        for model in grid.models:
            file = "table1" + (f"-{len(written) + 1}" if written else "")
            drawn = figure(grid, model, subtitle, file)
            picture = write_figure(run_dir / "figures", file, drawn)
            written.add(file)
            parts += [
                f"<h2>{escape(model)} head, {escape(noise_model)} noise</h2>",
                figure_element(file, drawn, picture, CAPTION),
                f"<p class='note'>{SEEN} {EXPLAINED if with_floor else NO_FLOOR}</p>"
                + gain_table(grid, model, with_floor),
                folded("Intervals", f"<p class='note'>{COVERAGE_NOTE}</p>" + coverage_table(grid, model)),
            ]
        parts.append(folded("All models: errors and rank correlations", model_table(grid)))
        lines += summary(grid, noise_model)
        laws += checks(grid, noise_model)
    for failure in run.failures:
        parts.append(f"<p class='note'>{escape(str(failure.get('cell')))}: {escape(str(failure.get('reason')))}</p>")
    remove_stale(run_dir / "figures", ("table1",), written)
    write_text(run_dir / "report.html", page(run.config, parts, laws, javascript()))
    return run_dir / "report.html", lines


def _subtitle(config: Mapping[str, Any], noise_model: str, results: Results) -> str:
    n = len(results.seeds)
    seeds = (
        f"mean over {n} seeds, whiskers 95 % Student-t, hollow where they include 0"
        if n > 1
        else "one seed, so no interval"
    )
    facts = [f"{noise_model} noise", f"{config.get('test_contexts')} test users", seeds]
    return " · ".join(facts)
