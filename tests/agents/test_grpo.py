"""GRPO: by hand, limits, gradients, invariances; its expected step over all groups; the optimum of each variant."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import gradcheck

from recsim_gr import generation
from recsim_gr.agents import GRPO
from recsim_gr.agents.base import Parts, backbone_log_probs
from recsim_gr.agents.distributions import divergence
from recsim_gr.agents.grpo import OldPolicy, draw_titles, group_advantages, grpo_loss, k3, regularised_reward
from recsim_gr.agents.ips import importance_weights, ips_loss
from recsim_gr.agents.ppo import penalised_reward
from recsim_gr.agents.reward_shaping import shaped_rewards
from recsim_gr.agents.reward_weighted_bc import weighted_bc_loss
from recsim_gr.backbones import HSTU, HSTUConfig
from recsim_gr.errors import ConfigError
from recsim_gr.histories import Histories
from recsim_gr.log import InteractionLog, ShardedLog
from recsim_gr.observations import Observations
from recsim_gr.pretraining import pretrain
from recsim_gr.randomness import derived_seed
from recsim_gr.rewards import RewardEnsemble, RewardEnsembleConfig, fit_reward_ensemble
from recsim_gr.training import TrainingConfig
from recsim_gr.world import WorldConfig

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
REF = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64)
R = torch.tensor([1.5, 4.0, 2.0, 5.0, 3.0], dtype=torch.float64)


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    x = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(x), x)
    return found


def shares(values: Tensor) -> Tensor:
    return values / values.sum()


# -- by hand ------------------------------------------------------------------------------------------------------


def test_advantages_by_hand() -> None:
    """Rewards 1, 2, 6: mean 3, deviation sqrt((4 + 1 + 9)/2) = 2.6458."""
    rewards = rows([1.0, 2.0, 6.0])
    np.testing.assert_allclose(group_advantages(rewards, deviation=False), [[-2.0, -1.0, 3.0]])
    np.testing.assert_allclose(group_advantages(rewards), [[-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5]], rtol=1e-4)
    np.testing.assert_array_equal(group_advantages(rows([4.0, 4.0])), [[0.0, 0.0]])


def test_the_clipped_loss_by_hand() -> None:
    """ρ = 1.5 and .5, Â = ±1, ε = .2: −1.2 and 1.5; −.5 and .8; and ρ = 1: −Â."""
    ratio, advantages = rows([1.5, 1.5, 0.5, 0.5, 1.0]), rows([1.0, -1.0, 1.0, -1.0, 0.7])
    got = grpo_loss(ratio.log(), torch.zeros_like(ratio), advantages, 0.2)
    np.testing.assert_allclose(got, [[-1.2, 1.5, -0.5, 0.8, -0.7]])


def test_k3_by_hand() -> None:
    """π = ½, π_ref = ¼: ½ − ln ½ − 1 = .19315; the other way round 2 − ln 2 − 1 = .30685."""
    np.testing.assert_allclose(k3(rows([0.5, 0.25]).log(), rows([0.25, 0.5]).log()), [[0.19315, 0.30685]], atol=1e-5)


def test_the_regularised_reward_by_hand() -> None:
    """π = (½, ½), π_ref = (¼, ¾), r = (4, 2): 3; KL(π ‖ π_ref) = ½ ln 2 + ½ ln ⅔ = .14384, KL(π_ref ‖ π) = ¼ ln ½ +
    ¾ ln 1.5 = .13081."""
    policy, reference, rewards = rows([0.5, 0.5]).log(), rows([0.25, 0.75]).log(), rows([4.0, 2.0])
    assert regularised_reward(policy, reference, rewards, 0.5).item() == pytest.approx(3 - 0.5 * 0.14384, abs=1e-5)
    forward = regularised_reward(policy, reference, rewards, 0.5, forward=True)
    assert forward.item() == pytest.approx(3 - 0.5 * 0.13081, abs=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: group_advantages(torch.zeros(3, 1)),
        lambda: group_advantages(torch.zeros(())),
        lambda: grpo_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3), 0.2),
        lambda: k3(torch.zeros(2, 3), torch.zeros(3)),
        lambda: regularised_reward(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3), 0.1),
    ],
)
def test_wrong_shapes_are_refused(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match="takes"):
        call()


# -- limits -------------------------------------------------------------------------------------------------------


def test_at_the_old_policy_it_is_reinforce() -> None:
    log_probs, advantages = random_rows(0, 2, 4), random_rows(1, 2, 4)
    own = gradient(lambda x: grpo_loss(x, log_probs, advantages, 0.2).sum(), log_probs)
    torch.testing.assert_close(own, gradient(lambda x: weighted_bc_loss(x, advantages).sum(), log_probs))


def test_without_a_clip_it_is_importance_sampling() -> None:
    log_probs, old, advantages = random_rows(0, 2, 4), random_rows(1, 2, 4), random_rows(2, 2, 4)
    weighted = ips_loss(importance_weights(log_probs, old, 1e12), advantages)
    torch.testing.assert_close(grpo_loss(log_probs, old, advantages, 1e12), weighted)


@PROPERTY
@given(st.integers(0, 99))
def test_the_mean_of_k3_is_the_divergence(seed: int) -> None:
    own, reference = torch.log_softmax(random_rows(seed, 2, 5), dim=-1)
    each = k3(own, reference)
    assert (each >= 0).all()
    torch.testing.assert_close((own.exp() * each).sum(), divergence(own, reference))


# -- gradients ----------------------------------------------------------------------------------------------------


def test_gradient_of_the_clipped_loss() -> None:
    """−ρ·Â, and 0 where the ratio has gone as far as it may in the advantage's direction."""
    log_probs, old, advantages = 0.3 * random_rows(0, 2, 6), 0.3 * random_rows(1, 2, 6), random_rows(2, 2, 6)
    assert gradcheck(lambda x: grpo_loss(x, old, advantages, 0.2), (log_probs.clone().requires_grad_(),))
    found = gradient(lambda x: grpo_loss(x, old, advantages, 0.2).sum(), log_probs)
    ratio = torch.exp(log_probs - old)
    beyond = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    assert 0 < beyond.sum() < 12
    torch.testing.assert_close(found, torch.where(beyond, 0.0, -ratio * advantages))


