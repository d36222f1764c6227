"""The report's pictures as Vega-Lite specifications: one description for SVG, PNG and the interactive page.

No picture depends on which agents or metrics are there: what is missing is left out, and so is a picture
with nothing to show. Positions along the noise axis are spaced by the *correlation* of score and truth, the
signed root of the reliability: half of all noise levels lie below .2 and would otherwise be one blot.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import altair as alt
import numpy as np

from recsim_gr.benchmarks.statistics import Comparison, FloatArray, Results, compare, t_interval

Row = dict[str, Any]
Series = Mapping[str, tuple[FloatArray, FloatArray]]  # agent to (mean, half width of the whisker), each (N,)

REFERENCE = "BC"
CEILING = "Oracle"
HEADLINE = "value_top10"

WIDTH, HEIGHT = 760, 380  # with a legend of 150 it fits a page 1,000 wide
RELIABILITY_TICKS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.01, 0.0)
DODGE = 0.008  # of the axis, between neighbouring agents: a whisker's width at 760 pixels


@dataclass(frozen=True)
class Style:
    """How an agent is drawn; ``role`` is learner, reference, baseline (untrained) or ceiling (knows more)."""

    colour: str
    shape: str = "circle"
    dash: tuple[int, ...] = ()
    role: str = "learner"


# Learners: Okabe and Ito's colours, then Tol's, made for colour-blind readers; dash and shape say it again.
# What is no learner is grey: six lines compete for the eye, not eleven.
STYLES: Mapping[str, Style] = {
    "Oracle": Style("#5c5c5c", "triangle-up", (10, 3), "ceiling"),
    "ScoreOracle": Style("#8a8a8a", "triangle-down", (6, 3), "ceiling"),
    "TruthSupervised": Style("#747474", "triangle-right", (8, 3, 2, 3), "ceiling"),
    "OnlinePPO": Style("#747474", "triangle-left", (4, 2), "ceiling"),
    "BC": Style("#000000", "circle", (), "reference"),
    "RewardWeightedBC": Style("#56b4e9", "square", (7, 2)),
    "ASFT": Style("#d55e00", "circle"),
    "CQL": Style("#009e73", "triangle-up", (9, 2, 2, 2)),
    "PPO": Style("#0072b2", "diamond", (4, 2)),
    "RSDPO": Style("#cc79a7", "triangle-down"),
    "ExpRSFT": Style("#e69f00", "cross", (5, 2)),
    "GRPO": Style("#332288", "square"),
    "RSIPO": Style("#882255", "triangle-right", (3, 2)),
    "IPS": Style("#999933", "triangle-left", (7, 2, 2, 2)),
    "Pretrained": Style("#a0a0a0", "square", (2, 2), "baseline"),
    "Popularity": Style("#b0b0b0", "diamond", (2, 4), "baseline"),
    "Random": Style("#c0c0c0", "cross", (1, 3), "baseline"),
}
# Agents of users: other colours than those above, with another dash each time the colours come round again.
SPARE_COLOURS = ("#6a3d9a", "#8b5a2b", "#17a2b8", "#b59f00", "#8b0000", "#6699cc")
SPARE_DASHES: tuple[tuple[int, ...], ...] = ((), (6, 2), (2, 2), (9, 2, 2, 2))
SPARE_SHAPES = ("diamond", "square", "circle", "triangle-up", "cross", "triangle-down")
ROLES = ("ceiling", "reference", "learner", "baseline")


def styles_of(agents: Sequence[str]) -> dict[str, Style]:
    """A style for each agent, ordered as in a legend: ceilings, the reference, learners, baselines.

    Known names look the same in every report; others draw from the spare styles in alphabetical order.
    """
    known = {agent: STYLES[agent] for agent in agents if agent in STYLES}
    for k, agent in enumerate(sorted(set(agents) - set(known))):
        turn, colour = divmod(k, len(SPARE_COLOURS))
        dash = SPARE_DASHES[turn % len(SPARE_DASHES)]
        known[agent] = Style(SPARE_COLOURS[colour], SPARE_SHAPES[colour], dash)
    order = list(STYLES)
    rank = {
        agent: (ROLES.index(style.role), order.index(agent) if agent in order else len(order), agent)
        for agent, style in known.items()
    }
    return {agent: known[agent] for agent in sorted(known, key=rank.__getitem__)}


def learners_of(agents: Sequence[str]) -> tuple[str, ...]:
    """The agents that a claim is made about: those trained on the log or in the reward model."""
    return tuple(agent for agent, style in styles_of(agents).items() if style.role == "learner")


def headline(results: Results) -> dict[str, Comparison]:
    """Every agent's top-10 true value against the reference's, Holm's family being the learners."""
    return compare(results, HEADLINE, REFERENCE, CEILING, learners_of(results.agents))


