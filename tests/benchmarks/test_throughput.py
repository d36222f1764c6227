"""Suite throughput: its machinery, and that its floors do the work of their jobs. Nothing fails for being slow."""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from rich.console import Console
from scipy import stats

import recsim_gr  # noqa: F401  (registers the environments)
from recsim_gr import configs
from recsim_gr.benchmarks import floors, peers, stopwatch, throughput, throughput_jobs
from recsim_gr.benchmarks.runner import run
from recsim_gr.benchmarks.throughput import Throughput, number, peer_table, table
from recsim_gr.benchmarks.throughput_chart import bars, chart
from recsim_gr.benchmarks.throughput_jobs import FLOOR, OURS, Figure, ThroughputConfig, jobs_of
from recsim_gr.errors import ConfigError, RunDirectoryError
from recsim_gr.world import World, WorldConfig

SMOKE: ThroughputConfig = Throughput.preset("smoke")
SMALLEST_P = 1e-4


def quiet() -> Console:
    return Console(file=StringIO())


# -- floors ------------------------------------------------------------------------------------------------------


def world(n_titles: int) -> World:
    return World(WorldConfig(n_titles=n_titles, history_length=3, seed=5))


def same_user(world: World, times: int) -> tuple[np.ndarray, floors.Taste]:
    """A user with strong and weak likings, as many times as one wants."""
    users = world.users("train", 1)
    return users, floors.Taste(*(np.repeat(part, times, axis=0) for part in floors.users_of(world, users)))


@pytest.fixture(params=["race", "block"])
def logged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[World, np.ndarray, floors.Columns]:
    """World, user and columns of many histories of that user, by either floor; the block floor has blocks to pad."""
    titles, times = (30, 20_000) if request.param == "race" else (600, 6_000)
    monkeypatch.setattr(floors, "RACE_CHUNK", times)
    monkeypatch.setattr(floors, "BLOCK_CHUNK", times)
    there = world(titles)
    user, taste = same_user(there, times)
    return there, user, (floors.race_log if request.param == "race" else floors.block_log)(there, taste, seed=1)


def test_first_choices_of_a_floor_follow_the_logging_policy(
    logged: tuple[World, np.ndarray, floors.Columns],
) -> None:
    there, user, columns = logged
    expected = np.exp(there.logging_log_probs(user, np.empty((1, 0), dtype=np.int64)))[0] * len(columns["title"])
    counts = np.bincount(columns["title"][:, 0], minlength=there.n_titles)
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    assert common.sum() > 10
    p = stats.chisquare(observed, np.append(expected[common], expected[~common].sum())).pvalue
    assert p > SMALLEST_P


def test_floors_histories_have_no_repeats_and_the_right_propensities(
    logged: tuple[World, np.ndarray, floors.Columns],
) -> None:
    there, user, columns = logged
    titles, propensities = columns["title"][:300], columns["propensity"][:300]
    assert all(len(set(row)) == 3 for row in titles.tolist())
    users = np.repeat(user, len(titles))
    for step in range(3):
        log_probs = there.logging_log_probs(users, titles[:, :step])
        exact = np.exp(np.take_along_axis(log_probs, titles[:, [step]], axis=1))[:, 0]
        np.testing.assert_allclose(propensities[:, step], exact, rtol=1e-3)


def test_floors_scores_have_the_worlds_mean(logged: tuple[World, np.ndarray, floors.Columns]) -> None:
    there, user, columns = logged
    expected = there.expected_score_watched(user)[0, columns["title"]]
    difference = columns["score"] - expected
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(difference.size)
    assert columns["score"].min() >= 1
    assert columns["score"].max() <= 5
    assert (columns["watch_minutes"] <= columns["duration_minutes"] * (1 + 1e-6)).all()
    assert (np.diff(columns["hours"], axis=1) >= 0).all()


