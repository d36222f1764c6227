"""Reward-conditioned imitation: its states four ways, the policy it finds, and what it answers when asked for much."""

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

from recsim_gr.agents import Agent, ConditionedBC
from recsim_gr.agents.base import backbone_log_probs
from recsim_gr.agents.bc import bc_loss
from recsim_gr.agents.conditioned_bc import ConditionedPolicy, conditioned_states, score_statistics
from recsim_gr.backbones import HSTU, HSTUConfig
from recsim_gr.errors import ConfigError
from recsim_gr.histories import Histories
from recsim_gr.log import InteractionLog
from recsim_gr.observations import Contexts, Observations
from recsim_gr.prefixes import prefix_log_probs

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
TINY = HSTUConfig(dimensions=4, n_layers=1, max_length=3)
MU = torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05], dtype=torch.float64)


def random_rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- four ways ----------------------------------------------------------------------------------------------------


def test_the_state_by_hand() -> None:
    """h = (1, 2), W₁ doubles the first and swaps in nothing else, v₁ = (0, 1): W₁h + v₁ = (2, 1). W₂ takes the second
    into the first, v₂ = 0: W₂h + v₂ = (2, 0). At z = 2: (1, 2) + 2·(2, 1) + 3·(2, 0) = (11, 4); at z = −1:
    (1, 2) − (2, 1) = (−1, 1)."""
    h = torch.tensor([1.0, 2.0], dtype=torch.float64).expand(2, 2)
    mixes = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)
    levels = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    got = conditioned_states(h, torch.tensor([2.0, -1.0], dtype=torch.float64), mixes, levels)
    np.testing.assert_allclose(got, [[11.0, 4.0], [-1.0, 1.0]])


def test_without_weights_the_score_says_nothing() -> None:
    """Where it starts it is the plain backbone, and its loss is imitation's."""
    states, z = random_rows(0, 3, 4, 5), random_rows(1, 3, 4)
    zeros = torch.zeros(2, 5, 5, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64)
    assert torch.equal(conditioned_states(states, z, *zeros), states)


def test_gradient() -> None:
    states, z = random_rows(0, 3, 4).requires_grad_(), random_rows(1, 3)
    mixes, levels = random_rows(2, 2, 4, 4).requires_grad_(), random_rows(3, 2, 4).requires_grad_()
    assert gradcheck(lambda *x: conditioned_states(x[0], z, *x[1:]), (states, mixes, levels))
    # through the loss at W = v = 0: of a title's logit by W₁ it is z·title·h, so of the loss z·(Σ π title − title_a)·h
    titles, chosen = random_rows(4, 6, 4), torch.tensor([5, 0, 2])
    flat = torch.zeros(2, 4, 4, dtype=torch.float64, requires_grad=True)
    h = states.detach()
    logits = conditioned_states(h, z, flat, torch.zeros(2, 4, dtype=torch.float64)) @ titles.T
    bc_loss(logits.log_softmax(-1).gather(1, chosen[:, None])).sum().backward()
    away = torch.softmax(h @ titles.T, dim=-1) @ titles - titles[chosen]
    assert flat.grad is not None
    torch.testing.assert_close(flat.grad[0], torch.einsum("n,ni,nj->ij", z, away, h))
    torch.testing.assert_close(flat.grad[1], torch.einsum("n,ni,nj->ij", z**2 - 1, away, h))


@PROPERTY
@given(st.floats(-5, 5), st.floats(0.1, 10), st.integers(0, 99))
def test_scores_have_no_unit(shift: float, unit: float, seed: int) -> None:
    """Scores, mean and deviation in another unit move the state as much."""
    scores, backbone = 3.0 + random_rows(seed, 7).float(), HSTU(TINY, 6)
    states = random_rows(seed + 1, 7, 4).float()
    got = []
    for a, b in ((1.0, 0.0), (unit, shift)):
        policy = ConditionedPolicy(backbone, a * 3.1 + b, a * 0.9)
        with torch.no_grad():
            policy.mixes.copy_(random_rows(seed + 2, 2, 4, 4))
            policy.levels.copy_(random_rows(seed + 3, 2, 4))
            got.append(policy.states(states, a * scores + b))
    torch.testing.assert_close(*got, atol=1e-3, rtol=1e-3)