# -------------------------------------------------------------------------------------------- the noise axis


@dataclass(frozen=True)
class NoiseAxis:
    """The horizontal axis of the pictures over noise: reliability, or the dial where none was measured.

    Attributes:
        levels: ``(N,)`` positions in the axis' own unit.
        encoding: of the axis, but for the field.
        reliability: whether the unit is reliability.
    """

    levels: FloatArray
    encoding: Row
    reliability: bool

    def positions(self, offset: float) -> FloatArray:
        """``(N,)`` positions moved by a share of the axis, so that whiskers stand side by side."""
        return _signed_square(_signed_root(self.levels) - offset) if self.reliability else self.levels + offset


def noise_axis(results: Results) -> NoiseAxis:
    """Reliability from 1 (left) to 0 (right), or the noise dial from its least setting."""
    if len(results.noise) and np.isfinite(results.reliability).all():
        roots = _signed_root(results.reliability)
        low, high = min(0.0, float(roots.min())) - 0.05, 1.04
        domain = [float(_signed_square(np.float64(edge))) for edge in (low, high)]
        scale = {"type": "sqrt", "domain": domain, "reverse": True, "nice": False}
        axis = {"values": list(RELIABILITY_TICKS), "format": "~g", "grid": False, "labelOverlap": "greedy"}
        title = "within-user reliability of the score (1 = clean), spaced by correlation"
        return NoiseAxis(results.reliability, {"scale": scale, "axis": axis, "title": title}, True)
    low, high = (float(results.noise.min()), float(results.noise.max())) if len(results.noise) else (0.0, 1.0)
    margin = 0.05 * max(high - low, 0.1)
    scale = {"type": "linear", "domain": [low - margin, high + margin], "nice": False}
    axis = {"values": [float(v) for v in results.noise], "format": "~g", "grid": False}
    return NoiseAxis(results.noise, {"scale": scale, "axis": axis, "title": "reward noise ν (the dial)"}, False)


def _signed_root(x: Any) -> Any:
    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: Any) -> Any:
    return np.sign(x) * np.square(x)


# ------------------------------------------------------------------------------------------------------ rows


def line_rows(results: Results, series: Series, axis: NoiseAxis) -> list[Row]:
    """One row a point: agent, level, dodged position, mean and whisker ends (None where unknown).

    Args:
        results: for the levels.
        series: agent to ``(mean (N,), half_width (N,))``.
        axis: gives the positions.
    """
    drawn = [agent for agent in styles_of(tuple(series)) if np.isfinite(series[agent][0]).any()]
    learners = learners_of(drawn)
    rows = []
    for agent in drawn:
        # Grey lines stay on the level itself: only the learners' whiskers have to be told apart.
        steps = learners.index(agent) - (len(learners) - 1) / 2 if agent in learners else 0.0
        positions = axis.positions(DODGE * steps)
        for level, (mean, half) in enumerate(zip(*series[agent], strict=True)):
            if np.isfinite(mean):
                rows.append({**_level(results, level), "agent": agent, "x": float(positions[level]),
                             "mean": float(mean), "half": _number(half),
                             "low": _number(mean - half), "high": _number(mean + half)})  # fmt: skip
    return rows


def point_rows(results: Results, x_metric: str, y_metric: str) -> list[Row]:
    """One row an (agent, level): the means over seeds of two metrics, where both are known."""
    rows: list[Row] = []
    for agent in reversed(styles_of(results.agents)):  # so that grey points lie below the others
        x, y = (t_interval(results.of(agent, metric))[0] for metric in (x_metric, y_metric))
        rows += [
            {**_level(results, level), "agent": agent, "x": float(x[level]), "y": float(y[level])}
            for level in np.flatnonzero(np.isfinite(x) & np.isfinite(y)).tolist()
        ]
    return rows


def mean_series(results: Results, metric: str) -> Series:
    """Agent to the mean of a metric over seeds and the half width of its interval, each ``(N,)``."""
    return {agent: t_interval(results.of(agent, metric))[:2] for agent in results.agents}


