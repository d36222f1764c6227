"""Every loss four ways: by hand, at a limit that is another loss, by its gradient, by an invariance; then the policy
that minimises it in one tabular context, where that is known in closed form; then the agents that use it."""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from recsim_gr.agents import ASFT, BC, CQL, RSDPO, Agent, RewardWeightedBC, asft, ppo
from recsim_gr.agents.asft import advantage_weights
from recsim_gr.agents.base import Parts, Problem, backbone_log_probs, masked_mean, mean_loss, normalised
from recsim_gr.agents.bc import bc_loss
from recsim_gr.agents.cql import cql_loss
from recsim_gr.agents.ppo import penalised_reward
from recsim_gr.agents.reward_weighted_bc import weighted_bc_loss
from recsim_gr.agents.rsdpo import disjoint, dpo_loss
from recsim_gr.backbones import HSTU
from recsim_gr.errors import ConfigError
from recsim_gr.histories import Batch, Histories
from recsim_gr.log import InteractionLog
from recsim_gr.observations import Contexts, Observations
from recsim_gr.prefixes import prefix_mask
from recsim_gr.rewards import RewardEnsemble

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)

Make = Callable[..., Agent]


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch_of(valid: Tensor, scores: Tensor | None = None, titles: Tensor | None = None, n_titles: int = 9) -> Batch:
    """A batch of which only some parts matter."""
    titles = torch.zeros(valid.shape, dtype=torch.int64) if titles is None else titles
    scores = torch.zeros(valid.shape) if scores is None else scores
    return Batch(torch.arange(len(valid)), titles.masked_fill(~valid, n_titles), scores, scores * 0, valid)


def random_rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- imitation and weighted imitation -----------------------------------------------------------------------------


def test_imitation_by_hand() -> None:
    # −ln ½ and −ln ¼
    got = bc_loss(rows([math.log(0.5), math.log(0.25)]))
    np.testing.assert_allclose(got, [[0.6931472, 1.3862944]], rtol=1e-6)


def test_weighted_imitation_by_hand() -> None:
    # −2·ln ½ = 1.386, −0·ln ¼ = 0, −½·ln(1/e) = ½
    got = weighted_bc_loss(rows([math.log(0.5), math.log(0.25), -1.0]), rows([2.0, 0.0, 0.5]))
    np.testing.assert_allclose(got, [[1.3862944, 0.0, 0.5]], rtol=1e-6)


def test_weights_of_one_are_imitation() -> None:
    log_probs = random_rows(0, 3, 4)
    assert torch.equal(weighted_bc_loss(log_probs, torch.ones(3, 4)), bc_loss(log_probs))


def test_no_gradient_runs_through_the_weights() -> None:
    log_probs, weights = random_rows(0, 2, 3).requires_grad_(), random_rows(1, 2, 3).abs().requires_grad_()
    weighted_bc_loss(log_probs, weights).sum().backward()
    assert weights.grad is None
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad, -weights.detach())
    fixed = weights.detach()
    assert gradcheck(lambda x: weighted_bc_loss(x, fixed), (log_probs,))
    assert gradcheck(bc_loss, (log_probs,))


@PROPERTY
@given(st.floats(0.01, 100), st.integers(0, 99))
def test_normalised_weights_have_mean_one_whatever_their_unit(unit: float, seed: int) -> None:
    valid = random_rows(seed, 3, 4) > -0.5
    valid[0, 0] = True
    weights = random_rows(seed + 1, 3, 4).abs() + 0.01
    batch = batch_of(valid)
    got = normalised(weights, batch)
    assert got[valid].mean().item() == pytest.approx(1.0)
    torch.testing.assert_close(normalised(unit * weights, batch), got)
    assert masked_mean(weights, batch).item() == pytest.approx(weights[valid].mean().item())


@PROPERTY
@given(st.floats(0.01, 1000), st.integers(0, 99))
def test_equal_rewards_are_imitation(reward: float, seed: int) -> None:
    """RewardWeightedBC: r/mean r = 1; A-SFT: whatever the advantage that all share, below the clip."""
    batch = batch_of(random_rows(seed, 2, 5) > -1)
    batch.valid[0, 0] = True
    same = torch.full((2, 5), reward)
    torch.testing.assert_close(normalised(same, batch), torch.ones(2, 5))
    for weight in ("exp", "linear"):
        weights = advantage_weights(same / 1000, 0.5, weight)
        torch.testing.assert_close(normalised(weights, batch), torch.ones(2, 5))


def test_weights_that_are_all_zero_become_one() -> None:
    """Nothing is better than its baseline: imitation goes on rather than dividing 0 by 0."""
    batch = batch_of(torch.tensor([[True, True, False]]))
    assert torch.equal(normalised(torch.zeros(1, 3), batch), torch.ones(1, 3))


