"""Suite ``throughput``: how fast the simulator is, each job beside a NumPy floor, and beside peers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq

from recsim_gr import __version__, configs
from recsim_gr.benchmarks.peers import PEERS
from recsim_gr.benchmarks.stopwatch import in_new_process
from recsim_gr.benchmarks.suite import Cell, CellResult, Notify, Suite, register
from recsim_gr.benchmarks.throughput_chart import write_chart
from recsim_gr.benchmarks.throughput_jobs import (
    ENVIRONMENT,
    FLOOR,
    MACHINE,
    OURS,
    RATE_TARGETS,
    RATIO_TARGETS,
    Figure,
    ThroughputConfig,
    jobs_of,
    world_of,
)
from recsim_gr.benchmarks.training_table import NOTES as TRAINING_NOTES
from recsim_gr.benchmarks.training_table import training_table
from recsim_gr.errors import RunDirectoryError
from recsim_gr.files import read_json, write_text

TIMED_JOBS = 8
"""Pairs of a job and its floor that are timed in turns, about."""

TRAINING_WORKS = 40
"""Kinds of training step that are timed in turns, about."""
TRAINING_STEP = 6.4e6, 0.1
"""Logits of a training step, and seconds that it takes."""

MILLION = 1_000_000
NOT_TO_SCALE = "smoke"
"""The preset whose sizes are too small for the targets to mean anything."""


@register
class Throughput(Suite):
    """Speed, memory and import: every rate in turns with a NumPy loop that does the least work the job needs, and
    peers where they are installed. Cells run one at a time."""

    name = "throughput"
    most_workers = 1
    presets: ClassVar[dict[str, Any]] = {
        "quick": ThroughputConfig(),
        "full": ThroughputConfig(preset="full", n_users=1_000_000, repeats=15),
        NOT_TO_SCALE: ThroughputConfig(
            preset=NOT_TO_SCALE,
            repeats=2,
            seconds=0.01,
            num_envs=64,
            pool_users=128,
            n_titles=60,
            log_titles=(40, 60),
            log_users=64,
            large_titles=2_000,
            large_users=8,
            n_users=200,
            memory_users=200,
            pool_memory_users=128,
            import_repeats=1,
            peer_seconds=0.01,
            training_users=4,
            training_events=6,
            training_dimensions=8,
            training_titles=100,
            training_steps=3,
            training_peak=64,
        ),
    }
    config: ThroughputConfig

    def identity(self) -> dict[str, Any]:
        return {"suite": self.name, "version": __version__, **configs.to_dict(self.config)}

    def cells(self) -> list[Cell]:
        return [Cell(job, {"job": job}) for job in jobs_of(self.config)]

    def estimate_cell_seconds(self) -> float:
        """By the measure of one job: most of the others take about as long, or are bounded by it."""
        config, world = self.config, world_of(self.config, self.config.n_titles)
        users = min(config.memory_users, 2_000)
        world.generate_log(users)
        seconds = _cpu_seconds(lambda: world.generate_log(users)) / users
        made = config.n_users + config.memory_users + config.pool_memory_users
        timed = 2 * config.repeats * max(config.seconds, config.log_users * seconds) * TIMED_JOBS
        everything = seconds * made + timed + 2 * len(PEERS) * config.peer_seconds
        return everything / len(jobs_of(replace(config, jobs=()))) + self._training_seconds()

    def _training_seconds(self) -> float:
        """Of job ``training``, shared out over the jobs: by what its steps took on one core of a server."""
        c, jobs = self.config, jobs_of(self.config)
        if "training" not in jobs:
            return 0.0
        size = c.training_users * c.training_events * c.n_titles / TRAINING_STEP[0]
        rates = TRAINING_WORKS * c.repeats * max(c.seconds, size * TRAINING_STEP[1])
        return (rates + 3 * c.training_steps * size * TRAINING_STEP[1]) / len(jobs)

    def run_cell(self, cell: Cell, notify: Notify) -> CellResult:
        work, arguments = jobs_of(self.config)[cell.settings["job"]]
        notify(0.01, "measuring")
        figures: list[Figure] = in_new_process(work, self.config, *arguments)
        world = world_of(self.config, self.config.n_titles).config
        columns = {
            "suite": self.name,
            "config_id": configs.config_id(self.identity()),
            "reward_noise": world.reward_noise,
            "noise_model": world.noise_model,
            "reliability": None,
            "seed": self.config.seed,
        }
        rows = [
            {**columns, "env": figure.software, "agent": figure.who, "metric": figure.metric, "value": figure.value}
            for figure in figures
        ]
        return CellResult(rows=rows)

    def report(self, run_dir: Path) -> tuple[Path, list[str]]:
        found, config = read_figures(run_dir), read_config(run_dir)
        write_chart(found, config, run_dir / "figures")
        lines = [*table(found, config), *_aligned(training_table(found, config))]
        page = run_dir / "throughput.txt"
        write_text(page, "\n".join([*lines, "", *peer_table(found), "", *NOTES, *TRAINING_NOTES]) + "\n")
        return page, lines


def _cpu_seconds(work: Any) -> float:
    import time

    start = time.process_time()
    work()
    return time.process_time() - start


# -- the table ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        metric: whose figure it shows; of a rate, without ``.per_second``.
        label: what it is, with the config's fields in braces.
        unit: of the figure.
        target: what it should be; None where there is no target.
        kind: ``rate`` (at least the target, a second), ``ratio`` (a rate whose ratio to its floor has the target), or
            ``bound`` (at most the target).
        bound: a metric that is the target instead.
        smaller: whether the job was done at less than its size, so that start-up weighs more than it should.
    """

    metric: str
    label: str
    unit: str
    target: float | None = None
    kind: str = "bound"
    bound: str = ""
    smaller: bool = False


