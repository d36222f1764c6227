"""Filtered imitation: what is kept, its loss four ways, the policy it finds, and the agent."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from recsim_gr.agents import BC, FilteredBC
from recsim_gr.agents.base import Parts
from recsim_gr.agents.bc import bc_loss
from recsim_gr.agents.filtered_bc import filtered_bc_loss, top_events
from recsim_gr.backbones import HSTU
from recsim_gr.errors import ConfigError
from recsim_gr.histories import Batch, Histories
from recsim_gr.log import InteractionLog
from recsim_gr.prefixes import prefix_log_probs

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
YES = torch.ones(1, 5, dtype=torch.bool)


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- what is kept -------------------------------------------------------------------------------------------------


def test_the_top_by_hand() -> None:
    """Of five, .2 is one, .21 is two; of the row with three events, .2 is one as well (.6 rounded up)."""
    scores = rows([3.0, 1.0, 5.0, 4.0, 2.0])
    assert top_events(scores, YES, 0.2).tolist() == [[False, False, True, False, False]]
    assert top_events(scores, YES, 0.21).tolist() == [[False, False, True, True, False]]
    assert top_events(scores, YES, 1.0).all()
    two = torch.cat([scores, rows([2.0, 3.0, 1.0, 9.0, 9.0])])
    valid = torch.tensor([[True] * 5, [True, True, True, False, False]])
    assert top_events(two, valid, 0.2)[1].tolist() == [False, True, False, False, False]
    assert not top_events(two, torch.zeros(2, 5, dtype=torch.bool), 0.2).any()


def test_ties_are_kept_together() -> None:
    scores = rows([5.0, 1.0, 5.0, 5.0, 2.0])
    assert top_events(scores, YES, 0.2).tolist() == [[True, False, True, True, False]]
    assert top_events(torch.full((1, 5), 3.0), YES, 0.2).all()


def test_rounding_does_not_add_an_event() -> None:
    """0.28·25 = 7.000000000000001 in floating point."""
    assert math.ceil(0.28 * 25) == 8
    scores = torch.randperm(25, generator=torch.Generator().manual_seed(0))[None].double()
    assert top_events(scores, torch.ones(1, 25, dtype=torch.bool), 0.28).sum() == 7


@PROPERTY
@given(st.integers(0, 99), st.floats(0.01, 1.0), st.floats(0.1, 3), st.floats(-5, 5))
def test_only_the_order_of_scores_counts(seed: int, fraction: float, unit: float, shift: float) -> None:
    """Any rising function of the scores keeps the same events, in any order, and at least the fraction of them."""
    scores, valid = random_rows(seed, 3, 8), random_rows(seed + 1, 3, 8) > -0.5
    kept = top_events(scores, valid, fraction)
    assert torch.equal(top_events(torch.exp(unit * scores) + shift, valid, fraction), kept)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(top_events(scores[:, order], valid[:, order], fraction), kept[:, order])
    assert (kept.sum(dim=1) == torch.ceil(fraction * valid.sum(dim=1) - 1e-9)).all()  # no ties here
    for row in range(3):
        if (~kept[row] & valid[row]).any() and kept[row].any():
            assert scores[row][kept[row]].min() > scores[row][~kept[row] & valid[row]].max()


# -- the loss -----------------------------------------------------------------------------------------------------


def test_the_loss_by_hand() -> None:
    """−ln ½ where kept, nothing where not, −(−1)."""
    kept = torch.tensor([[True, False, True]])
    got = filtered_bc_loss(rows([math.log(0.5), math.log(0.25), -1.0]), kept)
    np.testing.assert_allclose(got, [[0.6931472, 0.0, 1.0]], rtol=1e-6)


def test_if_all_is_kept_it_is_imitation() -> None:
    log_probs = random_rows(0, 3, 5)
    kept = top_events(random_rows(1, 3, 5), torch.ones(3, 5, dtype=torch.bool), 1.0)
    assert torch.equal(filtered_bc_loss(log_probs, kept), bc_loss(log_probs))


def test_gradient() -> None:
    """−1 at what is kept, 0 elsewhere."""
    log_probs, kept = random_rows(0, 2, 3).requires_grad_(), torch.tensor([[True, False, True], [False, True, False]])
    assert gradcheck(lambda x: filtered_bc_loss(x, kept), (log_probs,))
    filtered_bc_loss(log_probs, kept).sum().backward()
    torch.testing.assert_close(log_probs.grad, -kept.double())


@pytest.mark.parametrize(
    "call",
    [
        lambda: top_events(torch.zeros(3), torch.ones(3, dtype=torch.bool), 0.5),
        lambda: top_events(torch.zeros(2, 3), torch.ones(3, dtype=torch.bool), 0.5),
        lambda: top_events(torch.zeros(2, 3), torch.ones(2, 3), 0.5),
        lambda: filtered_bc_loss(torch.zeros(2, 3), torch.ones(2, 3)),
        lambda: filtered_bc_loss(torch.zeros(3), torch.ones(3, dtype=torch.bool)),
    ],
)
def test_wrong_shapes_are_refused(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"takes .*got"):
        call()


@pytest.mark.parametrize(("option", "value"), [("fraction", 0.0), ("fraction", 1.1), ("by", "title")])
def test_values_out_of_range_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"FilteredBCConfig\.{option} must be"):
        FilteredBC(**{option: value})


def test_it_finds_mu_times_the_chance_of_a_high_score() -> None:
    """Five titles whose scores have three values each; the top quarter is what reaches q = 4, here 30 % with its ties:
    π = μ·P(r ≥ q|a)/Z. The title that always scores 3.9 is not imitated at all."""
    mu = torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05], dtype=torch.float64)
    scores = rows([3.9, 3.9, 3.9], [1.0, 2.0, 4.0], [1.0, 4.0, 4.5], [2.0, 3.0, 5.0], [4.0, 4.0, 5.0])
    chances = rows([0.3, 0.4, 0.3], [0.4, 0.4, 0.2], [0.4, 0.3, 0.3], [0.4, 0.4, 0.2], [0.2, 0.2, 0.6])
    counts = ((mu[:, None] * chances) * 2_000).round().long()
    titles = torch.arange(5).repeat_interleave(counts.sum(dim=1))
    every = scores.flatten().repeat_interleave(counts.flatten())[None]
    kept = top_events(every, torch.ones_like(every, dtype=torch.bool), 0.2)
    reaches = (chances * (scores >= 4.0)).sum(dim=1)
    assert kept.double().mean().item() == pytest.approx((mu * reaches).sum().item())
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=2_000, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimiser.zero_grad()
        loss = filtered_bc_loss(torch.log_softmax(logits, dim=0)[titles][None], kept).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    expected = mu * reaches / (mu * reaches).sum()
    torch.testing.assert_close(torch.softmax(logits.detach(), dim=0), expected, atol=1e-5, rtol=0)
    assert expected[0] == 0.0


# -- the agent ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ragged(log: InteractionLog) -> InteractionLog:
    """Histories of one to six events."""
    keep = np.concatenate([np.arange(6 * user, 6 * user + 1 + user % 6) for user in range(30)])
    columns = ("user", "epoch", "step", "hours", "title", "duration_minutes", "watch_minutes", "score")
    return InteractionLog(**{name: getattr(log, name)[keep] for name in columns}, n_titles=log.n_titles)


def kept_of(log: InteractionLog, backbone: HSTU, **options: Any) -> tuple[torch.Tensor, Batch]:
    histories = Histories(log)
    problem = FilteredBC(**options).problem(histories, log, Parts(backbone, None))
    return problem.extra["kept"], next(histories.chunks())


def test_the_threshold_is_that_of_the_whole_log(ragged: InteractionLog, backbone: HSTU) -> None:
    kept, batch = kept_of(ragged, backbone, fraction=0.2, by="score")
    n = math.ceil(0.2 * len(ragged))
    threshold = np.sort(ragged.score)[-n]
    assert torch.equal(kept, (batch.scores >= threshold) & batch.valid)
    assert kept.sum() >= n
    assert not kept.any(dim=1).all()  # some users have nothing that good


def test_or_that_of_each_user(ragged: InteractionLog, backbone: HSTU) -> None:
    """Every user keeps the best there is, and a user's level does not matter."""
    kept, _ = kept_of(ragged, backbone, fraction=0.2)
    for row in range(30):
        own = np.sort(ragged.score[ragged.user == np.unique(ragged.user)[row]])[::-1]
        assert kept[row].sum() == (own >= own[math.ceil(0.2 * len(own)) - 1]).sum()
    leniency = np.linspace(-0.5, 0.5, 30)[np.searchsorted(np.unique(ragged.user), ragged.user)]
    lenient = replace(ragged, score=(3.0 + 0.4 * (ragged.score - 3.0) + leniency).astype(np.float32))
    assert torch.equal(kept_of(lenient, backbone, fraction=0.2)[0], kept)
    by_score = (kept_of(part, backbone, fraction=0.2, by="score")[0] for part in (lenient, ragged))
    assert not torch.equal(*by_score)


