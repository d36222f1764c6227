"""What a world is, for people: a table of its figures, its pictures, and a page that opens without a network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from rich import markup
from rich.table import Table

from recsim_gr import __version__, configs
from recsim_gr.behaviour import FloatArray
from recsim_gr.benchmarks.charts import Figure
from recsim_gr.benchmarks.page import config_table, document, figure_element, folded, number, table
from recsim_gr.benchmarks.portrait import Portrait, Signal, Spread
from recsim_gr.benchmarks.portrait_charts import FIGURES, portrait_figures, short
from recsim_gr.benchmarks.portrait_measures import portray
from recsim_gr.benchmarks.report import javascript, remove_stale, write_figure
from recsim_gr.benchmarks.runner import RunDirectory
from recsim_gr.benchmarks.world_sample import Notify
from recsim_gr.errors import ConfigError
from recsim_gr.files import write_json, write_text
from recsim_gr.replay import ReplayWorld
from recsim_gr.world_base import WorldBase

FEWEST_USERS, MOST_USERS = 2, 200_000
"""Correlations need two; all events of the users are held in memory, a gigabyte for the most."""


@dataclass(frozen=True)
class Fact:
    """A row of the table.

    Attributes:
        group: its heading.
        name: what it is.
        value: of this world, as people read it.
        real: the same of real data, where there is one.
    """

    group: str
    name: str
    value: str
    real: str = ""


def draw_world(
    world: WorldBase, out: Path, n_users: int, notify: Notify = lambda share, what: None
) -> tuple[Portrait, Path]:
    """Writes ``world.json`` (all numbers), ``figures/`` and ``world.html`` into a directory.

    Args:
        world: of either kind.
        out: made if it is not there; a portrait of the same world is drawn over.
        n_users: training users to look at, and as many test users; all that there are where these are fewer.
        notify: told how far it is.

    Returns:
        the numbers, and the path of the page.

    Raises:
        ConfigError: too few users, or too many.
        RunDirectoryError: the directory holds something else, or cannot be written.
    """
    if not FEWEST_USERS <= n_users <= MOST_USERS:
        raise ConfigError(f"a portrait looks at {FEWEST_USERS} to {MOST_USERS} users, got {n_users}")
    about = identity(world, n_users)
    directory = RunDirectory(out, about)
    portrait = portray(world, n_users, lambda share, what: notify(0.8 * share, what))
    directory.open()
    write_json(out / "world.json", {"config": about, **portrait.to_json()})
    drawn = portrait_figures(portrait, subtitle(world, portrait))
    pictures = []
    for k, figure in enumerate(drawn):
        notify(0.8 + 0.2 * k / len(drawn), "pictures")
        pictures.append(write_figure(out / "figures", figure.name, figure))
    remove_stale(out / "figures", FIGURES, {figure.name for figure in drawn})
    write_text(out / "world.html", page(portrait, about, drawn, pictures, javascript()))
    return portrait, out / "world.html"


def identity(world: WorldBase, n_users: int) -> dict[str, Any]:
    """What a portrait is told apart by, as JSON values; a data file counts by its content, not by where it lies."""
    config = configs.to_dict(world.config)
    if isinstance(world, ReplayWorld):
        config["path"] = Path(world.config.path).name
    return {"portrait_of": world.env_id, "version": __version__, "users": n_users, **config}


def subtitle(world: WorldBase, portrait: Portrait) -> str:
    """Which world, in a line."""
    config = world.config
    data = f"{world.matrix.name} replayed · " if isinstance(world, ReplayWorld) else ""
    noise = f"{config.noise_model} noise at {config.reward_noise:g}"
    counts = f"{portrait.n_titles:,} titles · {portrait.n_users:,} users, {portrait.n_events:,} events"
    return f"{data}{counts} · {noise} · seed {config.seed}"


# -------------------------------------------------------------------------------------------------------- facts


def facts(portrait: Portrait) -> list[Fact]:
    """The table's rows that apply to the world."""
    return [
        *_score_facts(portrait),
        *_choice_facts(portrait),
        *_popularity_facts(portrait),
        *_history_facts(portrait),
        *_watching_facts(portrait),
        *_drift_facts(portrait),
    ]


