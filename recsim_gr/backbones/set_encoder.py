"""A set encoder: what was watched and how it was liked, in no order at all.

Deep Sets (Zaheer et al., NeurIPS 2017, arXiv:1703.06114), with the pooling by multihead attention of the Set
Transformer (Lee et al., ICML 2019, arXiv:1810.00825, §3.2). Of the tokens x_j that place t may read, for each head h::

    w_jh = exp(c · tanh(q_h · K_h φ(x_j) / c))          q_h: a learned query
    p_th = Σ_j w_jh V_h φ(x_j) / Σ_j w_jh
    state_t = ρ(W_o [p_t1, …, p_tH] + b · log(number of tokens read))

The pooled sums of all prefixes come of one product, so one pass gives every state. Logits are bounded by c, so that
these sums need no running maximum and keep their digits in float32, whatever comes behind a prefix. The number of
tokens stands beside the mean, which alone could not tell one event from ten equal ones.

Its states do not depend on the order of a prefix (up to float32 rounding of the sums), nor on times. The world chooses
titles given the *set* seen before, but what a history tells of a user is more than its set (early picks reveal stronger
pulls): a set encoder is not sufficient, and what it lacks is a question to be measured.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsim_gr.backbones.base import Backbone, BackboneConfig, Places, register_backbone
from recsim_gr.backbones.titles import TitleMetadata
from recsim_gr.configs import require

LOGIT_BOUND = 5.0
"""c: weights within a prefix differ by e^10 at most, more than any of them needs to be ignored."""


@dataclass(frozen=True)
class SetEncoderConfig(BackboneConfig):
    """The size and shape of the set encoder."""

    positions: bool = False
    """None: it would not be a set."""
    n_layers: int = 2
    """Residual layers in φ, and as many in ρ: as deep as the other backbones."""
    n_heads: int = 4
    """Queries: the Set Transformer's number of heads. A query sums up one side of a taste."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.positions, self, "positions", "False: a set has no order")
        for name in ("n_layers", "n_heads"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        require(self.dimensions % self.n_heads == 0, self, "n_heads", f"a divisor of {self.dimensions}")


class _Residual(nn.Module):
    """x + W₂ Dropout(SiLU(W₁ LN(x)))."""

    def __init__(self, config: SetEncoderConfig) -> None:
        super().__init__()
        d = config.dimensions
        self.norm, self.inner, self.outer = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.rate = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        inner = F.dropout(F.silu(self.inner(self.norm(x))), self.rate, self.training)
        return x + self.outer(inner)


@register_backbone
class SetEncoder(Backbone):
    """Deep Sets with attention pooling: blind to order and time; see the module's equations."""

    name = "set"
    config_type = SetEncoderConfig
    config: SetEncoderConfig

    def __init__(self, config: Any, n_titles: int, metadata: TitleMetadata | None = None) -> None:
        super().__init__(config, n_titles, metadata)
        d = config.dimensions
        self.before = nn.Sequential(*(_Residual(config) for _ in range(config.n_layers)))
        self.after = nn.Sequential(*(_Residual(config) for _ in range(config.n_layers)))
        self.norm, self.queries = nn.LayerNorm(d), nn.Linear(d, config.n_heads, bias=False)
        self.values, self.out = nn.Linear(d, d), nn.Linear(d, d)
        self.by_number = nn.Parameter(torch.zeros(d))

    def mix(self, x: Tensor, places: Places) -> Tensor:
        heads = self.config.n_heads
        x = self.norm(self.before(x))
        weights = torch.exp(LOGIT_BOUND * torch.tanh(self.queries(x).float() / LOGIT_BOUND))  # (B, T, H)
        weighted = (self.values(x).unflatten(-1, (heads, -1)) * weights.unsqueeze(-1)).flatten(2)
        reads = places.may_read().to(weighted.dtype)
        pooled = (reads @ weighted).unflatten(-1, (heads, -1)) / (reads @ weights).unsqueeze(-1)
        number = reads.sum(dim=-1, keepdim=True).log()
        y: Tensor = self.after(self.out(pooled.flatten(2)) + number * self.by_number)
        return y
