"""The report as one HTML page: text, tables and pictures, with everything that it needs inside.

All text from configurations, results and failures passes through :func:`html.escape`. The page's own policy
forbids requests: it opens without a network, and tells nobody that it was opened.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from recsim_gr.benchmarks.charts import CEILING, HEADLINE, REFERENCE, Figure, headline, learners_of, styles_of
from recsim_gr.benchmarks.statistics import (
    ROBUST_SEEDS,
    WORLD,
    Comparison,
    FloatArray,
    Results,
    place,
    stratified_bootstrap,
    t_interval,
)
from recsim_gr.benchmarks.wording import (
    CHECKS,
    COLD,
    GROUPS,
    HOW_TO_READ,
    JUDGE,
    NO_REFERENCE,
    OFFLINE,
    ONE_SEED,
    OTHER_TERMS,
    READINGS,
    SEEDS,
    SUPPORT,
    USE,
    VALUES,
    WITH_REFERENCE,
    WORLD_METRICS,
)
from recsim_gr.scoring import COLD_METRICS, METRICS

NONE = "–"
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Section:
    """One world of a run: its name, its results, what must hold of them, its figures and their pictures (SVG)."""

    name: str
    results: Results
    checks: Sequence[str]
    figures: Mapping[str, Figure]
    pictures: Mapping[str, str]


def page(
    config: Mapping[str, Any],
    sections: Sequence[Section],
    failures: Sequence[Mapping[str, Any]],
    cells: Sequence[Mapping[str, Any]],
    unreadable_cells: int,
    javascript: str,
) -> str:
    """The whole page.

    Args:
        config: of the suite; shown, and quoted in the head.
        sections: one a world.
        failures: ``cell`` and ``reason`` of each failed cell.
        cells: the cells' own files, for the table of costs.
        unreadable_cells: cell files that the table of costs misses.
        javascript: defines ``vegaEmbed``; free of ``</script``.
    """
    title = " · ".join(str(config[key]) for key in ("suite", "preset") if config.get(key))
    body = [
        _head(title, config, sections, failures),
        *(_section(section, alone=len(sections) == 1) for section in sections),
        _costs(cells, unreadable_cells),
        config_table(config, "Configuration of the run"),
        _glossary(sections),
    ]
    return document(title, body, javascript)


def document(title: str, body: Sequence[str], javascript: str) -> str:
    """A page with everything that it needs inside.

    Args:
        title: plain text.
        body: pieces of HTML; empty ones are left out.
        javascript: defines ``vegaEmbed``; free of ``</script``.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>recsim_gr · {escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main>\n<script>{javascript}</script>\n<script>{EMBED}</script>\n</body>\n</html>\n"
    )


# --------------------------------------------------------------------------------------------------- numbers


def number(value: float, digits: int = 3) -> str:
    """A number for a table: three decimals, fewer where it is large, a true minus sign, and – for NaN."""
    if not np.isfinite(value):
        return NONE
    size = abs(value)
    text = f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 100 else f"{value:z.{digits}f}"
    return text.replace("-", "−")


def signed(value: float, half_width: float = np.nan) -> str:
    """A difference with its sign, and the half width of its interval where that is known."""
    sign = "+" if np.isfinite(value) and value >= 0 else ""
    return sign + number(value) + (f" ± {number(half_width)}" if np.isfinite(half_width) else "")


def p_value(p: float) -> str:
    """A p-value as HTML, to three decimals: all that a few seeds are worth."""
    return "p &lt; 0.001" if p < 0.001 else f"p = {p:.3f}"


# -------------------------------------------------------------------------------------------------- sections


def _head(
    title: str, config: Mapping[str, Any], sections: Sequence[Section], failures: Sequence[Mapping[str, Any]]
) -> str:
    seeds = sections[0].results.seeds
    facts = {
        "suite": title,
        "world": config.get("world"),
        "noise": ", ".join(dict.fromkeys(section.name.split(" · ")[-1] for section in sections)),
        "noise levels": ", ".join(f"{noise:g}" for noise in sections[0].results.noise),
        "seeds": f"{len(seeds)} ({', '.join(map(str, seeds[:12]))}{', …' if len(seeds) > 12 else ''})",
        "agents": ", ".join(styles_of(sections[0].results.agents)),
    }
    listed = "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v)
    return (
        f'<h1>recsim_gr <span>{escape(title)}</span></h1>\n<dl class="facts">{listed}</dl>\n'
        + _failures(failures)
        + _how_to_read(sections[0].results)
    )


