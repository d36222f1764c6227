"""Conservative Q-learning (arXiv:2006.04779, eq. 4) in the one-step bandit: ½(Q(x,a) − r)² + α(log Σ exp Q − Q(x,a)).

Fixed point in tabular contexts: Q = r − α(softmax(Q)/μ − 1).
"""

import copy
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
from recsim_gr.backbones import Backbone, build_backbone
from recsim_gr.configs import require
from recsim_gr.histories import Batch, histories_of, split_logs
from recsim_gr.log import AnyLog
from recsim_gr.observations import Observations
from recsim_gr.prefixes import prefix_mask, prefix_states
from recsim_gr.randomness import derived_seed
from recsim_gr.reward_heads import Scorer
from recsim_gr.rewards import RewardEnsemble
from recsim_gr.training import train

BatchLoss = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class CQLConfig(FineTuningConfig):
    """How conservative, and how it acts."""

    alpha: float = 1.0
    """α, the weight of the conservative term: the value of CQL's discrete implementations."""
    temperature: float = 1.0
    """Of the softmax policy it samples from; its rankings do not depend on it. 1 is the temperature of the loss's
    own log Σ exp Q."""
    head_rate: float = 3.0
    """The Q head's learning rate over the backbone's, as in the reward ensemble: it starts from nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha >= 0, self, "alpha", "0 or more")
        require(self.temperature > 0, self, "temperature", "positive")
        require(self.head_rate > 0, self, "head_rate", "positive")


def cql_loss(q: Tensor, chosen: Tensor, rewards: Tensor, alpha: float) -> Tensor:
    """½(Q(x,a) − r)² + α(log Σ_a' exp Q(x,a') − Q(x,a)), per example.

    Args:
        q: (B, T, I), very negative for seen titles.
        chosen: (B, T) the logged titles.
        rewards: (B, T) the observed scores.
        alpha: α.
    """
    if q.ndim != 3 or chosen.shape != q.shape[:2] or rewards.shape != chosen.shape:
        shapes = f"{tuple(q.shape)}, {tuple(chosen.shape)}, {tuple(rewards.shape)}"
        raise ValueError(f"cql_loss takes (B, T, I), (B, T), (B, T), got {shapes}")
    own = q.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    return 0.5 * (own - rewards) ** 2 + alpha * (torch.logsumexp(q, dim=-1) - own)


class QFunctionAgent(Agent):
    """A Q function on the backbone, with a head like the reward model's; ranks by Q, samples from softmax(Q/T).

    A subclass gives `losses`; its config has ``head_rate`` and ``temperature``.
    """

    q_function: Scorer

    @abstractmethod
    def losses(self, train_log: AnyLog, held_out_log: AnyLog) -> tuple[BatchLoss, BatchLoss]:
        """The mean loss of a batch, of each of the two logs."""

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
        train_log, held_out_log = split_logs(log, validation)
        histories, held_out = histories_of(train_log), histories_of(held_out_log)
        loss, held_out_loss = self.losses(train_log, held_out_log)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, "Q head"))
            start = copy.deepcopy(reference).requires_grad_(True)
            self.q_function = Scorer(start, histories.mean_score)
        record = train(
            self.q_function,
            loss,
            lambda: mean_loss(held_out_loss, held_out),
            histories,
            self.config.training,
            seed,
            "fine-tuning",
            after_check,
            self.q_function.groups(self.config.head_rate),
        )
        self.record = fit_record(record)
        return self

    def log_probs(self, observations: Observations) -> NDArray[np.float32]:
        return torch.log_softmax(self._last_q(observations) / self.config.temperature, dim=-1).numpy()

    def scores(self, observations: Observations) -> NDArray[np.float32]:
        return self._last_q(observations).numpy()

    def state(self) -> dict[str, Tensor]:
        return self.q_function.state_dict()

    def shape(self) -> dict[str, Any]:
        return self.q_function.backbone.shape()

    def restore(self, shape: dict[str, Any], state: dict[str, Tensor]) -> None:
        self.q_function = Scorer(build_backbone(shape), 0.0)
        self.q_function.load_state_dict(state)
        self.q_function.eval()

    def _last_q(self, observations: Observations) -> Tensor:
        """(n, I): Q after the whole histories."""
        return last_logits(self.q_function, observations, self.q_function.backbone.n_titles)

    def _q(self, batch: Batch) -> Tensor:
        """(B, T, I): Q before each event, very negative for titles that are seen or not out yet."""
        backbone = self.q_function.backbone
        q = self.q_function.head.all_titles(prefix_states(backbone, batch), backbone)
        return q + prefix_mask(batch, backbone.n_titles)


@register
class CQL(QFunctionAgent):
    """A Q function on the backbone, with a head like the reward model's; ranks by Q, samples from softmax(Q/T)."""

    name = "CQL"
    config_type = CQLConfig
    uses_rewards = True
    strength = Strength("alpha")

    def losses(self, train_log: AnyLog, held_out_log: AnyLog) -> tuple[BatchLoss, BatchLoss]:
        return self._batch_loss, self._batch_loss

    def _batch_loss(self, batch: Batch) -> Tensor:
        chosen = batch.titles.clamp(max=self.q_function.backbone.n_titles - 1)
        return masked_mean(cql_loss(self._q(batch), chosen, batch.scores, self.config.alpha), batch)