def lines_of(config: ThroughputConfig) -> list[Line]:
    """The lines, in order."""
    c = config
    million = f"a million users x 20 events x {c.n_titles:,} titles to Parquet, two workers (made: {c.n_users:,} users)"
    rates = [
        ("vector", f"vector environment, {c.num_envs:,} at once, {c.n_titles:,} titles", "steps/s"),
        ("single", f"single environment through gym.make, {c.n_titles:,} titles", "pairs/s"),
        *((f"log_{n}", f"log, {n:,} titles", "events/s") for n in c.log_titles),
        ("large_1_cpu", f"log, {c.large_titles:,} titles, one process", "events/s"),
        ("large_2", f"log, {c.large_titles:,} titles, two processes, by the wall clock", "events/s"),
        ("large_2_cpu", "  by the CPU time of the slower one", "events/s"),
    ]
    return [
        *(
            Line(job, label, unit, RATIO_TARGETS[job], "ratio")
            if job in RATIO_TARGETS
            else Line(job, label, unit, RATE_TARGETS.get(job), "rate")
            for job, label, unit in rates
        ),
        Line("generate.seconds_per_million", million, "s", 40.0, smaller=c.n_users < MILLION),
        Line("generate.cpu_seconds_per_million", "  CPU time of all its processes", "s"),
        Line("generate.peak_mebibytes", "  peak memory of all its processes", "MiB", 1536.0),
        Line("generate.disk_megabytes_per_million", "  on disk, a million users", "MB", 400.0),
        Line("import.extra_seconds", "import recsim_gr, beyond import gymnasium", "s", 0.05),
        Line("import.extra_megabytes", "  memory", "MB", 15.0),
        Line("import.loads_torch", "  torch is loaded (1) or not (0)", "", 0.0),
        Line(
            "memory.beyond_megabytes",
            f"generate_log, {c.memory_users:,} users x {c.n_titles:,} titles: beyond the log's columns",
            "MB",
            bound="memory.dense_megabytes",
        ),
        Line(
            "pool.megabytes",
            f"pool of {c.pool_memory_users:,} prepared users of an environment",
            "MB",
            bound="pool.dense_megabytes",
        ),
    ]


SHORT = "SHORT"
HEADER = ("", "target", "ours", "median", "floor", "ours/floor", "verdict")

NOTES = (
    "Rates: by CPU time unless said, one thread a process, best of the repeats, ours and the floor in turns, in a",
    "process of its own with the allocator as users have it. 'ours/floor' is the ratio of the two bests. The floor is",
    "a NumPy program that does the least work the job needs; recsim_gr/benchmarks/floors.py says what each leaves out.",
    "Memory of logs and pools is held against a float32 array of users x titles, which must not be there. What a peer",
    "is reported to do was measured elsewhere, on a like machine.",
)

Found = dict[tuple[str, str], tuple[float, str]]
"""(who, metric) to the figure and the software."""


