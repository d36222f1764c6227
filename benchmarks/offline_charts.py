"""The pictures of suite ``offline``: the judge's gain against the true one, and what choices of a strength cost."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from recsim_gr.benchmarks.charts import (
    COLUMNS,
    PANELS,
    Drawing,
    Figure,
    Row,
    finished,
    scatter,
    styles_of,
)
from recsim_gr.benchmarks.offline_choices import DEFAULT
from recsim_gr.benchmarks.offline_statements import level_name
from recsim_gr.benchmarks.offline_trials import REFERENCE, Trials
from recsim_gr.benchmarks.statistics import FloatArray, t_interval

FIGURES = ("promise", "regret")
"""Every figure there can be."""

PROMISE = {
    "score_return": "gain in expected score",
    "value_return": "gain in satisfaction",
}
"""What the judge's gain is drawn against, a row of panels each."""

RULE_STYLES: Mapping[str, tuple[str, str]] = {
    DEFAULT: ("#000000", "circle"),
    "judge": ("#d55e00", "triangle-up"),
    "ndcg": ("#0072b2", "square"),
    "judge_ndcg": ("#cc79a7", "diamond"),
    "snips": ("#009e73", "cross"),
    "truth": ("#999999", "triangle-down"),
}
"""Colour and shape of each rule."""


def gains(trials: Trials, rule: str, metric: str) -> dict[str, FloatArray]:
    """(N, S) of every competitor: in points over the reference at its default."""
    base = trials.of(REFERENCE, DEFAULT, metric)
    return {a: trials.of(a, rule, metric) - base for a in trials.competitors if a != REFERENCE}


# ---------------------------------------------------------------------------------------------------------- promise


def promise(trials: Trials, rule: str, subtitle: str, name: str) -> Figure | None:
    """A panel a noise level, an agent a point: across what the judge says an agent gains over the reference, up what
    it gains in expected score (first row) and in satisfaction (second row)."""
    judged = gains(trials, rule, "judge_return")
    truth = {metric: gains(trials, rule, metric) for metric in PROMISE}
    rows = {metric: _points(trials, judged, of_metric) for metric, of_metric in truth.items()}
    drawn = [row for of_metric in rows.values() for row in of_metric]
    if not drawn:
        return None
    agents = [agent for agent in styles_of(tuple(judged)) if any(row["agent"] == agent for row in drawn)]
    across = _domain([row["x"] for row in drawn])
    outside: list[str] = []
    x = _axis("x", "judge's gain", across)
    blocks: list[Any] = []
    owner = min(len(_levels(trials)), COLUMNS) - 1  # the last panel of the first row has the legend beside it
    for metric, title in PROMISE.items():
        if not rows[metric]:
            continue
        high = _domain([row["y"] for row in rows[metric]])
        outside += [
            f"{row['agent']} at ν {row['noise']:g}"
            for row in rows[metric]
            if not (across[0] <= row["x"] <= across[1] and high[0] <= row["y"] <= high[1])
        ]
        diagonal = max(across[0], high[0]), min(across[1], high[1])  # as far as both axes go
        y = _axis("y", title, high)
        panels = [
            _panel(trials, rows[metric], agents, level, x, y, diagonal, legend=not blocks and k == owner)
            for k, level in enumerate(_levels(trials))
        ]
        block = alt.concat(*panels, columns=COLUMNS, spacing=22)
        blocks.append(block.resolve_legend(color="independent", shape="independent"))
    chart = alt.vconcat(*blocks, spacing=26).resolve_legend(color="independent", shape="independent")
    title = f"What the judge says agents gain over {REFERENCE}, and what they truly gain, over three steps"
    if outside:
        subtitle += f"\nToo far out to be drawn: {', '.join(dict.fromkeys(outside))}"
    return Figure(name, title, finished(Drawing(chart, {}), title, subtitle))


def _panel(
    trials: Trials,
    rows: Sequence[Row],
    agents: Sequence[str],
    level: int,
    x: alt.X,
    y: alt.Y,
    diagonal: tuple[float, float],
    legend: bool,
) -> Any:
    here = [row for row in rows if row["noise"] == trials.noise[level]]
    zeros = alt.Chart(alt.Data(values=[{"zero": 0.0}])).mark_rule(color="#ccc", strokeDash=[3, 3])
    rules = zeros.encode(x=alt.X("zero:Q", title=x["title"])), zeros.encode(y=alt.Y("zero:Q", title=y["title"]))
    points = scatter(here, agents, x, y, "", diagonal, legend)
    return alt.layer(*rules, points).properties(title=level_name(trials, level))


def _points(trials: Trials, across: Mapping[str, FloatArray], up: Mapping[str, FloatArray]) -> list[Row]:
    rows: list[Row] = []
    for agent in reversed(styles_of(tuple(across))):
        x, y = (t_interval(values[agent])[0] for values in (across, up))
        rows += [
            {"agent": agent, "noise": float(trials.noise[level]), "reliability": _known(trials.reliability[level]),
             "x": float(x[level]), "y": float(y[level])}
            for level in _levels(trials)
            if np.isfinite(x[level]) and np.isfinite(y[level])
        ]  # fmt: skip
    return rows


