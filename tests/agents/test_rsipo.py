"""IPO: its loss four ways, the policy it finds, what it shares with DPO and where it parts from it, and the agent."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from recsim_gr.agents import RSDPO, RSIPO
from recsim_gr.agents.base import Parts, Problem
from recsim_gr.agents.rsdpo import dpo_loss, drawn_pairs
from recsim_gr.agents.rsipo import ipo_loss
from recsim_gr.backbones import HSTU
from recsim_gr.errors import ConfigError
from recsim_gr.histories import Batch, Histories
from recsim_gr.log import InteractionLog
from recsim_gr.prefixes import prefix_logits
from recsim_gr.rewards import RewardEnsemble

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
REF = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64)
R = torch.tensor([1.5, 4.0, 2.0, 5.0, 3.0], dtype=torch.float64)


def random_rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def minimise(loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The policy over five titles at the lowest loss."""
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [x], max_iter=2_000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Any:
        optimiser.zero_grad()
        value = loss(x)
        value.backward()
        return value

    optimiser.step(closure)
    return torch.softmax(x.detach(), dim=0)


# -- four ways ----------------------------------------------------------------------------------------------------


def test_the_loss_by_hand() -> None:
    """Log-ratios 2 and −1, margin 3; τ = ½ aims at 1: (3 − 1)² = 4; τ = .1 aims at 5: (3 − 5)² = 4; τ = ⅙ at 3: 0."""
    w, l, wr, lr = torch.tensor([[-1.0], [-3.0], [-3.0], [-2.0]], dtype=torch.float64)  # noqa: E741
    for tau, expected in ((0.5, 4.0), (0.1, 4.0), (1 / 6, 0.0)):
        assert ipo_loss(w, l, wr, lr, tau).item() == pytest.approx(expected, abs=1e-12)
    # the other way round the margin is −3: (−3 − 1)²
    assert ipo_loss(l, w, lr, wr, 0.5).item() == pytest.approx(16.0)


def test_at_the_reference_it_pulls_where_dpo_pulls() -> None:
    """At margin 0 the slopes are −1/τ and −β/2: one direction, in the proportion 2/(τβ)."""
    ref = random_rows(0, 2, 6)
    slopes = []
    for loss in (lambda w, l: ipo_loss(w, l, ref[0], ref[1], 0.3), lambda w, l: dpo_loss(w, l, ref[0], ref[1], 0.7)):  # noqa: E741
        own = ref.clone().requires_grad_()
        loss(own[0], own[1]).sum().backward()
        assert own.grad is not None
        slopes.append(own.grad)
    torch.testing.assert_close(slopes[0], slopes[1] * 2 / (0.3 * 0.7))


def test_with_an_infinite_tau_it_holds_to_the_reference() -> None:
    own, ref = random_rows(0, 2, 5), random_rows(1, 2, 5)
    margin = (own[0] - ref[0]) - (own[1] - ref[1])
    torch.testing.assert_close(ipo_loss(own[0], own[1], ref[0], ref[1], 1e12), margin**2)
    assert not ipo_loss(ref[0], ref[1], ref[0], ref[1], 1e12).gt(1e-20).any()


def test_gradient() -> None:
    w, l, wr, lr = random_rows(0, 4, 6).unbind()  # noqa: E741
    w, l = w.clone().requires_grad_(), l.clone().requires_grad_()  # noqa: E741
    assert gradcheck(lambda a, b: ipo_loss(a, b, wr, lr, 0.4), (w, l))
    ipo_loss(w, l, wr, lr, 0.4).sum().backward()
    # 2(h − 1.25): the winner is pushed down once the margin is passed, as DPO never does
    margin = ((w - wr) - (l - lr)).detach()
    torch.testing.assert_close(w.grad, 2 * (margin - 1.25))
    torch.testing.assert_close(l.grad, -2 * (margin - 1.25))
    assert (margin > 1.25).any()
    assert (margin < 1.25).any()


@PROPERTY
@given(st.floats(-5, 5), st.floats(-5, 5), st.integers(0, 99))
def test_logits_will_do_for_log_probabilities(shift: float, shift_ref: float, seed: int) -> None:
    w, l, wr, lr = random_rows(seed, 4, 3).unbind()  # noqa: E741
    moved = ipo_loss(w + shift, l + shift, wr + shift_ref, lr + shift_ref, 0.4)
    torch.testing.assert_close(moved, ipo_loss(w, l, wr, lr, 0.4), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("shape", [(2, 2), ()])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    one = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"ipo_loss takes .*got"):
        ipo_loss(one, one, one, one, 1.0)
    with pytest.raises(ValueError, match=r"ipo_loss takes .*got \(2,\), \(2,\), \(2,\), \(3,\)"):
        ipo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(3), 1.0)


def test_values_out_of_range_are_refused() -> None:
    for options in ({"tau": 0.0}, {"tau": -0.1}, {"candidates": 1}, {"interval": -1.0}):
        (name,) = options
        with pytest.raises(ConfigError, match=rf"RSIPOConfig\.{name} must be"):
            RSIPO(**options)