def test_vector_floor_says_what_the_environment_says() -> None:
    there, n = World(WorldConfig(n_titles=60, seed=2)), 60
    step = floors.vector_steps(there, n_envs=n, pool_users=1, seed=0)
    worth, observations = step(np.arange(n))
    user = there.users("train", 1)
    contexts = there.contexts_of(user).observations
    np.testing.assert_allclose(worth["satisfaction"], there.satisfaction(user)[0], rtol=1e-4)
    propensity = np.exp(there.logging_log_probs(user, contexts.titles))[0]
    unseen = propensity > 0  # the floor does not ask whether a title was seen
    np.testing.assert_allclose(worth["propensity"][unseen], propensity[unseen], rtol=1e-3)
    envs = gymnasium.make_vec(throughput_jobs.ENVIRONMENT, num_envs=n, world=there, pool_users=1)
    expected, _ = envs.reset(seed=0)
    assert expected.keys() == observations.keys()
    for name, values in expected.items():
        assert observations[name].dtype == values.dtype
        np.testing.assert_array_equal(observations[name], values)


def test_single_floor_is_behind_the_same_wrappers() -> None:
    env = gymnasium.make(throughput_jobs.ENVIRONMENT, n_titles=60, pool_users=4)
    nothing = floors.nothing_like(env)

    def kinds(env: Any) -> list[type]:
        return [type(env), *(kinds(env.env) if isinstance(env, gymnasium.Wrapper) else [])]

    assert kinds(nothing)[:-1] == kinds(env)[:-1]
    observation, info = nothing.reset()
    assert env.observation_space.contains(observation)
    assert info.keys() == env.reset()[1].keys()
    assert nothing.step(3)[4].keys() == env.step(3)[4].keys()


# -- measuring ---------------------------------------------------------------------------------------------------


def test_works_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    monkeypatch.setattr(time, "process_time", lambda: clock[0])

    def work(name: str, seconds: float) -> None:
        order.append(name)
        clock[0] += seconds

    works = {name: functools.partial(work, name, seconds) for name, seconds in (("a", 0.5), ("b", 2.0))}
    timings = stopwatch.side_by_side(works, repeats=3, seconds=1.0)
    assert order == ["a"] * 2 + ["b"] * 2 + ["a", "a", "b"] * 3
    assert (timings["a"].best, timings["b"].median) == (0.5, 2.0)


def test_processes_work_at_the_same_time() -> None:
    wall, cpu = stopwatch.at_the_same_time(
        functools.partial, [(time.sleep, 0.3), (time.sleep, 0.1)], repeats=2, seconds=0.0
    )
    assert wall.best >= 0.3
    assert cpu.best < 0.3


def test_measured_processes_have_one_thread_and_not_the_runners_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    before = dict(os.environ)
    with stopwatch._plain_environment():
        assert "MALLOC_TOP_PAD_" not in os.environ
        assert os.environ["OMP_NUM_THREADS"] == "1"
        assert stopwatch.plain_environment() == dict(os.environ)
    assert dict(os.environ) == before


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say")

GRANDCHILD = "import time; x = b'x' * {}; time.sleep(0.5)"
CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}]); print('made')"


@needs_proc
def test_memory_of_a_commands_grandchildren_counts() -> None:
    took = stopwatch.run_command([sys.executable, "-c", CHILD.format(GRANDCHILD.format(200_000_000))])
    assert 200e6 < took.peak_bytes < 300e6
    assert took.seconds >= 0.5
    assert took.output.strip() == "made"


PARENT = """
import os, sys, threading, time
from recsim_gr.benchmarks.stopwatch import run_command
said = sys.argv[1]
def die():
    while not os.path.exists(said):
        time.sleep(0.02)
    os._exit(1)
threading.Thread(target=die).start()
run_command([sys.executable, "-c", sys.argv[2], said])
"""
SLEEPER = """
import os, sys, time
open(sys.argv[1] + ".part", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(60)
"""


@needs_proc
def test_a_command_ends_with_its_parent(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    subprocess.run([sys.executable, "-c", PARENT, str(pid_file), SLEEPER], check=False, timeout=60)
    pid, deadline = pid_file.read_text(), time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: str) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_command_that_fails_says_so() -> None:
    with pytest.raises(RuntimeError, match="ended with 3: no room"):
        stopwatch.run_command([sys.executable, "-c", "print('no room'); raise SystemExit(3)"])


