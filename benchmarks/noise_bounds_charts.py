"""Pictures of suite ``noise_bounds``: truth over the temperature as small multiples, and the bound."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import altair as alt
import numpy as np

from recsim_gr.benchmarks.charts import STYLES, Drawing, Figure, Row, finished
from recsim_gr.benchmarks.noise_bounds_measures import promised_loss
from recsim_gr.benchmarks.noise_bounds_results import (
    ENDLESS,
    ONE_SCORE,
    Grid,
    Way,
    best_of,
    log_name,
    trained_ways,
    ways,
)
from recsim_gr.benchmarks.statistics import t_interval

FIGURES = ("truth", "log_size", "trained", "bound")
"""Every file there can be."""

PAGE_WIDTH = 900
ENDLESS_WAY = Way(ENDLESS, "Exp-RSFT, endless log", judged="", learner="")
LOG_COLOURS = ("#b5a000", "#1f9e89", "#440154")
"""From the shortest log to the longest: viridis cut before its yellow."""


WITHOUT_ZERO = "slice(datum.label, 0, 2) === '0.' ? slice(datum.label, 1) : datum.label"
"""Labels of an axis: .25, not 0.25, where panels are narrow."""


class Line(NamedTuple):
    """A way to be drawn."""

    way: Way
    label: str
    colour: str
    dash: tuple[int, ...] = ()
    shape: str = "circle"


def truth_figure(grid: Grid, subtitle: str, name: str = "truth") -> Figure | None:
    """Tabular contexts: a row a catalogue, a column a σ."""
    middle = _middle(grid.config["events"])
    lines = [Line(ENDLESS_WAY, "endless log", "#8a8a8a", (6, 3), "triangle-up")]
    lines.append(Line(Way(ONE_SCORE, ONE_SCORE), "one score a title (the theorem's case)", "#000000", (), "square"))
    for agent, label in (("ExpRSFT", "Exp-RSFT"), ("ASFT", "A-SFT")):
        if log_name(agent, middle) in grid.results.agents:
            style = STYLES[agent]
            way = Way(log_name(agent, middle), label)
            lines.append(Line(way, f"{label}, log of {middle:,} events", style.colour, style.dash, style.shape))
    title = "Truth over the temperature, in tabular contexts"
    panels = [[(titles, level, lines, _name_of(grid, titles, level)) for level in range(len(grid.sigmas))]
              for titles in grid.catalogues]  # fmt: skip
    return _multiples(grid, panels, name, title, subtitle, "true value above V(μ)")


def size_figure(grid: Grid, subtitle: str, name: str = "log_size") -> Figure | None:
    """Tabular contexts of the middle catalogue: a row an agent, a column a σ, a colour a log size."""
    titles = _middle(grid.catalogues)
    rows = []
    for agent, label in (("ExpRSFT", "Exp-RSFT"), ("ASFT", "A-SFT")):
        lines = [Line(ENDLESS_WAY, "endless", "#8a8a8a", (6, 3), "triangle-up")]
        events = [n for n in grid.config["events"] if log_name(agent, n) in grid.results.agents]
        for k, n in enumerate(events):
            colour = LOG_COLOURS[k * (len(LOG_COLOURS) - 1) // max(len(events) - 1, 1)]
            lines.append(Line(Way(log_name(agent, n), label), f"{n:,} events", colour))
        if events:
            rows.append([(titles, level, lines, f"{label}, σ = {sigma:g}") for level, sigma in enumerate(grid.sigmas)])
    title = f"Truth over the temperature by the size of each context's log, {titles:,} titles"
    return _multiples(grid, rows, name, title, subtitle, "true value above V(μ)")


def trained_figure(grid: Grid, subtitle: str, name: str = "trained") -> Figure | None:
    """Trained agents: a row a catalogue and measure, a column a σ, whiskers over seeds."""
    rows = []
    found = trained_ways(grid)
    for kind, said in (("trained_value", "as sampled"), ("trained_top10", "top 10")):
        of_kind = [way for way in found if way.value == kind]
        lines = []
        for way in of_kind:
            style = STYLES.get(way.agent, STYLES["ASFT"])
            lines.append(Line(way, way.label.split(",")[0], style.colour, style.dash, style.shape))
        for titles in grid.catalogues:
            levels = [
                level
                for level in range(len(grid.sigmas))
                if any(grid.curve(way, way.value, titles, level).size for way in of_kind)
            ]
            if levels:
                rows.append([(titles, k, lines, f"{_name_of(grid, titles, k)}, {said}") for k in levels])
    title = "Truth over the temperature, of the trained agents"
    return _multiples(grid, rows, name, title, subtitle, "true value above BC")


def _middle(values: Sequence[int]) -> int:
    return sorted(values)[len(values) // 2]


def _name_of(grid: Grid, titles: int, level: int) -> str:
    return f"{titles:,} titles, σ = {grid.sigmas[level]:g}"


Panel = tuple[int, int, list[Line], str]


def _multiples(
    grid: Grid, panels: Sequence[Sequence[Panel]], name: str, title: str, subtitle: str, y_title: str
) -> Figure | None:
    """Small multiples, a row of panels after the other; panels of one column share their vertical axis."""
    placed = [
        [list(_points(grid, panel, f"{j}.{k}")) for k, panel in enumerate(across)] for j, across in enumerate(panels)
    ]
    rows = [row for across in placed for points in across for row in points]
    if not rows:
        return None
    columns = max(len(across) for across in placed)
    domains = [_domain([row for across in placed for points in across[k : k + 1] for row in points])
               for k in range(columns)]  # fmt: skip
    legend = {line.label: line for across in panels for _, _, lines, _ in across for line in lines}
    size = {"width": PAGE_WIDTH // columns - 55, "height": 150}
    drawn = []
    for j, across in enumerate(panels):
        bottom, row = j == len(panels) - 1, []
        for k, panel in enumerate(across):
            y = alt.Y("mean:Q", title=y_title if k == 0 else None, axis=alt.Axis(tickCount=4),
                      scale=alt.Scale(domain=domains[k], nice=False))  # fmt: skip
            points = alt.Chart(alt.NamedData(name="points")).transform_filter(f"datum.panel === '{j}.{k}'")
            x = _temperature_axis(grid, panel, bottom)
            row.append(_panel(points, x, y, legend, grid.sigmas[panel[1]]).properties(title=panel[3], **size))
        drawn.append(alt.hconcat(*row, spacing=14))
    chart = alt.vconcat(*drawn, spacing=12).resolve_scale(color="shared", shape="shared")
    return Figure(name, title, finished(Drawing(chart, {"points": rows}), title, subtitle))


def _points(grid: Grid, panel: Panel, key: str) -> Iterator[Row]:
    """A row a temperature and line: the mean over seeds of the paired difference to λ = ∞."""
    titles, level, lines, _ = panel
    for line in lines:
        values = grid.curve(line.way, line.way.value, titles, level)
        above = grid.above(line.way, grid.imitation(line.way, titles, level), titles, level)
        if not above.size:
            continue
        mean, half, _ = t_interval(above)
        best = best_of(values)
        for k, temperature in enumerate(grid.temperatures(line.way, titles)):
            known = bool(np.isfinite(half[k]))
            yield {
                "panel": key,
                "line": line.label,
                "temperature": temperature,
                "mean": float(mean[k]),
                "low": float(mean[k] - half[k]) if known else None,
                "high": float(mean[k] + half[k]) if known else None,
                "best": k == best,
            }


def _domain(rows: Sequence[Row]) -> list[float]:
    """Of the vertical axis: all means and 0, and whiskers as far as a third of that range."""
    means = [0.0, *(row["mean"] for row in rows)]
    reach = max(max(means) - min(means), 0.02) / 3
    ends = [end for row in rows for end in (row["low"], row["high"]) if end is not None]
    low, high = max(min([*means, *ends]), min(means) - reach), min(max([*means, *ends]), max(means) + reach)
    return [low - 0.06 * (high - low), high + 0.06 * (high - low)]


def _temperature_axis(grid: Grid, panel: Panel, bottom: bool) -> alt.X:
    titles, _, lines, _ = panel
    tried = sorted({t for line in lines for t in grid.temperatures(line.way, titles)})
    labelled = [t for k, t in enumerate(tried) if len(tried) <= 6 or k % 2 == 0]
    return alt.X(
        "temperature:Q",
        title="λ (β of A-SFT)" if bottom else None,
        scale=alt.Scale(type="log", domain=[tried[0] / 1.4, tried[-1] * 1.4], nice=False),
        axis=alt.Axis(values=labelled, format="~g", grid=False, labelOverlap=True, labelExpr=WITHOUT_ZERO),
    )


def _panel(points: Any, x: alt.X, y: alt.Y, legend: Mapping[str, Line], sigma: float) -> Any:
    """Lines with whiskers, the best of each ringed, and a dotted line at λ = σ."""
    look = list(legend.values())
    keys = alt.Legend(title=None, orient="top", direction="vertical", columns=2, labelLimit=320, symbolOpacity=1)
    colour, shape = (
        kind("line:N", legend=keys, scale=alt.Scale(domain=list(legend), range=values))
        for kind, values in ((alt.Color, [line.colour for line in look]), (alt.Shape, [line.shape for line in look]))
    )
    tooltip: list[Any] = ["line:N", alt.Tooltip("temperature:Q", title="λ", format="~g")]
    tooltip += [alt.Tooltip(f"{name}:Q", format="+.3f") for name in ("mean", "low", "high")]
    base = points.encode(x=x, color=colour, tooltip=tooltip)
    whiskers = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1, opacity=0.5, clip=True)
    ringed = base.transform_filter("datum.best").mark_point(
        size=130, strokeWidth=1.6, filled=False, clip=True, opacity=1, shape="circle"
    )
    dash = _dashes({label: line.dash for label, line in legend.items()})
    at_sigma = alt.Chart(alt.Data(values=[{"x": sigma}] if sigma > 0 else []))
    return alt.layer(
        _zero(y),
        at_sigma.mark_rule(color="#bbb", strokeDash=[2, 3], clip=True).encode(x=alt.X("x:Q")),
        whiskers.encode(y=alt.Y("low:Q", title=y["title"]), y2="high:Q"),
        base.mark_line(strokeWidth=1.7, clip=True).encode(y=y, strokeDash=dash),
        base.mark_point(size=22, filled=True, clip=True, opacity=1).encode(y=y, shape=shape),
        ringed.encode(y=y),
    )


def _zero(y: alt.Y) -> Any:
    zero = alt.Chart(alt.Data(values=[{"y": 0.0}]))
    return zero.mark_rule(color="#999").encode(y=alt.Y("y:Q", title=y["title"]))


def _dashes(dashes: Mapping[str, Sequence[int]]) -> Any:
    """By conditions, since a field would enter the legend."""
    return alt.StrokeDashValue(
        [1, 0],
        condition=[
            {"test": f"datum.line === '{_quoted(line)}'", "value": list(dash)} for line, dash in dashes.items() if dash
        ],
    )


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")


# ------------------------------------------------------------------------------------------------------------ bound


def bound_figure(grid: Grid, subtitle: str, name: str = "bound") -> Figure:
    """A panel a catalogue, over σ: what is promised at worst, and what came at worst."""
    rows = [row for titles in grid.catalogues for row in _bound_rows(grid, titles)]
    x = alt.X(
        "sigma:Q",
        title="σ, deviation of the noise",
        scale=alt.Scale(type="log", nice=False, domain=[min(_noisy(grid)) / 1.2, max(_noisy(grid)) * 1.2]),
        axis=alt.Axis(values=_noisy(grid), format="~g", grid=False),
    )
    colour = alt.Color(
        "line:N",
        scale=alt.Scale(domain=list(BOUND_LOOK), range=[colour for colour, _ in BOUND_LOOK.values()]),
        legend=alt.Legend(title=None, orient="top", direction="vertical", columns=2, labelLimit=420),
    )
    tooltip: list[Any] = ["line:N", alt.Tooltip("sigma:Q", title="σ"), alt.Tooltip("mean:Q", format="+.3f")]
    dash = _dashes({line: dash for line, (_, dash) in BOUND_LOOK.items()})
    panels = []
    for k, titles in enumerate(grid.catalogues):
        y = alt.Y("mean:Q", title="V(π) − V(μ), in points" if k == 0 else None,
                  scale=alt.Scale(domain=[DEEPEST, 1.7], nice=False))  # fmt: skip
        base = alt.Chart(alt.NamedData(name="bound")).transform_filter(f"datum.titles === {titles}")
        base = base.encode(x=x, y=y, color=colour, tooltip=tooltip)
        lines = base.mark_line(strokeWidth=1.8, clip=True).encode(strokeDash=dash)
        points = base.transform_filter("datum.measured").mark_point(size=34, filled=True, opacity=1, clip=True)
        panel = alt.layer(_zero(y), lines, points)
        panels.append(
            panel.properties(width=PAGE_WIDTH // len(grid.catalogues) - 55, height=250, title=f"{titles:,} titles")
        )
    title = "The bound against what came"
    chart = alt.hconcat(*panels, spacing=16).resolve_scale(color="shared")
    return Figure(name, title, finished(Drawing(chart, {"bound": rows}), title, subtitle))


def _noisy(grid: Grid) -> list[float]:
    """The σ that stand on a logarithmic axis; 1 where there are none."""
    return [sigma for sigma in grid.sigmas if sigma > 0] or [1.0]


DEEPEST = -4.6
"""Points: the vertical axis ends a little below the range of satisfaction."""

PROMISED, FLOOR = (
    "promised: not below −2σ·sqrt(2 ln(2|A|/δ))",
    "the worst title in place of μ: no policy is below on average",
)
WORST, MEAN = "came at worst (quantile δ of contexts, over all λ)", "came on average, at the best λ"
BOUND_LOOK: Mapping[str, tuple[str, tuple[int, ...]]] = {
    PROMISED: ("#d55e00", (6, 3)),
    FLOOR: ("#8a8a8a", (2, 3)),
    WORST: ("#000000", ()),
    MEAN: ("#0072b2", ()),
}


def _bound_rows(grid: Grid, titles: int) -> Iterator[Row]:
    """Of the theorem's case: the promise as a curve, and means over seeds of what came."""
    at = {"titles": titles}
    for sigma in np.geomspace(min(_noisy(grid)), max(_noisy(grid)), 60).tolist():
        promise = -promised_loss(sigma, titles, grid.delta)
        yield {**at, "sigma": sigma, "line": PROMISED, "mean": promise, "measured": False}
    way = ways(grid)[0]
    for level, sigma in enumerate(grid.sigmas):
        values = grid.curve(way, way.value, titles, level)
        mu = grid.of_seeds("value_mu", titles, level)
        above = grid.above(way, mu, titles, level)
        if sigma == 0 or not above.size:
            continue
        came = {
            FLOOR: grid.of_seeds("value_least", titles, level) - mu,
            WORST: grid.of_way(way, "lowest", titles, level),
            MEAN: above[best_of(values)],
        }
        for line, samples in came.items():
            mean = float(t_interval(samples)[0])
            if np.isfinite(mean):
                yield {**at, "sigma": sigma, "line": line, "mean": mean, "measured": line != FLOOR}