# -- what it finds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_it_finds_the_reference_tilted_by_how_often_a_title_wins(tau: float) -> None:
    """All ordered pairs, the winner with chance p = σ(r − r'): π = π_ref·exp(E_a'[p(a ≻ a')]/τ)/Z, where a' is uniform
    over the five titles, itself included at p = ½."""
    winner, loser = (x.flatten() for x in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
    share, ref = torch.sigmoid(R[winner] - R[loser]), REF.log()

    def loss(logits: Tensor) -> Tensor:
        own = torch.log_softmax(logits, dim=0)
        return (share * ipo_loss(own[winner], own[loser], ref[winner], ref[loser], tau)).mean()

    wins = torch.sigmoid(R[:, None] - R).mean(dim=1)
    expected = REF * torch.exp(wins / tau)
    torch.testing.assert_close(minimise(loss), expected / expected.sum(), atol=1e-6, rtol=0)


def test_certain_labels_have_a_finite_optimum() -> None:
    """All pairs with p = 1 for the better title: the k-th best of five wins 4 − k of the others and half of itself,
    (4.5 − k)/5, so that neighbours end .2/τ apart in log(π/π_ref)."""
    order = R.argsort(descending=True)
    pairs = [(order[i], order[j]) for i in range(5) for j in range(i + 1, 5)]
    winner, loser = (torch.stack(side) for side in zip(*pairs, strict=True))
    ref = REF.log()

    def loss(logits: Tensor) -> Tensor:
        own = torch.log_softmax(logits, dim=0)
        return ipo_loss(own[winner], own[loser], ref[winner], ref[loser], 0.4).mean()

    tilt = (minimise(loss) / REF).log()[order]
    torch.testing.assert_close(tilt.diff(), torch.full((4,), -0.2 / 0.4, dtype=torch.float64), atol=1e-6, rtol=0)


# -- the agent ----------------------------------------------------------------------------------------------------


def problem_of(agent: Any, log: InteractionLog, parts: Parts) -> tuple[Problem, Batch]:
    histories = Histories(log)
    return agent.problem(histories, log, parts), next(histories.chunks())


def test_its_pairs_are_those_of_rsdpo(log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble) -> None:
    parts = Parts(backbone, rewards, seed=3, purpose="train")
    options = {"candidates": 4, "interval": 0.5}
    ipo, dpo = (problem_of(agent(**options), log, parts)[0].extra for agent in (RSIPO, RSDPO))
    assert set(ipo) == {"titles", "reference", "kept"}
    for name, value in ipo.items():
        assert torch.equal(value, dpo[name])
    assert 0 < ipo["kept"].sum() < len(log)


def test_a_title_is_no_pair_with_itself(log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble) -> None:
    """Not where intervals may overlap either, as in the study's sentence read literally."""
    parts = Parts(backbone, rewards, seed=3, purpose="train")
    extra = problem_of(RSIPO(candidates=2, literal=True, interval=5.0), log, parts)[0].extra
    twice = extra["titles"][..., 0] == extra["titles"][..., 1]
    assert twice.sum() > 20
    assert not extra["kept"][twice].any()
    assert extra["kept"][~twice].all()


def test_every_chunk_has_draws_of_its_own(log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble) -> None:
    class Twice(Histories):
        """The same users in two chunks."""

        def chunks(self, users: int = 256) -> Iterator[Batch]:
            yield from (batch for batch in super().chunks(users) for _ in range(2))

    pairs = drawn_pairs(backbone, Twice(log), rewards.on(log), candidates=4, width=0.0, seed=0)
    one, two = pairs["titles"].chunk(2)
    assert (one != two).float().mean() > 0.5


def test_the_loss_in_the_agent(log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble) -> None:
    """Where it starts every pair's margin is 0: (1/(2τ))². Elsewhere, against NumPy, pair by pair."""
    agent = RSIPO(tau=0.25)
    problem, batch = problem_of(agent, log, Parts(backbone, rewards, seed=0, purpose="train"))
    other = HSTU(backbone.config, 30).eval()
    with torch.no_grad():
        assert float(agent.batch_loss(backbone, batch, problem)) == pytest.approx(4.0, abs=1e-4)
        got = float(agent.batch_loss(other, batch, problem))
        own, ref = (prefix_logits(policy, batch).log_softmax(-1).double().numpy() for policy in (other, backbone))
    losses = []
    for row, step in problem.extra["kept"].nonzero().tolist():
        if row < len(batch.rows):
            winner, loser = problem.extra["titles"][row, step].tolist()
            ratio = own[row, step] - ref[row, step]
            losses.append((ratio[winner] - ratio[loser] - 2.0) ** 2)
    assert len(losses) > 50
    assert got == pytest.approx(np.mean(losses), rel=1e-4)


def test_it_learns_and_stops_at_its_margin(log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble) -> None:
    """On one batch of sure pairs with a short margin: DPO goes on where IPO is done."""
    parts, margins = Parts(backbone, rewards, seed=0, purpose="train"), {}
    for agent in (RSIPO(tau=1.0), RSDPO(beta=1.0)):
        problem, batch = problem_of(agent, log, parts)
        policy = HSTU(backbone.config, 30)
        policy.load_state_dict(backbone.state_dict())
        policy.eval()  # without dropout
        optimiser = torch.optim.Adam(policy.parameters(), lr=1e-2)
        for _ in range(60):
            optimiser.zero_grad()
            agent.batch_loss(policy, batch, problem).backward()
            optimiser.step()
        with torch.no_grad():
            chosen = prefix_logits(policy, batch).gather(-1, problem.extra["titles"][batch.rows])
        kept = problem.extra["kept"][batch.rows]
        own = (chosen - problem.extra["reference"][batch.rows])[kept]
        margins[agent.name] = (own[:, 0] - own[:, 1]).mean().item()
    assert margins["RSIPO"] == pytest.approx(1 / (2 * 1.0), abs=0.15)
    assert margins["RSDPO"] > 2 * margins["RSIPO"]
    assert math.isfinite(margins["RSDPO"])
