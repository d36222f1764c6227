"""Logs of any size: shards made by worker processes, kept as they are finished, vouched for by a manifest at the end.

What is in a shard follows from the plan and its number alone, so the files are the same byte for byte whatever the
workers, their order, and however often the making was interrupted.
"""

import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from recsim_gr import configs
from recsim_gr.behaviour import SPLITS
from recsim_gr.errors import ConfigError, LogFormatError, RunDirectoryError
from recsim_gr.files import read_json, write_json
from recsim_gr.log import COLUMNS, InteractionLog, ShardedLog
from recsim_gr.processes import (
    JobPool,
    duration,
    end_with_parent,
    termination_as_interrupt,
)
from recsim_gr.shards import (
    CATALOGUE,
    FORMAT,
    MANIFEST,
    SHARDS_VERSION,
    UNFINISHED,
    Columns,
    Manifest,
    Shard,
    ShardDirectory,
    is_whole,
    part_bytes,
    shard_name,
    shard_record,
    write_catalogue,
    write_shard,
)
from recsim_gr.world import World, WorldConfig
from recsim_gr.world_base import USERS_PER_SPLIT

PART_EVENTS = 81_920
"""Events of a part at most, 4,096 users of 20: about a megabyte on disk and five in memory, so that reading one costs
some ten milliseconds and a training run can hold several."""
PARTS_PER_SHARD, MOST_SHARDS_OF_A_SMALL_LOG, LEAST_SHARD_USERS = 8, 16, 512
"""By default a shard has eight parts: about a second's work, which is what a kill loses, in some ten megabytes. Logs
too small for sixteen such shards are cut in sixteen, so that there is something for every worker, but of no less than
512 users."""
SAMPLE_USERS = 256
"""Users made beforehand to estimate time and size."""
ENOUGH_SPACE = 0.9
"""Of the estimated size must be free: below it the disk would surely fill up."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What log is to be made; everything that decides its bytes.

    Raises:
        ConfigError: a value that makes no sense.
    """

    world: WorldConfig
    n_users: int
    split: str = "train"
    propensities: bool = False
    """Off, as in `World.generate_log`: an algorithm must not get them by accident."""
    users_per_shard: int = 0
    """0: as `PARTS_PER_SHARD` says."""

    def __post_init__(self) -> None:
        configs.require_finite_numbers(self)
        configs.require(self.split in SPLITS, self, "split", f"one of {', '.join(SPLITS)}")
        configs.require(1 <= self.n_users <= USERS_PER_SPLIT, self, "n_users", f"1 to {USERS_PER_SPLIT}")
        configs.require(self.users_per_shard >= 0, self, "users_per_shard", "0 (automatic) or more")

    @property
    def users_per_part(self) -> int:
        """Users of a row group: as many as `PART_EVENTS` holds, were all histories full."""
        return max(1, PART_EVENTS // self.world.history_length)

    @property
    def shard_users(self) -> int:
        """Users of every shard but the last."""
        small = max(LEAST_SHARD_USERS, math.ceil(self.n_users / MOST_SHARDS_OF_A_SMALL_LOG))
        return self.users_per_shard or min(small, PARTS_PER_SHARD * self.users_per_part)

    @property
    def n_shards(self) -> int:
        """How many shards there are."""
        return math.ceil(self.n_users / self.shard_users)

    def shard_range(self, index: int) -> range:
        """Users of a shard, counted in their split."""
        start = index * self.shard_users
        return range(start, min(start + self.shard_users, self.n_users))

    def identity(self) -> dict[str, Any]:
        """As JSON values, for the manifest."""
        return {
            "format": FORMAT,
            "schema_version": SHARDS_VERSION,
            "provenance": {"world": "World", "split": self.split, "config": configs.to_dict(self.world)},
            "n_users": self.n_users,
            "propensities": self.propensities,
            "users_per_shard": self.shard_users,
            "users_per_part": self.users_per_part,
        }


def generate(plan: Plan, out: str | Path, workers: int = 1, console: Console | None = None) -> ShardedLog:
    """Makes the log of a plan in a directory; goes on where an earlier call stopped.

    Memory is bounded by the part, whatever the number of users. Shards that are finished and whole are kept.

    Args:
        plan: what to make.
        out: the directory; made if it is not there.
        workers: processes, one thread each; one worker is this process itself. More start new interpreters, which a
            script must allow by being guarded with ``if __name__ == "__main__":``.
        console: where progress is shown; nowhere without it.

    Raises:
        ConfigError: no workers.
        RunDirectoryError: the directory holds something else, cannot be written, or its disk has too little space.
        WorkerError: a worker died twice on a shard; finished shards are kept.
        KeyboardInterrupt: interrupted, also by SIGTERM; finished shards are kept.
    """
    if workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {workers}")
    out, console = Path(out), console or Console(quiet=True)
    _refuse_another(out, plan)
    maker = _Maker(plan, out)
    with _held(out), termination_as_interrupt():
        shards = _kept_shards(plan, out)
        todo = [index for index in range(plan.n_shards) if index not in shards]
        _announce(maker, todo, workers, console)
        if todo:
            _begin(plan, out, shards)
            with _Board(plan, todo, console) as board:
                shards.update(_made(maker, todo, workers, board))
        _conclude(maker, shards)
    return ShardedLog(ShardDirectory(out))


class _Maker:
    """Makes shards of a plan, in the process that it lives in."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self.plan, self.out = plan, out

    @cached_property
    def world(self) -> World:
        """Made where it is first needed: a worker keeps it for all its shards."""
        return World(self.plan.world)

    def make(self, index: int, tell: Callable[[int], None]) -> Shard:
        """Makes one shard; ``tell`` is told the users of every part that is done."""
        users = self.plan.shard_range(index)

        def parts() -> Iterator[Columns]:
            for start in range(users.start, users.stop, self.plan.users_per_part):
                n = min(self.plan.users_per_part, users.stop - start)
                yield self.columns(start, n)
                tell(n)

        return write_shard(self.out, index, parts(), self.world.catalogue.duration_minutes)

    def columns(self, start: int, n: int) -> Columns:
        """The columns of ``n`` users of the split; a legal log, or there would be an error."""
        log: InteractionLog = self.world.generate_log(
            n,
            self.plan.split,
            expose_propensities=self.plan.propensities,
            offset=start,
        )
        columns = {name: getattr(log, name) for name in COLUMNS}
        return columns if log.propensities is None else {**columns, "propensity": log.propensities}

    def sample(self) -> tuple[float, float]:
        """Seconds and bytes a user, measured on a few."""
        n = min(self.plan.n_users, SAMPLE_USERS)
        self.columns(0, 1)  # titles and tables, which are worked out once
        start = time.perf_counter()
        columns = self.columns(0, n)
        size = part_bytes(columns, self.world.catalogue.duration_minutes)
        return (time.perf_counter() - start) / n, size / n


# -- the directory --------------------------------------------------------------------------------------------------


def _record_name(index: int) -> str:
    return str(Path(shard_name(index)).with_suffix(".json"))


def _refuse_another(out: Path, plan: Plan) -> None:
    """Nothing is touched in a directory that holds anything but this log.

    Raises:
        RunDirectoryError: it does.
    """
    try:
        if not out.exists():
            return
        if not out.is_dir():
            raise RunDirectoryError(f"{out} is a file; give --out a directory")
        if not (out / MANIFEST).exists() and not (out / UNFINISHED).exists():
            if any(not _is_leftover(path) for path in out.iterdir()):
                raise RunDirectoryError(
                    f"{out} is not empty and holds no log in shards; give --out a new or empty directory"
                )
            return
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunDirectoryError(f"{out} cannot be used ({reason}); give --out another directory") from error
    for name in (MANIFEST, UNFINISHED):
        if (out / name).exists():
            _refuse_difference(out, name, plan.identity())


def _refuse_difference(out: Path, name: str, identity: dict[str, Any]) -> None:
    try:
        kept = read_json(out / name)
    except RunDirectoryError as error:
        raise RunDirectoryError(f"{out / name} is damaged; remove {out}, or give --out another directory") from error
    if not isinstance(kept, dict) or kept.get("format") != FORMAT:
        raise RunDirectoryError(f"{out / name} is not of a log in shards; give --out another directory")
    there, here = _flat({key: kept.get(key) for key in identity}), _flat(identity)
    differing = sorted(key for key in {*there, *here} if there.get(key) != here.get(key))
    if differing:
        key = differing[0]
        raise RunDirectoryError(
            f"{out} holds another log ({key}: {there.get(key)!r} there, {here.get(key)!r} here); "
            "give --out another directory, or remove that one"
        )


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries as one, by the innermost names; those of an identity are all different."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value) if isinstance(value, dict) else {key: value})
    return flat


def _is_leftover(path: Path) -> bool:
    """Whether a file is one of ours that was being written when its process was killed."""
    names = (MANIFEST, UNFINISHED, CATALOGUE, "shard-")
    return path.name.endswith(".part") and path.name.startswith(tuple(f".{name}" for name in names))


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """The directory for this process alone; nothing half-written is in it before and after.

    Raises:
        RunDirectoryError: it cannot be made, or another process makes a log there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = _lock(out)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunDirectoryError(f"{out} cannot be used ({reason}); give --out another directory") from error
    try:
        _sweep(out)
        yield
    finally:
        _sweep(out)
        lock()


def _lock(out: Path) -> Callable[[], None]:
    """Takes the directory's lock, which its process cannot leave behind; returns what gives it back."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system: two at once would do work twice, to the same files
        return lambda: None
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise RunDirectoryError(f"another process makes a log in {out}; wait for it, or give another --out") from error
    except OSError:  # a file system without locks
        pass
    return lambda: os.close(handle)


def _sweep(out: Path) -> None:
    for path in out.iterdir():
        if _is_leftover(path):
            path.unlink(missing_ok=True)


def _kept_shards(plan: Plan, out: Path) -> dict[int, Shard]:
    """The finished shards that are byte for byte as they were recorded."""
    recorded: dict[int, Shard] = {}
    with suppress(LogFormatError):
        recorded = dict(enumerate(Manifest.read(out).shards))
    for index in range(plan.n_shards):
        if index not in recorded and (out / _record_name(index)).exists():
            with suppress(RunDirectoryError, KeyError, TypeError, ValueError):
                recorded[index] = shard_record(read_json(out / _record_name(index)))
    return {i: shard for i, shard in recorded.items() if shard.file == shard_name(i) and is_whole(out, shard)}


def _begin(plan: Plan, out: Path, kept: dict[int, Shard]) -> None:
    """Marks the log as unfinished. A manifest that vouches for damaged shards goes, what it knew of others stays; in
    this order, since a kill may come between any two lines."""
    for index, shard in kept.items():
        write_json(out / _record_name(index), shard._asdict())
    write_json(out / UNFINISHED, plan.identity())
    (out / MANIFEST).unlink(missing_ok=True)


def _conclude(maker: _Maker, shards: dict[int, Shard]) -> None:
    """The catalogue, the manifest, and the end of what only an unfinished log needs."""
    plan, out = maker.plan, maker.out
    whole = False
    with suppress(LogFormatError):
        whole = is_whole(out, Manifest.read(out).catalogue)
    if not whole:
        manifest = Manifest(
            identity=plan.identity(),
            n_titles=plan.world.n_titles,
            bounded_scores=maker.world.noise.bounded,
            catalogue=write_catalogue(out, maker.world.catalogue),
            shards=tuple(shards[index] for index in range(plan.n_shards)),
        )
        manifest.write(out)
    (out / UNFINISHED).unlink(missing_ok=True)
    for index in range(plan.n_shards):
        (out / _record_name(index)).unlink(missing_ok=True)


def _announce(maker: _Maker, todo: list[int], workers: int, console: Console) -> None:
    """Says what is to be done and what it will take.

    Raises:
        RunDirectoryError: the disk has clearly too little space.
    """
    plan = maker.plan
    kept = plan.n_shards - len(todo)
    if kept:
        console.print(f"{kept} of {plan.n_shards} shards are finished already and are kept.")
    if not todo:
        return
    users = sum(len(plan.shard_range(index)) for index in todo)
    seconds, size = maker.sample()
    needed, free = users * size, shutil.disk_usage(maker.out).free
    at_once = min(workers, len(todo), multiprocessing.cpu_count())
    console.print(
        f"{users:,} users in {len(todo)} shards to make: about {megabytes(needed)}, "
        f"about {duration(users * seconds / at_once)} with {workers} worker{'s' if workers > 1 else ''}."
    )
    if free < ENOUGH_SPACE * needed:
        raise RunDirectoryError(
            f"{maker.out} needs about {megabytes(needed)} and its disk has {megabytes(free)} free; "
            "free space or choose another place"
        )


def megabytes(size: float) -> str:
    """``3.2 MB``, ``230 MB`` or ``1.2 GB``."""
    if size < 1e7:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


# -- the workers ----------------------------------------------------------------------------------------------------


def _made(maker: _Maker, todo: list[int], workers: int, board: "_Board") -> dict[int, Shard]:
    """Makes shards, each by whichever worker is free."""
    if workers == 1:
        return {index: maker.make(index, board.advance) for index in todo}
    pool = JobPool(_work, (maker.plan, maker.out), shard_name, board)
    try:
        return pool.run(todo, workers)
    finally:
        pool.end()


def _work(plan: Plan, out: Path, connection: Any) -> None:
    """In a worker: makes the shards that it is handed until it is handed none."""
    end_with_parent()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    maker = _Maker(plan, out)
    while (index := connection.recv()) is not None:
        try:
            answer: Any = maker.make(index, connection.send)
        except Exception as error:  # to the parent, which stops the run and says why
            answer = error
        connection.send(answer)


class _Board:
    """Shows how far the log is: a bar on a terminal, a line every tenth elsewhere."""

    def __init__(self, plan: Plan, todo: list[int], console: Console) -> None:
        self.plan, self.console = plan, console
        self.total = sum(len(plan.shard_range(index)) for index in todo)
        self.done = self.tenths = 0
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task(f"{self.total:,} users", total=self.total)

    def __enter__(self) -> "_Board":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self, users: int) -> None:
        """Some users are done."""
        self.done += users
        self.progress.update(self.task, completed=self.done)
        if not self.console.is_terminal and self.done * 10 // self.total > self.tenths:
            self.tenths = self.done * 10 // self.total
            self.say(f"{self.done:,} of {self.total:,} users")

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, markup=False)


__all__ = ["Plan", "generate", "megabytes"]
