"""`OnlinePPO`: whom it is shown and what it is paid; the estimate that it is kept by, against the exact value; what it
reaches."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from recsim_gr.agents import PPO, Agent, OnlinePPO, agent_type
from recsim_gr.agents.online_ppo import HELD_OUT, HeldOut
from recsim_gr.backbones import Backbone, HSTUConfig
from recsim_gr.configs import to_dict
from recsim_gr.errors import ConfigError
from recsim_gr.log import InteractionLog
from recsim_gr.policy import agent_log_probs
from recsim_gr.pretraining import pretrain
from recsim_gr.replay import RatingMatrix, ReplayConfig, ReplayWorld
from recsim_gr.training import TrainingConfig
from recsim_gr.world import World, WorldConfig

Make = Callable[..., Agent]

SMALL: dict[str, Any] = {"n_envs": 128, "rollout": 256, "minibatch": 64}
"""16 gradient steps a rollout."""


def policy_agent(name: str, backbone: Backbone) -> Any:
    """A backbone as an agent."""
    agent: Any = agent_type(name)()
    agent.policy = backbone
    return agent


def nudged(backbone: Backbone) -> Backbone:
    """A policy that has left it."""
    policy, rng = copy.deepcopy(backbone), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    return policy


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_the_held_out_estimate_is_right(kl_weight: float) -> None:
    """E_x[Σ π(a|x)·E[score|u,a] − λ·KL(π ‖ π_ref)] over validation users, which a referee knows: within 4 standard
    errors, in a world with noise."""
    world = World(WorldConfig(n_titles=30, history_length=6, n_epochs=1, reward_noise=0.5))
    reference = pretrain(world.generate_log(100), HSTUConfig(dimensions=8, n_layers=1), TrainingConfig(steps=30))
    policy = nudged(reference).eval()
    held_out = HeldOut(world, reference, None, kl_weight, seed=0)
    got = held_out.earned(policy)
    users = world.users("validation", HELD_OUT)
    observations = world.contexts_of(users).observations
    own, ref = (agent_log_probs(policy_agent("Pretrained", x), observations) for x in (policy, reference))
    pi, unseen = np.exp(own), ~observations.seen()
    ratio = np.where(unseen, own, 0) - np.where(unseen, ref, 0)
    exact = (pi * (world.expected_score(users) - kl_weight * ratio)).sum(axis=1).mean()
    assert abs(got - exact) < 4 * 1.5 / np.sqrt(HELD_OUT)
    divergence = (pi * ratio).sum(axis=1).mean()
    assert divergence > 0.3  # so that the term is seen
    assert held_out.earned(policy) == got  # the same users, noise and draws
    assert held_out.samples == 2 * HELD_OUT


def test_it_learns_from_training_users_and_is_kept_by_validation_users(
    log: InteractionLog, world: World, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many training users as the log has to train on; and by what it earns, which it reports as a loss."""
    made: list[dict[str, Any]] = []
    original = gym.make_vec

    def noting(env_id: str, **options: Any) -> Any:
        made.append({"id": env_id} | options)
        return original(env_id, **options)

    monkeypatch.setattr(gym, "make_vec", noting)
    told: list[tuple[int, float]] = []
    agent = OnlinePPO(training=TrainingConfig(steps=48, checks=3), **SMALL).meet(world)
    agent.fit(log, backbone, after_check=lambda *check: told.append(check))
    shown = [(options["id"], options["split"], options["pool_users"], options["world"] is world) for options in made]
    assert shown == [
        ("recsim_gr/WatchTime-v0", "train", 135, True),
        ("recsim_gr/WatchTime-v0", "validation", HELD_OUT, True),
    ]
    assert [step for step, _ in told] == [0, 16, 32, 48]
    assert agent.record.gradient_steps == 48
    assert agent.record.samples == 3 * 256 + 4 * HELD_OUT
    assert agent.record.preparation_seconds > 0
    held_out = HeldOut(world, backbone, None, agent.config.kl_weight, seed=0)
    assert held_out.earned(backbone) == pytest.approx(-told[0][1], abs=1e-6)
    best = min(value for _, value in told)
    assert held_out.earned(agent.policy) == pytest.approx(-best, abs=1e-5)
    assert dict(told)[agent.record.best_step] == best