def test_outliers_are_cut() -> None:
    policy = ConditionedPolicy(HSTU(TINY, 6), 3.0, 0.5)
    with torch.no_grad():
        policy.levels.fill_(1.0)
    far = policy.states(torch.zeros(3, 4), torch.tensor([4.5, 40.0, 4.4]))
    assert torch.equal(far[0], far[1])
    assert far[2, 0] < far[0, 0]


@pytest.mark.parametrize(
    "shapes",
    [
        [(3, 4), (2,), (2, 4, 4), (2, 4)],
        [(3, 4), (3, 4), (2, 4, 4), (2, 4)],
        [(3, 4), (3,), (2, 4, 5), (2, 4)],
        [(3, 4), (3,), (2, 4, 4), (1, 4)],
    ],
)
def test_wrong_shapes_are_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"conditioned_states takes .*got"):
        conditioned_states(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize(("option", "value"), [("target", -0.1), ("target", 1.5), ("condition_rate", 0.0)])
def test_values_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"ConditionedBCConfig\.{option} must be"):
        ConditionedBC(**{option: value})


# -- what it finds ------------------------------------------------------------------------------------------------


def minimise(loss: Callable[[], Tensor], parameters: list[Tensor]) -> None:
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=4_000, tolerance_grad=1e-11, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Any:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)


def posterior(likelihood: Tensor) -> Tensor:
    """(R, 5): μ(a)·p(r|a)/Z of (5, R) likelihoods."""
    joint = (MU[:, None] * likelihood).T
    return joint / joint.sum(dim=1, keepdim=True)


def test_the_loss_finds_the_posterior_over_titles() -> None:
    """Any scores: a table of logits, a row a score: π(a|x,c) = μ(a|x)·p(r = c|x,a)/Z."""
    likelihood = torch.softmax(2 * random_rows(0, 5, 4), dim=1)
    table = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        return ((MU[:, None] * likelihood).T * bc_loss(table.log_softmax(-1))).sum()

    minimise(loss, [table])
    torch.testing.assert_close(torch.softmax(table.detach(), -1), posterior(likelihood), atol=1e-5, rtol=0)


def test_states_that_are_moved_find_it_where_scores_are_normal() -> None:
    """Titles that differ in mean and in deviation, scores on a grid: z and z² are all that is needed, in one context
    whose state is (1, 0, 0, 0, 0) and where titles are unit vectors."""
    z = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    mean = torch.tensor([-1.0, 0.5, 0.0, 1.0, 0.5], dtype=torch.float64)[:, None]
    deviation = torch.tensor([0.6, 0.8, 1.2, 0.7, 0.5], dtype=torch.float64)[:, None]
    likelihood = torch.softmax(-((z - mean) ** 2) / (2 * deviation**2), dim=1)
    state = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    mixes = torch.zeros(2, 5, 5, dtype=torch.float64, requires_grad=True)
    levels = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)

    def log_probs() -> Tensor:
        return conditioned_states((state + torch.eye(5)[0]).expand(7, 5), z, mixes, levels).log_softmax(-1)

    def loss() -> Tensor:
        return ((MU[:, None] * likelihood).T * bc_loss(log_probs())).sum()

    minimise(loss, [state, mixes, levels])
    found = log_probs().detach().exp()
    torch.testing.assert_close(found, posterior(likelihood), atol=1e-4, rtol=0)
    # asked for the most it names title 3, of the highest mean, and asked for the least title 0; the widest comes third
    assert found[-1].argmax() == 3
    assert found[0].argmax() == 0
    assert (found[-1] / MU)[2] < (found[-1] / MU)[3]


