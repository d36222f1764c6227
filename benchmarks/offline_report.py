"""Table 2 as a page: what every agent gains over the study's baseline, as the study sees it and in truth."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from recsim_gr.benchmarks.charts import styles_of
from recsim_gr.benchmarks.first_principles import check_first_principles
from recsim_gr.benchmarks.offline_charts import FIGURES, RULE_NAMES, mean_regret, promise, regret
from recsim_gr.benchmarks.offline_choices import DEFAULT, RULES
from recsim_gr.benchmarks.offline_statements import (
    FAILS,
    HOLDS,
    OTHERWISE,
    SEEMS,
    STATEMENTS,
    Statement,
    Verdict,
    caution,
    level_name,
    readings,
    said,
    verdicts,
)
from recsim_gr.benchmarks.offline_trials import (
    REFERENCE,
    Percentage,
    Trials,
    percentages,
    read_trials,
)
from recsim_gr.benchmarks.offline_wording import (
    COSTS,
    DEVIATION,
    DEVIATION_NOTE,
    FIGURES_THEMSELVES,
    HEADLINE,
    HOW,
    PROMISE_NOTE,
    REGIONS_NOTE,
    REGRET_NOTE,
    SELECTION,
    STATEMENTS_NOTE,
    STUDY,
    TWIN_HEADINGS,
    TWINS,
)
from recsim_gr.benchmarks.page import config_table, document, figure_element, folded, number, p_value, signed, table
from recsim_gr.benchmarks.report import javascript, read_run, remove_stale, write_figure
from recsim_gr.benchmarks.statistics import FloatArray, t_interval
from recsim_gr.files import write_text
from recsim_gr.scoring import METRICS

SIGNIFICANT = 0.05

# ---------------------------------------------------------------------------------------------------------- table 2


def percent(value: float) -> str:
    """A percentage with its sign, to a tenth."""
    return f"{value:+z.1f}".replace("-", "−") if np.isfinite(value) else "–"


def table2(trials: Trials, rule: str) -> str:
    """A row an agent, level after level: percentages over the reference, the study's and in italics the truth."""
    columns = [name for seen in STUDY for name in (seen, *TWINS[seen])] + [HEADLINE]
    found = {metric: percentages(trials, rule, metric) for metric in columns}
    body = []
    for level in range(len(trials.noise)):
        body.append(f'<tbody><tr class="level"><th colspan="{len(columns) + 2}">{level_name(trials, level)}</th></tr>')
        body.append(_reference_row(trials, columns, level))
        for agent in trials.ordered:
            if agent == REFERENCE or not np.isfinite(trials.of(agent, rule, HEADLINE)[level]).any():
                continue
            body.append(f"<tr>{agent_cell(trials, agent)}")
            for metric in columns:
                body.append(_percent_cell(found[metric][agent], level, metric not in STUDY, trials.shape[1]))
                if metric == "judge_return":
                    body.append(_deviation_cell(trials, agent, rule, level))
            body.append("</tr>")
        body.append("</tbody>")
    return table(_table2_head(), "".join(body), "headline")


def _reference_row(trials: Trials, columns: Sequence[str], level: int) -> str:
    """The reference's own figures, which the others are percentages over."""
    cells = []
    for metric in columns:
        shown = number(float(t_interval(trials.of(REFERENCE, DEFAULT, metric)[level])[0]))
        cells.append(f"<td>{shown if metric in STUDY else f'<i>{shown}</i>'}</td>")
        if metric == "judge_return":
            cells.append(_deviation_cell(trials, REFERENCE, DEFAULT, level))
    return f'<tr><th class="reference">{REFERENCE} <small>itself</small></th>{"".join(cells)}</tr>'


def _table2_head() -> str:
    heads = []
    for seen, title in STUDY.items():
        heads.append(f"<th>{title}</th>")
        if seen == "judge_return":
            heads.append("<th>deviation<small>of it, in %</small></th>")
        heads += [f"<th><i>{TWIN_HEADINGS[twin]}</i></th>" for twin in TWINS[seen]]
    return f"<tr><th>% over {REFERENCE}</th>{''.join(heads)}<th><i>true top-10 value</i></th></tr>"


