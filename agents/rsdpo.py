"""Rejection-sampled DPO: pairs of titles drawn from π_ref and labelled by the reward ensemble (arXiv:2402.10038),
then direct preference optimisation (arXiv:2305.18290, eq. 7).

A pair is kept where the ensemble's intervals are disjoint: the winner's lower bound above the loser's upper bound.
(The study's sentence, read literally, says the opposite; ``literal=True`` keeps what it says: pairs whose winner's
upper bound is above the loser's lower bound.)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recsim_gr.agents.base import BackboneAgent, FineTuningConfig, Parts, Problem, Strength, register
from recsim_gr.backbones import Backbone
from recsim_gr.configs import require
from recsim_gr.histories import Batch, HistorySource
from recsim_gr.log import AnyLog
from recsim_gr.prefixes import prefix_logits
from recsim_gr.randomness import derived_seed


@dataclass(frozen=True)
class RSDPOConfig(FineTuningConfig):
    """How pairs are made, and how strongly they count."""

    beta: float = 0.1
    """β of DPO: the paper's default."""
    candidates: int = 8
    """Titles drawn from π_ref for each context: RS-DPO's order of magnitude (it draws 16 a prompt). The best and the
    worst of them by the ensemble's mean make the pair."""
    interval: float = 1.0
    """Half-width of an interval, in standard deviations of the ensemble."""
    literal: bool = False
    """The study's sentence read literally."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, self, "beta", "positive")
        require(self.candidates >= 2, self, "candidates", "at least 2")
        require(self.interval >= 0, self, "interval", "0 or more")


def dpo_loss(winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor, beta: float) -> Tensor:
    """−log σ(β[(log π − log π_ref)(winner) − (log π − log π_ref)(loser)]), per pair.

    Args:
        winner, loser: (N,) log π.
        winner_ref, loser_ref: (N,) log π_ref.
        beta: β.
    """
    if winner.ndim != 1 or not (winner.shape == loser.shape == winner_ref.shape == loser_ref.shape):
        raise ValueError("dpo_loss takes four (N,) tensors of log-probabilities")
    return -F.logsigmoid(beta * ((winner - winner_ref) - (loser - loser_ref)))


def disjoint(winner: Tensor, loser: Tensor, winner_deviation: Tensor, loser_deviation: Tensor, width: float) -> Tensor:
    """Whether the winner's lower bound is above the loser's upper bound, elementwise."""
    return winner - width * winner_deviation > loser + width * loser_deviation


@register
class RSDPO(BackboneAgent):
    """DPO on pairs that the reward ensemble is sure of."""

    name = "RSDPO"
    config_type = RSDPOConfig
    uses_rewards = True
    needs_ensemble = True
    strength = Strength("beta")

    def problem(self, histories: HistorySource, log: AnyLog, parts: Parts) -> Problem:
        problem = super().problem(histories, log, parts)
        seed = derived_seed(parts.seed, f"candidates on {parts.purpose}")
        pairs = [self._pairs(batch, problem, seed + i) for i, batch in enumerate(histories.chunks())]
        for name in pairs[0]:
            problem.extra[name] = torch.cat([part[name] for part in pairs])
        return problem

    def batch_loss(self, policy: Backbone, batch: Batch, problem: Problem) -> Tensor:
        extra = {name: value[batch.rows] for name, value in problem.extra.items()}
        logits = prefix_logits(policy, batch)  # log π up to a constant, which cancels between winner and loser
        chosen = logits.gather(-1, extra["titles"])  # (B, T, 2)
        kept = extra["kept"]
        if not kept.any():
            return logits.sum() * 0.0
        own, ref = chosen[kept], extra["reference"][kept]
        return dpo_loss(own[:, 0], own[:, 1], ref[:, 0], ref[:, 1], self.config.beta).mean()

    @torch.no_grad()
    def _pairs(self, batch: Batch, problem: Problem, seed: int) -> dict[str, Tensor]:
        """Winner and loser of every prefix: titles and reference logits (B, T, 2), and which are kept (B, T)."""
        assert problem.table is not None
        logits = prefix_logits(problem.reference, batch)
        titles = _draw(logits, self.config.candidates, seed)  # (B, T, K)
        mean, deviation = problem.table.spread(batch.rows, titles)
        ends = torch.stack([mean.argmax(dim=-1), mean.argmin(dim=-1)], dim=-1)  # (B, T, 2)
        (m_w, m_l), (d_w, d_l) = mean.gather(-1, ends).unbind(-1), deviation.gather(-1, ends).unbind(-1)
        width = -self.config.interval if self.config.literal else self.config.interval
        kept = disjoint(m_w, m_l, d_w, d_l, width) & (m_w > m_l) & batch.valid
        pair = titles.gather(-1, ends)
        return {"titles": pair, "reference": logits.gather(-1, pair), "kept": kept}


def _draw(logits: Tensor, k: int, seed: int) -> Tensor:
    """(B, T, k) titles drawn from softmax(logits) with replacement, by inverse CDF."""
    rng = torch.Generator().manual_seed(seed % 2**63)
    cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1)
    u = torch.rand((*logits.shape[:-1], k), generator=rng) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, u, right=True).clamp(max=logits.shape[-1] - 1)
