"""Group-relative REINFORCE off-policy: by hand, limits, gradients, invariances; optima under any behaviour policy."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from recsim_gr.agents import GroupREINFORCE
from recsim_gr.agents.base import Parts, backbone_log_probs
from recsim_gr.agents.off_policy_reinforce import one_sided_loss, pairwise_loss, squares
from recsim_gr.agents.ppo import penalised_reward
from recsim_gr.agents.reward_weighted_bc import weighted_bc_loss
from recsim_gr.backbones import HSTU
from recsim_gr.errors import ConfigError
from recsim_gr.histories import Histories
from recsim_gr.log import InteractionLog
from recsim_gr.observations import Observations
from recsim_gr.prefixes import prefix_mask
from recsim_gr.rewards import RewardEnsemble

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
REF = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64)
R = torch.tensor([1.5, 4.0, 2.0, 5.0, 3.0], dtype=torch.float64)
GROUPS = {  # twentieths of titles, drawn by π_ref or by somebody else
    "reference": torch.repeat_interleave(torch.arange(5), torch.tensor([2, 6, 4, 3, 5])),
    "other": torch.repeat_interleave(torch.arange(5), torch.tensor([8, 1, 5, 2, 4])),
}


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    x = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(x), x)
    return found


def minimise(loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The policy over five titles at the lowest loss."""
    x = REF.log().clone().requires_grad_()
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


def shares(values: Tensor) -> Tensor:
    return values / values.sum()


# -- by hand ------------------------------------------------------------------------------------------------------


def test_pairs_by_hand() -> None:
    """r = 4 and 2, τ = ½, log-ratios 1 and 0: c = 3.5 and 2; (1.5)²/4 over 2τ = 1: .5625."""
    got = pairwise_loss(rows([-1.0, -2.0]), rows([-2.0, -2.0]), rows([4.0, 2.0]), 0.5)
    np.testing.assert_allclose(got, [0.5625])


def test_regularisers_by_hand() -> None:
    """½·½·2² = 1. One-sided, ρ = 4, 4, ¼, ¼ with Â = ±1, range (.4, 3): −ln 3, ln 4, ln 4, −(−1)·ln .4 → .9163."""
    np.testing.assert_allclose(squares(rows([-1.0]), rows([-3.0]), 0.5), [[1.0]])
    ratio, advantages = rows([4.0, 4.0, 0.25, 0.25]).log(), rows([1.0, -1.0, 1.0, -1.0])
    got = one_sided_loss(ratio, torch.zeros(1, 4).double(), advantages, 0.6, 2.0)
    np.testing.assert_allclose(got, [[-math.log(3), math.log(4), math.log(4), -math.log(1 / 0.4)]])


@pytest.mark.parametrize(
    "call",
    [
        lambda: pairwise_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3), 1.0),
        lambda: pairwise_loss(torch.zeros(()), torch.zeros(()), torch.zeros(()), 1.0),
        lambda: squares(torch.zeros(2, 3), torch.zeros(3), 1.0),
        lambda: one_sided_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), 0.2, 0.2),
    ],
)
def test_wrong_shapes_are_refused(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match="takes"):
        call()


# -- limits and gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.1, 1.0, 7.0])
def test_the_first_step_from_the_reference_is_reinforce(tau: float) -> None:
    """Whatever τ and whoever drew the titles: −(r − r̄)·log π; of the one-sided loss too, and of OPMD's."""
    reference, rewards = random_rows(0, 3, 6), random_rows(1, 3, 6)
    advantages = rewards - rewards.mean(dim=-1, keepdim=True)
    reinforce = gradient(lambda x: weighted_bc_loss(x, advantages).mean(dim=-1).sum(), reference)
    pairs = gradient(lambda x: pairwise_loss(x, reference, rewards, tau).sum(), reference)
    torch.testing.assert_close(pairs, reinforce)
    clipped = gradient(lambda x: one_sided_loss(x, reference, advantages, 0.2, 0.2).mean(dim=-1).sum(), reference)
    torch.testing.assert_close(clipped, reinforce)
    assert not gradient(lambda x: squares(x, reference, tau).sum(), reference).any()