def _how_to_read(results: Results) -> str:
    seeds, learners = len(results.seeds), len(learners_of(results.agents))
    reference = WITH_REFERENCE if REFERENCE in results.agents else NO_REFERENCE
    return HOW_TO_READ % (reference, ONE_SEED if seeds == 1 else SEEDS % (seeds, learners))


def _section(section: Section, alone: bool) -> str:
    results = section.results
    compared = headline(results)
    known = {**VALUES, **JUDGE, **SUPPORT, **OFFLINE, **COLD}
    others = {name: name for name in results.metrics() if name not in known}
    pictures = {
        figure.name: figure_element(name, figure, section.pictures[name], f"{READINGS[figure.name]} {USE}")
        for name, figure in section.figures.items()
    }
    parts = [
        "" if alone else f"<h2>{escape(section.name)}</h2>",
        pictures.get("landscape", ""),
        _findings(results, compared),
        _checks(section.checks),
        _headline_table(results, compared),
        _across_levels(results),
        pictures.get("place", ""),
        folded("Values, as sampled, greedy and top-10; the score's; regret", _level_table(results, VALUES)),
        pictures.get("judge_against_truth", ""),
        pictures.get("overoptimisation", ""),
        folded("The judge against the truth", _level_table(results, JUDGE)),
        pictures.get("support", ""),
        folded("Support: how far from the pretrained policy and the log", _level_table(results, SUPPORT)),
        pictures.get("offline_metrics", ""),
        folded("Offline metrics", _level_table(results, OFFLINE)),
        folded("Warm titles, and cold ones: out since the test users' own epoch", _level_table(results, COLD)),
        folded("Further metrics", _level_table(results, others)),
        _world_table(results),
    ]
    return "\n".join(part for part in parts if part)


def _checks(checks: Sequence[str]) -> str:
    """What must hold whatever the ranking; a failure stands out."""
    if not checks:
        return ""
    marked = (f"<b>{escape(line)}</b>" if line.startswith("FAILS") else escape(line) for line in checks)
    rows = "".join(f"<li>{line}</li>" for line in marked)
    return f"<h3>First principles</h3><p class='note'>{CHECKS}</p><ul>{rows}</ul>"