def _level(results: Results, level: int) -> Row:
    return {"noise": float(results.noise[level]), "reliability": _number(results.reliability[level])}


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def readable_domain(rows: Sequence[Row], include: Sequence[float] = (0.0,)) -> tuple[float, float]:
    """Range of the axis that keeps the learners apart: their points, whiskers within reason, and ``include``.

    Points far out (beyond Tukey's outer fences, three interquartile ranges) stay outside: one collapsed agent
    would press all others into a line. So do whiskers longer than half the range of the points.
    """
    style = styles_of([row["agent"] for row in rows])
    inside = [row for row in rows if style[row["agent"]].role in ("learner", "reference")] or list(rows)
    means = np.array([row["mean"] for row in inside])
    lower, upper = np.quantile(means, [0.25, 0.75])
    fence = 3 * max(upper - lower, 1e-9)
    kept = means[(means >= lower - fence) & (means <= upper + fence)]
    low, high = min([kept.min(), *include]), max([kept.max(), *include])
    reach = 0.5 * max(high - low, 1e-6)
    ends = [end for row in inside for end in (row["low"], row["high"]) if end is not None]
    low = max(min([low, *ends]), low - reach)
    high = min(max([high, *ends]), high + reach)
    margin = 0.04 * max(high - low, 1e-3)
    return float(low - margin), float(high + margin)


# ----------------------------------------------------------------------------------------------------- marks


def agent_scales(agents: Sequence[str], with_legend: bool) -> dict[str, Any]:
    """Colour, shape and dash by agent, and the legend where this is the panel that carries it."""
    style = styles_of(agents)
    look = alt.Legend(title="agent", symbolSize=80, symbolOpacity=1, labelLimit=190, rowPadding=3)
    legend = look if with_legend else None

    def scale(values: list[Any]) -> alt.Scale:
        return alt.Scale(domain=list(style), range=values)

    return {
        "color": alt.Color("agent:N", scale=scale([s.colour for s in style.values()]), legend=legend),
        "shape": alt.Shape("agent:N", scale=scale([s.shape for s in style.values()]), legend=legend),
        # By conditions, since a field would enter the legend, where dashes fray the outline of the shapes.
        "strokeDash": alt.StrokeDashValue(
            [1, 0],
            condition=[
                {"test": f"datum.agent === {json.dumps(agent)}", "value": list(s.dash)}
                for agent, s in style.items()
                if s.dash
            ],
        ),
    }


OWNER = "points_with_legend"
"""Name of the view that owns the selection; a name of its own keeps specifications the same, run after run."""


def isolate() -> alt.Parameter:
    """The selection behind the legend: click for one agent, shift-click for more, double-click for all.

    One panel of a picture has the legend and owns the selection, its other panels only refer to it by name:
    Vega-Lite 6 binds no selection to a legend that panels share.
    """
    return alt.selection_point(name="isolate", fields=["agent"], bind="legend")


def lines(
    rows: Sequence[Row],
    axis: NoiseAxis,
    y_title: str,
    domain: tuple[float, float],
    *,
    whiskers: bool = True,
    overview: tuple[float, float] | None = None,
    height: int = HEIGHT,
    width: int = WIDTH,
    zero: float | None = 0.0,
    legend: bool = True,
) -> Any:
    """A line an agent over the noise axis, with whiskers and points; what leaves ``domain`` is cut off.

    The rows are referred to as a data set named ``y_title``. ``overview`` makes the panel a companion of another: it
    shades that one's range and repeats no title.
    """
    data = alt.NamedData(name=y_title)
    x = alt.X("x:Q", **({**axis.encoding, "title": None} if overview else axis.encoding))
    y = alt.Y("mean:Q", title=y_title, scale=alt.Scale(domain=list(domain), nice=False, zero=False))
    scales = agent_scales([row["agent"] for row in rows], legend)
    selection = isolate()
    shown = alt.condition(selection, alt.value(1.0), alt.value(0.07))
    tooltip = _line_tooltip(y_title)
    base = alt.Chart(data).encode(x=x, color=scales["color"], opacity=shown, tooltip=tooltip)
    layers: list[Any] = [_level_marks(rows, axis, x, named=overview is None)]
    if overview:
        band = alt.Chart(alt.Data(values=[dict(zip(("low", "high"), overview, strict=True))]))
        layers.append(band.mark_rect(color="#f4f1e6").encode(y=alt.Y("low:Q", title=y_title), y2="high:Q"))
    if zero is not None:
        rule = alt.Chart(alt.Data(values=[{"y": zero}]))
        layers.append(rule.mark_rule(color="#999", strokeWidth=1).encode(y=alt.Y("y:Q", title=y_title)))
    if whiskers:
        faint = alt.condition(selection, alt.value(0.45), alt.value(0.03))
        bars = base.transform_filter("isValid(datum.low)").mark_rule(clip=True, strokeWidth=1.2)
        layers.append(bars.encode(y=alt.Y("low:Q", title=y_title), y2="high:Q", opacity=faint))
    layers.append(
        base.mark_line(clip=True, strokeWidth=2).encode(
            y=y, order=alt.Order("noise:Q"), strokeDash=scales["strokeDash"]
        )
    )
    points = base.mark_point(clip=True, filled=True, size=48).encode(y=y, shape=scales["shape"])
    layers.append(points.properties(name=OWNER).add_params(selection) if legend else points)
    return alt.layer(*layers).properties(width=width, height=height)


