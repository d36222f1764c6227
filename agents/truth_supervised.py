"""The same backbone, trained on the true satisfaction of every title: a reference for the backbone.

½·mean_a (Q(x,a) − s(u,a))² over the titles that can be chosen, on every prefix of the log's histories; u is whose
history it is. What is left of the oracle's lead over it is what histories do not tell, or what the backbone cannot
learn in as many steps as every other agent takes: it may be beaten.

Optimum: Q(x,a) = E[s(u,a) | x], by which ranking is best on average.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsim_gr import configs
from recsim_gr.agents.base import FineTuningConfig, InformedAgent, masked_mean, register
from recsim_gr.agents.cql import BatchLoss, QFunctionAgent
from recsim_gr.configs import require
from recsim_gr.errors import ConfigError
from recsim_gr.histories import Batch
from recsim_gr.log import AnyLog, ShardedLog
from recsim_gr.prefixes import prefix_mask


@dataclass(frozen=True)
class TruthSupervisedConfig(FineTuningConfig):
    """How it acts and learns; the truth leaves nothing else to choose."""

    temperature: float = 1.0
    """Of the softmax policy it samples from: `CQL`'s. Its rankings do not depend on it."""
    head_rate: float = 3.0
    """The head's learning rate over the backbone's: `CQL`'s and the reward ensemble's, since it starts from nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, self, "temperature", "positive")
        require(self.head_rate > 0, self, "head_rate", "positive")


def satisfaction_loss(q: Tensor, satisfaction: Tensor, available: Tensor) -> Tensor:
    """½·mean_a (Q(x,a) − s(u,a))² over the available titles, per example.

    Args:
        q: (B, T, I), whatever where a title is not available.
        satisfaction: (B, I), of each user.
        available: (B, T, I) bool, at least one title of each example.
    """
    if q.ndim != 3 or satisfaction.shape != (q.shape[0], q.shape[2]) or available.shape != q.shape:
        shapes = f"{tuple(q.shape)}, {tuple(satisfaction.shape)}, {tuple(available.shape)}"
        raise ValueError(f"satisfaction_loss takes (B, T, I), (B, I), (B, T, I), got {shapes}")
    error = (q - satisfaction.unsqueeze(1)).masked_fill(~available, 0.0)
    return 0.5 * (error**2).sum(dim=-1) / available.sum(dim=-1)


@register
class TruthSupervised(InformedAgent, QFunctionAgent):
    """The same backbone trained on the true satisfaction of every title: a reference for the backbone."""

    name = "TruthSupervised"
    config_type = TruthSupervisedConfig

    def losses(self, train_log: AnyLog, held_out_log: AnyLog) -> tuple[BatchLoss, BatchLoss]:
        """Raises:
        ConfigError: it has met no world, or another one than the log comes from.
        """
        world = self.required_world()
        train_users, held_out_users = (users_of(log, world) for log in (train_log, held_out_log))
        return (
            lambda batch: self._batch_loss(batch, train_users),
            lambda batch: self._batch_loss(batch, held_out_users),
        )

    def _batch_loss(self, batch: Batch, users: NDArray[np.int64]) -> Tensor:
        # worth is satisfaction, but for worlds whose users may abandon a title; worked out a batch at a time, since a
        # table of all users and titles would not fit in memory where the log does
        truth = torch.from_numpy(self.world.worth(users[batch.rows.cpu().numpy()])).to(batch.titles.device)
        available = prefix_mask(batch, self.q_function.backbone.n_titles) == 0
        return masked_mean(satisfaction_loss(self._q(batch), truth, available), batch)


def users_of(log: AnyLog, world: Any) -> NDArray[np.int64]:
    """(U,) the users of a log, as its world names them.

    Raises:
        ConfigError: the log says that it comes from another world.
    """
    made, own = (log.provenance or {}).get("config") or {}, configs.to_dict(world.config)
    if log.n_titles != world.n_titles or any(own.get(name, value) != value for name, value in made.items()):
        raise ConfigError("the log comes from another world than the one that TruthSupervised met; make it of this one")
    parts = log if isinstance(log, ShardedLog) else [log]
    return np.concatenate([part.user[part.step == 0] for part in parts])
