"""The pictures of a world, as Vega-Lite specifications. What does not apply to a world is left out."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from recsim_gr.behaviour import FloatArray
from recsim_gr.benchmarks.charts import Drawing, Figure, Row, Style, finished
from recsim_gr.benchmarks.portrait import Completion, Distribution, Portrait, Spread
from recsim_gr.benchmarks.portrait_measures import DEBIASED

FORCED, CHOSEN, TEST, THEORY, REAL = "#8a8a8a", "#d55e00", "#0072b2", "#000000", "#999933"
"""Of Okabe and Ito's and Tol's colours, as in the report of a run: grey is random exposure, vermilion the log."""

MODEL_STYLES: Mapping[str, Style] = {
    "watch_time": Style("#d55e00", "circle"),
    DEBIASED: Style("#cc79a7", "triangle-down", (7, 2)),
    "gaussian": Style("#0072b2", "diamond", (4, 2)),
    "student_t": Style("#56b4e9", "square", (7, 2)),
    "drift": Style("#009e73", "triangle-up", (9, 2, 2, 2)),
    "clickbait": Style("#000000", "cross"),
}
SPARE = (Style("#332288", "triangle-left"), Style("#882255", "triangle-right", (3, 2)), Style("#999933", "square"))
"""Of noise models that the table above does not know."""

TERCILE_NAMES = ("least discerning third", "middle third", "most discerning third")
TERCILE_STYLES = (Style("#56b4e9", "square", (4, 2)), Style("#0072b2", "diamond", (9, 2)), Style("#332288", "circle"))

PANEL, HALF, THIRD, HEIGHT = 620, 380, 245, 260
RANKS = 160
"""Points of the popularity curve, evenly spaced on its logarithmic axis."""

KUAIRAND_SECONDS = (7, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300)
KUAIRAND_COMPLETION = (0.56, 0.45, 0.43, 0.43, 0.46, 0.39, 0.32, 0.24, 0.18, 0.14, 0.08, 0.04)
KUAIRAND_MEDIAN_SECONDS = 81.2
"""KuaiRand: completion of like/hate rows up to each duration and beyond the last; the catalogue's median."""

FIGURES = (
    "scores",
    "reliability",
    "confounding",
    "choices",
    "popularity",
    "histories",
    "completion",
    "drift",
)
"""Every picture of a world there can be, in the order of the page."""


def portrait_figures(portrait: Portrait, subtitle: str) -> list[Figure]:
    """The pictures that apply to a world; ``subtitle`` says which it is."""
    made: list[tuple[str, Drawing | None]] = [
        ("What titles are worth, and what they score", _scores(portrait)),
        ("How much a score says of satisfaction, for every noise model", _reliability(portrait)),
        (
            "Hidden confounding: what titles are worth to those who choose them",
            _confounding(portrait),
        ),
        ("Who chooses how", _choices(portrait)),
        ("Popularity: how events spread over titles", _popularity(portrait)),
        ("Histories: how long, and how their events lie in time", _histories(portrait)),
        ("Watching against duration", _completion(portrait)),
        ("Drift: what differs between epochs", _drift(portrait)),
    ]
    return [
        Figure(name, title, finished(drawing, title, subtitle))
        for name, (title, drawing) in zip(FIGURES, made, strict=True)
        if drawing is not None
    ]


# ------------------------------------------------------------------------------------------------------- panels


