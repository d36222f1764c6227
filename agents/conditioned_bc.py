"""Reward-conditioned imitation: learn which title came with which score, then ask for titles that come with a high one.

−log π(a|x,r), r the observed score of the title to come, and acting by π(·|x,c) with c high. In the manner of
upside-down RL (arXiv:1912.02875), Decision Transformer (arXiv:2106.01345) and, for recommendation, DT4IER
(arXiv:2404.03637). An episode is one step here, so that the return-to-go is the score.

Where Decision Transformer gives the sequence a token for every return-to-go, we let the score meet the state behind the
sequence: only the latest matters (arXiv:2601.15953 separates it for that reason), and earlier scores stand in the
titles' own tokens already. With z the score in standard deviations from the log's mean,

    h' = h + z·(W₁h + v₁) + (z² − 1)·(W₂h + v₂),    π(a|x,r) = softmax(⟨h', title⟩)

W and v zero at the start, which is π_ref whatever the score. z and z² are what the likelihood of a normal score depends
on: log p(r|x,a) is linear in them, with coefficients that the title's mean and deviation decide.

Optimum in tabular contexts: π(a|x,c) = μ(a|x)·p(r = c|x,a)/Z. It is not greedy: at c it wants the title that most often
scores c, and noise brings bad titles there too.
"""

import copy
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recsim_gr.agents.base import (
    AfterCheck,
    Agent,
    FineTuningConfig,
    Strength,
    fit_record,
    last_logits,
    masked_mean,
    mean_loss,
    register,
    required_parts,
)
from recsim_gr.agents.bc import bc_loss
from recsim_gr.backbones import Backbone, build_backbone
from recsim_gr.configs import require
from recsim_gr.histories import Batch, HistorySource, histories_of, split_logs
from recsim_gr.log import AnyLog
from recsim_gr.observations import Observations
from recsim_gr.prefixes import prefix_log_probs, prefix_states
from recsim_gr.rewards import RewardEnsemble
from recsim_gr.training import train

FURTHEST = 3.0
"""Standard deviations at which scores are cut, so that the square of an outlier does not drown the rest: scores in
[1, 5] are seldom that far away."""


