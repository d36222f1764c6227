"""The runner on the landscape's smoke preset: same table whatever the workers, resuming, refusals, failures."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from recsim_gr.agents import AGENTS, BC, agent_type
from recsim_gr.benchmarks import SUITES, Landscape
from recsim_gr.benchmarks.runner import RunDirectory, _conclude, _keep, dry_run, duration, run
from recsim_gr.benchmarks.suite import Cell, suite_type
from recsim_gr.cli import INTERRUPTED
from recsim_gr.errors import ConfigError, RunDirectoryError, TrainingError, UnknownNameError

# Few agents, but one of each kind of randomness: batches, the ensemble, drawn pairs, stable-baselines3's globals.
FEW = ("Random", "BC", "ASFT", "RSDPO", "PPO", "Oracle")


class Unreported(Landscape):
    """The landscape without its pictures, which have their own tests and take most of the time."""

    def report(self, run_dir: Path) -> tuple[Path, list[str]]:
        return run_dir / "report.html", []


def smoke(**changes: Any) -> Unreported:
    return Unreported(replace(Landscape.preset("smoke"), **{"agents": FEW, **changes}))


def quiet() -> Console:
    return Console(file=StringIO())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two workers."""
    out = tmp_path_factory.mktemp("runs") / "two"
    outcome = run(smoke(), out, workers=2, console=quiet())
    assert outcome.failures == []
    return out


