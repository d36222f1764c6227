"""Reward-weighted behaviour cloning: the study's baseline.

Optimum in tabular contexts: π ∝ μ(a|x)·E[max(r, 0)|x,a], which is μ·E[r|x,a] where no score is negative.
"""

from torch import Tensor

from recsim_gr.agents.base import BackboneAgent, Problem, masked_mean, normalised, register
from recsim_gr.backbones import Backbone
from recsim_gr.histories import Batch
from recsim_gr.prefixes import prefix_log_probs


def weighted_bc_loss(log_probs: Tensor, weights: Tensor) -> Tensor:
    """−w·log π(a|x), per example; no gradient through the weights.

    Args:
        log_probs: (B, T) log π of the logged titles.
        weights: (B, T), non-negative.
    """
    if log_probs.shape != weights.shape or log_probs.ndim != 2:
        shapes = f"{tuple(log_probs.shape)} and {tuple(weights.shape)}"
        raise ValueError(f"weighted_bc_loss takes two (B, T) tensors, got {shapes}")
    return -weights.detach() * log_probs


@register
class RewardWeightedBC(BackboneAgent):
    """−r·log π(a|x) with r the observed score, normalised to mean 1.

    Scores of an unbounded noise model can be negative; they weigh 0, since a negative weight has no minimum. With
    Gaussian noise at its strongest that is a fifth of the events, and titles are told apart by less than their means.
    """

    name = "RewardWeightedBC"
    uses_rewards = True

    def batch_loss(self, policy: Backbone, batch: Batch, problem: Problem) -> Tensor:
        weights = normalised(batch.scores.clamp(min=0.0), batch)
        log_probs = prefix_log_probs(policy, batch)
        return masked_mean(weighted_bc_loss(log_probs, weights), batch)