def scatter(
    rows: Sequence[Row],
    agents: Sequence[str],
    x: alt.X,
    y: alt.Y,
    title: str,
    identity: tuple[float, float] | None,
    legend: bool,
    size: int = 215,
) -> Any:
    """A small panel with a point an agent; ``identity`` draws the diagonal between its two ends."""
    scales, selection = agent_scales(agents, legend), isolate()
    shown = alt.condition(selection, alt.value(1.0), alt.value(0.07))
    level = [_tip("noise", "reward noise ν"), _tip("reliability", "reliability")]
    tooltip = ["agent:N", *level, _tip("x", x["title"]), _tip("y", y["title"])]
    points = alt.Chart(alt.Data(values=list(rows))).mark_point(filled=True, size=70, clip=True)
    points = points.encode(x=x, y=y, color=scales["color"], shape=scales["shape"], opacity=shown, tooltip=tooltip)
    layers: list[Any] = []
    if identity is not None:
        ends = alt.Data(values=[{"x": end, "y": end} for end in identity])
        layers.append(alt.Chart(ends).mark_line(color="#999", strokeWidth=1).encode(x=x, y=y))
    layers.append(points.properties(name=OWNER).add_params(selection) if legend else points)
    return alt.layer(*layers).properties(width=size, height=size, title=title)


def _level_marks(rows: Sequence[Row], axis: NoiseAxis, x: alt.X, named: bool) -> Any:
    """A hairline at each noise level, ``named`` by the dial where the names do not overlap."""
    levels = sorted({(row["noise"], row["reliability"]) for row in rows}, key=lambda level: level[0])
    marks, last = [], -np.inf
    for noise, reliability in levels:
        at = reliability if axis.reliability else noise
        place = float(-_signed_root(np.float64(at))) if axis.reliability else noise
        room = place - last > 0.055
        last = place if room else last
        marks.append({"x": at, "label": f"ν = {noise:g}" if named and room else ""})
    base = alt.Chart(alt.Data(values=marks)).encode(x=x)
    hairlines = base.mark_rule(color="#e6e6e6", strokeWidth=1)
    names = base.mark_text(baseline="bottom", dy=-4, fontSize=10, color="#777").encode(y=alt.value(0), text="label:N")
    return alt.layer(hairlines, names)


def _line_tooltip(title: str) -> list[Any]:
    return ["agent:N", _tip("noise", "reward noise ν"), _tip("reliability", "reliability"),
            _tip("mean", title), _tip("half", "± (95 %, Student-t)")]  # fmt: skip


def _tip(field: str, title: str) -> alt.Tooltip:
    return alt.Tooltip(f"{field}:Q", title=title, format=".3~f")


# --------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Figure:
    """A picture of the report: its file name, its heading, and its Vega-Lite specification."""

    name: str
    title: str
    spec: Row


class Drawing(NamedTuple):
    """A chart and the rows of the data sets that it names; inside of the chart Altair would copy them 30 times."""

    chart: Any
    rows: dict[str, list[Row]]


FIGURES = ("landscape", "place", "judge_against_truth", "overoptimisation", "support", "offline_metrics")
"""Every figure there can be; the results decide which are drawn."""