def _score_facts(portrait: Portrait) -> list[Fact]:
    truth, score, own = portrait.satisfaction, portrait.score, portrait.signal.own
    group = "Satisfaction and score"
    rows = [
        Fact(group, "satisfaction at random, mean ± deviation", _both(truth.mean[0], truth.deviation[0])),
        Fact(group, "satisfaction in the log", _both(truth.mean[1], truth.deviation[1])),
        Fact(
            group,
            "variance at random: user / title / rest",
            " / ".join(f"{part:z.2f}" for part in portrait.variance),
            "KuaiRec (watch ratio) .05 / .18 / .77; Jester .23 / .08 / .69",
        ),
        Fact(group, "score at random", _both(score.mean[0], score.deviation[0])),
        Fact(group, "score in the log", _both(score.mean[1], score.deviation[1]), "MovieLens-100K 3.53 ± 1.13"),
    ]
    if max(score.atom) > 0:
        rows.append(Fact(group, "score exactly 5, in the log", f"{score.atom[1]:.1%}"))
    return [
        *rows,
        Fact(group, "reliability within user", number(own["within_user"])),
        Fact(group, "reliability, pooled", number(own["pooled"])),
        Fact(group, "alignment of the expected score", number(own["alignment"])),
    ]


def _choice_facts(portrait: Portrait) -> list[Fact]:
    choices, confounding = portrait.choices, portrait.confounding
    group = "Choices and hidden confounding"
    real = "Coat, chosen − assigned ratings: +.38 (2.61 against 2.23)"
    thirds = " / ".join(signed(gap) for gap in confounding.gap.tolist())
    rows = [
        Fact(group, "perplexity, 10 / 50 / 90 %", quantiles(choices.perplexity)),
        Fact(group, "discernment, 10 / 50 / 90 %", quantiles(choices.discernment)),
        Fact(
            group,
            "corr(utility, satisfaction) by discernment",
            f"{choices.likeness[0, 1]:z.2f} to {choices.likeness[-1, 1]:z.2f}".replace("-", "−"),
        ),
        Fact(group, "satisfaction of a title, chosen − forced", signed(confounding.overall[0]), real),
        Fact(group, "by discernment: low / middle / high", thirds),
        Fact(group, "expected score, chosen − forced", signed(confounding.overall[1])),
    ]
    if choices.acceptance < 1:
        rows.append(Fact(group, "watched of titles shown at random", f"{choices.acceptance:.1%}"))
    return rows


def _popularity_facts(portrait: Portrait) -> list[Fact]:
    popularity, group = portrait.popularity, "Popularity: training / test users / random"
    return [
        Fact(group, "Gini of events over titles", _pair(popularity.gini, "{:z.3f}"), "MovieLens-100K .629"),
        Fact(
            group,
            "share of the top 1 % of the titles",
            _pair(popularity.top, "{:.1%}"),
            "a video feed 44.1 %, its random feed 1.3 % (third-party report)",
        ),
        Fact(
            group,
            "corr(log events, mean score)",
            number(popularity.rating_correlation),
            "MovieLens-100K .516",
        ),
    ]


def _history_facts(portrait: Portrait) -> list[Fact]:
    histories, group = portrait.histories, "Histories"
    real = "KuaiRec 25 / 95 / 276; MovieLens-100K 23 / 65 / 244"
    rows = [Fact(group, "events, 10 / 50 / 90 %", quantiles(histories.length), real)]
    if histories.gap is not None and histories.days is not None:
        rows.append(Fact(group, "hours between events, 10 / 50 / 90 %", quantiles(histories.gap)))
        rows.append(Fact(group, "days, first to last, 10 / 50 / 90 %", quantiles(histories.days)))
    if histories.neighbours is not None:
        rows.append(Fact(group, "likeness of neighbours, soon / late", _pair(histories.neighbours, "{:z.3f}")))
    return rows