# -- advantage weights --------------------------------------------------------------------------------------------


def test_advantage_weights_by_hand() -> None:
    advantages = rows([-1.0, 0.0, 0.5, 9.0])
    # exp(Â/½): e^−2, 1, e, and e^18 cut at 20
    np.testing.assert_allclose(advantage_weights(advantages, 0.5), [[math.exp(-2), 1.0, math.e, 20.0]], rtol=1e-6)
    # max(0, 1 + Â/½): 0 (from −1), 1, 2, 19
    np.testing.assert_allclose(advantage_weights(advantages, 0.5, "linear"), [[0.0, 1.0, 2.0, 19.0]])
    np.testing.assert_allclose(advantage_weights(advantages, 0.5, "linear", clip=3.0), [[0.0, 1.0, 2.0, 3.0]])
    np.testing.assert_allclose(advantage_weights(advantages, 0.5, "binary"), [[0.0, 0.0, 1.0, 1.0]])
    np.testing.assert_allclose(advantage_weights(advantages, 0.5, clip=2.0), [[math.exp(-2), 1.0, 2.0, 2.0]], rtol=1e-6)


@pytest.mark.parametrize("weight", ["exp", "linear"])
def test_with_an_infinite_beta_all_weights_are_one(weight: str) -> None:
    np.testing.assert_allclose(advantage_weights(rows([-4.0, 0.0, 4.0]), 1e9, weight), 1.0, atol=1e-6)


@PROPERTY
@given(st.floats(-2, 2), st.floats(0.3, 5), st.integers(0, 99))
def test_normalised_weights_do_not_feel_the_baseline(shift: float, beta: float, seed: int) -> None:
    """exp((Â + c)/β) = exp(c/β)·exp(Â/β) while nothing is clipped, and normalising takes the factor out."""
    batch = batch_of(torch.ones(2, 4, dtype=torch.bool))
    advantages = random_rows(seed, 2, 4)
    one = normalised(advantage_weights(advantages, beta, clip=1e12), batch)
    two = normalised(advantage_weights(advantages + shift, beta, clip=1e12), batch)
    torch.testing.assert_close(one, two)


@PROPERTY
@given(st.integers(0, 99), st.sampled_from(["exp", "linear", "binary"]), st.floats(0.05, 5))
def test_better_titles_weigh_no_less(seed: int, weight: str, beta: float) -> None:
    advantages = (3 * random_rows(seed, 1, 20)).sort(dim=1).values
    weights = advantage_weights(advantages, beta, weight)
    assert (weights.diff() >= 0).all()
    assert weights.min() >= 0
    assert weights.max() <= 20.0 * (1 + 1e-6)


# -- conservative Q-learning --------------------------------------------------------------------------------------


def test_conservative_loss_by_hand() -> None:
    """Q = (0, ln 3), chosen title 1, r = 2, α = ½: ½(1.0986 − 2)² + ½(ln(1 + 3) − ln 3) = .40626 + .14384."""
    q = torch.tensor([[[0.0, math.log(3.0)]]], dtype=torch.float64)
    got = cql_loss(q, torch.tensor([[1]]), rows([2.0]), 0.5)
    np.testing.assert_allclose(got, [[0.5 * (math.log(3) - 2) ** 2 + 0.5 * math.log(4 / 3)]])
    assert got.item() == pytest.approx(0.55010, abs=1e-5)


def test_without_alpha_it_is_regression() -> None:
    q, chosen, rewards = random_rows(0, 2, 3, 4), torch.tensor([[0, 1, 2], [3, 3, 0]]), random_rows(1, 2, 3)
    own = q.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(cql_loss(q, chosen, rewards, 0.0), 0.5 * (own - rewards) ** 2)


def test_gradient_of_the_conservative_loss() -> None:
    q, chosen, rewards = random_rows(0, 1, 2, 4), torch.tensor([[0, 3]]), random_rows(1, 1, 2)
    assert gradcheck(lambda x: cql_loss(x, chosen, rewards, 0.7), (q.clone().requires_grad_(),))
    # α·softmax everywhere, and Q − r − α at the chosen title
    x = q.clone().requires_grad_()
    cql_loss(x, chosen, rewards, 0.7).sum().backward()
    expected = 0.7 * torch.softmax(q, dim=-1)
    own = q.gather(-1, chosen.unsqueeze(-1))
    expected.scatter_add_(-1, chosen.unsqueeze(-1), own - rewards.unsqueeze(-1) - 0.7)
    torch.testing.assert_close(x.grad, expected)


