"""``PPO(fast=True)``: its loss four ways and in one tabular context; its gradient and its steps against
stable-baselines3's on the same batch; what it draws and is paid; fitting."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import PPO as StableBaselinesPPO
from stable_baselines3.common.logger import configure
from torch import Tensor
from torch.autograd import gradcheck

import recsim_gr  # noqa: F401  (registers RewardModel-v0)
from recsim_gr.agents import PPO, Agent, fast_ppo, load_agent
from recsim_gr.agents.base import backbone_log_probs
from recsim_gr.agents.fast_ppo import (
    FastPPO,
    LoggedContexts,
    Prefixes,
    Rollout,
    clipped_surrogate_loss,
    masked_logits,
    normalised_advantages,
)
from recsim_gr.agents.ppo import Checks, PPOConfig, _Watch, learner_in, penalised_reward
from recsim_gr.agents.sb3 import contained_randomness
from recsim_gr.backbones import Backbone, HSTUConfig
from recsim_gr.errors import ConfigError, TrainingError
from recsim_gr.histories import Histories, split_logs
from recsim_gr.log import InteractionLog
from recsim_gr.observations import Contexts, Observations
from recsim_gr.pretraining import pretrain
from recsim_gr.rewards import RewardEnsemble, RewardEnsembleConfig, fit_reward_ensemble
from recsim_gr.training import TrainingConfig
from recsim_gr.world import World, WorldConfig

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)

Make = Callable[..., Agent]


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_row(seed: int, n: int = 8) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the loss, four ways ------------------------------------------------------------------------------------------


def test_the_surrogate_by_hand() -> None:
    """ε = .2. Ratio 1.5: with Â = 2 −1.2·2, cut; with Â = −2 the worse of 1.5 and 1.2, −1.5·−2. Ratio ½: with Â = 2
    −½·2; with Â = −2 the worse of ½ and .8, −.8·−2. Ratio 1.1 is inside: −1.1·2."""
    log_ratio = row(1.5, 1.5, 0.5, 0.5, 1.1).log()
    old = row(-1.0, -2.0, -3.0, -4.0, -5.0)
    got = clipped_surrogate_loss(old + log_ratio, old, row(2.0, -2.0, 2.0, -2.0, 2.0), 0.2)
    np.testing.assert_allclose(got, [-2.4, 3.0, -1.0, 1.6, -2.2])


def test_advantages_by_hand() -> None:
    """r − V = 1, 3, 2: mean 2, deviation 1 (n − 1): −1, 1, 0. A single one is left alone."""
    got = normalised_advantages(row(2.0, 5.0, 2.0), row(1.0, 2.0, 0.0))
    np.testing.assert_allclose(got, [-1.0, 1.0, 0.0], atol=1e-7)
    np.testing.assert_allclose(normalised_advantages(row(2.0), row(0.5)), [1.5])


def test_where_nothing_has_moved_it_is_the_policy_gradient() -> None:
    """ρ = 1: the value is −Â, the gradient that of −Â·log π. Without a clip it is importance weighting: −ρ·Â."""
    log_probs, advantages = random_row(0).requires_grad_(), random_row(1)
    loss = clipped_surrogate_loss(log_probs, log_probs.detach(), advantages, 0.2)
    torch.testing.assert_close(loss, -advantages)
    loss.sum().backward()
    torch.testing.assert_close(log_probs.grad, -advantages)
    old = random_row(2)
    weighted = -torch.exp(log_probs - old) * advantages
    torch.testing.assert_close(clipped_surrogate_loss(log_probs, old, advantages, 1e9), weighted)


def test_gradient_of_the_surrogate() -> None:
    """−ρ·Â where it is inside, or moving back would help; 0 where the ratio has gone far enough the right way."""
    old, advantages = random_row(0), random_row(1)
    log_probs = (old + row(0.5, 0.5, -0.5, -0.5, 0.1, -0.1, 0.3, -0.3)).requires_grad_()
    advantages[:4] = row(1.0, -1.0, 1.0, -1.0)
    assert gradcheck(lambda x: clipped_surrogate_loss(x, old, advantages, 0.2), (log_probs,))
    clipped_surrogate_loss(log_probs, old, advantages, 0.2).sum().backward()
    ratio = torch.exp(log_probs.detach() - old)
    far = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    assert far[[0, 3]].all()
    assert not far[[1, 2, 4, 5]].any()
    torch.testing.assert_close(log_probs.grad, torch.where(far, 0.0, -ratio * advantages))


@PROPERTY
@given(st.floats(-3, 3), st.floats(0.1, 10), st.integers(0, 99))
def test_it_knows_ratios_and_the_unit_of_advantages(shift: float, unit: float, seed: int) -> None:
    log_probs, old, advantages = random_row(seed), random_row(seed + 1), random_row(seed + 2)
    loss = clipped_surrogate_loss(log_probs, old, advantages, 0.2)
    moved = clipped_surrogate_loss(log_probs + shift, old + shift, unit * advantages, 0.2)
    torch.testing.assert_close(moved, unit * loss)


@PROPERTY
@given(st.floats(-50, 50), st.floats(0.1, 10), st.integers(0, 99))
def test_advantages_know_neither_level_nor_unit(level: float, unit: float, seed: int) -> None:
    rewards, values = random_row(seed), random_row(seed + 1)
    moved = normalised_advantages(unit * rewards + level, unit * values)
    torch.testing.assert_close(moved, normalised_advantages(rewards, values), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: clipped_surrogate_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 2), 0.2),
        lambda: clipped_surrogate_loss(torch.zeros(2), torch.zeros(2), torch.zeros(1), 0.2),
        lambda: normalised_advantages(torch.zeros(2), torch.zeros(2, 1)),
    ],
)
def test_wrong_shapes_are_refused(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match="takes"):
        call()


REF = row(0.1, 0.3, 0.2, 0.15, 0.25)
R = row(1.5, 4.0, 2.0, 5.0, 3.0)


@pytest.mark.parametrize("kl_weight", [1.0, 3.0])
def test_it_climbs_to_the_tilted_reference(kl_weight: float) -> None:
    """In one context, every title weighed by its probability: π = π_ref·exp(r/λ)/Z, whatever the clip."""
    logits = REF.log().requires_grad_()
    optimiser = torch.optim.SGD([logits], lr=1.0 / kl_weight)
    for _ in range(400):
        old = torch.log_softmax(logits.detach(), dim=0)
        rewards = R - kl_weight * (old - REF.log())
        advantages = rewards - old.exp() @ rewards
        for _ in range(3):
            optimiser.zero_grad()
            log_probs = torch.log_softmax(logits, dim=0)
            (old.exp() @ clipped_surrogate_loss(log_probs, old, advantages, 0.2)).backward()
            optimiser.step()
    tilted = REF * torch.exp(R / kl_weight)
    torch.testing.assert_close(torch.softmax(logits.detach(), dim=0), tilted / tilted.sum(), atol=1e-5, rtol=0)


# -- against stable-baselines3, on the same batch -----------------------------------------------------------------

SMALL = PPOConfig(n_envs=64, rollout=128, minibatch=128, epochs=1, kl_weight=0.4, training=TrainingConfig(steps=1))
"""One minibatch a rollout."""


def nudge(module: torch.nn.Module, seed: int = 0) -> None:
    """Moves a policy, so that ratios leave the clip's range."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=rng))