def _percent_cell(found: Percentage, level: int, truth: bool, n_seeds: int) -> str:
    mean, half, p = (float(values[level]) for values in (found.mean, found.half, found.p))
    if not np.isfinite(mean):
        return "<td>–</td>"
    sure = np.isfinite(p) and p <= SIGNIFICANT
    shown = f"<b>{percent(mean)}</b>" if sure else percent(mean)
    spread = f"± {half:.1f}" if np.isfinite(half) else ""
    if found.n_seeds[level] < n_seeds:
        spread += f" of {found.n_seeds[level]} seeds"
    spread = f"<small>{spread.strip()}</small>" if spread else ""
    tip = f' title="{p_value(p)}"' if np.isfinite(p) else ""
    mark = ' class="best"' if sure and mean > 0 else ""
    return f"<td{mark}{tip}>{f'<i>{shown}</i>' if truth else shown}{spread}</td>"


def _deviation_cell(trials: Trials, agent: str, rule: str, level: int) -> str:
    """Of the judge's return, in percent of it: over users within a world, and of its mean over seeds."""
    returns = trials.of(agent, rule, "judge_return")[level]
    users = t_interval(100.0 * trials.of(agent, rule, DEVIATION)[level] / returns)[0]
    known = returns[np.isfinite(returns)]
    seeds = 100.0 * known.std(ddof=1) / known.mean() if len(known) > 1 else np.nan
    return f"<td>{number(float(users), 1)}<small>{number(float(seeds), 1)}</small></td>"


def agent_cell(trials: Trials, agent: str) -> str:
    """The head of an agent's row; what is no competitor is grey."""
    style = styles_of(trials.agents)[agent]
    role = style.role if agent in trials.competitors or style.role != "learner" else "ceiling"
    return f'<th class="{role}"><i style="background:{style.colour}"></i>{escape(agent)}</th>'


# ------------------------------------------------------------------------------------------------------- statements


def statements(trials: Trials, rule: str) -> str:
    """The study's statements, one after another, a row an agent and noise level."""
    parts = []
    for heading, asked in STATEMENTS.items():
        rows = "".join(_statement_rows(statement, trials, rule) for statement in asked)
        parts.append(f"<h3>“{escape(heading)}”</h3>" + table(_STATEMENT_HEAD, rows))
    return "".join(parts)


_STATEMENT_HEAD = (
    "<tr><th>noise</th><th class='text'>agent</th><th class='text'>verdict</th><th>p holds</th><th>p does not</th>"
    "<th class='text'>the differences behind it ± half of the 95 % interval, the lowest first</th></tr>"
)


def _statement_rows(statement: Statement, trials: Trials, rule: str) -> str:
    kind = "as the study could see it" if statement.seen else "in truth"
    title = f"{escape(statement.claim)} <small>{kind}: {escape(statement.meaning)}</small>"
    if unasked := statement.unasked(trials):
        title += f" <small>not asked against {escape(', '.join(unasked))}, which the run leaves out</small>"
    found = verdicts(statement, trials, rule)
    rows = "".join(_verdict_row(verdict, trials) for verdict in found)
    missing = '<tr><td colspan="6" class="text">agents are missing</td></tr>'
    return f'<tbody><tr class="level"><th colspan="6" class="text">{title}</th></tr>{rows or missing}</tbody>'


SHOWN_PARTS = 3
"""Of the differences behind a verdict, how many the table has room for."""


def _verdict_row(verdict: Verdict, trials: Trials) -> str:
    parts = [f"{escape(title)} {signed(mean, half)}" for title, mean, half in verdict.parts[:SHOWN_PARTS]]
    left = len(verdict.parts) - len(parts)
    behind = "; ".join(parts) + (f"; and {left} more" if left else "")
    p = "".join(f"<td>{number(value)}</td>" for value in (verdict.p_holds, verdict.p_fails))
    word = said(verdict.word, verdict.n_seeds)
    shown = f"<b>{word}</b>" if verdict.word in (HOLDS, FAILS) else word
    return (
        f"<tr><th>{level_name(trials, verdict.level)}</th><td class='text'>{escape(verdict.agent)}</td>"
        f"<td class='text'>{shown}</td>{p}<td class='text'>{behind}</td></tr>"
    )


REGION = {
    HOLDS: ("holds", "yes"),
    SEEMS: ("<i>leans to yes</i>", "rather"),
    OTHERWISE: ("<i>leans to no</i>", "rather-not"),
    FAILS: ("does not", "no"),
}
"""What a verdict is in a narrow cell, and the cell's class."""