def test_seen_titles_have_no_part_in_it() -> None:
    q = torch.tensor([[[1.0, 2.0, -1e9]]])
    bare = cql_loss(q[..., :2], torch.tensor([[0]]), torch.tensor([[3.0]]), 1.0)
    torch.testing.assert_close(cql_loss(q, torch.tensor([[0]]), torch.tensor([[3.0]]), 1.0), bare)


@PROPERTY
@given(st.floats(-3, 3), st.integers(0, 99))
def test_the_conservative_term_knows_no_level(shift: float, seed: int) -> None:
    """log Σ exp Q − Q(a) does not change with a constant on Q, nor does Q − r if r moves along."""
    q, chosen, rewards = random_rows(seed, 1, 2, 4), torch.tensor([[0, 3]]), random_rows(seed + 1, 1, 2)
    torch.testing.assert_close(
        cql_loss(q + shift, chosen, rewards + shift, 1.3), cql_loss(q, chosen, rewards, 1.3), atol=1e-9, rtol=0
    )


# -- preferences --------------------------------------------------------------------------------------------------


def test_preference_loss_by_hand() -> None:
    """β = ½, log-ratios 2 and −1: −ln σ(½·3) = ln(1 + e^−1.5) = .20141."""
    w, l, wr, lr = torch.tensor([[-1.0], [-3.0], [-3.0], [-2.0]], dtype=torch.float64)  # noqa: E741
    got = dpo_loss(w, l, wr, lr, 0.5)
    assert got.item() == pytest.approx(math.log(1 + math.exp(-1.5)), abs=1e-9)
    assert got.item() == pytest.approx(0.20141, abs=1e-5)


def test_at_the_reference_it_is_log_two() -> None:
    winner, loser = random_rows(0, 5), random_rows(1, 5)
    np.testing.assert_allclose(dpo_loss(winner, loser, winner, loser, beta=0.3), math.log(2))


def test_gradient_of_the_preference_loss() -> None:
    w, l, wr, lr = random_rows(0, 4, 6).unbind()  # noqa: E741
    w, l = w.clone().requires_grad_(), l.clone().requires_grad_()  # noqa: E741
    assert gradcheck(lambda a, b: dpo_loss(a, b, wr, lr, 0.4), (w, l))
    dpo_loss(w, l, wr, lr, 0.4).sum().backward()
    # −β·σ(−margin) for the winner, the opposite for the loser: the winner is always pushed up
    margin = 0.4 * ((w - wr) - (l - lr)).detach()
    torch.testing.assert_close(w.grad, -0.4 * torch.sigmoid(-margin))
    torch.testing.assert_close(l.grad, 0.4 * torch.sigmoid(-margin))


@PROPERTY
@given(st.floats(-5, 5), st.floats(-5, 5), st.integers(0, 99))
def test_logits_will_do_for_log_probabilities(shift: float, shift_ref: float, seed: int) -> None:
    w, l, wr, lr = random_rows(seed, 4, 3).unbind()  # noqa: E741
    moved = dpo_loss(w + shift, l + shift, wr + shift_ref, lr + shift_ref, 0.4)
    torch.testing.assert_close(moved, dpo_loss(w, l, wr, lr, 0.4), atol=1e-9, rtol=0)


def test_disjoint_by_hand() -> None:
    """Intervals 4 ± w·½ against 3 ± w·¼: 3.5 > 3.25 at w = 1; at w = 2 3 against 3.5; at −1 the literal reading,
    upper against lower bound."""
    winner, loser, winner_deviation, loser_deviation = torch.tensor([4.0, 3.0, 0.5, 0.25])
    assert disjoint(winner, loser, winner_deviation, loser_deviation, 1.0)
    assert not disjoint(winner, loser, winner_deviation, loser_deviation, 2.0)
    assert disjoint(winner, loser, winner_deviation, loser_deviation, -1.0)
    assert not disjoint(loser, winner, loser_deviation, winner_deviation, 1.0)
    equal = torch.tensor([3.0])
    assert not disjoint(equal, equal, equal * 0, equal * 0, 1.0)


# -- shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: bc_loss(torch.zeros(3)),
        lambda: weighted_bc_loss(torch.zeros(2, 3), torch.zeros(3)),
        lambda: weighted_bc_loss(torch.zeros(3), torch.zeros(3)),
        lambda: advantage_weights(torch.zeros(3), 1.0),
        lambda: cql_loss(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2), 1.0),
        lambda: cql_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2), 1.0),
        lambda: dpo_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 2), 1.0),
        lambda: dpo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(3), 1.0),
    ],
)
def test_wrong_shapes_are_refused(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match="takes"):
        call()


def test_an_unknown_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match="no weight 'cubic'; there are exp, linear, binary"):
        advantage_weights(torch.zeros(1, 1), 1.0, "cubic")


