"""The picture of suite ``throughput``: our jobs, their floors and peers, as bars on a logarithmic axis."""

from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from recsim_gr.benchmarks.peers import PEERS
from recsim_gr.benchmarks.throughput_jobs import FLOOR, OURS, RATE_TARGETS, RATIO_TARGETS, ThroughputConfig
from recsim_gr.files import atomic_path, write_text

Found = dict[tuple[str, str], tuple[float, str]]

KINDS = {
    "recsim_gr": "#d55e00",
    "NumPy floor": "#8a8a8a",
    "peer, measured here": "#0072b2",
    "peer, reported": "#b8d4e8",
}
"""Kind of bar to its colour."""

LEAST = 100.0
"""Where the bars begin."""

PNG_SCALE = 2.0


def write_chart(found: Found, config: ThroughputConfig, folder: Path) -> None:
    """Writes ``throughput.svg`` and ``throughput.png``.

    Raises:
        RunDirectoryError: they cannot be written.
    """
    svg = vl_convert.vegalite_to_svg(chart(bars(found, config)).to_dict())
    write_text(folder / "throughput.svg", svg)
    with atomic_path(folder / "throughput.png") as temporary:
        temporary.write_bytes(vl_convert.svg_to_png(svg, scale=PNG_SCALE))


def bars(found: Found, config: ThroughputConfig) -> list[dict[str, Any]]:
    """The bars that there are figures for: panel, label, kind, value, and target where there is one."""
    jobs = {
        "vector": ("environment", f"vector, {config.num_envs:,} at once"),
        "single": ("environment", "single, gym.make"),
        **{f"log_{n}": ("log", f"log, {n:,} titles") for n in config.log_titles},
        "large_1_cpu": ("log", f"log, {config.large_titles:,} titles"),
        "large_2": ("log", f"log, {config.large_titles:,} titles, 2 processes"),
    }
    rows = []

    def add(panel: str, label: str, kind: str, value: float, target: float | None = None) -> None:
        rows.append({"panel": panel, "label": label, "kind": kind, "value": value, "target": target})

    for job, (panel, label) in jobs.items():
        target = RATE_TARGETS.get(job)
        if job in RATIO_TARGETS:
            target = RATIO_TARGETS[job] * value_of(found, FLOOR, job)
        add(panel, f"{label}: ours", "recsim_gr", value_of(found, OURS, job), target)
        add(panel, f"{label}: floor", "NumPy floor", value_of(found, FLOOR, job))
    for peer in PEERS.values():
        value = value_of(found, peer.name, peer.job)
        if value == value:
            add(peer.job, peer.name, "peer, measured here", value)
        else:
            add(peer.job, peer.name, "peer, reported", peer.reported[1])
    return [row for row in rows if row["value"] == row["value"]]


def value_of(found: Found, who: str, job: str) -> float:
    """A rate; NaN where there is none."""
    return found.get((who, f"{job}.per_second"), (float("nan"), ""))[0]


def chart(rows: list[dict[str, Any]]) -> Any:
    """Two panels, one under the other, with one axis; a black mark is a target."""
    top = max((row["value"] for row in rows), default=LEAST) * 4
    titles = {
        "environment": "Environment steps a second (black: target)",
        "log": "Logged events a second (black: target)",
    }
    panels = [
        _panel([row for row in rows if row["panel"] == panel], title, top)
        for panel, title in titles.items()
        if any(row["panel"] == panel for row in rows)
    ]
    return alt.vconcat(*panels, spacing=18).configure_view(stroke=None).configure_axis(labelLimit=300)


def _panel(rows: list[dict[str, Any]], title: str, top: float) -> Any:
    order = [row["label"] for row in rows]
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y("label:N", sort=order, title=None, axis=alt.Axis(ticks=False, domain=False))
    )
    scale = alt.Scale(type="log", domain=[LEAST, top], clamp=True)
    colours = alt.Scale(domain=list(KINDS), range=list(KINDS.values()))
    length = alt.X("value:Q", scale=scale, title=None, axis=alt.Axis(format="~s", values=[10**k for k in range(2, 9)]))
    drawn = base.mark_bar(height={"band": 0.75}).encode(
        x=length, x2=alt.datum(LEAST), color=alt.Color("kind:N", scale=colours, title=None)
    )
    said = base.mark_text(align="right", dx=-4, fontSize=10).encode(
        x=length,
        text=alt.Text("value:Q", format=".2~s"),
        color=alt.condition("datum.kind == 'peer, reported'", alt.value("black"), alt.value("white")),
    )
    aimed = base.transform_filter("isValid(datum.target)").mark_tick(color="black", thickness=2, height={"band": 0.95})
    aimed = aimed.encode(x=alt.X("target:Q", scale=scale, title=None))
    return alt.layer(drawn, aimed, said).properties(width=520, height=19 * len(rows), title=title)
