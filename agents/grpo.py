"""Group relative policy optimisation (GRPO, arXiv:2402.03300, eq. 3) in the contexts of the log, paid by the ensemble.

In each context G titles are drawn from the old policy; a title's advantage is its reward less the group's mean, over
the group's deviation; the ratio to the old policy is clipped as PPO's; KL to π_ref stands in the loss, by the k3
estimator (eq. 4). Options: no deviation (Dr. GRPO, arXiv:2503.20783), the exact KL, KL in the reward.

Optima in tabular contexts, G → ∞:

- KL in the reward, or exactly in the loss without the deviation: π_ref·exp(r/λ)/Z. (In the reward the deviation makes
  no difference: it divides what is 0 there, and only scales the steps before.)
- The exact KL in the loss, with the deviation: the same at the temperature λσ, σ = std_π(r). σ falls as π concentrates,
  so that with a small λ nothing stops it before the best title has it all.
- k3 in the loss: λ·π_ref/(c − r), since its sampled mean has the gradient of KL(π_ref ‖ π), not of KL(π ‖ π_ref); with
  the deviation λσ for λ.

With finite G the group's mean contains the title itself, and advantages are (1 − 1/G) times as large.
"""

import copy
import time
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from recsim_gr.agents.base import (
    AfterCheck,
    BackboneAgent,
    Parts,
    Problem,
    Strength,
    masked_mean,
    register,
)
from recsim_gr.agents.distributions import divergence, drawn_titles
from recsim_gr.agents.reward_shaping import AnyTable, ShapedRewardConfig, shaped_rewards
from recsim_gr.backbones import Backbone
from recsim_gr.configs import require
from recsim_gr.histories import Batch, HistorySource
from recsim_gr.log import AnyLog
from recsim_gr.prefixes import prefix_logits
from recsim_gr.randomness import derived_seed
from recsim_gr.rewards import RewardEnsemble

KL_IN = ("loss", "reward")
KL = ("k3", "exact")
LEAST_DEVIATION = 1e-4
"""Added to the group's deviation: groups of one title many times over have none."""