WITH_WHISKERS = ("landscape", "place", "overoptimisation")
COLUMNS, PANELS = 3, 6
"""Of the pictures with a panel a noise level: panels in a row, and in all (of more levels, these many)."""


def figures(results: Results, subtitle: str) -> list[Figure]:
    """Every picture that the results allow, in the order of the page; ``subtitle`` says what was run."""
    whiskers = ", whiskers: 95 % Student-t" if len(results.seeds) > 1 else ""
    made: list[tuple[str, Drawing | None]] = [
        ("Landscape: what post-training adds to satisfaction as rewards get noisier", _landscape(results)),
        (f"Place on the way from {REFERENCE} (0) to {CEILING} (1)", _place(results)),
        ("The reward model as a judge, against the truth", _judge(results)),
        ("What the judge promises beyond the score, and the score beyond the truth", _gaps(results)),
        ("What the value cost in distance from the pretrained policy", _support(results)),
        ("Offline metrics: ranking the next logged title", _offline(results)),
    ]
    return [
        Figure(name, title, finished(drawing, title, subtitle + whiskers * (name in WITH_WHISKERS)))
        for name, (title, drawing) in zip(FIGURES, made, strict=True)
        if drawing is not None
    ]


def _landscape(results: Results) -> Drawing | None:
    """Two panels on one axis: the learners' range with whiskers, and everything at full range."""
    series, zero, y_title = mean_series(results, HEADLINE), None, "true top-10 value (1–5)"
    compared = headline(results)
    if any(np.isfinite(c.difference).any() for c in compared.values()):
        # whiskers for what claims are made about; those of the far-off baselines would cross the whole picture
        learners, none = learners_of(results.agents), np.full(len(results.noise), np.nan)
        series = {a: (c.difference, c.half_width if a in learners else none) for a, c in compared.items()}
        zero, y_title = 0.0, f"true top-10 value above {REFERENCE}"
    rows = line_rows(results, series, noise_axis(results))
    if not rows:
        return None
    shown = [row for row in rows if row["agent"] in learners_of(results.agents)] or rows
    near = readable_domain(shown, () if zero is None else (zero,))
    whole = _padded([*(row["mean"] for row in rows), *near])
    overview: Row = {"height": 130, "whiskers": False, "overview": near, "legend": False}
    return _together(
        alt.vconcat,
        _over_noise(results, series, y_title, zero=zero, domain=near),
        _over_noise(results, series, "whole range", zero=zero, domain=whole, **overview),
        spacing=14,
    )


def _place(results: Results) -> Drawing | None:
    series = {agent: (c.place, c.place_half_width) for agent, c in headline(results).items()}
    return _over_noise(results, series, "place", include=(0.0, 1.0))


def _gaps(results: Results) -> Drawing | None:
    titles = {
        "overoptimisation": "judge − expected score",
        "misalignment": "expected score − satisfaction",
    }
    return _metric_panels(results, titles, alt.vconcat, height=230)


