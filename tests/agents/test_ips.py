"""IPS and the doubly robust gradient: by hand, limits, gradients, invariances; unbiased on random logs; optima."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
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
from recsim_gr.agents import IPS, DoublyRobust
from recsim_gr.agents.base import Parts, backbone_log_probs
from recsim_gr.agents.distributions import divergence
from recsim_gr.agents.doubly_robust import doubly_robust_loss
from recsim_gr.agents.ips import importance_weights, ips_loss, self_normalised
from recsim_gr.agents.reward_weighted_bc import weighted_bc_loss
from recsim_gr.backbones import HSTU, HSTUConfig
from recsim_gr.errors import ConfigError
from recsim_gr.generation import Plan, generate
from recsim_gr.histories import Histories, histories_of
from recsim_gr.log import InteractionLog, ShardedLog
from recsim_gr.observations import Observations
from recsim_gr.pretraining import pretrain
from recsim_gr.rewards import RewardEnsemble, RewardEnsembleConfig, fit_reward_ensemble
from recsim_gr.training import TrainingConfig
from recsim_gr.world import WorldConfig

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
MU = torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05], dtype=torch.float64)
REF = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64)
R = torch.tensor([1.5, 4.0, 2.0, 5.0, 3.0], dtype=torch.float64)
NEVER = 1e12


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


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


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    x = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(x), x)
    return found


# -- by hand ------------------------------------------------------------------------------------------------------


def test_weights_and_losses_by_hand() -> None:
    """π = ½, ½, .9 over μ = ¼, ½, .1: w = 2, 1 and 9, cut to 5; scores 3, −1, 2: −6, 1, −10."""
    log_probs, log_mu = rows([0.5, 0.5, 0.9]).log(), rows([0.25, 0.5, 0.1]).log()
    weights = importance_weights(log_probs, log_mu, 5.0)
    np.testing.assert_allclose(weights, [[2.0, 1.0, 5.0]])
    np.testing.assert_allclose(ips_loss(weights, rows([3.0, -1.0, 2.0])), [[-6.0, 1.0, -10.0]])
    # mean weight of the first two (2 + 1)/2: 4/3 and 2/3; whatever stands on the padding
    normal = self_normalised(weights, torch.tensor([[True, True, False]]))
    np.testing.assert_allclose(normal[0, :2], [4 / 3, 2 / 3])


def test_doubly_robust_by_hand() -> None:
    """π = (¼, ¾), r̂ = (4, 2): ¼·4 + ¾·2 = 2.5; the log has title 0 with score 5 and weight ½: 2.5 + ½·(5 − 4) = 3."""
    log_probs = torch.tensor([[[0.25, 0.75]]], dtype=torch.float64).log()
    predicted = torch.tensor([[[4.0, 2.0]]], dtype=torch.float64)
    got = doubly_robust_loss(log_probs.exp(), rows([0.5]), rows([5.0]), predicted, torch.tensor([[0]]))
    np.testing.assert_allclose(got, [[-3.0]])


@pytest.mark.parametrize(
    "call",
    [
        lambda: importance_weights(torch.zeros(3), torch.zeros(3), 1.0),
        lambda: importance_weights(torch.zeros(2, 3), torch.zeros(3), 1.0),
        lambda: ips_loss(torch.zeros(2, 3), torch.zeros(2)),
        lambda: self_normalised(torch.zeros(2, 3), torch.zeros(3)),
        lambda: doubly_robust_loss(*(torch.zeros(2, 3),) * 4, torch.zeros(2, 3, dtype=torch.int64)),
        lambda: doubly_robust_loss(
            torch.zeros(2, 3, 4), torch.zeros(2), torch.zeros(2, 3), torch.zeros(2, 3, 4), torch.zeros(2, 3)
        ),
    ],
)
def test_wrong_shapes_are_refused(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match="takes"):
        call()


# -- limits -------------------------------------------------------------------------------------------------------


def test_at_the_logging_policy_it_is_reward_weighted_imitation() -> None:
    """w = 1: on-policy REINFORCE, the gradient of −r·log π."""
    log_probs, rewards = random_rows(0, 2, 4), random_rows(1, 2, 4)
    own = gradient(lambda x: ips_loss(importance_weights(x, log_probs, 10.0), rewards).sum(), log_probs)
    imitation = gradient(lambda x: weighted_bc_loss(x, rewards).sum(), log_probs)
    torch.testing.assert_close(own, imitation)


def test_with_the_clip_at_zero_it_is_reward_weighted_imitation() -> None:
    """Every weight is c, wherever π is."""
    log_probs, log_mu, rewards = random_rows(0, 2, 4), random_rows(1, 2, 4), random_rows(2, 2, 4)
    small = 1e-6
    own = gradient(lambda x: ips_loss(importance_weights(x, log_mu, small), rewards).sum(), log_probs)
    imitation = gradient(lambda x: weighted_bc_loss(x, rewards).sum(), log_probs)
    torch.testing.assert_close(own / small, imitation)


def test_equal_weights_are_not_moved_by_normalising() -> None:
    same = torch.full((2, 3), 0.7, dtype=torch.float64)
    torch.testing.assert_close(self_normalised(same, torch.ones(2, 3, dtype=torch.bool)), torch.ones_like(same))


def test_a_model_of_zeros_is_ips() -> None:
    log_probs = torch.log_softmax(random_rows(0, 2, 3, 5), dim=-1)
    logged, rewards = torch.tensor([[0, 1, 2], [3, 4, 0]]), random_rows(1, 2, 3)
    weights = importance_weights(log_probs.gather(-1, logged[..., None])[..., 0], random_rows(2, 2, 3), 10.0)
    got = doubly_robust_loss(log_probs.exp(), weights, rewards, torch.zeros(2, 3, 5, dtype=torch.float64), logged)
    torch.testing.assert_close(got, ips_loss(weights, rewards))


# -- gradients ----------------------------------------------------------------------------------------------------


def test_gradient_of_the_weights() -> None:
    """Finite differences below the clip; min(w, c)·∇log π also above it."""
    log_probs, log_mu = random_rows(0, 2, 3), random_rows(1, 2, 3)
    x = log_probs.clone().requires_grad_()
    assert gradcheck(lambda x: importance_weights(x, log_mu, NEVER), (x,))
    for clip in (NEVER, 0.8):
        found = gradient(lambda x, clip=clip: importance_weights(x, log_mu, clip).sum(), log_probs)  # type: ignore[misc]
        torch.testing.assert_close(found, torch.exp(log_probs - log_mu).clamp(max=clip))
    rewards = random_rows(2, 2, 3)
    assert gradcheck(lambda x: ips_loss(importance_weights(x, log_mu, NEVER), rewards), (x,))


def test_gradient_of_the_self_normalised_loss() -> None:
    """−w·(r − V)/Σ w, V = Σ w·r/Σ w."""
    log_probs, log_mu, rewards = random_rows(0, 2, 3), random_rows(1, 2, 3), random_rows(2, 2, 3)
    valid = torch.tensor([[True, True, True], [True, True, False]])

    def loss(x: Tensor) -> Tensor:
        weights = self_normalised(importance_weights(x, log_mu, NEVER), valid)
        return (ips_loss(weights, rewards) * valid).sum() / valid.sum()

    assert gradcheck(loss, (log_probs.clone().requires_grad_(),))
    weights = torch.exp(log_probs - log_mu) * valid
    value = (weights * rewards).sum() / weights.sum()
    torch.testing.assert_close(gradient(loss, log_probs), -weights * (rewards - value) / weights.sum())


def test_gradient_of_the_doubly_robust_loss() -> None:
    logged, rewards, predicted = torch.tensor([[0, 3]]), random_rows(1, 1, 2), random_rows(2, 1, 2, 4)
    log_mu = random_rows(3, 1, 2)

    def loss(logits: Tensor) -> Tensor:
        log_probs = torch.log_softmax(logits, dim=-1)
        weights = importance_weights(log_probs.gather(-1, logged[..., None])[..., 0], log_mu, NEVER)
        return doubly_robust_loss(log_probs.exp(), weights, rewards, predicted, logged)

    logits = random_rows(0, 1, 2, 4)
    assert gradcheck(loss, (logits.clone().requires_grad_(),))
    # −π(r̂ − Σπr̂) everywhere, and −w(r − r̂)(1[a] − π)
    policy = torch.softmax(logits, dim=-1)
    own = policy.gather(-1, logged[..., None])
    expected = -policy * (predicted - (policy * predicted).sum(-1, keepdim=True))
    correction = own / log_mu.exp()[..., None] * (rewards[..., None] - predicted.gather(-1, logged[..., None]))
    expected += correction * policy
    expected.scatter_add_(-1, logged[..., None], -correction)
    torch.testing.assert_close(gradient(lambda x: loss(x).sum(), logits), expected)


def test_a_bad_title_above_the_clip_is_still_pushed_down() -> None:
    """Where plain differentiation of min(w, c) would let it be."""
    log_probs = rows([math.log(0.9)])
    found = gradient(
        lambda x: ips_loss(importance_weights(x, rows([math.log(0.01)]), 10.0), rows([-1.0])).sum(), log_probs
    )
    assert found.item() == pytest.approx(10.0)


# -- invariances --------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.floats(-5, 5), st.floats(0.5, 20), st.integers(0, 99))
def test_self_normalised_it_does_not_feel_a_constant(shift: float, clip: float, seed: int) -> None:
    """r + c for every event moves the loss by −c and its gradient not at all, truncated or not."""
    log_probs, log_mu, rewards = random_rows(seed, 2, 4), random_rows(seed + 1, 2, 4), random_rows(seed + 2, 2, 4)
    valid = torch.ones(2, 4, dtype=torch.bool)

    def loss(x: Tensor, rewards: Tensor) -> Tensor:
        return ips_loss(self_normalised(importance_weights(x, log_mu, clip), valid), rewards).mean()

    torch.testing.assert_close(loss(log_probs, rewards + shift), loss(log_probs, rewards) - shift)
    one, two = (gradient(lambda x, r=r: loss(x, r), log_probs) for r in (rewards, rewards + shift))  # type: ignore[misc]
    torch.testing.assert_close(one, two, atol=1e-9, rtol=0)


@PROPERTY
@given(st.floats(-5, 5), st.floats(0.5, 20), st.integers(0, 99))
def test_the_doubly_robust_gradient_does_not_feel_a_constant(shift: float, clip: float, seed: int) -> None:
    """On r and r̂ alike: Σπ = 1, and residuals stay."""
    logits, predicted, rewards = random_rows(seed, 2, 3, 4), random_rows(seed + 1, 2, 3, 4), random_rows(seed + 2, 2, 3)
    logged, log_mu = torch.tensor([[0, 1, 2], [3, 3, 0]]), random_rows(seed + 3, 2, 3)

    def loss(x: Tensor, shift: float) -> Tensor:
        log_probs = torch.log_softmax(x, dim=-1)
        weights = importance_weights(log_probs.gather(-1, logged[..., None])[..., 0], log_mu, clip)
        return doubly_robust_loss(log_probs.exp(), weights, rewards + shift, predicted + shift, logged).mean()

    torch.testing.assert_close(loss(logits, shift), loss(logits, 0.0) - shift)
    one, two = (gradient(lambda x, c=c: loss(x, c), logits) for c in (0.0, shift))  # type: ignore[misc]
    torch.testing.assert_close(one, two, atol=1e-9, rtol=0)


# -- estimates of known values, on random logs ---------------------------------------------------------------------

EVENTS = 40_000


class Logged:
    """Random events of μ in one context of five titles, with noisy scores; π is another policy."""

    def __init__(self, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.titles = torch.multinomial(MU, EVENTS, replacement=True, generator=rng)
        self.scores = R[self.titles] + torch.randn(EVENTS, generator=rng, dtype=torch.float64)
        self.logits = REF.log() + torch.tensor([0.3, -0.2, 0.5, 0.0, 0.4], dtype=torch.float64)
        self.policy = torch.softmax(self.logits, dim=0)
        self.value = (self.policy * R).sum()
        self.exact = -self.policy * (R - self.value)  # ∂(−Σ π·r)/∂ logits

    def weights(self, logits: Tensor, mu: Tensor = MU) -> Tensor:
        return importance_weights(
            torch.log_softmax(logits, dim=0)[self.titles][:, None], mu.log()[self.titles][:, None], NEVER
        )

    def score_gradients(self, factors: Tensor) -> Tensor:
        """(E, 5): factor·∇log π(a) of every event."""
        return factors[:, None] * (torch.eye(5, dtype=torch.float64)[self.titles] - self.policy)


def assert_unbiased(each: Tensor, exact: Tensor) -> None:
    """Within three standard errors, which must be small enough to say something."""
    error = each.std(dim=0) / math.sqrt(EVENTS)
    assert (error < 0.05).all()
    assert ((each.mean(dim=0) - exact).abs() < 3 * error + 1e-12).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("baseline", [0.0, 3.0])
def test_the_ips_objective_and_its_gradient_are_unbiased(seed: int, baseline: float) -> None:
    log = Logged(seed)
    rewards = (log.scores - baseline)[:, None]
    each = ips_loss(log.weights(log.logits), rewards)
    assert_unbiased(each, -(log.value - baseline))
    found = gradient(lambda x: ips_loss(log.weights(x), rewards).mean(), log.logits)
    by_event = log.score_gradients(each[:, 0])  # the gradient of each event's loss is its loss times ∇log π
    torch.testing.assert_close(found, by_event.mean(dim=0))
    assert_unbiased(by_event, log.exact)


def test_the_baseline_takes_variance_out() -> None:
    log = Logged(0)
    spread = {
        baseline: log.score_gradients(ips_loss(log.weights(log.logits), (log.scores - baseline)[:, None])[:, 0])
        .var(0)
        .sum()
        for baseline in (0.0, 3.0)
    }
    assert spread[3.0] < 0.5 * spread[0.0]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_doubly_robust_estimate_is_unbiased_if_either_is_right(seed: int) -> None:
    """A wrong model with the right μ; the right model with a wrong μ; neither is not."""
    log, wrong = Logged(seed), torch.tensor([3.0, 3.5, 1.0, 4.0, 2.0], dtype=torch.float64)
    everyone = log.titles[:, None]

    def losses(logits: Tensor, model: Tensor, mu: Tensor) -> Tensor:
        log_probs = torch.log_softmax(logits, dim=0).expand(EVENTS, 1, 5)
        return doubly_robust_loss(
            log_probs.exp(), log.weights(logits, mu), log.scores[:, None], model.expand(EVENTS, 1, 5), everyone
        )

    for model, mu in ((wrong, MU), (R, REF)):
        assert_unbiased(losses(log.logits, model, mu), -log.value)
        found = gradient(lambda x, m=model, u=mu: losses(x, m, u).mean(), log.logits)  # type: ignore[misc]
        weights = log.weights(log.logits, mu)[:, 0] * (log.scores - model[log.titles])
        direct = -log.policy * (model - (log.policy * model).sum())
        each = direct - log.score_gradients(weights)
        torch.testing.assert_close(found, each.mean(dim=0))
        assert_unbiased(each, log.exact)
    assert abs(losses(log.logits, wrong, REF).mean() + log.value) > 0.1


def test_a_perfect_model_has_the_exact_gradient() -> None:
    """Without noise every residual is 0: no sampling error at all, whatever the propensities."""
    log = Logged(0)

    def loss(logits: Tensor) -> Tensor:
        log_probs = torch.log_softmax(logits, dim=0).expand(EVENTS, 1, 5)
        weights = log.weights(logits, REF)
        scores = R[log.titles][:, None]
        return doubly_robust_loss(log_probs.exp(), weights, scores, R.expand(EVENTS, 1, 5), log.titles[:, None]).mean()

    torch.testing.assert_close(gradient(loss, log.logits), log.exact)
    assert loss(log.logits).item() == pytest.approx(-log.value.item())


# -- closed forms -------------------------------------------------------------------------------------------------

COUNTS = torch.tensor([7, 5, 4, 3, 1])  # MU in twentieths
EVENT = torch.repeat_interleave(torch.arange(5), COUNTS)


@pytest.mark.parametrize("kl_weight", [0.5, 2.0])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("baseline", [0.0, 2.5])
def test_ips_finds_the_tilted_reference_on_noisy_scores(kl_weight: float, normalise: bool, baseline: float) -> None:
    """π = π_ref·exp(E[r]/λ)/Z: each score 1 above or below its mean, as often; no risk is sought."""
    titles = torch.cat([EVENT, EVENT])[None]
    noise = torch.cat([torch.ones(20), -torch.ones(20)]).double()[None]
    rewards, valid = R[titles] + noise - baseline, torch.ones(1, 40, dtype=torch.bool)

    def loss(logits: Tensor) -> Tensor:
        log_probs = torch.log_softmax(logits, dim=0)
        weights = importance_weights(log_probs[titles], MU.log()[titles], NEVER)
        weights = self_normalised(weights, valid) if normalise else weights
        return ips_loss(weights, rewards).mean() + kl_weight * divergence(log_probs, REF.log())

    tilted = REF * torch.exp(R / kl_weight)
    torch.testing.assert_close(minimise(loss), tilted / tilted.sum(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("model", "mu"), [(REF * 10, MU), (R, REF)])
def test_doubly_robust_finds_it_if_either_is_right(model: Tensor, mu: Tensor) -> None:
    titles = EVENT[None]

    def loss(logits: Tensor) -> Tensor:
        log_probs = torch.log_softmax(logits, dim=0)
        weights = importance_weights(log_probs[titles], mu.log()[titles], NEVER)
        spread = (1, 20, 5)
        losses = doubly_robust_loss(log_probs.exp().expand(spread), weights, R[titles], model.expand(spread), titles)
        return losses.mean() + divergence(log_probs, REF.log())

    tilted = REF * torch.exp(R)
    torch.testing.assert_close(minimise(loss), tilted / tilted.sum(), atol=1e-5, rtol=0)


# -- in the agents ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ragged(log: InteractionLog) -> InteractionLog:
    """Histories of one to six events: twenty of the log's, cut, with their propensities."""
    keep = np.concatenate([np.arange(6 * user, 6 * user + 1 + user % 6) for user in range(20)])
    names = ("user", "epoch", "step", "hours", "title", "duration_minutes", "watch_minutes", "score", "propensities")
    return InteractionLog(**{name: getattr(log, name)[keep] for name in names}, n_titles=log.n_titles)


