"""Rejection-sampled IPO: the pairs of `RSDPO` (arXiv:2402.10038) with identity preference optimisation.

(h − 1/(2τ))² with h the difference of log(π/π_ref) between winner and loser: arXiv:2310.12036, its loss on
sampled pairs. DPO's margin grows without end where a label is certain, and these labels are: the ensemble says which of
two titles is better. IPO's stops at 1/(2τ).

Optimum in tabular contexts, the opponent uniform over all titles, itself included (p = ½):
π = π_ref·exp(E_a'[p(a ≻ a')]/τ)/Z.
"""

from dataclasses import dataclass

from torch import Tensor

from recsim_gr.agents.base import Strength, register
from recsim_gr.agents.rsdpo import PairConfig, RejectionSampled
from recsim_gr.configs import require


@dataclass(frozen=True)
class RSIPOConfig(PairConfig):
    """How pairs are made, and how far apart they are to be."""

    tau: float = 0.1
    """τ: the β of `RSDPO`, as public code has one default for both; winners are to gain 5 nats on losers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tau > 0, self, "tau", "positive")


def ipo_loss(winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor, tau: float) -> Tensor:
    """([(log π − log π_ref)(winner) − (log π − log π_ref)(loser)] − 1/(2τ))², per pair.

    Args:
        winner, loser: (N,) log π.
        winner_ref, loser_ref: (N,) log π_ref.
        tau: τ.
    """
    if winner.ndim != 1 or not (winner.shape == loser.shape == winner_ref.shape == loser_ref.shape):
        shapes = ", ".join(str(tuple(x.shape)) for x in (winner, loser, winner_ref, loser_ref))
        raise ValueError(f"ipo_loss takes four (N,) tensors of log-probabilities, got {shapes}")
    return (((winner - winner_ref) - (loser - loser_ref)) - 1.0 / (2.0 * tau)) ** 2


@register
class RSIPO(RejectionSampled):
    """IPO on pairs that the reward ensemble is sure of."""

    name = "RSIPO"
    config_type = RSIPOConfig
    strength = Strength("tau")

    def pair_loss(self, winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor) -> Tensor:
        return ipo_loss(winner, loser, winner_ref, loser_ref, self.config.tau)
