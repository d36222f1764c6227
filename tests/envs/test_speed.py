"""Figures, not verdicts (``pytest -m benchmark -s tests/envs/test_speed.py``): nothing fails for being slow.

Each stands beside a floor in the same run: a plain NumPy loop that does the same look-ups and nothing else, or an
environment that gives arrays of the same shapes and nothing else. CPU time, the best of many short stretches, which the
two take in turn.
"""

import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker

from recsim_gr.envs import WatchTimeEnv, WatchTimeVectorEnv

N, N_TITLES, STRETCHES = 4_096, 1_000, 100


def best_seconds(works: dict[str, Callable[[int], None]], count: int) -> dict[str, float]:
    """CPU seconds of one call of each, at best."""
    for work in works.values():
        work(count)
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(STRETCHES):
        for name, work in works.items():
            start = time.process_time()
            work(count)
            times[name].append((time.process_time() - start) / count)
    return {name: min(of_one) for name, of_one in times.items()}


def look_ups(envs: Any, actions: np.ndarray) -> Callable[[int], None]:
    """A step's look-ups by NumPy: the observations of fresh users, and the numbers that rewards are made of."""
    who, world = envs.bandit.population, envs.bandit.world
    who.require(np.arange(N))
    rows = np.random.default_rng(0).integers(N, size=(len(actions), N))
    titles = who.titles.astype(np.int64)
    of_users = (
        titles,
        who.scores,
        who.times,
        who.length,
        who.epoch,
        who.users,
        who.pairs.vectors,
        who.pairs.leniency,
        who.free_time,
        who.discernment,
        who.normaliser,
    )
    of_titles = (world.traits, world.quality, world.durations)

    def work(count: int) -> None:
        for i in range(count):
            now, shown = rows[i % len(rows)], actions[i % len(actions)]
            for table in of_users:
                table.take(now, axis=0)
            for table in of_titles:
                table.take(shown, axis=0)
            world.appeal.take(shown)

    return work


@pytest.mark.benchmark
@pytest.mark.parametrize("further", [{}, {"action_mask": True}, {"regret": True}, {"horizon": 10}])
def test_vector_steps(further: dict[str, Any]) -> None:
    envs = WatchTimeVectorEnv(N, n_titles=N_TITLES, **further)
    actions = np.random.default_rng(1).integers(N_TITLES, size=(16, N))
    envs.reset(seed=0)

    def steps(count: int) -> None:
        for i in range(count):
            envs.step(actions[i % len(actions)])

    seconds = best_seconds({"environment": steps, "look-ups": look_ups(envs, actions)}, 10)
    figures = ", ".join(f"{name} {N / each / 1e6:.2f} M/s" for name, each in seconds.items())
    print(f"\n{further}: {figures}, ratio {seconds['look-ups'] / seconds['environment']:.2f}")


class Bare(gymnasium.Env[dict[str, Any], np.int64]):
    """Gives fresh arrays of the shapes that `WatchTimeEnv` gives, and nothing else."""

    def __init__(self, env: WatchTimeEnv) -> None:
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self._observation, info = env.reset(seed=0)
        self._mask = info["action_mask"]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self._observe(), {"action_mask": self._mask.copy(), "user": 0}

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._observe(), 1.0, True, False, {"satisfaction": 1.0}

    def _observe(self) -> dict[str, Any]:
        seen = self._observation
        return {name: seen[name].copy() for name in ("titles", "scores", "times")} | {
            name: seen[name] for name in ("length", "epoch")
        }


@pytest.mark.benchmark
@pytest.mark.parametrize("further", [{}, {"noise_model": "gaussian"}, {"horizon": 10}])
def test_single_pairs(further: dict[str, Any]) -> None:
    env = gymnasium.make("recsim_gr/WatchTime-v0", n_titles=N_TITLES, **further)
    bare: Any = OrderEnforcing(PassiveEnvChecker(Bare(env.unwrapped)))  # type: ignore[arg-type]
    actions = np.random.default_rng(1).integers(N_TITLES, size=1_000).tolist()

    def pairs(env: Any) -> Callable[[int], None]:
        env.reset(seed=0)

        def work(count: int) -> None:
            for action in actions[:count]:
                if env.step(action)[2]:
                    env.reset()

        return work

    works = {"environment": pairs(env), "bare": pairs(bare)}
    for work in works.values():  # until every user is prepared
        for _ in range(10):
            work(1_000)
    seconds = best_seconds(works, 200)
    figures = ", ".join(f"{name} {1e-3 / each:.1f} k/s" for name, each in seconds.items())
    print(f"\n{further}: {figures}, ratio {seconds['bare'] / seconds['environment']:.2f}")