# -- closed forms in one context of five titles -------------------------------------------------------------------

MU = torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05], dtype=torch.float64)
REF = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64)
R = torch.tensor([1.5, 4.0, 2.0, 5.0, 3.0], dtype=torch.float64)


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor | None = None) -> Tensor:
    """The logits (or values) of five titles at the lowest loss."""
    x = torch.zeros(5, dtype=torch.float64) if start is None else start.clone()
    x.requires_grad_()
    optimiser = torch.optim.LBFGS(
        [x], max_iter=2_000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Any:
        optimiser.zero_grad()
        value = loss(x)
        value.backward()
        return value

    optimiser.step(closure)
    return x.detach()


def imitated(weights: Tensor) -> Tensor:
    """The policy that minimises the weighted imitation loss in expectation under μ."""

    def loss(logits: Tensor) -> Tensor:
        log_probs = torch.log_softmax(logits, dim=0)[None]
        return (MU * weighted_bc_loss(log_probs, weights[None])).sum()

    return torch.softmax(minimise(loss), dim=0)


def shares(values: Tensor) -> Tensor:
    return values / values.sum()


def test_imitation_finds_the_logging_policy() -> None:
    found = minimise(lambda logits: (MU * bc_loss(torch.log_softmax(logits, dim=0)[None])).sum())
    torch.testing.assert_close(torch.softmax(found, dim=0), MU, atol=1e-6, rtol=0)


def test_reward_weighted_imitation_finds_mu_times_r() -> None:
    mean = (MU * R).sum()
    torch.testing.assert_close(imitated(R / mean), MU * R / mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_asft_finds_mu_times_exp_r_over_beta(beta: float) -> None:
    """Whatever the baseline: it cancels."""
    for reference in (REF, MU):
        weights = advantage_weights((R - reference @ R)[None], beta, clip=1e12)[0]
        torch.testing.assert_close(imitated(weights), shares(MU * torch.exp(R / beta)), atol=1e-6, rtol=0)


def test_asfts_variants_find_what_they_weigh() -> None:
    advantages = R - REF @ R
    linear = imitated(advantage_weights(advantages[None], 1.0, "linear")[0])
    torch.testing.assert_close(linear, shares(MU * (1 + advantages).clamp(min=0)), atol=1e-5, rtol=0)
    binary = imitated(advantage_weights(advantages[None], 1.0, "binary")[0])
    torch.testing.assert_close(binary, shares(MU * (advantages > 0)), atol=1e-5, rtol=0)
    clipped = imitated(advantage_weights(advantages[None], 0.5, clip=3.0)[0])
    torch.testing.assert_close(clipped, shares(MU * torch.exp(advantages / 0.5).clamp(max=3)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0, 5.0])
def test_conservative_q_learning_finds_its_fixed_point(alpha: float) -> None:
    """Q = r − α(softmax(Q)/μ − 1)."""
    chosen = torch.arange(5)[None]
    q = minimise(lambda q: (MU * cql_loss(q.expand(1, 5, 5), chosen, R[None], alpha)).sum())
    torch.testing.assert_close(q, R - alpha * (torch.softmax(q, dim=0) / MU - 1), atol=1e-5, rtol=0)
    assert (q.argmax() == 3) == (alpha < 5)  # much conservatism is imitation: the rare title falls


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_preferences_of_bradley_terry_find_the_tilted_reference(beta: float) -> None:
    """All pairs, the winner drawn with σ(r − r'): π = π_ref·exp(r/β)/Z."""
    winner, loser = (x.flatten() for x in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
    share = torch.sigmoid(R[winner] - R[loser])
    ref = REF.log()

    def loss(logits: Tensor) -> Tensor:
        own = torch.log_softmax(logits, dim=0)
        return (share * dpo_loss(own[winner], own[loser], ref[winner], ref[loser], beta)).sum()

    found = torch.softmax(minimise(loss), dim=0)
    torch.testing.assert_close(found, shares(REF * torch.exp(R / beta)), atol=1e-6, rtol=0)


# -- the penalised reward, what PPO climbs ------------------------------------------------------------------------


@pytest.fixture
def bare_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """PPO's objective on policies that are bare logits, and A-SFT's advantages of a reference that is."""
    for module in (ppo, asft):
        monkeypatch.setattr(module, "prefix_logits", lambda policy, batch: policy)


class Rewards:
    """A table of given rewards."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def mean(self, rows: Tensor) -> Tensor:
        return self.values[rows]


@pytest.mark.usefixtures("bare_logits")
def test_penalised_reward_by_hand() -> None:
    """π = (½, ½), π_ref = (¼, ¾), r̂ = (4, 2): Σπr̂ = 3, KL = ½ ln 2 + ½ ln ⅔ = .14384; λ = ½: 3 − .07192. A second
    context of π = π_ref earns its 1; padding earns nothing: (2.92808 + 1)/2."""
    policy = torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.25, 0.75], [0.5, 0.5]]]).log()
    reference = torch.tensor([[[0.25, 0.75], [0.9, 0.1]], [[0.25, 0.75], [0.9, 0.1]]]).log()
    table: Any = Rewards(torch.tensor([[[4.0, 2.0], [9.0, 9.0]], [[1.0, 1.0], [9.0, 9.0]]]))
    valid = torch.tensor([[True, False], [True, False]])
    histories: Any = SimpleNamespace(chunks=lambda: iter([batch_of(valid)]))
    got = penalised_reward(policy, reference, histories, table, 0.5)  # type: ignore[arg-type]
    assert got == pytest.approx((3 - 0.25 * math.log(4 / 3) + 1) / 2, abs=1e-6)
    assert got == pytest.approx((2.92808 + 1) / 2, abs=1e-5)


@pytest.mark.usefixtures("bare_logits")
@pytest.mark.parametrize("kl_weight", [0.3, 1.0])
def test_the_penalised_reward_is_highest_at_the_tilted_reference(kl_weight: float) -> None:
    """π = π_ref·exp(r/λ)/Z."""
    table: Any = Rewards(R[None, None])
    batch = batch_of(torch.tensor([[True]]))

    def loss(logits: Tensor) -> Tensor:
        policy: Any = logits[None, None]
        reference: Any = REF.log()[None, None]
        return -ppo._penalised(policy, reference, batch, table, kl_weight).sum()

    found = torch.softmax(minimise(loss, REF.log()), dim=0)
    torch.testing.assert_close(found, shares(REF * torch.exp(R / kl_weight)), atol=1e-5, rtol=0)


# -- the losses inside the agents ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ragged(log: InteractionLog) -> InteractionLog:
    """Histories of one to six events: twenty of the log's, cut."""
    keep = np.concatenate([np.arange(6 * user, 6 * user + 1 + user % 6) for user in range(20)])
    columns = {
        name: getattr(log, name)[keep]
        for name in ("user", "epoch", "step", "hours", "title", "duration_minutes", "watch_minutes", "score")
    }
    return InteractionLog(**columns, n_titles=log.n_titles)


@pytest.fixture(scope="module")
def parts(backbone: HSTU, rewards: RewardEnsemble) -> Parts:
    return Parts(backbone, rewards, seed=0, purpose="train")


def events(log: InteractionLog) -> Iterator[tuple[int, int, Observations]]:
    """(row, step, the context before it) of every event."""
    whole = log.sequences()
    for row, length in enumerate(whole.length):
        for step in range(length):
            one = slice(row, row + 1)
            yield (
                row,
                step,
                Observations(
                    whole.titles[one, :step],
                    whole.scores[one, :step],
                    whole.times[one, :step],
                    np.array([step]),
                    whole.epoch[one],
                    whole.n_titles,
                ),
            )


def problem_of(agent: Any, log: InteractionLog, parts: Parts) -> tuple[Problem, Batch]:
    histories = Histories(log)
    return agent.problem(histories, log, parts), next(histories.chunks())


def batch_loss(agent: Any, policy: HSTU, log: InteractionLog, parts: Parts) -> float:
    problem, batch = problem_of(agent, log, parts)
    with torch.no_grad():
        return float(agent.batch_loss(policy, batch, problem))


def test_imitation_in_the_agent(ragged: InteractionLog, backbone: HSTU, parts: Parts) -> None:
    """Against one context at a time, for BC and for rewards that all are equal."""
    whole = ragged.sequences()
    log_probs = [backbone_log_probs(backbone, seen)[0, whole.titles[row, step]] for row, step, seen in events(ragged)]
    assert len(log_probs) == len(ragged)
    expected = -np.mean(log_probs)
    assert batch_loss(BC(), backbone, ragged, parts) == pytest.approx(expected, abs=1e-4)
    weights = ragged.score / ragged.score.mean()
    weighted = -(weights * np.array(log_probs)).mean()
    assert batch_loss(RewardWeightedBC(), backbone, ragged, parts) == pytest.approx(weighted, abs=1e-4)
    assert abs(weighted - expected) > 1e-3


def test_negative_scores_weigh_nothing() -> None:
    """A noise model without bounds: scores −2 and 4 weigh 0 and 2, not −2 and 4 (over 1)."""
    policy: Any = SimpleNamespace()
    batch = batch_of(torch.tensor([[True, True]]), torch.tensor([[-2.0, 4.0]]), torch.tensor([[0, 1]]), n_titles=2)
    log_probs = torch.tensor([[-1.0, -3.0]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recsim_gr.agents.reward_weighted_bc.prefix_log_probs", lambda policy, batch: log_probs)
        loss = RewardWeightedBC().batch_loss(policy, batch, None)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx((0 * 1 + 2 * 3) / 2)


@pytest.mark.usefixtures("bare_logits")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # r̂ of the chosen: 4 and 2; Σ π_ref r̂: ¼·4 + ¾·2 = 2.5 and ½·2 + ½·5 = 3.5
        ({}, [1.5, -1.5]),
        # observed scores 5 and 1 instead of r̂
        ({"advantage": "score"}, [2.5, -2.5]),
        # half of each: 4.5 and 1.5
        ({"advantage": "blend"}, [2.0, -2.0]),
        # the user's mean score is 3
        ({"baseline": "user"}, [1.0, -1.0]),
        # the batch's mean is taken from the batch, later
        ({"baseline": "batch"}, [4.0, 2.0]),
    ],
)
def test_advantages_by_hand(options: dict[str, str], expected: list[float]) -> None:
    reference: Any = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]).log()
    table: Any = Rewards(torch.tensor([[[4.0, 2.0], [2.0, 5.0]]]))
    valid = torch.tensor([[True, True]])
    batch = batch_of(valid, torch.tensor([[5.0, 1.0]]), torch.tensor([[0, 0]]), n_titles=2)
    got = ASFT(**options)._advantages(batch, table, reference)
    np.testing.assert_allclose(got, [expected], rtol=1e-6)


def test_advantages_in_the_agent(ragged: InteractionLog, backbone: HSTU, rewards: RewardEnsemble, parts: Parts) -> None:
    """Â = r̂(x, a) − Σ_a' π_ref(a'|x)·r̂(x, a'), one context at a time; its loss with the weights made of them."""
    problem, batch = problem_of(ASFT(), ragged, parts)
    titles = ragged.sequences().titles
    advantages, log_probs = [], []
    for row, step, seen in events(ragged):
        own, predicted = backbone_log_probs(backbone, seen)[0], rewards.mean(seen)[0]
        log_probs.append(own[titles[row, step]])
        advantages.append(predicted[titles[row, step]] - np.exp(own) @ predicted)
        assert problem.extra["advantages"][row, step].item() == pytest.approx(advantages[-1], abs=1e-3)
    assert not problem.extra["advantages"][~batch.valid].any()
    weights = np.minimum(np.exp(np.array(advantages) / 0.5), 20.0)
    expected = -(weights / weights.mean() * np.array(log_probs)).mean()
    assert batch_loss(ASFT(beta=0.5), backbone, ragged, parts) == pytest.approx(expected, abs=2e-3)
    assert abs(expected + np.mean(log_probs)) > 0.01
    from_batch = np.array(advantages) - np.mean(advantages)
    assert np.ptp(from_batch) > 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"clip": 1.2},
        {"weight": "linear"},
        {"weight": "binary"},
        {"baseline": "batch", "clip": 3.0},  # below the clip no baseline of all is felt
        {"baseline": "user", "advantage": "score"},
        {"baseline": "user", "advantage": "blend", "clip": 2.0},
    ],
    ids=str,
)
def test_every_option_reaches_the_loss(
    options: dict[str, Any], ragged: InteractionLog, backbone: HSTU, rewards: RewardEnsemble, parts: Parts
) -> None:
    """Against one context at a time, in NumPy, on histories of several lengths."""
    whole, config = ragged.sequences(), ASFT(**options).config
    share = {"model": 1.0, "score": 0.0, "blend": 0.5}[config.advantage]
    values, by_policy, users, log_probs = [], [], [], []
    for row, step, seen in events(ragged):
        own, predicted, title = backbone_log_probs(backbone, seen)[0], rewards.mean(seen)[0], whole.titles[row, step]
        values.append(share * predicted[title] + (1 - share) * whole.scores[row, step])
        by_policy.append(np.exp(own) @ predicted)
        users.append(row)
        log_probs.append(own[title])
    value, user = np.array(values), np.array(users)
    of_user = np.bincount(user, ragged.score) / np.bincount(user)
    baselines: dict[str, Any] = {"policy": np.array(by_policy), "user": of_user[user], "batch": value.mean()}
    advantage = value - baselines[config.baseline]
    weights: dict[str, Any] = {
        "exp": np.minimum(np.exp(advantage / config.beta), config.clip),
        "linear": np.clip(1 + advantage / config.beta, 0, config.clip),
        "binary": (advantage > 0).astype(float),
    }
    weight = weights[config.weight]
    expected = -(weight / weight.mean() * np.array(log_probs)).mean()
    got = batch_loss(ASFT(**options), backbone, ragged, parts)
    assert got == pytest.approx(expected, abs=2e-3)
    bare = {name: value for name, value in options.items() if name == "advantage"}
    assert abs(got - batch_loss(ASFT(**bare), backbone, ragged, parts)) > 4e-3