# -- the agent ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def telling(log: InteractionLog) -> InteractionLog:
    """Scores that the title alone decides: 1 for the first, 5 for the last."""
    return replace(log, score=(1.0 + 4.0 * log.title / 29.0).astype(np.float32))


def asked_for(agent: ConditionedBC, score: float, observations: Observations) -> float:
    """The mean score of a title of its policy."""
    agent.policy.target.fill_(score)
    return float((np.exp(agent.log_probs(observations)) @ (1.0 + 4.0 * np.arange(30) / 29.0)).mean())


def test_asked_for_high_scores_it_names_titles_that_have_them(
    make: Callable[..., Agent], telling: InteractionLog, backbone: HSTU, contexts: Contexts
) -> None:
    agent: Any = make("ConditionedBC").fit(telling, backbone)
    train = telling.rows(slice(0, 6 * 135))  # nine tenths of the users
    assert agent.policy.target.item() == pytest.approx(np.quantile(train.score, 0.9))
    assert agent.policy.mean.item() == pytest.approx(train.score.mean())
    observations = contexts.observations
    answers = [asked_for(agent, score, observations) for score in (1.2, 2.0, 3.0, 4.0, 4.8)]
    assert (np.diff(answers) > 0.3).all()
    imitation = float((np.exp(backbone_log_probs(backbone, observations)) @ (1 + 4 * np.arange(30) / 29)).mean())
    assert answers[0] < imitation - 0.7
    assert answers[-1] > imitation + 0.7


def test_where_it_starts_it_is_the_backbone(log: InteractionLog, backbone: HSTU, contexts: Contexts) -> None:
    agent: Any = ConditionedBC()
    agent.policy = ConditionedPolicy(backbone, 3.0, 1.0, 4.5)
    plain = backbone_log_probs(backbone, contexts.observations)
    np.testing.assert_array_equal(agent.log_probs(contexts.observations), plain)
    batch = next(Histories(log).chunks())
    with torch.no_grad():
        torch.testing.assert_close(agent.policy.log_probs(batch), prefix_log_probs(backbone, batch))


def test_a_title_is_given_its_own_score_and_the_policy_the_target(log: InteractionLog, backbone: HSTU) -> None:
    """One context at a time: log π(a|x,r) of the batch is that of the answer when r is asked for."""
    agent: Any = ConditionedBC()
    agent.policy = ConditionedPolicy(backbone, 3.0, 1.2)
    with torch.no_grad():
        agent.policy.mixes.copy_(0.3 * random_rows(0, 2, 8, 8))
        agent.policy.levels.copy_(0.3 * random_rows(1, 2, 8))
        batch = next(Histories(log).chunks())
        log_probs = agent.policy.log_probs(batch)
    whole = log.sequences()
    for row, step in ((0, 0), (1, 3), (2, 5)):
        one = slice(row, row + 1)
        seen = Observations(
            whole.titles[one, :step],
            whole.scores[one, :step],
            whole.times[one, :step],
            np.array([step]),
            whole.epoch[one],
            30,
        )
        agent.policy.target.fill_(float(whole.scores[row, step]))
        answer = agent.log_probs(seen)[0, whole.titles[row, step]]
        assert log_probs[row, step].item() == pytest.approx(answer, abs=1e-4)
    assert math.isfinite(log_probs.sum().item())


def test_what_is_known_of_scores(log: InteractionLog) -> None:
    mean, deviation, target = score_statistics(Histories(log), 0.75)
    assert mean == pytest.approx(log.score.mean(), rel=1e-5)
    assert deviation == pytest.approx(log.score.std(), rel=1e-5)
    assert target == pytest.approx(np.quantile(log.score, 0.75), rel=1e-6)
    flat = replace(log, score=np.full(len(log), 2.5, dtype=np.float32))
    assert score_statistics(Histories(flat), 0.9) == (2.5, 1.0, 2.5)