@dataclass(frozen=True)
class GRPOConfig(ShapedRewardConfig):
    """The paper's objective, and its variants as options."""

    kl_weight: float = 0.04
    """λ, the paper's (section 4.2), in deviations of the reward a nat; in points a nat where advantages are not divided
    by the deviation, or KL stands in the reward, which is divided with it."""
    group: int = 16
    """G, titles drawn in a context. The paper draws 64 a question, 16 questions a step; here a step has 1,280 contexts
    that share what they learn."""
    deviation: bool = True
    """Whether advantages are divided by the group's deviation; Dr. GRPO's are not."""
    kl_in: str = "loss"
    """Where KL to π_ref stands: in the ``loss`` (the paper) or the ``reward`` (as in PPO)."""
    kl: str = "k3"
    """How it is measured in the loss: by ``k3`` on the titles drawn (the paper), or ``exact`` over all titles."""
    clip_range: float = 0.2
    """PPO's; the paper does not say. It matters from the second update of a cycle on."""
    updates: int = 1
    """Gradient steps until the old policy is renewed; one, as in the paper. Each takes the next batch, as every agent's
    does, and draws its titles from the policy as it stood at the start of the cycle."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.kl_weight >= 0, self, "kl_weight", "0 or more")
        require(self.group >= 2, self, "group", "at least 2")
        require(isinstance(self.deviation, bool), self, "deviation", "true or false")
        require(self.kl_in in KL_IN, self, "kl_in", f"one of {', '.join(KL_IN)}")
        require(self.kl in KL, self, "kl", f"one of {', '.join(KL)}")
        require(self.clip_range > 0, self, "clip_range", "positive")
        require(self.updates >= 1, self, "updates", "at least 1")

    @property
    def in_deviations(self) -> bool:
        """Whether λ counts deviations of the reward, and not points."""
        return self.deviation and self.kl_in == "loss"

    @property
    def forward(self) -> bool:
        """Whether what holds the policy back is KL(π_ref ‖ π)."""
        return self.kl_in == "loss" and self.kl == "k3"


# -- losses -------------------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, deviation: bool = True) -> Tensor:
    """(r − mean) / (deviation + ε) within each group, the deviation with G − 1 degrees of freedom.

    Args:
        rewards: (..., G) of the titles of a group.
        deviation: whether it is divided by.
    """
    if rewards.ndim < 1 or rewards.shape[-1] < 2:
        raise ValueError(f"group_advantages takes (..., G) rewards, G at least 2, got {tuple(rewards.shape)}")
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    return centred / (rewards.std(dim=-1, keepdim=True) + LEAST_DEVIATION) if deviation else centred


def grpo_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """−min(ρ·Â, clip(ρ, 1 − ε, 1 + ε)·Â), ρ = π/π_old, per title drawn.

    Args:
        log_probs, old_log_probs: (..., G) log π and log π_old of the titles.
        advantages: (..., G).
        clip_range: ε.
    """
    if not (log_probs.shape == old_log_probs.shape == advantages.shape):
        got = f"{tuple(log_probs.shape)}, {tuple(old_log_probs.shape)}, {tuple(advantages.shape)}"
        raise ValueError(f"grpo_loss takes log-probabilities and advantages of one shape, got {got}")
    ratio = torch.exp(log_probs - old_log_probs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_range, 1.0 + clip_range) * advantages)


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """π_ref/π − log(π_ref/π) − 1 per title: its mean over titles of π is KL(π ‖ π_ref), and each is 0 or more.

    Args:
        log_probs, reference: log π and log π_ref of the titles, of one shape.
    """
    if log_probs.shape != reference.shape:
        raise ValueError(f"k3 takes log-probabilities of one shape, got {tuple(log_probs.shape)}, {reference.shape}")
    difference = reference - log_probs
    return torch.exp(difference) - difference - 1.0


def regularised_reward(
    log_probs: Tensor, reference: Tensor, rewards: Tensor, kl_weight: Tensor | float, forward: bool = False
) -> Tensor:
    """Σ_a π(a|x)·r(x,a) − λ·KL, per context and exact over titles: what the variants without the deviation climb.

    Args:
        log_probs, reference: (..., I) log π and log π_ref.
        rewards: (..., I).
        kl_weight: λ, one or (...) of them.
        forward: KL(π_ref ‖ π) instead of KL(π ‖ π_ref).
    """
    if not (log_probs.shape == reference.shape == rewards.shape):
        raise ValueError("regularised_reward takes log-probabilities and rewards of one shape over all titles")
    kl = divergence(reference, log_probs) if forward else divergence(log_probs, reference)
    return (log_probs.exp() * rewards).sum(dim=-1) - kl_weight * kl


@torch.no_grad()
def draw_titles(log_probs: Tensor, k: int, rng: torch.Generator) -> Tensor:
    """(..., k) titles drawn with replacement from (..., I) log-probabilities."""
    u = torch.rand((*log_probs.shape[:-1], k), generator=rng, dtype=log_probs.dtype)
    return drawn_titles(log_probs.exp(), u)


# -- the agent ----------------------------------------------------------------------------------------------------


class OldPolicy:
    """Whom titles are drawn from: the policy in training as it stood at the start of the cycle.

    Args:
        updates: gradient steps of a cycle.
        seed: of the draws.

    Attributes:
        samples: titles drawn so far in contexts that are real.
        seconds: processor time that drawing and paying them took.
    """

    def __init__(self, updates: int, seed: int) -> None:
        self.updates, self.steps, self.samples, self.seconds = updates, 0, 0, 0.0
        self.rng = torch.Generator().manual_seed(seed % 2**63)
        self._frozen: Backbone | None = None

    @torch.no_grad()
    def log_probs(self, policy: Backbone, batch: Batch, own: Tensor) -> Tensor:
        """(B, T, I) log π_old; ``own`` is log π, which it is at every cycle's first step."""
        first = self.steps % self.updates == 0
        self.steps += 1
        if first:
            self._frozen = copy.deepcopy(policy).requires_grad_(False) if self.updates > 1 else None
            return own.detach()
        assert self._frozen is not None
        return torch.log_softmax(prefix_logits(self._frozen, batch), dim=-1)

    def draw(self, log_probs: Tensor, group: int, batch: Batch) -> Tensor:
        """(B, T, G) titles."""
        self.samples += group * int(batch.valid.sum())
        return draw_titles(log_probs, group, self.rng)