def _watching_facts(portrait: Portrait) -> list[Fact]:
    found, group = portrait.completion, "Watching against duration"
    spread = " / ".join(short(q) for q in found.quantiles[[0, 2, 4]].tolist())
    ends = f"{found.observed[0]:.1%} / {found.observed[-1]:.1%}"
    rows = [
        Fact(group, "minutes, 5 / 50 / 95 %", spread, "KuaiRand-Pure .18 / 1.35 / 5.07"),
        Fact(group, "finished, shortest / longest titles", ends, "KuaiRand 56 % (≤ 7 s) / 4 % (> 300 s)"),
    ]
    if np.isfinite(found.exact).any():
        exact = f"{found.exact[0]:.1%} / {found.exact[-1]:.1%}"
        rows.append(Fact(group, "the same, expected", exact))
    watched = f"{short(float(found.watched[0]))} / {short(float(found.watched[-1]))}"
    return [*rows, Fact(group, "median minutes watched, the same", watched)]


def _drift_facts(portrait: Portrait) -> list[Fact]:
    drift, group = portrait.drift, "Drift between epochs"
    last = len(drift.released) - 1
    if last == 0:
        return []
    neighbours = (float(np.diag(drift.appeal, 1).mean()), float(drift.appeal[0, last]))
    within = np.diag(drift.popularity)
    rows = [
        Fact(group, "corr. of appeal, next / first and last", _pair(neighbours, "{:z.2f}")),
        Fact(
            group,
            "rank corr. of popularity, the same",
            _pair((float(np.diag(drift.popularity, 1).mean()), float(drift.popularity[0, last])), "{:z.2f}")
            + f" (within an epoch {within.min():z.2f})",
        ),
    ]
    if drift.taste is not None and drift.taste.any():
        moved = " / ".join(f"{d:.2f}" for d in drift.taste[1:])
        rows.append(Fact(group, "mean taste, deviations from epoch 0", moved))
    if (drift.released < 1).any():
        out = " / ".join(f"{share:.0%}" for share in drift.released)
        cold = " / ".join(f"{share:.0%}" for share in drift.cold_exposure)
        rows += [Fact(group, "titles that are out", out), Fact(group, "choices of titles that came later", cold)]
    return rows


def signed(value: float) -> str:
    """A difference with its sign."""
    return number(value, 2) if not np.isfinite(value) or value < 0 else "+" + number(value, 2)


def quantiles(spread: Spread) -> str:
    """10, 50 and 90 %."""
    return " / ".join(short(spread.at(level)) for level in (0.1, 0.5, 0.9))


def _both(mean: float, deviation: float) -> str:
    return f"{number(mean, 2)} ± {number(deviation, 2)}"


def _pair(values: Sequence[float], form: str) -> str:
    return " / ".join(form.format(value) if np.isfinite(value) else "–" for value in values).replace("-", "−")


# ------------------------------------------------------------------------------------------------- terminal


def tables(portrait: Portrait) -> list[Table]:
    """The figures for a terminal of 80 columns; real data in brackets, for orientation."""
    rows, about = facts(portrait), _table("", "this world (real data)")
    for group in dict.fromkeys(row.group for row in rows):
        about.add_row(f"[bold]{markup.escape(group)}[/bold]")
        for row in rows:
            if row.group == group:
                real = f"\n[dim]({markup.escape(row.real)})[/dim]" if row.real else ""
                about.add_row("  " + markup.escape(row.name), markup.escape(row.value) + real)
    signal = portrait.signal
    shown = [signal.dials.index(dial) for dial in SHOWN_DIALS]
    by_dial = _table("at noise dial", *(f"{dial:g}" for dial in SHOWN_DIALS))
    for field, title in MEASURES:
        by_dial.add_row(f"[bold]{title}[/bold]")
        for name, line in zip(signal.models, getattr(signal, field).tolist(), strict=True):
            by_dial.add_row("  " + name, *(number(line[k]) for k in shown))
    return [about, by_dial]


SHOWN_DIALS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Of the dials at which noise models are measured, those that a terminal has room for."""


def _table(first: str, *others: str) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column(first, no_wrap=True)
    for heading in others:
        made.add_column(heading)
    return made


# --------------------------------------------------------------------------------------------------------- page


ORIENTATION = (
    "Real data stand beside for orientation only: other services, other units. The world is not calibrated to them."
)

READINGS = {
    "scores": """Grey: titles shown at random. Vermilion: what users chose. The distance between the grey curves of
satisfaction and score is what noise does to the truth; watching to the end scores exactly 5, whatever more there
would have been to like.""",
    "reliability": """Left, what single scores say: noise and bias together. Right, what a perfect model of the score