def test_gradient_of_the_pairs() -> None:
    """−[(r − r̄) − τ(ℓ − ℓ̄)]/K with ℓ = log(π/π_ref): REINFORCE on the penalised reward, centred."""
    log_probs, reference, rewards = random_rows(0, 3, 2, 4)
    assert gradcheck(lambda x: pairwise_loss(x, reference, rewards, 0.7), (log_probs.clone().requires_grad_(),))
    paid = rewards - 0.7 * (log_probs - reference)
    expected = -(paid - paid.mean(dim=-1, keepdim=True)) / 4
    torch.testing.assert_close(gradient(lambda x: pairwise_loss(x, reference, rewards, 0.7).sum(), log_probs), expected)


def test_gradients_of_the_other_regularisers() -> None:
    log_probs, reference, advantages = random_rows(0, 3, 2, 6)
    assert gradcheck(lambda x: squares(x, reference, 0.7), (log_probs.clone().requires_grad_(),))
    torch.testing.assert_close(
        gradient(lambda x: squares(x, reference, 0.7).sum(), log_probs), 0.7 * (log_probs - reference)
    )
    assert gradcheck(
        lambda x: one_sided_loss(x, reference, advantages, 0.6, 2.0), (log_probs.clone().requires_grad_(),)
    )
    ratio = torch.exp(log_probs - reference)
    inside = ((advantages > 0) & (ratio <= 3)) | ((advantages < 0) & (ratio >= 0.4))  # the paper's mask
    assert 0 < inside.sum() < 12
    found = gradient(lambda x: one_sided_loss(x, reference, advantages, 0.6, 2.0).sum(), log_probs)
    torch.testing.assert_close(found, torch.where(inside, -advantages, 0.0))


def test_opmd_and_pairs_differ_by_the_mean_of_the_ratio() -> None:
    """REINFORCE and the square: the gradient of the pairs without ℓ̄."""
    log_probs, reference, rewards = random_rows(0, 3, 2, 4)
    advantages = rewards - rewards.mean(dim=-1, keepdim=True)
    opmd = gradient(
        lambda x: (weighted_bc_loss(x, advantages) + squares(x, reference, 0.7)).mean(dim=-1).sum(), log_probs
    )
    pairs = gradient(lambda x: pairwise_loss(x, reference, rewards, 0.7).sum(), log_probs)
    mean = (log_probs - reference).mean(dim=-1, keepdim=True)
    torch.testing.assert_close(opmd - pairs, (0.7 * mean / 4).expand(2, 4))


# -- invariances --------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.floats(-5, 5), st.floats(-5, 5), st.permutations(range(5)), st.integers(0, 99))
def test_pairs_feel_no_level_and_no_order(shift: float, level: float, order: list[int], seed: int) -> None:
    """A constant on r, or on log π (logits will do), changes nothing; nor does the order of a group."""
    log_probs, reference, rewards = random_rows(seed, 3, 2, 5)
    loss = pairwise_loss(log_probs, reference, rewards, 0.7)
    moved = pairwise_loss(log_probs + level, reference, rewards + shift, 0.7)
    torch.testing.assert_close(moved, loss, atol=1e-9, rtol=0)
    torch.testing.assert_close(pairwise_loss(log_probs[:, order], reference[:, order], rewards[:, order], 0.7), loss)


@PROPERTY
@given(st.floats(0.05, 0.9), st.floats(0.1, 5), st.integers(0, 99))
def test_the_clip_never_pays_for_going_further(low: float, high: float, seed: int) -> None:
    """Beyond the range the loss is flat in the advantage's direction, and inside it is REINFORCE's up to a constant."""
    reference, advantages = random_rows(seed, 2, 1, 6)
    step = advantages.sign() * 10
    far = one_sided_loss(reference + step, reference, advantages, low, high)
    torch.testing.assert_close(one_sided_loss(reference + 2 * step, reference, advantages, low, high), far)
    wide = one_sided_loss(reference + 0.01 * step, reference, advantages, low, high)
    assert (far <= wide + 1e-12).all()