def figure_element(name: str, figure: Figure, picture: str, caption: str) -> str:
    """A figure with its caption (HTML), drawn by the page's script from its specification, or as it is without one."""
    # "<" cannot end the element as an escape; the JSON stays the same.
    spec = json.dumps(figure.spec, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    files = " ".join(f'<a href="figures/{name}.{kind}">{kind.upper()}</a>' for kind in ("svg", "png"))
    return (
        f'<figure id="{name}"><div class="scroll"><div class="vis"></div></div>'
        f"<noscript>{picture}</noscript>"
        f'<script type="application/json">{spec}</script>'
        f"<figcaption>{caption} {files}</figcaption></figure>"
    )


def _findings(results: Results, compared: Mapping[str, Comparison]) -> str:
    """One sentence a level: the best learner, by how much, and whether the seeds can tell."""
    items = []
    for level in range(len(results.noise)):
        best = _best(results, compared, level)
        if best is None:
            continue
        c = compared[best]
        p = c.p_holm[level]
        shown = f"above {REFERENCE}" if p <= SIGNIFICANT else f"not shown to be above {REFERENCE}"
        told = f", {shown} ({p_value(p)})" if np.isfinite(p) else ", one seed: no test"
        items.append(
            f"<li>{_level_name(results, level)}: <b>{escape(best)}</b> "
            f"{signed(c.difference[level], c.half_width[level])}{told}.</li>"
        )
    if not items:
        return ""
    note = "The best of several is flattered by the choice. Its p-value, where there is one, allows for that."
    listed = f"<ul>{''.join(items)}</ul>"
    return f"<h3>The best learner at each noise level</h3>{listed}<p class='note'>{note}</p>"


def _best(results: Results, compared: Mapping[str, Comparison], level: int) -> str | None:
    """The learner with the highest difference at a level; None without a learner that has one."""
    known = {a: compared[a].difference[level] for a in learners_of(results.agents)}
    known = {agent: value for agent, value in known.items() if np.isfinite(value)}
    return max(known, key=known.__getitem__) if known else None


def _headline_table(results: Results, compared: Mapping[str, Comparison]) -> str:
    levels = range(len(results.noise))
    best = [_best(results, compared, level) for level in levels]
    head = "".join(f"<th>{_level_name(results, level)}</th>" for level in levels)
    rows = []
    for agent in styles_of(results.agents):
        marks = [' class="best"' if best[level] == agent else "" for level in levels]
        cells = [_headline_cell(agent, compared[agent], level) for level in levels]
        tds = "".join(f"<td{mark}>{cell}</td>" for mark, cell in zip(marks, cells, strict=True))
        rows.append(f"<tr>{_agent_cell(agent, results)}{tds}</tr>")
    note = f"""In a cell: the value; its difference to {REFERENCE} ± half of the 95 % interval over seeds;
its place between {REFERENCE} (0) and {CEILING} (1); for learners, the corrected p-value of being above
{REFERENCE}. The best learner of a level is marked.{_missing(results)}"""
    return f"<h3>True top-10 value</h3><p class='note'>{note}</p>" + table(
        f"<tr><th>agent</th>{head}</tr>", f"<tbody>{''.join(rows)}</tbody>", "headline"
    )


def _missing(results: Results) -> str:
    missing = sum(int(np.isnan(results.of(agent, HEADLINE)).sum()) for agent in results.agents)
    total = len(results.agents) * len(results.noise) * len(results.seeds)
    lost = f" <b>{missing} of {total} results are missing</b>; means are over the seeds that are there."
    return lost if missing else ""


def _headline_cell(agent: str, c: Comparison, level: int) -> str:
    if not np.isfinite(c.mean[level]):
        return NONE
    value = f"<b>{number(c.mean[level])}</b>"
    if agent == REFERENCE:
        return f"{value}<small>reference</small>"
    difference = signed(c.difference[level], c.half_width[level]) if np.isfinite(c.difference[level]) else ""
    notes = [f"place {number(c.place[level], 2)}"] if np.isfinite(c.place[level]) else []
    notes += [p_value(c.p_holm[level])] if np.isfinite(c.p_holm[level]) else []
    return f"{value}<span>{difference}</span><small>{' · '.join(notes)}</small>"


def _across_levels(results: Results) -> str:
    """Interquartile mean of the place over levels and seeds, where there are seeds enough for a bootstrap."""
    if len(results.seeds) < ROBUST_SEEDS:
        return ""
    rows = []
    base, top = results.of(REFERENCE, HEADLINE), results.of(CEILING, HEADLINE)
    for agent in styles_of(results.agents):
        share = place(results.of(agent, HEADLINE), base, top)
        complete = share[:, np.isfinite(share).all(axis=0)].T
        if len(complete) < ROBUST_SEEDS:
            continue
        mean, low, high = stratified_bootstrap(complete)
        cells = f"<td>{number(mean)}</td><td>{number(low)} to {number(high)}</td>"
        rows.append(f"<tr>{_agent_cell(agent, results)}{cells}</tr>")
    if not rows:
        return ""
    note = """Interquartile mean over levels and seeds with a 95 % stratified bootstrap interval (Agarwal et
al., 2021)."""
    return f"<h3>Place over all noise levels</h3><p class='note'>{note}</p>" + table(
        "<tr><th>agent</th><th>IQM</th><th>95 %</th></tr>", f"<tbody>{''.join(rows)}</tbody>"
    )


def _level_table(results: Results, metrics: Mapping[str, str]) -> str:
    """Agents × metrics, level after level; the interval is in the tooltip of a number."""
    present = [name for name in metrics if name in results.metrics()]
    if not present:
        return ""
    means = {(a, m): t_interval(results.of(a, m))[:2] for a in results.agents for m in present}
    head = "".join(f'<th title="{escape(m)}">{escape(metrics[m])}</th>' for m in present)
    body = []
    for level in range(len(results.noise)):
        body.append(f"<tbody>{_level_row(_level_name(results, level), len(present) + 1)}")
        for agent in styles_of(results.agents):
            cells = "".join(_mean_cell(*means[agent, m], level) for m in present)
            body.append(f"<tr>{_agent_cell(agent, results)}{cells}</tr>")
        body.append("</tbody>")
    return table(f"<tr><th>agent</th>{head}</tr>", "".join(body))


def _world_table(results: Results) -> str:
    names = results.metrics(world=True)
    if not names:
        return ""
    order = [
        *(name for name in WORLD_METRICS if name in names),
        *(n for n in names if n not in WORLD_METRICS),
    ]
    head = "".join(f"<th>{_level_name(results, level, short=True)}</th>" for level in range(len(results.noise)))
    body = []
    for group in dict.fromkeys(title for _, title in GROUPS):
        members = [name for name in order if _group(name) == group]
        if members:
            body.append(f"<tbody>{_level_row(group, len(results.noise) + 1)}")
        for name in members:
            mean, half, _ = t_interval(results.of(WORLD, name))
            label, meaning = WORLD_METRICS.get(name, (name, ""))
            cells = "".join(_mean_cell(mean, half, level) for level in range(len(results.noise)))
            body.append(f'<tr><th title="{escape(meaning or name)}">{escape(label)}</th>{cells}</tr>')
        body.append("</tbody>" if members else "")
    return "<h3>The world, its score and the reward model</h3>" + table(f"<tr><th></th>{head}</tr>", "".join(body))


def _level_row(title: str, columns: int) -> str:
    return f'<tr class="level"><th colspan="{columns}">{title}</th></tr>'


def _group(name: str) -> str:
    return next(title for prefix, title in GROUPS if name.startswith(prefix))


def _mean_cell(mean: FloatArray, half_width: FloatArray, level: int) -> str:
    half = f' title="± {number(half_width[level])}"' if np.isfinite(half_width[level]) else ""
    return f"<td{half}>{number(mean[level])}</td>"


def _agent_cell(agent: str, results: Results) -> str:
    style = styles_of(results.agents)[agent]
    return f'<th class="{style.role}"><i style="background:{style.colour}"></i>{escape(agent)}</th>'


def _level_name(results: Results, level: int, short: bool = False) -> str:
    noise, reliability = results.noise[level], results.reliability[level]
    if short or not np.isfinite(reliability):
        return f"ν = {noise:g}"
    return f"ν = {noise:g} <small>reliability {number(reliability)}</small>"


def table(head: str, body: str, kind: str = "") -> str:
    """A table of rows in HTML that scrolls where it is too wide."""
    return f'<div class="scroll"><table class="{kind}"><thead>{head}</thead>{body}</table></div>'


def folded(title: str, content: str) -> str:
    """Something to open at a click; nothing where there is nothing."""
    return f"<details class='fold'><summary>{title}</summary>{content}</details>" if content else ""


# ------------------------------------------------------------------------------------------------ appendices


def _failures(failures: Sequence[Mapping[str, Any]]) -> str:
    if not failures:
        return ""
    rows = "".join(
        f"<tr><th>{escape(str(failure.get('cell', NONE)))}</th><td class='text'>"
        f"{escape(str(failure.get('reason', NONE)))}</td></tr>"
        for failure in failures
    )
    count = f"{len(failures)} cell{'s' if len(failures) > 1 else ''} failed"
    return (
        f'<section class="failures"><h3>{count}</h3><p class="note">Their results are missing below.</p>'
        + table("<tr><th>cell</th><th class='text'>reason</th></tr>", f"<tbody>{rows}</tbody>")
        + "</section>\n"
    )


COSTS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "fit_seconds": ("seconds to fit", lambda x: number(x, 1)),
    "preparation_seconds": ("of them preparing", lambda x: number(x, 1)),
    "samples": ("online samples", lambda x: f"{x:,.0f}"),
    "gradient_steps": ("gradient steps", lambda x: f"{x:,.0f}"),
}


