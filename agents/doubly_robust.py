"""Doubly robust policy gradient (Dudík, Langford and Li, ICML 2011, arXiv:1103.4601, for a policy that draws titles).

V = E_x[Σ_a π(a|x)·r̂(x,a) + w·(r − r̂(x,a_logged))], w = π/μ of the logged title: the reward model says what was not
logged, and the log corrects the model where it can. Its gradient is unbiased if either r̂ or μ is right. Here r̂ has
been fitted to the same log, so that its residuals on training users are somewhat too small.

Optimum in tabular contexts: that of `IPS`, π = π_ref·exp(E[r]/λ)/Z, if either is right.
"""

from dataclasses import dataclass

from torch import Tensor

from recsim_gr.agents.base import Problem, register
from recsim_gr.agents.ips import OffPolicyAgent, OffPolicyConfig
from recsim_gr.histories import Batch


@dataclass(frozen=True)
class DoublyRobustConfig(OffPolicyConfig):
    """`OffPolicyConfig`: the model is the baseline. Self-normalised, it is the weighted form of Thomas and Brunskill
    (ICML 2016)."""


def doubly_robust_loss(probs: Tensor, weights: Tensor, rewards: Tensor, predicted: Tensor, logged: Tensor) -> Tensor:
    """−(Σ_a π(a|x)·r̂(x,a) + w·(r − r̂(x,a_logged))), per context.

    Args:
        probs: (B, T, I) π.
        weights: (B, T) `importance_weights` of the logged titles.
        rewards: (B, T) observed scores.
        predicted: (B, T, I) r̂.
        logged: (B, T) int64, the titles, in [0, I).
    """
    if probs.ndim != 3 or probs.shape != predicted.shape:
        got = f"{tuple(probs.shape)} and {tuple(predicted.shape)}"
        raise ValueError(f"doubly_robust_loss takes (B, T, I) probabilities and predictions, got {got}")
    if not (weights.shape == rewards.shape == logged.shape == probs.shape[:2]):
        raise ValueError("doubly_robust_loss takes (B, T) weights, rewards and titles beside (B, T, I) predictions")
    model = (probs * predicted).sum(dim=-1)
    residual = rewards - predicted.gather(-1, logged.unsqueeze(-1)).squeeze(-1)
    return -(model + weights * residual)


@register
class DoublyRobust(OffPolicyAgent):
    """The reward model on all titles, corrected by weighted logged scores."""

    name = "DoublyRobust"
    config_type = DoublyRobustConfig
    needs_ensemble = True

    def losses(self, probs: Tensor, weights: Tensor, batch: Batch, problem: Problem) -> Tensor:
        assert problem.table is not None
        predicted = problem.table.mean(batch.rows)  # (B, T, I)
        logged = batch.titles.clamp(max=predicted.shape[-1] - 1)
        return doubly_robust_loss(probs, weights, batch.scores, predicted, logged)
