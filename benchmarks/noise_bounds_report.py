"""The page of suite ``noise_bounds``: truth over the temperature, which is best, which is advised, and the bound."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from recsim_gr.benchmarks.noise_bounds_charts import (
    FIGURES,
    bound_figure,
    size_figure,
    trained_figure,
    truth_figure,
)
from recsim_gr.benchmarks.noise_bounds_measures import largest_deviation, promised_loss
from recsim_gr.benchmarks.noise_bounds_results import (
    ENDLESS,
    RULES,
    SHAPES,
    Advice,
    Grid,
    Way,
    advised,
    best_of,
    in_hindsight,
    shape_of,
    trained_ways,
    untrained_end,
    ways,
)
from recsim_gr.benchmarks.page import NONE, config_table, document, figure_element, folded, number, signed, table
from recsim_gr.benchmarks.report import javascript, read_run, remove_stale, write_figure
from recsim_gr.benchmarks.statistics import FloatArray, t_interval
from recsim_gr.files import write_text
from recsim_gr.observations import HIGHEST_SCORE, LOWEST_SCORE

RANGE = HIGHEST_SCORE - LOWEST_SCORE
SLACK = 1e-6
"""Points, of the laws below: float32 satisfactions, sums of a thousand."""


# ---------------------------------------------------------------------------------------------------------- lines


def summary(grid: Grid) -> list[str]:
    """The reading of the tables, then what must hold."""
    return [*_bound_lines(grid), *_trained_lines(grid), *_shape_lines(grid), *_advice_lines(grid), *checks(grid)]


def _bound_lines(grid: Grid) -> Iterator[str]:
    for titles in grid.catalogues:
        room = _room(grid, titles)
        yield (
            f"{titles:,} titles: the bound says something below σ = {largest_deviation(RANGE, titles, grid.delta):.2f} "
            f"against the range of {RANGE:g}, and below {largest_deviation(room, titles, grid.delta):.2f} against what "
            f"there is to lose, V(μ) less the worst title ({room:.2f})"
        )


def _room(grid: Grid, titles: int) -> float:
    """Mean over worlds of V(μ) less the worst title's value: no policy can lose more."""
    found = [
        grid.of_seeds("value_mu", titles, level) - grid.of_seeds("value_least", titles, level)
        for level in range(len(grid.sigmas))
    ]
    return float(t_interval(np.concatenate(found))[0])


def _trained_lines(grid: Grid) -> Iterator[str]:
    """The bound is of a policy made of μ itself, which no trained agent has: set beside them all the same."""
    for way in (way for way in trained_ways(grid) if way.value == "trained_value"):
        said = []
        for titles, level, _ in _worlds(grid, way):
            gained = grid.above(way, grid.of_seeds("trained_value_mu", titles, level), titles, level)
            if not gained.size:
                continue
            promised = promised_loss(grid.sigmas[level], titles, grid.delta)
            least = signed(float(gained.min()))
            said.append(f"{titles:,} titles σ {grid.sigmas[level]:g}: {least} (promised {number(-promised, 2)})")
        if said:
            yield f"{way.label}, V(π) − V(μ) at the worst λ and seed: " + ", ".join(said)


UNTRAINED_MARK = " (lowest λ: never trained)"
"""Of a shape whose low arm is the pretrained policy, which early stopping kept in all seeds."""


def _shape_lines(grid: Grid) -> Iterator[str]:
    for way in [*ways(grid), *trained_ways(grid)]:
        said: dict[str, list[str]] = {shape: [] for shape in SHAPES}
        for titles, level, values in _worlds(grid, way):
            best = grid.temperatures(way, titles)[best_of(values)]
            mark = UNTRAINED_MARK if untrained_end(grid, way, titles, level) else ""
            said[shape_of(values)].append(f"{titles:,} × σ {grid.sigmas[level]:g} → {best:g}{mark}")
        parts = [f"{shape}: {', '.join(where)}" for shape, where in said.items() if where]
        if parts:
            yield f"{way.label}, titles × σ → best λ: " + "; ".join(parts)