def _offline(results: Results) -> Drawing | None:
    titles = {"ndcg10": "NDCG@10, users of high score", "ndcg10_true": "NDCG@10, users of high satisfaction"}
    size: Row = {"height": 270, "width": WIDTH // 2 - 30}
    return _metric_panels(results, titles, alt.hconcat, zero=None, whiskers=False, **size)


def _metric_panels(
    results: Results, titles: Mapping[str, str], concat: Callable[..., Any], **how: Any
) -> Drawing | None:
    """A panel over the noise axis for each metric that has a value, or None without any."""
    known = [m for m in titles if any(np.isfinite(results.of(a, m)).any() for a in results.agents)]
    # The legend stands to the right of its panel: of the first in a column, of the last in a row.
    owner = known[:1] if concat is alt.vconcat else known[-1:]
    panels = [_over_noise(results, mean_series(results, m), titles[m], legend=m in owner, **how) for m in known]
    return _together(concat, *panels, spacing=28) if panels else None


def _judge(results: Results) -> Drawing | None:
    rows = point_rows(results, "judge_return", "value_return")
    if not rows:
        return None
    ends = [row[axis] for row in rows for axis in "xy"]
    domain = _padded(ends)
    x = alt.X("x:Q", title="value by the judge", scale=_linear(domain), axis=alt.Axis(tickCount=5))
    y = alt.Y("y:Q", title="true value", scale=_linear(domain))
    return _by_level(results, rows, x, y, identity=domain)


def _support(results: Results) -> Drawing | None:
    rows = point_rows(results, "kl_ref", HEADLINE)
    if not rows:
        return None
    furthest = 1.05 * max(0.1, *(row["x"] for row in rows))
    # A little below zero, where the pretrained policy itself stands, lest its point be cut in half.
    spaced = alt.Scale(type="sqrt", domain=[-0.002 * furthest, furthest], nice=False)
    x = alt.X("x:Q", title="KL from pretrained (nats)", scale=spaced, axis=alt.Axis(tickCount=5, labelFlush=False))
    y = alt.Y("y:Q", title="true top-10 value", scale=_linear(_padded([row["y"] for row in rows])))
    return _by_level(results, rows, x, y, identity=None)


def _padded(ends: Sequence[float]) -> tuple[float, float]:
    pad = 0.05 * max(max(ends) - min(ends), 0.05)
    return min(ends) - pad, max(ends) + pad


def _linear(domain: tuple[float, float]) -> alt.Scale:
    return alt.Scale(domain=list(domain), nice=False, zero=False)


def _over_noise(
    results: Results,
    series: Series,
    y_title: str,
    *,
    zero: float | None = 0.0,
    include: Sequence[float] = (),
    domain: tuple[float, float] | None = None,
    **how: Any,
) -> Drawing | None:
    """One panel of lines over the noise axis, or None without a point; ``zero`` draws a horizontal there."""
    axis = noise_axis(results)
    rows = line_rows(results, series, axis)
    if not rows:
        return None
    horizontal = () if zero is None else (zero,)
    domain = domain or readable_domain(rows, (*include, *horizontal))
    return Drawing(lines(rows, axis, y_title, domain, zero=zero, **how), {y_title: rows})


def _by_level(
    results: Results, rows: Sequence[Row], x: alt.X, y: alt.Y, identity: tuple[float, float] | None
) -> Drawing:
    """A scatter panel a noise level, three in a row, all on the same scales."""
    agents, panels = [row["agent"] for row in rows], []
    shown = np.unique(np.linspace(0, len(results.noise) - 1, PANELS).round().astype(int)).tolist()
    owner = shown[min(len(shown), COLUMNS) - 1]  # the last panel of the first row has the legend beside it
    for level in shown:
        noise, reliability = results.noise[level], results.reliability[level]
        of_level = [row for row in rows if row["noise"] == noise]
        title = f"ν = {noise:g}" + (f", reliability {reliability:z.2f}" if np.isfinite(reliability) else "")
        panel = scatter(of_level, agents, x, y, title, identity, legend=level == owner)
        panels.append(Drawing(panel, {}))
    return _together(alt.concat, *panels, columns=COLUMNS, spacing=22)


def _together(concat: Callable[..., Any], *panels: Drawing | None, **how: Any) -> Drawing:
    """Several panels as one picture, with one legend: that of the panel which has one."""
    drawn = [panel for panel in panels if panel is not None]
    chart = concat(*(panel.chart for panel in drawn), **how)
    rows = {name: rows for panel in drawn for name, rows in panel.rows.items()}
    return Drawing(chart.resolve_legend(color="independent", shape="independent"), rows)


def finished(drawing: Drawing, title: str, subtitle: str) -> Row:
    """The specification of a chart with its heading, the lines of the subtitle below it, and the report's look."""
    heading = alt.TitleParams(
        title,
        subtitle=subtitle.split("\n"),
        anchor="start",
        fontSize=15,
        fontWeight="bold",
        subtitleFontSize=11,
        subtitleColor="#666",
        offset=14,
    )
    plain = {"titleFontWeight": "normal", "titleFontSize": 12}
    axis = {"gridColor": "#f0f0f0", "domainColor": "#999", "tickColor": "#999", "labelColor": "#444"}
    config = {
        "font": "Helvetica, Arial, sans-serif",
        "view": {"stroke": "#ddd"},
        "axis": {**axis, **plain, "titleColor": "#222", "labelFontSize": 11},
        "title": {"fontSize": 12, "fontWeight": "normal"},
        "legend": {**plain, "labelFontSize": 11.5},
    }
    spec: Row = drawing.chart.properties(title=heading, background="white", padding=10).to_dict()
    return {**spec, "config": config, "datasets": drawing.rows}