def test_the_batch_is_a_baseline_too(ragged: InteractionLog, backbone: HSTU, parts: Parts) -> None:
    """Below the clip its level cancels in the weights: as without any baseline at all."""
    agent = ASFT(baseline="batch", beta=2.0, clip=1e6)
    problem, batch = problem_of(agent, ragged, parts)
    loss = agent.batch_loss(backbone, batch, problem)
    problem.extra["advantages"] = problem.extra["advantages"] + 7.0
    torch.testing.assert_close(agent.batch_loss(backbone, batch, problem), loss)


def test_conservative_q_learning_in_the_agent(
    ragged: InteractionLog, fitted: Callable[[str], Agent], contexts: Contexts
) -> None:
    """Its loss against its own answers, one context at a time: ½(Q − r)² + α(log Σ exp Q − Q) over unseen titles."""
    agent: Any = fitted("CQL")
    titles, scores = ragged.sequences().titles, ragged.sequences().scores
    losses = []
    for row, step, seen in events(ragged):
        q = agent.scores(seen)[0].astype(np.float64)
        own = q[titles[row, step]]
        losses.append(0.5 * (own - scores[row, step]) ** 2 + np.log(np.exp(q).sum()) - own)
    with torch.no_grad():
        got = float(agent._batch_loss(next(Histories(ragged).chunks())))
    assert got == pytest.approx(np.mean(losses), abs=1e-3)
    observations = contexts.observations
    warm = CQL(temperature=2.0)
    warm.q_function = agent.q_function
    halved = torch.log_softmax(torch.from_numpy(agent.scores(observations)) / 2, dim=-1)
    np.testing.assert_allclose(warm.log_probs(observations), halved, atol=1e-5)
    np.testing.assert_array_equal(warm.scores(observations), agent.scores(observations))


