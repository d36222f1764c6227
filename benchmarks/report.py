"""``write_report``: a run directory's results as one self-contained page, with every figure as SVG and PNG.

The page opens without a network: Vega is inside of it, and its content policy forbids any request. Everything
is written atomically, the page last, so a page that is there is whole and has its figures beside it.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import vl_convert

from recsim_gr.benchmarks.charts import FIGURES, Figure, figures
from recsim_gr.benchmarks.first_principles import check_first_principles
from recsim_gr.benchmarks.page import Section, page
from recsim_gr.benchmarks.statistics import WORLD, Results, t_interval
from recsim_gr.errors import RunDirectoryError
from recsim_gr.files import atomic_path, read_json, write_text

TEXT = ("suite", "env", "agent", "config_id", "noise_model", "metric")
NUMBERS = ("reward_noise", "reliability", "value")
COLUMNS = (*TEXT, *NUMBERS, "seed")
LOG_SIZE = "log_size"
"""Only in the table of trials, see `recsim_gr.benchmarks.results`."""
PNG_SCALE = 2.0

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Run:
    """What a run directory holds.

    Attributes:
        config: the suite's configuration.
        worlds: name of a world (its suite, environment and noise model) to its results; most runs have one.
        failures: ``{"cell": …, "reason": …}`` for each cell that has no result.
        cells: the cells' own files, which hold wall times.
        unreadable_cells: cell files that could not be read; only the table of costs misses them.
    """

    config: dict[str, Any]
    worlds: dict[str, Results]
    failures: list[dict[str, Any]]
    cells: list[dict[str, Any]]
    unreadable_cells: int


def write_report(run_dir: Path) -> Path:
    """Writes ``report.html`` and ``figures/<name>.svg`` and ``.png`` into a run directory, over older ones.

    A run over several worlds has their figures side by side, as ``<name>-2`` and so on.

    Returns:
        the path of the page.

    Raises:
        RunDirectoryError: the configuration or the results are missing, truncated or not a run's, or the
            report cannot be written.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    sections: list[Section] = []
    for k, (name, results) in enumerate(run.worlds.items()):
        suffix = f"-{k + 1}" if k else ""
        drawn = {f.name + suffix: f for f in figures(results, _subtitle(run.config, name, results))}
        pictures = {file: write_figure(run_dir / "figures", file, figure) for file, figure in drawn.items()}
        sections.append(Section(name, results, checks_of(name, results), drawn, pictures))
    remove_stale(run_dir / "figures", FIGURES, {file for section in sections for file in section.figures})
    html = page(run.config, sections, run.failures, run.cells, run.unreadable_cells, javascript())
    write_text(run_dir / "report.html", html)
    return run_dir / "report.html"


def checks_of(name: str, results: Results) -> list[str]:
    """What must hold of a landscape's world; nothing of other suites."""
    if not name.startswith("landscape"):
        return []
    return check_first_principles(results, "WatchTime" in name, noise_model=name.split(" · ")[-1])


# --------------------------------------------------------------------------------------------------- reading


def read_run(run_dir: Path) -> Run:
    """Reads a run directory.

    Raises:
        RunDirectoryError: ``config.json`` or ``results.parquet`` is missing, or one of them or
            ``failures.json``, which need not be there, is truncated or not what the name says.
    """
    config = read_json(run_dir / "config.json")
    if not isinstance(config, dict) or "suite" not in config:
        raise RunDirectoryError(
            f"{run_dir / 'config.json'} names no suite, so it is not a run's configuration; "
            "point to the output directory of `recsim-gr run`"
        )
    failures = read_json(run_dir / "failures.json") if (run_dir / "failures.json").exists() else []
    if not isinstance(failures, list) or not all(isinstance(failure, dict) for failure in failures):
        raise RunDirectoryError(f"{run_dir / 'failures.json'} is not a list of failed cells; delete it and run again")
    cells, unreadable = _read_cells(run_dir / "cells")
    return Run(config, read_results(run_dir / "results.parquet"), failures, cells, unreadable)


def read_results(path: Path) -> dict[str, Results]:
    """Reads the tidy table of a run into arrays, one :class:`Results` a (suite, env, noise model), and log size where
    the table has that column.

    Raises:
        RunDirectoryError: the file is missing, truncated, no Parquet, lacks a column, has a column of another
            type, holds no row, a result twice, or a noise level that is no number.
    """
    columns = _read_columns(path)
    parts = [name for name in ("suite", "env", "noise_model", LOG_SIZE) if name in columns]
    names = np.array([" · ".join(map(str, key)) for key in zip(*(columns[name] for name in parts), strict=True)])
    worlds = {}
    for name in dict.fromkeys(names.tolist()):
        here = names == name
        worlds[name] = _results({key: column[here] for key, column in columns.items()}, path)
    return worlds


def _read_columns(path: Path) -> Columns:
    if not path.exists():
        raise RunDirectoryError(f"{path} is missing; finish the run, which writes it last")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise RunDirectoryError(
            f"{path} is truncated or not Parquet ({_one_line(error)}); delete it and run again"
        ) from error
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise RunDirectoryError(f"{path} has no column {missing[0]!r}, so it is no run's; run the suite again")
    if table.num_rows == 0:
        raise RunDirectoryError(f"{path} holds no results; run the suite again and see why its cells failed")
    types = {**dict.fromkeys(TEXT, pa.string()), **dict.fromkeys(NUMBERS, pa.float64()), "seed": pa.int64()}
    if LOG_SIZE in table.column_names:
        types[LOG_SIZE] = pa.int64()
    return {name: _cast(table.column(name), kind, name, path) for name, kind in types.items()}


