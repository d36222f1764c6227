"""Off-policy REINFORCE on the log with clipped importance weights (IPS): what the study left out for its variance.

The value of π is estimated from what μ logged, V = E_μ[w·r] with w = π(a|x)/μ(a|x), and climbed by its gradient,
E_μ[w·r·∇log π(a|x)] (REINFORCE, Williams 1992, under importance sampling). Weights are truncated at ``clip``, min(w, c)
(Ionides 2008, J. Comp. Graph. Stat. 17); self-normalised they are divided by their mean over the batch (Swaminathan and
Joachims, NeurIPS 2015). Held to π_ref by λ·KL(π ‖ π_ref), exact over actions.

Optimum in tabular contexts, nothing clipped: π = π_ref·exp(E[r]/λ)/Z, on noisy scores too, and whatever the baseline.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recsim_gr.agents.base import BackboneAgent, FineTuningConfig, Parts, Problem, Strength, masked_mean, register
from recsim_gr.agents.distributions import divergence
from recsim_gr.backbones import Backbone
from recsim_gr.configs import require
from recsim_gr.errors import ConfigError, MissingPropensitiesError
from recsim_gr.histories import Batch, HistorySource
from recsim_gr.log import AnyLog, ShardedLog
from recsim_gr.prefixes import chosen_log_probs, prefix_log_probs, prefix_logits

PROPENSITIES = ("known", "estimated")
BASELINES = ("batch", "user", "none")


@dataclass(frozen=True)
class OffPolicyConfig(FineTuningConfig):
    """How logged events are weighted, and what holds the policy back."""

    propensities: str = "known"
    """μ of the weights: the log's own propensities (``known``: the estimate is unbiased, although μ knew the user), or
    π_ref, which imitates the log (``estimated``: nothing but the log is needed, and it is as biased as π_ref is)."""
    clip: float = 10.0
    """The largest weight, c. Towards c = 0 all weights are equal, which is imitation weighted by the score; with
    c → ∞ the estimate is unbiased. Ten: a title may become ten times as likely as it was when it was logged, and
    still count in full, while E_μ[w²r²] is ten times E_π[r²] at most."""
    self_normalise: bool = False
    """Whether weights are divided by their mean over the batch. It takes the level of the scores out of the gradient,
    as the baseline does, at a bias that shrinks with the batch."""
    kl_weight: float = 0.1
    """λ, in points of the score a nat: PPO's, so that both have one optimum, which this one seeks without a model of
    the reward. Without it the optimum on a finite log is to repeat what scored well, each context its own title."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.propensities in PROPENSITIES, self, "propensities", f"one of {', '.join(PROPENSITIES)}")
        require(self.clip > 0, self, "clip", "positive")
        require(isinstance(self.self_normalise, bool), self, "self_normalise", "true or false")
        require(self.kl_weight >= 0, self, "kl_weight", "0 or more")


