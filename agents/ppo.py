"""Proximal policy optimisation (arXiv:1707.06347): stable-baselines3's, in the reward model's own environment.

The agent draws a title for a context of the log and is paid r̂(x,a) − λ·log(π(a|x)/π_ref(a|x)) by the reward ensemble,
whose r̂ may be shaped (`recsim_gr.agents.reward_shaping`). Optimum in tabular contexts: π = π_ref·exp(r̂/λ)/Z.
``fast=True`` climbs the same as one tensor program, without stable-baselines3: `recsim_gr.agents.fast_ppo`.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import gymnasium as gym
import torch
from stable_baselines3 import PPO as StableBaselinesPPO
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

import recsim_gr  # noqa: F401  (registers RewardModel-v0)
from recsim_gr.agents.base import (
    AfterCheck,
    BackboneAgent,
    FitRecord,
    Strength,
    register,
    required_parts,
)
from recsim_gr.agents.fast_ppo import FastPPO
from recsim_gr.agents.reward_shaping import AnyTable, ShapedRewardConfig, ShapedRewards, shaped_rewards
from recsim_gr.agents.sb3 import BackbonePolicy, BatchedVecEnv, contained_randomness, masked_log_probs
from recsim_gr.backbones import Backbone
from recsim_gr.configs import require
from recsim_gr.errors import TrainingError
from recsim_gr.histories import Batch, HistorySource, histories_of, split_logs
from recsim_gr.log import AnyLog
from recsim_gr.prefixes import prefix_logits
from recsim_gr.randomness import derived_seed
from recsim_gr.rewards import RewardEnsemble
from recsim_gr.training import TrainingRecord


@dataclass(frozen=True)
class PPOConfig(ShapedRewardConfig):
    """What PPO is paid, and how it samples. Of ``training`` it takes steps and checks. Batches, rate and weight decay
    are stable-baselines3's way; what its loop does not have is refused."""

    kl_weight: float = 0.1
    """λ, in points of the score a nat: two titles a point apart may end up e^10 apart from π_ref."""
    n_envs: int = 512
    """Contexts stepped at once: 64 to 2,048 take the same time within a fifth. ``fast=True`` steps a whole
    rollout at once."""
    rollout: int = 2_048
    """Samples between updates: stable-baselines3's default."""
    epochs: int = 4
    """Passes over a rollout: enough to be worth its sampling, few enough for the clip."""
    minibatch: int = 256
    """Samples a gradient step; a sample here is one context, where imitation has all prefixes of 64 users."""
    clip_range: float = 0.2
    """The paper's."""
    learning_rate: float = 1e-3
    """Peak rate of Adam, decaying linearly, a rollout at a time; it replaces ``training``'s, whose loss is of another
    scale. The value matters little: from 3e-4 to 1e-2 what is reached on validation users differs by a twelfth of the
    way (development seed 1000, 1,000 users)."""
    fast: bool = False
    """Whether to leave stable-baselines3 out: the same objective in less than half the time, without its callbacks and
    logger, and with contexts that share histories. What is reported is stable-baselines3's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.fast, bool), self, "fast", "true or false")
        require(self.kl_weight >= 0, self, "kl_weight", "0 or more")
        for name in ("n_envs", "rollout", "epochs"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        require(self.minibatch >= 2, self, "minibatch", "at least 2, of which advantages are normalised")
        require(self.rollout % self.n_envs == 0, self, "rollout", f"a multiple of n_envs ({self.n_envs})")
        require(self.rollout % self.minibatch == 0, self, "rollout", f"a multiple of {self.minibatch}")
        require(self.clip_range > 0, self, "clip_range", "positive")
        require(self.learning_rate > 0, self, "learning_rate", "positive")
        training = self.training
        plain = training.precision == "float32" and not training.compile and training.patience == 0
        require(plain, self, "training", "of float32, without compile and patience, which PPO's loop does not have")

    @property
    def steps_per_rollout(self) -> int:
        """Gradient steps between two rollouts."""
        return self.epochs * self.rollout // self.minibatch

    @property
    def rollouts(self) -> int:
        """As many as give the gradient steps of ``training``, at least one."""
        return max(1, round(self.training.steps / self.steps_per_rollout))

    def rate(self, left: float) -> float:
        """The learning rate of a rollout; ``left``, as stable-baselines3 tells it, is the share of the run that is
        left *after* this rollout, so that the bare share would learn nothing from the last."""
        return self.learning_rate * min(1.0, left + 1.0 / self.rollouts)


@register
class PPO(BackboneAgent):
    """stable-baselines3's PPO on the backbone, paid by the reward ensemble, held to π_ref by KL in the reward."""

    name = "PPO"
    config_type = PPOConfig
    uses_rewards = True
    needs_ensemble = True
    strength = Strength("kl_weight")

    def fit(
        self,
        log: AnyLog,
        backbone: Backbone | None = None,
        rewards: RewardEnsemble | None = None,
        validation: AnyLog | None = None,
        seed: int = 0,
        after_check: AfterCheck | None = None,
    ) -> Self:
        reference = required_parts(self, log, backbone, rewards).reference
        assert rewards is not None
        paid = shaped_rewards(rewards, self.config, reference)
        train_log, held_out_log = split_logs(log, validation)
        held_out, table = histories_of(held_out_log), paid.on(held_out_log)
        checks = Checks(
            self.config,
            lambda policy: -penalised_reward(policy, reference, held_out, table, self.config.kl_weight),
            after_check,
        )
        if self.config.fast:
            policy = copy.deepcopy(reference).requires_grad_(True)
            run = FastPPO(policy, reference, train_log, paid.on(train_log), self.config, derived_seed(seed, "fast PPO"))
            run.run(lambda rollouts: checks.after(rollouts, policy))
            checks.rollout_seconds = run.rollout_seconds
        else:
            with contained_randomness():
                policy = climb(self._learner(train_log, reference, paid, seed), reference, checks)
        self._keep(policy, checks)
        return self

    def _learner(
        self, log: AnyLog, reference: Backbone, rewards: RewardEnsemble | ShapedRewards, seed: int
    ) -> StableBaselinesPPO:
        config = self.config
        envs = gym.make_vec("recsim_gr/RewardModel-v0", num_envs=config.n_envs, rewards=rewards, log=log)
        return learner_in(envs, reference, release_of(log), config, seed)

    def _keep(self, policy: Backbone, checks: "Checks") -> None:
        """The state that the checks found best, and what it cost."""
        self.policy = copy.deepcopy(policy)
        self.policy.load_state_dict(checks.best)
        self.policy.eval()
        samples = self.config.rollouts * self.config.rollout
        self.record = FitRecord(checks.record.steps, checks.record.best_step, samples, checks.rollout_seconds)