def test_pairs_are_those_that_the_ensemble_is_sure_of(
    ragged: InteractionLog, backbone: HSTU, rewards: RewardEnsemble, parts: Parts
) -> None:
    agents = {
        "sure": RSDPO(candidates=3),
        "surer": RSDPO(candidates=3, interval=4.0),
        "literal": RSDPO(candidates=3, literal=True),
    }
    extra = {name: problem_of(agent, ragged, parts)[0].extra for name, agent in agents.items()}
    batch = next(Histories(ragged).chunks())
    seen_before = prefix_mask(batch, 30) < 0
    for name, width in (("sure", 1.0), ("surer", 4.0), ("literal", -1.0)):
        titles, kept = extra[name]["titles"], extra[name]["kept"]
        assert not kept[~batch.valid].any()
        assert not seen_before.gather(-1, titles)[batch.valid].any()
        for row, step, seen in events(ragged):
            winner, loser = titles[row, step].tolist()
            mean, deviation = (part[0] for part in rewards.predict(seen))
            assert mean[winner] >= mean[loser] - 1e-4
            gap = (mean[winner] - width * deviation[winner]) - (mean[loser] + width * deviation[loser])
            if abs(gap) > 1e-3 and winner != loser:
                assert bool(kept[row, step]) == (gap > 0)
            own = backbone_log_probs(backbone, seen)[0]
            reference = extra[name]["reference"][row, step]
            assert (reference[0] - reference[1]).item() == pytest.approx(own[winner] - own[loser], abs=1e-3)
    kept_of = {name: int(value["kept"].sum()) for name, value in extra.items()}
    assert 0 < kept_of["surer"] < kept_of["sure"] < kept_of["literal"]
    torch.testing.assert_close(extra["sure"]["titles"], extra["surer"]["titles"])  # the same draws