def test_gradients_of_the_penalties() -> None:
    """k3: 1 − π_ref/π. Over titles of π, whose draw has no gradient, that is −Σ π_ref ∇log π: of KL(π_ref ‖ π)."""
    log_probs, reference = random_rows(0, 2, 3), random_rows(1, 2, 3)
    assert gradcheck(lambda x: k3(x, reference), (log_probs.clone().requires_grad_(),))
    found = gradient(lambda x: k3(x, reference).sum(), log_probs)
    torch.testing.assert_close(found, 1 - torch.exp(reference - log_probs))
    logits, held = random_rows(2, 5), torch.log_softmax(random_rows(3, 5), dim=0)
    weight = torch.softmax(logits, dim=0)
    sampled = gradient(lambda x: (weight * k3(torch.log_softmax(x, dim=0), held)).sum(), logits)
    forward = gradient(lambda x: divergence(held, torch.log_softmax(x, dim=0)), logits)
    torch.testing.assert_close(sampled, forward)
    reverse = gradient(lambda x: divergence(torch.log_softmax(x, dim=0), held), logits)
    assert (sampled - reverse).abs().max() > 0.01


# -- invariances --------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.floats(-5, 5), st.floats(0.5, 20), st.integers(0, 99))
def test_advantages_feel_no_level_and_with_the_deviation_no_unit(shift: float, unit: float, seed: int) -> None:
    rewards = random_rows(seed, 3, 6)
    for deviation in (True, False):
        moved = group_advantages(rewards + shift, deviation)
        torch.testing.assert_close(moved, group_advantages(rewards, deviation), atol=1e-9, rtol=0)
    torch.testing.assert_close(group_advantages(unit * rewards), group_advantages(rewards), atol=2e-3, rtol=0)
    assert group_advantages(rewards).sum(dim=-1).abs().max() < 1e-9


