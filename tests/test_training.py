"""The training loop and pretraining: masks, batches, schedule, the state that is kept, determinism."""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from recsim_gr.backbones import HSTU, Backbone, HSTUConfig
from recsim_gr.errors import ConfigError, TrainingError
from recsim_gr.histories import Batch, Histories, split_logs
from recsim_gr.log import InteractionLog
from recsim_gr.prefixes import (
    chosen_log_probs,
    imitation_loss,
    negative_log_likelihood,
    prefix_logits,
    prefix_mask,
    prefix_states,
)
from recsim_gr.pretraining import pretrain, pretrain_with_record
from recsim_gr.training import TrainingConfig, TrainingRecord, train
from recsim_gr.world import World, WorldConfig

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)

SHORT = TrainingConfig(steps=12, batch_users=8, learning_rate=1e-2, warmup_steps=2, checks=3)
SMALL = HSTUConfig(dimensions=8, n_layers=1)


def log_of(histories: Sequence[Sequence[int]], n_titles: int) -> InteractionLog:
    """A log with these titles, one list a user; scores run through 1 to 5."""
    lengths = [len(history) for history in histories]
    n = sum(lengths)
    steps = np.concatenate([np.arange(length) for length in lengths])
    return InteractionLog(
        user=np.repeat(np.arange(len(histories)), lengths),
        epoch=np.zeros(n, dtype=np.int64),
        step=steps,
        hours=steps.astype(np.float32),
        title=np.concatenate([np.asarray(history, dtype=np.int64) for history in histories]),
        duration_minutes=np.full(n, 30.0),
        watch_minutes=np.full(n, 15.0),
        score=np.linspace(1, 5, n, dtype=np.float32),
        n_titles=n_titles,
    )


RAGGED = ([2, 0, 4, 1], [3], [1, 5])


