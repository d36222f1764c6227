"""Policies that learn nothing about the user: where everything else must be better."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsim_gr.agents.base import (
    AfterCheck,
    Agent,
    AgentConfig,
    BackboneAgent,
    not_fitted,
    register,
    require_catalogue,
    required_parts,
)
from recsim_gr.backbones import Backbone
from recsim_gr.log import AnyLog, title_counts
from recsim_gr.observations import Observations
from recsim_gr.randomness import generator
from recsim_gr.rewards import RewardEnsemble


@dataclass(frozen=True)
class RandomConfig(AgentConfig):
    """The uniform policy."""

    seed: int = 0
    """Of its rankings: a list of ten titles must be drawn, since all are equally likely."""


@register
class Random(Agent):
    """Uniform over unseen titles; ranks them at random."""

    name = "Random"
    config_type = RandomConfig

    def log_probs(self, observations: Observations) -> NDArray[np.float32]:
        return _normalised(np.zeros((len(observations), observations.n_titles)), observations)

    def scores(self, observations: Observations) -> NDArray[np.float32]:
        shape = (len(observations), observations.n_titles)
        return generator(self.config.seed, "random rankings").random(shape, dtype=np.float32)


@register
class Popularity(Agent):
    """The log's popularity: probability in proportion to 1 + how often a title was chosen."""

    name = "Popularity"

    def __init__(self, config: Any = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.log_counts = np.zeros(0)

    def fit(
        self,
        log: AnyLog,
        backbone: Backbone | None = None,
        rewards: RewardEnsemble | None = None,
        validation: AnyLog | None = None,
        seed: int = 0,
        after_check: AfterCheck | None = None,
    ) -> Self:
        self.log_counts = np.log1p(title_counts(log))
        return self

    def log_probs(self, observations: Observations) -> NDArray[np.float32]:
        if len(self.log_counts) == 0:
            raise not_fitted(self)
        require_catalogue(observations, len(self.log_counts))
        return _normalised(np.tile(self.log_counts, (len(observations), 1)), observations)

    def state(self) -> dict[str, Tensor]:
        return {"log_counts": torch.from_numpy(self.log_counts)}

    def restore(self, shape: dict[str, Any], state: dict[str, Tensor]) -> None:
        self.log_counts = state["log_counts"].numpy()


@register
class Pretrained(BackboneAgent):
    """The backbone as it is: π_ref."""

    name = "Pretrained"
    config_type = AgentConfig  # type: ignore[assignment]

    def fit(
        self,
        log: AnyLog,
        backbone: Backbone | None = None,
        rewards: RewardEnsemble | None = None,
        validation: AnyLog | None = None,
        seed: int = 0,
        after_check: AfterCheck | None = None,
    ) -> Self:
        self.policy = required_parts(self, log, backbone, rewards).reference
        return self


def _normalised(logits: NDArray[Any], observations: Observations) -> NDArray[np.float32]:
    """(n, I) log-softmax over the titles that can be chosen."""
    masked = np.where(observations.unavailable(), -np.inf, logits)
    top = masked.max(axis=1, keepdims=True)
    total = np.log(np.exp(masked - top).sum(axis=1, keepdims=True)) + top
    return (masked - total).astype(np.float32)
