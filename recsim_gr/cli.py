"""The command line. A mistake of a user is told on standard error, in one line where it can be parsed; exit code 2."""

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from recsim_gr.errors import ConfigError, RecsimError
from recsim_gr.world import WorldConfig

USER_ERROR, FAILED_CELLS, INTERRUPTED = 2, 1, 130


@dataclass(frozen=True)
class Run:
    """Run a suite: finished cells are kept, so the same command goes on where it stopped."""

    suite: tyro.conf.Positional[str]
    """Which suite, see `recsim-gr list`."""
    preset: str = "quick"
    """Sizes and schedules; the options below override single values of it."""
    out: Path | None = None
    """The run directory; runs/SUITE by default."""
    workers: int = 2
    """Processes, one thread each."""
    dry_run: bool = False
    """Name the cells and the time they will take, and stop."""
    world: str | None = None
    """simulated, or replay over a fully observed matrix of real ratings."""
    data: str | None = None
    """The matrix of a replayed world, an npz file."""
    noise_model: str | None = None
    """watch_time, gaussian, student_t, drift or clickbait."""
    noise_levels: tuple[float, ...] | None = None
    """Settings of the noise dial, each between 0 and 1."""
    seeds: tuple[int, ...] | None = None
    """Worlds."""
    agents: tuple[str, ...] | None = None
    """Which agents take part, see `recsim-gr list`."""
    n_titles: int | None = None
    """Size of a simulated catalogue."""
    backbone: str | None = None
    """hstu, sasrec or set; the preset's own sizes carry over."""
    world_options: tuple[str, ...] | None = None
    """Further fields of the world's config, as name=value: cold_share=0.2, order_effect=1, history_median=8, …"""
    history_length: int | None = None
    """Events of a history."""
    n_users: int | None = None
    """Training users."""
    log_sizes: tuple[int, ...] | None = None
    """Training users of each reward model of suite reward_model, ascending."""
    test_contexts: int | None = None
    """Test users."""
    jobs: tuple[str, ...] | None = None
    """Which jobs suite throughput does; all by default."""
    compile: bool | None = None
    """Whether suite throughput also times training under torch.compile."""
    device: str | None = None
    """Where suite throughput times training: cpu or cuda."""


@dataclass(frozen=True, kw_only=True)
class GeneratedWorld(WorldConfig):
    """The world whose users are logged."""

    n_titles: Annotated[int, tyro.conf.arg(name="titles")] = WorldConfig.n_titles
    """I, the size of the catalogue."""

    def __post_init__(self) -> None:
        """Nothing: values are refused by the config that this becomes, and by its name."""

    def config(self) -> WorldConfig:
        """As the library has it."""
        return WorldConfig(**{field.name: getattr(self, field.name) for field in fields(WorldConfig)})


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Log users in Parquet shards, in bounded memory: finished shards are kept, so the same command goes on."""

    users: int
    """How many users."""
    out: Path
    """The directory."""
    workers: int = 2
    """Processes, one thread each."""
    split: str = "train"
    """Which users: train, validation, test or judge."""
    propensities: bool = False
    """Log the logging policy's propensities too, 7 bytes an event."""
    users_per_shard: int = 0
    """Users of a file, and what is lost by a kill; 0 makes files of ten megabytes, or sixteen that are smaller."""
    world: tyro.conf.OmitArgPrefixes[GeneratedWorld] = field(default_factory=GeneratedWorld)


@dataclass(frozen=True)
class Report:
    """Draw the report of a run again."""

    run: tyro.conf.Positional[Path]
    """The run directory."""