def _advice_lines(grid: Grid) -> Iterator[str]:
    """The mean and the largest loss of each rule over all worlds."""
    for way in [*ways(grid), *trained_ways(grid)]:
        lost: dict[str, list[float]] = {}
        picked = [in_hindsight(values) for _, _, values in _worlds(grid, way) if values.shape[1] > 1]
        for titles, level, _ in _worlds(grid, way):
            for rule, advice in advised(grid, way, titles, level).items():
                lost.setdefault(rule, []).append(float(advice.lost.mean()))
        parts = [
            f"{RULES[rule]} {np.mean(values):.3f} (largest {max(values):.3f})"
            for rule, values in lost.items()
            if values
        ]
        if parts:
            flattered = f"; of it the best owes {np.mean(picked):.3f} to being picked on these seeds" if picked else ""
            yield (
                f"{way.label}, value lost against the best λ in hindsight, mean over noise and catalogues: "
                + ", ".join(parts)
                + flattered
            )


def _worlds(grid: Grid, way: Way) -> Iterator[tuple[int, int, FloatArray]]:
    """Titles, level and (K, S) true values, where there are any."""
    for titles in grid.catalogues:
        for level in range(len(grid.sigmas)):
            values = grid.curve(way, way.value, titles, level)
            if values.size:
                yield titles, level, values


def checks(grid: Grid) -> list[str]:
    """What must hold whatever the noise did."""
    return [_bound_holds(grid), _endless_log_falls(grid), _certificate_holds(grid)]


def _verdict(known: bool, holds: bool) -> str:
    """How a check's line begins: nothing to check is no success."""
    return ("holds" if holds else "FAILS") if known else "open"


def _bound_holds(grid: Grid) -> str:
    way = ways(grid)[0]
    found = [t_interval(grid.of_way(way, "violated", titles, level))[0] for titles, level, _ in _worlds(grid, way)]
    violated = [float(share) for share in found if np.isfinite(share)]
    worst = max(violated, default=0.0)
    verdict = _verdict(bool(violated), worst <= grid.delta)
    return (
        f"{verdict}: with one score a title the bound is broken at some λ in at most δ = {grid.delta:g} of contexts "
        f"(at most in {worst:g})"
    )


def _endless_log_falls(grid: Grid) -> str:
    """dV/dλ = −Var_π(s)/λ²: with an endless log Gaussian noise costs nothing, and no λ is too low."""
    way = Way(ENDLESS, ENDLESS, judged="")
    rises = [float(np.diff(values, axis=0).max()) for _, _, values in _worlds(grid, way) if len(values) > 1]
    worst = max(rises, default=0.0)
    verdict = _verdict(bool(rises), worst <= SLACK)
    return f"{verdict}: with an endless log truth falls with λ whatever σ (largest rise {max(worst, 0.0):.2g})"


def _certificate_holds(grid: Grid) -> str:
    way, broken, count = ways(grid)[0], 0, 0
    for titles, level, _ in _worlds(grid, way):
        mu = grid.of_seeds("value_mu", titles, level)
        gained = grid.above(way, mu, titles, level)
        proved = grid.above(way, 0.0 * mu, titles, level, "certified")
        known = np.isfinite(proved)
        broken += int((gained < proved - SLACK)[known].sum())
        count += int(known.sum())
    verdict = _verdict(count > 0, broken == 0)
    return f"{verdict}: no world's mean gain is below its certificate ({broken} of {count} worlds and temperatures)"


# --------------------------------------------------------------------------------------------------------- tables


def advice_table(grid: Grid, of_ways: Sequence[Way]) -> str:
    """A row a catalogue and σ: the best temperature, the shape, and each rule's choice and what it loses."""
    rules = [
        rule
        for rule in RULES
        if any(rule in advised(grid, way, t, k) for way in of_ways for t, k, _ in _worlds(grid, way))
    ]
    heads = "".join(f"<th>{escape(RULES[rule])}<small>λ, value lost</small></th>" for rule in rules)
    head = (
        f"<tr><th>titles, σ</th><th>best λ</th><th>truth at it<small>above λ = ∞</small></th><th>shape</th>{heads}</tr>"
    )
    body = []
    for way in of_ways:
        rows = [_advice_row(grid, way, *world, rules) for world in _worlds(grid, way)]
        heading = f'<tr class="level"><th colspan="{4 + len(rules)}">{escape(way.label)}</th></tr>'
        body.append(f"<tbody>{heading}{''.join(rows)}</tbody>" if rows else "")
    return table(head, "".join(body), "headline") if any(body) else ""


