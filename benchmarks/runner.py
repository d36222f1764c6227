"""Runs a suite's cells in worker processes: resumable, interruptible, the same table whatever the workers."""

import math
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from recsim_gr.benchmarks.results import is_row, write_results
from recsim_gr.benchmarks.suite import Cell, CellResult, Suite, suite_type
from recsim_gr.errors import ConfigError, RunDirectoryError
from recsim_gr.files import read_json, write_json
from recsim_gr.processes import (
    ENVIRONMENT,
    duration,
    end_with_parent,
    environment,
    interrupts_ignored,
    termination_as_interrupt,
)


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        finished: names of cells with all their results, old and new.
        failures: ``{"cell": …, "reason": …}`` of the others.
        lines: what the suite says of its results.
        report: the page, if there are results.
    """

    finished: list[str] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    report: Path | None = None


class RunDirectory:
    """Where a run keeps its config, its cells and its table.

    Args:
        path: made if it is not there.
        identity: the suite's config as JSON values.

    Raises:
        RunDirectoryError: it holds another configuration, or something that is no run; nothing is changed then.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = Path(path), identity
        try:
            self._refuse_another()
        except OSError as error:
            reason = error.strerror or str(error)
            raise RunDirectoryError(f"{self.path} cannot be used ({reason}); give --out another directory") from error

    def open(self) -> None:
        """Makes the directory and writes its config."""
        if not (self.path / "config.json").exists():
            write_json(self.path / "config.json", self.identity)

    def cell_file(self, cell: Cell) -> Path:
        """Where a cell's result is kept."""
        return self.path / "cells" / f"{cell.name}.json"

    def finished(self, cells: list[Cell]) -> list[Cell]:
        """The cells whose results are kept, and whole."""
        return [cell for cell in cells if self._is_finished(cell)]

    def content(self, cell: Cell) -> dict[str, Any] | None:
        """What a cell's file holds; None if it is missing, damaged, or of another cell."""
        try:
            content = read_json(self.cell_file(cell))
        except RunDirectoryError:
            return None
        return content if is_cell_content(content) and content["settings"] == cell.settings else None

    def _is_finished(self, cell: Cell) -> bool:
        content = self.content(cell)
        return content is not None and not content["failed"]

    def _refuse_another(self) -> None:
        config = self.path / "config.json"
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"{self.path} is a file; give --out a directory")
        if not config.exists():
            if self.path.exists() and any(self.path.iterdir()):
                raise RunDirectoryError(
                    f"{self.path} is not empty and holds no run; give --out a new or empty directory"
                )
            return
        kept = read_json(config)
        if not isinstance(kept, dict):
            raise RunDirectoryError(f"{config} is not the config of a run; give --out another directory")
        differing = sorted(k for k in {*kept, *self.identity} if kept.get(k) != self.identity.get(k))
        if differing:
            key = differing[0]
            raise RunDirectoryError(
                f"{self.path} holds a run with another configuration ({key}: {kept.get(key)!r} there, "
                f"{self.identity.get(key)!r} here); give --out another directory, or remove that one"
            )


def is_cell_content(content: Any) -> bool:
    """Whether JSON values are what `_work` makes: everything that is read from a cell's file goes through here."""
    if not isinstance(content, dict) or not isinstance(content.get("seconds"), (int, float)):
        return False
    rows, failed = content.get("rows"), content.get("failed")
    if not isinstance(rows, list) or not isinstance(failed, dict):
        return False
    return all(is_row(row) for row in rows)


def run(suite: Suite, out: Path, workers: int, console: Console) -> Outcome:
    """Runs the cells that are not finished, then writes ``results.parquet`` and the report.

    Args:
        suite: with its config.
        out: the run directory.
        workers: processes, one thread each.
        console: where progress is shown.

    Raises:
        RunDirectoryError: another configuration is kept there, or it cannot be written.
        ConfigError: no workers.
        KeyboardInterrupt: interrupted; finished cells are kept.
    """
    _refuse_no_workers(workers)
    workers = min(workers, suite.most_workers)
    directory = RunDirectory(out, suite.identity())
    cells = suite.cells()
    kept = directory.finished(cells)
    todo = [cell for cell in cells if cell not in kept]
    directory.open()
    if kept:
        console.print(f"{len(kept)} of {len(cells)} cells are finished already and are kept.")
    crashed = _run_cells(suite, todo, directory, workers, console) if todo else {}
    return _conclude(suite, cells, directory, crashed)