def table(out: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(out / "results.parquet").to_pylist()
    return [{k: repr(v) for k, v in row.items()} for row in rows]  # repr: NaN equals NaN, and every bit counts


def test_one_worker_gives_the_table_of_two(finished: Path, tmp_path: Path) -> None:
    run(smoke(), tmp_path / "one", workers=1, console=quiet())
    assert table(tmp_path / "one") == table(finished)


def test_table_holds_every_agent_in_every_cell(finished: Path) -> None:
    rows = pq.read_table(finished / "results.parquet").to_pylist()
    found = {(r["agent"], r["reward_noise"], r["seed"]) for r in rows if r["metric"] == "value_top10"}
    assert found == {(agent, noise, 0) for agent in FEW for noise in (0.0, 1.0)}
    assert {r["env"] for r in rows} == {"recsim_gr/WatchTime-v0"}
    assert all(len({r["config_id"] for r in rows if r["agent"] == agent}) == 1 for agent in ("", *FEW))


def test_noise_alone_leaves_users_and_titles_shared(finished: Path) -> None:
    rows = pq.read_table(finished / "results.parquet").to_pylist()
    oracle = {r["value"] for r in rows if (r["agent"], r["metric"]) == ("Oracle", "value_top10")}
    logging = {r["value"] for r in rows if (r["agent"], r["metric"]) == ("", "nll_logging")}
    assert len(oracle) == len(logging) == 1


def test_finished_cells_are_kept(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in (finished / "cells").iterdir()}
    monkeypatch.setattr("recsim_gr.benchmarks.runner._run_cells", lambda *_: pytest.fail("a cell was run again"))
    outcome = run(smoke(), finished, workers=2, console=quiet())
    assert len(outcome.finished) == 2
    assert {p.name: p.stat().st_mtime_ns for p in (finished / "cells").iterdir()} == before


def test_a_truncated_or_failed_cell_is_run_again(finished: Path, tmp_path: Path) -> None:
    suite = smoke()
    directory = RunDirectory(finished, suite.identity())
    first, second = suite.cells()
    kept = directory.cell_file(first).read_text()
    try:
        directory.cell_file(first).write_text(kept[: len(kept) // 2])
        assert directory.finished([first, second]) == [second]
        whole = json.loads(kept)
        damages: tuple[Any, ...] = (
            {**whole, "failed": {"BC": "why"}},
            {**whole, "rows": None},
            {**whole, "rows": [{**whole["rows"][0], "value": "abc"}]},
            {key: value for key, value in whole.items() if key != "seconds"},
            {**whole, "settings": {}},
            [],
            None,
            "x",
        )
        for damaged in damages:
            directory.cell_file(first).write_text(json.dumps(damaged))
            assert directory.finished([first, second]) == [second]
    finally:
        directory.cell_file(first).write_text(kept)


def test_another_configuration_is_refused_and_nothing_changes(finished: Path) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    with pytest.raises(RunDirectoryError, match=r"another configuration \(n_titles: 40 there, 50 here\)"):
        run(smoke(n_titles=50), finished, workers=1, console=quiet())
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunDirectoryError, match="not empty and holds no run"):
        run(smoke(), tmp_path, workers=1, console=quiet())
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="is a file"):
        run(smoke(), tmp_path / "file", workers=1, console=quiet())
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_no_workers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--workers must be at least 1, got 0"):
        run(smoke(), tmp_path / "out", workers=0, console=quiet())
    with pytest.raises(ConfigError, match="--workers must be at least 1, got -3"):
        dry_run(smoke(), tmp_path / "out", workers=-3, show=lambda line: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [TrainingError("BC diverged: loss nan at step 3"), KeyError("x"), SystemExit(0)])
def test_a_failing_agent_costs_no_other_its_results(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverges(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(BC, "fit", diverges)
    suite = smoke(agents=("Random", "BC", "Popularity", "Oracle"))
    result = suite.run_cell(suite.cells()[0], lambda share, doing: None)
    assert result.failed == {"BC": f"{type(error).__name__}: {error}"}
    assert {row["agent"] for row in result.rows} == {"", "Random", "Popularity", "Oracle"}


def test_a_crashed_cell_is_reported_and_the_rest_concluded(tmp_path: Path, finished: Path) -> None:
    suite = smoke()
    first, second = suite.cells()
    directory = RunDirectory(tmp_path / "out", suite.identity())
    directory.open()
    crashed: Future[dict[str, Any]] = Future()
    crashed.set_exception(MemoryError("no room"))
    reason, kept = _keep(crashed, first, directory)
    assert (reason, kept) == ("MemoryError: no room", False)
    left: Future[dict[str, Any]] = Future()
    left.set_exception(SystemExit(0))  # an agent that calls sys.exit ends its cell, not the run
    assert _keep(left, first, directory) == ("SystemExit: 0", False)
    source = RunDirectory(finished, suite.identity()).cell_file(second)
    directory.cell_file(second).parent.mkdir()
    directory.cell_file(second).write_text(source.read_text())
    outcome = _conclude(suite, [first, second], directory, {first.name: "MemoryError: no room"})
    assert outcome.failures == [{"cell": first.name, "reason": "MemoryError: no room"}]
    assert outcome.finished == [second.name]
    assert {r["reward_noise"] for r in pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()} == {1.0}


def test_a_full_disk_stops_the_run_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = smoke()
    cell = suite.cells()[0]
    directory = RunDirectory(tmp_path / "out", suite.identity())
    directory.open()
    result: Future[dict[str, Any]] = Future()
    result.set_result({"settings": cell.settings, "failed": {}, "rows": []})

    def full(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        _keep(result, cell, directory)
    assert list((tmp_path / "out" / "cells").iterdir()) == []


def test_dry_run_names_cells_and_time_and_writes_nothing(tmp_path: Path) -> None:
    lines: list[str] = []
    dry_run(smoke(), tmp_path / "out", workers=2, show=lines.append)
    assert lines[:2] == ["noise-0-seed-0", "noise-1-seed-0"]
    assert lines[2].startswith("2 of 2 cells to run, about ")
    assert not (tmp_path / "out").exists()


def test_dry_run_uses_the_times_of_finished_cells(finished: Path) -> None:
    lines: list[str] = []
    dry_run(smoke(), finished, workers=1, show=lines.append)
    assert lines[0].endswith("(finished, kept)")
    assert "0 of 2 cells to run" in lines[-1]
    assert "the mean of the finished ones" in lines[-1]


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_has_a_quick_and_a_smoke_preset_with_distinct_cells(name: str) -> None:
    for preset in ("quick", "smoke"):
        cells: list[Cell] = suite_type(name)(suite_type(name).preset(preset)).cells()
        assert len({cell.name for cell in cells}) == len(cells) > 0


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="no suite 'landscap'; there are"):
        suite_type("landscap")
    with pytest.raises(UnknownNameError, match="no preset 'quik'; it has quick, smoke"):
        Landscape.preset("quik")
    with pytest.raises(UnknownNameError, match=r"no agent 'A-SFT'; there are .*ASFT"):
        agent_type("A-SFT")


def test_an_agent_without_a_name_or_that_cannot_be_made_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nameless(BC):
        name = " "

    class Broken(BC):
        name = "Broken"

        def __init__(self, *arguments: Any, **options: Any) -> None:
            raise ValueError("no such thing")

    monkeypatch.setattr("recsim_gr.agents.base.AGENTS", {**AGENTS, " ": Nameless, "Broken": Broken})
    with pytest.raises(ConfigError, match="whose name is not empty"):  # its rows would be the world's
        smoke(agents=("BC", "Oracle", " "))
    broken = smoke(agents=("BC", "Oracle", "Broken"))
    with pytest.raises(ConfigError, match=r"agent Broken cannot be made .ValueError: no such thing."):
        broken.config.new_agents()


def test_a_path_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"cannot be used .*give --out another"):
        run(smoke(), tmp_path / ("x" * 300), workers=1, console=quiet())


def test_close_noise_levels_have_files_of_their_own() -> None:
    suite = smoke(noise_levels=(0.1234567, 0.12345671, 0.15))
    assert [c.name for c in suite.cells()] == [f"noise-{x}-seed-0" for x in ("0.1234567", "0.12345671", "0.15")]


def test_a_run_directory_says_what_was_run(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["agent_configs"]["ASFT"]["beta"] == 0.5
    assert config["version"]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_stopping_a_run_leaves_no_process_and_no_traceback(stop: signal.Signals, tmp_path: Path) -> None:
    # a job in the background inherits a SIGINT that is ignored, and these tests may run in one
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    arguments = ["run", "landscape", "--preset", "smoke", "--out", str(tmp_path / "o")]
    program = f"{listening}; from recsim_gr.cli import main; raise SystemExit(main({arguments!r}))"
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "o" / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)  # the workers are being started
    os.killpg(process.pid, stop) if stop == signal.SIGINT else process.send_signal(stop)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert b"goes on where it stopped" in output
    assert b"Traceback" not in output
    for _ in range(100):  # the processes of the session, once the parent has gone
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process of the run is still there")


def test_durations_read_well() -> None:
    assert [duration(s) for s in (40.4, 120, 7200)] == ["40 s", "2 min", "2.0 h"]