def test_the_loss_is_the_mean_over_what_is_kept(ragged: InteractionLog, backbone: HSTU) -> None:
    agent, histories = FilteredBC(fraction=0.3), Histories(ragged)
    problem, batch = agent.problem(histories, ragged, Parts(backbone, None)), next(histories.chunks())
    with torch.no_grad():
        got = float(agent.batch_loss(backbone, batch, problem))
        log_probs = prefix_log_probs(backbone, batch)
    kept = problem.extra["kept"]
    assert 0.3 <= kept.sum() / batch.valid.sum() < 1.0
    assert got == pytest.approx(-log_probs[kept].mean().item(), abs=1e-5)
    assert abs(got + log_probs[batch.valid].mean().item()) > 1e-3
    problem.extra["kept"] = torch.zeros_like(kept)  # nothing is kept, nothing is learned
    loss = agent.batch_loss(backbone, batch, problem)
    assert loss.item() == 0.0


def test_if_it_keeps_everything_the_agent_is_bc(ragged: InteractionLog, backbone: HSTU) -> None:
    histories, parts = Histories(ragged), Parts(backbone, None)
    batch = next(histories.chunks())
    with torch.no_grad():
        bc, everything, best = (
            float(agent.batch_loss(backbone, batch, agent.problem(histories, ragged, parts)))
            for agent in (BC(), FilteredBC(fraction=1.0), FilteredBC())
        )
    assert everything == pytest.approx(bc, abs=1e-6)
    assert abs(best - bc) > 0.01