def _refuse_no_workers(workers: int) -> None:
    if workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {workers}")


def _conclude(suite: Suite, cells: list[Cell], directory: RunDirectory, crashed: dict[str, str]) -> Outcome:
    """Gathers the cells' files into the table and draws the report."""
    outcome, rows = Outcome(), []
    for cell in cells:
        if cell.name in crashed:
            outcome.failures.append({"cell": cell.name, "reason": crashed[cell.name]})
            continue
        content = directory.content(cell)
        if content is None:
            outcome.failures.append({"cell": cell.name, "reason": "its file was damaged meanwhile; run again"})
            continue
        rows += content["rows"]
        failed = content["failed"]
        outcome.failures += [{"cell": cell.name, "reason": f"{a}: {why}"} for a, why in failed.items()]
        if not failed:
            outcome.finished.append(cell.name)
    write_json(directory.path / "failures.json", outcome.failures)
    if rows:
        write_results(rows, directory.path / "results.parquet")
        outcome.report, outcome.lines = suite.report(directory.path)
    return outcome


def _run_cells(
    suite: Suite, todo: list[Cell], directory: RunDirectory, workers: int, console: Console
) -> dict[str, str]:
    """Runs cells in processes and keeps each result as it comes; the reasons of those that crashed.

    A worker that dies takes the pool with it: what was not finished goes into a new one, and a cell that was begun
    in `ATTEMPTS` pools that died is given up.
    """
    crashed: dict[str, str] = {}
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    board = _Board(todo, console)
    left, begun = list(todo), dict.fromkeys((cell.name for cell in todo), 0)
    with environment(ENVIRONMENT), termination_as_interrupt(), board.following(messages):
        while left:
            died = _one_pool(suite, left, directory, min(workers, len(left)), messages, board, crashed)
            for cell in died:
                begun[cell.name] += board.shares[cell.name] > 0.0
                if begun[cell.name] >= ATTEMPTS:
                    crashed[cell.name] = DEAD_WORKER
                    board.finish(cell, DEAD_WORKER)
            left = [cell for cell in died if cell.name not in crashed]
    return crashed


ATTEMPTS = 2
DEAD_WORKER = "its worker process died twice (out of memory?); run the command again to try the cell again"


def _one_pool(
    suite: Suite,
    todo: list[Cell],
    directory: RunDirectory,
    workers: int,
    messages: Any,
    board: "_Board",
    crashed: dict[str, str],
) -> list[Cell]:
    """Runs cells until all are done or a worker dies; the cells that are left then. Fills ``crashed``."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread, initargs=(messages,))
    left: list[Cell] = []
    try:
        with interrupts_ignored():  # the workers inherit it
            pending = {pool.submit(_work, type(suite).name, suite.config, cell): cell for cell in todo}
        while pending:
            done, _ = wait(pending, timeout=1.0, return_when="FIRST_COMPLETED")
            for future in done:
                cell = pending.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    left.append(cell)
                    continue
                reason, kept = _keep(future, cell, directory)
                if not kept and reason is not None:
                    crashed[cell.name] = reason
                board.finish(cell, reason)
    except BaseException:
        # the interrupted and the failing alike: no worker goes on after the run has stopped
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return left


def _keep(future: "Future[dict[str, Any]]", cell: Cell, directory: RunDirectory) -> tuple[str | None, bool]:
    """Writes a cell's result: what failed in it, if anything, and whether there was a result to write.

    Raises:
        RunDirectoryError: it cannot be written (a full disk): the whole run stops, nothing half-written is left.
    """
    try:
        content = future.result()
    except (Exception, SystemExit) as error:  # whatever a cell raises is its own failure, reported, and not the run's
        return f"{type(error).__name__}: {error}", False
    write_json(directory.cell_file(cell), content)
    return "; ".join(f"{agent}: {why}" for agent, why in content["failed"].items()) or None, True


def _work(suite_name: str, config: Any, cell: Cell) -> dict[str, Any]:
    """Works one cell out, in a worker."""
    wall, cpu = time.perf_counter(), time.process_time()
    suite = suite_type(suite_name)(config)

    def notify(share: float, doing: str) -> None:
        if _MESSAGES is not None:
            _MESSAGES.put((cell.name, share, doing))

    result: CellResult = suite.run_cell(cell, notify)
    notify(1.0, "done")
    return {
        "name": cell.name,
        "settings": cell.settings,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mebibytes": _peak_mebibytes(),
        "agents": result.costs,
        "failed": result.failed,
        "rows": result.rows,
    }


_MESSAGES: Any = None
"""In a worker: the queue to the parent's progress board."""