def learner_in(
    envs: gym.vector.VectorEnv, reference: Backbone, release: Tensor | None, config: PPOConfig, seed: int
) -> StableBaselinesPPO:
    """stable-baselines3's PPO in a vector environment of episodes of one step, at π_ref."""
    return StableBaselinesPPO(
        BackbonePolicy,
        BatchedVecEnv(envs, seed=derived_seed(seed, "PPO contexts") % 2**31),
        learning_rate=config.rate,
        n_steps=config.rollout // config.n_envs,
        batch_size=config.minibatch,
        n_epochs=config.epochs,
        gamma=1.0,  # episodes are one step long
        gae_lambda=1.0,
        clip_range=config.clip_range,
        policy_kwargs={"backbone": reference, "release": release},
        seed=derived_seed(seed, "PPO") % 2**31,
        device="cpu",
    )


def climb(learner: StableBaselinesPPO, reference: Backbone, checks: "Checks") -> Backbone:
    """Runs a learner to its end, with the KL term in its reward; the policy as it then stands."""
    config = checks.config
    learner.learn(config.rollouts * config.rollout, callback=_Watch(config, reference, checks))
    learner.get_env().close()  # type: ignore[union-attr]
    policy: Backbone = learner.policy.backbone  # type: ignore[assignment]
    return policy


def release_of(log: AnyLog) -> Tensor | None:
    """(I,) the epoch that each title comes out in; None where all are out."""
    if log.catalogue is None or not log.catalogue.has_releases:
        return None
    return torch.from_numpy(log.catalogue.release.copy())