def test_it_climbs_the_observed_score(log: InteractionLog, world: World, backbone: Backbone, make: Make) -> None:
    """On test users, by the exact expected score of the policy."""
    agent: Any = make("OnlinePPO", training=TrainingConfig(steps=96, checks=2)).fit(log, backbone)
    before, after = (
        world.evaluate(x, 200).metrics["score_value_top10"] for x in (policy_agent("Pretrained", backbone), agent)
    )
    assert after > before + 0.5


@contextmanager
def noted() -> Iterator[list[tuple[np.ndarray, dict[str, Any]]]]:
    """The rewards of every step of every environment that is made, and what stands beside them."""
    steps: list[tuple[np.ndarray, dict[str, Any]]] = []
    original = gym.make_vec

    def noting(env_id: str, **options: Any) -> Any:
        envs: Any = original(env_id, **options)
        step = envs.step

        def kept(actions: Any) -> Any:
            result = step(actions)
            steps.append((result[1], result[4]["final_info"]))
            return result

        envs.step = kept
        return envs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gym, "make_vec", noting)
        yield steps


def test_it_is_paid_what_is_observed_and_not_the_truth() -> None:
    world = World(WorldConfig(n_titles=30, history_length=6, reward_noise=0.7))
    log = world.generate_log(60)
    backbone = pretrain(log, HSTUConfig(dimensions=8, n_layers=1), TrainingConfig(steps=2, checks=1))
    told: list[float] = []
    agent = OnlinePPO(kl_weight=0.0, training=TrainingConfig(steps=16, checks=1), **SMALL).meet(world)
    with noted() as steps:
        agent.fit(log, backbone, after_check=lambda _, value: told.append(value))
    assert [len(paid) for paid, _ in steps] == [HELD_OUT, 128, 128, HELD_OUT]
    assert told == pytest.approx([-steps[0][0].mean(), -steps[3][0].mean()])
    assert abs(steps[0][1]["satisfaction"].mean() + told[0]) > 0.1


@pytest.fixture(scope="module")
def replayed() -> ReplayWorld:
    rng = np.random.default_rng(5)
    ratings = np.clip(3 + rng.normal(size=(200, 1)) + rng.normal(size=20) + 0.3 * rng.normal(size=(200, 20)), 1, 5)
    matrix = RatingMatrix(ratings.astype(np.float32))
    return ReplayWorld(ReplayConfig(path="in memory", history_length=5, reward_noise=0.0), matrix)


def test_it_learns_from_real_users_too(replayed: ReplayWorld) -> None:
    """Of whom there are few: validation users come several times."""
    log = replayed.generate_log(80)
    backbone = pretrain(log, HSTUConfig(dimensions=8, n_layers=1), TrainingConfig(steps=30, checks=1))
    agent: Any = OnlinePPO(training=TrainingConfig(steps=96, checks=1)).meet(replayed).fit(log, backbone)
    assert agent.record.best_step == 96
    log_probs = agent.log_probs(replayed.contexts(10).observations)
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1.0, atol=1e-5)


def test_titles_that_are_not_out_are_not_shown() -> None:
    world = World(WorldConfig(n_titles=30, history_length=6, n_epochs=3, cold_share=0.4))
    log = world.generate_log(60)
    backbone = pretrain(log, HSTUConfig(dimensions=8, n_layers=1), TrainingConfig(steps=2, checks=1))
    with noted() as steps:
        OnlinePPO(training=TrainingConfig(steps=16, checks=1), **SMALL).meet(world).fit(log, backbone)
    invalid = np.concatenate([beside["invalid"] for _, beside in steps])
    assert len(invalid) == 256 + 2 * HELD_OUT
    assert not invalid.any()


def test_what_makes_no_sense_is_refused(log: InteractionLog, backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match=r"OnlinePPOConfig\.fast must be false"):
        OnlinePPO(fast=True)
    with pytest.raises(ConfigError, match="30 titles and the world that OnlinePPO met 12"):
        OnlinePPO().meet(World(WorldConfig(n_titles=12, history_length=4))).fit(log, backbone)
    assert to_dict(OnlinePPO().config) == to_dict(PPO().config)