def _options(config: type) -> type:
    """The fields of a config as options that are None where they are not given, with its docstrings as their help."""
    hints = get_type_hints(config)
    metavars = {int: "INT", float: "FLOAT", str: "TEXT", bool: "{True,False}"}
    options: list[tuple[str, Any, Any]] = []
    for option in fields(config):
        kind = hints[option.name]
        shown = tyro.conf.arg(metavar=metavars[kind], help_behavior_hint=f"(default: {option.default})")
        options.append((option.name, Annotated[kind | None, shown], None))
    unchecked = {"__post_init__": lambda self: None, "__doc__": "Of the world; those that are not given keep it."}
    return make_dataclass(
        f"{config.__name__}Options", options, bases=(config,), namespace=unchecked, frozen=True, kw_only=True
    )


if TYPE_CHECKING:
    WorldOptions = WorldConfig
else:
    WorldOptions = _options(WorldConfig)


@dataclass(frozen=True)
class DrawWorld:
    """Print and draw what a world is: scores, reliability, popularity, histories, drift, confounding."""

    world: Annotated[WorldOptions, tyro.conf.OmitArgPrefixes]
    data: Path | None = None
    """A fully observed matrix of real ratings (npz, see `recsim_gr.replay`): its world is drawn instead. Options of
    simulated users and titles do not go with it, and its pull_strength is 1 by default."""
    users: int = 2_000
    """Training users to look at, and as many test users: seconds, and shares to one percent."""
    out: Path = Path("runs/world")
    """Where world.html, world.json and figures/ go."""