@pytest.fixture(scope="module")
def policy(backbone: HSTU) -> HSTU:
    """Another one than the reference."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        moved = HSTU(backbone.config, 30)
        state = {k: v + 0.3 * torch.randn_like(v) for k, v in backbone.state_dict().items()}
    moved.load_state_dict(state)
    return moved.eval()


def expected_loss(agent: Any, policy: HSTU, log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble) -> float:
    """One context at a time, in NumPy."""
    whole, config = log.sequences(), agent.config
    weights, values, models, kls, users = [], [], [], [], []
    event = 0
    for row, length in enumerate(whole.length):
        for step in range(length):
            one = slice(row, row + 1)
            seen = Observations(
                whole.titles[one, :step],
                whole.scores[one, :step],
                whole.times[one, :step],
                np.array([step]),
                whole.epoch[one],
                whole.n_titles,
            )
            own, ref = (backbone_log_probs(p, seen)[0].astype(np.float64) for p in (policy, backbone))
            title, out = whole.titles[row, step], np.isfinite(own)
            mu = log.propensities[event] if config.propensities == "known" else np.exp(ref[title])  # type: ignore[index]
            weights.append(min(np.exp(own[title]) / mu, config.clip))
            kls.append((np.exp(own[out]) * (own[out] - ref[out])).sum())
            predicted = rewards.mean(seen)[0].astype(np.float64)
            model = isinstance(agent, DoublyRobust)
            values.append(whole.scores[row, step] - (predicted[title] if model else 0.0))
            models.append((np.exp(own[out]) * predicted[out]).sum() if model else 0.0)
            users.append(row)
            event += 1
    weight, value, user = np.array(weights), np.array(values), np.array(users)
    baseline = getattr(config, "baseline", "none")
    if baseline == "batch":
        value = value - value.mean()
    if baseline == "user":
        value = value - (np.bincount(user, value) / np.bincount(user))[user]
    if config.self_normalise:
        weight = weight / weight.mean()
    return float(-(np.array(models) + weight * value).mean() + config.kl_weight * np.mean(kls))


@pytest.mark.parametrize(
    "agent",
    [
        IPS(),
        IPS(clip=1.5, baseline="none"),
        IPS(baseline="user", kl_weight=0.0),
        IPS(self_normalise=True, baseline="none", kl_weight=1.0),
        IPS(propensities="estimated", clip=2.0),
        DoublyRobust(),
        DoublyRobust(propensities="estimated", clip=1.5, self_normalise=True, kl_weight=0.0),
    ],
    ids=lambda agent: agent.name,
)
def test_the_loss_in_the_agent(
    agent: Any, ragged: InteractionLog, policy: HSTU, backbone: HSTU, rewards: RewardEnsemble
) -> None:
    histories = Histories(ragged)
    problem = agent.problem(histories, ragged, Parts(backbone, rewards, 0, "train"))
    with torch.no_grad():
        got = float(agent.batch_loss(policy, next(histories.chunks()), problem))
    assert got == pytest.approx(expected_loss(agent, policy, ragged, backbone, rewards), abs=2e-3)


def test_estimated_weights_are_one_at_the_start(ragged: InteractionLog, backbone: HSTU) -> None:
    """With known propensities they are not: μ knows the user."""
    histories, loss = Histories(ragged), {}
    batch = next(histories.chunks())
    for propensities in ("known", "estimated"):
        agent = IPS(propensities=propensities, baseline="none")
        problem = agent.problem(histories, ragged, Parts(backbone, None, 0, "train"))
        with torch.no_grad():
            loss[propensities] = float(agent.batch_loss(backbone, batch, problem))
    mean = float(batch.scores[batch.valid].mean())
    assert loss["estimated"] == pytest.approx(-mean, abs=1e-4)
    assert abs(loss["known"] + mean) > 0.01


def test_propensities_are_needed_only_where_they_are_known(log: InteractionLog, backbone: HSTU, training: Any) -> None:
    bare = replace(log, propensities=None)
    for kind in (IPS, DoublyRobust):
        assert kind().needs_propensities
        assert not kind(propensities="estimated").needs_propensities
    with pytest.raises(ConfigError, match=r"IPS: this log carries no propensities.*propensities='estimated'"):
        IPS(training=training).fit(bare, backbone)
    assert IPS(training=training, propensities="estimated").fit(bare, backbone).record.gradient_steps == 32


def test_propensities_of_a_log_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the same log in memory, each at its event; and a log that was cut."""
    monkeypatch.setattr(generation, "PART_EVENTS", 60)
    world = WorldConfig(n_titles=25, history_length=6, history_median=4, reward_noise=0.0, seed=5)
    shards = generate(Plan(world=world, n_users=60, users_per_shard=30, propensities=True), tmp_path / "log")
    backbone = HSTU(HSTUConfig(dimensions=8, n_layers=1, max_length=6), 25).eval()
    for log in (shards, shards.users(7, 41)):
        whole, histories = log.read(), histories_of(log)
        found = IPS().problem(histories, log, Parts(backbone, None)).extra["log_propensities"]
        assert found.shape == (log.n_users, histories.longest)
        chunk = next(histories.chunks(log.n_users))
        valid = torch.cat([batch.valid for batch in histories.chunks()])
        assert not found[~valid].any()
        np.testing.assert_allclose(found[valid], np.log(whole.require_propensities()), rtol=1e-6)
        assert IPS().batch_loss(backbone, chunk, IPS().problem(histories, log, Parts(backbone, None))).isfinite()
    bare = generate(Plan(world=world, n_users=60, users_per_shard=30), tmp_path / "bare")
    with pytest.raises(ConfigError, match="carries no propensities"):
        IPS().problem(histories_of(bare), bare, Parts(backbone, None))