def _levels(trials: Trials) -> list[int]:
    """Those that are drawn: all, or as many as there are panels."""
    n = len(trials.noise)
    return np.unique(np.linspace(0, n - 1, min(n, PANELS)).round().astype(int)).tolist()


def _domain(values: Sequence[float]) -> tuple[float, float]:
    """0 and all values but those beyond Tukey's outer fences: one collapsed agent would leave of others a blot."""
    low, high = np.quantile(values, [0.25, 0.75])
    fence = 3.0 * max(high - low, 0.02)
    kept = [0.0, *(value for value in values if low - fence <= value <= high + fence)]
    pad = 0.07 * max(max(kept) - min(kept), 0.02)
    return min(kept) - pad, max(kept) + pad


def _axis(field: str, title: str, domain: tuple[float, float]) -> Any:
    kind = alt.X if field == "x" else alt.Y
    scale = alt.Scale(domain=list(domain), nice=False, zero=False)
    return kind(f"{field}:Q", title=title, scale=scale, axis=alt.Axis(tickCount=5))


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


# ----------------------------------------------------------------------------------------------------------- regret


def regret(trials: Trials, subtitle: str, name: str) -> Figure | None:
    """A panel a noise level: what each rule's choice is worth less than the best strength in hindsight, agent by
    agent, and their mean."""
    rows = list(_regrets(trials))
    if not rows:
        return None
    rules = [rule for rule in trials.rules if any(row["rule"] == RULE_NAMES[rule] for row in rows)]
    names = [RULE_NAMES[rule] for rule in rules]
    colour = alt.Scale(domain=names, range=[RULE_STYLES[rule][0] for rule in rules])
    shape = alt.Scale(domain=names, range=[RULE_STYLES[rule][1] for rule in rules])
    agents = [MEAN, *(a for a in styles_of(trials.selected) if any(row["agent"] == a for row in rows))]
    legend = alt.Legend(orient="right", title="strength chosen by", labelLimit=220, symbolSize=80)
    least, worst = min(0.0, *(row["mean"] for row in rows)), max(1e-3, *(row["mean"] for row in rows))
    lost = alt.Scale(domain=[least - 0.02 * worst, 1.05 * worst], nice=False)
    panels = []
    for k, level in enumerate(_levels(trials)):
        here = [row for row in rows if row["level"] == level]
        x = alt.X("mean:Q", title="true top-10 value lost", scale=lost, axis=alt.Axis(tickCount=4, grid=True))
        y = alt.Y("agent:N", sort=agents, title=None, axis=alt.Axis(labels=k % COLUMNS == 0, grid=True, labelLimit=200))
        points = (
            alt.Chart(alt.Data(values=here))
            .mark_point(size=70, strokeWidth=1.8, filled=False, clip=True)
            .encode(
                x=x, y=y, yOffset=alt.YOffset("rule:N", sort=names),
                color=alt.Color("rule:N", scale=colour, legend=legend),
                shape=alt.Shape("rule:N", scale=shape, legend=legend),
                tooltip=["agent:N", "rule:N", alt.Tooltip("mean:Q", format=".3f"),
                         alt.Tooltip("half:Q", title="± (95 %, Student-t)", format=".3f")],
            )
        )  # fmt: skip
        panels.append(points.properties(width=215, height=max(90, 30 * len(agents)), title=level_name(trials, level)))
    chart = alt.concat(*panels, columns=COLUMNS, spacing=18)
    title = "What it costs to choose the strength by what can be seen"
    return Figure(name, title, finished(Drawing(chart, {}), title, subtitle))


MEAN = "mean over agents"

RULE_NAMES: Mapping[str, str] = {
    DEFAULT: "default",
    "judge": "judge",
    "ndcg": "NDCG@10",
    "judge_ndcg": "judge, NDCG@10 ≥ 95 %",
    "snips": "SNIPS",
    "truth": "truth, validation users",
}
"""Headings."""


def mean_regret(trials: Trials, rule: str) -> FloatArray:
    """(N, S): over the agents of whom there was something to choose; NaN where one is missing."""
    regrets = [trials.regret(agent, rule) for agent in trials.selected]
    return np.mean(regrets, axis=0) if regrets else np.full(trials.shape, np.nan)


def _regrets(trials: Trials) -> Any:
    for rule in trials.rules:
        if rule == DEFAULT and not trials.selected:
            return
        for agent in (MEAN, *trials.selected):
            values = mean_regret(trials, rule) if agent == MEAN else trials.regret(agent, rule)
            mean, half, _ = t_interval(values)
            for level in _levels(trials):
                if np.isfinite(mean[level]):
                    yield {"agent": agent, "rule": RULE_NAMES[rule], "level": level, "mean": float(mean[level]),
                           "half": _known(half[level])}  # fmt: skip
