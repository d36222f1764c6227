"""The command line. A mistake of a user is told on standard error, in one line where it can be parsed; exit code 2."""

import io
import math
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
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
    """Which agents take part, see `recsim-gr list`; your own as module:Class."""
    agent: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """One more agent beside those of the suite, as module:Class of a module here or installed; may be repeated."""
    n_titles: int | None = None
    """Size of a simulated catalogue."""
    backbone: str | None = None
    """hstu, sasrec or set; the preset's own sizes, dropout and rates carry over."""
    world_options: tuple[str, ...] | None = None
    """Further fields of the world's config, as name=value: cold_share=0.2, order_effect=1, history_median=8, …"""
    history_length: int | None = None
    """Events of a history."""
    n_users: int | None = None
    """Training users."""
    log_sizes: tuple[int, ...] | None = None
    """Training users of each reward model of suite reward_model, or of each table of suite offline, ascending."""
    test_contexts: int | None = None
    """Test users."""
    sweep: bool | None = None
    """Whether suite offline fits every agent at five strengths and chooses one by each rule; a preset of that name
    does."""
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


def _chosen(metavar: str, by_default: str = "chosen for the backbone") -> Any:
    """An option that is None where it is not given, and what that means."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {by_default})")


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Train a backbone by imitation on real sequences, or on a log; the same command goes on where it stopped.

    Real sequences are tested by leave-one-out with full ranking, beside popularity and item-kNN. Options that are not
    given keep what was chosen for the backbone on MovieLens-100K, or for logs what `recsim_gr.pretrain` does.
    """

    data: Path
    """RecBole's .inter file, or comma-separated values with a header (user, title, timestamp, and rating if there is
    one); or a log: the directory that `recsim-gr generate` made, or a Parquet file of one."""
    backbone: str = "hstu"
    """hstu, sasrec or set."""
    out: Path = Path("runs/pretrain")
    """The run directory: result.json, the backbone, and the training as it stands."""
    seed: int = 0
    """Of initial weights, batches and dropout."""
    epochs: Annotated[float | None, _chosen("FLOAT")] = None
    """Passes over the training events."""
    steps: Annotated[int | None, _chosen("INT")] = None
    """Gradient steps, instead of epochs; 0 goes by the epochs."""
    batch: Annotated[int | None, _chosen("INT")] = None
    """Windows of events a batch (of a log: users)."""
    learning_rate: Annotated[float | None, _chosen("FLOAT")] = None
    """Peak rate of AdamW."""
    weight_decay: Annotated[float | None, _chosen("FLOAT")] = None
    """Of AdamW."""
    max_length: Annotated[int | None, _chosen("INT")] = None
    """Events of a window of real sequences, and positions of the backbone."""
    dimensions: Annotated[int | None, _chosen("INT")] = None
    """Width of the backbone."""
    n_layers: Annotated[int | None, _chosen("INT")] = None
    """Layers of the backbone."""
    n_heads: Annotated[int | None, _chosen("INT")] = None
    """Heads of the backbone."""
    dropout: Annotated[float | None, _chosen("FLOAT")] = None
    """Share of what is dropped while it trains."""
    scores: Annotated[bool | None, _chosen("{True,False}")] = None
    """Whether the backbone reads ratings; off for real sequences, as in the field."""
    precision: Annotated[str | None, _chosen("TEXT")] = None
    """Of training: float32, bfloat16 or auto."""
    device: str = "cpu"
    """cpu, cuda, …"""
    repeats: Annotated[str | None, _chosen("TEXT", "refuse")] = None
    """A user who meets a title again: refuse, or first, which passes over all but the first time."""
    time_unit: Annotated[str | None, _chosen("TEXT", "seconds")] = None
    """Of a file's timestamps: seconds, milliseconds or hours."""


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
    | Annotated[Pretrain, tyro.conf.subcommand("pretrain")]
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

    if any(":" in name for name in (*command.agent, *(command.agents or ()))) and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` has it; processes of a run inherit it
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


def pretrain_backbone(command: Pretrain, console: Console) -> int:
    """Pretrains on what the data are, and says how good it became."""
    from recsim_gr.log import InteractionLog
    from recsim_gr.progress import TrainingProgress
    from recsim_gr.sequence_pretraining import pretrain_log, pretrain_sequences
    from recsim_gr.sequences import read_sequences

    reading = {name: getattr(command, name) for name in ("repeats", "time_unit")}
    reading = {name: value for name, value in reading.items() if value is not None}
    is_log = command.data.is_dir() or command.data.suffix == ".parquet"
    if is_log and reading:
        option = f"--{next(iter(reading)).replace('_', '-')}"
        raise ConfigError(f"{option} is for files of real sequences; leave it out, or give such a file as --data")
    backbone, schedule = _pretraining_of(command, is_log)
    with ExitStack() as shown:

        def progress(steps: int) -> TrainingProgress:
            return shown.enter_context(TrainingProgress(console, steps, command.backbone))

        where: dict[str, Any] = {"device": command.device, "progress": progress}
        if is_log:
            log = InteractionLog.open(command.data)
            trained = pretrain_log(log, backbone, schedule, command.out, command.seed, **where).training
        else:
            sequences = read_sequences(command.data, **reading)
            result = pretrain_sequences(sequences, backbone, schedule, command.out, command.seed, **where)
            trained = result.training
    if not is_log:
        for table in _ranking_tables(result, command.backbone):
            console.print(table)
        if trained.best_objective > math.log(sequences.n_titles):
            console.print(
                f"It has not learned: held-out NLL is above that of guessing, {math.log(sequences.n_titles):.3f} nats. "
                "Train longer, or lower --learning-rate."
            )
    console.print(
        f"{trained.steps:,} steps; held-out NLL {trained.objectives[0][1]:.3f} at the start, "
        f"{trained.best_objective:.3f} nats after {trained.best_step:,}, which is kept. The run: {command.out}",
        markup=False,
    )
    return 0


def _pretraining_of(command: Pretrain, is_log: bool) -> tuple[Any, Any]:
    """The backbone's config and the schedule, with the options that were given.

    Raises:
        UnknownNameError: no such backbone.
        ConfigError: a value that makes no sense, or an option that the backbone does not have.
    """
    from recsim_gr.backbones import backbone_type
    from recsim_gr.sequence_pretraining import LOG_SCHEDULE, preset

    backbone, schedule = preset(command.backbone)
    if is_log:
        backbone, schedule = backbone_type(command.backbone).config_type(), LOG_SCHEDULE
    shape = {name: getattr(command, name) for name in _SHAPE if getattr(command, name) is not None}
    foreign = sorted(set(shape) - {field.name for field in fields(backbone)})
    if foreign:
        raise ConfigError(f"backbone {command.backbone!r} has no --{foreign[0].replace('_', '-')}; leave it out")
    course = {
        name: getattr(command, name) for name in ("epochs", "steps", "learning_rate", "weight_decay", "precision")
    }
    course |= {"batch_windows": command.batch}
    if command.epochs is not None:
        if command.steps is not None:
            raise ConfigError("--epochs and --steps say the same thing twice; leave one out")
        course["steps"] = 0
    return replace(backbone, **shape), replace(schedule, **{k: v for k, v in course.items() if v is not None})


_SHAPE = ("max_length", "dimensions", "n_layers", "n_heads", "dropout", "scores")


def _ranking_tables(result: Any, backbone: str) -> list[Table]:
    """A table of figures for validation and one for the test."""
    tables = []
    for part, models in result.figures.items():
        table = Table(title=f"{part}: mean over users ± standard error", title_justify="left")
        table.add_column("")
        metrics = next(iter(models.values()))
        for metric in metrics:
            table.add_column(metric, justify="right")
        ranked = {f"{backbone}, seen titles ranked too": result.seen_ranked[part]}
        for name, found in (models | ranked).items():
            k, shrinkage, memory, decay = result.knn
            setting = f" (k {k}, shrinkage {shrinkage:g}, last {memory or 'all'}, decay {decay:g})"
            about = setting if name == "item-kNN" else ""
            table.add_row(name + about, *(f"{figure.mean:.4f} ± {figure.error:.4f}" for figure in found.values()))
        tables.append(table)
    return tables


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
        if field.name not in ("suite", "preset", "out", "workers", "dry_run", "agent")
    }
    given = {name: value for name, value in settings.items() if value is not None}
    if command.agent:
        if "agents" not in known:
            raise ConfigError(f"suite {command.suite!r} has no option --agent")
        given["agents"] = (*given.get("agents", config.agents), *command.agent)
    unknown = sorted(set(given) - known)
    if unknown:
        raise ConfigError(f"suite {command.suite!r} has no option --{unknown[0].replace('_', '-')}")
    if "n_users" in given and given.get("log_sizes", getattr(config, "log_sizes", ())):
        raise ConfigError(f"--n-users has no effect here: in suite {command.suite!r} it is --log-sizes that counts")
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
    Pretrain: pretrain_backbone,
    Report: draw_report,
    DrawWorld: show_world,
    List: list_all,
}