@dataclass(frozen=True)
class ConditionedBCConfig(FineTuningConfig):
    """What is asked for."""

    target: float = 0.9
    """The quantile of the training scores that is asked for: high, with a tenth of the log at it or above. Conditions
    beyond what was seen are known to be unreliable (arXiv:2210.05158), so none can be asked for. Where a tenth of the
    log scores 5, the most there is (watch time from ν = .35 on), every higher quantile asks for the same."""
    condition_rate: float = 3.0
    """The learning rate of W and v over the backbone's, as of other heads that start from nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.target <= 1, self, "target", "in [0, 1]")
        require(self.condition_rate > 0, self, "condition_rate", "positive")


def conditioned_states(states: Tensor, z: Tensor, mixes: Tensor, levels: Tensor) -> Tensor:
    """(..., d): h + z·(W₁h + v₁) + (z² − 1)·(W₂h + v₂).

    Args:
        states: (..., d) h.
        z: (...) scores in standard deviations from the mean.
        mixes: (2, d, d) W₁ and W₂.
        levels: (2, d) v₁ and v₂.
    """
    d = states.shape[-1]
    if states.shape[:-1] != z.shape or mixes.shape != (2, d, d) or levels.shape != (2, d):
        shapes = ", ".join(str(tuple(x.shape)) for x in (states, z, mixes, levels))
        raise ValueError(f"conditioned_states takes (..., d), (...), (2, d, d), (2, d), got {shapes}")
    z = z.unsqueeze(-1)
    linear, square = (states @ mix.T + level for mix, level in zip(mixes, levels, strict=True))
    return states + z * linear + (z * z - 1.0) * square


class ConditionedPolicy(nn.Module):
    """A backbone whose states are moved by a score.

    Args:
        backbone: it starts from; not copied.
        mean, deviation: of the training scores.
        target: the score that is asked for when it acts.
    """

    mean: Tensor
    deviation: Tensor
    target: Tensor

    def __init__(self, backbone: Backbone, mean: float = 0.0, deviation: float = 1.0, target: float = 0.0) -> None:
        super().__init__()
        d = backbone.config.dimensions
        self.backbone = backbone
        self.mixes = nn.Parameter(torch.zeros(2, d, d))
        self.levels = nn.Parameter(torch.zeros(2, d))
        for name, value in (("mean", mean), ("deviation", deviation), ("target", target)):
            self.register_buffer(name, torch.tensor(float(value)))

    def states(self, states: Tensor, scores: Tensor) -> Tensor:
        """(..., d) states of the backbone, moved by (...) scores of what comes next."""
        z = ((scores - self.mean) / self.deviation).clamp(-FURTHEST, FURTHEST)
        return conditioned_states(states, z, self.mixes, self.levels)

    def log_probs(self, batch: Batch) -> Tensor:
        """(B, T): log π(a|x,r) of the logged titles, given their own scores."""
        states = self.states(prefix_states(self.backbone, batch), batch.scores)
        return prefix_log_probs(self.backbone, batch, states)

    def forward(self, titles: Tensor, scores: Tensor, times: Tensor) -> Tensor:
        """(B, I): logits of all titles after whole histories, asked for the target."""
        states = self.backbone.encode_last(titles, scores, times)
        return self.backbone.logits(self.states(states, self.target.expand(len(states))))

    def groups(self, condition_rate: float) -> list[dict[str, object]]:
        """Optimiser groups: the condition learns faster than the backbone."""
        return [
            {"params": list(self.backbone.parameters())},
            {"params": [self.mixes, self.levels], "scale": condition_rate},
        ]


@register
class ConditionedBC(Agent):
    """Imitation given the score to come; acts as if a high one came."""

    name = "ConditionedBC"
    config_type = ConditionedBCConfig
    uses_rewards = True
    # the share of the log that lies above is what is doubled and halved twice
    strength = Strength("target", rises=True, values=(0.6, 0.8, 0.9, 0.95, 0.975))
    policy: ConditionedPolicy

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
        histories, held_out = (histories_of(part) for part in split_logs(log, validation))
        start = copy.deepcopy(reference).requires_grad_(True)
        self.policy = ConditionedPolicy(start, *score_statistics(histories, self.config.target))
        record = train(
            self.policy,
            self._batch_loss,
            lambda: mean_loss(self._batch_loss, held_out),
            histories,
            self.config.training,
            seed,
            "fine-tuning",
            after_check,
            self.policy.groups(self.config.condition_rate),
        )
        self.record = fit_record(record)
        return self

    def log_probs(self, observations: Observations) -> NDArray[np.float32]:
        logits = last_logits(self.policy, observations, self.policy.backbone.n_titles)
        return torch.log_softmax(logits, dim=-1).numpy()

    def state(self) -> dict[str, Tensor]:
        return self.policy.state_dict()

    def shape(self) -> dict[str, Any]:
        return self.policy.backbone.shape()

    def restore(self, shape: dict[str, Any], state: dict[str, Tensor]) -> None:
        self.policy = ConditionedPolicy(build_backbone(shape))
        self.policy.load_state_dict(state)
        self.policy.eval()

    def _batch_loss(self, batch: Batch) -> Tensor:
        return masked_mean(bc_loss(self.policy.log_probs(batch)), batch)


def score_statistics(histories: HistorySource, quantile: float) -> tuple[float, float, float]:
    """Mean, deviation (1 where all are equal) and a quantile of the scores of all events."""
    scores = torch.cat([batch.scores[batch.valid] for batch in histories.chunks()]).double().numpy()
    return float(scores.mean()), float(scores.std()) or 1.0, float(np.quantile(scores, quantile))