@needs_proc
def test_peak_outlives_what_was_held() -> None:
    before = stopwatch.peak_bytes()
    kept = np.ones(int(before - stopwatch.held_bytes()) // 8 + 4_000_000)
    del kept
    assert stopwatch.peak_bytes() - before > 31e6
    assert stopwatch.held_bytes() < stopwatch.peak_bytes()
    assert np.isnan(stopwatch.held_bytes("nobody"))


# -- peers -------------------------------------------------------------------------------------------------------


def test_a_peer_that_is_not_there_is_said_and_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(peers.INTERPRETERS, "/nowhere/bin/python")
    answer = peers.measured_somewhere("recsim", 1_000, 0.1)
    assert set(answer) == {"missing"}


def test_a_peer_of_another_interpreter_is_measured_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "python"
    answer = {"per_second": 7.0, "version": "x 1"}
    other.write_text(f"#!{sys.executable}\nprint('noise')\nprint({json.dumps(answer)!r})\n")
    other.chmod(0o755)
    monkeypatch.setenv(peers.INTERPRETERS, f"/nowhere/bin/python{os.pathsep}{other}")
    assert peers.measured_somewhere("recsim", 1_000, 0.1) == answer


def test_rate_of_a_peer_is_work_over_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: clock[0])

    def work() -> int:
        clock[0] += 0.25
        return 10

    assert peers.per_second(work, seconds=5.0) == pytest.approx(40.0)


# -- jobs and suite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", ["machine", "vector", "single", "log-40", "import", "memory", "pool"])
def test_a_job_gives_finite_figures(job: str) -> None:
    work, arguments = jobs_of(SMOKE)[job]
    figures = work(SMOKE, *arguments)
    assert len({(figure.who, figure.metric) for figure in figures}) == len(figures) > 0
    assert all(isinstance(figure.value, (int, float)) for figure in figures)
    rates = [figure for figure in figures if "per_second" in figure.metric]
    assert all(figure.value > 0 for figure in rates)
    assert {figure.who for figure in rates} in (set(), {OURS, FLOOR})


def test_generating_to_parquet_is_measured_and_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    work, arguments = jobs_of(SMOKE)["generate"]
    values = {figure.metric.removeprefix("generate."): figure.value for figure in work(SMOKE, *arguments)}
    assert values["seconds_per_million"] == pytest.approx(values["seconds"] * 1e6 / SMOKE.n_users)
    bytes_an_event = values["disk_megabytes_per_million"] / 20
    assert 4 < bytes_an_event < 40  # title, hours, watch minutes at least; more where files are as small as here
    assert values["peak_mebibytes"] > 50
    assert list(tmp_path.iterdir()) == []


def test_importing_the_package_loads_no_torch() -> None:
    assert throughput_jobs._import_once("recsim_gr")[3] == 0.0
    assert throughput_jobs._import_once("sys; sys.modules['torch'] = sys")[3] == 1.0  # it would be noticed


def test_a_run_measures_one_cell_at_a_time_and_ends_in_table_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = Throughput(replace(SMOKE, jobs=("vector",)))
    asked: list[int] = []
    from recsim_gr.benchmarks import runner

    pool = runner._one_pool

    def noted(*arguments: Any) -> Any:
        asked.append(arguments[3])
        return pool(*arguments)

    monkeypatch.setattr(runner, "_one_pool", noted)
    outcome = run(suite, tmp_path / "out", workers=2, console=quiet())
    assert outcome.failures == []
    assert asked == [1]
    assert outcome.report is not None
    text = outcome.report.read_text()
    assert "vector environment, 64 at once, 60 titles" in text
    assert "these verdicts mean nothing" in text
    for name in ("throughput.svg", "throughput.png"):
        assert (tmp_path / "out" / "figures" / name).stat().st_size > 1_000
    assert Throughput(None).report(tmp_path / "out")[1] == outcome.lines


FIGURES = [
    Figure(OURS, "vector.per_second", 6e6),
    Figure(OURS, "vector.per_second_median", 5.5e6),
    Figure(FLOOR, "vector.per_second", 2e7),
    Figure(OURS, "single.per_second", 3.9e4),
    Figure(FLOOR, "single.per_second", 1e6),
    Figure(OURS, "log_1000.per_second", 7.9e5),
    Figure(FLOOR, "log_1000.per_second", 1e6),
    Figure(OURS, "large_2.per_second", 1e5),
    Figure(OURS, "import.extra_seconds", 0.02),
    Figure(OURS, "import.loads_torch", 1.0),
    Figure(OURS, "memory.beyond_megabytes", 801.0),
    Figure(OURS, "memory.dense_megabytes", 800.0),
    Figure("SARDINE", "log.per_second", 12_345.0, "sardine-rec 1.0.8"),
    Figure("RecSim", "environment.per_second", float("nan"), "not installed (No module named 'recsim')"),
]


