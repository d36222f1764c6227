"""Figures, not verdicts: what bfloat16 and ``torch.compile`` cost and save in a training step, and where runs end.

``pytest -m benchmark -s tests/benchmarks/test_training_precision.py``; CPU time on one thread, the fastest of repeats
taken in turns. `recsim_gr.processes.ENVIRONMENT` says which variables workers run with.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch

from recsim_gr.backbones import HSTUConfig
from recsim_gr.benchmarks.stopwatch import side_by_side
from recsim_gr.histories import Histories
from recsim_gr.prefixes import imitation_loss
from recsim_gr.pretraining import PRETRAINING, initial_backbone, pretrain_with_record
from recsim_gr.training import TrainingConfig, _Run
from recsim_gr.world import World, WorldConfig

pytestmark = pytest.mark.benchmark


class Size(NamedTuple):
    """What is trained: d, I, B and T."""

    dimensions: int
    n_titles: int
    users: int
    events: int


SIZES = {"quick": Size(32, 200, 64, 20), "large": Size(64, 1_000, 128, 50)}
DEVELOPMENT_SEED = 1_000
"""Of the world: none that a suite reports."""


def step_of(size: Size, training: TrainingConfig) -> Callable[[], float]:
    """A step of pretraining, batch and all."""
    world = World(WorldConfig(n_titles=size.n_titles, history_length=size.events, seed=DEVELOPMENT_SEED))
    histories = Histories(world.generate_log(size.users * 4))
    backbone = initial_backbone(HSTUConfig(dimensions=size.dimensions, max_length=size.events), size.n_titles, 0)
    loss = partial(imitation_loss, backbone)
    training = replace(training, batch_users=size.users, steps=100_000)
    run = _Run(backbone, loss, lambda: 0.0, histories, training, 0, "timing", None, torch.device("cpu"))
    run.begin(judged=False)
    batches = run.batches()
    return lambda: run.step(next(batches))


@pytest.mark.parametrize("name", SIZES)
def test_a_step(name: str) -> None:
    torch.set_num_threads(1)
    size, plain = SIZES[name], TrainingConfig()
    modes = {
        "float32": plain,
        "bfloat16": replace(plain, precision="bfloat16"),
        "float32 compiled": replace(plain, compile=True),
        "bfloat16 compiled": replace(plain, precision="bfloat16", compile=True),
    }
    with torch.random.fork_rng(devices=[]):
        works = {mode: step_of(size, training) for mode, training in modes.items()}
        for mode, work in works.items():
            start, wall = time.process_time(), time.perf_counter()
            work()
            took = time.process_time() - start, time.perf_counter() - wall
            print(f"{name}, {mode}: first step {took[0]:.1f} s of CPU, {took[1]:.1f} s")
        timings = side_by_side(works, repeats=7, seconds=1.0)
    base = timings["float32"].best
    for mode, timing in timings.items():
        tokens = size.users * size.events / timing.best
        print(f"{name}, {mode}: {timing.best * 1e3:.1f} ms a step, {tokens:,.0f} tokens/s, {base / timing.best:.2f}×")


RUNS = {"quick": (4_000, PRETRAINING), "large": (4_000, replace(PRETRAINING, batch_users=128, steps=320))}
"""Users, and ten passes over them."""


@pytest.mark.parametrize("name", SIZES)
def test_where_a_run_ends(name: str) -> None:
    """Validation negative log-likelihood of the kept state, for some seeds of weights, batches and dropout."""
    torch.set_num_threads(1)
    size, (users, training) = SIZES[name], RUNS[name]
    world = World(WorldConfig(n_titles=size.n_titles, history_length=size.events, seed=DEVELOPMENT_SEED))
    log, held_out = world.generate_log(users), world.generate_log(1_000, split="validation")
    for seed in range(3 if name == "quick" else 1):
        for precision in ("float32", "bfloat16"):
            start = time.process_time()
            mode = replace(training, precision=precision)
            _, record = pretrain_with_record(log, HSTUConfig(dimensions=size.dimensions), mode, held_out, seed)
            took = time.process_time() - start
            print(f"{name}, seed {seed}, {precision}: {record.best_objective:.4f} at {record.best_step}, {took:.0f} s")
