"""`TruthSupervised`: its loss four ways and in one context; whose truth it learns; what it reaches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from recsim_gr import generation
from recsim_gr.agents import Agent, TruthSupervised
from recsim_gr.agents.truth_supervised import satisfaction_loss, users_of
from recsim_gr.backbones import Backbone
from recsim_gr.errors import ConfigError
from recsim_gr.generation import Plan, generate
from recsim_gr.histories import Histories
from recsim_gr.log import InteractionLog
from recsim_gr.observations import Contexts, Observations
from recsim_gr.training import TrainingConfig
from recsim_gr.world import World, WorldConfig

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)

Make = Callable[..., Agent]


def random_rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_available(seed: int, *shape: int) -> Tensor:
    available = random_rows(seed, *shape) > -0.5
    available[..., 0] = True
    return available


# -- the loss, four ways ------------------------------------------------------------------------------------------


def test_the_loss_by_hand() -> None:
    """Errors 1, −2 and (not available) 9: ½(1 + 4)/2 = 1.25; with all three available ½(1 + 4 + 81)/3 = 14.33."""
    q, truth = torch.tensor([[[3.0, 1.0, 10.0]] * 2]), torch.tensor([[2.0, 3.0, 1.0]])
    available = torch.tensor([[[True, True, False], [True, True, True]]])
    np.testing.assert_allclose(satisfaction_loss(q, truth, available), [[1.25, 43 / 3]], rtol=1e-6)


def test_with_one_available_title_it_is_regression_on_that_title() -> None:
    """What CQL's loss is without conservatism: ½(Q − r)²."""
    q, truth, chosen = random_rows(0, 2, 3, 4), random_rows(1, 2, 4), torch.tensor([[0, 1, 2], [3, 3, 0]])
    available = torch.nn.functional.one_hot(chosen, 4).bool()
    own = q.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(satisfaction_loss(q, truth, available), 0.5 * (own - truth.gather(1, chosen)) ** 2)


def test_gradient_of_the_loss() -> None:
    """(Q − s)/(number available) where available, 0 elsewhere, even where Q is very negative."""
    q, truth, available = random_rows(0, 2, 3, 5), random_rows(1, 2, 5), some_available(2, 2, 3, 5)
    x = q.clone().requires_grad_()
    assert gradcheck(lambda x: satisfaction_loss(x, truth, available), (x,))
    satisfaction_loss(x, truth, available).sum().backward()
    expected = (q - truth[:, None]) / available.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(x.grad, torch.where(available, expected, 0.0))
    masked = satisfaction_loss(torch.where(available, q, -1e9), truth, available)
    torch.testing.assert_close(masked, satisfaction_loss(q, truth, available))


@PROPERTY
@given(st.floats(-3, 3), st.floats(0.1, 5), st.integers(0, 99))
def test_it_knows_differences_in_their_unit(level: float, unit: float, seed: int) -> None:
    q, truth, available = random_rows(seed, 1, 2, 4), random_rows(seed + 1, 1, 4), some_available(seed, 1, 2, 4)
    moved = satisfaction_loss(unit * q + level, unit * truth + level, available)
    torch.testing.assert_close(moved, unit**2 * satisfaction_loss(q, truth, available))


def test_its_optimum_is_the_mean_satisfaction_of_those_who_share_a_context() -> None:
    """Two users in one context, seen three times and once: Q = ¾·s₁ + ¼·s₂."""
    truth = torch.tensor([[1.5, 4.0, 2.0, 5.0, 3.0], [2.5, 1.0, 2.0, 1.0, 5.0]], dtype=torch.float64)
    share, everything = torch.tensor([0.75, 0.25], dtype=torch.float64), torch.ones(2, 1, 5, dtype=torch.bool)
    q = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([q], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimiser.zero_grad()
        loss = (share @ satisfaction_loss(q.expand(2, 1, 5), truth, everything)).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(q.detach(), share @ truth, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: satisfaction_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3).bool()),
        lambda: satisfaction_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.ones(2, 3, 4).bool()),
        lambda: satisfaction_loss(torch.zeros(2, 3, 4), torch.zeros(2, 4), torch.ones(2, 4).bool()),
    ],
)
def test_wrong_shapes_are_refused(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match="takes"):
        call()


# -- in the agent -------------------------------------------------------------------------------------------------


