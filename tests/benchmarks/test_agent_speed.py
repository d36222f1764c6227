"""What a gradient step of each agent costs beside one of BC's, at the sizes of the landscape's preset ``quick``.

``pytest -m benchmark -s tests/benchmarks/test_agent_speed.py``
"""

import time
from dataclasses import fields

import pytest
import torch

from recsim_gr.agents import AGENTS, InformedAgent
from recsim_gr.benchmarks.landscape import Landscape
from recsim_gr.pretraining import pretrain
from recsim_gr.rewards import RewardEnsembleConfig, fit_reward_ensemble
from recsim_gr.training import TrainingConfig
from recsim_gr.world import World, WorldConfig

STEPS = (64, 192)
"""A fit of each length: what differs is gradient steps alone. Whole rollouts of PPO, which are 32 steps."""

LEARNERS = [name for name, kind in AGENTS.items() if "training" in {field.name for field in fields(kind.config_type)}]


@pytest.mark.benchmark
def test_seconds_a_gradient_step() -> None:
    """Processor time, the least of three fits in turns; preparation (rewards of the log, pairs, rollouts) apart."""
    torch.set_num_threads(1)
    quick = Landscape.presets["quick"]
    world = World(WorldConfig(n_titles=quick.n_titles, history_length=quick.history_length, reward_noise=0.35))
    log = world.generate_log(quick.n_users, expose_propensities=True)
    held_out = world.generate_log(100, "validation", expose_propensities=True)
    short = TrainingConfig(steps=20, checks=1)
    backbone = pretrain(log, quick.backbone, short, held_out)
    rewards = fit_reward_ensemble(log, backbone, RewardEnsembleConfig(training=short), held_out)
    step: dict[str, list[float]] = {name: [] for name in LEARNERS}
    prepared: dict[str, list[float]] = {name: [] for name in LEARNERS}
    for _ in range(3):
        for name in LEARNERS:
            spent, taken = [], []
            for steps in STEPS:
                agent = AGENTS[name](training=TrainingConfig(steps=steps, checks=1))
                if isinstance(agent, InformedAgent):
                    agent.meet(world)
                began = time.process_time()
                agent.fit(log, backbone, rewards, held_out)
                spent.append(time.process_time() - began - agent.record.preparation_seconds)
                taken.append(agent.record.gradient_steps)
            step[name].append((spent[1] - spent[0]) / (taken[1] - taken[0]))
            prepared[name].append(agent.record.preparation_seconds)
    print(f"\n{'agent':<20}{'ms a step':>10}{'of BC':>8}{'preparation s':>15}")
    for name in LEARNERS:
        ratio = min(step[name]) / min(step["BC"])
        print(f"{name:<20}{1e3 * min(step[name]):>10.1f}{ratio:>8.2f}{min(prepared[name]):>15.2f}")
    assert all(min(seconds) > 0 for seconds in step.values())