def _costs(cells: Sequence[Mapping[str, Any]], unreadable: int) -> str:
    """Means over cells of what each agent cost; nothing where no cell tells."""
    spent: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        agents = cell.get("agents")
        for agent, costs in agents.items() if isinstance(agents, dict) else ():
            for key in COSTS.keys() & (costs.keys() if isinstance(costs, dict) else ()):
                if _is_number(costs[key]):
                    spent.setdefault(agent, {}).setdefault(key, []).append(float(costs[key]))
    if not spent:
        return ""
    rows = []
    for agent, style in styles_of(tuple(spent)).items():
        numbers = (
            f"<td>{show(float(np.mean(spent[agent][key])))}</td>" if key in spent[agent] else f"<td>{NONE}</td>"
            for key, (_, show) in COSTS.items()
        )
        swatch = f'<i style="background:{style.colour}"></i>'
        rows.append(f'<tr><th class="{style.role}">{swatch}{escape(agent)}</th>{"".join(numbers)}</tr>')
    seconds = [float(cell["seconds"]) for cell in cells if _is_number(cell.get("seconds"))]
    total = f" All {len(seconds)} cells took {number(sum(seconds) / 60, 1)} minutes." if seconds else ""
    lost = f" {unreadable} cell files could not be read." if unreadable else ""
    head = "".join(f"<th>{title}</th>" for title, _ in COSTS.values())
    return f"<h3>What it cost</h3><p class='note'>Mean over cells, on the machine of the run.{total}{lost}</p>" + table(
        f"<tr><th>agent</th>{head}</tr>", f"<tbody>{''.join(rows)}</tbody>"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and bool(np.isfinite(value))


def config_table(config: Mapping[str, Any], title: str) -> str:
    """A configuration, folded away."""
    texts = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in config.items()}
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td class='text'><code>{escape(text)}</code></td></tr>"
        for key, text in texts.items()
    )
    return folded(title, table("", f"<tbody>{rows}</tbody>"))