@pytest.fixture
def found() -> throughput.Found:
    return {(figure.who, figure.metric): (figure.value, figure.software) for figure in FIGURES}


def test_table_compares_with_targets_and_floors(found: throughput.Found) -> None:
    lines = table(found, ThroughputConfig())

    def line(start: str) -> str:
        return next(line for line in lines if line.startswith(start))

    assert line("vector").split()[-3:] == ["M", "0.3", "pass"]
    assert line("single").endswith("SHORT")
    assert line("log, 1,000").endswith("0.79        SHORT")
    assert line("log, 100,000 titles, two").endswith("pass")
    assert line("import").endswith("pass")
    assert line("  torch").endswith("SHORT")
    assert line("generate_log").endswith("SHORT")
    assert line("a million").endswith("not measured")


def test_a_table_of_some_jobs_has_their_lines_alone(found: throughput.Found) -> None:
    lines = table(found, ThroughputConfig(jobs=("log-1000", "large", "import")))
    starts = [line.split("  ")[0] for line in lines[2:] if not line.startswith(" ")]
    assert starts == [
        "log, 1,000 titles",
        "log, 100,000 titles, one process",
        "log, 100,000 titles, two processes, by the wall clock",
        "import recsim_gr, beyond import gymnasium",
    ]


def test_a_smaller_log_is_not_judged_by_the_seconds_of_a_million(found: throughput.Found) -> None:
    found[OURS, "generate.seconds_per_million"] = (50.0, "")
    for users, verdict in ((100_000, "see preset full"), (1_000_000, "SHORT")):
        config = ThroughputConfig(n_users=users)
        assert next(line for line in table(found, config) if line.startswith("a million")).endswith(verdict)


def test_peers_are_measured_or_reported_with_their_reason(found: throughput.Found) -> None:
    lines = peer_table(found)
    sardine = next(line for line in lines if line.startswith("SARDINE") and " log " in line)
    assert "12.3 k" in sardine
    assert "sardine-rec 1.0.8" in sardine
    recsim = next(line for line in lines if line.startswith("RecSim  "))
    assert "not installed" in recsim
    assert "240-2.8 k" in recsim


def test_picture_has_a_bar_for_every_figure_and_every_peer(found: throughput.Found) -> None:
    rows = bars(found, ThroughputConfig())
    assert {row["label"] for row in rows if row["kind"] == "recsim_gr"} >= {"single, gym.make: ours"}
    kinds = {(row["label"], row["panel"]): row["kind"] for row in rows}
    assert kinds["SARDINE", "log"] == "peer, measured here"
    assert kinds["SARDINE", "environment"] == "peer, reported"
    assert len(rows) == 7 + len(peers.PEERS)
    assert chart(rows).to_dict()["vconcat"][0]["title"] == "Environment steps a second (black: target)"


@pytest.mark.parametrize(
    ("value", "text"), [(5.2e6, "5.2 M"), (56_000, "56 k"), (0.8123, "0.812"), (float("nan"), "-"), (None, "-")]
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text


def test_senseless_configs_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"jobs must be among machine, vector, .*log-1000.*peers, got \('vectro',\)"):
        ThroughputConfig(jobs=("vectro",))
    with pytest.raises(ConfigError, match="repeats must be at least 1, got 0"):
        ThroughputConfig(repeats=0)
    with pytest.raises(ConfigError, match="n_titles must be at least 22"):
        ThroughputConfig(n_titles=20)
    with pytest.raises(ConfigError, match="seconds must be positive"):
        ThroughputConfig(seconds=0.0)


def test_a_directory_of_something_else_has_no_report(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"suite": "landscape"}))
    with pytest.raises(RunDirectoryError, match=r"results\.parquet"):
        Throughput(None).report(tmp_path)


def test_a_config_survives_its_run_directory() -> None:
    values = {**configs.to_dict(SMOKE)}
    assert configs.from_dict(ThroughputConfig, json.loads(json.dumps(values))) == SMOKE
