"""The jobs of suite ``throughput``: what is done, beside which floor, and the figures that it gives.

A job is a function from the suite's config to figures. It runs in a new process with one thread; what it times comes in
turns with its floor.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np

import recsim_gr
from recsim_gr.behaviour import SPLITS
from recsim_gr.benchmarks import floors
from recsim_gr.benchmarks.peers import PEERS, measured_somewhere
from recsim_gr.benchmarks.stopwatch import (
    MEBIBYTE,
    Timing,
    at_the_same_time,
    held_bytes,
    peak_bytes,
    plain_environment,
    run_command,
    side_by_side,
)
from recsim_gr.configs import require, require_finite_numbers
from recsim_gr.errors import ConfigError
from recsim_gr.log import COLUMNS
from recsim_gr.world import World, WorldConfig

OURS, FLOOR, MACHINE = "recsim_gr", "floor", "machine"
"""Who was measured; a peer goes by its own name."""

RATE_TARGETS = {"vector": 5e6, "single": 40e3, "large_2": 100e3}
"""Units a second that a job should reach at the sizes of preset ``quick``."""
RATIO_TARGETS = {"log_1000": 0.8}
"""Shares of its floor."""

DEVICES = ("cpu", "cuda")

MEGABYTE = 10**6
ENVIRONMENT = "recsim_gr/WatchTime-v0"
STEPS_AHEAD = 64
"""Arrays of actions drawn beforehand, which come round."""
POOL_CHECK_ENVS = 4_096
"""Environments side by side when the memory of their pool is measured."""
POOL_PASSES = 12
"""Times the pool's size in users that are drawn, so that every block of it has come."""


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """Sizes and repeats; the defaults are preset ``quick``."""

    preset: str = "quick"
    """Which preset this config started from."""
    jobs: tuple[str, ...] = ()
    """Which jobs are done; all, if none is named."""
    repeats: int = 7
    """Of every timing, in turns with its floor; the fastest counts, the median is shown."""
    seconds: float = 0.4
    """CPU time that a repeat takes at least, or one call where that takes longer: thousands of clock ticks."""
    num_envs: int = 4_096
    """Environments of the vector environment."""
    pool_users: int = 4_096
    """Prepared users that environments draw from: the environments' own default."""
    n_titles: int = 1_000
    """Of the environments, of the generated log and of the peers."""
    log_titles: tuple[int, ...] = (100, 200, 1_000)
    """Catalogues of the jobs that make logs."""
    log_users: int = 8_192
    """Users of a call that makes a log: four chunks."""
    large_titles: int = 100_000
    large_users: int = 256
    """The large catalogue, and the users of a call that makes a log there (a worker)."""
    n_users: int = 100_000
    """Of the log that is generated to Parquet. The target is set for a million: preset ``full``."""
    memory_users: int = 200_000
    """Of the log whose memory is measured: the array that must not be there would hold 200 million numbers."""
    pool_memory_users: int = 65_536
    """Of the pool whose memory is measured."""
    import_repeats: int = 11
    """Interpreters that import each of the two."""
    peer_seconds: float = 5.0
    """CPU time of each peer's measurement."""
    training_users: int = 128
    training_events: int = 50
    training_dimensions: int = 64
    """Batch, history and width of the training that is timed; two layers, two heads, ``n_titles`` titles."""
    training_titles: int = 20_000
    """The catalogue with which the memory of a training step is measured."""
    training_steps: int = 300
    """Of the loss curves that are compared."""
    training_peak: int = 2_048
    """Of the square matrices whose product is the machine's peak: larger ones are no faster here."""
    compile: bool = False
    """Whether training is also timed under `torch.compile`, which takes a minute or more to compile."""
    device: str = "cpu"
    """Where training is timed: cpu, or cuda."""
    seed: int = 0
    """Of worlds, actions and floors."""

    def __post_init__(self) -> None:
        require_finite_numbers(self)
        known = list(_all_jobs(self))
        require(set(self.jobs) <= set(known), self, "jobs", f"among {', '.join(known)}")
        for name in ("repeats", "num_envs", "pool_users", "log_users", "large_users", "n_users", "memory_users"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("pool_memory_users", "import_repeats"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("n_titles", "large_titles"):
            least = WorldConfig().history_length + 2
            require(getattr(self, name) >= least, self, name, f"at least {least}, more than a history")
        require(bool(self.log_titles) and min(self.log_titles) > 21, self, "log_titles", "catalogues of at least 22")
        for name in ("seconds", "peer_seconds"):
            require(getattr(self, name) > 0, self, name, "positive")
        for name in ("training_users", "training_events", "training_steps", "training_peak"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        require(self.training_dimensions >= 2, self, "training_dimensions", "2 or more")
        require(self.training_dimensions % 2 == 0, self, "training_dimensions", "even, for two heads")
        for name in ("n_titles", "training_titles"):
            least = self.training_events + 2
            require(getattr(self, name) >= least, self, name, f"at least {least}, more than training_events")
        require(self.device in DEVICES, self, "device", f"one of {', '.join(DEVICES)}")


class Figure(NamedTuple):
    """A number that a job found.

    Attributes:
        who: `OURS`, `FLOOR`, `MACHINE` or a peer.
        metric: job and what of it, as ``vector.per_second``.
        value: NaN where it could not be measured.
        software: what ran, with its version; where nothing ran, why.
    """

    who: str
    metric: str
    value: float
    software: str = f"recsim_gr {recsim_gr.__version__}"


def rates(job: str, amount: float, who: str, timing: Timing) -> Iterator[Figure]:
    """Units a second: of the fastest repeat, and the median."""
    software = {"software": f"numpy {np.__version__}"} if who == FLOOR else {}
    yield Figure(who, f"{job}.per_second", amount / timing.best, **software)
    yield Figure(who, f"{job}.per_second_median", amount / timing.median, **software)


def world_of(config: ThroughputConfig, n_titles: int) -> World:
    """The default world, over so many titles."""
    return World(WorldConfig(n_titles=n_titles, seed=config.seed))


def drawn_actions(config: ThroughputConfig, size: int) -> list[np.ndarray]:
    """Arrays of titles drawn beforehand."""
    rng = np.random.Generator(np.random.SFC64(config.seed))
    return [rng.integers(config.n_titles, size=size) for _ in range(STEPS_AHEAD)]


# -- environments ------------------------------------------------------------------------------------------------


def vector(config: ThroughputConfig) -> list[Figure]:
    """Steps of the vector environment: every step ends an episode and returns the next observations."""
    world, actions = world_of(config, config.n_titles), cycle(drawn_actions(config, config.num_envs))
    envs = gymnasium.make_vec(ENVIRONMENT, num_envs=config.num_envs, world=world, pool_users=config.pool_users)
    _complete_pool(envs, config.num_envs, config.pool_users, next(actions))
    floor = floors.vector_steps(world, config.num_envs, config.pool_users, config.seed)
    works: dict[str, Callable[[], object]] = {
        OURS: lambda: envs.step(next(actions)),
        FLOOR: lambda: floor(next(actions)),
    }
    timings = side_by_side(works, config.repeats, config.seconds)
    return [f for who, timing in timings.items() for f in rates("vector", config.num_envs, who, timing)]


def _complete_pool(envs: Any, num_envs: int, pool_users: int, actions: np.ndarray) -> None:
    """Steps until every user of the pool has been prepared, all but surely."""
    envs.reset(seed=0)
    for _ in range(-(-POOL_PASSES * pool_users // num_envs)):
        envs.step(actions)


def single(config: ThroughputConfig) -> list[Figure]:
    """Pairs of a step and the reset after it, through `gymnasium.make` with its default wrappers."""
    world, pairs = world_of(config, config.n_titles), 500
    actions = drawn_actions(config, pairs)[0]
    env = gymnasium.make(ENVIRONMENT, world=world, pool_users=config.pool_users)
    nothing = floors.nothing_like(env)

    def played(env: gymnasium.Env[Any, Any]) -> Callable[[], None]:
        env.reset(seed=0)

        def play() -> None:
            for action in actions:
                env.step(action)
                env.reset()

        return play

    works: dict[str, Callable[[], object]] = {OURS: played(env), FLOOR: played(nothing)}
    for _ in range(-(-POOL_PASSES * config.pool_users // pairs)):
        works[OURS]()
    timings = side_by_side(works, config.repeats, config.seconds)
    return [f for who, timing in timings.items() for f in rates("single", pairs, who, timing)]


# -- logs --------------------------------------------------------------------------------------------------------


def log(config: ThroughputConfig, n_titles: int) -> list[Figure]:
    """Logged events with exact propensities and watch times, by `World.generate_log`, in memory."""
    world, n = world_of(config, n_titles), config.log_users
    users = floors.users_of(world, world.users("train", n))
    works: dict[str, Callable[[], object]] = {
        OURS: lambda: world.generate_log(n, expose_propensities=True),
        FLOOR: lambda: floors.race_log(world, users, config.seed),
    }
    timings = side_by_side(works, config.repeats, config.seconds)
    events = n * world.config.history_length
    return [f for who, timing in timings.items() for f in rates(f"log_{n_titles}", events, who, timing)]


def large(config: ThroughputConfig) -> list[Figure]:
    """The same over a large catalogue, by one process and by two at the same time."""
    found: list[Figure] = []
    events = config.large_users * WorldConfig().history_length
    for workers in (1, 2):
        for who, work in ((OURS, _large_log), (FLOOR, _large_floor)):
            each = [(config, SPLITS[k]) for k in range(workers)]
            wall, cpu = at_the_same_time(work, each, config.repeats, 3 * config.seconds)
            found += rates(f"large_{workers}", events * workers, who, wall)
            found += rates(f"large_{workers}_cpu", events * workers, who, cpu)
    return found


def _large_log(config: ThroughputConfig, split: str) -> Callable[[], object]:
    world = world_of(config, config.large_titles)
    return lambda: world.generate_log(config.large_users, split, expose_propensities=True)


def _large_floor(config: ThroughputConfig, split: str) -> Callable[[], object]:
    world = world_of(config, config.large_titles)
    users = floors.users_of(world, world.users(split, config.large_users))
    return lambda: floors.block_log(world, users, config.seed)


def generate(config: ThroughputConfig) -> list[Figure]:
    """``recsim-gr generate`` with two workers, into a directory of its own, which is removed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "log"
        arguments = ["--users", config.n_users, "--titles", config.n_titles, "--out", out, "--workers", 2]
        took = run_command([sys.executable, "-m", "recsim_gr", "generate", *map(str, arguments)])
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    millions = config.n_users / 1e6
    values = {
        "users": config.n_users,
        "seconds": took.seconds,
        "seconds_per_million": took.seconds / millions,
        "cpu_seconds_per_million": took.cpu_seconds / millions,
        "peak_mebibytes": took.peak_bytes / MEBIBYTE,
        "disk_megabytes_per_million": size / MEGABYTE / millions,
    }
    return [Figure(OURS, f"generate.{name}", value) for name, value in values.items()]


# -- import and memory -------------------------------------------------------------------------------------------

IMPORT = """
import json, re, sys, time
start, cpu = time.perf_counter(), time.process_time()
import {module}
took = time.perf_counter() - start, time.process_time() - cpu
try:
    peak = float(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
except OSError:
    peak = float("nan")
print(json.dumps([*took, peak, "torch" in sys.modules]))
"""


def imports(config: ThroughputConfig) -> list[Figure]:
    """``import recsim_gr`` against ``import gymnasium`` alone, in turns, each in a new interpreter."""
    found: dict[str, list[list[float]]] = {"gymnasium": [], "recsim_gr": []}
    for repeat in range(config.import_repeats + 1):
        for module, runs in found.items():
            figures = _import_once(module)
            if repeat > 0:  # the first reads the disk
                runs.append(figures)
    middle = {m: [statistics.median(column) for column in zip(*runs, strict=True)] for m, runs in found.items()}
    software = f"gymnasium {metadata.version('gymnasium')}"
    wall, cpu, peak, _ = (ours - theirs for ours, theirs in zip(middle["recsim_gr"], middle["gymnasium"], strict=True))
    return [
        Figure(OURS, "import.extra_seconds", cpu),
        Figure(OURS, "import.extra_wall_seconds", wall),
        Figure(OURS, "import.extra_megabytes", peak / MEGABYTE),
        Figure(OURS, "import.loads_torch", max(run[3] for run in found["recsim_gr"])),
        Figure(OURS, "import.seconds", middle["recsim_gr"][1]),
        Figure(OURS, "import.megabytes", middle["recsim_gr"][2] / MEGABYTE),
        Figure(FLOOR, "import.seconds", middle["gymnasium"][1], software),
        Figure(FLOOR, "import.megabytes", middle["gymnasium"][2] / MEGABYTE, software),
    ]


def _import_once(module: str) -> list[float]:
    """Wall seconds, CPU seconds, peak bytes, and whether torch was loaded."""
    command = [sys.executable, "-c", IMPORT.format(module=module)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=plain_environment()).stdout
    return [float(value) for value in json.loads(answer)]


def memory(config: ThroughputConfig) -> list[Figure]:
    """The memory that a log takes while it is made, beyond its own columns."""
    world = world_of(config, config.n_titles)
    world.generate_log(100, expose_propensities=True)
    before = held_bytes()
    made = world.generate_log(config.memory_users, expose_propensities=True)
    grown = peak_bytes() - before
    columns = [*(getattr(made, name) for name in COLUMNS), made.require_propensities()]
    own = sum(column.nbytes for column in columns)
    return [
        Figure(OURS, "memory.users", config.memory_users),
        Figure(OURS, "memory.log_megabytes", own / MEGABYTE),
        Figure(OURS, "memory.beyond_megabytes", (grown - own) / MEGABYTE),
        Figure(OURS, "memory.dense_megabytes", dense_megabytes(config.memory_users, config.n_titles)),
    ]


def pool_memory(config: ThroughputConfig) -> list[Figure]:
    """The memory of an environment's pool of users, all of them prepared."""
    users = config.pool_memory_users
    num_envs = min(POOL_CHECK_ENVS, users)
    world, actions = world_of(config, config.n_titles), drawn_actions(config, num_envs)[0]
    small = gymnasium.make_vec(ENVIRONMENT, num_envs=num_envs, world=world, pool_users=256)
    _complete_pool(small, num_envs, 256, actions)
    before = held_bytes()
    envs = gymnasium.make_vec(ENVIRONMENT, num_envs=num_envs, world=world, pool_users=users)
    _complete_pool(envs, num_envs, users, actions)
    return [
        Figure(OURS, "pool.users", users),
        Figure(OURS, "pool.megabytes", (peak_bytes() - before) / MEGABYTE),
        Figure(OURS, "pool.dense_megabytes", dense_megabytes(users, config.n_titles)),
    ]


def dense_megabytes(users: int, titles: int) -> float:
    """Of the array that must not be there: a float32 a user and title."""
    return 4.0 * users * titles / MEGABYTE


# -- training ----------------------------------------------------------------------------------------------------


def training(config: ThroughputConfig) -> list[Figure]:
    """Training steps beside those of the public research code's structure: see `training_speed`.

    Raises:
        ConfigError: a GPU is asked for where there is none.
    """
    import torch  # here, since the other jobs are measured without it

    from recsim_gr.benchmarks import training_speed

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch finds no GPU here; train on --device cpu")
    return training_speed.training(config)


# -- peers and the machine ---------------------------------------------------------------------------------------


def peers(config: ThroughputConfig) -> list[Figure]:
    """Peers, where they are installed."""
    found = []
    for key, peer in PEERS.items():
        answer = measured_somewhere(key, config.n_titles, config.peer_seconds)
        value, software = answer.get("per_second", float("nan")), answer.get("version", answer.get("missing", ""))
        found.append(Figure(peer.name, f"{peer.job}.per_second", value, software))
    return found


def machine(config: ThroughputConfig) -> list[Figure]:
    """What all of this ran on."""
    import os

    about = f"{_processor()}, Python {platform.python_version()}, NumPy {np.__version__}, {platform.system()}"
    return [Figure(MACHINE, "cores", os.cpu_count() or 1, about)]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


Job = tuple[Callable[..., list[Figure]], tuple[Any, ...]]
"""A function, and what it takes beside the config."""


def jobs_of(config: ThroughputConfig) -> dict[str, Job]:
    """The jobs that are asked for, by name."""
    return {name: job for name, job in _all_jobs(config).items() if not config.jobs or name in config.jobs}


def _all_jobs(config: ThroughputConfig) -> dict[str, Job]:
    return {
        "machine": (machine, ()),
        "vector": (vector, ()),
        "single": (single, ()),
        **{f"log-{titles}": (log, (titles,)) for titles in config.log_titles},
        "large": (large, ()),
        "generate": (generate, ()),
        "import": (imports, ()),
        "memory": (memory, ()),
        "pool": (pool_memory, ()),
        "training": (training, ()),
        "peers": (peers, ()),
    }