def _cast(column: pa.ChunkedArray, kind: pa.DataType, name: str, path: Path) -> np.ndarray:
    try:
        cast = column.cast(kind)
        if kind == pa.string():
            return np.array(cast.fill_null("").to_pylist(), dtype=object)
        if kind == pa.int64() and cast.null_count:
            raise pa.ArrowInvalid("null")
        return cast.to_numpy()  # a null value becomes NaN
    except pa.ArrowException as error:
        raise RunDirectoryError(
            f"{path} holds {column.type} in column {name!r} instead of {kind} ({_one_line(error)}); run the suite again"
        ) from error


def _results(columns: Columns, path: Path) -> Results:
    """Arrays from the tidy rows of one world."""
    if not np.isfinite(columns["reward_noise"]).all():
        raise RunDirectoryError(f"{path} holds a reward_noise that is no number; run the suite again")
    noise, level = np.unique(np.round(columns["reward_noise"], 9), return_inverse=True)
    seeds, seed = np.unique(columns["seed"], return_inverse=True)
    agents = _labels(columns)
    values: dict[tuple[str, str], np.ndarray] = {}
    reliability = np.full((len(noise), len(seeds)), np.nan)
    seen = set()
    for row, key in enumerate(zip(agents, columns["metric"], level, seed, strict=True)):
        if key in seen:
            raise RunDirectoryError(
                f"{path} holds {key[1]} of {key[0] or 'the world'} twice at noise {noise[key[2]]:g}, "
                f"seed {seeds[key[3]]}; delete it and run the suite again"
            )
        seen.add(key)
        array = values.setdefault(key[:2], np.full(reliability.shape, np.nan))
        array[key[2:]] = columns["value"][row]
        reliability[key[2:]] = columns["reliability"][row]
    order = tuple(agent for agent in dict.fromkeys(agents) if agent != WORLD)
    return Results(noise.astype(np.float64), t_interval(reliability)[0], tuple(seeds.tolist()), order, values)


def _labels(columns: Columns) -> list[str]:
    """Each row's agent, with its configuration's id where one cell holds several of that agent."""
    ids: dict[tuple[Any, ...], set[str]] = {}
    keys = list(zip(*(columns[c] for c in ("agent", "reward_noise", "seed")), strict=True))
    for key, config in zip(keys, columns["config_id"], strict=True):
        ids.setdefault(key, set()).add(config)
    several = {agent for (agent, *_), configs in ids.items() if agent != WORLD and len(configs) > 1}
    return [f"{a} {c}" if a in several else a for a, c in zip(columns["agent"], columns["config_id"], strict=True)]


def _read_cells(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The cells' files and how many could not be read: wall times are worth no failed report."""
    cells, unreadable = [], 0
    for path in sorted(folder.glob("*.json")):
        try:
            cell = read_json(path)
        except RunDirectoryError:
            cell = None
        if isinstance(cell, dict):
            cells.append(cell)
        else:
            unreadable += 1
    return cells, unreadable


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(". ")[:120] if str(error) else type(error).__name__


# --------------------------------------------------------------------------------------------------- writing


@functools.cache
def javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script that defines ``vegaEmbed``; fit for a script element."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    safe = bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    return f"(() => {{\n{safe}\n}})();"  # its thousands of short names stay its own


def _subtitle(config: Mapping[str, Any], world: str, results: Results) -> str:
    n = len(results.seeds)
    seeds = f"mean over {n} seeds" if n > 1 else "one seed, so no interval"
    noise = f"{world.split(' · ')[-1]} noise"
    parts = [f"{config['suite']} suite", config.get("preset"), config.get("world"), noise, seeds]
    return " · ".join(str(part) for part in parts if part)


def write_figure(folder: Path, file: str, figure: Figure) -> str:
    """Writes a figure's SVG and PNG; returns the SVG."""
    svg = _named_clips(vl_convert.vegalite_to_svg(figure.spec), file)
    write_text(folder / f"{file}.svg", svg)
    with atomic_path(folder / f"{file}.png") as temporary:
        temporary.write_bytes(vl_convert.svg_to_png(svg, scale=PNG_SCALE))
    return svg


def _named_clips(svg: str, file: str) -> str:
    """Clip paths numbered anew: Vega counts on from picture to picture, so that a second report would differ."""
    order = {name: k for k, name in enumerate(dict.fromkeys(re.findall(r'id="(clip\d+)"', svg)))}
    return re.sub(r'(id="|url\(#)(clip\d+)', lambda found: f"{found[1]}{file}-clip{order[found[2]]}", svg)


def remove_stale(folder: Path, names: Iterable[str], written: set[str]) -> None:
    """Removes pictures of an earlier report which this one does not have; other people's files stay.

    Args:
        folder: of the pictures.
        names: of every figure that a report may have.
        written: the files of this one.
    """
    for name in names:
        for path in [*folder.glob(f"{name}.*"), *folder.glob(f"{name}-[0-9].*")]:
            if path.stem not in written and path.suffix in (".svg", ".png"):
                path.unlink(missing_ok=True)
