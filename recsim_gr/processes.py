"""Worker processes that never outlive their work: one answer to Ctrl-C, to SIGTERM and to a parent that is gone."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from recsim_gr.errors import WorkerError

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""Of the workers. One thread each: two OpenMP threads on a core that something else uses are many times slower than
one. And glibc keeps freed memory, instead of giving every megabyte tensor back and faulting it in again
(``pytest -m benchmark -s tests/benchmarks/test_speed.py``, with these set and without)."""


def end_with_parent() -> None:
    """In a worker: ends it with its parent, however that ends, SIGKILL included."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """SIGINT means nothing inside, to this process and to those started meanwhile: the parent alone answers Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """SIGTERM (``timeout``, a batch scheduler) ends a run as Ctrl-C does: workers first, what is finished is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the processes started inside; what the user has set stays."""
    added = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


class Listener(Protocol):
    """Is told how far the jobs are."""

    def advance(self, amount: int) -> None:
        """So much more is done; less than 0 where it must be done again."""

    def say(self, line: str) -> None:
        """Something that is worth a line."""


@dataclass
class _Worker:
    """A worker process, the job that it is at, and how much of it is done."""

    process: Any
    connection: Any
    job: int
    done: int = 0


ATTEMPTS = 2
"""Workers that may die on one job before the run is given up."""


class JobPool:
    """Worker processes that are handed one job at a time, so that it is known on which one a worker died.

    Args:
        target: a function of a module, run in every worker as ``target(*arguments, connection)``: it receives the
            numbers of jobs until it receives None, and sends for each how much more is done (integers), and at last
            its result, or the exception that it ended in.
        arguments: of the target, before the connection.
        name: what a job is called.
        listener: is told how far the jobs are.
    """

    def __init__(
        self, target: Callable[..., None], arguments: tuple[Any, ...], name: Callable[[int], str], listener: Listener
    ) -> None:
        self.target, self.arguments, self.name, self.listener = target, arguments, name, listener
        self.workers: list[_Worker] = []
        self.deaths: dict[int, int] = {}

    def run(self, jobs: list[int], n_workers: int) -> dict[int, Any]:
        """Does the jobs; their results.

        Raises:
            WorkerError: a worker died on the same job for the second time.
            Exception: whatever a job ended in; the others are left.
        """
        left, results = list(reversed(jobs)), {}
        for _ in range(min(n_workers, len(jobs))):
            self._start(left.pop())
        while self.workers:
            ready = multiprocessing.connection.wait([worker.connection for worker in self.workers])
            for worker in [worker for worker in self.workers if worker.connection in ready]:
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    self._bury(worker)
                    continue
                if isinstance(message, BaseException):
                    raise message
                if isinstance(message, int):
                    worker.done += message
                    self.listener.advance(message)
                else:
                    results[worker.job] = message
                    self._go_on(worker, left)
        return results

    def end(self) -> None:
        """No worker goes on after the run has stopped."""
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join()
        self.workers = []

    def _start(self, job: int) -> None:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=self.target, args=(*self.arguments, there), daemon=True)
        with environment(ENVIRONMENT), interrupts_ignored():  # the worker inherits both
            process.start()
        there.close()  # the worker's end is the worker's alone: when it dies, this end knows
        worker = _Worker(process, here, job)
        self.workers.append(worker)
        self._send(worker, job)

    def _go_on(self, worker: _Worker, left: list[int]) -> None:
        if left:
            worker.job, worker.done = left.pop(), 0
            self._send(worker, worker.job)
            return
        self._send(worker, None)
        worker.process.join()
        self.workers.remove(worker)

    def _send(self, worker: _Worker, message: int | None) -> None:
        with suppress(OSError):  # it is dead: its end of the pipe says so in its turn
            worker.connection.send(message)

    def _bury(self, worker: _Worker) -> None:
        """Names a worker that died, and gives its job to a new one."""
        worker.process.join()
        self.workers.remove(worker)
        code, name = worker.process.exitcode, self.name(worker.job)
        how = f"killed by {signal.Signals(-code).name}, out of memory?" if code < 0 else f"exit code {code}"
        died = self.deaths[worker.job] = self.deaths.get(worker.job, 0) + 1
        if died >= ATTEMPTS:
            raise WorkerError(
                f"the worker process that made {name} died twice ({how}); what is finished is kept, and the same "
                "command goes on, perhaps with fewer --workers"
            )
        self.listener.say(f"the worker process that made {name} died ({how}); {name} is made again")
        self.listener.advance(-worker.done)
        self._start(worker.job)


def duration(seconds: float) -> str:
    """``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