def _advice_row(grid: Grid, way: Way, titles: int, level: int, values: FloatArray, rules: Sequence[str]) -> str:
    best = best_of(values)
    temperature = grid.temperatures(way, titles)[best]
    above = grid.above(way, grid.imitation(way, titles, level), titles, level)
    gained, half, n = t_interval(above[best])
    # the seeds are told where imitation has fewer
    fewer = "" if n == values.shape[1] else f" ({n} of {values.shape[1]} seeds)"
    found = advised(grid, way, titles, level)
    cells = "".join(f"<td>{_advice_cell(found.get(rule))}</td>" for rule in rules)
    shape = shape_of(values)
    never = untrained_end(grid, way, titles, level)
    mark = ' class="best"' if shape == "inverted U" and not never else ""
    untrained = f"<small>{UNTRAINED_MARK.strip(' ()')}</small>" if never else ""
    return (
        f"<tr><th>{titles:,}, σ = {grid.sigmas[level]:g}</th><td>{temperature:g}</td>"
        f"<td><b>{number(float(values[best].mean()))}</b>"
        f"<small>{signed(float(gained), float(half))}{fewer}</small></td>"
        f"<td{mark}>{shape}{untrained}</td>{cells}</tr>"
    )


def _advice_cell(advice: Advice | None) -> str:
    if advice is None:
        return NONE
    lost, half, _ = t_interval(advice.lost)
    chosen = float(np.exp(np.log(advice.temperature).mean()))
    return f"{chosen:.3g} ({_factor(float(advice.doublings.mean()))})<small>{signed(-float(lost), float(half))}</small>"


def _factor(doublings: float) -> str:
    """How far a temperature is from the best: × 4, ÷ 2."""
    if abs(doublings) < 0.05:
        return "the best"
    return f"{'×' if doublings > 0 else '÷'} {2.0 ** abs(doublings):.2g}"


def stopping_table(grid: Grid) -> str:
    """After how many of its steps the kept state of a trained agent stood, by temperature: 0 is the pretrained one."""
    found = [way for way in trained_ways(grid) if way.value == "trained_value"]
    tried = sorted({t for way in found for titles in grid.catalogues for t in grid.temperatures(way, titles)})
    body = []
    for way in found:
        rows = []
        for titles, level, _ in _worlds(grid, way):
            steps = dict(
                zip(grid.temperatures(way, titles), grid.curve(way, "trained_best_step", titles, level), strict=True)
            )
            cells = "".join(
                f"<td>{', '.join(f'{k:.0f}' for k in steps[t]) if t in steps else NONE}</td>" for t in tried
            )
            rows.append(f"<tr><th>{titles:,}, σ = {grid.sigmas[level]:g}</th>{cells}</tr>")
        heading = f'<tr class="level"><th colspan="{1 + len(tried)}">{escape(way.label.split(",")[0])}</th></tr>'
        body.append(f"<tbody>{heading}{''.join(rows)}</tbody>")
    heads = "".join(f"<th>λ = {t:g}</th>" for t in tried)
    return table(f"<tr><th>titles, σ</th>{heads}</tr>", "".join(body)) if body else ""


