"""Measuring time and memory on a machine that others use too: side by side, best and median, in processes of their own.

Single-threaded work is timed by the CPU time of its process, which others cannot take away (they still share caches
and memory); work of several processes by the wall clock.
"""

import ctypes
import gc
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from recsim_gr.processes import ENVIRONMENT, end_with_parent

MEBIBYTE = 2**20

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
"""The runner sets these for its workers. A user's own process has them not, so it is measured without."""

SAMPLE_SECONDS = 0.05
"""Between two looks at the memory of other processes: their own peaks are read, so none is missed that lives longer."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        best: of the fastest repeat.
        median: of all repeats.
    """

    best: float
    median: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """From the repeats."""
        return cls(min(seconds), median(seconds))


def side_by_side(
    works: Mapping[str, Callable[[], object]],
    repeats: int,
    seconds: float,
    clock: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Times single-threaded works by CPU time, a repeat of each in turn, so that all meet the same machine.

    Args:
        works: by name; each is called once beforehand, uncounted.
        repeats: of each.
        seconds: that a repeat takes at least, with as many calls as that needs.
        clock: what is read, where CPU time is not what counts: a device works while the processor waits.
    """
    clock = clock or time.process_time
    calls = {}
    for name, work in works.items():
        work()
        calls[name] = max(1, round(seconds / _once(work, 1, clock)))
    taken: dict[str, list[float]] = {name: [] for name in works}
    gc.freeze()  # what was imported is not looked through at every repeat
    try:
        for _ in range(repeats):
            for name, work in works.items():
                gc.collect()
                taken[name].append(_once(work, calls[name], clock))
    finally:
        gc.unfreeze()
    return {name: Timing.of(times) for name, times in taken.items()}


def _once(work: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        work()
    return max(clock() - start, 1e-9) / calls


# -- processes ---------------------------------------------------------------------------------------------------


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work(*arguments)`` returns in a new interpreter: one thread, a clean memory, the allocator as users have
    it."""
    with _plain_environment(), ProcessPoolExecutor(1, _spawning(), end_with_parent) as pool:
        return pool.submit(work, *arguments).result()


def in_worker_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """`in_new_process`, with the allocator as the runner's workers have it."""
    with _plain_environment():
        os.environ.update(ENVIRONMENT)
        with ProcessPoolExecutor(1, _spawning(), end_with_parent) as pool:
            return pool.submit(work, *arguments).result()


def at_the_same_time(
    work: Callable[..., Callable[[], object]], each: Sequence[tuple[Any, ...]], repeats: int, seconds: float
) -> tuple[Timing, Timing]:
    """Times several processes that do their work at the same time.

    Args:
        work: called with the arguments of a process, in it, returns what is timed; that is called once beforehand.
        each: arguments, a process each.
        repeats: how often.
        seconds: that a repeat takes at least. It should be a second or more: processes that wake together may start on
            one core, and part within a tenth of a second.

    Returns:
        wall seconds, from the start of all to the end of the last; and CPU seconds of the process that takes most,
        which is what the wall clock would say were there a free core for each.
    """
    context = _spawning()
    barrier = context.Barrier(len(each))
    with (
        _plain_environment(),
        ProcessPoolExecutor(len(each), context, _meet_at, (barrier,)) as pool,
    ):
        by_process = list(pool.map(partial(_timed_together, work, repeats=repeats, seconds=seconds), each))
    by_repeat = list(zip(*by_process, strict=True))
    wall = [_together(spans) for spans in by_repeat]
    return Timing.of(wall), Timing.of([max(span.cpu for span in spans) for spans in by_repeat])


class _Span(NamedTuple):
    """A repeat of a process: when it began and ended, its CPU time a call, and how many calls it was."""

    start: float
    end: float
    cpu: float
    calls: int


def _together(spans: Sequence[_Span]) -> float:
    """Seconds in which every process makes one call, from the first start to the last end."""
    whole = max(span.end for span in spans) - min(span.start for span in spans)
    return whole * len(spans) / sum(span.calls for span in spans)


def _timed_together(
    work: Callable[..., Callable[[], object]], arguments: tuple[Any, ...], repeats: int, seconds: float
) -> list[_Span]:
    timed = work(*arguments)
    timed()
    assert _BARRIER is not None
    _BARRIER.wait(timeout=600)
    start = time.monotonic()
    timed()
    calls = max(1, round(seconds / max(time.monotonic() - start, 1e-6)))
    spans = []
    for _ in range(repeats):
        _BARRIER.wait(timeout=600)
        start, cpu = time.monotonic(), time.process_time()  # the first is one clock for all processes
        for _ in range(calls):
            timed()
        spans.append(_Span(start, time.monotonic(), (time.process_time() - cpu) / calls, calls))
    return spans


_BARRIER: Any = None
"""In a process of `at_the_same_time`: where all meet before each repeat."""


def _meet_at(barrier: Any) -> None:
    global _BARRIER
    _BARRIER = barrier
    end_with_parent()


def _spawning() -> Any:
    return multiprocessing.get_context("spawn")


@contextmanager
def _plain_environment() -> Iterator[None]:
    before = dict(os.environ)
    for name in ALLOCATOR:
        os.environ.pop(name, None)
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def plain_environment() -> dict[str, str]:
    """Environment variables of a user's own process with one thread."""
    return {name: value for name, value in os.environ.items() if name not in ALLOCATOR} | ONE_THREAD


# -- memory ------------------------------------------------------------------------------------------------------


def peak_bytes(process: int | str = "self") -> float:
    """The most memory that a process has held so far; NaN where the system does not say.

    From ``/proc``: what `resource` says of a process includes its parent's memory from before the ``exec``.
    """
    return _status(process, "VmHWM")


def held_bytes(process: int | str = "self") -> float:
    """The memory that a process holds now; NaN where the system does not say."""
    return _status(process, "VmRSS")


def forget_peak() -> None:
    """Gives back what this process has freed and lets `peak_bytes` begin anew; where the system does not know how,
    nothing happens."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _status(process: int | str, name: str) -> float:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    except OSError:
        return float("nan")
    return float(found[1]) * 1024 if found else float("nan")


START = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Becomes the command, which ends when its parent dies: no interrupt would reach it."""


@dataclass(frozen=True)
class Finished:
    """What a command took.

    Attributes:
        seconds: by the wall clock.
        cpu_seconds: of all its processes.
        peak_bytes: the sum of the peaks of all its processes, shared pages counted in each: an upper bound.
        output: of the command.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: float
    output: str


def run_command(command: Sequence[str]) -> Finished:
    """Runs a command to its end and measures it and its children.

    Raises:
        RuntimeError: it failed; says how.
    """
    peaks: dict[int, float] = {}
    before, start = os.times(), time.perf_counter()
    starter = [sys.executable, "-I", "-S", "-c", START] if sys.platform == "linux" else []
    process = subprocess.Popen(
        [*starter, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=plain_environment()
    )
    watcher = threading.Thread(target=_watch, args=(process, peaks), daemon=True)
    watcher.start()
    output, _ = process.communicate()
    seconds, after = time.perf_counter() - start, os.times()
    watcher.join()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {output.strip()[-500:]}")
    cpu = (after.children_user + after.children_system) - (before.children_user + before.children_system)
    return Finished(seconds, cpu, sum(peaks.values()) if peaks else float("nan"), output)


def _watch(process: "subprocess.Popen[str]", peaks: dict[int, float]) -> None:
    while process.poll() is None:
        for pid in _family(process.pid):
            peak = peak_bytes(pid)
            if peak == peak:  # not one that has just gone
                peaks[pid] = max(peaks.get(pid, 0.0), peak)
        time.sleep(SAMPLE_SECONDS)


def _family(pid: int) -> list[int]:
    """A process and all its descendants."""
    try:
        texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return [pid]
    children = [int(child) for text in texts for child in text.split()]
    return [pid, *(member for child in children for member in _family(child))]
