"""Advantage-weighted supervised finetuning (A-SFT): the Netflix study of 2025.

−w·log π(a|x) with w = exp(Â/β), Â = r̂(x,a) − Σ_a' π_ref(a'|x)·r̂(x,a'). The study prints its formula only as an image,
so its choices are options here; the default is the reading above. Kin: AWR (arXiv:1910.00177, eq. 10, with its weight
clip of 20), CRR (arXiv:2006.15134, eq. 4: the exponential and the binary weight).

Optimum in tabular contexts, deterministic rewards, inactive clipping: π = μ·exp(r/β)/Z (the baseline cancels).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recsim_gr.agents.base import (
    BackboneAgent,
    FineTuningConfig,
    Parts,
    Problem,
    Strength,
    masked_mean,
    normalised,
    register,
)
from recsim_gr.agents.reward_weighted_bc import weighted_bc_loss
from recsim_gr.backbones import Backbone
from recsim_gr.configs import require
from recsim_gr.errors import ConfigError
from recsim_gr.histories import Batch, HistorySource
from recsim_gr.log import AnyLog
from recsim_gr.prefixes import prefix_log_probs, prefix_logits
from recsim_gr.reward_tables import RewardTable

ADVANTAGES = ("model", "score", "blend")
BASELINES = ("policy", "user", "batch")
WEIGHTS = ("exp", "linear", "binary")


@dataclass(frozen=True)
class ASFTConfig(FineTuningConfig):
    """The study's choices, as options."""

    beta: float = 0.5
    """β, the temperature, in points of the score: half a point of advantage multiplies the weight by e. Between
    imitation (β → ∞) and argmax (β → 0); half a point is about one standard deviation of r̂ over the titles of a user
    (.4 to .6 in the default world). The ``binary`` weight has no temperature and does not read it."""
    advantage: str = "model"
    """r in Â: the ensemble's mean (``model``), the observed ``score``, or half of each (``blend``)."""
    baseline: str = "policy"
    """What is subtracted: Σ π_ref·r̂ (``policy``), the ``user``'s mean score, or the ``batch``'s mean."""
    weight: str = "exp"
    """exp(Â/β), ``linear`` max(0, 1 + Â/β), or ``binary`` 1[Â > 0] (CRR)."""
    clip: float = 20.0
    """The largest weight before normalisation: AWR's and CRR's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, self, "beta", "positive")
        require(self.clip > 0, self, "clip", "positive")
        for name, known in (("advantage", ADVANTAGES), ("baseline", BASELINES), ("weight", WEIGHTS)):
            require(getattr(self, name) in known, self, name, f"one of {', '.join(known)}")


def advantage_weights(advantages: Tensor, beta: float, weight: str = "exp", clip: float = 20.0) -> Tensor:
    """Weights of the advantages, elementwise, before normalisation: in [0, clip].

    Args:
        advantages: (B, T), in points of the score.
        beta: temperature.
        weight: ``exp``, ``linear`` or ``binary``.
        clip: the largest weight.
    """
    if advantages.ndim != 2:
        raise ValueError(f"advantage_weights takes (B, T) advantages, got {tuple(advantages.shape)}")
    if weight == "exp":
        return torch.exp((advantages / beta).clamp(max=torch.tensor(clip).log().item()))
    if weight == "linear":
        return (1.0 + advantages / beta).clamp(0.0, clip)
    if weight == "binary":
        return (advantages > 0).float()
    raise ConfigError(f"no weight {weight!r}; there are {', '.join(WEIGHTS)}")


@register
class ASFT(BackboneAgent):
    """Imitation weighted by the exponential advantage of the reward model."""

    name = "ASFT"
    config_type = ASFTConfig
    uses_rewards = True
    needs_ensemble = True
    strength = Strength("beta")

    def problem(self, histories: HistorySource, log: AnyLog, parts: Parts) -> Problem:
        problem = super().problem(histories, log, parts)
        assert problem.table is not None
        advantages = [self._advantages(batch, problem.table, parts.reference) for batch in histories.chunks()]
        problem.extra["advantages"] = torch.cat(advantages)
        return problem

    def batch_loss(self, policy: Backbone, batch: Batch, problem: Problem) -> Tensor:
        advantages = problem.extra["advantages"][batch.rows]
        if self.config.baseline == "batch":
            advantages = advantages - masked_mean(advantages, batch)
        weights = advantage_weights(advantages, self.config.beta, self.config.weight, self.config.clip)
        log_probs = prefix_log_probs(policy, batch)
        return masked_mean(weighted_bc_loss(log_probs, normalised(weights, batch)), batch)

    @torch.no_grad()
    def _advantages(self, batch: Batch, table: RewardTable, reference: Backbone) -> Tensor:
        """(B, T): Â of the logged titles; the same all through a run, so worked out once."""
        predicted = table.mean(batch.rows)  # (B, T, I)
        titles = batch.titles.clamp(max=predicted.shape[-1] - 1).unsqueeze(-1)
        model = predicted.gather(-1, titles).squeeze(-1)
        share = {"model": 1.0, "score": 0.0, "blend": 0.5}[self.config.advantage]
        value = share * model + (1.0 - share) * batch.scores
        if self.config.baseline == "policy":
            policy = torch.softmax(prefix_logits(reference, batch), dim=-1)
            value = value - (policy * predicted).sum(dim=-1)
        elif self.config.baseline == "user":
            value = value - (batch.scores * batch.valid).sum(1, True) / batch.valid.sum(1, True)
        return value.masked_fill(~batch.valid, 0.0)
