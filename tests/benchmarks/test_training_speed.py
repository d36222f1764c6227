"""Job training: that the reference is an equal, that flops are counted right, that every part of the job works."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recsim_gr.benchmarks import throughput_jobs, training_speed
from recsim_gr.benchmarks.hstu_reference import reference_of
from recsim_gr.benchmarks.stopwatch import forget_peak, held_bytes, in_worker_process, peak_bytes, side_by_side
from recsim_gr.benchmarks.throughput import Throughput
from recsim_gr.benchmarks.throughput_jobs import OURS, Figure, ThroughputConfig
from recsim_gr.benchmarks.training_speed import COMPILED, LOSSES, PEAK, REFERENCE, WORKS, batch_of, model_of
from recsim_gr.benchmarks.training_table import training_table
from recsim_gr.errors import ConfigError

SMOKE: ThroughputConfig = Throughput.preset("smoke")
SMALL = replace(SMOKE, training_users=8, training_events=12, training_dimensions=16)


@pytest.fixture(autouse=True)
def random_state_kept() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# -- the reference -----------------------------------------------------------------------------------------------


def test_equal_weights_and_batches_give_equal_losses_all_along_a_training() -> None:
    ours, batch = model_of(SMALL, dropout=0.0), batch_of(SMALL)
    theirs = reference_of(ours).train()
    optimisers = [torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1) for model in (ours, theirs)]
    apart, losses = [], []
    for _ in range(6):
        values = [training_speed.same_loss(ours, batch), theirs.loss(batch)]
        apart.append(abs((values[0] - values[1]).item()))
        losses.append(values[0].item())
        for value, optimiser in zip(values, optimisers, strict=True):
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
    assert max(apart) < 1e-5
    assert losses[-1] < 0.9 * losses[0]  # they went somewhere


def test_the_reference_pads_without_a_trace() -> None:
    ours = model_of(SMALL, dropout=0.0)
    theirs, batch = reference_of(ours), batch_of(SMALL)
    titles = batch.titles[:, :-1].clone()
    before = theirs(titles, batch.times[:, :-1])
    titles[:, 7:] = SMALL.n_titles
    after = theirs(titles, batch.times[:, :-1])
    torch.testing.assert_close(after[:, :8], before[:, :8])
    assert not after[:, 8:].any()


def test_dropout_of_the_reference_is_where_ours_is() -> None:
    ours, batch = model_of(SMALL, dropout=0.5), batch_of(SMALL)
    theirs = reference_of(ours).train()
    assert theirs.loss(batch).item() != theirs.loss(batch).item()
    theirs.eval()
    ours.eval()
    assert theirs.loss(batch).item() == pytest.approx(training_speed.same_loss(ours, batch).item(), abs=1e-5)
    means = []
    for model, loss in ((ours, LOSSES[OURS, "all"]), (theirs, LOSSES[REFERENCE, "all"])):
        model.train()
        with torch.no_grad():
            means.append(torch.tensor([loss(model, batch).item() for _ in range(300)]))
    error = float(torch.sqrt(means[0].var() / 300 + means[1].var() / 300))
    assert abs(means[0].mean() - means[1].mean()) < 4.5 * error
    assert means[0].std() == pytest.approx(float(means[1].std()), rel=0.3)


# -- the job -----------------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_products_that_the_reference_makes() -> None:
    theirs, batch = reference_of(model_of(SMALL, dropout=0.0)), batch_of(SMALL)
    with FlopCounterMode(display=False) as counted:
        theirs.loss(batch).backward()
    assert counted.get_total_flops() == training_speed.step_flops(SMALL)


@pytest.mark.parametrize("work", WORKS, ids=lambda work: f"{work.who}-{work.name}")
def test_a_step_trains_by_the_loss_that_it_names(work: training_speed.Work) -> None:
    batch = batch_of(SMALL)
    losses: list[float] = []
    inner = LOSSES[work.who, work.loss]

    def noted(*arguments: Any) -> torch.Tensor:
        assert torch.is_autocast_enabled("cpu") == (work.precision == "bfloat16")
        value = inner(*arguments)
        losses.append(value.item())
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOSSES, (work.who, work.loss), noted)
        patch.setattr(training_speed, "RATE", 1e-2)
        step = training_speed.step_of(SMALL, work, 0.0, batch, lambda: None)
        for _ in range(8):
            step()
    assert losses[-1] < losses[0] - 0.1


def test_every_part_gives_finite_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def noted(function: Any) -> Any:
        compiled.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", noted)
    found = training_speed.timed(SMOKE, "training", WORKS + COMPILED)
    assert sorted(compiled) == 2 * ["encode"] * 2 + 2 * ["forward"] * 2
    found += training_speed.curves(SMOKE) + training_speed.large_catalogue(SMOKE)
    assert len({(figure.who, figure.metric) for figure in found}) == len(found)
    values = {(figure.who, figure.metric): figure.value for figure in found}
    assert all(value > 0 for (_, metric), value in values.items() if "per_second" in metric or "flops" in metric)
    assert values[OURS, "training.curve.float32.most_apart"] < 1e-5
    assert 0 < values[OURS, "training.curve.bfloat16.most_apart"] < 0.1
    expected = {(w.who, f"training.{d}.{w.name}.per_second") for d in training_speed.DROPOUTS for w in WORKS + COMPILED}
    assert expected <= set(values)
    rows = training_table({(f.who, f.metric): (f.value, f.software) for f in found}, replace(SMOKE, compile=True))
    assert len({len(row) for row in rows}) == 1
    assert sum("compiled" in row[0] for row in rows) == 4


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="device must be one of cpu, cuda, got 'tpu'"):
        ThroughputConfig(device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch finds no GPU"):
            throughput_jobs.training(replace(SMOKE, device="cuda"))
    with pytest.raises(ConfigError, match="training_dimensions must be even"):
        ThroughputConfig(training_dimensions=7)
    with pytest.raises(ConfigError, match="training_titles must be at least 52"):
        ThroughputConfig(training_titles=51)


def test_another_clock_may_be_read() -> None:
    clock = [0.0]

    def work() -> None:
        clock[0] += 2.0

    assert side_by_side({"a": work}, repeats=2, seconds=5.0, clock=lambda: clock[0])["a"].best == 2.0


def test_worker_processes_have_the_runners_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    names = ("MALLOC_TOP_PAD_", "OMP_NUM_THREADS")
    assert [in_worker_process(os.getenv, name) for name in names] == [str(2**26), "1"]
    assert os.environ["MALLOC_TOP_PAD_"] == "1"


# -- the table ---------------------------------------------------------------------------------------------------


def test_the_table_compares_with_targets() -> None:
    figures = [
        *_rates("plain.all_float32", 100e3, 50e3),
        *_rates("plain.all_bfloat16", 99e3, 55e3),
        *_rates("plain.last_bfloat16", 200e3, 1.0),
        Figure(OURS, "training.plain.all_float32.peak_share", 0.42),
        Figure(PEAK, "training.float32.flops", 97e9),
        Figure(REFERENCE, "training.curve.float32.held_out", 5.0),
        Figure(OURS, "training.curve.bfloat16.held_out", 5.02),
        Figure(OURS, "training.memory.at_once", 1.2),
        Figure(OURS, "training.memory.chunked", 1.7),
        Figure(REFERENCE, "training.memory.reference", 4.8),
    ]
    found = {(figure.who, figure.metric): (figure.value, figure.software) for figure in figures}
    rows = {row[0].strip(): row[1:] for row in training_table(found, ThroughputConfig())}
    assert rows["float32, the identical loss"] == (
        ">= 1.15", "100.0 k tokens/s", "100.0 k", "50.0 k", "2.00", "42 %", "pass",
    )  # fmt: skip
    assert rows["bfloat16, the same loss"][-3:] == ("1.98", "", "SHORT")
    assert rows["last position, bfloat16, against the reference's full step"][-1] == "pass"
    assert rows["held-out loss after 300 steps, bfloat16 (losses at most nan apart)"][-1] == "SHORT"
    assert rows["memory of a step over 20,000 titles, all rows at once"][-1] == "pass"
    assert rows["memory of a step over 20,000 titles, in chunks"][-1] == "SHORT"
    assert rows["memory of a step over 20,000 titles, in chunks, bfloat16"][-1] == "not measured"
    assert training_table({}, ThroughputConfig()) == []


def _rates(metric: str, ours: float, theirs: float) -> list[Figure]:
    return [
        Figure(who, f"training.{metric}.per_second{suffix}", value)
        for who, value in ((OURS, ours), (REFERENCE, theirs))
        for suffix in ("", "_median")
    ]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system cannot forget a peak")
def test_a_peak_is_forgotten_with_what_was_freed() -> None:
    kept = [bytearray(10**6) for _ in range(100)]
    forget_peak()
    assert peak_bytes() - held_bytes() < 20e6
    del kept
    before = peak_bytes()
    forget_peak()
    assert before - peak_bytes() > 50e6