def _glossary(sections: Sequence[Section]) -> str:
    """Definitions of the metrics that are on the page."""
    world = {name: f"{heading}: {meaning}" for name, (heading, meaning) in WORLD_METRICS.items()}
    there = {m for s in sections for m in (*s.results.metrics(), *s.results.metrics(world=True))}
    known = {name: meaning for name, meaning in {**METRICS, **COLD_METRICS, **world}.items() if name in there}
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in OTHER_TERMS.items())
    items += "".join(f"<dt><code>{n}</code></dt><dd>{escape(text)}</dd>" for n, text in known.items())
    return folded("Glossary", f'<dl class="glossary">{items}</dl>')


# Vega compiles expressions, hence unsafe-eval; no source of any request is allowed.
POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"
EMBED = """
for (const figure of document.querySelectorAll("figure")) {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const actions = {export: true, source: false, compiled: false, editor: false};
  vegaEmbed(figure.querySelector(".vis"), spec, {renderer: "svg", actions: actions});
}
"""
STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1c1c1c; font: 15px/1.5 system-ui, Helvetica, Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 80px; }
h1 { font-size: 26px; margin: 0 0 10px; } h1 span { color: #777; font-weight: 400; }
h2 { font-size: 21px; margin: 44px 0 0; border-top: 1px solid #ddd; padding-top: 22px; }
h3 { font-size: 17px; margin: 34px 0 4px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 8px 0; }
dt { color: #777; } dd { margin: 0; }
ul { padding-left: 20px; margin: 8px 0; }
.reading { color: #333; max-width: 900px; } .reading li { margin: 3px 0; }
figure { margin: 30px 0; } figcaption { color: #444; max-width: 860px; font-size: 14px; margin-top: 6px; }
figcaption a { margin-left: 6px; } a { color: #0b62a4; }
.note { color: #555; font-size: 14px; margin: 2px 0 8px; max-width: 900px; }
.scroll { overflow-x: auto; } .vis { min-width: max-content; }
table { border-collapse: separate; border-spacing: 0; margin: 4px 0; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 8px; text-align: right; white-space: nowrap; font-weight: 400; }
thead th { border-bottom: 2px solid #bbb; color: #555; vertical-align: bottom; white-space: normal; }
tbody th, thead th:first-child { text-align: left; }
tbody th, tbody td { border-bottom: 1px solid #eee; } tbody tr:hover { background: #f7f9fb; }
tbody th:first-child, thead th:first-child { position: sticky; left: 0; background: #fff; }
tr.level th { padding-top: 14px; font-weight: 600; } th.reference { font-weight: 600; }
th.ceiling, th.baseline { color: #777; }
th i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 8px; }
th small { color: #777; font-size: 12px; font-weight: 400; margin-left: 4px; }
td.text, th.text { text-align: left; white-space: normal; } th.claim { min-width: 300px; }
.headline td span, .headline td small { display: block; line-height: 1.35; }
.headline td small { color: #777; }
.headline th small { display: block; } .headline td { vertical-align: top; }
.headline td b { font-weight: 600; }
td.best { background: #fdf3d7; }
td.yes { background: #cfe3f5; } td.rather { background: #edf4fa; }
td.no { background: #f6cfbf; } td.rather-not { background: #fbeee8; }
.fold { margin: 14px 0; border: 1px solid #e3e3e3; border-radius: 6px; padding: 0 14px; }
.fold > summary { cursor: pointer; padding: 8px 0; font-weight: 600; } .fold[open] { padding-bottom: 12px; }
.failures { border-left: 4px solid #d55e00; padding-left: 14px; margin: 18px 0; }
.failures h3 { margin-top: 0; }
code { font-size: 13px; overflow-wrap: anywhere; } noscript svg { max-width: 100%; height: auto; }
"""