@dataclass(frozen=True)
class List:
    """List environments, agents and suites."""


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[DrawWorld, tyro.conf.subcommand("world")]
    | Annotated[List, tyro.conf.subcommand("list")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses and runs a command; returns the exit code.

    0: all is well; 1: some cells failed, the rest is reported; 2: a mistake in the command or its input, nothing
    was overwritten; 130: interrupted, finished cells are kept.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no Greek must not stop the work
    console = Console(soft_wrap=True, highlight=False)
    try:
        command = tyro.cli(Command, args=arguments, prog="recsim-gr", description=__doc__)
        return COMMANDS[type(command)](command, console)
    except RecsimError as error:
        print(f"recsim-gr: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return USER_ERROR
    except MemoryError as error:
        print(f"recsim-gr: not enough memory ({error}); ask for fewer users or titles", file=sys.stderr)  # noqa: T201
        return USER_ERROR
    except KeyboardInterrupt:
        print("recsim-gr: interrupted; the same command goes on where it stopped", file=sys.stderr)  # noqa: T201
        return INTERRUPTED
    except BrokenPipeError:  # `recsim-gr list | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run_suite(command: Run, console: Console) -> int:
    """Runs a suite and names its report."""
    import recsim_gr.benchmarks  # noqa: F401  (registers the suites)
    from recsim_gr.benchmarks.runner import dry_run, run
    from recsim_gr.benchmarks.suite import suite_type

    kind = suite_type(command.suite)
    suite = kind(overridden(kind.preset(command.preset), command))
    out = command.out or Path("runs") / command.suite
    if command.dry_run:
        dry_run(suite, out, command.workers, console.print)
        return 0
    outcome = run(suite, out, command.workers, console)
    for line in outcome.lines:
        console.print(line, markup=False)
    for failure in outcome.failures:
        console.print(f"{failure['cell']} FAILED: {failure['reason']}", markup=False)
    if outcome.report is not None:
        console.print(f"{len(outcome.finished)} cells finished. The report: {outcome.report}", markup=False)
    return FAILED_CELLS if outcome.failures else 0


def generate_log(command: Generate, console: Console) -> int:
    """Generates a log in shards and says what it is."""
    from recsim_gr.generation import Plan, generate, megabytes

    plan = Plan(
        world=command.world.config(),
        n_users=command.users,
        split=command.split,
        propensities=command.propensities,
        users_per_shard=command.users_per_shard,
    )
    log = generate(plan, command.out, command.workers, console)
    console.print(
        f"{log.n_users:,} users, {len(log):,} events, {megabytes(log.size)}. The log: {command.out}", markup=False
    )
    return 0


def draw_report(command: Report, console: Console) -> int:
    """Draws a run's report again, by the suite that made it."""
    import recsim_gr.benchmarks  # noqa: F401  (registers the suites)
    from recsim_gr.benchmarks.suite import suite_type
    from recsim_gr.errors import RunDirectoryError
    from recsim_gr.files import read_json

    config = read_json(command.run / "config.json")
    if not isinstance(config, dict) or "suite" not in config:
        raise RunDirectoryError(f"{command.run / 'config.json'} is not the config of a run")
    kind = suite_type(str(config["suite"]))
    page, lines = kind(None).report(command.run)
    for line in lines:
        console.print(line, markup=False)
    console.print(f"The report: {page}", markup=False)
    return 0


def world_of(command: DrawWorld) -> Any:
    """The world that a command asks for.

    Raises:
        ConfigError: a value or a combination that makes no sense, or an option that a replayed world does not have.
        DataFileError: a matrix that cannot be read.
    """
    from recsim_gr.replay import ReplayConfig, ReplayWorld
    from recsim_gr.world import World

    settings = {field.name: getattr(command.world, field.name) for field in fields(WorldConfig)}
    given = {name: value for name, value in settings.items() if value is not None}
    if command.data is None:
        return World(WorldConfig(**given))
    known = {field.name for field in fields(ReplayConfig)}
    foreign = [name for name in given if name not in known]
    if foreign:
        option = f"--{foreign[0].replace('_', '-')}"
        raise ConfigError(f"{option} is for simulated worlds; leave it out, or leave out --data")
    return ReplayWorld(ReplayConfig(path=str(command.data), **given))


def show_world(command: DrawWorld, console: Console) -> int:
    """Prints and draws what a world is."""
    from recsim_gr.benchmarks.world_report import ORIENTATION, draw_world, subtitle, tables

    world = world_of(command)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=1.0)

        def notify(share: float, what: str) -> None:
            progress.update(bar, completed=share, description=what)

        portrait, page = draw_world(world, command.out, command.users, notify)
    console.print(subtitle(world, portrait), markup=False)
    for table in tables(portrait):
        console.print(table)
    console.print(ORIENTATION, markup=False)
    console.print(f"The world: {page}", markup=False)
    return 0


def list_all(command: List, console: Console) -> int:
    """Shows what there is to run."""
    import recsim_gr
    from recsim_gr._registration import ENVIRONMENTS

    for title, names in (
        ("environments", dict.fromkeys(ENVIRONMENTS, "")),
        ("agents", {name: _first_line(kind) for name, kind in recsim_gr.agents.AGENTS.items()}),
        ("suites", {n: _about_suite(kind) for n, kind in recsim_gr.benchmarks.SUITES.items()}),
    ):
        table = Table(title=title, show_header=False, title_justify="left", box=None, padding=(0, 2))
        for name, about in names.items():
            table.add_row(name, escape(about))
        console.print(table)
    return 0


def overridden(config: Any, command: Run) -> Any:
    """A preset's config with the options that were given.

    Raises:
        ConfigError: an option that the suite does not have, or a value that it refuses.
        UnknownNameError: no such backbone.
    """
    known = {field.name for field in fields(config)}
    settings = {
        field.name: getattr(command, field.name)
        for field in fields(command)
        if field.name not in ("suite", "preset", "out", "workers", "dry_run")
    }
    given = {name: value for name, value in settings.items() if value is not None}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ConfigError(f"suite {command.suite!r} has no option --{unknown[0].replace('_', '-')}")
    if command.backbone is not None:
        from recsim_gr.benchmarks.experiment import backbone_of_kind

        given["backbone"] = backbone_of_kind(command.backbone, config.backbone)
    return replace(config, **given)


def _first_line(thing: type) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]


def _about_suite(kind: Any) -> str:
    return f"{_first_line(kind)} Presets: {', '.join(kind.presets)}."


COMMANDS: dict[type, Any] = {
    Run: run_suite,
    Generate: generate_log,
    Report: draw_report,
    DrawWorld: show_world,
    List: list_all,
}