def bound_table(grid: Grid) -> str:
    """A row a catalogue and σ: what is promised, what there is to lose, and what came."""
    head = (
        "<tr><th>titles, σ</th><th>2σ√(2 ln(2|A|/δ))</th><th>against the range of 4</th>"
        "<th>V(μ) less the worst title</th><th>says something</th>"
        "<th>came at worst<small>quantile δ, over all λ</small></th>"
        "<th>broken in<small>of contexts</small></th><th>best λ<small>gain</small></th>"
        "<th>worse off than with μ<small>of contexts, at the best λ</small></th></tr>"
    )
    way, rows = ways(grid)[0], []
    for titles, level, values in _worlds(grid, way):
        promised = promised_loss(grid.sigmas[level], titles, grid.delta)
        mu = grid.of_seeds("value_mu", titles, level)
        room = float(t_interval(mu - grid.of_seeds("value_least", titles, level))[0])
        lowest, half, _ = t_interval(grid.of_way(way, "lowest", titles, level))
        best = best_of(values)
        harmed = float(t_interval(grid.curve(way, "harmed", titles, level)[best])[0])
        gained = signed(float(t_interval(grid.above(way, mu, titles, level)[best])[0]))
        said = "yes" if promised < room else "against the range alone" if promised < RANGE else "no"
        rows.append(
            f"<tr><th>{titles:,}, σ = {grid.sigmas[level]:g}</th><td>{number(promised, 2)}</td>"
            f"<td>{'below' if promised < RANGE else 'above'}</td><td>{number(room, 2)}</td><td>{said}</td>"
            f"<td>{signed(float(lowest), float(half))}</td>"
            f"<td>{float(t_interval(grid.of_way(way, 'violated', titles, level))[0]):.1%}</td>"
            f"<td>{grid.temperatures(way, titles)[best]:g}<small>{gained}</small></td>"
            f"<td>{harmed:.0%}</td></tr>"
        )
    return table(head, f"<tbody>{''.join(rows)}</tbody>", "headline")


# ----------------------------------------------------------------------------------------------------------- page


CLAIM = """<b>The claim.</b> As its abstract and notes on it have it (the full text is not at hand), arXiv:2603.10279
(Chidambaram et al., 2026) proves for weights exp(r/λ) on observed rewards with σ-sub-Gaussian noise that
V(π_λ) ≥ V(μ) − 2σ·sqrt(2 ln(2|A|/δ)): the gap grows with the logarithm of the catalogue alone. And λ “explicitly and
quantifiably controls the robustness-improvement tradeoff”: low temperatures pay for noise, high ones for standing
still, so that truth over λ is an inverted U. The bound itself holds no λ and so advises none; what a practitioner would
take is set beside the best: the agent's default, λ = σ (our reading of the trade, not a quotation), the choice of a
judge on users or events that nothing was learned from, and that of the <i>certificate</i>, which the proof gives on its
way and which knows λ: V(π) − V(μ) ≥ E_π[r] − E_μ[r] − b·‖π − μ‖₁ with b half of the bound."""

HOW = """<b>How it is checked.</b> Noise is Gaussian and unbiased, σ its deviation; the truth is exact over titles. In
<i>tabular contexts</i> the policy is the exact optimum of its loss for each context, where μ is known: with an
<i>endless log</i>; with <i>one score a title</i>, which is the theorem's case (a union over |A| scores); with a
<i>log</i> of so many events drawn from μ, each with a score of its own, from which Exp-RSFT weighs every event by its
own score and A-SFT by its title's mean score, shrunk by credibility. The <i>trained</i> agents are the shipped ones, on
one log of many users. ± is half of a 95 % Student-t interval over seeds; the shape is tested on seeds that did not
choose the best λ, and not corrected over worlds."""

CAPTIONS = {
    "truth": """Height: true value of the policy as sampled, above V(μ) = λ → ∞. Ringed: the best λ. Dotted: λ = σ.
With an endless log Gaussian noise costs nothing, since it multiplies all weights alike: what bends the other lines down
on the left is that scores are few. Columns share their vertical axis.""",
    "log_size": "As above, by events of each context's log.",
    "trained": """Height: true value above BC, which is λ = ∞ for these agents (same steps, same batches). Ringed: the
best λ. Dotted: λ = σ. Whiskers: 95 % Student-t of the paired difference, cut off at the frame where they are wider.
A line that stands still at low λ is the pretrained policy, which early stopping kept: it has learned nothing there.
Weights are over the mean of their batch, so that no event counts for more than a batch has events: where λ is far below
σ, Exp-RSFT has a higher effective λ (1.2 for λ = .5 at σ = 4, see `recsim_gr.agents.exp_rsft`).
As sampled, sharpening alone raises the value; the top-10 list is what a user would see.""",
    "bound": """In the theorem's case. Where the dashed line lies below the dotted one, the bound promises less than
what no policy could fail to keep.""",
}