@st.composite
def ragged(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """Histories of different lengths without repeats, and the catalogue's size."""
    n_titles = draw(st.integers(2, 8))
    orders = draw(st.lists(st.permutations(range(n_titles)), min_size=1, max_size=4))
    return [list(order[: draw(st.integers(1, n_titles))]) for order in orders], n_titles


def backbone_for(n_titles: int, seed: int = 0) -> HSTU:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return HSTU(HSTUConfig(dimensions=8, n_layers=1, max_length=8), n_titles).eval()


@pytest.fixture(scope="module")
def log() -> InteractionLog:
    return World(WorldConfig(n_titles=20, history_length=5)).generate_log(60)


@contextmanager
def global_random_state_kept() -> Iterator[None]:
    """Python's, NumPy's and torch's global generators stand after the block where they stood before."""
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    assert random.getstate() == before[0]
    np.testing.assert_equal(np.random.get_state(), before[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


# -- histories, masks, log-probabilities --------------------------------------------------------------------------


def test_histories_are_rows_with_padding_behind() -> None:
    histories = Histories(log_of(RAGGED, 6))
    assert len(histories) == 3
    assert histories.longest == 4
    assert histories.titles.tolist() == [[2, 0, 4, 1], [3, 6, 6, 6], [1, 5, 6, 6]]
    assert histories.valid.tolist() == [[True] * 4, [True] + [False] * 3, [True, True, False, False]]
    np.testing.assert_allclose(histories.scores[2].numpy(), [1 + 4 * 5 / 6, 5, 0, 0], rtol=1e-6)
    batch = histories.batch(torch.tensor([2, 0]))
    assert batch.rows.tolist() == [2, 0]
    assert batch.titles.tolist() == [[1, 5, 6, 6], [2, 0, 4, 1]]
    assert [b.rows.tolist() for b in histories.chunks(2)] == [[0, 1], [2]]


@PROPERTY
@given(ragged())
def test_the_mask_stands_on_what_was_seen_and_nowhere_else(drawn: tuple[list[list[int]], int]) -> None:
    histories, n_titles = drawn
    mask = prefix_mask(next(Histories(log_of(histories, n_titles)).chunks()), n_titles)
    for row, history in enumerate(histories):
        for step in range(len(history)):
            seen = [title in history[:step] for title in range(n_titles)]
            assert (mask[row, step] < 0).tolist() == seen
            assert not mask[row, step][~torch.tensor(seen)].any()


def test_the_mask_counts_beyond_127_events() -> None:
    order = np.random.default_rng(0).permutation(140)
    mask = prefix_mask(next(Histories(log_of([order.tolist()], 140)).chunks()), 140)[0] < 0
    assert mask.sum(dim=1).tolist() == list(range(140))
    assert all(mask[step, order[:step]].all() for step in range(140))


@PROPERTY
@given(ragged(), st.integers(0, 9))
def test_seen_titles_have_probability_zero_at_every_prefix(drawn: tuple[list[list[int]], int], seed: int) -> None:
    histories, n_titles = drawn
    batch = next(Histories(log_of(histories, n_titles)).chunks())
    backbone = backbone_for(n_titles, seed)
    logits = prefix_logits(backbone, batch)
    probabilities = torch.softmax(logits, dim=-1)
    seen = prefix_mask(batch, n_titles) < 0
    assert (probabilities[seen] == 0.0).all()
    assert (probabilities[~seen & batch.valid[..., None]] > 0.0).all()
    (gradient,) = torch.autograd.grad(torch.logsumexp(logits, dim=-1).sum(), logits)
    assert not gradient[seen].any()
    torch.testing.assert_close(logits[~seen], backbone.logits(prefix_states(backbone, batch))[~seen], atol=1e-4, rtol=0)


def test_a_prefix_is_the_context_before_the_event() -> None:
    batch = next(Histories(log_of(RAGGED, 6)).chunks())
    backbone = backbone_for(6)
    states = prefix_states(backbone, batch)
    for row, step in [(0, 0), (0, 3), (1, 0), (2, 1)]:
        short = tuple(part[row : row + 1, :step] for part in (batch.titles, batch.scores, batch.times))
        torch.testing.assert_close(states[row, step], backbone.encode_last(*short)[0], atol=1e-6, rtol=0)


def test_chosen_log_probs_by_hand() -> None:
    batch = next(Histories(log_of([[1, 0], [0]], 2)).chunks())
    logits = torch.tensor([[[0.0, math.log(3.0)], [2.0, 2.0]], [[math.log(4.0), 0.0], [7.0, 9.0]]])
    got = chosen_log_probs(torch.log_softmax(logits, dim=-1), batch)
    # title 1 of (1, 3): 3/4; title 0 of (1, 1): 1/2; title 0 of (4, 1): 4/5; padding: 0
    expected = [[math.log(0.75), math.log(0.5)], [math.log(0.8), 0.0]]
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)
    assert got[1, 1] == 0.0


# -- the schedule -------------------------------------------------------------------------------------------------


def test_the_rate_warms_up_and_decays_as_a_cosine() -> None:
    config = TrainingConfig(steps=100, warmup_steps=10)
    assert config.rate(0) == pytest.approx(0.1)  # a tenth of the way up, cos 0 = 1
    assert config.rate(4) == pytest.approx(0.5 * 0.5 * (1 + math.cos(0.04 * math.pi)))
    assert config.rate(50) == pytest.approx(0.5)  # cos(π/2) = 0
    assert config.rate(75) == pytest.approx(0.5 * (1 - math.sqrt(0.5)))
    rates = [config.rate(step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[99] < 0.001
    assert TrainingConfig(steps=100, warmup_steps=0).rate(0) == 1.0


@pytest.mark.parametrize(("steps", "checks", "marks"), [(100, 4, [25, 50, 75, 100]), (3, 9, [1, 2, 3]), (7, 1, [7])])
def test_checks_stand_at_even_distances_and_at_the_end(steps: int, checks: int, marks: list[int]) -> None:
    config = TrainingConfig(steps=steps, checks=checks)
    assert [done for done in range(1, steps + 1) if config.is_check(done)] == marks


class Walker(nn.Module):
    """Numbers under a constant gradient: AdamW then moves each by exactly the rate, downward."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.modes: list[bool] = []
        self.path: list[float] = []
        self.rows: list[list[int]] = []

    def loss(self, batch: Batch) -> Tensor:
        self.modes.append(self.training)
        self.path.append(self.slow.item())
        self.rows.append(batch.rows.tolist())
        return self.slow + self.fast


def walk(
    log: InteractionLog,
    objective: Callable[[Walker], float],
    config: TrainingConfig,
    **further: Any,
) -> tuple[Walker, TrainingRecord]:
    module = Walker()
    groups: list[dict[str, object]] = [{"params": [module.slow]}, {"params": [module.fast], "scale": 3.0}]
    record = train(
        module,
        module.loss,
        lambda: objective(module),
        Histories(log),
        config,
        0,
        "walking",
        parameter_groups=groups,
        **further,
    )
    return module, record


NO_DECAY = {"weight_decay": 0.0, "batch_users": 4}


def test_every_step_takes_the_scheduled_rate(log: InteractionLog) -> None:
    config = TrainingConfig(steps=20, learning_rate=0.1, warmup_steps=5, checks=1, **NO_DECAY)  # type: ignore[arg-type]
    module, _ = walk(log, lambda module: module.slow.item(), config)
    gone = np.cumsum([0.1 * config.rate(step) for step in range(20)])
    np.testing.assert_allclose(module.path[1:], -gone[:-1], atol=1e-5)
    assert module.slow.item() == pytest.approx(-gone[-1], abs=1e-5)
    assert module.fast.item() == pytest.approx(-3.0 * gone[-1], abs=1e-4)


def test_the_best_state_on_validation_is_kept(log: InteractionLog) -> None:
    """The walk goes from 0 to about −1; an objective lowest at −0.5 must bring it back from the end."""
    config = TrainingConfig(steps=20, learning_rate=0.1, warmup_steps=0, checks=10, **NO_DECAY)  # type: ignore[arg-type]
    told: list[tuple[int, float]] = []
    module, record = walk(
        log,
        lambda module: abs(module.slow.item() + 0.5),
        config,
        after_check=lambda step, objective: told.append((step, objective)),
    )
    at_checks = [(step, abs(module.path[step] + 0.5)) for step in range(0, 20, 2)]
    best = min(at_checks, key=lambda check: check[1])[0]
    assert 0 < best < 20
    assert record.best_step == best
    assert module.slow.item() == module.path[best]
    assert module.fast.item() == pytest.approx(3.0 * module.path[best], abs=1e-4)
    assert record.best_objective == min(objective for _, objective in record.objectives)
    assert [step for step, _ in record.objectives] == list(range(0, 21, 2))
    assert told == record.objectives[1:]
    assert record.steps == 20


def test_a_run_that_only_gets_worse_ends_where_it_began(log: InteractionLog) -> None:
    config = TrainingConfig(steps=6, learning_rate=0.1, warmup_steps=0, checks=3, **NO_DECAY)  # type: ignore[arg-type]
    module, record = walk(log, lambda module: -module.slow.item(), config)
    assert record.best_step == 0
    assert module.slow.item() == module.fast.item() == 0.0


def test_losses_are_taken_in_training_mode_and_objectives_in_eval_mode(log: InteractionLog) -> None:
    seen: list[tuple[bool, bool]] = []

    def objective(module: Walker) -> float:
        seen.append((module.training, torch.is_grad_enabled()))
        return module.slow.item()

    module, _ = walk(log, objective, SHORT)
    assert module.modes == [True] * SHORT.steps
    assert seen == [(False, False)] * (1 + SHORT.checks)
    assert not module.training


def test_every_user_comes_once_an_epoch(log: InteractionLog) -> None:
    config = TrainingConfig(steps=30, batch_users=7, checks=1)
    module, _ = walk(log, lambda module: 0.0, config)
    assert all(len(rows) == 7 for rows in module.rows)
    epochs = [
        [user for rows in module.rows[i : i + 8] for user in rows] for i in (0, 8, 16)
    ]  # 60 users: 8 batches, 4 left out
    assert all(len(set(epoch)) == 56 for epoch in epochs)
    assert epochs[0] != epochs[1]
    few, _ = walk(log, lambda module: 0.0, TrainingConfig(steps=3, batch_users=500, checks=1))
    assert all(sorted(rows) == list(range(60)) for rows in few.rows)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverging_run_is_named(log: InteractionLog, bad: float) -> None:
    module = Walker()
    calls = iter([0.0, 0.0, 0.0, bad])

    def loss(batch: Batch) -> Tensor:
        return module.slow + next(calls)

    with global_random_state_kept(), pytest.raises(TrainingError, match=r"walking diverged: loss .* at step 3 of 12"):
        train(module, loss, lambda: 0.0, Histories(log), SHORT, 0, "walking")
    objectives = iter([0.0, bad])
    with pytest.raises(TrainingError, match=r"walking diverged: validation objective .* after step 4"):
        walk(log, lambda module: next(objectives), SHORT)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("batch_users", 0),
        ("checks", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("weight_decay", -0.1),
        ("warmup_steps", -1),
        ("patience", -1),
        ("patience", 0.5),
        ("precision", "float16"),
        ("compile", "yes"),
    ],
)
def test_a_bad_schedule_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"TrainingConfig\.{field} must be .*{value}"):
        TrainingConfig(**{field: value})


# -- a loss that ends above its start -----------------------------------------------------------------------------


class Told(nn.Module):
    """Its loss is what it is told: a level for every step, and noise that is the batch's own."""

    def __init__(self, level: Callable[[int], float], noise: float, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.level, self.noise, self.step = level, noise, 0
        self.rng = np.random.default_rng(seed)

    def loss(self, batch: Batch) -> Tensor:
        found = self.level(self.step) + self.noise * self.rng.standard_normal()
        if torch.is_grad_enabled():
            self.step += 1
        return self.weight * 0.0 + found


def told(log: InteractionLog, level: Callable[[int], float], noise: float = 0.05, seed: int = 0, **options: Any) -> int:
    """How many steps were taken of 40 with ten checks; the objective falls all along."""
    module = Told(level, noise, seed)
    config = TrainingConfig(steps=40, batch_users=8, learning_rate=0.5, checks=10)
    best = iter(range(100, 0, -1))
    options = {"falls": True, **options}
    return train(module, module.loss, lambda: next(best), Histories(log), config, 0, "telling", **options).steps


RISES: dict[str, Callable[[int], float]] = {
    "steadily": lambda step: 5.0 + 0.02 * step,
    "at once": lambda step: 5.0 if step == 0 else 5.6,
    "after it fell": lambda step: 5.0 - 0.1 * step if step < 20 else 3.0 + 0.15 * (step - 20),
    "by explosion": lambda step: min(1e30, 5.0 * 1.7**step),
    "swinging": lambda step: 5.0 if step == 0 else 50.0 + 45.0 * (-1) ** step,
}
FALLS: dict[str, Callable[[int], float]] = {
    "steadily": lambda step: 5.0 - 0.02 * step,
    "not at all": lambda step: 5.0,
    "after it rose": lambda step: 5.0 + 3.0 * step if step < 20 else 4.5,
    "and ends a little above": lambda step: 5.0 + 0.001 * step,
}


@pytest.mark.parametrize("name", RISES)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_loss_that_ends_above_its_start_is_an_error(name: str, noise: float, log: InteractionLog) -> None:
    with global_random_state_kept(), pytest.raises(TrainingError) as caught:
        told(log, RISES[name], noise)
    message = str(caught.value)
    assert message.startswith("telling diverged: its loss was")
    for part in ("at the start", "over the last 4 of 40 steps", "learning rate (0.5)", "warm-up (30 steps)"):
        assert part in message
    assert told(log, RISES[name], noise, falls=False) == 40


@pytest.mark.parametrize("name", FALLS)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_loss_that_falls_or_stays_is_none(name: str, noise: float, log: InteractionLog) -> None:
    assert told(log, FALLS[name], noise) == 40


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), noise=st.floats(0.0, 3.0))
def test_noise_alone_is_no_divergence(seed: int, noise: float, log: InteractionLog) -> None:
    """A loss that learns nothing, whatever its noise: the bound is five standard errors."""
    assert told(log, lambda step: 5.0, noise, seed) == 40


def test_the_start_takes_nothing_from_the_run(log: InteractionLog) -> None:
    """Neither batches nor random numbers: what is judged ends as what is not."""

    def fitted(falls: bool) -> tuple[list[list[int]], Tensor]:
        torch.manual_seed(0)
        module, rows = nn.Linear(3, 1), []

        def loss(batch: Batch) -> Tensor:
            if torch.is_grad_enabled():
                rows.append(batch.rows.tolist())
            return (module(torch.rand(3)) ** 2).sum()

        train(module, loss, lambda: 0.0, Histories(log), SHORT, 0, "drawing", falls=falls)
        return rows, module.weight.detach().clone()

    (rows, weight), (other_rows, other_weight) = fitted(False), fitted(True)
    assert rows == other_rows
    assert torch.equal(weight, other_weight)


def test_a_state_that_only_gets_worse_on_validation_is_no_divergence(log: InteractionLog) -> None:
    """Fine-tuning from a good start: the loss falls, validation rises, the start is kept, and that is a result."""
    module = Walker()
    record = train(module, module.loss, lambda: -module.slow.item(), Histories(log), SHORT, 0, "tuning", falls=True)
    assert record.best_step == 0


def test_pretraining_at_a_rate_far_too_high_is_an_error(log: InteractionLog) -> None:
    config = HSTUConfig(dimensions=8, n_layers=1, similarity="dot")
    steps = TrainingConfig(steps=12, batch_users=8, learning_rate=5.0, warmup_steps=0, checks=3)
    with pytest.raises(TrainingError, match=r"lower its learning rate \(5\.0\)"):
        pretrain(log, config, steps)


# -- patience, precision, compilation, observers ------------------------------------------------------------------


@pytest.mark.parametrize(("patience", "taken", "best"), [(0, 20, 20), (1, 6, 4), (2, 8, 4), (3, 20, 20), (9, 20, 20)])
def test_a_run_stops_when_it_has_lost_its_patience(patience: int, taken: int, best: int, log: InteractionLog) -> None:
    """Objectives at 0, 2, 4, …: lowest at 4, two worse, and from 10 on ever lower."""
    objectives = [5.0, 4.0, 3.0, 3.5, 3.0, 2.0, 1.9, 1.8, 1.7, 1.6, 1.5]
    following = iter(objectives)
    config = TrainingConfig(steps=20, checks=10, patience=patience, batch_users=4)
    module, record = walk(log, lambda module: next(following), config)
    assert (record.steps, record.best_step) == (taken, best)
    assert record.objectives == [(2 * k, objectives[k]) for k in range(taken // 2 + 1)]
    assert len(module.path) == taken
    assert module.slow.item() == (module.path[best] if best < taken else pytest.approx(module.path[-1], abs=0.01))


def test_bfloat16_learns_the_same_with_weights_in_float32() -> None:
    world = World(WorldConfig(n_titles=20, history_length=5, reward_noise=0.0))
    log, held_out = world.generate_log(200), world.generate_log(200, split="validation")
    steps = TrainingConfig(steps=40, batch_users=32, learning_rate=1e-2, warmup_steps=4, checks=4)

    def fitted(precision: str) -> tuple[Backbone, TrainingRecord]:
        return pretrain_with_record(log, HSTUConfig(dimensions=16), replace(steps, precision=precision), held_out)

    (backbone, narrow), (again, same), (_, wide) = (fitted(name) for name in ("bfloat16", "bfloat16", "float32"))
    assert {value.dtype for value in backbone.parameters()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), again.parameters(), strict=True))
    assert narrow.objectives == same.objectives
    assert narrow.objectives[0] == wide.objectives[0]  # validation is float32
    assert narrow.objectives[1:] != wide.objectives[1:]
    fallen = wide.objectives[0][1] - wide.best_objective
    assert fallen > 1.0
    assert abs(narrow.best_objective - wide.best_objective) < 0.03 * fallen


def test_the_loss_is_compiled_where_it_is_asked_for(log: InteractionLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation itself takes most of a minute, so it is replaced by one that does nothing, and by one that fails."""
    compiled = []

    def as_it_is(loss: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
        compiled.append(loss)
        return loss

    monkeypatch.setattr(torch, "compile", as_it_is)
    plain = pretrain(log, SMALL, SHORT)
    assert compiled == []
    backbone = pretrain(log, SMALL, replace(SHORT, compile=True))
    assert len(compiled) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), backbone.parameters(), strict=True))

    def failing(loss: object) -> Callable[[Batch], Tensor]:
        def call(batch: Batch) -> Tensor:
            raise torch._dynamo.exc.TorchDynamoException("no compiler\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    with pytest.raises(ConfigError, match=r"TrainingConfig\.compile: .*\(no compiler\); leave it off"):
        pretrain(log, SMALL, replace(SHORT, compile=True))


class Ears:
    """An observer that writes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int, float]] = []
        self.tokens: list[int] = []

    def on_step(self, step: int, loss: float, tokens: int) -> None:
        self.heard.append(("step", step, loss))
        self.tokens.append(tokens)

    def on_check(self, step: int, objective: float) -> None:
        self.heard.append(("check", step, objective))


def test_an_observer_is_told_every_step_and_check(log: InteractionLog) -> None:
    ears, batches = Ears(), []
    after: list[tuple[int, float]] = []
    module = Walker()

    def loss(batch: Batch) -> Tensor:
        batches.append(int(batch.valid.sum()))
        return module.loss(batch)

    record = train(
        module,
        loss,
        module.slow.item,
        Histories(log),
        SHORT,
        0,
        "walking",
        lambda *check: after.append(check),
        progress=ears,
    )
    steps = [(step, value) for kind, step, value in ears.heard if kind == "step"]
    assert [step for step, _ in steps] == list(range(1, 13))
    assert steps[0][1] == 0.0  # the loss that the first step found
    assert ears.tokens == batches
    assert [(step, value) for kind, step, value in ears.heard if kind == "check"] == record.objectives[1:] == after
    assert [kind for kind, *_ in ears.heard[:6]] == ["step"] * 4 + ["check", "step"]


def test_a_record_survives_json() -> None:
    record = TrainingRecord(7, 3, 0.1 + 0.2, [(0, 1.5), (3, 0.1 + 0.2)])
    assert TrainingRecord.from_json(json.loads(json.dumps(asdict(record)))) == record
    assert TrainingRecord.from_json({**asdict(TrainingRecord(0)), "best_objective": None}) == TrainingRecord(0)


# -- splitting ----------------------------------------------------------------------------------------------------


@PROPERTY
@given(lengths=st.lists(st.integers(1, 4), min_size=2, max_size=40))
def test_a_log_is_split_by_users(lengths: list[int]) -> None:
    whole = log_of([list(range(length)) for length in lengths], 4)
    training, held_out = split_logs(whole, None)
    assert set(training.user).isdisjoint(held_out.user)
    assert [*training.user, *held_out.user] == list(whole.user)
    assert held_out.n_users == max(1, len(lengths) // 10)


def test_a_validation_log_is_taken_as_it_is(log: InteractionLog) -> None:
    other = World(WorldConfig(n_titles=20, history_length=5)).generate_log(10, split="validation")
    assert split_logs(log, other) == (log, other)


def test_logs_that_cannot_be_split_are_refused(log: InteractionLog) -> None:
    with pytest.raises(ConfigError, match="more users"):
        split_logs(log_of([[0, 1]], 3), None)
    with pytest.raises(ConfigError, match="0 users"):
        split_logs(log.rows(slice(0, 0)), None)
    with pytest.raises(ConfigError, match="20"):
        split_logs(log, log_of([[0]], 3))
    with pytest.raises(ConfigError, match="empty"):
        Histories(log.rows(slice(0, 0)))


# -- pretraining --------------------------------------------------------------------------------------------------


def test_the_likelihood_is_that_of_every_event_once() -> None:
    """Against one context at a time: −log of the softmax over unseen titles."""
    n_titles = 6
    histories = Histories(log_of(RAGGED, n_titles))
    backbone = backbone_for(n_titles)
    losses = []
    for row, history in enumerate(RAGGED):
        for step, title in enumerate(history):
            parts = (histories.titles, histories.scores, histories.times)
            with torch.no_grad():
                state = backbone.encode_last(*(part[row : row + 1, :step] for part in parts))
            logits = backbone.logits(state)[0].tolist()
            unseen = [i for i in range(n_titles) if i not in history[:step]]
            losses.append(-math.log(math.exp(logits[title]) / sum(math.exp(logits[i]) for i in unseen)))
    assert negative_log_likelihood(backbone, histories) == pytest.approx(np.mean(losses), abs=1e-5)
    assert imitation_loss(backbone, next(histories.chunks())).item() == pytest.approx(np.mean(losses), abs=1e-5)


def test_the_likelihood_leaves_the_mode_as_it_was() -> None:
    histories, backbone = Histories(log_of(RAGGED, 6)), backbone_for(6)
    without_dropout = negative_log_likelihood(backbone, histories)
    backbone.train()
    assert negative_log_likelihood(backbone, histories) == without_dropout
    assert backbone.training


def test_pretraining_learns_what_can_be_learned() -> None:
    """Titles 0 to 9 follow each other in pairs (2k, 2k + 1): after an even one comes its twin, ln 2 a pair or less."""
    rng = np.random.default_rng(0)
    users = [[2 * pair + odd for pair in rng.permutation(5) for odd in (0, 1)] for _ in range(150)]
    steps = TrainingConfig(steps=150, batch_users=32, learning_rate=1e-2, warmup_steps=10, checks=3)
    backbone, record = pretrain_with_record(log_of(users, 10), HSTUConfig(dimensions=16), steps)
    # uniform: the mean of ln 10, ln 9, …, ln 1; best: even titles only, one of 5, 4, …, 1, and their twins for sure
    uniform = np.log(np.arange(1, 11)).mean()
    best = np.log(np.arange(1, 6)).sum() / 10
    assert record.objectives[0][1] > uniform - 0.1
    assert record.best_objective == pytest.approx(best, abs=0.15)
    assert best + 0.15 < uniform / 2
    assert not backbone.training


def test_pretraining_improves_on_uniform_in_a_world() -> None:
    world = World(WorldConfig(n_titles=20, history_length=5, n_epochs=1, discernment_alpha=0.1, appeal_tail=3.0))
    held_out = world.generate_log(100, split="validation")
    steps = TrainingConfig(steps=120, batch_users=32, learning_rate=1e-2, warmup_steps=10, checks=3)
    backbone = pretrain(world.generate_log(300), HSTUConfig(dimensions=16), steps, held_out)
    uniform = np.log(np.arange(16, 21)).mean()  # 20, 19, …, 16 titles are left: 2.89
    assert negative_log_likelihood(backbone, Histories(held_out)) < uniform - 0.5


def test_pretraining_takes_its_length_from_the_log(log: InteractionLog) -> None:
    assert pretrain(log, SMALL, SHORT).config.max_length == 5
    assert pretrain(log, HSTUConfig(dimensions=8, max_length=9), SHORT).config.max_length == 9


def test_histories_of_one_event_can_be_learned() -> None:
    log = World(WorldConfig(n_titles=5, history_length=1)).generate_log(30)
    _, record = pretrain_with_record(log, SMALL, SHORT)
    assert record.best_step > 0
    assert record.best_objective < 2.5


def test_equal_seeds_give_equal_weights_whatever_the_global_state(log: InteractionLog) -> None:
    def fitted(seed: int) -> tuple[dict[str, Tensor], list[tuple[int, float]]]:
        with global_random_state_kept():
            backbone, record = pretrain_with_record(log, SMALL, SHORT, seed=seed)
        return backbone.state_dict(), record.objectives

    one, record = fitted(1)
    torch.rand(7)
    again, record_again = fitted(1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert record == record_again
    other, _ = fitted(2)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_pretraining_reports_its_checks(log: InteractionLog) -> None:
    told: list[tuple[int, float]] = []
    _, record = pretrain_with_record(log, SMALL, SHORT, after_check=lambda *check: told.append(check))
    assert [step for step, _ in told] == [4, 8, 12]
    assert told == record.objectives[1:]


def test_pretraining_refuses_logs_of_two_worlds(log: InteractionLog) -> None:
    with pytest.raises(ConfigError, match="both must come from one world"):
        pretrain(log, SMALL, SHORT, validation=log_of([[0], [1]], 3))
