"""PPO in the true environment: what a perfect simulator would buy.

`PPO`, but for where it learns: the world's own environment, whose training users come after their history, are shown
the drawn title whatever they would have chosen, and pay the score that is observed of it, noise included::

    score − λ·log(π(a|x)/π_ref(a|x))

It never sees satisfaction. The kept state is the one that earns most of the same among the world's validation users.
"""

from dataclasses import dataclass
from typing import Any, Self

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from recsim_gr.agents.base import AfterCheck, InformedAgent, register, required_parts
from recsim_gr.agents.distributions import divergence, drawn_titles
from recsim_gr.agents.ppo import PPO, Checks, PPOConfig, climb, learner_in, release_of
from recsim_gr.agents.sb3 import contained_randomness, masked_log_probs
from recsim_gr.backbones import Backbone
from recsim_gr.configs import require
from recsim_gr.errors import ConfigError
from recsim_gr.histories import split_logs
from recsim_gr.log import AnyLog
from recsim_gr.randomness import derived_seed
from recsim_gr.rewards import RewardEnsemble

HELD_OUT = 2_048
"""Validation users who are shown a title at every check: as many as a rollout, so that an estimate's standard error is
.03 points where scores deviate by 1.2."""

CHUNK = 256
"""Contexts whose log-probabilities exist at a time."""


@dataclass(frozen=True)
class OnlinePPOConfig(PPOConfig):
    """As `PPOConfig`, whose defaults it has, since only the environment differs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.plain, self, "reward", "mean and unbounded: it is paid observed scores")
        require(self.fast is False, self, "fast", "false: the tensor program knows tables of r̂, no users")


@register
class OnlinePPO(InformedAgent, PPO):
    """PPO in the true environment, paid by observed scores: what a perfect simulator would buy."""

    name = "OnlinePPO"
    config_type = OnlinePPOConfig
    needs_ensemble = False

    def fit(
        self,
        log: AnyLog,
        backbone: Backbone | None = None,
        rewards: RewardEnsemble | None = None,
        validation: AnyLog | None = None,
        seed: int = 0,
        after_check: AfterCheck | None = None,
    ) -> Self:
        """As `Agent.fit`; of the log it takes how many users there are and when titles come out, no event."""
        reference, world = required_parts(self, log, backbone, rewards).reference, self.required_world()
        if world.n_titles != log.n_titles:
            raise ConfigError(f"the log has {log.n_titles} titles and the world that {self.name} met {world.n_titles}")
        n_users, release = split_logs(log, validation)[0].n_users, release_of(log)
        with contained_randomness():
            envs = environment_of(world, "train", self.config.n_envs, n_users)
            held_out = HeldOut(world, reference, release, self.config.kl_weight, seed)
            checks = Checks(self.config, lambda policy: -held_out.earned(policy), after_check)
            policy = climb(learner_in(envs, reference, release, self.config, seed), reference, checks)
        self._keep(policy, checks)
        self.record.samples += held_out.samples
        return self


def environment_of(world: Any, split: str, n: int, users: int) -> gym.vector.VectorEnv:
    """The world's vector environment: n of its first ``users`` of a split at a time."""
    return gym.make_vec(world.env_id, num_envs=n, world=world, split=split, pool_users=world.at_most(split, users))


class HeldOut:
    """What a policy earns among validation users: one title each, drawn and paid with the same random numbers every
    time, less λ·KL(π ‖ π_ref), which needs no draw.

    Args:
        world: whose users.
        reference: π_ref.
        release: (I,), as in `BackbonePolicy`.
        kl_weight: λ.
        seed: of users, noise and draws.

    Attributes:
        samples: titles shown so far.
    """

    def __init__(self, world: Any, reference: Backbone, release: Tensor | None, kl_weight: float, seed: int) -> None:
        self.envs = environment_of(world, "validation", HELD_OUT, HELD_OUT)
        self.reference, self.release, self.kl_weight, self.samples = reference, release, kl_weight, 0
        self.seed = derived_seed(seed, "held-out users of OnlinePPO")
        self.u = torch.rand(HELD_OUT, 1, generator=torch.Generator().manual_seed(self.seed))

    @torch.no_grad()
    def earned(self, policy: Backbone) -> float:
        """An estimate of E[score − λ·KL]."""
        observations, _ = self.envs.reset(seed=self.seed)
        seen = {name: torch.from_numpy(np.asarray(values)) for name, values in observations.items()}
        titles, distance = [], 0.0
        for rows in torch.arange(HELD_OUT).split(CHUNK):
            own, ref = (self._log_probs(model, seen, rows) for model in (policy, self.reference))
            titles.append(drawn_titles(own.exp(), self.u[rows])[:, 0])
            distance += divergence(own, ref).sum().item() / HELD_OUT
        _, scores, *_ = self.envs.step(torch.cat(titles).numpy())
        self.samples += HELD_OUT
        return float(scores.mean()) - self.kl_weight * distance

    def _log_probs(self, model: Backbone, seen: dict[str, Tensor], rows: Tensor) -> Tensor:
        titles, scores, times, epoch = (seen[name][rows] for name in ("titles", "scores", "times", "epoch"))
        return masked_log_probs(model, model.encode_last(titles, scores, times), titles, epoch, self.release)