ADVICE_NOTE = """The best λ is that of the mean over seeds, picked in hindsight on the seeds that it is measured on: its
value is flattered, and so is what rules lose to it; by how much is told in words below. In a rule's cell: the λ that it
takes, of the grid (the mean of seeds, geometric), how many times the best that is, and the value lost or gained against
the best."""


STOPPING_NOTE = """Every agent keeps the state of the lowest loss on validation users, its own weighted loss. 0: no step
lowered it, so that what is scored is the pretrained policy: where weights are all noise this rule, and not λ, is what
protects an agent."""


def write_noise_bounds(run_dir: Path) -> tuple[Path, list[str]]:
    """Writes ``report.html`` and ``figures/``; the page, and lines worth printing.

    Raises:
        RunDirectoryError: the run cannot be read, or is another suite's.
    """
    run = read_run(run_dir)
    grid = Grid.of(next(iter(run.worlds.values())), run.config)
    subtitle = _subtitle(grid)
    drawn = [draw(grid, subtitle) for draw in (truth_figure, size_figure, trained_figure, bound_figure)]
    elements = {
        figure.name: figure_element(
            figure.name, figure, write_figure(run_dir / "figures", figure.name, figure), CAPTIONS[figure.name]
        )
        for figure in drawn
        if figure is not None
    }
    remove_stale(run_dir / "figures", FIGURES, set(elements))
    lines = summary(grid)
    failed = [
        f"<p class='note'>{escape(str(failure.get('cell')))}: {escape(str(failure.get('reason')))}</p>"
        for failure in run.failures
    ]
    write_text(run_dir / "report.html", page(run.config, grid, elements, lines, failed))
    return run_dir / "report.html", lines


def _noted(note: str, content: str) -> str:
    """A table under its note; nothing where there is no table."""
    return f"<p class='note'>{note}</p>{content}" if content else ""


def _subtitle(grid: Grid) -> str:
    config, n = grid.config, len(grid.results.seeds)
    trained = max(
        (v.shape[1] for way in trained_ways(grid) for _, _, v in _worlds(grid, way)),
        default=0,
    )
    facts = [
        "gaussian noise",
        f"{n} seed{'s' if n > 1 else ''}" + (f", of trained agents {trained}" if trained else ""),
        f"{config['tabular_contexts']} tabular contexts a world",
        "means over seeds",
    ]
    return " · ".join(facts)


def page(
    config: Mapping[str, Any], grid: Grid, elements: Mapping[str, str], lines: Sequence[str], failed: Sequence[str]
) -> str:
    """The page.

    Args:
        config: of the run.
        grid: its results.
        elements: name of a figure to its HTML.
        lines: the reading, and what must hold.
        failed: HTML of what has no result.
    """
    title = " · ".join(str(config[key]) for key in ("suite", "preset") if config.get(key))
    tabular = ways(grid)
    listed = "".join(
        f"<li>{f'<b>{escape(line)}</b>' if line.startswith('FAILS') else escape(line)}</li>" for line in lines
    )
    body = [
        f"<h1>recsim_gr <span>{escape(title)}</span></h1><p class='note'>{CLAIM}</p><p class='note'>{HOW}</p>",
        *failed,
        "<h2>The bound</h2>",
        elements.get("bound", ""),
        bound_table(grid),
        "<h2>Truth over λ: tabular contexts</h2>",
        elements.get("truth", ""),
        f"<p class='note'>{ADVICE_NOTE}</p>{advice_table(grid, tabular[:1])}",
        elements.get("log_size", ""),
        *(folded(escape(way.label), advice_table(grid, [way])) for way in tabular[1:]),
        "<h2>Truth over λ: trained agents</h2>" if "trained" in elements else "",
        elements.get("trained", ""),
        advice_table(grid, trained_ways(grid)),
        folded("Which step's state early stopping kept, seed by seed", _noted(STOPPING_NOTE, stopping_table(grid))),
        f"<h2>In words</h2><ul>{listed}</ul>",
        folded("Shapes", "".join(f"<p class='note'><b>{k}</b>: {escape(v)}</p>" for k, v in SHAPES.items())),
        config_table(config, "Configuration of the run"),
    ]
    return document(title, body, javascript())