def table(found: Found, config: ThroughputConfig) -> list[str]:
    """The lines of the table of jobs, its header first."""
    cores, about = found.get((MACHINE, "cores"), (float("nan"), "unknown machine"))
    head = f"recsim_gr {__version__}, preset {config.preset}, {ENVIRONMENT}; {cores:.0f} cores of {about}"
    if config.preset == NOT_TO_SCALE:
        head += "\nToo small for the targets: these verdicts mean nothing."
    lines = [line for line in lines_of(config) if not config.jobs or _asked_for(line, config)]
    rows = [_row(found, line) for line in lines]
    return [*head.splitlines(), *_aligned([HEADER, *rows] if rows else [])]


def _asked_for(line: Line, config: ThroughputConfig) -> bool:
    """Whether a line is of a job that the config names: the job is the beginning of the metric."""
    return any(re.match(rf"{job.replace('-', '_')}($|[_.])", line.metric) for job in config.jobs)


def _row(found: Found, line: Line) -> tuple[str, ...]:
    if line.kind == "bound":
        return _bound_row(found, line)
    ours, theirs = (_value(found, who, f"{line.metric}.per_second") for who in (OURS, FLOOR))
    middle = _value(found, OURS, f"{line.metric}.per_second_median")
    ratio = ours / theirs
    target = "" if line.target is None else f">= {number(line.target)}"
    if target:
        target += " of floor" if line.kind == "ratio" else f" {line.unit}"
    reached = ratio if line.kind == "ratio" else ours
    return (
        line.label,
        target,
        f"{number(ours)} {line.unit}",
        number(middle),
        number(theirs),
        number(ratio),
        _verdict(reached, line.target, at_least=True),
    )


def _bound_row(found: Found, line: Line) -> tuple[str, ...]:
    ours = _value(found, OURS, line.metric)
    target = _value(found, OURS, line.bound) if line.bound else line.target
    verdict = _verdict(ours, target, at_least=False)
    if verdict == SHORT and line.smaller:
        verdict = "made smaller, start-up included: see preset full"
    bound = "" if target is None else f"<= {number(target)} {line.unit}".rstrip()
    return line.label, bound, f"{number(ours)} {line.unit}", "", "", "", verdict


def _verdict(value: float, target: float | None, *, at_least: bool) -> str:
    if target is None:
        return ""
    if value != value:
        return "not measured"
    return "pass" if (value >= target if at_least else value <= target) else SHORT


def peer_table(found: Found) -> list[str]:
    """The lines of the table of peers."""
    rows = [("peer", "job", "measured", "reported", "what it does", "software")]
    for peer in PEERS.values():
        value, software = found.get((peer.name, f"{peer.job}.per_second"), (float("nan"), "not measured"))
        low, high = peer.reported
        reported = number(low) if low == high else f"{number(low)}-{number(high)}"
        unit = "steps/s" if peer.job == "environment" else "events/s"
        rows.append((peer.name, peer.job, number(value), f"{reported} {unit}", peer.what, software[:120]))
    return _aligned(rows)


def number(value: float | None) -> str:
    """``5.2 M``, ``56 k``, ``0.81`` or ``-``."""
    if value is None or value != value:
        return "-"
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _value(found: Found, who: str, metric: str) -> float:
    return found.get((who, metric), (float("nan"), ""))[0]


# -- reading -----------------------------------------------------------------------------------------------------


def read_figures(run_dir: Path) -> Found:
    """The figures of a run.

    Raises:
        RunDirectoryError: the table cannot be read.
    """
    path = run_dir / "results.parquet"
    try:
        rows = pq.read_table(path).to_pylist()
        return {(row["agent"], row["metric"]): (row["value"], row["env"]) for row in rows}
    except (OSError, ValueError, KeyError) as error:
        raise RunDirectoryError(f"{path} is no table of this suite ({error}); run the suite again") from error


def read_config(run_dir: Path) -> ThroughputConfig:
    """The config of a run.

    Raises:
        RunDirectoryError: it is missing, or of another suite.
        ConfigError: a value that the config refuses.
    """
    values = read_json(run_dir / "config.json")
    if not isinstance(values, dict) or values.get("suite") != Throughput.name:
        raise RunDirectoryError(f"{run_dir / 'config.json'} is not the config of a run of {Throughput.name}")
    return configs.from_dict(ThroughputConfig, {k: v for k, v in values.items() if k not in ("suite", "version")})
