"""What the tests of the agents share: a tiny world, its log, a backbone, a reward ensemble, agents fitted on them."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from recsim_gr.agents import AGENTS, Agent, InformedAgent
from recsim_gr.backbones import HSTU, Backbone, HSTUConfig
from recsim_gr.log import InteractionLog
from recsim_gr.observations import Contexts
from recsim_gr.pretraining import pretrain
from recsim_gr.rewards import RewardEnsemble, RewardEnsembleConfig, fit_reward_ensemble
from recsim_gr.training import TrainingConfig
from recsim_gr.world import World, WorldConfig

TRAINING = TrainingConfig(steps=32, batch_users=32, warmup_steps=3, checks=2)


@pytest.fixture(scope="session")
def training() -> TrainingConfig:
    """One rollout of PPO, in gradient steps."""
    return TRAINING


@pytest.fixture(scope="session")
def world() -> World:
    """Without noise and with large differences, so that 32 steps on 150 users teach something to everybody."""
    config = WorldConfig(
        n_titles=30,
        history_length=6,
        n_epochs=1,
        reward_noise=0.0,
        quality_deviation=1.5,
        leniency_deviation=0.2,
        taste_dimensions=2,
    )
    return World(config)


@pytest.fixture(scope="session")
def log(world: World) -> InteractionLog:
    """With propensities, which only agents that ask for them may notice (see the contract)."""
    return world.generate_log(150, expose_propensities=True)


@pytest.fixture(scope="session")
def contexts(world: World) -> Contexts:
    return world.contexts(20)


@pytest.fixture(scope="session")
def backbone(log: InteractionLog) -> Backbone:
    steps = TrainingConfig(steps=60, batch_users=32, learning_rate=1e-2, warmup_steps=5, checks=2)
    return pretrain(log, HSTUConfig(dimensions=8, n_layers=1), steps)


@pytest.fixture(scope="session")
def rewards(log: InteractionLog, backbone: HSTU) -> RewardEnsemble:
    return fit_reward_ensemble(log, backbone, RewardEnsembleConfig(members=2, training=TRAINING))


@pytest.fixture(scope="session")
def make(world: World) -> Callable[..., Agent]:
    """Builds an agent by name, with a short training where it trains; one that learns from the world has met it."""

    def make(name: str, **overrides: Any) -> Agent:
        kind = AGENTS[name]
        trains = "training" in {field.name for field in fields(kind.config_type)}
        agent = kind(**(({"training": TRAINING} if trains else {}) | overrides))
        return agent.meet(world) if isinstance(agent, InformedAgent) else agent

    return make


@pytest.fixture(scope="session")
def fitted(
    make: Callable[..., Agent], log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble
) -> Callable[[str], Agent]:
    """An agent by name, fitted on the tiny log with seed 0; each is fitted once. Not to be changed."""
    done: dict[str, Agent] = {}

    def fitted(name: str) -> Agent:
        if name not in done:
            done[name] = make(name).fit(log, backbone, rewards)
        return done[name]

    return fitted