def of_users(log: InteractionLog, rows: np.ndarray) -> InteractionLog:
    """The users at some rows of a log, in that order."""
    starts = np.append(np.flatnonzero(log.step == 0), len(log))
    keep = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in rows])
    names = ("user", "epoch", "step", "hours", "title", "duration_minutes", "watch_minutes", "score", "propensities")
    return replace(log, **{name: getattr(log, name)[keep] for name in names})


@pytest.mark.parametrize("kind", [IPS, DoublyRobust])
@pytest.mark.parametrize("propensities", ["known", "estimated"])
def test_a_log_in_shards_is_learned_from_as_it_is(
    kind: Any, propensities: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches in an order of their own, each with its users' weights and predictions; and the whole of a fit."""
    monkeypatch.setattr(generation, "PART_EVENTS", 60)
    world = WorldConfig(n_titles=25, history_length=6, history_median=4, reward_noise=0.0, seed=5)
    generate(Plan(world=world, n_users=60, users_per_shard=30, propensities=True), tmp_path / "log")
    log = InteractionLog.open(tmp_path / "log")
    assert isinstance(log, ShardedLog)
    short = TrainingConfig(steps=8, batch_users=16, warmup_steps=1, checks=2)
    backbone = pretrain(log, HSTUConfig(dimensions=8, n_layers=1), short)
    rewards = fit_reward_ensemble(log, backbone, RewardEnsembleConfig(members=2, training=short))
    rewards.tables_in = tmp_path / "tables"
    agent, histories, parts = (
        kind(propensities=propensities, training=short),
        histories_of(log),
        Parts(backbone, rewards),
    )
    problem = agent.problem(histories, log, parts)
    for batch in islice(histories.batches(16, np.random.default_rng(0)), 4):
        alone = of_users(log.read(), batch.rows.numpy())  # no row of it is the row of the whole log
        everyone = Histories(alone)
        with torch.no_grad():
            got = float(agent.batch_loss(backbone, batch, problem))
            expected = agent.batch_loss(backbone, next(everyone.chunks()), agent.problem(everyone, alone, parts))
        assert got == pytest.approx(float(expected), abs=1e-5)
    fitted = agent.fit(log, backbone, rewards)
    assert fitted.record.gradient_steps == 8


@pytest.mark.parametrize(
    ("option", "value"),
    [("propensities", "guessed"), ("clip", 0.0), ("kl_weight", -0.1), ("self_normalise", 1)],
)
def test_values_out_of_range_are_refused(option: str, value: Any) -> None:
    for kind in (IPS, DoublyRobust):
        with pytest.raises(ConfigError, match=rf"Config\.{option} must be"):
            kind(**{option: value})
    with pytest.raises(ConfigError, match=r"IPSConfig\.baseline must be"):
        IPS(baseline="mean")