def fast_run(log: InteractionLog, rewards: RewardEnsemble, backbone: Backbone, **changes: Any) -> FastPPO:
    policy = copy.deepcopy(backbone).requires_grad_(True)
    return FastPPO(policy, backbone, log, rewards.on(log), replace(SMALL, **changes), seed=3)


@pytest.fixture
def learner(log: InteractionLog, rewards: RewardEnsemble, backbone: Backbone) -> Any:
    """stable-baselines3's PPO."""
    envs = gym.make_vec("recsim_gr/RewardModel-v0", num_envs=64, rewards=rewards, log=log)
    with contained_randomness():
        learner = learner_in(envs, backbone, None, SMALL, seed=0)
    learner.set_logger(configure(None, []))
    learner._update_current_progress_remaining(1, 1)
    return learner


def collect(learner: Any, reference: Backbone) -> None:
    """Lets it fill its buffer in its environment."""
    watch = _Watch(SMALL, reference, Checks(SMALL, lambda _: 0.0, None))
    _, callback = learner._setup_learn(128, watch)
    learner.collect_rollouts(learner.env, callback, learner.rollout_buffer, 2)


def own_rollout(learner: StableBaselinesPPO) -> Rollout:
    """What stable-baselines3 has in its buffer, in our words; each context a history of its own."""
    buffer: Any = learner.rollout_buffer
    obs = {name: torch.from_numpy(values.reshape(128, -1)) for name, values in buffer.observations.items()}
    columns = [torch.from_numpy(x.reshape(128, 1)) for x in (buffer.log_probs, buffer.values, buffer.rewards)]
    prefixes = Prefixes(obs["titles"], obs["scores"], obs["times"], obs["length"].long())
    return Rollout(prefixes, torch.from_numpy(buffer.actions.reshape(128, 1)).long(), *columns)