def regions(found: Mapping[str, Trials]) -> str:
    """A row a statement and agent, a column a part of the run and noise level: verdicts at the defaults."""
    rule = DEFAULT
    body = []
    for heading, asked in STATEMENTS.items():
        width = 1 + sum(len(trials.noise) for trials in found.values())
        body.append(f'<tbody><tr class="level"><th colspan="{width}">“{escape(heading)}”</th></tr>')
        for statement in asked:
            cells: dict[str, dict[tuple[str, int], str]] = {}
            for name, trials in found.items():
                for verdict in verdicts(statement, trials, rule):
                    cells.setdefault(verdict.agent, {})[name, verdict.level] = _region_cell(verdict, trials)
            kind = "seen" if statement.seen else "in truth"
            unasked = sorted({name for trials in found.values() for name in statement.unasked(trials)})
            if not cells:
                missing = f"{escape(statement.claim)} <small>{kind}; agents are missing</small>"
                body.append(f"<tr><th class='text claim' colspan=\"{width}\">{missing}</th></tr>")
            for agent, of_agent in cells.items():
                places = ((name, level) for name, trials in found.items() for level in range(len(trials.noise)))
                row = "".join(of_agent.get(place, "<td>–</td>") for place in places)
                left_out = f", not asked against {escape(', '.join(unasked))}" if unasked else ""
                claim = f"{escape(statement.claim)} <small>{kind}, {escape(agent)}{left_out}</small>"
                body.append(f"<tr><th class='text claim'>{claim}</th>{row}</tr>")
        body.append("</tbody>")
    told = _differing([trials.title for trials in found.values()])
    parts = "".join(
        f'<th colspan="{len(trials.noise)}">{escape(title)}</th>'
        for title, trials in zip(told, found.values(), strict=True)
    )
    levels = "".join(
        f'<th title="{level_name(t, level)}">ν {t.noise[level]:g}</th>'
        for t in found.values()
        for level in range(len(t.noise))
    )
    head = f"<tr><th></th>{parts}</tr><tr><th class='text'>at the default strengths</th>{levels}</tr>"
    return table(head, "".join(body))


def _differing(titles: Sequence[Sequence[str]]) -> list[str]:
    """What tells titles apart: their parts that are not the same in all; of a single one everything."""
    kept = [k for k, parts in enumerate(zip(*titles, strict=True)) if len(set(parts)) > 1 or len(titles) == 1]
    return [" · ".join(title[k] for k in kept) for title in titles]


def _region_cell(verdict: Verdict, trials: Trials) -> str:
    word, kind = REGION.get(verdict.word, ("–", ""))
    title, mean, half = verdict.parts[0]
    tip = f"{said(verdict.word, verdict.n_seeds)}: {title} {signed(mean, half)}"
    return f'<td class="{kind}" title="{escape(tip)}">{word}</td>'


# ------------------------------------------------------------------------------------------------------- selection


def regret_table(trials: Trials) -> str:
    """A row an agent, level after level: what each rule loses to the best strength, the strengths it takes, and how
    often they stand at an end of the grid."""
    rules = trials.rules
    body = []
    for level in range(len(trials.noise)):
        body.append(f'<tbody><tr class="level"><th colspan="{len(rules) + 1}">{level_name(trials, level)}</th></tr>')
        means = "".join(f"<td>{_lost(mean_regret(trials, rule)[level])}</td>" for rule in rules)
        body.append(f"<tr><th>mean over agents</th>{means}</tr>")
        for agent in trials.selected:
            cells = "".join(_regret_cell(trials, agent, rule, level) for rule in rules)
            body.append(f"<tr>{agent_cell(trials, agent)}{cells}</tr>")
        body.append("</tbody>")
    heads = "".join(f"<th title='{escape(RULES.get(rule, ''))}'>{RULE_NAMES[rule]}</th>" for rule in rules)
    return table(f"<tr><th>true top-10 value lost</th>{heads}</tr>", "".join(body), "headline")


def _lost(regrets: FloatArray) -> str:
    """Mean and interval over the worlds in which there is a choice, and their number where it is not all."""
    mean, half, n = t_interval(regrets)
    shown = number(float(mean)) + (f" ± {number(float(half))}" if np.isfinite(half) else "")
    return shown + (f" ({n} of {len(regrets)})" if 0 < n < len(regrets) else "")


