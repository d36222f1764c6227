"""The report over synthetic runs: whole, self-contained, escaped, tolerant of gaps, clear about what broke."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsim_gr.benchmarks.charts import (
    FIGURES,
    STYLES,
    figures,
    learners_of,
    noise_axis,
    readable_domain,
    styles_of,
)
from recsim_gr.benchmarks.page import Section, number, page, signed
from recsim_gr.benchmarks.report import javascript, read_results, read_run, write_report
from recsim_gr.benchmarks.statistics import Results
from recsim_gr.errors import RunDirectoryError

COLUMNS = (
    "suite",
    "env",
    "agent",
    "config_id",
    "reward_noise",
    "noise_model",
    "reliability",
    "seed",
    "metric",
    "value",
)
AGENTS = ("Random", "Popularity", "Pretrained", "BC", "RewardWeightedBC", "ASFT", "CQL", "PPO", "RSDPO",
          "ScoreOracle", "Oracle", "<i>Mine</i>")  # fmt: skip
METRICS = (
    "value_sampled", "value_greedy", "value_top10", "value_top10_se", "score_value_top10", "regret_top10",
    "kl_ref", "entropy", "coverage", "ndcg10", "ndcg10_true", "judge_return", "score_return", "value_return",
    "overoptimisation", "misalignment", "nll", "metric_of_the_future",
)  # fmt: skip
WORLD = (
    "reliability_pooled",
    "reliability_within",
    "alignment",
    "nll_test",
    "nll_logging",
    "reward_rmse_validation",
    "odd",
)
LEVELS = {0.0: 0.97, 0.25: 0.52, 0.5: 0.21, 0.75: 0.06, 1.0: -0.001}

Row = dict[str, Any]


def rows_of(
    agents: tuple[str, ...] = AGENTS,
    metrics: tuple[str, ...] = METRICS,
    levels: dict[float, float] = LEVELS,
    seeds: tuple[int, ...] = (1, 2, 3),
) -> list[Row]:
    """Tidy rows of a run in which learners fall from above BC to below it as noise grows."""
    random = np.random.default_rng(0)
    rows = []
    for seed in seeds:
        for noise, reliability in levels.items():
            cell = {"suite": "landscape", "env": "recsim_gr/WatchTime-v0", "config_id": "0badcafe", "seed": seed,
                    "reward_noise": noise, "noise_model": "watch_time", "reliability": reliability}  # fmt: skip
            rows += [{**cell, "agent": "", "metric": metric, "value": random.normal(1, 0.1)} for metric in WORLD]
            for k, agent in enumerate(agents):
                gain = {"BC": 0.0, "Oracle": 1.1, "Random": -0.9}.get(agent, 0.1 * k * (0.6 - noise))
                value = 3.6 + 0.1 * seed + gain + (0 if agent == "BC" else random.normal(0, 0.02))
                rows += [
                    {**cell, "agent": agent, "metric": m, "value": value if "value" in m else abs(gain)}
                    for m in metrics
                ]
    return rows


def write_run(folder: Path, rows: list[Row], **config: Any) -> Path:
    """A run directory with these rows and a plain configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: [row[name] for row in rows] for name in COLUMNS})
    pq.write_table(table, folder / "results.parquet")
    noise_levels, seeds = (sorted({row[name] for row in rows}) for name in ("reward_noise", "seed"))
    known = {"suite": "landscape", "preset": "quick", "world": "simulated", "noise_model": "watch_time",
             "noise_levels": noise_levels, "seeds": seeds, "agents": sorted({row["agent"] for row in rows} - {""}),
             "opaque": {"<u>": [1, None]}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**known, **config}))
    return folder