could say: bias alone. A model whose right-hand line stays at 1 averages out (<code>gaussian</code>,
<code>student_t</code>, <code>drift</code>, one line); where it falls, more data do not help. The ring is this world.
The dial changes nothing else: users, choices and random numbers are the same.""",
    "confounding": """Each point is a group of titles. On the diagonal, what the log says of a title is what a
recommendation of it would bring. Above it, those who chose a title like it better than others would: a regression on
the log learns that, and promises too much for forced exposure. The effect grows with discernment, which no
algorithm sees.""",
    "choices": """Perplexity is the number of titles that a user chooses among, if all were equally likely. Right: how
far choices follow what satisfies, for users by discernment.""",
    "popularity": """Events by rank, both axes logarithmic; a straight line is a power law. Grey: as many events under
random exposure, whose slope is what counting so few of them does.""",
    "histories": """Dashed: the median. Two humps of the gaps are sessions and the pauses between them.""",
    "completion": """Titles in ten groups by duration. Grey: titles shown at random. Expected: the noise model's
probability, given the users and titles of the log. KuaiRand's durations are seconds, stretched to this catalogue's
median. Where scores are no watch time, what is watched is the score, cut to its scale.""",
    "drift": """Left: appeal, the common part of what makes titles popular. Next: popularity among different users of
two epochs; the diagonal compares two halves of one epoch's users, the most that sampling allows. Test users are of the
last epoch.""",
}


def page(
    portrait: Portrait,
    about: Mapping[str, Any],
    figures: Sequence[Figure],
    pictures: Sequence[str],
    script: str,
) -> str:
    """The page.

    Args:
        portrait: the numbers.
        about: the configuration, for the appendix.
        figures, pictures: what is drawn, and as SVG.
        script: defines ``vegaEmbed``; free of ``</script``.
    """
    title = f"{about['noise_model']} noise at {about['reward_noise']:g}, seed {about['seed']}"
    shown = {
        "world": portrait.env_id,
        "titles": f"{portrait.n_titles:,}",
        "users looked at": f"{portrait.n_users:,} training, {portrait.n_test_users:,} test",
        "events": f"{portrait.n_events:,} of the training users",
    }
    listed = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in shown.items())
    body = [
        f'<h1>recsim_gr <span>{escape(title)}</span></h1>\n<dl class="facts">{listed}</dl>',
        f"<h3>In figures</h3><p class='note'>{ORIENTATION}</p>" + _facts_table(facts(portrait)),
    ]
    for figure, picture in zip(figures, pictures, strict=True):
        body.append(figure_element(figure.name, figure, picture, READINGS[figure.name]))
        if figure.name == "reliability":
            body.append(folded("Reliability and alignment in figures", _signal_table(portrait.signal)))
    body.append(config_table(about, "Configuration of the world"))
    return document(title, body, script)


def _facts_table(rows: Sequence[Fact]) -> str:
    body = []
    for group in dict.fromkeys(row.group for row in rows):
        lines = "".join(
            f"<tr><th>{escape(row.name)}</th><td>{escape(row.value)}</td><td class='text'>{escape(row.real)}</td></tr>"
            for row in rows
            if row.group == group
        )
        body.append(f'<tbody><tr class="level"><th colspan="3">{escape(group)}</th></tr>{lines}</tbody>')
    head = "<tr><th></th><th>this world</th><th class='text'>real data</th></tr>"
    return table(head, "".join(body))


MEASURES = (
    ("within_user", "reliability within user"),
    ("pooled", "reliability, pooled"),
    ("alignment", "alignment"),
)


def _signal_table(signal: Signal) -> str:
    head = "".join(f"<th>{dial:g}</th>" for dial in signal.dials)
    body = []
    for field, title in MEASURES:
        values: FloatArray = getattr(signal, field)
        lines = "".join(
            f"<tr><th>{escape(name)}</th>{''.join(f'<td>{number(value)}</td>' for value in row)}</tr>"
            for name, row in zip(signal.models, values.tolist(), strict=True)
        )
        heading = f'<tr class="level"><th colspan="{len(signal.dials) + 1}">{title}</th></tr>'
        body.append(f"<tbody>{heading}{lines}</tbody>")
    return table(f"<tr><th>dial</th>{head}</tr>", "".join(body))