@torch.no_grad()
def penalised_reward(
    policy: Backbone, reference: Backbone, histories: HistorySource, table: AnyTable, kl_weight: float
) -> float:
    """E_x[Σ_a π(a|x)·r̂(x,a) − λ·KL(π ‖ π_ref)] over all prefixes of a log: what PPO climbs, exact over actions."""
    total, events = 0.0, 0
    for batch in histories.chunks():
        total += (_penalised(policy, reference, batch, table, kl_weight) * batch.valid).sum().item()
        events += int(batch.valid.sum())
    return total / events


def _penalised(policy: Backbone, reference: Backbone, batch: Batch, table: AnyTable, kl_weight: float) -> Tensor:
    """(B, T)."""
    own = torch.log_softmax(prefix_logits(policy, batch), dim=-1)
    ref = torch.log_softmax(prefix_logits(reference, batch), dim=-1)
    weight = own.exp()
    return (weight * (table.mean(batch.rows) - kl_weight * (own - ref))).sum(dim=-1)


class Checks:
    """Measures the objective along a run, and keeps the state that is best on validation users.

    Args:
        config: says after which rollouts.
        objective: of a policy, lower is better.
        after_check: told (gradient step, objective).

    Attributes:
        record: the objectives.
        best: the state with the lowest.
        rollout_seconds: processor time of the rollouts, which whoever runs them writes down here.
    """

    def __init__(
        self, config: PPOConfig, objective: Callable[[Backbone], float], after_check: AfterCheck | None
    ) -> None:
        self.config, self.objective, self.after_check = config, objective, after_check
        self.record = TrainingRecord(config.rollouts * config.steps_per_rollout)
        self.best: dict[str, Tensor] = {}
        self.rollout_seconds = 0.0
        checks = config.training.checks
        self.check_at = {0} | {round(config.rollouts * k / checks) for k in range(1, checks + 1)}

    def after(self, rollouts: int, policy: Backbone) -> None:
        """To be told how many rollouts the policy has learned from, 0 first.

        Raises:
            TrainingError: the objective is NaN.
        """
        if rollouts not in self.check_at:
            return
        step = rollouts * self.config.steps_per_rollout
        value = self.objective(policy)
        if value != value:
            remedy = "lower learning_rate" if step else "look at the reward ensemble, since nothing is learned yet"
            raise TrainingError(f"PPO diverged: its objective is NaN after {step} steps; {remedy}")
        if self.record.notes(step, value):
            self.best = {name: tensor.detach().clone() for name, tensor in policy.state_dict().items()}
        if self.after_check is not None:
            self.after_check(step, value)


class _Watch(BaseCallback):
    """Puts the KL term into the reward, and tells the checks of every rollout."""

    def __init__(self, config: PPOConfig, reference: Backbone, checks: Checks) -> None:
        super().__init__()
        self.config, self.reference, self.checks = config, reference, checks
        self.rollouts, self._began = 0, 0.0

    def _on_step(self) -> bool:
        """Subtracts λ·log(π/π_ref) from the rewards that are about to enter the buffer, in place."""
        observations, titles = self.locals["obs_tensor"], torch.from_numpy(self.locals["actions"])
        with torch.no_grad():
            state = self.reference.encode_last(observations["titles"], observations["scores"], observations["times"])
            release = self.model.policy.release
            reference = masked_log_probs(
                self.reference,
                state,
                observations["titles"],
                observations["epoch"],
                release,  # type: ignore[arg-type]
            )
        log_ratio = self.locals["log_probs"] - reference.gather(1, titles[:, None])[:, 0]
        self.locals["rewards"] -= self.config.kl_weight * log_ratio.numpy()
        return True

    def _on_rollout_start(self) -> None:
        self._check()
        self.rollouts += 1
        self._began = time.process_time()

    def _on_rollout_end(self) -> None:
        self.checks.rollout_seconds += time.process_time() - self._began

    def _on_training_end(self) -> None:
        self._check()

    def _check(self) -> None:
        policy: Any = self.model.policy.backbone
        self.checks.after(self.rollouts, policy)
