"""Group-relative REINFORCE without importance weights (Yao et al., ICLR 2026, arXiv:2509.24203), wholly off-policy.

At the optimum of E_π[r] − τ·KL(π ‖ π_ref), c = r − τ·log(π/π_ref) is the same for all titles of a context, whoever drew
them. The paper asks that of pairs, Σ_{i<j} (c_i − c_j)²/K², and finds that the first step from π_ref is REINFORCE with
the group's mean as baseline, −(r_i − r̄)·log π(a_i): nothing in it says that the titles are π's. Further steps need a
regularisation, for which it offers those below, or a shaping of the data, of which we have the weights.

A group must share its context, and the log has one title a context; so the behaviour policy is π_ref: K titles drawn
from it once, before training, paid by the ensemble. (The paper renews its titles now and then; we never do, which is
its offline case.) What a regularisation holds to is the policy that they were drawn from, so π_ref.

Optima in tabular contexts, titles drawn from any q, Â = r − E_q[r]: ``pairs`` π_ref·exp(r/τ)/Z whatever q is;
``imitation`` q·(1 + Â/τ), where that is positive. ``squares`` has another than the first, since its square is not
centred, and ``clip`` has many: it stops at its border.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recsim_gr.agents.base import BackboneAgent, FineTuningConfig, Parts, Problem, Strength, masked_mean, register
from recsim_gr.agents.grpo import draw_titles
from recsim_gr.agents.reward_weighted_bc import weighted_bc_loss
from recsim_gr.backbones import Backbone
from recsim_gr.configs import require
from recsim_gr.histories import Batch, HistorySource
from recsim_gr.log import AnyLog
from recsim_gr.prefixes import prefix_logits
from recsim_gr.randomness import derived_seed

REGULARISERS = ("pairs", "squares", "imitation", "clip")
WEIGHTS = ("equal", "exp")


@dataclass(frozen=True)
class GroupREINFORCEConfig(FineTuningConfig):
    """Where titles come from, and what regularises their use."""

    tau: float = 0.1
    """τ, in points of the score a nat: PPO's λ, whose optimum ``pairs`` has. ``clip`` has none."""
    group: int = 8
    """K, titles drawn from π_ref in each context: as many as the pairs of `RSDPO` are chosen from."""
    regulariser: str = "pairs"
    """``pairs``: the paper's surrogate in full, not its first step alone. ``squares``: REINFORCE and τ/2·log(π/π_ref)²
    (OPMD, by its REP family). ``imitation``: REINFORCE with the baseline r̄ − τ, so that the mean title is imitated
    (AsymRE). ``clip``: none, but no push beyond a range of π/π_ref (its REC-OneSide-NoIS)."""
    clip_low: float = 0.6
    clip_high: float = 2.0
    """Of ``clip``: π/π_ref may fall by .6 and rise by 2; the wider of the two ranges that the paper tries, without
    which a policy that never draws anew would stay where it is."""
    weight: str = "equal"
    """``exp`` multiplies advantages by exp(Â/temperature): more is learned from good titles (its RED-Weight)."""
    temperature: float = 1.0
    """Of ``exp``: its authors' code's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tau", "temperature", "clip_high"):
            require(getattr(self, name) > 0, self, name, "positive")
        require(0 < self.clip_low < 1, self, "clip_low", "between 0 and 1")
        require(self.group >= 2, self, "group", "at least 2")
        require(self.regulariser in REGULARISERS, self, "regulariser", f"one of {', '.join(REGULARISERS)}")
        require(self.weight in WEIGHTS, self, "weight", f"one of {', '.join(WEIGHTS)}")
        fits = self.weight == "equal" or self.regulariser != "pairs"
        require(fits, self, "weight", "equal where the regulariser is pairs, which has no advantages")


# -- losses, of groups of titles that somebody drew ----------------------------------------------------------------


def pairwise_loss(log_probs: Tensor, reference: Tensor, rewards: Tensor, tau: float) -> Tensor:
    """Σ_{i<j} (c_i − c_j)²/(2τK²) with c = r − τ·log(π/π_ref), per group: the variance of c over 2τ, so that its
    gradient at π = π_ref is REINFORCE's, −Σ (r_i − r̄)·∇log π(a_i)/K.

    Args:
        log_probs, reference: (..., K) log π and log π_ref of the titles.
        rewards: (..., K).
        tau: τ.
    """
    _same_shape("pairwise_loss", log_probs, reference, rewards)
    return (rewards - tau * (log_probs - reference)).var(dim=-1, correction=0) / (2.0 * tau)


def squares(log_probs: Tensor, reference: Tensor, tau: float) -> Tensor:
    """τ/2·log(π/π_ref)², per title: what OPMD adds to REINFORCE."""
    _same_shape("squares", log_probs, reference)
    return 0.5 * tau * (log_probs - reference) ** 2


def one_sided_loss(log_probs: Tensor, reference: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """−min(Â·log ρ, Â·log clip(ρ, 1 − low, 1 + high)), ρ = π/π_ref, per title: its gradient is −Â·∇log π, and 0 where ρ
    is beyond the range in the advantage's direction. (The paper has a mask on −Â·log π, of the same gradient.)

    Args:
        log_probs, reference, advantages: (..., K).
        low, high: of the range.
    """
    _same_shape("one_sided_loss", log_probs, reference, advantages)
    ratio = log_probs - reference
    return -torch.minimum(ratio * advantages, ratio.clamp(math.log(1.0 - low), math.log(1.0 + high)) * advantages)


def _same_shape(name: str, *tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors}) > 1 or tensors[0].ndim < 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(f"{name} takes (..., K) tensors of one shape, got {shapes}")


# -- the agent ----------------------------------------------------------------------------------------------------


@register
class GroupREINFORCE(BackboneAgent):
    """REINFORCE on groups of titles that π_ref drew once, without importance weights."""

    name = "GroupREINFORCE"
    config_type = GroupREINFORCEConfig
    uses_rewards = True
    needs_ensemble = True
    strength = Strength("tau")

    def problem(self, histories: HistorySource, log: AnyLog, parts: Parts) -> Problem:
        problem = super().problem(histories, log, parts)
        rng = torch.Generator().manual_seed(derived_seed(parts.seed, f"{self.name} titles on {parts.purpose}") % 2**63)
        groups = [self._groups(batch, problem, rng) for batch in histories.chunks()]
        for name in groups[0]:
            problem.extra[name] = torch.cat([part[name] for part in groups])
        return problem

    def batch_loss(self, policy: Backbone, batch: Batch, problem: Problem) -> Tensor:
        titles, reference, rewards = (problem.extra[name][batch.rows] for name in ("titles", "reference", "rewards"))
        logits = prefix_logits(policy, batch)
        log_probs = logits.gather(-1, titles) - logits.logsumexp(dim=-1, keepdim=True)  # (B, T, K)
        return masked_mean(self._losses(log_probs, reference, rewards), batch)

    def _losses(self, log_probs: Tensor, reference: Tensor, rewards: Tensor) -> Tensor:
        """(B, T) of (B, T, K)."""
        config = self.config
        if config.regulariser == "pairs":
            return pairwise_loss(log_probs, reference, rewards, config.tau)
        advantages = rewards - rewards.mean(dim=-1, keepdim=True)
        if config.weight == "exp":
            advantages = advantages * torch.exp(advantages / config.temperature)
        if config.regulariser == "clip":
            return one_sided_loss(log_probs, reference, advantages, config.clip_low, config.clip_high).mean(dim=-1)
        if config.regulariser == "imitation":
            advantages = advantages + config.tau
        losses = weighted_bc_loss(log_probs.flatten(0, 1), advantages.flatten(0, 1)).view(log_probs.shape)
        if config.regulariser == "squares":
            losses = losses + squares(log_probs, reference, config.tau)
        return losses.mean(dim=-1)

    @torch.no_grad()
    def _groups(self, batch: Batch, problem: Problem, rng: torch.Generator) -> dict[str, Tensor]:
        """Titles drawn in every context, their log π_ref and their rewards, (B, T, K) each."""
        assert problem.table is not None
        log_probs = torch.log_softmax(prefix_logits(problem.reference, batch), dim=-1)
        titles = draw_titles(log_probs, self.config.group, rng)
        mean, _ = problem.table.spread(batch.rows, titles)
        return {"titles": titles, "reference": log_probs.gather(-1, titles), "rewards": mean}