def tiny_rows(**changes: Any) -> list[Row]:
    """Two agents, one metric, two levels: enough for a report, quick to draw."""
    few = {
        "agents": ("BC", "ASFT"),
        "metrics": ("value_top10",),
        "levels": {0.0: 0.9, 1.0: 0.0},
        "seeds": (1, 2),
    }
    return rows_of(**{**few, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full run, but for a metric of one agent, a NaN, a lost result, a failure; with an unknown agent."""
    rows = [row for row in rows_of() if (row["agent"], row["metric"]) != ("CQL", "nll")]
    lost = ("PPO", "value_top10", 1.0, 3)
    rows = [r for r in rows if (r["agent"], r["metric"], r["reward_noise"], r["seed"]) != lost]
    for row in rows:
        if (row["agent"], row["metric"], row["seed"]) == ("ASFT", "kl_ref", 2):
            row["value"] = float("nan")
    folder = write_run(tmp_path_factory.mktemp("runs") / "landscape", rows)
    failure = {"cell": "nu1-seed3", "reason": "TrainingError: <s>PPO</s> diverged"}
    (folder / "failures.json").write_text(json.dumps([failure]))
    (folder / "cells").mkdir()
    cost = {"ASFT": {"fit_seconds": 12.5, "samples": 0, "gradient_steps": 1200}, "PPO": {"samples": 512000}}
    (folder / "cells" / "a.json").write_text(json.dumps({"name": "a", "seconds": 90.0, "agents": cost}))
    (folder / "cells" / "b.json").write_text('{"name": "b", "sec')
    (folder / "figures").mkdir()
    (folder / "figures" / "place-2.svg").write_text("of an older report")
    (folder / "figures" / "mine.svg").write_text("not the report's")
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------------------- the page


class Tags(HTMLParser):
    """Every tag with its attributes, in order; contents of script and style are skipped by the parser."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_page_asks_for_nothing_from_outside(html: str) -> None:
    tags = Tags(html).seen
    assert not [tag for tag, _ in tags if tag in ("link", "iframe", "img", "object", "base")]
    assert not [attributes for _, attributes in tags if "src" in attributes]
    links = [str(a[key]) for _, a in tags for key in ("href", "xlink:href") if key in a]
    assert links
    assert all(link.startswith("figures/") for link in links)
    style = html[html.index("<style>") : html.index("</style>")]
    assert not re.search(r"url\(|@import", style)
    assert not re.search(r"^\s*(import|export)\b.*\bfrom\b", javascript(), flags=re.MULTILINE)
    policy = next(a["content"] for tag, a in tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_the_page_holds_every_figure_and_its_picture(run: Path, html: str) -> None:
    tags = Tags(html).seen
    assert [a["id"] for tag, a in tags if tag == "figure"] == list(FIGURES)
    specs = [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', html)]
    assert len(specs) == len(FIGURES)
    assert all(spec["$schema"].endswith(".json") for spec in specs)
    assert html.count("<noscript><svg") == len(FIGURES)
    assert html.count("vegaEmbed(figure") == 1


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_svg_and_png(run: Path, name: str) -> None:
    svg = (run / "figures" / f"{name}.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(svg).tag.endswith("}svg")
    assert "<script" not in svg
    assert "landscape suite · quick · simulated · watch_time noise · mean over 3 seeds" in svg
    png = (run / "figures" / f"{name}.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.rstrip(b"\x00").endswith(b"IEND\xaeB`\x82")
    assert int.from_bytes(png[16:20], "big") > 1200, "twice the size of the vector picture"


def test_strings_are_escaped(html: str) -> None:
    assert "&lt;i&gt;Mine&lt;/i&gt;" in html
    assert "<i>Mine" not in html
    assert "&lt;s&gt;PPO&lt;/s&gt;" in html
    assert "<s>PPO" not in html
    assert "<u>" not in html


def test_gaps_are_told(html: str) -> None:
    assert "1 cell failed" in html
    assert "nu1-seed3" in html
    assert f"1 of {len(AGENTS) * 5 * 3} results are missing" in html
    assert "1 cell files could not be read" in html
    assert not re.search(r"\bnan\b|\bNaN\b", html[html.index("<main>") : html.index("</main>")])


def test_the_page_shows_what_it_does_not_know(html: str) -> None:
    assert "metric_of_the_future" in html
    assert ">odd</th>" in html
    assert "opaque" in html


def test_costs_are_means_over_cells(html: str) -> None:
    costs = html[html.index("What it cost") :]
    assert "12.5" in costs
    assert "512,000" in costs
    assert "All 1 cells took 1.5 minutes" in costs


def test_no_path_of_the_machine_is_in_the_page(run: Path, html: str) -> None:
    assert str(run) not in html
    assert str(run.parent) not in html


def test_old_pictures_go_and_other_files_stay(run: Path) -> None:
    assert not (run / "figures" / "place-2.svg").exists()
    assert (run / "figures" / "mine.svg").read_text() == "not the report's"


# ------------------------------------------------------------------------------------------------ other runs


def test_running_again_overwrites_with_the_same_bytes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", tiny_rows())
    before = write_report(folder).read_bytes()
    (folder / "report.html").write_text("half a pa")
    assert write_report(folder).read_bytes() == before
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert names == {"config.json", "results.parquet", "report.html", "landscape.svg", "landscape.png"}


def html_of(results: Results) -> str:
    """A page without pictures, which take the time."""
    return page({"suite": "landscape"}, [Section("w · e · n", results, [], {}, {})], [], [], 0, "")


def test_what_must_hold_stands_in_the_page_and_a_failure_stands_out(tmp_path: Path) -> None:
    results = results_of(tmp_path, rows_of())
    section = Section("w · e · n", results, ["holds: a", "FAILS: b < c"], {}, {})
    html = page({"suite": "landscape"}, [section], [], [], 0, "")
    assert "<li>holds: a</li>" in html
    assert "<li><b>FAILS: b &lt; c</b></li>" in html


def results_of(tmp_path: Path, rows: list[Row]) -> Results:
    (results,) = read_results(write_run(tmp_path / "run", rows) / "results.parquet").values()
    return results


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    results = results_of(tmp_path, tiny_rows(seeds=(7,)))
    text = html_of(results)
    assert "This run has one seed, so there are no intervals and no p-values" in text
    assert "one seed: no test" in text
    assert "±" not in text[text.index("True top-10 value") : text.index("Glossary")].replace("± half", "")
    (landscape,) = figures(results, "subtitle")
    assert "whiskers" not in json.dumps(landscape.spec["title"])


def test_interquartile_mean_needs_ten_seeds(tmp_path: Path) -> None:
    agents = ("BC", "ASFT", "Oracle")
    nine = results_of(tmp_path, tiny_rows(agents=agents, seeds=tuple(range(9))))
    ten = results_of(tmp_path, tiny_rows(agents=agents, seeds=tuple(range(10))))
    assert "Interquartile mean" not in html_of(nine)
    assert "Interquartile mean" in html_of(ten)


def test_the_best_learner_is_marked_and_no_referee(tmp_path: Path) -> None:
    results = results_of(tmp_path, tiny_rows(agents=("BC", "ASFT", "PPO", "Oracle")))
    marked = re.findall(r'<tr><th class="(\w+)">[^\n]*?</tr>', html_of(results))
    assert "ceiling" in marked
    rows = re.findall(r"<tr>.*?</tr>", html_of(results))
    assert [row for row in rows if 'class="best"' in row]
    assert all('class="learner"' in row for row in rows if 'class="best"' in row)


def test_two_configurations_of_an_agent_are_told_apart(tmp_path: Path) -> None:
    rows = tiny_rows()
    rows += [{**row, "config_id": "other"} for row in rows if row["agent"] == "ASFT"]
    results = results_of(tmp_path, rows)
    assert set(results.agents) == {"BC", "ASFT 0badcafe", "ASFT other"}
    assert set(learners_of(results.agents)) == {"ASFT 0badcafe", "ASFT other"}


def test_two_worlds_are_two_sections(tmp_path: Path) -> None:
    rows = tiny_rows()
    rows += [{**row, "noise_model": "gaussian"} for row in rows]
    run = read_run(write_run(tmp_path / "run", rows))
    assert [name.split(" · ")[-1] for name in run.worlds] == ["watch_time", "gaussian"]


@pytest.mark.parametrize(
    "changes",
    [
        {"agents": ("ASFT", "CQL")},
        {"agents": ("BC",)},
        {"agents": ("Oracle",)},
        {"levels": {0.5: 0.3}},
        {"levels": {0.0: float("nan"), 1.0: 0.1}},
        {"levels": {0.1 * k: 1 - 0.1 * k for k in range(11)}},
        {"metrics": ("metric_of_the_future",)},
        {"metrics": ("kl_ref", "judge_return", "value_return", "misalignment", "ndcg10_true")},
    ],
    ids=["no reference", "reference only", "ceiling only", "one level", "no reliability", "many levels",
         "no known metric", "no headline"],
)  # fmt: skip
def test_incomplete_runs_are_drawn_as_far_as_they_go(tmp_path: Path, changes: Row) -> None:
    results = results_of(tmp_path, tiny_rows(**changes))
    drawn = figures(results, "subtitle")
    assert {figure.name for figure in drawn} <= set(FIGURES)
    json.dumps([figure.spec for figure in drawn], allow_nan=False)
    assert "ν = " in html_of(results)


def test_infinite_values_are_missing_values(tmp_path: Path) -> None:
    rows = tiny_rows(metrics=("kl_ref", "value_top10"))
    for row in rows:
        row["value"] = float("inf") if row["agent"] and row["metric"] == "kl_ref" else row["value"]
    assert [figure.name for figure in figures(results_of(tmp_path, rows), "s")] == ["landscape"]


# -------------------------------------------------------------------------------------------------- pictures


def test_known_agents_look_the_same_in_every_report_and_no_two_alike() -> None:
    agents = [*STYLES, *(f"user {k:02}" for k in range(20))]
    looks = [(style.colour, style.shape, style.dash) for style in styles_of(agents).values()]
    assert len(set(looks)) == len(agents)
    assert styles_of(["Zeta", "ASFT"])["ASFT"] == STYLES["ASFT"]
    assert list(styles_of(["Random", "ASFT", "BC", "Oracle", "Zeta"])) == [
        "Oracle",
        "BC",
        "ASFT",
        "Zeta",
        "Random",
    ]


def rows_at(**means: float) -> list[Row]:
    return [{"agent": agent, "mean": mean, "low": mean - 0.01, "high": mean + 0.01} for agent, mean in means.items()]


def test_the_range_follows_the_learners_and_not_the_ceilings_or_the_collapsed() -> None:
    learners = {"BC": 0.0, "ASFT": 0.2, "CQL": 0.3, "PPO": 0.1, "RewardWeightedBC": 0.05}
    low, high = readable_domain(rows_at(**learners))
    assert -0.05 < low < -0.01
    assert 0.31 < high < 0.35
    assert readable_domain(rows_at(**learners, Oracle=1.1, Random=-0.9)) == (low, high)
    assert readable_domain(rows_at(**learners, RSDPO=-3.0))[0] > -0.3


def test_long_whiskers_do_not_set_the_range() -> None:
    rows = [*rows_at(BC=0.0, ASFT=0.2), {"agent": "CQL", "mean": 0.1, "low": -9.0, "high": 9.0}]
    low, high = readable_domain(rows)
    assert (low, high) == pytest.approx((-0.1 - 0.016, 0.3 + 0.016))


def test_noise_grows_to_the_right_and_is_spaced_by_correlation(tmp_path: Path) -> None:
    axis = noise_axis(results_of(tmp_path, tiny_rows(levels=LEVELS)))
    assert axis.encoding["scale"]["reverse"]
    assert axis.encoding["scale"]["type"] == "sqrt"
    assert axis.positions(0.0) == pytest.approx(list(LEVELS.values()))
    moved = np.sqrt(axis.positions(0.01)[:4])
    assert np.sqrt(list(LEVELS.values())[:4]) - moved == pytest.approx(np.full(4, 0.01)), "a step to the right"


def test_the_dial_is_the_axis_where_reliability_is_unknown(tmp_path: Path) -> None:
    axis = noise_axis(results_of(tmp_path, tiny_rows(levels={0.0: float("nan"), 0.4: 0.2})))
    assert not axis.reliability
    assert axis.levels.tolist() == [0.0, 0.4]


def test_numbers_are_set_for_reading() -> None:
    assert [number(x) for x in (0.12345, -0.5, 123.456, 12345.6, float("nan"), -0.0001)] == [
        "0.123", "−0.500", "123.5", "12,346", "–", "0.000"]  # fmt: skip
    assert signed(0.5, 0.25) == "+0.500 ± 0.250"
    assert signed(-0.5) == "−0.500"


# ---------------------------------------------------------------------------------------------- broken files


def broken(folder: Path, kind: str) -> str:
    """Breaks a good run directory; returns the name of the file that the error must point to."""
    results, config = folder / "results.parquet", folder / "config.json"
    table = pq.read_table(results)
    match kind:
        case "missing results":
            results.unlink()
        case "truncated results":
            results.write_bytes(results.read_bytes()[:-100])
        case "empty file":
            results.write_bytes(b"")
        case "no parquet":
            results.write_text("agent,metric,value\n")
        case "foreign parquet":
            pq.write_table(pa.table({"city": ["Ulm"]}), results)
        case "no rows":
            pq.write_table(table.slice(0, 0), results)
        case "words for values":
            words = pa.array(["much"] * table.num_rows)
            pq.write_table(table.set_column(table.column_names.index("value"), "value", words), results)
        case "noise without number":
            none = pa.nulls(table.num_rows, pa.float64())
            pq.write_table(table.set_column(table.column_names.index("reward_noise"), "reward_noise", none), results)
        case "every result twice":
            pq.write_table(pa.concat_tables([table, table]), results)
        case "missing config":
            config.unlink()
        case "truncated config":
            config.write_text(config.read_text()[:-5])
        case "foreign config":
            config.write_text('{"city": "Ulm"}')
        case "config is a list":
            config.write_text("[]")
        case "failures are no list":
            (folder / "failures.json").write_text('{"cell": "x"}')
        case "no directory":
            shutil.rmtree(folder)
    return (
        "failures.json" if "failures" in kind else "config.json" if "config" in kind or "dir" in kind else results.name
    )


@pytest.mark.parametrize("kind", [
    "missing results", "truncated results", "empty file", "no parquet", "foreign parquet", "no rows",
    "words for values", "noise without number", "every result twice", "missing config", "truncated config",
    "foreign config",
    "config is a list", "failures are no list", "no directory",
])  # fmt: skip
def test_a_broken_run_is_a_named_error_and_no_report(tmp_path: Path, kind: str) -> None:
    folder = write_run(tmp_path / "run", tiny_rows())
    named = broken(folder, kind)
    with pytest.raises(RunDirectoryError) as caught:
        write_report(folder)
    sentence = str(caught.value)
    assert str(folder / named) in sentence
    assert "\n" not in sentence
    assert re.search(r"run|point|is this", sentence), "says what would do"
    assert not (folder / "report.html").exists()
