"""HSTU: hierarchical sequential transduction units (Zhai et al., ICML 2024, arXiv:2402.17152, §3).

A layer, on X of shape (B, T, d)::

    U, V, Q, K = split(SiLU(LN(X) W))
    A = SiLU(Q Kᵀ + rab) / N, causal        pointwise: no softmax, no 1/sqrt(d); N the configured maximum length
    Y = X + W_o Dropout(LN(A V) ⊙ U)

The output is L2-normalised and compared with the L2-normalised title embeddings at temperature .05, as in the paper's
public research code.

Departures from that code, each because a context here is more than a list of titles: a token carries the score that
the title got; a learned token opens every sequence, so that the empty history is a context too; positions beyond the
maximum length share the last position's parameters, so that a session may go on past the longest history of the log.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsim_gr.backbones.base import Backbone, BackboneConfig, Places, register_backbone
from recsim_gr.backbones.titles import TitleMetadata
from recsim_gr.configs import require

TIME_BUCKETS = 16
"""Time gaps in minutes, in powers of two: the last bucket starts at 2^15 minutes, three weeks."""


@dataclass(frozen=True)
class HSTUConfig(BackboneConfig):
    """The size and shape of HSTU."""

    n_layers: int = 2
    """Two, as in the paper's smaller public configurations."""
    n_heads: int = 2
    """Heads of d/2: the attention is pointwise, so heads cost nothing and give two patterns of relevance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_layers", "n_heads"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        require(self.dimensions % self.n_heads == 0, self, "n_heads", f"a divisor of {self.dimensions}")


class HSTULayer(nn.Module):
    """One layer of the equations above."""

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        d = config.dimensions
        self.heads, self.max_length, self.dropout = config.n_heads, config.max_length, config.dropout
        self.uvqk = nn.Parameter(torch.empty(d, 4 * d).normal_(std=0.02 * math.sqrt(512 / d)))
        self.out = nn.Linear(d, d)
        nn.init.xavier_uniform_(self.out.weight)
        self.by_distance = nn.Parameter(torch.empty(config.max_length).normal_(std=0.02))
        self.by_gap = nn.Parameter(torch.empty(TIME_BUCKETS).normal_(std=0.02))
        self.positions = config.positions

    def forward(self, x: Tensor, gap_bucket: Tensor, distance: Tensor, allowed: Tensor) -> Tensor:
        """x (B, T, d); gap_bucket (B, T, T) and distance (T, T) or (B, T, T) integer; allowed, as distance, of 1, 0."""
        b, t, d = x.shape
        mixed = F.silu(F.layer_norm(x, (d,)) @ self.uvqk)
        u, v, q, k = mixed.split(d, dim=-1)
        q, k, v = (part.view(b, t, self.heads, -1).transpose(1, 2) for part in (q, k, v))  # (B, H, T, d/H)
        bias = self.by_gap[gap_bucket]
        if self.positions:
            bias = bias + self.by_distance[distance]
        allowed = (allowed / self.max_length).expand_as(bias)
        attention = F.silu(q @ k.transpose(-1, -2) + bias.unsqueeze(1)) * allowed.unsqueeze(1)
        values = (attention @ v).transpose(1, 2).reshape(b, t, d)
        gated = F.dropout(F.layer_norm(values, (d,)) * u, self.dropout, self.training)
        return x + self.out(gated)


@register_backbone
class HSTU(Backbone):
    """Pointwise attention with relative positions and time gaps, gated; see the module's equations."""

    name = "hstu"
    config_type = HSTUConfig
    config: HSTUConfig

    def __init__(self, config: Any, n_titles: int, metadata: TitleMetadata | None = None) -> None:
        super().__init__(config, n_titles, metadata)
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.n_layers))

    def mix(self, x: Tensor, places: Places) -> Tensor:
        steps = places.steps
        distance = (steps.unsqueeze(-1) - steps.unsqueeze(-2)).clamp(0, self.config.max_length - 1)
        allowed = steps.unsqueeze(-1) >= steps.unsqueeze(-2) if places.allowed is None else places.allowed
        gaps = _gap_buckets(places.hours)
        for layer in self.layers:
            x = layer(x, gaps, distance, allowed.to(x.dtype))
        return x


def _gap_buckets(hours: Tensor) -> Tensor:
    """(B, T, T) int64: the bucket of the time between two tokens."""
    minutes = 60.0 * (hours[:, :, None] - hours[:, None, :]).abs()
    return torch.log2(minutes.clamp(min=1.0)).long().clamp(max=TIME_BUCKETS - 1)