@dataclass(frozen=True)
class IPSConfig(OffPolicyConfig):
    """`OffPolicyConfig` and a baseline."""

    baseline: str = "batch"
    """What is subtracted from the score: the ``batch``'s mean, the ``user``'s, or ``none``. Any constant leaves the
    expected gradient as it is while nothing is clipped; the batch's mean takes most of its variance. A mean that
    contains the event itself shrinks its share: by 1/n, which is nothing in a batch and a twentieth for a user."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.baseline in BASELINES, self, "baseline", f"one of {', '.join(BASELINES)}")


# -- losses -------------------------------------------------------------------------------------------------------


def importance_weights(log_probs: Tensor, log_propensities: Tensor, clip: float) -> Tensor:
    """min(π/μ, c), elementwise, whose gradient is min(π/μ, c)·∇log π.

    Where π/μ < c that is its gradient. Where the weight is truncated, plain differentiation would give 0, so that a
    title with a bad score could stay as likely as it had become; REINFORCE goes on with the truncated weight.

    Args:
        log_probs: (B, T) log π of the logged titles.
        log_propensities: (B, T) log μ of them.
        clip: c.
    """
    if log_probs.ndim != 2 or log_probs.shape != log_propensities.shape:
        got = f"{tuple(log_probs.shape)} and {tuple(log_propensities.shape)}"
        raise ValueError(f"importance_weights takes two (B, T) tensors of log-probabilities, got {got}")
    fixed = log_probs.detach()
    weights = torch.exp((fixed - log_propensities).clamp(max=math.log(clip)))
    return weights * (1.0 + log_probs - fixed)


def ips_loss(weights: Tensor, rewards: Tensor) -> Tensor:
    """−w·r, per example: its mean is minus the estimated value, its gradient minus w·r·∇log π.

    Args:
        weights: (B, T) `importance_weights`.
        rewards: (B, T) scores, less a baseline.
    """
    if weights.ndim != 2 or weights.shape != rewards.shape:
        raise ValueError(f"ips_loss takes (B, T) weights and rewards, got {tuple(weights.shape)}, {rewards.shape}")
    return -weights * rewards


def self_normalised(weights: Tensor, valid: Tensor) -> Tensor:
    """w / mean w over real events, (B, T); gradients run through both: the loss of a batch that is weighted so has the
    gradient −Σ w·(r − V)·∇log π / Σ w, V its own estimate of the value, whatever constant is added to r.

    Args:
        weights: (B, T) `importance_weights`.
        valid: (B, T) bool, the real events.
    """
    if weights.ndim != 2 or weights.shape != valid.shape:
        raise ValueError(f"self_normalised takes (B, T) weights and mask, got {tuple(weights.shape)}, {valid.shape}")
    return weights / ((weights * valid).sum() / valid.sum())


# -- agents -------------------------------------------------------------------------------------------------------


class OffPolicyAgent(BackboneAgent):
    """An agent that estimates the value of its policy from weighted logged events and climbs it.

    A subclass gives `losses`: (B, T), from weights that are worked out here.
    """

    config_type = OffPolicyConfig
    uses_rewards = True
    strength = Strength("kl_weight")

    @property
    def needs_propensities(self) -> bool:
        return bool(self.config.propensities == "known")

    def problem(self, histories: HistorySource, log: AnyLog, parts: Parts) -> Problem:
        if self.needs_propensities:
            logged = self._logged(log, histories.longest)  # before the table is worked out, which takes longer
        problem = super().problem(histories, log, parts)
        if not self.needs_propensities:
            with torch.no_grad():
                logged = torch.cat([prefix_log_probs(parts.reference, batch) for batch in histories.chunks()])
        problem.extra["log_propensities"] = logged
        return problem

    def batch_loss(self, policy: Backbone, batch: Batch, problem: Problem) -> Tensor:
        log_probs = torch.log_softmax(prefix_logits(policy, batch), dim=-1)
        chosen = chosen_log_probs(log_probs, batch)
        weights = importance_weights(chosen, problem.extra["log_propensities"][batch.rows], self.config.clip)
        if self.config.self_normalise:
            weights = self_normalised(weights, batch.valid)
        probs = log_probs.exp()  # once for all that asks for it: at 200 titles it costs as much as the softmax
        loss = masked_mean(self.losses(probs, weights, batch, problem), batch)
        if self.config.kl_weight == 0.0:
            return loss
        with torch.no_grad():
            reference = torch.log_softmax(prefix_logits(problem.reference, batch), dim=-1)
        return loss + self.config.kl_weight * masked_mean(divergence(log_probs, reference, probs), batch)

    def losses(self, probs: Tensor, weights: Tensor, batch: Batch, problem: Problem) -> Tensor:
        """(B, T): minus what each event adds to the estimate of the value.

        Args:
            probs: (B, T, I) π.
            weights: (B, T) importance weights of the logged titles.
            batch, problem: the histories, and what is known about them.
        """
        raise TypeError(f"{self.name} has no estimate of a policy's value")

    def _logged(self, log: AnyLog, longest: int) -> Tensor:
        """(U, longest): log μ of every event, 0 on padding; a log in shards is read once, a part at a time."""
        rows = []
        for part in log if isinstance(log, ShardedLog) else [log]:
            try:
                propensities = part.require_propensities()
            except MissingPropensitiesError as error:
                raise ConfigError(f"{self.name}: {error}; or choose propensities='estimated'") from error
            table = np.zeros((part.n_users, longest), dtype=np.float32)
            table[np.cumsum(part.step == 0) - 1, part.step] = np.log(propensities)
            rows.append(torch.from_numpy(table))
        return torch.cat(rows)


@register
class IPS(OffPolicyAgent):
    """Off-policy REINFORCE on the log's scores, with clipped importance weights."""

    name = "IPS"
    config_type = IPSConfig

    def losses(self, probs: Tensor, weights: Tensor, batch: Batch, problem: Problem) -> Tensor:
        return ips_loss(weights, batch.scores - self._baseline(batch))

    def _baseline(self, batch: Batch) -> Tensor:
        """What is subtracted from the scores: a scalar, or (B, 1)."""
        if self.config.baseline == "batch":
            return masked_mean(batch.scores, batch)
        if self.config.baseline == "user":
            return (batch.scores * batch.valid).sum(1, True) / batch.valid.sum(1, True)
        return batch.scores.new_zeros(())
