"""Exponential reward-weighted supervised finetuning (Exp-RSFT): arXiv:2603.10279 and its sequel, arXiv:2608.00816.

−w·log π(a|x) with w = exp(r/λ), r the observed score: no reward model, no propensities. As the abstracts have it, λ
trades robustness to the noise of r against improvement over μ.

Optimum in tabular contexts: π = μ·E[exp(r/λ)|x,a]/Z. Under noise this is not μ·exp(E[r|x,a]/λ)/Z: of two titles of
equal mean score the noisier one is preferred (by Jensen's inequality), with Gaussian noise by exp(σ²/2λ²).

Weights are divided by the mean of their batch, so that steps are as long as imitation's. Where one event outweighs a
batch that is a departure: none counts for more than a batch has events, and λ acts as a higher one. Two titles a point
apart, λ = ½, 1,280 events: as .51 with Gaussian noise of σ = 1, as .8 with 2.5 and as 1.2 with 4. Scores in [1, 5] are
not touched.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recsim_gr.agents.base import (
    BackboneAgent,
    FineTuningConfig,
    Problem,
    Strength,
    masked_mean,
    normalised,
    register,
)
from recsim_gr.agents.reward_weighted_bc import weighted_bc_loss
from recsim_gr.backbones import Backbone
from recsim_gr.configs import require
from recsim_gr.histories import Batch
from recsim_gr.prefixes import prefix_log_probs


@dataclass(frozen=True)
class ExpRSFTConfig(FineTuningConfig):
    """How sharply scores are told apart."""

    temperature: float = 0.5
    """λ, in points of the score: half a point multiplies the weight by e, as A-SFT's β does, so that the two differ by
    what they weigh and not by how sharply. The papers' values are for other scales of reward."""
    clip: float = 0.0
    """The largest weight, over the mean weight of its batch, before the weights are brought back to mean 1; 0 cuts
    nothing, which is the papers' method, and what it makes of noise is the question here. Where noise has no bound, one
    score may outweigh a batch: 20, A-SFT's, would do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, self, "temperature", "positive")
        require(self.clip == 0 or self.clip >= 1, self, "clip", "0, or at least 1, the mean weight")


def exp_reward_weights(scores: Tensor, valid: Tensor, temperature: float, clip: float = 0.0) -> Tensor:
    """exp(r/λ) over its mean, elementwise; 0 on padding.

    Args:
        scores: (B, T) observed scores r.
        valid: (B, T) bool, false on padding.
        temperature: λ.
        clip: the largest weight, over the mean of all; 0 for none. The mean of what is cut is below 1.
    """
    if scores.ndim != 2 or scores.shape != valid.shape or valid.dtype != torch.bool:
        shapes = f"{tuple(scores.shape)} and {valid.dtype} {tuple(valid.shape)}"
        raise ValueError(f"exp_reward_weights takes (B, T) scores and a (B, T) mask of bool, got {shapes}")
    logits = (scores / temperature).masked_fill(~valid, -torch.inf)
    # a softmax subtracts the maximum, so that no score is too high to be exponentiated
    weights = torch.softmax(logits.flatten(), dim=0).view(scores.shape) * valid.sum()
    return weights.clamp(max=clip) if clip > 0 else weights


@register
class ExpRSFT(BackboneAgent):
    """Imitation weighted by the exponential of the observed score."""

    name = "ExpRSFT"
    config_type = ExpRSFTConfig
    uses_rewards = True
    strength = Strength("temperature")

    def batch_loss(self, policy: Backbone, batch: Batch, problem: Problem) -> Tensor:
        weights = exp_reward_weights(batch.scores, batch.valid, self.config.temperature, self.config.clip)
        log_probs = prefix_log_probs(policy, batch)
        return masked_mean(weighted_bc_loss(log_probs, normalised(weights, batch)), batch)
