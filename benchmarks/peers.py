"""Other simulators of recommendation, where they are installed: how fast they do the job that is nearest to ours.

Nothing here is needed by anything else. Peers want old and contrary versions of the libraries beneath them, so no one
environment holds them all: each is measured in a process of its own, by this interpreter and by those that the
variable `INTERPRETERS` lists. For their sake this file imports the standard library alone, and runs as a script::

    python peers.py NAME TITLES SECONDS     # one JSON object: {"per_second": …, "version": …} or {"missing": …}

No peer does the same job as ours; ``what`` says what it does. Single-threaded, CPU time.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

INTERPRETERS = "RECSIM_GR_PEERS"
"""Environment variable: further Python interpreters in which peers are installed, as in ``PATH``."""

SECONDS_TO_START = 120.0
"""What a peer may take beyond its measurement: TensorFlow's import and its graphs take a while."""


@dataclass(frozen=True)
class Peer:
    """A peer and its job.

    Attributes:
        name: how it is called.
        distribution: on PyPI.
        job: ``environment`` (steps a second) or ``log`` (logged events a second).
        what: what is measured, and what of our job it lacks.
        reported: events or steps a second that were reported on a like machine, lowest and highest.
        measure: (titles, seconds) to events or steps a second; ImportError where it is not installed.
    """

    name: str
    distribution: str
    job: str
    what: str
    reported: tuple[float, float]
    measure: Callable[[int, float], float]


def per_second(work: Callable[[], int], seconds: float) -> float:
    """Units of work a second of CPU time; ``work`` does some and says how many. The fastest of five stretches, each
    after one more call that is not counted."""
    best = 0.0
    work()
    for _ in range(5):
        done, start = 0, time.process_time()
        while (spent := time.process_time() - start) < seconds / 5:
            done += work()
        best = max(best, done / spent)
    return best


def scope_rl(titles: int, seconds: float) -> float:
    """RECEnv of SCOPE-RL, 100 steps an episode."""
    from recgym import RECEnv

    env = RECEnv(step_per_episode=100, n_items=titles, n_users=100, random_state=0)

    def episode() -> int:
        env.reset()
        for action in range(100):
            env.step(action)
        return 100

    return per_second(episode, seconds)


def sardine_environment(titles: int, seconds: float) -> float:
    """SARDINE's environment of single items, which comes with 1,000 of them."""
    if titles != 1_000:
        return float("nan")
    return per_second(_sardine_episode(), seconds)


def sardine_log(titles: int, seconds: float) -> float:
    """SARDINE's ``generate_dataset`` under its epsilon-greedy oracle."""
    if titles != 1_000:
        return float("nan")
    import gymnasium
    import sardine  # noqa: F401  (registers)
    from sardine.policies import EpsilonGreedyOracle

    env: Any = gymnasium.make("sardine/SingleItem-Static-v0").unwrapped
    policy = EpsilonGreedyOracle(epsilon=0.5, env=env, seed=0)

    def users() -> int:
        env.generate_dataset(n_users=2, policy=policy, seed=0)
        return 2 * env.H

    return per_second(users, seconds)


def _sardine_episode() -> Callable[[], int]:
    import gymnasium
    import numpy as np
    import sardine  # noqa: F401  (registers)

    env = gymnasium.make("sardine/SingleItem-Static-v0")
    env.reset(seed=0)
    slates = [np.array([item]) for item in range(100)]

    def episode() -> int:
        env.reset()
        for slate in slates:
            env.step(slate)
        return len(slates)

    return episode


def _recogym(titles: int) -> Any:
    import gym
    from recogym import Configuration, env_1_args

    env = gym.make("reco-gym-v1", disable_env_checker=True).unwrapped
    env.init_gym({**env_1_args, "random_seed": 0, "num_products": titles})
    assert isinstance(env.config, Configuration)
    return env


def recogym_environment(titles: int, seconds: float) -> float:
    """RecoGym's steps, with the organic sessions between them."""
    env = _recogym(titles)

    def user() -> int:
        env.reset()
        _, _, done, _ = env.step(None)
        steps = 0
        while not done:
            _, _, done, _ = env.step(steps % titles)
            steps += 1
        return steps

    return per_second(user, seconds)


def recogym_log(titles: int, seconds: float) -> float:
    """RecoGym's ``generate_logs``: bandit events with the uniform policy's propensities, and organic ones."""
    env = _recogym(titles)
    return per_second(lambda: len(env.generate_logs(20)), seconds)


def recsim(titles: int, seconds: float) -> float:
    """RecSim's interest evolution with the whole catalogue as candidates, slates of one."""
    from recsim.environments import interest_evolution

    env = interest_evolution.create_environment(
        {"num_candidates": titles, "slate_size": 1, "resample_documents": False, "seed": 0}
    )
    env.reset()

    def steps() -> int:
        for action in range(20):
            if env.step([action])[2]:
                env.reset()
        return 20

    return per_second(steps, seconds)