@dataclass(frozen=True, kw_only=True)
class PaidProblem(Problem):
    """A problem with rewards and an old policy.

    Attributes:
        paid: the rewards on every prefix of the log.
        old: draws titles.
    """

    paid: AnyTable
    old: OldPolicy


@register
class GRPO(BackboneAgent):
    """Groups of titles drawn from the policy, paid by the ensemble relative to each other."""

    name = "GRPO"
    config_type = GRPOConfig
    uses_rewards = True
    needs_ensemble = True
    strength = Strength("kl_weight")
    _drawing: OldPolicy

    def fit(
        self,
        log: AnyLog,
        backbone: Backbone | None = None,
        rewards: RewardEnsemble | None = None,
        validation: AnyLog | None = None,
        seed: int = 0,
        after_check: AfterCheck | None = None,
    ) -> Self:
        super().fit(log, backbone, rewards, validation, seed, after_check)
        self.record.samples = self._drawing.samples
        self.record.preparation_seconds += self._drawing.seconds
        del self._drawing
        return self

    def problem(self, histories: HistorySource, log: AnyLog, parts: Parts) -> Problem:
        assert parts.rewards is not None
        paid = shaped_rewards(parts.rewards, self.config, parts.reference).on(log)
        old = OldPolicy(self.config.updates, derived_seed(parts.seed, f"{self.name} titles on {parts.purpose}"))
        if parts.purpose == "train":
            self._drawing = old
        return PaidProblem(histories, parts.reference, paid=paid, old=old)

    def batch_loss(self, policy: Backbone, batch: Batch, problem: Problem) -> Tensor:
        assert isinstance(problem, PaidProblem)
        policy.eval()  # dropout would move the ratio that is clipped
        config = self.config
        own, reference = self._both(policy, batch, problem)
        titles, before, rewards = self._groups(policy, batch, problem, own)
        chosen, held = own.gather(-1, titles), reference.gather(-1, titles)
        if config.kl_in == "reward":
            rewards = rewards - config.kl_weight * (before - held)
        losses = grpo_loss(chosen, before, group_advantages(rewards, config.deviation), config.clip_range).mean(dim=-1)
        if config.kl_in == "loss":
            kl = k3(chosen, held).mean(dim=-1) if config.kl == "k3" else divergence(own, reference)
            losses = losses + config.kl_weight * kl
        return masked_mean(losses, batch)

    @torch.no_grad()
    def _groups(
        self, policy: Backbone, batch: Batch, problem: PaidProblem, own: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Titles drawn in every context, their log π_old and their rewards, (B, T, G) each."""
        began = time.process_time()
        old = problem.old.log_probs(policy, batch, own)
        titles = problem.old.draw(old, self.config.group, batch)
        rewards = problem.paid.mean(batch.rows).gather(-1, titles)
        problem.old.seconds += time.process_time() - began
        return titles, old.gather(-1, titles), rewards

    def objective(self, policy: Backbone, batch: Batch, problem: Problem) -> Tensor:
        """Minus the regularised reward, exact over titles. Where λ counts deviations, they are those of r̂ under π_ref:
        the policy's own would move the yardstick."""
        assert isinstance(problem, PaidProblem)
        own, reference = self._both(policy, batch, problem)
        rewards, weight = problem.paid.mean(batch.rows), self.config.kl_weight
        if self.config.in_deviations:
            share = reference.exp()
            mean = (share * rewards).sum(dim=-1, keepdim=True)
            weight = weight * (share * (rewards - mean) ** 2).sum(dim=-1).sqrt()
        return masked_mean(-regularised_reward(own, reference, rewards, weight, self.config.forward), batch)

    def _both(self, policy: Backbone, batch: Batch, problem: Problem) -> tuple[Tensor, Tensor]:
        """(B, T, I) log π and log π_ref."""
        own = torch.log_softmax(prefix_logits(policy, batch), dim=-1)
        with torch.no_grad():
            return own, torch.log_softmax(prefix_logits(problem.reference, batch), dim=-1)