def fill(learner: StableBaselinesPPO, rollout: Rollout) -> None:
    """Puts a rollout of ours into its buffer."""
    buffer: Any = learner.rollout_buffer
    buffer.reset()
    prefixes, each = rollout.prefixes, rollout.titles.shape[1]
    ahead = torch.arange(6) >= prefixes.steps.reshape(-1, 1)
    history = (
        torch.nn.functional.pad(part, (0, 6 - part.shape[1])).repeat_interleave(each, dim=0).masked_fill(ahead, nothing)
        for part, nothing in ((prefixes.titles, 30), (prefixes.scores, 0.0), (prefixes.times, 0.0))
    )
    whole = dict(zip(("titles", "scores", "times"), history, strict=True))
    whole |= {"length": prefixes.steps.flatten(), "epoch": torch.zeros(128, dtype=torch.int64)}
    titles, log_probs, values, rewards = (column.flatten() for column in rollout[1:])
    for part in torch.arange(128).split(64):
        obs = {name: column[part].numpy() for name, column in whole.items()}
        paid = rewards[part].numpy(), np.ones(64), values[part], log_probs[part]
        buffer.add(obs, titles[part, None].numpy(), *paid)
    buffer.compute_returns_and_advantage(torch.zeros(64), np.ones(64))


def gradients_of(module: torch.nn.Module) -> dict[str, Tensor]:
    found = {
        name.replace("value_net", "value"): p.grad.clone()
        for name, p in module.named_parameters()
        if p.grad is not None
    }
    assert len(found) == len(list(module.parameters()))
    return found


def follow(run: FastPPO, learner: Any) -> None:
    """Gives ours the parameters of stable-baselines3's."""
    run.actor.backbone.load_state_dict(learner.policy.backbone.state_dict())
    run.actor.value.load_state_dict(learner.policy.value_net.state_dict())


@pytest.mark.parametrize("whose", ["theirs", "ours"])
@pytest.mark.parametrize("moved", [False, True])
def test_its_gradient_is_stable_baselines3s(
    whose: str, moved: bool, learner: Any, log: InteractionLog, rewards: RewardEnsemble, backbone: Backbone
) -> None:
    """On 128 contexts: those of its environment, one a history, or of ours, eight a history; and for a policy that
    stands where it drew them, or has moved, so that some ratios are cut."""
    run = fast_run(log, rewards, backbone)
    with contained_randomness():
        follow(run, learner)
        if whose == "theirs":
            collect(learner, backbone)
            rollout = own_rollout(learner)
        else:
            rollout = run.rollout()
            fill(learner, rollout)
        if moved:
            nudge(learner.policy)
            follow(run, learner)
        learner.max_grad_norm = 1e9
        learner.train()
    run.actor.loss(rollout, 0.2).backward()
    theirs, ours = gradients_of(learner.policy), gradients_of(run.actor)
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4)
    size = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert size > 1e-2
    logits = masked_logits(run.actor.backbone, rollout.prefixes.states(run.actor.backbone), rollout.prefixes)
    log_probs = torch.log_softmax(logits, dim=1).gather(1, rollout.titles.reshape(-1, 1))
    log_ratio = (log_probs - rollout.log_probs.reshape(-1, 1)).detach()
    cut = float(((log_ratio.exp() - 1).abs() > 0.2).float().mean())
    assert (0.05 < cut < 0.95) if moved else cut == 0.0


