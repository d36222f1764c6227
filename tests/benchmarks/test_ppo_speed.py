"""Figures, not verdicts (``pytest -m benchmark -s tests/benchmarks/test_ppo_speed.py``): nothing fails for being slow.

PPO at 1,000 titles in the default sizes, stable-baselines3's and ``fast=True``: environment steps (contexts with a
title drawn, paid, and learned from in four passes) a CPU second, one thread, the best of several rollouts which they
take in turn. Validation is not in it.
"""

import copy
import time
from collections.abc import Callable

import pytest
import torch

from recsim_gr.agents import PPO, fast_ppo
from recsim_gr.agents.fast_ppo import FastPPO
from recsim_gr.agents.ppo import Checks, _Watch
from recsim_gr.agents.sb3 import contained_randomness
from recsim_gr.backbones import HSTU, HSTUConfig
from recsim_gr.rewards import RewardEnsembleConfig, fit_reward_ensemble
from recsim_gr.training import TrainingConfig
from recsim_gr.world import World, WorldConfig

TURNS = 5


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


@pytest.mark.benchmark
def test_environment_steps_a_second() -> None:
    torch.set_num_threads(1)
    log = World(WorldConfig(n_titles=1_000)).generate_log(1_000)
    backbone = HSTU(HSTUConfig(max_length=20), 1_000).eval().requires_grad_(False)
    little = TrainingConfig(steps=4, warmup_steps=1, checks=1)
    rewards = fit_reward_ensemble(log, backbone, RewardEnsembleConfig(members=3, training=little))
    agent, table = PPO(), rewards.on(log)
    config = agent.config
    with contained_randomness(), pytest.MonkeyPatch.context() as patch:
        learner = agent._learner(log, backbone, rewards, seed=0)
        watch = _Watch(config, backbone, Checks(config, lambda _: 0.0, None))
        works: dict[str, Callable[[], object]] = {"SB3": lambda: learner.learn(config.rollout, callback=watch)}
        for each in (1, 4, 8):
            patch.setattr(fast_ppo, "PREFIXES_PER_HISTORY", each)
            policy = copy.deepcopy(backbone).requires_grad_(True)
            run = FastPPO(policy, backbone, log, table, config, seed=0)
            works[f"fast, {each} a history"] = lambda run=run: run.learn(run.rollout(), 1e-3)  # type: ignore[misc]
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(1 + TURNS):
            for name, work in works.items():
                seconds[name].append(cpu_seconds(work))
    rates = {name: config.rollout / min(times[1:]) for name, times in seconds.items()}
    print(
        "\n"
        + ", ".join(f"{name}: {rate:.0f} env-steps/s ({rate / rates['SB3']:.2f} x)" for name, rate in rates.items())
    )