def _panel(
    name: str,
    rows: Sequence[Row],
    x: alt.X,
    y: alt.Y,
    styles: Mapping[str, Style],
    *,
    marks: Sequence[str] = ("line", "point"),
    width: int = HALF,
    height: int = HEIGHT,
    legend: str | None = None,
    below: bool = False,
    under: Sequence[Any] = (),
) -> Drawing:
    """Lines and points, one series a style; rows have ``x``, ``y`` and ``series``, and are known by ``name``.

    Args:
        marks: of line, step and point.
        legend: its title, for the panel that carries it.
        below: whether the legend stands below the panel instead of to its right.
        under: layers drawn before.
    """
    there = [series for series in styles if any(row["series"] == series for row in rows)]
    shown = {series: styles[series] for series in there}
    place: Row = {"orient": "bottom", "columns": 1} if below else {"orient": "right"}
    titled = alt.Legend(title=legend or None, symbolSize=90, labelLimit=260, rowPadding=3, **place)
    look = None if legend is None else titled

    def scale(values: list[Any]) -> alt.Scale:
        return alt.Scale(domain=list(shown), range=values)

    colour = alt.Color("series:N", scale=scale([s.colour for s in shown.values()]), legend=look)
    # By conditions, since a field would enter the legend, where dashes fray the outline of the shapes.
    dash = alt.StrokeDashValue(
        [1, 0],
        condition=[
            {"test": f"datum.series === {json.dumps(series)}", "value": list(style.dash)}
            for series, style in shown.items()
            if style.dash
        ],
    )
    tooltip: list[Any] = ["series:N", _tip("x", x), _tip("y", y)]
    base = alt.Chart(alt.NamedData(name=name)).encode(x=x, y=y, color=colour, tooltip=tooltip)
    layers = list(under)
    if "step" in marks or "line" in marks:
        shape: Any = "step-after" if "step" in marks else "linear"
        layers.append(base.mark_line(strokeWidth=2, clip=True, interpolate=shape).encode(strokeDash=dash))
    if "point" in marks:
        points = alt.Shape("series:N", scale=scale([s.shape for s in shown.values()]), legend=look)
        layers.append(base.mark_point(filled=True, size=46, opacity=1, clip=True).encode(shape=points))
    return Drawing(alt.layer(*layers).properties(width=width, height=height), {name: list(rows)})


def _tip(field: str, axis: Any) -> alt.Tooltip:
    return alt.Tooltip(f"{field}:Q", title=axis["title"], format=".3~r")


def _beside(*panels: Drawing, spacing: int = 34) -> Drawing:
    chart = alt.hconcat(*(panel.chart for panel in panels), spacing=spacing)
    rows = {name: rows for panel in panels for name, rows in panel.rows.items()}
    return Drawing(chart.resolve_scale(color="independent", shape="independent"), rows)


def _histogram(
    name: str, spread: Spread, title: str, width: int, *, logarithmic: bool = True, share: str = "users"
) -> Drawing:
    """Bars of a histogram, and the median."""
    rows = [
        {"low": low, "high": high, "share": part, "zero": 0}
        for low, high, part in zip(
            spread.edges[:-1].tolist(), spread.edges[1:].tolist(), spread.shares.tolist(), strict=True
        )
    ]
    ends = [float(spread.edges[0]), float(spread.edges[-1])]
    ticks: Row = {"values": _log_ticks(*ends)} if logarithmic else {"tickCount": 5}
    scale = alt.Scale(type="log" if logarithmic else "linear", domain=ends, nice=False)
    x = alt.X("low:Q", title=title, scale=scale, axis=alt.Axis(format="~r", grid=False, **ticks))
    y = alt.Y("share:Q", title=f"share of {share} per bin", axis=alt.Axis(format="~%", tickCount=5))
    tooltip = [alt.Tooltip("low:Q", format=".3~r"), alt.Tooltip("high:Q", format=".3~r")]
    tooltip.append(alt.Tooltip("share:Q", format=".1%"))
    bars = alt.Chart(alt.NamedData(name=name)).mark_rect(color=CHOSEN, opacity=0.75, stroke="white", strokeWidth=0.5)
    bars = bars.encode(x=x, x2="high:Q", y=y, y2="zero:Q", tooltip=tooltip)
    middle = alt.Chart(alt.Data(values=[{"low": spread.at(0.5)}]))
    rule = middle.mark_rule(color=THEORY, strokeDash=[4, 3]).encode(x=x)
    quantiles = "10 / 50 / 90 %: " + " / ".join(short(spread.at(level)) for level in (0.1, 0.5, 0.9))
    return Drawing(alt.layer(bars, rule).properties(width=width, height=HEIGHT, title=quantiles), {name: rows})