@pytest.mark.parametrize("largest", [0.5, 1e9])
def test_its_steps_are_stable_baselines3s(
    largest: float,
    learner: Any,
    log: InteractionLog,
    rewards: RewardEnsemble,
    backbone: Backbone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three passes over one batch, gradient clipping and Adam included: the same parameters in the end."""
    run = fast_run(log, rewards, backbone, epochs=3)
    monkeypatch.setattr("recsim_gr.agents.fast_ppo.LONGEST_GRADIENT", largest)
    with contained_randomness():
        follow(run, learner)
        rollout = run.rollout()
        fill(learner, rollout)
        learner.n_epochs, learner.max_grad_norm = 3, largest
        learner.train()
    run.learn(rollout, SMALL.rate(1.0))
    assert learner.policy.optimizer.param_groups[0]["lr"] == SMALL.rate(1.0)
    theirs = learner.policy.backbone.state_dict() | {"value": learner.policy.value_net.weight}
    ours = run.actor.backbone.state_dict() | {"value": run.actor.value.weight}
    for name, start in backbone.state_dict().items():
        assert (theirs[name] - start).abs().max() > 1e-4
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=2e-5, rtol=1e-4)


def test_its_constants_are_stable_baselines3s_defaults() -> None:
    theirs = inspect.signature(StableBaselinesPPO).parameters
    assert theirs["vf_coef"].default == fast_ppo.VALUE_WEIGHT
    assert theirs["max_grad_norm"].default == fast_ppo.LONGEST_GRADIENT
    assert theirs["ent_coef"].default == 0.0
    assert theirs["normalize_advantage"].default


def test_its_rate_falls_rollout_by_rollout(log: InteractionLog, rewards: RewardEnsemble, backbone: Backbone) -> None:
    """As stable-baselines3's does (test_ppo.py): of four rollouts the last learns at a quarter of the peak."""
    run, rates = fast_run(log, rewards, backbone, learning_rate=0.04, training=TrainingConfig(steps=4)), []
    run.optimiser.register_step_post_hook(lambda optimiser, *_: rates.append(optimiser.param_groups[0]["lr"]))
    run.run(lambda _: None)
    np.testing.assert_allclose(rates, [0.04, 0.03, 0.02, 0.01])


def test_dropout_is_off(log: InteractionLog, rewards: RewardEnsemble, backbone: Backbone) -> None:
    assert backbone.config.dropout > 0
    policy = copy.deepcopy(backbone).requires_grad_(True).train()
    run = FastPPO(policy, backbone, log, rewards.on(log), SMALL, seed=3)
    rollout = run.rollout()
    assert torch.equal(run.actor.loss(rollout, 0.2), run.actor.loss(rollout, 0.2))


# -- what it draws and is paid ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ragged(log: InteractionLog) -> InteractionLog:
    """Histories of one to six events: twenty of the log's, cut."""
    keep = np.concatenate([np.arange(6 * user, 6 * user + 1 + user % 6) for user in range(20)])
    names = ("user", "epoch", "step", "hours", "title", "duration_minutes", "watch_minutes", "score")
    return InteractionLog(**{name: getattr(log, name)[keep] for name in names}, n_titles=log.n_titles)


def test_every_event_is_as_likely_as_every_other(ragged: InteractionLog) -> None:
    """A context stands for an event of the log; histories of one to six events, eight prefixes of each drawn."""
    contexts, rng = LoggedContexts(ragged), torch.Generator().manual_seed(0)
    prefixes, rows = contexts.draw(10_000, 8, rng)
    counts = np.zeros((20, 6))
    np.add.at(counts, (rows.repeat_interleave(8).numpy(), prefixes.steps.flatten().numpy()), 1)
    there = np.arange(6) < ragged.sequences().length[:, None]
    assert (counts[~there] == 0).all()
    expected = 80_000 / len(ragged)
    assert (np.abs(counts[there] - expected) < 5 * np.sqrt(8 * expected)).all()  # the eight of a history come together


def expand(prefixes: Prefixes, n_titles: int) -> Observations:
    """The contexts one by one."""
    ahead = torch.arange(prefixes.titles.shape[1]) >= prefixes.steps.unsqueeze(-1)
    parts = ((prefixes.titles, n_titles), (prefixes.scores, 0.0), (prefixes.times, 0.0))
    titles, scores, times = (x[:, None].masked_fill(ahead, nothing).flatten(0, 1).numpy() for x, nothing in parts)
    length = prefixes.steps.flatten().numpy()
    return Observations(titles, scores, times, length, np.zeros_like(length), n_titles)


def test_a_rollout_is_what_it_says(log: InteractionLog, rewards: RewardEnsemble, backbone: Backbone) -> None:
    """Titles that were not seen, their log-probabilities and r̂(x,a) − λ·log(π(a|x)/π_ref(a|x)), context by context,
    for a policy that has left π_ref."""
    run = fast_run(log, rewards, backbone, rollout=1_024, kl_weight=0.7)
    nudge(run.actor)
    rollout = run.rollout()
    seen, every, titles = expand(rollout.prefixes, 30), np.arange(1_024), rollout.titles.flatten().numpy()
    assert rollout.titles.shape == (128, 8)
    own, ref = (backbone_log_probs(model, seen)[every, titles] for model in (run.actor.backbone, backbone))
    assert np.isfinite(own).all()
    np.testing.assert_allclose(rollout.log_probs.flatten(), own, atol=1e-4)
    expected = rewards.mean(seen)[every, titles] - 0.7 * (own - ref)
    np.testing.assert_allclose(rollout.rewards.flatten(), expected, atol=1e-3)
    assert np.abs(own - ref).mean() > 0.01
    state = rollout.prefixes.states(run.actor.backbone)
    np.testing.assert_allclose(rollout.values.flatten(), run.actor.value(state)[:, 0].detach(), atol=1e-5)


def test_titles_that_are_not_out_are_not_drawn() -> None:
    world = World(WorldConfig(n_titles=30, history_length=6, n_epochs=3, cold_share=0.4))
    log = world.generate_log(60)
    backbone = pretrain(log, HSTUConfig(dimensions=8, n_layers=1), TrainingConfig(steps=1, checks=1))
    rewards = fit_reward_ensemble(
        log, backbone, RewardEnsembleConfig(members=2, training=TrainingConfig(steps=1, checks=1))
    )
    run = fast_run(log, rewards, backbone, rollout=2_048)
    rollout = run.rollout()
    assert rollout.prefixes.unreleased is not None
    assert 0.05 < rollout.prefixes.unreleased.float().mean() < 0.5
    assert not rollout.prefixes.unreleased.gather(1, rollout.titles).any()
    assert len(rollout.titles.unique()) > 10


def test_minibatches_that_eight_does_not_divide_hold_fewer_prefixes_of_a_history(
    log: InteractionLog, rewards: RewardEnsemble, backbone: Backbone
) -> None:
    for minibatch, each in ((6, 2), (5, 1), (8, 8)):
        run = fast_run(log, rewards, backbone, n_envs=1, rollout=30 if minibatch < 8 else 32, minibatch=minibatch)
        rollout = run.rollout()
        assert rollout.titles.shape[1] == each
        before = copy.deepcopy(run.actor.state_dict())
        run.learn(rollout, 1e-3)
        assert not torch.equal(before["backbone.titles"], run.actor.backbone.titles)


# -- fitting ------------------------------------------------------------------------------------------------------


def test_fitting_climbs_the_penalised_reward_as_far_as_stable_baselines3s(
    make: Make,
    log: InteractionLog,
    rewards: RewardEnsemble,
    backbone: Backbone,
    contexts: Contexts,
    tmp_path: Path,
) -> None:
    told: list[tuple[int, float]] = []
    options = {"training": TrainingConfig(steps=64, checks=2), "n_envs": 256, "rollout": 512, "minibatch": 128}
    held_out = split_logs(log, None)[1]
    histories, table = Histories(held_out), rewards.on(held_out)

    def height(policy: Any) -> float:
        return penalised_reward(policy, backbone, histories, table, 0.1)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    agent: Any = make("PPO", fast=True, **options)
    agent.fit(log, backbone, rewards, after_check=lambda *check: told.append(check))
    assert torch.equal(torch.get_rng_state(), before)
    assert [step for step, _ in told] == [0, 32, 64]
    assert told[0][1] == pytest.approx(-height(backbone), abs=1e-5)
    assert min(value for _, value in told) == pytest.approx(-height(agent.policy), abs=1e-5)
    assert agent.record.samples == 4 * 512
    assert agent.record.gradient_steps == 64
    theirs: Any = make("PPO", **options).fit(log, backbone, rewards)
    climbed, expected = (height(x.policy) - height(backbone) for x in (agent, theirs))
    assert expected > 0.4
    assert abs(climbed / expected - 1) < 0.15
    again = make("PPO", fast=True, **options).fit(log, backbone, rewards)
    found = agent.log_probs(contexts.observations)
    np.testing.assert_array_equal(again.log_probs(contexts.observations), found)
    agent.save(tmp_path)
    loaded = load_agent(tmp_path)
    assert loaded.config.fast
    np.testing.assert_array_equal(loaded.log_probs(contexts.observations), found)


def test_what_makes_no_sense_is_refused(log: InteractionLog, rewards: RewardEnsemble, backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match=r"PPOConfig\.fast must be true or false"):
        PPO(fast="yes")
    run = fast_run(log, rewards, backbone)
    rollout = run.rollout()
    with pytest.raises(TrainingError, match="not finite"):
        run.learn(rollout._replace(rewards=rollout.rewards * torch.inf), 1e-3)


def test_advantages_that_hardly_differ_by_hand() -> None:
    """0 and 2e-8: ∓1e-8 over √2·1e-8 + 1e-8, which is ∓1/(√2 + 1) = ∓(√2 − 1)."""
    gap = 2**0.5 - 1
    np.testing.assert_allclose(normalised_advantages(row(0.0, 2e-8), row(0.0, 0.0)), [-gap, gap], rtol=1e-6)
