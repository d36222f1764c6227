"""Generating logs: the same bytes however they were made, interrupted or not; nothing else is touched."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from recsim_gr import generation
from recsim_gr.cli import INTERRUPTED
from recsim_gr.errors import ConfigError, LogFormatError, RunDirectoryError, WorkerError
from recsim_gr.generation import Plan, generate
from recsim_gr.log import InteractionLog, ShardedLog
from recsim_gr.shards import shard_name
from recsim_gr.world import WorldConfig

SMALL = WorldConfig(n_titles=30, history_length=4, seed=3)


def plan_of(n_users: int = 50, users_per_shard: int = 12, world: WorldConfig = SMALL, **changes: Any) -> Plan:
    return Plan(world=world, n_users=n_users, users_per_shard=users_per_shard, **changes)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def opened(directory: Path, verify: bool = True) -> ShardedLog:
    log = InteractionLog.open(directory, verify=verify)
    assert isinstance(log, ShardedLog)
    return log


# -- the same bytes -------------------------------------------------------------------------------------------------


def test_bytes_do_not_depend_on_workers_or_order(tmp_path: Path) -> None:
    plan = plan_of(n_users=300, users_per_shard=60)
    generate(plan, tmp_path / "one")
    generate(plan, tmp_path / "two", workers=2)
    (tmp_path / "backward").mkdir()
    for index in reversed(range(plan.n_shards)):
        generation._Maker(plan, tmp_path / "backward").make(index, lambda users: None)
    generation._begin(plan, tmp_path / "backward", {})
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "backward").glob("*.parquet")}
    generate(plan, tmp_path / "backward")
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "backward")
    assert all((tmp_path / "backward" / name).stat().st_mtime_ns == at for name, at in before.items())
    assert set(content(tmp_path / "one")) == {"manifest.json", "catalogue.parquet", *map(shard_name, range(5))}


# a job in the background inherits a SIGINT that is ignored, and these tests may run in one
LISTENING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
LARGER = [sys.executable, "-c", f"{LISTENING}; from recsim_gr.cli import main; raise SystemExit(main())"]
LARGER += ["generate", "--users", "24000", "--titles", "500", "--users-per-shard", "400", "--out"]


def larger_plan() -> Plan:
    return plan_of(n_users=24_000, users_per_shard=400, world=WorldConfig(n_titles=500))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `LARGER` makes, made in this process."""
    out = tmp_path_factory.mktemp("uninterrupted") / "log"
    generate(larger_plan(), out)
    return out


def started(out: Path, finished: int) -> subprocess.Popen[str]:
    """`LARGER` in a process of its own, so far that some shards are finished, and surely not all."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([*LARGER, str(out)], stdout=pipe, stderr=pipe, text=True)
    wait_for(lambda: len(list(out.glob("shard-*.json"))) >= finished or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return process


def wait_for(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    return [
        int(child)
        for path in Path(f"/proc/{pid}/task").glob("*/children")
        for child in path.read_text().split()
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for worker processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_and_resumed_is_as_uninterrupted(how: signal.Signals, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "log"
    process = started(out, finished=3)
    workers = children(process.pid)
    assert len(workers) == 2
    process.send_signal(how)
    _, said = process.communicate(timeout=30)
    wait_for(lambda: not any(map(is_running, workers)))
    if how != signal.SIGKILL:
        assert process.returncode == INTERRUPTED
        assert said == "recsim-gr: interrupted; the same command goes on where it stopped\n"
        assert not list(out.glob(".*"))
    recorded = [path.with_suffix(".parquet") for path in out.glob("shard-*.json")]
    assert 3 <= len(recorded) < larger_plan().n_shards
    with pytest.raises(LogFormatError, match="unfinished"):
        InteractionLog.open(out)
    before = {path: path.stat().st_mtime_ns for path in recorded}
    generate(larger_plan(), out)
    assert {path: path.stat().st_mtime_ns for path in recorded} == before
    assert content(out) == content(uninterrupted)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for worker processes in /proc")
def test_a_dead_worker_is_named_and_replaced(uninterrupted: Path, tmp_path: Path) -> None:
    process = started(tmp_path / "log", finished=2)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert "the worker process that made shard-000" in said
    assert "died (killed by SIGKILL, out of memory?); shard-000" in said
    assert content(tmp_path / "log") == content(uninterrupted)


class Deadly(Plan):
    """Ends the process that it is sent to."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