def short(value: float) -> str:
    """A number with two or three digits that count."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{3 if abs(value) >= 1 else 2}g}"


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and their doubles and halves where there are few of them."""
    steps = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0)
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks = [float(f"{step * 10.0**decade:.6g}") for decade in decades for step in steps]
    return [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def _axis_of(field: str, title: str, domain: Sequence[float], **axis: Any) -> Any:
    kind = alt.X if field == "x" else alt.Y
    scale = alt.Scale(domain=list(domain), nice=False, zero=False)
    return kind(f"{field}:Q", title=title, scale=scale, axis=alt.Axis(**{"tickCount": 6, "format": "~r", **axis}))


def _points(x: Any, y: Any, series: str) -> list[Row]:
    """A row a point; without those that are not finite."""
    pairs = zip(np.asarray(x, dtype=float).tolist(), np.asarray(y, dtype=float).tolist(), strict=True)
    return [{"x": a, "y": b, "series": series} for a, b in pairs if np.isfinite(a) and np.isfinite(b)]


def _padded(values: Sequence[float], share: float = 0.05) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = share * max(high - low, 1e-3)
    return low - pad, high + pad


# ---------------------------------------------------------------------------------------------------- the figures


EXPOSURES = {"random exposure": Style(FORCED, dash=(5, 2)), "the log": Style(CHOSEN)}


def _scores(portrait: Portrait) -> Drawing:
    score = portrait.score
    bounded = score.edges[0] == portrait.satisfaction.edges[0]
    scale = "(1–5)" if bounded else "(points; the tails in the end bins)"
    atom = max(score.atom) > 0
    panels = [
        _distribution("satisfaction", portrait.satisfaction, "true satisfaction (1–5)", None),
        _distribution("score", score, f"observed score {scale}" + ", below 5" * atom, None if atom else ""),
    ]
    return _beside(*panels, *([_atom(score)] if atom else []))


def _distribution(name: str, found: Distribution, title: str, legend: str | None) -> Drawing:
    """Two steps."""
    rows = []
    for series, shares in zip(EXPOSURES, (found.forced, found.chosen), strict=True):
        rows += _points(found.edges, np.append(shares, shares[-1]), series)  # a step is drawn from its left edge on
    x = _axis_of("x", title, (found.edges[0], found.edges[-1]), grid=False)
    top = 1.08 * max(*found.forced, *found.chosen)
    y = _axis_of("y", f"share per {np.diff(found.edges)[0]:.2g} points", (0.0, top), format="~%")
    return _panel(name, rows, x, y, EXPOSURES, marks=("step",), width=HALF - 105, legend=legend)


def _atom(found: Distribution) -> Drawing:
    """What is exactly 5 has a panel of its own: it would press the rest flat."""
    rows = [{"series": series, "y": share} for series, share in zip(EXPOSURES, found.atom, strict=True)]
    colours = alt.Scale(domain=list(EXPOSURES), range=[s.colour for s in EXPOSURES.values()])
    x = alt.X("series:N", title="exactly 5", sort=list(EXPOSURES), axis=alt.Axis(labels=False, ticks=False))
    y = _axis_of("y", "share", (0.0, 1.15 * max(found.atom)), format="~%")
    base = alt.Chart(alt.NamedData(name="atom")).encode(x=x, y=y)
    bars = base.mark_bar().encode(color=alt.Color("series:N", scale=colours, legend=alt.Legend(title=None)))
    labels = base.mark_text(dy=-7, fontSize=11).encode(text=alt.Text("y:Q", format=".1%"))
    return Drawing(alt.layer(bars, labels).properties(width=90, height=HEIGHT), {"atom": rows})


def _reliability(portrait: Portrait) -> Drawing:
    """Reliability and alignment against the dial, a line a model, a ring where this world stands."""
    signal = portrait.signal
    spare = iter(SPARE * len(signal.models))
    styles = {name: MODEL_STYLES[name] if name in MODEL_STYLES else next(spare) for name in signal.models}
    panels: list[Drawing] = []
    for field, title in (
        ("within_user", "within-user reliability of the score (signed corr²)"),
        ("alignment", "alignment of the expected score (signed corr²)"),
    ):
        values: FloatArray = getattr(signal, field)
        rows = [
            row for name, line in zip(signal.models, values, strict=True) for row in _points(signal.dials, line, name)
        ]
        if not rows:  # histories of one event have no reliability within a user
            continue
        low = min(0.0, *(row["y"] for row in rows))
        x = _axis_of("x", "noise dial (0 = none)", (-0.03, 1.03), grid=False)
        y = _axis_of("y", title, (low - 0.03, 1.04))
        own = [{"x": signal.own["dial"], "y": signal.own[field], "label": "this world"}]
        ring = alt.Chart(alt.Data(values=own)).mark_point(size=260, strokeWidth=1.6, color="#444", filled=False)
        zero = alt.Chart(alt.Data(values=[{"y": 0}])).mark_rule(color="#999").encode(y=y)
        legend = "noise model" if field == "alignment" else None
        panel = _panel(field, rows, x, y, styles, legend=legend, width=HALF - 40, height=320, under=[zero])
        tooltip = ["label:N", alt.Tooltip("y:Q", format=".3f")]
        panels.append(Drawing(alt.layer(panel.chart, ring.encode(x=x, y=y, tooltip=tooltip)), panel.rows))
    return _beside(*panels)


def _confounding(portrait: Portrait) -> Drawing:
    """Groups of titles: their worth to those who choose them, over their worth to everybody."""
    found = portrait.confounding
    styles = {
        f"{name} (δ ≈ {delta:.2f})": style
        for name, style, delta in zip(TERCILE_NAMES, TERCILE_STYLES, found.discernment.tolist(), strict=True)
        if np.isfinite(delta)
    }
    panels: list[Drawing] = []
    for name, forced, chosen in (
        ("satisfaction", found.forced, found.chosen),
        ("expected score", found.forced_score, found.chosen_score),
    ):
        rows = [row for series, line in zip(styles, chosen, strict=False) for row in _points(forced, line, series)]
        ends = _padded([*forced.tolist(), *(row["y"] for row in rows)])
        x = _axis_of("x", f"mean {name} over everybody (forced exposure)", ends)
        y = _axis_of("y", f"mean {name} over those who choose", ends)
        diagonal = alt.Chart(alt.Data(values=[{"x": end, "y": end} for end in ends]))
        under = [diagonal.mark_line(color="#999", strokeWidth=1).encode(x=x, y=y)]
        legend = "users by discernment" if panels else None
        panels.append(_panel(name, rows, x, y, styles, legend=legend, width=330, height=320, under=under))
    return _beside(*panels)


def _choices(portrait: Portrait) -> Drawing:
    choices = portrait.choices
    band = [
        {"x": x, "low": low, "high": high}
        for x, (low, _, high) in zip(choices.bins.tolist(), choices.likeness.tolist(), strict=True)
    ]
    low = min(0.0, *(row["low"] for row in band))
    x = _axis_of("x", "discernment δ", (-0.02, 1.02), grid=False)
    y = _axis_of("y", "corr(utility, satisfaction) within user", (low - 0.03, 1.04))
    area = alt.Chart(alt.Data(values=band)).mark_area(color=CHOSEN, opacity=0.2).encode(x=x, y=y.copy(), y2="high:Q")
    area = area.encode(y=alt.Y("low:Q", title=y["title"]))
    rows = _points(choices.bins, choices.likeness[:, 1], "median, and 10 to 90 % of the users")
    style = {rows[0]["series"]: Style(CHOSEN)}
    return _beside(
        _histogram("perplexity", choices.perplexity, "perplexity of the first choice (titles)", THIRD),
        _histogram("discernment", choices.discernment, "discernment δ", THIRD, logarithmic=False),
        _panel("likeness", rows, x, y, style, width=THIRD, under=[area]),
    )


def _popularity(portrait: Portrait) -> Drawing:
    """Share of the events by rank, both axes logarithmic, beside Zipf's law."""
    n = portrait.n_titles
    ranks = np.unique(np.geomspace(1, n, RANKS).round().astype(int))
    names = ("training users", "test users (last epoch)", "random exposure", "Zipf's law, 1/rank")
    looks = (Style(CHOSEN), Style(TEST, dash=(6, 2)), Style(FORCED, dash=(5, 2)), Style(THEORY, dash=(2, 2)))
    styles = dict(zip(names, looks, strict=True))
    rows, found = [], portrait.popularity
    for name, counts in zip(names, (found.train, found.test, found.forced), strict=False):
        shares = counts[ranks - 1] / counts.sum()
        rows += _points(ranks[shares > 0], shares[shares > 0], name)
    rows += _points(ranks, 1.0 / ranks / (1.0 / np.arange(1, n + 1)).sum(), names[3])
    least = min(row["y"] for row in rows)
    ends = alt.Scale(type="log", domain=[1, n], nice=False)
    low, high = 0.8 * least, 1.3 * max(row["y"] for row in rows)
    heights = alt.Scale(type="log", domain=[low, high], nice=False)
    across, up = alt.Axis(format="~s", values=_log_ticks(1, n)), alt.Axis(format="~%", values=_log_ticks(low, high))
    x = alt.X("x:Q", title="rank of the title (1 = most events)", scale=ends, axis=across)
    y = alt.Y("y:Q", title="share of all events", scale=heights, axis=up)
    return _panel("popularity", rows, x, y, styles, marks=("line",), width=PANEL, height=320, legend="")


def _histories(portrait: Portrait) -> Drawing | None:
    histories = portrait.histories
    panels: list[Drawing] = []
    varies = histories.length.at(0.05) < histories.length.at(0.95) or (histories.lengths > 0).sum() > 1
    if varies:
        panels.append(_length_bars(portrait))
    for name, spread, title, share in (
        ("gap", histories.gap, "hours between neighbouring events", "gaps"),
        ("days", histories.days, "days from first to last event", "users"),
    ):
        if spread is not None:
            panels.append(_histogram(name, spread, title, THIRD if varies else HALF, share=share))
    return _beside(*panels) if panels else None


def _length_bars(portrait: Portrait) -> Drawing:
    """Lengths one by one, or in some forty bins."""
    shares = portrait.histories.lengths
    width = -(-len(shares) // 40)
    rows = [
        {"low": k + 0.5, "high": k + width + 0.5, "share": float(shares[k : k + width].sum())}
        for k in range(0, len(shares), width)
    ]
    edges = np.array([row["low"] for row in rows] + [rows[-1]["high"]])
    spread = Spread(edges, np.array([row["share"] for row in rows]), *_rest(portrait.histories.length))
    return _histogram("length", spread, "events a history", THIRD, logarithmic=False)


def _rest(spread: Spread) -> tuple[tuple[float, ...], float]:
    return spread.quantiles, spread.mean


def _completion(portrait: Portrait) -> Drawing:
    """Completion, and minutes watched, against duration."""
    found = portrait.completion
    styles = {
        "the log": Style(CHOSEN),
        "the log, expected": Style(THEORY, dash=(4, 2)),
        "random exposure": Style(FORCED, "square", (6, 2)),
        "KuaiRand, rescaled": Style(REAL, "triangle-up", (2, 2)),
    }
    rows = _points(found.minutes, found.observed, "the log") + _points(found.minutes, found.exact, "the log, expected")
    rows += _points(found.minutes, found.forced, "random exposure") + _kuairand(found)
    x = _duration_axis([row["x"] for row in rows])
    y = _axis_of("y", "share watched to the end", (0.0, 1.05 * max(0.1, *(row["y"] for row in rows))), format="~%")
    finished_share = _panel("completion", rows, x, y, styles, legend="", width=HALF)
    minutes = _points(found.minutes, found.watched, "the log")
    ends = _duration_axis(found.minutes.tolist())
    y = _axis_of("y", "median minutes watched", (0.0, 1.1 * max(1e-3, *(row["y"] for row in minutes))))
    return _beside(_panel("watched", minutes, ends, y, {"the log": Style(CHOSEN)}, width=HALF - 80), finished_share)


def _duration_axis(minutes: Sequence[float]) -> alt.X:
    low, high = 0.9 * min(minutes), 1.1 * max(minutes)
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    axis = alt.Axis(format="~r", values=_log_ticks(low, high), grid=False)
    return alt.X("x:Q", title="duration (minutes)", scale=scale, axis=axis)


def _kuairand(found: Completion) -> list[Row]:
    """Completion of real videos, their durations stretched to the median of this catalogue."""
    edges = np.array(KUAIRAND_SECONDS, dtype=float)
    stretched = np.sqrt(edges[:-1] * edges[1:]) * found.quantiles[2] / KUAIRAND_MEDIAN_SECONDS
    return _points(stretched, KUAIRAND_COMPLETION[1:-1], "KuaiRand, rescaled")


def _drift(portrait: Portrait) -> Drawing | None:
    """Two matrices, and what moves where something does."""
    drift = portrait.drift
    n_epochs = len(drift.released)
    if n_epochs < 2:
        return None
    panels = [
        _matrix("appeal", drift.appeal, "corr. of appeal between epochs"),
        _matrix("popularity", drift.popularity, "rank corr. of popularity between users"),
    ]
    epochs = np.arange(n_epochs)
    x = alt.X("x:Q", title="epoch", scale=alt.Scale(domain=[-0.2, n_epochs - 0.8]),
              axis=alt.Axis(values=epochs.tolist(), format="d", grid=False))  # fmt: skip
    if drift.taste is not None and drift.taste.any():
        y = _axis_of("y", "mean taste from epoch 0 (deviations)", (0.0, 1.1 * drift.taste.max()))
        rows = _points(epochs, drift.taste, "mean taste")
        panels.append(_panel("taste", rows, x, y, {"mean taste": Style(CHOSEN)}, width=130, height=MATRIX))
    if (drift.released < 1).any():
        styles = {"titles that are out": Style(FORCED, "square", (5, 2)), "choices of cold titles": Style(CHOSEN)}
        names = list(styles)
        rows = _points(epochs, drift.released, names[0]) + _points(epochs, drift.cold_exposure, names[1])
        y = _axis_of("y", "share", (0.0, 1.05), format="~%")
        panels.append(_panel("released", rows, x, y, styles, width=130, height=MATRIX, legend="", below=True))
    return _beside(*panels)


MATRIX = 210


def _matrix(name: str, values: FloatArray, title: str) -> Drawing:
    rows = [
        {"x": e, "y": f, "value": float(v), "dark": bool(v > 0.45)}
        for (e, f), v in np.ndenumerate(values)
        if np.isfinite(v)
    ]
    upright = alt.Axis(labelAngle=0)
    x, y = alt.X("x:O", title="epoch", axis=upright), alt.Y("y:O", title="epoch", axis=upright)
    base = alt.Chart(alt.NamedData(name=name)).encode(x=x, y=y)
    fill = alt.Color("value:Q", scale=alt.Scale(domain=[-0.2, 1.0], scheme="blues", clamp=True), legend=None)
    ink = alt.condition("datum.dark", alt.value("white"), alt.value("#222"))
    text = base.mark_text(fontSize=11).encode(text=alt.Text("value:Q", format=".2f"), color=ink)
    chart = alt.layer(base.mark_rect().encode(color=fill), text)
    return Drawing(chart.properties(width=MATRIX, height=MATRIX, title=title), {name: rows})