@PROPERTY
@given(st.permutations(range(6)), st.integers(0, 99))
def test_a_group_has_no_order(order: list[int], seed: int) -> None:
    log_probs, old, rewards = random_rows(seed, 3, 1, 6)
    whole = grpo_loss(log_probs, old, group_advantages(rewards), 0.2)
    again = grpo_loss(log_probs[:, order], old[:, order], group_advantages(rewards[:, order]), 0.2)
    torch.testing.assert_close(again, whole[:, order])


# -- the expected step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
def test_the_expected_step_over_all_groups(size: int) -> None:
    """Every group of G titles with its probability: (1 − 1/G) times the gradient of Σπr − λ·KL, KL in the reward."""
    logits, kl_weight = REF.log() + random_rows(0, 5), 0.7
    fixed = torch.log_softmax(logits, dim=0)
    groups = torch.tensor(list(itertools.product(range(5), repeat=size)))
    chance = fixed.exp()[groups].prod(dim=-1)
    rewards = R[groups] - kl_weight * (fixed - REF.log())[groups]

    def loss(x: Tensor) -> Tensor:
        own = torch.log_softmax(x, dim=0)[groups]
        return (chance * grpo_loss(own, fixed[groups], group_advantages(rewards, False), 0.2).mean(dim=-1)).sum()

    def exact(x: Tensor) -> Tensor:
        return -regularised_reward(torch.log_softmax(x, dim=0), REF.log(), R, kl_weight)

    torch.testing.assert_close(gradient(loss, logits), (1 - 1 / size) * gradient(exact, logits))


def test_draws_give_the_expected_step() -> None:
    """The whole way by sampling: groups of 4 drawn by inverse CDF, within three standard errors."""
    logits = REF.log() + random_rows(0, 5)
    fixed = torch.log_softmax(logits, dim=0)
    titles = draw_titles(fixed.expand(20_000, 5), 4, torch.Generator().manual_seed(1))
    advantages = group_advantages(R[titles], deviation=False)
    each = -(advantages[..., None] * (torch.eye(5, dtype=torch.float64)[titles] - fixed.exp())).mean(dim=1)
    found = gradient(
        lambda x: grpo_loss(torch.log_softmax(x, dim=0)[titles], fixed[titles], advantages, 0.2).mean(), logits
    )
    torch.testing.assert_close(found, each.mean(dim=0))
    exact = gradient(lambda x: -(torch.softmax(x, dim=0) * R).sum(), logits)
    error = each.std(dim=0) / math.sqrt(len(each))
    assert (error < 0.01).all()
    assert ((found - 0.75 * exact).abs() < 3 * error).all()


# -- the optimum of each variant, groups without end ---------------------------------------------------------------


def climbed(kl_weight: float, deviation: bool, kl_in: str, kl: str, paid: Tensor = R) -> Tensor:
    """Where the expected step is 0 (or one title has nearly everything): natural gradient steps from π_ref, each title
    with its probability under π."""
    logits = REF.log().clone()
    for _ in range(600):
        fixed = torch.log_softmax(logits, dim=0)
        chance = fixed.exp()
        if chance.max() > 0.9999:
            break
        rewards = paid - kl_weight * (fixed - REF.log()) if kl_in == "reward" else paid
        advantages = rewards - chance @ rewards
        if deviation:
            advantages = advantages / (chance @ advantages**2).sqrt()

        def loss(x: Tensor, old: Tensor = fixed, advantages: Tensor = advantages) -> Tensor:
            own = torch.log_softmax(x, dim=0)
            value = (old.exp() * grpo_loss(own, old, advantages, 0.2)).sum()
            if kl_in == "reward":
                return value
            penalty = (old.exp() * k3(own, REF.log())).sum() if kl == "k3" else divergence(own, REF.log())
            return value + kl_weight * penalty

        logits = logits - 0.1 * gradient(loss, logits) / chance
    return torch.softmax(logits, dim=0)


def forward_optimum(kl_weight: float) -> Tensor:
    """λ·π_ref/(c − r), c such that it sums to 1."""
    low, high = R.max().item() + 1e-9, R.max().item() + 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (kl_weight * REF / (middle - R)).sum() > 1 else (low, middle)
    return kl_weight * REF / (low - R)