def test_candidates_come_from_the_reference(ragged: InteractionLog, backbone: HSTU, parts: Parts) -> None:
    """With two candidates the pair is the draw: over many seeds, the frequencies of π_ref at one context."""
    _, _, seen = next(events(ragged))
    expected = np.exp(backbone_log_probs(backbone, seen)[0])
    counts = np.zeros(30)
    for seed in range(150):
        problem, _ = problem_of(RSDPO(candidates=2), ragged, Parts(backbone, parts.rewards, seed, "train"))
        first = problem.extra["titles"][:, 0]  # the empty history of every user: one context
        counts += np.bincount(first.flatten().numpy(), minlength=30)
    n = counts.sum()
    assert n == 150 * 20 * 2
    assert (np.abs(counts / n - expected) < 4.5 * np.sqrt(expected * (1 - expected) / n) + 1e-6).all()


def test_preferences_in_the_agent(ragged: InteractionLog, backbone: HSTU, parts: Parts) -> None:
    agent = RSDPO(beta=0.2)
    assert batch_loss(agent, backbone, ragged, parts) == pytest.approx(math.log(2), abs=1e-6)
    problem, batch = problem_of(agent, ragged, parts)
    policy = HSTU(backbone.config, 30)
    policy.load_state_dict(backbone.state_dict())
    optimiser = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for _ in range(5):
        optimiser.zero_grad()
        agent.batch_loss(policy, batch, problem).backward()
        optimiser.step()
    policy.eval()
    margins = []
    for row, step, seen in events(ragged):
        if problem.extra["kept"][row, step]:
            winner, loser = problem.extra["titles"][row, step].tolist()
            own, ref = backbone_log_probs(policy, seen)[0], backbone_log_probs(backbone, seen)[0]
            margins.append((own[winner] - ref[winner]) - (own[loser] - ref[loser]))
    expected = np.log1p(np.exp(-0.2 * np.array(margins))).mean()
    with torch.no_grad():
        got = float(agent.batch_loss(policy, batch, problem))
    assert got == pytest.approx(expected, abs=1e-4)
    assert got < math.log(2) - 0.01
    assert np.mean(margins) > 0