def test_a_worker_that_dies_twice_ends_the_run(tmp_path: Path) -> None:
    out = tmp_path / "log"
    deadly = Deadly(world=SMALL, n_users=30, users_per_shard=10)
    with pytest.raises(WorkerError, match=r"made shard-0000[01].parquet died twice \(exit code 3\)"):
        generate(deadly, out, workers=2)
    assert set(content(out)) == {"unfinished.json"}


# -- what is kept, and what is refused --------------------------------------------------------------------------------


def test_a_whole_log_is_kept_as_it_is(made: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    said = StringIO()
    generate(plan_of(propensities=True), made, console=Console(file=said))
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before
    assert said.getvalue() == "5 of 5 shards are finished already and are kept.\n"


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_shard_is_made_again_and_no_other(damage: str, made: Path) -> None:
    before, whole = {p.name: p.stat().st_mtime_ns for p in made.iterdir()}, content(made)
    damaged = made / shard_name(2)
    damaged.unlink()
    if damage != "gone":
        damaged.write_bytes(flipped(whole[damaged.name]) if damage == "flipped" else whole[damaged.name][:100])
    generate(plan_of(propensities=True), made)
    assert content(made) == whole
    kept = {p.name for p in made.iterdir() if p.stat().st_mtime_ns == before[p.name]}
    assert kept == {shard_name(i) for i in (0, 1, 3, 4)}


def flipped(data: bytes) -> bytes:
    middle = len(data) // 3
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_users": 51}, "n_users: 50 there, 51 here"),
        ({"propensities": False}, "propensities: True there, False here"),
        ({"split": "judge"}, "split: 'train' there, 'judge' here"),
        ({"users_per_shard": 13}, "users_per_shard: 12 there, 13 here"),
        ({"world": WorldConfig(n_titles=31, history_length=4, seed=3)}, "n_titles: 30 there, 31 here"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_log_is_refused_and_untouched(changes: dict[str, Any], says: str, finished: bool, made: Path) -> None:
    plan = plan_of(propensities=True)
    if not finished:
        generation._begin(plan, made, generation._kept_shards(plan, made))
        assert not (made / "manifest.json").exists()
    before = content(made)
    settings = {"propensities": True, **changes}
    with pytest.raises(RunDirectoryError, match=says):
        generate(plan_of(**settings), made)
    assert content(made) == before


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunDirectoryError, match="not empty and holds no log in shards"):
        generate(plan_of(), tmp_path)
    with pytest.raises(RunDirectoryError, match="is a file"):
        generate(plan_of(), tmp_path / "thesis.tex")
    (tmp_path / "manifest.json").write_text('{"files": []}')
    with pytest.raises(RunDirectoryError, match=r"manifest.json is not of a log in shards"):
        generate(plan_of(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "manifest.json").read_text() == '{"files": []}'


def test_a_kill_at_the_very_start_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    (tmp_path / ".unfinished.json.k2x9.part").write_text("{")
    (tmp_path / ".shard-00000.parquet.abcd.part").write_bytes(b"PAR1")
    generate(plan_of(), tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with generation._held(tmp_path), pytest.raises(RunDirectoryError, match="another process makes a log"):
        generate(plan_of(), tmp_path)
    generate(plan_of(), tmp_path)


def test_plans_that_make_no_sense(tmp_path: Path) -> None:
    for changes in ({"n_users": 0}, {"n_users": 2 * 10**9}, {"users_per_shard": -1}, {"split": "holdout"}):
        with pytest.raises(ConfigError, match=f"Plan.{next(iter(changes))} must be"):
            plan_of(**changes)
    with pytest.raises(ConfigError, match="--workers must be at least 1, got 0"):
        generate(plan_of(), tmp_path / "log", workers=0)
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("n_users", "history_length", "shards"),
    [
        (1, 20, [1]),
        (512, 20, [512]),
        (700, 20, [512, 188]),
        (8_000, 20, [512] * 15 + [320]),
        (100_000, 20, [6_250] * 16),
        (1_000_000, 20, [32_768] * 30 + [16_960]),
        (10_000, 900, [625] * 16),
        (100_000, 900, [728] * 137 + [264]),
    ],
)
def test_sizes_of_shards(n_users: int, history_length: int, shards: list[int]) -> None:
    plan = Plan(world=WorldConfig(history_length=history_length), n_users=n_users)
    ranges = [plan.shard_range(index) for index in range(plan.n_shards)]
    assert [len(users) for users in ranges] == shards
    assert ranges[0].start == 0
    assert ranges[-1].stop == n_users
    assert plan.users_per_part * history_length <= generation.PART_EVENTS


# -- full disks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [0, 1, 4, 7])
@pytest.mark.parametrize("what", ["write_table", "fsync"])
def test_a_full_disk_leaves_nothing_that_looks_whole(
    what: str, call: int, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1_000))
    owner: Any = pq.ParquetWriter if what == "write_table" else os
    original = getattr(owner, what)

    def fails(*arguments: Any, **options: Any) -> Any:
        if sys._getframe(1).f_code.co_name != "part_bytes" and next(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **options)

    plan = plan_of(propensities=True)
    generate(plan, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(owner, what, fails)
        with pytest.raises(RunDirectoryError, match="No space left on device"):
            generate(plan, tmp_path / "log")
    assert not list((tmp_path / "log").glob(".*"))
    assert not (tmp_path / "log" / "manifest.json").exists()
    whole = content(tmp_path / "whole")
    assert all(whole[name] == data for name, data in content(tmp_path / "log").items() if name.endswith(".parquet"))
    generate(plan, tmp_path / "log")
    assert content(tmp_path / "log") == whole


def test_a_disk_that_is_too_small_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 900, 900))
    with pytest.raises(RunDirectoryError, match=r"needs about .* MB and its disk has 0.0 MB free"):
        generate(plan_of(n_users=5_000), tmp_path / "log")
    assert not list((tmp_path / "log").iterdir())


