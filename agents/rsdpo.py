"""Rejection-sampled DPO: pairs of titles drawn from π_ref and labelled by the reward ensemble (arXiv:2402.10038),
then direct preference optimisation (arXiv:2305.18290, eq. 7).

A pair is kept where the ensemble's intervals are disjoint: the winner's lower bound above the loser's upper bound.
(The study's sentence, read literally, says the opposite; ``literal=True`` keeps what it says: pairs whose winner's
upper bound is above the loser's lower bound.)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recsim_gr.agents.base import BackboneAgent, FineTuningConfig, Parts, Problem, Strength, register
from recsim_gr.agents.distributions import drawn_titles
from recsim_gr.backbones import Backbone
from recsim_gr.configs import require
from recsim_gr.errors import TrainingError
from recsim_gr.histories import Batch, HistorySource
from recsim_gr.log import AnyLog
from recsim_gr.prefixes import prefix_logits
from recsim_gr.randomness import derived_seed
from recsim_gr.reward_tables import RewardTable


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


# -- pairs, for whatever learns from them -------------------------------------------------------------------------


@torch.no_grad()
def drawn_pairs(
    policy: Backbone, histories: HistorySource, table: RewardTable, candidates: int, width: float, seed: int
) -> dict[str, Tensor]:
    """For every prefix of a log the best and the worst, by the ensemble's mean, of some titles drawn from a policy.

    Args:
        policy: draws the titles; what is learned is held to it.
        histories: the log.
        table: r̂ on its prefixes.
        candidates: how many titles are drawn, with replacement.
        width: of the intervals that must be disjoint, in deviations of the ensemble.
        seed: of the draws.

    Returns:
        ``titles`` and ``reference``, winner and loser with the policy's logits, (U, T, 2) each; ``kept``, (U, T) bool.

    Raises:
        TrainingError: r̂ is not finite.
    """

    def parts() -> Iterator[dict[str, Tensor]]:
        for i, batch in enumerate(histories.chunks()):
            logits = prefix_logits(policy, batch)
            titles = _draw(logits, candidates, seed + i)  # (B, T, K)
            mean, deviation = table.spread(batch.rows, titles)
            if not torch.isfinite(mean).all():  # no comparison holds of NaN: without this, no pair would, and no word
                raise TrainingError("r̂ is NaN or infinite: the reward ensemble diverged; fit it again, at a lower rate")
            ends = torch.stack([mean.argmax(dim=-1), mean.argmin(dim=-1)], dim=-1)  # (B, T, 2)
            (m_w, m_l), (d_w, d_l) = mean.gather(-1, ends).unbind(-1), deviation.gather(-1, ends).unbind(-1)
            kept = disjoint(m_w, m_l, d_w, d_l, width) & (m_w > m_l) & batch.valid
            pair = titles.gather(-1, ends)
            yield {"titles": pair, "reference": logits.gather(-1, pair), "kept": kept}

    every = list(parts())
    return {name: torch.cat([part[name] for part in every]) for name in every[0]}


class PairAgent(BackboneAgent):
    """What learns from pairs of titles that stand in `Problem.extra`, see `drawn_pairs`. A subclass says how."""

    uses_rewards = True
    needs_ensemble = True

    def pair_loss(self, winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor) -> Tensor:
        """(N,): the loss of each pair, given logits, (N,) each: what they lack to be log π cancels in a pair."""
        raise TypeError(f"{self.name} has no loss; an agent that learns from pairs must say what it minimises")

    def batch_loss(self, policy: Backbone, batch: Batch, problem: Problem) -> Tensor:
        extra = {name: value[batch.rows] for name, value in problem.extra.items()}
        logits = prefix_logits(policy, batch)  # log π up to a constant, which cancels between winner and loser
        chosen = logits.gather(-1, extra["titles"])  # (B, T, 2)
        kept = extra["kept"]
        if not kept.any():
            return logits.sum() * 0.0
        own, ref = chosen[kept], extra["reference"][kept]
        return self.pair_loss(own[:, 0], own[:, 1], ref[:, 0], ref[:, 1]).mean()


def _draw(logits: Tensor, k: int, seed: int) -> Tensor:
    """(B, T, k) titles drawn from softmax(logits) with replacement."""
    rng = torch.Generator().manual_seed(seed % 2**63)
    return drawn_titles(torch.softmax(logits, dim=-1), torch.rand((*logits.shape[:-1], k), generator=rng))


# -- rejection sampling -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairConfig(FineTuningConfig):
    """How pairs are made."""

    candidates: int = 8
    """Titles drawn from π_ref for each context: RS-DPO's order of magnitude (it draws 16 a prompt). The best and the
    worst of them by the ensemble's mean make the pair."""
    interval: float = 1.0
    """Half-width of an interval, in standard deviations of the ensemble. One asks of two titles, whose errors are
    independent and of one size, that they differ by 1.4 deviations of their difference."""
    literal: bool = False
    """The study's sentence read literally."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.candidates >= 2, self, "candidates", "at least 2")
        require(self.interval >= 0, self, "interval", "0 or more")


class RejectionSampled(PairAgent):
    """Learns from pairs that are drawn from π_ref and that the ensemble is sure of."""

    def problem(self, histories: HistorySource, log: AnyLog, parts: Parts) -> Problem:
        problem = super().problem(histories, log, parts)
        assert problem.table is not None
        width = -self.config.interval if self.config.literal else self.config.interval
        seed = derived_seed(parts.seed, f"candidates on {parts.purpose}")
        pairs = drawn_pairs(parts.reference, histories, problem.table, self.config.candidates, width, seed)
        problem.extra.update(pairs)
        return problem


@dataclass(frozen=True)
class RSDPOConfig(PairConfig):
    """How pairs are made, and how strongly they count."""

    beta: float = 0.1
    """β of DPO: the paper's default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, self, "beta", "positive")


@register
class RSDPO(RejectionSampled):
    """DPO on pairs that the reward ensemble is sure of."""

    name = "RSDPO"
    config_type = RSDPOConfig
    strength = Strength("beta")

    def pair_loss(self, winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor) -> Tensor:
        return dpo_loss(winner, loser, winner_ref, loser_ref, self.config.beta)