def _regret_cell(trials: Trials, agent: str, rule: str, level: int) -> str:
    taken = [value for value in trials.strength(agent, rule)[level] if np.isfinite(value)]
    names = ", ".join(f"{value:g}" for value in taken)
    grid = (trials.swept or {}).get(agent, ())
    ends = sum(value in (grid[0], grid[-1]) for value in taken) if len(grid) > 1 and rule != DEFAULT else 0
    flag = f" ⚑ {ends} of {len(taken)} at an end" if ends else ""
    option = escape(trials.options.get(agent, ""))
    return f"<td>{_lost(trials.regret(agent, rule)[level])}<small>{option} {names}{flag}</small></td>"


def selection_lines(trials: Trials) -> list[str]:
    """What the choices cost, and how many stand at an end of their grid, rule by rule."""
    lines = []
    for rule in trials.rules:
        over_seeds = t_interval(mean_regret(trials, rule).T)[0]
        taken = sum(int(np.isfinite(trials.strength(agent, rule)).sum()) for agent in trials.selected)
        line = f"Strength by {RULE_NAMES[rule]}: true top-10 value lost {_lost(over_seeds)}"
        ends = np.array([trials.at_the_end(agent, rule) for agent in trials.selected]).sum(axis=0)
        if rule != DEFAULT:
            line += f"; at the weakest end {ends[0]}, at the strongest {ends[1]} of {taken}"
        if rule == "judge_ndcg":
            line += f"; in {sum(map(trials.short_of_ndcg, trials.selected))} no strength keeps 95 % of NDCG@10"
        lines.append(line)
    return lines


# ------------------------------------------------------------------------------------------------------------ costs


def cost_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Seconds of a fit and of a gradient step beside BC's, means over cells; nothing where no cell tells."""
    spent: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        agents = cell.get("agents")
        for label, costs in agents.items() if isinstance(agents, dict) else ():
            for key, value in costs.items() if isinstance(costs, dict) else ():
                if isinstance(value, (int, float)) and np.isfinite(value):
                    spent.setdefault(label, {}).setdefault(key, []).append(float(value))
    if not spent:
        return ""
    means = {label: {key: float(np.mean(values)) for key, values in costs.items()} for label, costs in spent.items()}
    base = _seconds_a_step(means.get("BC", {}))
    rows = "".join(f"<tr><th>{escape(label)}</th>{_cost_cells(costs, base)}</tr>" for label, costs in means.items())
    heads = ("seconds to fit", "of them preparing", "gradient steps", "ms a step", "× BC's", "online samples")
    head = "".join(f"<th>{title}</th>" for title in heads)
    return f"<h3>What it cost</h3><p class='note'>{COSTS}</p>" + table(
        f"<tr><th>fit</th>{head}</tr>", f"<tbody>{rows}</tbody>"
    )


def _cost_cells(costs: Mapping[str, float], base: float) -> str:
    seconds, prepared, steps, samples = (
        costs.get(key, np.nan) for key in ("fit_seconds", "preparation_seconds", "gradient_steps", "samples")
    )
    each = _seconds_a_step(costs)
    shown = (
        number(seconds, 2), number(prepared, 2), f"{steps:,.0f}" if steps > 0 else "–", number(1e3 * each, 2),
        number(each / base, 2), f"{samples:,.0f}" if samples > 0 else "–",
    )  # fmt: skip
    return "".join(f"<td>{text}</td>" for text in shown)


def _seconds_a_step(costs: Mapping[str, float]) -> float:
    """Processor seconds of a gradient step, the checks on validation users spread over them; NaN without any."""
    steps, spent = costs.get("gradient_steps", 0.0), costs.get("fit_processor_seconds", np.nan)
    return (spent - costs.get("preparation_seconds", 0.0)) / steps if steps > 0 else np.nan


# ------------------------------------------------------------------------------------------------------------- page


def _section(trials: Trials, name: str, pictures: Sequence[str]) -> list[str]:
    own = [f"<h2>{escape(name)}</h2>", f"<p class='note'><b>{escape(caution(trials))}</b></p>", *pictures[:1]]
    own += ["<h3>Table 2, every agent at its default</h3>", f"<p class='note'>{DEVIATION_NOTE}</p>"]
    own += [table2(trials, DEFAULT), "<h2>What the study says of it</h2>", f"<p class='note'>{STATEMENTS_NOTE}</p>"]
    own.append(statements(trials, DEFAULT))
    rules = [rule for rule in trials.rules if rule != DEFAULT]
    if rules:
        lines = "".join(f"<li>{escape(line)}</li>" for line in selection_lines(trials))
        own += ["<h2>Choosing the strength</h2>", f"<p class='note'>{SELECTION}</p><ul>{lines}</ul>", *pictures[1:]]
        own += [regret_table(trials)]
    for rule in rules:
        title = f"strengths chosen by {RULE_NAMES[rule]}"
        own.append(folded(f"Table 2, {title}", table2(trials, rule)))
        own.append(folded(f"The statements, {title}", statements(trials, rule)))
    own.append(folded("The figures themselves", value_table(trials)))
    laws = (f"<b>{escape(x)}</b>" if x.startswith("FAILS") else escape(x) for x in checks(trials))
    return [*own, "<h3>Whatever the ranking</h3><ul>", *(f"<li>{law}</li>" for law in laws), "</ul>"]


