"""SASRec: self-attentive sequential recommendation (Kang & McAuley, ICDM 2018, arXiv:1808.09781).

A block, on X of shape (B, T, d)::

    X ← X + Dropout(softmax(Q Kᵀ / sqrt(d/H), over what may be read) V W_o)     Q, K, V: projections of LN(X)
    X ← X + Dropout(W₂ Dropout(ReLU(W₁ LN(X))))                                 point-wise, d to d as in the paper

and a layer norm behind the last block; scores are plain products with the title embeddings, which are tied.

Departures: both sides of the attention read the normalised tokens (the authors' code normalises the queries alone, and
adds the result to those); heads are mixed by W_o, which their code leaves out; the loss is the full softmax where the
paper takes one negative a positive, which is what costs its published figures most (Klenitskiy & Vasilev, RecSys 2023,
arXiv:2309.07602). A token carries the score that its title got unless ``scores=False``; times are not read.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsim_gr.backbones.base import Backbone, BackboneConfig, Places, register_backbone, rows_at
from recsim_gr.backbones.titles import TitleMetadata
from recsim_gr.configs import require


@dataclass(frozen=True)
class SASRecConfig(BackboneConfig):
    """The size and shape of SASRec."""

    similarity: str = "dot"
    """The paper's plain product."""
    n_layers: int = 2
    """The paper's number of blocks."""
    n_heads: int = 1
    """The paper's: more heads did not help at these widths."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_layers", "n_heads"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        require(self.dimensions % self.n_heads == 0, self, "n_heads", f"a divisor of {self.dimensions}")


class SASRecBlock(nn.Module):
    """One block of the equations above."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        d = config.dimensions
        self.heads, self.dropout = config.n_heads, config.dropout
        self.norm, self.feed_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.inner, self.outer = nn.Linear(d, d), nn.Linear(d, d)
        for linear in (self.qkv, self.out, self.inner, self.outer):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """x (B, T, d) to the same; ``allowed`` (T, T) or (B, 1, T, T) bool."""
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return self._attended(x, q, k, v, allowed)

    def last(self, x: Tensor, allowed: Tensor, last: Tensor) -> Tensor:
        """`forward` of the rows that (B,) ``last`` names alone, (B, 1, d); ``allowed`` (B, 1, 1, T) are theirs."""
        d, normed = x.shape[-1], self.norm(x)
        q = F.linear(rows_at(normed, last), self.qkv.weight[:d], self.qkv.bias[:d])
        k, v = F.linear(normed, self.qkv.weight[d:], self.qkv.bias[d:]).chunk(2, dim=-1)
        return self._attended(rows_at(x, last), q, k, v, allowed)

    def _attended(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        rate = self.dropout if self.training else 0.0
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))  # (B, H, T, d/H)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=rate)
        x = x + F.dropout(self.out(attended.transpose(1, 2).flatten(2)), rate, self.training)
        inner = F.dropout(F.relu(self.inner(self.feed_norm(x))), rate, self.training)
        return x + F.dropout(self.outer(inner), rate, self.training)


@register_backbone
class SASRec(Backbone):
    """Softmax attention with learned positions; see the module's equations."""

    name = "sasrec"
    config_type = SASRecConfig
    config: SASRecConfig

    def __init__(self, config: Any, n_titles: int, metadata: TitleMetadata | None = None) -> None:
        super().__init__(config, n_titles, metadata)
        self.blocks = nn.ModuleList(SASRecBlock(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.dimensions)

    def mix(self, x: Tensor, places: Places) -> Tensor:
        allowed = places.may_read()
        if allowed.dim() == 3:
            allowed = allowed.unsqueeze(1)
        for block in self.blocks:
            x = block(x, allowed)
        normed: Tensor = self.norm(x)
        return normed

    def mix_last(self, x: Tensor, places: Places, last: Tensor) -> Tensor:
        allowed = places.may_read()
        allowed = allowed if allowed.dim() == 3 else allowed.expand(len(x), -1, -1)
        for block in self.blocks[:-1]:
            x = block(x, allowed.unsqueeze(1))
        own = allowed[torch.arange(len(x), device=x.device), last][:, None, None]
        final = cast("SASRecBlock", self.blocks[-1])
        normed: Tensor = self.norm(final.last(x, own, last).squeeze(1))
        return normed