def recsim_ng(titles: int, seconds: float) -> float:
    """RecSim NG's ecosystem: 1,000 users in one TensorFlow graph, 10 steps a run, five titles a provider."""
    import numpy as np
    import tensorflow as tf
    from recsim_ng.applications.ecosystem_simulation import simulation_config
    from recsim_ng.core import network as networks
    from recsim_ng.lib.tensorflow import runtime

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    means = np.random.default_rng(0).normal(size=(titles // 5, 10)).astype(np.float32)
    variables = simulation_config.create_viable_provider_simulation_network(means, num_users=1_000)
    network = networks.Network(variables=variables)

    @tf.function
    def run() -> Any:
        last = runtime.TFRuntime(network=network).execute(num_steps=10)
        return tf.reduce_mean(networks.find_unique_field(last, field_name="cumulative_reward")[1])

    def graph() -> int:
        run()
        return 10_000

    return per_second(graph, seconds)


def open_bandit_pipeline(titles: int, seconds: float, reward: str = "binary") -> float:
    """Open Bandit Pipeline's synthetic bandit feedback under a softmax logging policy."""
    from obp.dataset import SyntheticBanditDataset, linear_behavior_policy, logistic_reward_function

    dataset = SyntheticBanditDataset(
        n_actions=titles,
        dim_context=8,
        reward_type=reward,
        reward_function=logistic_reward_function,
        behavior_policy_function=linear_behavior_policy,
        random_state=0,
    )

    def rounds() -> int:
        dataset.obtain_batch_bandit_feedback(n_rounds=2_000)
        return 2_000

    return per_second(rounds, seconds)


PEERS = {
    "scope_rl": Peer(
        "SCOPE-RL", "scope-rl", "environment", "one dot product a step; no history", (56e3, 56e3), scope_rl
    ),
    "recsim_ng": Peer(
        "RecSim NG",
        "recsim-ng",
        "environment",
        "1,000 users in one TensorFlow graph, slates of three; no history, no propensities",
        (43e3, 43e3),
        recsim_ng,
    ),
    "sardine": Peer(
        "SARDINE",
        "sardine-rec",
        "environment",
        "scores all items a step; no propensities",
        (13e3, 13e3),
        sardine_environment,
    ),
    "recogym": Peer(
        "RecoGym", "recogym", "environment", "with the organic sessions between steps", (9e3, 9e3), recogym_environment
    ),
    "recsim": Peer(
        "RecSim", "recsim", "environment", "all titles are candidates of every step", (0.24e3, 2.8e3), recsim
    ),
    "obp": Peer(
        "Open Bandit Pipeline",
        "sb-obp",
        "log",
        "binary rewards, one event a user, exact propensities",
        (13e3, 29e3),
        open_bandit_pipeline,
    ),
    "sardine_log": Peer("SARDINE", "sardine-rec", "log", "no propensities", (11e3, 11e3), sardine_log),
    "recogym_log": Peer("RecoGym", "recogym", "log", "uniform policy, organic events counted", (8e3, 8e3), recogym_log),
}
"""By their names on the command line of this file."""


def measured(key: str, titles: int, seconds: float) -> dict[str, Any]:
    """What a peer does here: ``{"per_second", "version"}``, or ``{"missing": why}``."""
    peer = PEERS[key]
    try:
        return {
            "per_second": peer.measure(titles, seconds),
            "version": f"{peer.distribution} {metadata.version(peer.distribution)}",
        }
    except ImportError as error:  # PackageNotFoundError is one
        return {"missing": f"not installed ({error})"}
    except Exception as error:  # whatever a peer raises with the libraries it finds says that it cannot be measured
        return {"missing": f"fails here ({type(error).__name__}: {error})"}


def measured_somewhere(key: str, titles: int, seconds: float) -> dict[str, Any]:
    """The same by the first interpreter that has the peer: this one, then those of `INTERPRETERS`."""
    others = os.environ.get(INTERPRETERS, "").split(os.pathsep)
    answer: dict[str, Any] = {}
    for python in [sys.executable, *filter(None, others)]:
        found = _asked(python, key, titles, seconds)
        if "per_second" in found:
            return found
        # "not installed" here says less than "fails" there
        answer = found if not answer or "fails" in found["missing"] else answer
    return answer


def _asked(python: str, key: str, titles: int, seconds: float) -> dict[str, Any]:
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    try:
        result = subprocess.run(
            [python, "-W", "ignore", __file__, key, str(titles), str(seconds)],
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS_TO_START + 10 * seconds,
            env={**os.environ, **one_thread, **quiet},
        )
        found = json.loads(result.stdout.splitlines()[-1])
        return dict(found)
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {"missing": f"fails here ({type(error).__name__})"}


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules would hide the standard library's
    sys.stdout.write(json.dumps(measured(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))) + "\n")