def _one_thread(messages: Any) -> None:
    """In a worker: one thread; and an end with the parent, however that ends."""
    import torch

    import recsim_gr.benchmarks  # noqa: F401  (registers the suites)

    global _MESSAGES
    _MESSAGES = messages
    end_with_parent()
    torch.set_num_threads(1)


def _peak_mebibytes() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class _Board:
    """Shows how far each cell and the whole run are, with an estimate of the time left."""

    def __init__(self, cells: list[Cell], console: Console) -> None:
        self.console = console
        self.shares = {cell.name: 0.0 for cell in cells}
        self.start = time.monotonic()
        self.progress = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self.total = self.progress.add_task(f"{len(cells)} cells", total=1.0, left="")
        self.tasks: dict[str, Any] = {}

    @contextmanager
    def following(self, messages: Any) -> Iterator[None]:
        """Reads the workers' messages in a thread while the block runs."""
        stop = threading.Event()

        def follow() -> None:
            while not stop.is_set():
                try:
                    self.tell(*messages.get(timeout=0.5))
                except queue.Empty:
                    continue
                except (EOFError, OSError, TypeError, ValueError):  # a worker died while it wrote
                    continue

        thread = threading.Thread(target=follow, daemon=True)
        with self.progress:
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()

    def tell(self, name: str, share: float, doing: str) -> None:
        """A worker's message."""
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(name, total=1.0, left="")
        self.shares[name] = share
        self.progress.update(self.tasks[name], completed=share, left=doing)
        self._update_total()

    def finish(self, cell: Cell, reason: str | None) -> None:
        """A cell has ended; a line that stays, also where there is no terminal."""
        self.shares[cell.name] = 1.0
        if cell.name in self.tasks:
            self.progress.update(self.tasks[cell.name], completed=1.0, visible=False)
        done = sum(share >= 1.0 for share in self.shares.values())
        how = "done" if reason is None else f"FAILED: {reason}"
        self.console.print(f"{done}/{len(self.shares)} {cell.name} {how}{self._left()}", markup=False)
        self._update_total()

    def _update_total(self) -> None:
        share = sum(self.shares.values()) / len(self.shares)
        self.progress.update(self.total, completed=share, left=self._left().removeprefix(", "))

    def _left(self) -> str:
        share = sum(self.shares.values()) / len(self.shares)
        if share >= 1.0 or share < 0.01:
            return ""
        seconds = (time.monotonic() - self.start) * (1.0 - share) / share
        return f", about {duration(seconds)} left"


def dry_run(suite: Suite, out: Path, workers: int, show: Callable[[str], None]) -> None:
    """Names the cells that would be run and the time they would take; writes nothing.

    Raises:
        RunDirectoryError: another configuration is kept there.
    """
    _refuse_no_workers(workers)
    workers = min(workers, suite.most_workers)
    directory = RunDirectory(out, suite.identity())
    cells = suite.cells()
    kept = {cell.name for cell in directory.finished(cells)}
    for cell in cells:
        show(f"{cell.name}{'  (finished, kept)' if cell.name in kept else ''}")
    todo = len(cells) - len(kept)
    each, source = _seconds_a_cell(suite, directory, kept)
    rounds = math.ceil(todo / workers)
    show(
        f"{todo} of {len(cells)} cells to run, about {duration(each)} each ({source}), "
        f"about {duration(rounds * each)} with {workers} worker{'s' if workers > 1 else ''}"
    )


def _seconds_a_cell(suite: Suite, directory: RunDirectory, kept: set[str]) -> tuple[float, str]:
    times = [read_json(directory.path / "cells" / f"{name}.json")["seconds"] for name in kept]
    if times:
        return sum(times) / len(times), "the mean of the finished ones"
    return suite.estimate_cell_seconds(), "from a step timed just now"


__all__ = ["Outcome", "RunDirectory", "dry_run", "duration", "run"]