def deviation_at(policy: Tensor) -> float:
    return float((policy @ (R - policy @ R) ** 2).sqrt())


@pytest.mark.parametrize("kl_weight", [0.7, 2.0])
def test_without_the_deviation_it_finds_the_tilted_reference(kl_weight: float) -> None:
    """KL in the reward, or exactly in the loss: π_ref·exp(r/λ)/Z."""
    tilted = shares(REF * torch.exp(R / kl_weight))
    for kl_in in ("reward", "loss"):
        found = climbed(kl_weight, deviation=False, kl_in=kl_in, kl="exact")
        torch.testing.assert_close(found, tilted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kl_weight", [1.5, 4.0])
def test_with_the_deviation_the_temperature_is_multiplied_by_it(kl_weight: float) -> None:
    """π_ref·exp(r/(λσ))/Z with the σ that π itself has, and not with λ: the unit of the reward does not matter."""
    for paid in (R, 0.25 * R):
        found = climbed(kl_weight, deviation=True, kl_in="loss", kl="exact", paid=paid)
        deviation = (found @ (paid - found @ paid) ** 2).sqrt()
        torch.testing.assert_close(found, shares(REF * torch.exp(paid / (kl_weight * deviation))), atol=1e-5, rtol=0)
    assert (found - shares(REF * torch.exp(0.25 * R / kl_weight))).abs().max() > 0.04


def test_with_the_deviation_and_the_exact_divergence_it_may_collapse() -> None:
    """As π concentrates σ falls, and the temperature λσ with it: with a small λ nothing stops before the best title
    has it all. (Under k3, below, σ falls like the root of the temperature, and something always does.)"""
    found = climbed(0.7, deviation=True, kl_in="loss", kl="exact")
    assert found[3] > 0.999
    assert shares(REF * torch.exp(R / 0.7))[3] < 0.65


@pytest.mark.parametrize("kl_weight", [0.7, 2.0])
def test_with_kl_in_the_reward_the_deviation_moves_no_optimum(kl_weight: float) -> None:
    """It divides rewards less KL, which are all the same at π_ref·exp(r/λ)/Z, whatever the unit of r; elsewhere the
    step is longer or shorter, and no other."""
    for unit in (1.0, 0.25):
        tilted = shares(REF * torch.exp(unit * R / kl_weight))
        for policy, rests in ((tilted, True), (shares(tilted + 0.1), False)):
            rewards = unit * R - kl_weight * (policy / REF).log()
            bare = group_advantages(rewards, deviation=False)
            divided = group_advantages(rewards, deviation=True)
            assert (bare.abs().max() < 1e-9) == (divided.abs().max() < 1e-4) == rests
            torch.testing.assert_close(divided * (rewards.std() + 1e-4), bare)


@pytest.mark.parametrize("kl_weight", [0.7, 2.0])
def test_k3_in_the_loss_finds_another_policy(kl_weight: float) -> None:
    """λ·π_ref/(c − r); with the deviation λσ for λ."""
    found = climbed(kl_weight, deviation=False, kl_in="loss", kl="k3")
    torch.testing.assert_close(found, forward_optimum(kl_weight), atol=1e-5, rtol=0)
    assert (found - shares(REF * torch.exp(R / kl_weight))).abs().max() > 0.01
    found = climbed(kl_weight, deviation=True, kl_in="loss", kl="k3")
    torch.testing.assert_close(found, forward_optimum(kl_weight * deviation_at(found)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("forward", [False, True])
def test_the_objective_is_highest_at_the_optimum(forward: bool) -> None:
    """Of all policies, by their gradients: so validation measures what training climbs."""
    best = forward_optimum(0.7) if forward else shares(REF * torch.exp(R / 0.7))
    slope = gradient(lambda x: regularised_reward(torch.log_softmax(x, dim=0), REF.log(), R, 0.7, forward), best.log())
    assert slope.abs().max() < 1e-6
    for seed in range(5):
        other = torch.log_softmax(best.log() + 0.3 * random_rows(seed, 5), dim=0)
        values = (regularised_reward(x, REF.log(), R, 0.7, forward) for x in (best.log(), other))
        assert next(values) > next(values)


# -- drawing ------------------------------------------------------------------------------------------------------


def test_titles_are_drawn_as_often_as_they_are_likely() -> None:
    shut = torch.tensor([-1e9, 0.0, 1.0, -1e9, 0.5, -1e9])
    log_probs = torch.log_softmax(shut, dim=0)
    titles = draw_titles(log_probs.expand(2_000, 6), 10, torch.Generator().manual_seed(0))
    counts = torch.bincount(titles.flatten(), minlength=6) / 20_000
    expected = log_probs.exp()
    assert counts[[0, 3, 5]].sum() == 0
    assert ((counts - expected).abs() < 3.5 * (expected * (1 - expected) / 20_000).sqrt() + 1e-9).all()
    # whatever is drawn from [0, 1), the last title that is open is the last
    patient = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, **named: torch.ones(shape[0], dtype=named["dtype"]))
        assert draw_titles(log_probs[None], 3, patient).tolist() == [[4, 4, 4]]


def test_the_old_policy_is_renewed_every_cycle(log: InteractionLog, backbone: HSTU) -> None:
    batch = Histories(log).batch(torch.arange(4))
    policy, old = copy.deepcopy(backbone), OldPolicy(updates=3, seed=0)
    versions, asked = [], []
    for _ in range(7):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.05 * torch.ones_like(parameter))
            own = torch.log_softmax(GRPO()._both(policy, batch, _problem(backbone))[0], dim=-1)
        versions.append(own)
        asked.append(old.log_probs(policy, batch, own))
    for step, found in enumerate(asked):
        torch.testing.assert_close(found, versions[step // 3 * 3], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(versions[0], versions[2], atol=1e-3)


def _problem(reference: HSTU) -> Any:
    return type("Bare", (), {"reference": reference})()


# -- in the agent -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ragged(log: InteractionLog) -> InteractionLog:
    """Histories of one to six events: twenty of the log's, cut."""
    keep = np.concatenate([np.arange(6 * user, 6 * user + 1 + user % 6) for user in range(20)])
    names = ("user", "epoch", "step", "hours", "title", "duration_minutes", "watch_minutes", "score")
    return InteractionLog(**{name: getattr(log, name)[keep] for name in names}, n_titles=log.n_titles)


@pytest.fixture(scope="module")
def policy(backbone: HSTU) -> HSTU:
    """Another one than the reference."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        moved = HSTU(backbone.config, 30)
        moved.load_state_dict({k: v + 0.3 * torch.randn_like(v) for k, v in backbone.state_dict().items()})
    return moved.eval()


Context = tuple[int, int, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def contexts(log: InteractionLog, policy: HSTU, backbone: HSTU, rewards: RewardEnsemble) -> Iterator[Context]:
    """(row, step, log π, log π_ref, r̂), one context at a time."""
    whole = log.sequences()
    for row, length in enumerate(whole.length):
        for step in range(length):
            one = slice(row, row + 1)
            past = whole.titles[one, :step], whole.scores[one, :step], whole.times[one, :step]
            seen = Observations(*past, np.array([step]), whole.epoch[one], whole.n_titles)
            own, ref = (backbone_log_probs(model, seen)[0].astype(np.float64) for model in (policy, backbone))
            yield row, step, own, ref, rewards.mean(seen)[0].astype(np.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"deviation": False, "kl_in": "reward", "kl_weight": 0.5},
        {"kl": "exact", "kl_weight": 0.5, "group": 3},
    ],
)
def test_the_loss_in_the_agent(
    options: dict[str, Any], ragged: InteractionLog, policy: HSTU, backbone: HSTU, rewards: RewardEnsemble
) -> None:
    """On the titles that the same generator draws; and none of them had been seen."""
    agent, histories = GRPO(**options), Histories(ragged)
    config, batch = agent.config, next(histories.chunks())
    problem: Any = agent.problem(histories, ragged, Parts(backbone, rewards, 5, "train"))
    with torch.no_grad():
        got = float(agent.batch_loss(policy, batch, problem))
        logs = agent._both(policy, batch, problem)[0]
    assert problem.old.samples == config.group * len(ragged)
    rng = torch.Generator().manual_seed(derived_seed(5, "GRPO titles on train") % 2**63)
    titles = draw_titles(logs, config.group, rng).numpy()
    losses = []
    for row, step, own, ref, predicted in contexts(ragged, policy, backbone, rewards):
        drawn = titles[row, step]
        assert np.isfinite(own[drawn]).all()
        value = predicted[drawn]
        if config.kl_in == "reward":
            value = value - config.kl_weight * (own[drawn] - ref[drawn])
        advantages = value - value.mean()
        if config.deviation:
            advantages = advantages / (value.std(ddof=1) + 1e-4)
        loss = -advantages.mean()  # 0, since the ratio is 1: the gradient is where it matters
        if config.kl_in == "loss" and config.kl == "k3":
            loss += config.kl_weight * np.mean(np.exp(ref[drawn] - own[drawn]) - (ref[drawn] - own[drawn]) - 1)
        elif config.kl_in == "loss":
            out = np.isfinite(own)
            loss += config.kl_weight * (np.exp(own[out]) * (own[out] - ref[out])).sum()
        losses.append(loss)
    assert got == pytest.approx(np.mean(losses), abs=2e-3)


@pytest.mark.parametrize("options", [{"kl_weight": 0.0}, {"kl_in": "reward", "kl_weight": 2.0, "deviation": False}])
def test_its_step_is_reinforce_on_advantages(
    options: dict[str, Any], ragged: InteractionLog, policy: HSTU, backbone: HSTU, rewards: RewardEnsemble
) -> None:
    """The same gradient as weighted imitation of the titles drawn, in every parameter; KL takes from the reward."""
    agent, histories = GRPO(group=4, **options), Histories(ragged)
    batch = next(histories.chunks())
    problem: Any = agent.problem(histories, ragged, Parts(backbone, rewards, 5, "train"))
    one, two = copy.deepcopy(policy), copy.deepcopy(policy)
    agent.batch_loss(one, batch, problem).backward()
    own, reference = agent._both(two, batch, problem)
    rng = torch.Generator().manual_seed(derived_seed(5, "GRPO titles on train") % 2**63)
    titles = draw_titles(own.detach(), 4, rng)
    paid = rewards.on(ragged).mean(batch.rows).gather(-1, titles)
    paid = paid - options["kl_weight"] * (own.detach() - reference).gather(-1, titles)
    advantages = group_advantages(paid, agent.config.deviation)
    chosen = own.gather(-1, titles)
    valid = batch.valid[..., None].expand_as(chosen)
    weighted_bc_loss(chosen[valid][None], advantages[valid][None]).mean().backward()
    for (name, first), second in zip(one.named_parameters(), two.parameters(), strict=True):
        assert first.grad is not None, name
        torch.testing.assert_close(first.grad, second.grad, atol=1e-5, rtol=1e-3)
    assert max(float(p.grad.abs().max()) for p in one.parameters() if p.grad is not None) > 1e-3


def test_dropout_is_off(ragged: InteractionLog, backbone: HSTU, rewards: RewardEnsemble) -> None:
    """It would move the ratio and KL: at π_ref, although in training, both are at rest."""
    assert backbone.config.dropout > 0
    agent, histories = GRPO(), Histories(ragged)
    problem = agent.problem(histories, ragged, Parts(backbone, rewards, 5, "train"))
    policy = copy.deepcopy(backbone).train()
    loss = agent.batch_loss(policy, next(histories.chunks()), problem)
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"deviation": False}, {"kl": "exact"}, {"kl_in": "reward", "deviation": False}, {"kl_in": "reward"}],
)
def test_the_objective_in_the_agent(
    options: dict[str, Any], ragged: InteractionLog, policy: HSTU, backbone: HSTU, rewards: RewardEnsemble
) -> None:
    agent, histories = GRPO(kl_weight=0.5, **options), Histories(ragged)
    problem = agent.problem(histories, ragged, Parts(backbone, rewards, 5, "validation"))
    with torch.no_grad():
        got = float(agent.objective(policy, next(histories.chunks()), problem))
    values = []
    for _, _, own, ref, predicted in contexts(ragged, policy, backbone, rewards):
        out = np.isfinite(own)
        pi, held, r = np.exp(own[out]), np.exp(ref[out]), predicted[out]
        kl = (held * (ref[out] - own[out])).sum() if agent.config.forward else (pi * (own[out] - ref[out])).sum()
        in_deviations = agent.config.deviation and agent.config.kl_in == "loss"
        scale = np.sqrt(held @ (r - held @ r) ** 2) if in_deviations else 1.0
        values.append(pi @ r - 0.5 * scale * kl)
    assert got == pytest.approx(-np.mean(values), abs=2e-3)
    if agent.config.kl_in == "reward":  # what PPO is measured by
        ppo = penalised_reward(policy, backbone, histories, rewards.on(ragged), 0.5)
        assert got == pytest.approx(-ppo, abs=1e-5)


@pytest.mark.parametrize("options", [{"updates": 4, "clip_range": 0.05}, {"kl_in": "reward", "deviation": False}])
def test_variants_learn(
    options: dict[str, Any], log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble, training: Any
) -> None:
    """The exact objective falls; titles are counted where there are contexts: 32 steps of 32 users with 6 events."""
    told: list[float] = []
    agent = GRPO(training=training, group=4, **options)
    agent.fit(log, backbone, rewards, after_check=lambda _, objective: told.append(objective))
    histories = Histories(log)
    problem = agent.problem(histories, log, Parts(backbone, rewards, 0, "asking"))
    with torch.no_grad():
        before, after = (
            float(agent.objective(policy, histories.batch(torch.arange(150)), problem))
            for policy in (backbone, agent.policy)
        )
    assert after < before - 0.1
    assert told[-1] == min(told)
    assert agent.record.samples == 4 * 32 * 32 * 6


@pytest.mark.parametrize("options", [{}, {"reward": "worst", "bound": 4.0}, {"updates": 3, "kl_in": "reward"}])
def test_it_learns_from_a_log_in_shards(options: dict[str, Any], tmp_path: Path) -> None:
    """Without reading it whole; rewards are those of the same contexts in memory."""
    config = WorldConfig(n_titles=25, history_length=6, history_median=4, cold_share=0.2, reward_noise=0.0)
    steps = TrainingConfig(steps=12, batch_users=8, learning_rate=1e-2, warmup_steps=2, checks=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "PART_EVENTS", 60)
        shards = generation.generate(generation.Plan(world=config, n_users=100, users_per_shard=30), tmp_path / "log")
        backbone = pretrain(shards, HSTUConfig(dimensions=8, n_layers=1), steps)
        rewards = fit_reward_ensemble(shards, backbone, RewardEnsembleConfig(members=2, training=steps))
        whole, agent = shards.read(), GRPO(training=steps, **options)
        rewards.tables_in = tmp_path / "tables"
        patch.setattr(ShardedLog, "read", lambda self: pytest.fail("the whole log was read"))
        agent.fit(shards, backbone, rewards)
    assert agent.record.gradient_steps == 12
    assert agent.record.best_step > 0
    users = torch.arange(40, 70)
    on_disk, in_memory = (
        shaped_rewards(rewards, agent.config, backbone).on(log).mean(users) for log in (shards, whole)
    )
    torch.testing.assert_close(on_disk[:, : in_memory.shape[1]], in_memory, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("kl_weight", -0.1),
        ("group", 1),
        ("deviation", 1),
        ("kl_in", "both"),
        ("kl", "k1"),
        ("clip_range", 0.0),
        ("updates", 0),
    ],
)
def test_values_out_of_range_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"GRPOConfig\.{option} must be"):
        GRPO(**{option: value})


def test_the_least_deviation_by_hand() -> None:
    """Rewards 0 and 2e-4: ∓1e-4 over √2·1e-4 + 1e-4, which is ∓1/(√2 + 1) = ∓(√2 − 1)."""
    gap = math.sqrt(2) - 1
    np.testing.assert_allclose(group_advantages(rows([0.0, 2e-4])), [[-gap, gap]], rtol=1e-6)