def test_its_loss_is_that_of_the_logs_own_users(
    fitted: Callable[[str], Agent], log: InteractionLog, world: World
) -> None:
    """Context by context, by what it answers there, for users in an order that is not the world's."""
    agent: Any = fitted("TruthSupervised")
    order = np.random.default_rng(0).permutation(150)[:12]
    some = InteractionLog(
        **{
            name: getattr(log, name).reshape(150, 6)[order].ravel()
            for name in ("user", "epoch", "step", "hours", "title", "duration_minutes", "watch_minutes", "score")
        },
        n_titles=30,
    )
    whole, losses = some.sequences(), []
    for step in range(6):
        seen = Observations(
            whole.titles[:, :step],
            whole.scores[:, :step],
            whole.times[:, :step],
            np.full(12, step),
            whole.epoch,
            30,
        )
        error = agent.scores(seen).astype(np.float64) - world.satisfaction(log.user[::6][order])
        losses.append(0.5 * np.mean(error**2, axis=1, where=~seen.seen()))
    with torch.no_grad():
        got = float(agent._batch_loss(next(Histories(some).chunks()), users_of(some, world)))
    assert got == pytest.approx(np.mean(losses), abs=1e-4)
    assert np.mean(losses) < 0.4 * world.satisfaction(log.user[::6]).var() / 2


def test_it_needs_no_scores_to_know_what_is_worth_showing(
    make: Make, world: World, backbone: Backbone, contexts: Contexts
) -> None:
    """As many events whose scores are all the same: its ranking is far above imitation's, and near the oracle's."""
    log = world.generate_log(150)
    names = ("user", "epoch", "step", "hours", "title", "duration_minutes", "watch_minutes")
    flat = InteractionLog(
        **{name: getattr(log, name) for name in names}, score=np.full(len(log), 3.0, dtype=np.float32), n_titles=30
    )
    steps = TrainingConfig(steps=96, batch_users=32, warmup_steps=5, checks=2)
    truth, unseen = world.satisfaction(contexts.users), ~contexts.observations.seen()
    best = np.where(unseen, truth, 0).max(axis=1).mean()
    got = {}
    for name in ("BC", "TruthSupervised"):
        scores = make(name, training=steps).fit(flat, backbone).scores(contexts.observations)
        got[name] = truth[np.arange(20), scores.argmax(axis=1)].mean()
    assert got["TruthSupervised"] > got["BC"] + 0.7
    assert best - 0.5 < got["TruthSupervised"] <= best


def test_users_who_may_abandon_a_title_are_worth_less() -> None:
    """It learns what the oracle ranks by: the lowest score where a title is abandoned."""
    world = World(WorldConfig(n_titles=12, history_length=4, accept=1.0))
    agent, log = TruthSupervised().meet(world), world.generate_log(6)
    seen: list[np.ndarray] = []

    def asked(users: np.ndarray) -> Any:
        seen.append(users)
        return type(world).worth(world, users)

    agent.world = type("Referee", (), {"worth": staticmethod(asked)})()
    agent.q_function = type("Q", (), {"backbone": type("B", (), {"n_titles": 12})})()
    zero = torch.zeros(6, 4, 12)
    agent._q = lambda batch: zero  # type: ignore[method-assign]
    batch = next(Histories(log).chunks())
    got = float(agent._batch_loss(batch, log.user[::4]))
    np.testing.assert_array_equal(seen[0], log.user[::4])
    worth = world.worth(log.user[::4])
    assert not np.array_equal(worth, world.satisfaction(log.user[::4]))
    titles = log.title.reshape(6, 4)
    expected = [
        0.5 * np.mean(np.delete(worth[user], titles[user, :step]) ** 2) for user in range(6) for step in range(4)
    ]
    assert got == pytest.approx(np.mean(expected), abs=1e-4)


def test_users_of_a_log_in_shards_are_those_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = WorldConfig(n_titles=12, history_length=4)
    monkeypatch.setattr(generation, "PART_EVENTS", 20)
    shards = generate(Plan(world=config, n_users=30, users_per_shard=10), tmp_path)
    users = users_of(shards, World(config))
    np.testing.assert_array_equal(users, users_of(shards.read(), World(config)))
    np.testing.assert_array_equal(users, World(config).users("train", 30))


def test_another_worlds_log_is_refused(log: InteractionLog, backbone: Backbone) -> None:
    for other in (WorldConfig(n_titles=12, history_length=4), WorldConfig(n_titles=30, history_length=6, seed=1)):
        with pytest.raises(ConfigError, match="another world than the one that TruthSupervised met"):
            TruthSupervised().meet(World(other)).fit(log, backbone)