# -- closed forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn_by", GROUPS)
@pytest.mark.parametrize("tau", [0.7, 2.0])
def test_pairs_find_the_tilted_reference_whoever_drew_the_titles(drawn_by: str, tau: float) -> None:
    """π_ref·exp(r/τ)/Z, without importance weights."""
    titles = GROUPS[drawn_by]

    def loss(logits: Tensor) -> Tensor:
        log_probs = torch.log_softmax(logits, dim=0)
        return pairwise_loss(log_probs[titles], REF.log()[titles], R[titles], tau)

    torch.testing.assert_close(minimise(loss), shares(REF * torch.exp(R / tau)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("drawn_by", GROUPS)
def test_imitation_finds_q_times_one_plus_the_advantage(drawn_by: str) -> None:
    """q·(1 + Â/τ), with τ above every disadvantage."""
    titles = GROUPS[drawn_by]
    share = torch.bincount(titles, minlength=5) / 20
    advantages = R - share.double() @ R
    loss = of_agent(GroupREINFORCE(regulariser="imitation", tau=4.0), titles)
    torch.testing.assert_close(minimise(loss), share * (1 + advantages / 4.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("drawn_by", GROUPS)
def test_squares_find_where_their_pull_is_the_policys(drawn_by: str) -> None:
    """q·(τℓ − Â) = π·Σ q·(τℓ − Â), which is not at the tilted reference."""
    titles = GROUPS[drawn_by]
    share = (torch.bincount(titles, minlength=5) / 20).double()
    found = minimise(of_agent(GroupREINFORCE(regulariser="squares", tau=2.0), titles))
    pull = share * (2.0 * (found / REF).log() - (R - share @ R))
    torch.testing.assert_close(pull, found * pull.sum(), atol=1e-5, rtol=0)
    away = (found - shares(REF * torch.exp(R / 2.0))).abs().max()
    assert away > 1e-3


def test_the_clip_stops_at_its_border() -> None:
    """Plain descent ends where no good title may rise further; with a range without end it goes on."""
    best, good = {}, R > REF @ R
    for high in (0.5, 1e6):
        logits = REF.log().clone()
        agent = GroupREINFORCE(regulariser="clip", clip_low=0.3, clip_high=high)
        loss = of_agent(agent, GROUPS["reference"])
        for _ in range(1_500):
            logits = logits - 0.05 * gradient(loss, logits)
        best[high] = torch.softmax(logits, dim=0) / REF
        flat = gradient(loss, logits).abs().max()
        assert (flat < 1e-9) == (high == 0.5)
    assert (best[0.5][good] < 1.52).all()
    assert best[0.5][good].max() > 1.48
    assert best[1e6][3] > 3


def of_agent(agent: Any, titles: Tensor) -> Callable[[Tensor], Tensor]:
    """The agent's loss of logits, in one context with one group."""

    def loss(logits: Tensor) -> Tensor:
        log_probs = torch.log_softmax(logits, dim=0)
        group = (log_probs[titles], REF.log()[titles], R[titles])
        return agent._losses(*(x[None, None] for x in group)).sum()

    return loss


def test_weights_shape_the_data() -> None:
    """Â·exp(Â/T) by hand: r = 1, 3: Â = −1, 1; with T = ½: −e^−2, e^2. REINFORCE's gradient is minus half of it."""
    agent: Any = GroupREINFORCE(regulariser="clip", weight="exp", temperature=0.5)
    at = torch.zeros(1, 1, 2, dtype=torch.float64)
    found = gradient(lambda x: agent._losses(x, at, torch.tensor([[[1.0, 3.0]]]).double()).sum(), at)
    np.testing.assert_allclose(found[0, 0], [0.5 * math.exp(-2), -0.5 * math.exp(2)])


# -- in the agent -------------------------------------------------------------------------------------------------


def test_groups_and_their_loss(log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble) -> None:
    """Titles that had not been seen, with the log π_ref and r̂ that they have one context at a time; another purpose
    draws others; the loss of them."""
    part = log.rows(slice(0, 60))
    histories, agent = Histories(part), GroupREINFORCE(group=4, tau=0.5)
    batch = next(histories.chunks())
    problem = agent.problem(histories, part, Parts(backbone, rewards, 3, "train"))
    titles = problem.extra["titles"]
    assert titles.shape == (10, 6, 4)
    assert not (prefix_mask(batch, 30) < 0).gather(-1, titles).any()
    elsewhere = agent.problem(histories, part, Parts(backbone, rewards, 3, "validation")).extra["titles"]
    assert not torch.equal(titles, elsewhere)
    whole, losses = part.sequences(), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        policy = HSTU(backbone.config, 30).eval()
    for row in range(10):
        for step in range(6):
            one = slice(row, row + 1)
            past = whole.titles[one, :step], whole.scores[one, :step], whole.times[one, :step]
            seen = Observations(*past, np.array([step]), whole.epoch[one], whole.n_titles)
            drawn = titles[row, step].numpy()
            own, ref = (backbone_log_probs(model, seen)[0][drawn] for model in (policy, backbone))
            predicted = rewards.mean(seen)[0][drawn]
            np.testing.assert_allclose(problem.extra["reference"][row, step], ref, atol=1e-3)
            np.testing.assert_allclose(problem.extra["rewards"][row, step], predicted, atol=1e-3)
            losses.append(np.var(predicted - 0.5 * (own - ref)) / (2 * 0.5))
    with torch.no_grad():
        assert float(agent.batch_loss(policy, batch, problem)) == pytest.approx(np.mean(losses), rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"regulariser": "squares"}, {"regulariser": "imitation", "tau": 1.0}, {"regulariser": "clip", "weight": "exp"}],
)
def test_variants_learn(
    options: dict[str, Any], log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble, training: Any
) -> None:
    """The expected reward by the ensemble rises."""
    agent = GroupREINFORCE(training=training, **options).fit(log, backbone, rewards)
    table, histories = rewards.on(log), Histories(log)
    before, after = (penalised_reward(p, backbone, histories, table, 0.0) for p in (backbone, agent.policy))
    assert after > before + 0.05
    assert agent.record.samples == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tau", 0.0),
        ("group", 1),
        ("regulariser", "hope"),
        ("clip_low", 1.0),
        ("clip_high", 0.0),
        ("weight", "linear"),
        ("weight", "exp"),  # with pairs, the default
        ("temperature", 0.0),
    ],
)
def test_values_out_of_range_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"GroupREINFORCEConfig\.{option} must be"):
        GroupREINFORCE(**{option: value})


def test_logits_become_log_probabilities_by_hand() -> None:
    """Logits ln 1 and ln 3: π = ¼ and ¾. Titles 0 and 1 earn 1 and 3, Â = −1 and 1; ``imitation`` at τ = 1 adds 1:
    −(0·ln ¼ + 2·ln ¾)/2 = −ln ¾. (``pairs`` feel no level, so that logits would do for it.)"""
    extra = {"titles": torch.tensor([[[0, 1]]]), "reference": rows([0.5, 0.5]).log()[None]}
    problem: Any = SimpleNamespace(extra=extra | {"rewards": rows([1.0, 3.0])[None]})
    batch: Any = SimpleNamespace(rows=torch.tensor([0]), valid=torch.tensor([[True]]))
    policy: Any = rows([1.0, 3.0]).log()[None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recsim_gr.agents.off_policy_reinforce.prefix_logits", lambda policy, batch: policy)
        loss = GroupREINFORCE(regulariser="imitation", tau=1.0).batch_loss(policy, batch, problem)
    assert loss.item() == pytest.approx(-math.log(0.75))