def test_a_batch_without_a_sure_pair_teaches_nothing(ragged: InteractionLog, backbone: HSTU, parts: Parts) -> None:
    agent = RSDPO(interval=1e6)
    problem, batch = problem_of(agent, ragged, parts)
    policy = HSTU(backbone.config, 30)
    loss = agent.batch_loss(policy, batch, problem)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


# -- limits, trained ----------------------------------------------------------------------------------------------


def test_asft_with_a_large_beta_is_bc(
    make: Make, log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble, contexts: Contexts
) -> None:
    """The whole way through training, since both see the same batches and the same dropout."""
    bc, limit, away = (
        make(name, **options).fit(log, backbone, rewards).log_probs(contexts.observations)
        for name, options in (("BC", {}), ("ASFT", {"beta": 1e6}), ("ASFT", {"beta": 0.5}))
    )
    unseen = np.isfinite(bc)
    assert np.abs(limit[unseen] - bc[unseen]).max() < 1e-2
    assert np.abs(away[unseen] - bc[unseen]).max() > 0.1


def test_reward_weighting_of_equal_scores_is_bc(
    make: Make, log: InteractionLog, backbone: HSTU, contexts: Contexts
) -> None:
    columns = {
        name: getattr(log, name)
        for name in ("user", "epoch", "step", "hours", "title", "duration_minutes", "watch_minutes")
    }
    flat = InteractionLog(**columns, score=np.full(len(log), 2.5, dtype=np.float32), n_titles=log.n_titles)
    bc, weighted = (
        make(name).fit(flat, backbone).log_probs(contexts.observations) for name in ("BC", "RewardWeightedBC")
    )
    unseen = np.isfinite(bc)
    assert np.abs(weighted[unseen] - bc[unseen]).max() < 1e-2


# -- what flipped signs would pass ---------------------------------------------------------------------------------


def test_the_mean_loss_counts_events_by_hand() -> None:
    """What is stopped on: a chunk of one event with loss 2 and one of three with loss 6: (1·2 + 3·6)/4 = 5."""
    chunks = [batch_of(torch.ones(1, 1, dtype=torch.bool)), batch_of(torch.tensor([[True, True], [True, False]]))]
    histories: Any = SimpleNamespace(chunks=lambda: iter(chunks))
    losses = iter([torch.tensor(2.0), torch.tensor(6.0)])
    assert mean_loss(lambda batch: next(losses), histories) == pytest.approx(5.0)


def test_the_batchs_mean_is_subtracted_by_hand() -> None:
    """Â = 1 and 3, less their mean −1 and 1; linear weights at β = 2: ½ and 1½; (½·1 + 1½·3)/2 = 2.5."""
    policy: Any = SimpleNamespace()
    problem: Any = SimpleNamespace(extra={"advantages": torch.tensor([[1.0, 3.0]])})
    log_probs = torch.tensor([[-1.0, -3.0]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recsim_gr.agents.asft.prefix_log_probs", lambda policy, batch: log_probs)
        agent = ASFT(baseline="batch", weight="linear", beta=2.0)
        loss = agent.batch_loss(policy, batch_of(torch.tensor([[True, True]])), problem)
    assert loss.item() == pytest.approx(2.5)