def checks(trials: Trials) -> list[str]:
    """What must hold of every world, whichever agent is best: the landscape's checks, of agents at their defaults."""
    return check_first_principles(trials.results(DEFAULT), "WatchTime" in trials.env, trials.noise_model)


def value_table(trials: Trials) -> str:
    """Means over seeds of what Table 2 is made of, at the default."""
    known = {metric for _, _, metric in trials.values}
    metrics = {name: title for name, title in FIGURES_THEMSELVES.items() if name in known}
    heads = "".join(f'<th title="{escape(METRICS.get(m, m))}">{escape(title)}</th>' for m, title in metrics.items())
    body = []
    for level in range(len(trials.noise)):
        heading = f'<tr class="level"><th colspan="{len(metrics) + 1}">{level_name(trials, level)}</th></tr>'
        rows = ""
        for agent in trials.ordered:
            means = (float(t_interval(trials.of(agent, DEFAULT, metric)[level])[0]) for metric in metrics)
            rows += f"<tr>{agent_cell(trials, agent)}{''.join(f'<td>{number(mean)}</td>' for mean in means)}</tr>"
        body.append(f"<tbody>{heading}{rows}</tbody>")
    return table(f"<tr><th>agent</th>{heads}</tr>", "".join(body))


def write_table2(run_dir: Path) -> tuple[Path, list[str]]:
    """Writes ``report.html`` and ``figures/``; the page, and lines worth printing.

    Raises:
        RunDirectoryError: the run cannot be read, or is another suite's.
    """
    run = read_run(run_dir)
    title = " · ".join(str(run.config[key]) for key in ("suite", "preset") if run.config.get(key))
    body = [f"<h1>recsim_gr <span>{escape(title)}</span></h1><p class='note'>{HOW}</p>"]
    for failure in run.failures:
        reason = f"{failure.get('cell')}: {failure.get('reason')}"
        body.append(f"<p class='note'><b>FAILED</b> {escape(reason)}</p>")
    lines: list[str] = []
    written: set[str] = set()
    found = read_trials(run_dir / "results.parquet", run.config)
    fewest = caution(min(found.values(), key=lambda trials: len(trials.seeds)))
    body += ["<h2>Where each statement of the study holds</h2>", f"<p class='note'><b>{escape(fewest)}</b></p>"]
    body += [f"<p class='note'>{REGIONS_NOTE}</p>", regions(found)]
    for k, (name, trials) in enumerate(found.items()):
        suffix, subtitle = f"-{k + 1}" if k else "", _subtitle(run.config, trials)
        pictures = []
        for drawn, note in (
            (promise(trials, DEFAULT, subtitle, "promise" + suffix), PROMISE_NOTE),
            (regret(trials, subtitle, "regret" + suffix) if trials.selected else None, REGRET_NOTE),
        ):
            if drawn is not None:
                picture = write_figure(run_dir / "figures", drawn.name, drawn)
                pictures.append(figure_element(drawn.name, drawn, picture, note))
                written.add(drawn.name)
        body += _section(trials, name, pictures)
        lines += [f"{name}:"] if len(found) > 1 else []
        lines += readings(trials, DEFAULT) + (selection_lines(trials) if trials.selected else [])
        lines += checks(trials)
    remove_stale(run_dir / "figures", FIGURES, written)
    body += [cost_table(run.cells), config_table(run.config, "Configuration of the run")]
    write_text(run_dir / "report.html", document(title, body, javascript()))
    return run_dir / "report.html", lines


def _subtitle(config: Mapping[str, Any], trials: Trials) -> str:
    n = len(trials.seeds)
    seeds = f"mean over {n} seeds" if n > 1 else "one seed, so no interval"
    sizes = f"{trials.noise_model} noise · {trials.log_size:,} training users"
    return " · ".join(str(fact) for fact in (config.get("preset"), sizes, seeds) if fact)