# -- time, size and memory --------------------------------------------------------------------------------------------


def resident(pid: int) -> int:
    """Mebibytes of a process and its workers, pages that they share counted for each."""
    total = 0
    for process in [pid, *children(pid)]:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return total // 1024


@pytest.mark.benchmark
@pytest.mark.parametrize("propensities", [False, True])
def test_a_million_users(propensities: bool, tmp_path: Path) -> None:
    import resource

    command = [sys.executable, "-m", "recsim_gr", "generate", "--users", "1000000", "--titles", "1000"]
    command += ["--out", str(tmp_path / "log"), *(["--propensities"] if propensities else [])]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        try:
            peak = max(peak, resident(process.pid))
        except OSError:  # a process ended between two looks
            continue
        time.sleep(0.1)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = sum(path.stat().st_size for path in (tmp_path / "log").iterdir())
    begin = time.process_time()
    events = sum(len(part) for part in opened(tmp_path / "log"))
    reading = time.process_time() - begin
    print(
        f"\n1,000,000 users, propensities {propensities}: {wall:.1f} s, {cpu:.1f} s of CPU, peak {peak} MiB, "
        f"{size / 1e6:.0f} MB = {size / events:.2f} bytes an event; read and checked in {reading:.1f} s of CPU"
    )
    assert events == 20_000_000
    assert size <= 400e6
    assert peak <= 1_536
    assert cpu <= 80  # 40 s on two cores
