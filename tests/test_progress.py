"""What a training shows: a bar on a terminal, some lines elsewhere, and nothing where nothing is asked for."""

import io
import re
import time

import pytest
from rich.console import Console

from recsim_gr import progress
from recsim_gr.backbones import HSTUConfig
from recsim_gr.pretraining import pretrain
from recsim_gr.progress import TrainingProgress
from recsim_gr.training import TrainingConfig
from recsim_gr.world import World, WorldConfig

STEPS = TrainingConfig(steps=20, batch_users=8, learning_rate=1e-2, warmup_steps=2, checks=2)


class Clock:
    """Time that passes when it is told to."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def shown(terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=120, color_system=None), text


def test_elsewhere_a_line_comes_every_tenth_of_the_run(clock: Clock) -> None:
    console, text = shown(False)
    with TrainingProgress(console, 1_000, "pretraining") as observer:
        for step in range(1, 1_001):
            clock.now += 0.5
            observer.on_step(step, 6.0 - step / 1_000, 640)
            if step == 500:
                observer.on_check(step, 4.25)
    lines = text.getvalue().splitlines()
    assert len(lines) == 10
    # 500 steps are left after 500, each half a second
    assert lines[4] == "pretraining: step 500 of 1,000, 1,280 tokens/s, loss 5.5, 0:04:10 left"
    assert lines[5].startswith("pretraining: step 600 of 1,000, 1,280 tokens/s, loss 5.4, validation 4.25")
    assert lines[9] == "pretraining: step 1,000 of 1,000, 1,280 tokens/s, loss 5, validation 4.25"


def test_a_resumed_run_counts_only_what_it_does_itself(clock: Clock) -> None:
    console, text = shown(False)
    with TrainingProgress(console, 100, "pretraining") as observer:
        for step in range(51, 101):
            clock.now += 2.0
            observer.on_step(step, 1.0, 100)
    lines = text.getvalue().splitlines()
    assert [re.findall(r"step (\d+)", line)[0] for line in lines] == ["60", "70", "80", "90", "100"]
    assert lines[0] == "pretraining: step 60 of 100, 50 tokens/s, loss 1, 0:01:20 left"


def test_on_a_terminal_there_is_a_bar(clock: Clock) -> None:
    console, text = shown(True)
    with TrainingProgress(console, 10, "pretraining") as observer:
        for step in range(1, 6):
            clock.now += 1.0
            observer.on_step(step, 4.5, 200)
        observer.on_check(5, 4.75)
        observer._bar.refresh()
    drawn = text.getvalue()
    for part in ("pretraining", "5/10", "200 tokens/s", "loss 4.5", "validation 4.75"):
        assert part in drawn
    assert "step 5 of 10" not in drawn


def test_a_quiet_console_and_a_training_without_one_say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    log = World(WorldConfig(n_titles=20, history_length=5)).generate_log(60)
    pretrain(log, HSTUConfig(dimensions=8, n_layers=1), STEPS)
    with TrainingProgress(Console(quiet=True), STEPS.steps, "pretraining") as observer:
        pretrain(log, HSTUConfig(dimensions=8, n_layers=1), STEPS, progress=observer)
    assert capfd.readouterr() == ("", "")


def test_it_observes_a_pretraining() -> None:
    log = World(WorldConfig(n_titles=20, history_length=5)).generate_log(60)
    console, text = shown(False)
    with TrainingProgress(console, STEPS.steps, "pretraining") as observer:
        pretrain(log, HSTUConfig(dimensions=8, n_layers=1), STEPS, progress=observer)
        assert observer.tokens_per_second > 0
    lines = text.getvalue().splitlines()
    assert len(lines) == 10
    assert "validation" in lines[-1]
    assert "left" not in lines[-1]


def test_an_error_passes_through_and_stops_the_bar() -> None:
    console, _ = shown(True)
    with pytest.raises(KeyError), TrainingProgress(console, 10, "pretraining") as observer:
        raise KeyError("x")
    assert not observer._bar.live.is_started


@pytest.mark.benchmark
@pytest.mark.parametrize("terminal", [False, True])
def test_watching_costs_little(terminal: bool) -> None:
    """A step of the smallest backbone takes ten milliseconds: a hundredth of it is 100 µs."""
    console, _ = shown(terminal)
    steps = 20_000
    with TrainingProgress(console, steps, "pretraining") as observer:
        start = time.process_time()
        for step in range(1, steps + 1):
            observer.on_step(step, 1.0, 1_280)
        cost = (time.process_time() - start) / steps
    print(f"{cost * 1e6:.1f} µs a step")
    assert cost < 100e-6
