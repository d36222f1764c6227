"""What PPO and GRPO are paid: the ensemble's mean, or something more careful, against climbing the model's errors.

Ensemble-conservative optimisation (Coste et al., ICLR 2024, arXiv:2310.02743): the worst member (WCO), or the mean less
a weight times the members' variance (UWO). Bounded shaping (Fu et al., arXiv:2502.18770, PAR): a sigmoid of the centred
reward. Both may be combined: first conservative, then bounded.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsim_gr.agents.base import FineTuningConfig
from recsim_gr.backbones import Backbone
from recsim_gr.configs import require
from recsim_gr.histories import histories_of
from recsim_gr.log import AnyLog
from recsim_gr.prefixes import prefix_logits
from recsim_gr.reward_tables import RewardTable
from recsim_gr.rewards import RewardEnsemble

REWARDS = ("mean", "worst", "uncertainty")


@dataclass(frozen=True)
class ShapedRewardConfig(FineTuningConfig):
    """How the ensemble's predictions become a reward; by default they are one as they are."""

    reward: str = "mean"
    """The ensemble's ``mean``, its ``worst`` member, or the mean less its ``uncertainty``."""
    uncertainty_weight: float = 1.0
    """Of ``uncertainty``, in points of the score per squared point of variance: a title on which the members differ by
    half a point loses a quarter of one."""
    bound: float = 0.0
    """W, the width of the range that a bounded reward has, in points; 0 leaves it unbounded. 4 is the range of the
    score."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.reward in REWARDS, self, "reward", f"one of {', '.join(REWARDS)}")
        for name in ("uncertainty_weight", "bound"):
            require(getattr(self, name) >= 0, self, name, "0 or more")

    @property
    def plain(self) -> bool:
        """Whether nothing is shaped."""
        return self.reward == "mean" and self.bound == 0


def uncertainty_weighted(mean: Tensor, deviation: Tensor, weight: float) -> Tensor:
    """mean − weight·deviation², elementwise: UWO of arXiv:2310.02743, there with the variance over M members and here,
    as tables hold it, with M − 1 degrees of freedom.

    Args:
        mean, deviation: of the members, of one shape.
        weight: in points per squared point.
    """
    if mean.shape != deviation.shape:
        got = f"{tuple(mean.shape)} and {tuple(deviation.shape)}"
        raise ValueError(f"uncertainty_weighted takes mean and deviation of one shape, got {got}")
    return mean - weight * deviation**2


def bounded(rewards: Tensor, centre: Tensor, width: float) -> Tensor:
    """W·σ(4(r − c)/W), elementwise: in (0, W), with slope 1 at its centre.

    With W = 4 it is four times PAR's σ(r − c) (arXiv:2502.18770), with W → ∞ it is r − c and a constant; so λ keeps its
    unit. PAR centres at rewards of answers drawn from π_ref, we at the mean over all of them.

    Args:
        rewards, centre: shapes that broadcast to that of the rewards.
        width: W.
    """
    if torch.broadcast_shapes(rewards.shape, centre.shape) != rewards.shape:
        got = f"{tuple(rewards.shape)} and {tuple(centre.shape)}"
        raise ValueError(f"bounded takes rewards and centres that broadcast to them, got {got}")
    return width * torch.sigmoid(4.0 * (rewards - centre) / width)


class ShapedTable:
    """Shaped rewards on every prefix of a log, read as a `RewardTable`'s mean is.

    Args:
        table: of the ensemble.
        config: how it is shaped.
        centres: (U, L) Σ_a π_ref(a|x)·r(x,a), of a bounded reward.
    """

    def __init__(self, table: RewardTable, config: ShapedRewardConfig, centres: Tensor | None = None) -> None:
        self.table, self.config, self.centres = table, config, centres

    def mean(self, rows: Tensor) -> Tensor:
        """(B, L, I): rewards on the prefixes of the users at ``rows``."""
        rewards = self._conservative(rows)
        if self.centres is None:
            return rewards
        return bounded(rewards, self.centres[rows].unsqueeze(-1), self.config.bound)

    def at(self, rows: NDArray[np.int64], steps: NDArray[np.int64], titles: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n,): the reward of one title a context; arguments as `RewardTable.at`."""
        rewards = self._conservative_at(rows, steps, titles)
        if self.centres is not None:
            centre = self.centres[torch.from_numpy(np.asarray(rows)), torch.from_numpy(np.asarray(steps))]
            rewards = bounded(rewards, centre, self.config.bound)
        return rewards.cpu().numpy().astype(np.float32)

    def _conservative(self, rows: Tensor) -> Tensor:
        if self.config.reward == "worst":
            return self.table.members(rows).amin(dim=0)
        mean = self.table.mean(rows)
        if self.config.reward == "mean":
            return mean
        return uncertainty_weighted(mean, self.table.deviation(rows), self.config.uncertainty_weight)

    def _conservative_at(self, rows: NDArray[np.int64], steps: NDArray[np.int64], titles: NDArray[np.int64]) -> Tensor:
        if self.config.reward == "worst":
            return self.table.members_at(rows, steps, titles).amin(dim=0)
        if self.config.reward == "mean":
            return torch.from_numpy(self.table.at(rows, steps, titles))
        return uncertainty_weighted(*self.table.spread_at(rows, steps, titles), self.config.uncertainty_weight)


AnyTable = RewardTable | ShapedTable
"""What a policy can be paid from."""


class ShapedRewards:
    """A reward ensemble whose predictions are shaped, in the ensemble's place wherever rewards are paid.

    Args:
        rewards: the ensemble.
        config: how they are shaped.
        reference: π_ref, at whose mean reward a bounded one is centred.
    """

    def __init__(self, rewards: RewardEnsemble, config: ShapedRewardConfig, reference: Backbone) -> None:
        self.rewards, self.config, self.reference = rewards, config, reference

    @property
    def n_titles(self) -> int:
        """I."""
        return self.rewards.n_titles

    @torch.no_grad()
    def on(self, log: AnyLog) -> ShapedTable:
        """The shaped rewards on every prefix of a log."""
        bare = ShapedTable(self.rewards.on(log), self.config)
        if self.config.bound == 0:
            return bare
        centres = []
        for batch in histories_of(log).chunks():
            policy = torch.softmax(prefix_logits(self.reference, batch), dim=-1)
            centres.append((policy * bare.mean(batch.rows)).sum(dim=-1))
        return ShapedTable(bare.table, self.config, torch.cat(centres))


def shaped_rewards(
    rewards: RewardEnsemble, config: ShapedRewardConfig, reference: Backbone
) -> RewardEnsemble | ShapedRewards:
    """The ensemble itself where nothing is shaped."""
    return rewards if config.plain else ShapedRewards(rewards, config, reference)
