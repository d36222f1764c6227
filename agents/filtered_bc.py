"""Filtered behaviour cloning: imitation of the logged events with the highest observed scores, all others left out.

−1[r ≥ q]·log π(a|x), q the score that a fraction of a user's events (or of the log's) reach: the %BC baseline of
Decision Transformer (arXiv:2106.01345), which keeps the best share of trajectories; a trajectory is one event here.
Kin: the binary weight of CRR (arXiv:2006.15134), whose threshold is a value function.

Optimum in tabular contexts: π = μ·P(r ≥ q|x,a)/Z. It asks how often a title reaches q, and never by how much.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recsim_gr.agents.base import BackboneAgent, FineTuningConfig, Parts, Problem, Strength, register
from recsim_gr.agents.reward_weighted_bc import weighted_bc_loss
from recsim_gr.backbones import Backbone
from recsim_gr.configs import require
from recsim_gr.histories import Batch, HistorySource
from recsim_gr.log import AnyLog
from recsim_gr.prefixes import prefix_log_probs

BY = ("user", "score")


@dataclass(frozen=True)
class FilteredBCConfig(FineTuningConfig):
    """What is worth imitating."""

    fraction: float = 0.2
    """Of the events that are kept, at least: between the 10 % and the 25 % that Decision Transformer tries first, so
    that five doublings from .05 to .8 cover its range. Scores that are cut at 5 are ties, and ties are kept together:
    of watch time with strong noise (ν = .6) a quarter scores 5, so that .2, .1 and .05 keep nearly the same events."""
    by: str = "user"
    """Top of what: of each ``user``'s own events, since some users score everything higher than others do, and no
    ranking can use that; or of all events (``score``), the letter of the paper, which keeps most of few users and
    nothing of many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.fraction <= 1, self, "fraction", "in (0, 1]")
        require(self.by in BY, self, "by", f"one of {', '.join(BY)}")


def top_events(scores: Tensor, valid: Tensor, fraction: float) -> Tensor:
    """(U, T) bool: the top fraction of each row, rounded up to whole events. Ties with the last of them are kept too,
    so that nothing depends on the order of events: equal scores are all kept.

    Args:
        scores: (U, T) observed scores.
        valid: (U, T) bool, false on padding, which is never kept.
        fraction: in (0, 1].
    """
    if scores.ndim != 2 or scores.shape != valid.shape or valid.dtype != torch.bool:
        shapes = f"{tuple(scores.shape)} and {valid.dtype} {tuple(valid.shape)}"
        raise ValueError(f"top_events takes (U, T) scores and a (U, T) mask of bool, got {shapes}")
    falling = scores.masked_fill(~valid, -torch.inf).sort(dim=1, descending=True).values
    # 0.28 · 25 is 7.000000000000001, and means 7
    lengths = valid.sum(dim=1).tolist()
    last = torch.tensor([max(math.ceil(fraction * n - 1e-9) - 1, 0) for n in lengths], device=scores.device)
    return (scores >= falling.gather(1, last[:, None])) & valid


def filtered_bc_loss(log_probs: Tensor, kept: Tensor) -> Tensor:
    """−1[kept]·log π(a|x), per example.

    Args:
        log_probs: (B, T) log π of the logged titles.
        kept: (B, T) bool.
    """
    if kept.dtype != torch.bool:
        raise ValueError(f"filtered_bc_loss takes a mask of bool, got {kept.dtype}")
    return weighted_bc_loss(log_probs, kept.to(log_probs.dtype))


@register
class FilteredBC(BackboneAgent):
    """Imitation of the events with the highest scores."""

    name = "FilteredBC"
    config_type = FilteredBCConfig
    uses_rewards = True
    strength = Strength("fraction", values=(0.8, 0.4, 0.2, 0.1, 0.05))  # the default's doublings, none above 1

    def problem(self, histories: HistorySource, log: AnyLog, parts: Parts) -> Problem:
        """Every log has a threshold of its own, the validation log too."""
        problem = super().problem(histories, log, parts)
        chunks = [(batch.scores, batch.valid) for batch in histories.chunks()]
        scores, valid = (torch.cat(part) for part in zip(*chunks, strict=True))
        if self.config.by == "user":
            problem.extra["kept"] = top_events(scores, valid, self.config.fraction)
        else:
            kept = torch.zeros_like(valid)
            every = scores[valid][None]
            kept[valid] = top_events(every, torch.ones_like(every, dtype=torch.bool), self.config.fraction)[0]
            problem.extra["kept"] = kept
        return problem

    def batch_loss(self, policy: Backbone, batch: Batch, problem: Problem) -> Tensor:
        """The mean over the kept events of the batch; one without any teaches nothing."""
        kept = problem.extra["kept"][batch.rows]
        losses = filtered_bc_loss(prefix_log_probs(policy, batch), kept)
        return losses.sum() / kept.sum().clamp(min=1)
