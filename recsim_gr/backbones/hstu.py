"""HSTU: hierarchical sequential transduction units (Zhai et al., ICML 2024, arXiv:2402.17152, §3).

A layer, on X of shape (B, T, d)::

    U, V, Q, K = split(SiLU(LN(X) W))
    A = SiLU(Q Kᵀ + rab) / N, causal        pointwise: no softmax, no 1/sqrt(d); N the configured maximum length
    Y = X + W_o Dropout(LN(A V) ⊙ U)        rab: a bias by distance and a bias by time, the same in all heads

The output is L2-normalised and compared with the L2-normalised title embeddings at temperature .05, as in the paper's
public research code (facebookresearch/generative-recommenders, `generative_recommenders/research`). `HSTUConfig` has a
switch for each part.

Departures from that code, each because a context here is more than a list of titles, or knows less than one there:

- a token carries the score that the title got (there, a variant appends a rating's embedding to the title's);
- a learned token opens every sequence, so that the empty history is a context too;
- positions beyond the maximum length share the last position's parameters, so that a session may go on past the longest
  history of the log;
- one table of N biases by distance where there are 2N − 1: under causality the other N − 1 are never read;
- the gap of a row is measured from its own event. There it is measured from the *next* one, ts(next) − ts(column), and
  behind the history stands the target's time, in evaluation too: the model knows when the next event will happen, and
  figures published for that code have this advantage. A recommender has not, and the state of a prefix would depend on
  what comes after it; so there is no switch for it here;
- softmax runs over what a token may read. There it runs over all columns, later ones too, and is masked afterwards.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsim_gr.backbones.attention import CLOSED, NORMALISERS, AttentionKind, Block, attention, attention_of_one
from recsim_gr.backbones.base import Backbone, BackboneConfig, Places, register_backbone, rows_at
from recsim_gr.backbones.elementwise import dropout, layer_norm
from recsim_gr.backbones.titles import TitleMetadata
from recsim_gr.configs import require

GATES = ("product", "concatenated")
"""How U meets the attended values."""

ROWS = 32
"""Rows of a block of causal attention: fewer make products too small, more work out what is closed."""

CLOSED_ENTRIES = 64
"""Of a table of biases: half of all pairs are closed, and gradients added to one entry would wait for each other."""


class TimeBuckets(NamedTuple):
    """A dialect of time gaps.

    Attributes:
        n: how many buckets.
        of: float32 hours, not negative, to int32 buckets, which may run past the last; it may write into its argument.
    """

    n: int
    of: Callable[[Tensor], Tensor]


def _powers_of_two_minutes(hours: Tensor) -> Tensor:
    minutes = hours.mul_(60.0).clamp_(min=1.0)
    # floor(log2) is a float's exponent: a logarithm of every pair takes twenty times as long
    return (minutes.view(torch.int32) >> 23).sub_(127)


def _research_code(hours: Tensor) -> Tensor:
    return hours.mul_(3600.0).clamp_(min=1.0).log_().div_(0.301).to(torch.int32)


TIME_BUCKETS = {
    "minutes": TimeBuckets(16, _powers_of_two_minutes),
    "research": TimeBuckets(129, _research_code),
}
"""Dialects of time gaps. ``minutes``: powers of two minutes, the last from 2^15 on, three weeks. ``research``: the
research code's floor(ln(max(1, |seconds|)) / 0.301), 0 to 128, each bucket 1.35 times as long as the one before."""


@dataclass(frozen=True)
class HSTUConfig(BackboneConfig):
    """The size and shape of HSTU; a default is the paper's, or says why it is not."""

    n_layers: int = 2
    """Two, as in the research code's configuration for MovieLens-1M; its large one has eight."""
    n_heads: int = 2
    """Heads of d/2: the attention is pointwise, so heads cost little and give two patterns of relevance. The research
    code has one in that configuration and two in the large one."""
    normaliser: str = "length"
    """What makes weights of scores, one of `NORMALISERS`: SiLU over N, or softmax (an ablation of the paper)."""
    scale_scores: bool = False
    """Whether products are divided by sqrt(d/H): the paper and its research code do not, production forks do."""
    distance_bias: bool = True
    """The relative bias by position; ``positions=False`` takes it away too."""
    time_gaps: bool = True
    """The relative bias by time; without it and positions, a layer is blind to order beyond causality."""
    time_buckets: str = "minutes"
    """The dialect of time, one of `TIME_BUCKETS`. Not the research code's: gaps up to three weeks reach only 48 of its
    129 buckets, and most of those hold seconds, which are too few in a log of thousands of users to be learned."""
    gate: str = "product"
    """How U meets the attended values: ``product``, or ``concatenated`` (U, LN(A V) and their product: the research
    code's ``concat_ua``, off there)."""
    activate: bool = True
    """SiLU on U, V, Q and K; the research code's ``linear_activation`` can be ``none``."""
    residual: bool = True
    """X + …; without it a layer is only what it attends to."""
    scale_input: bool = True
    """Embeddings times sqrt(d) before the first layer, so that they outweigh the positions at the start."""
    norm_epsilon: float = 1e-6
    """Added to the variance in both layer norms: attended values are divided by N, and a larger one would mute them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_layers", "n_heads"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        require(self.dimensions % self.n_heads == 0, self, "n_heads", f"a divisor of {self.dimensions}")
        require(self.normaliser in NORMALISERS, self, "normaliser", f"one of {', '.join(NORMALISERS)}")
        require(self.time_buckets in TIME_BUCKETS, self, "time_buckets", f"one of {', '.join(TIME_BUCKETS)}")
        require(self.gate in GATES, self, "gate", f"one of {', '.join(GATES)}")
        require(self.norm_epsilon > 0, self, "norm_epsilon", "positive")

    @property
    def n_distances(self) -> int:
        """Biases by distance that a layer has; one that is always 0 where it has none."""
        return self.max_length if self.positions and self.distance_bias else 1

    @property
    def n_gaps(self) -> int:
        """Biases by time gap that a layer has; one that is always 0 where it has none."""
        return TIME_BUCKETS[self.time_buckets].n if self.time_gaps else 1

    @property
    def attention(self) -> AttentionKind:
        """What its layers do with their scores."""
        scale = math.sqrt(self.n_heads / self.dimensions) if self.scale_scores else 1.0
        return AttentionKind(self.n_heads, self.activate, self.normaliser, self.max_length, scale)


class HSTULayer(nn.Module):
    """One layer of the equations above."""

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        self.config, self.kind = config, config.attention
        d = config.dimensions
        self.uvqk = nn.Parameter(torch.empty(d, 4 * d).normal_(std=0.02 * math.sqrt(512 / d)))
        self.out = nn.Linear(d if config.gate == "product" else 3 * d, d)
        nn.init.xavier_uniform_(self.out.weight)
        if config.positions and config.distance_bias:
            self.by_distance = nn.Parameter(torch.empty(config.n_distances).normal_(std=0.02))
        if config.time_gaps:
            self.by_gap = nn.Parameter(torch.empty(config.n_gaps).normal_(std=0.02))

    def forward(self, x: Tensor, blocks: list[Block]) -> Tensor:
        """x (B, T, d) to the same; ``blocks``: `pair_blocks` of its places."""
        projected = layer_norm(x, self.config.norm_epsilon) @ self.uvqk
        values, u = attention(projected, self.biases(), blocks, self.kind)
        return self._gated(x, values, u)

    def last(self, x: Tensor, entries: Tensor, last: Tensor) -> Tensor:
        """`forward` of the rows that (B,) ``last`` names alone, (B, 1, d); ``entries``: `last_entries` of its places.
        U and Q are worked out for them only."""
        to_u, to_v, to_q, to_k = self.uvqk.chunk(4, dim=1)
        normed = layer_norm(x, self.config.norm_epsilon)
        asking = rows_at(normed, last) @ torch.cat([to_u, to_q], dim=1)
        asked = normed @ torch.cat([to_v, to_k], dim=1)
        values, u = attention_of_one(asking, asked, self.biases(), entries, self.kind)
        return self._gated(rows_at(x, last), values, u)

    def _gated(self, x: Tensor, values: Tensor, u: Tensor) -> Tensor:
        config = self.config
        normed = layer_norm(values, config.norm_epsilon)
        gated = normed * u if config.gate == "product" else torch.cat([u, normed, u * normed], dim=-1)
        y = self.out(dropout(gated, config.dropout, self.training))
        return x + y if config.residual else y

    def biases(self) -> Tensor:
        """(distances · gaps + `CLOSED_ENTRIES`,): rab of every distance and time gap, then the closed ones."""
        rab = self.uvqk.new_zeros(1, 1)
        if self.config.positions and self.config.distance_bias:
            rab = rab + self.by_distance[:, None]
        if self.config.time_gaps:
            rab = rab + self.by_gap
        return F.pad(rab.flatten(), (0, CLOSED_ENTRIES), value=CLOSED)


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
        blocks = pair_blocks(places, self.config)  # every layer looks the same pairs up, each in its own table
        for layer in self.layers:
            x = layer(x, blocks)
        return x

    def mix_last(self, x: Tensor, places: Places, last: Tensor) -> Tensor:
        blocks = pair_blocks(places, self.config) if len(self.layers) > 1 else []
        for layer in self.layers[:-1]:
            x = layer(x, blocks)
        final = cast("HSTULayer", self.layers[-1])
        return final.last(x, last_entries(places, self.config, last), last).squeeze(1)

    def _embedded(self, titles: Tensor) -> Tensor:
        embedded = super()._embedded(titles)
        return embedded if self.config.scale_input else embedded / math.sqrt(self.config.dimensions)


def pair_blocks(places: Places, config: HSTUConfig) -> list[Block]:
    """Which entry of `HSTULayer.biases` stands for each pair of tokens: blocks of rows where rows read causally, which
    leave out the columns behind them; else one block."""
    t = places.steps.shape[-1]
    if places.allowed is not None:
        return [Block(0, t, _entries(places, config, _rows(places, 0, t), t))]
    stops = [*range(ROWS, t - ROWS // 2 + 1, ROWS), t]  # what is left over is half a block at least
    return [
        Block(start, stop, _entries(places, config, _rows(places, start, stop), stop))
        for start, stop in zip([0, *stops], stops, strict=False)
    ]


def last_entries(places: Places, config: HSTUConfig, last: Tensor) -> Tensor:
    """(B, T) int64: as `pair_blocks`, of the one row of each sequence that (B,) ``last`` names."""
    t, which = places.steps.shape[-1], last[:, None]
    steps = places.steps.expand(len(last), t).gather(1, which)
    hours = places.hours.expand(len(last), t).gather(1, which)
    allowed = places.allowed
    if allowed is not None:
        allowed = allowed.expand(len(last), t, t).gather(1, which[..., None].expand(-1, -1, t))
    return _entries(places, config, Places(steps, hours, allowed), t).squeeze(1)


def _rows(places: Places, start: int, stop: int) -> Places:
    """Some rows of all places; of what they may read, all columns."""
    allowed = None if places.allowed is None else places.allowed[..., start:stop, :]
    return Places(places.steps[..., start:stop], places.hours[:, start:stop], allowed)


def _entries(places: Places, config: HSTUConfig, rows: Places, columns: int) -> Tensor:
    """(B, rows, columns) or (1, rows, columns) int64: distance · gaps + gap, or one that is closed."""
    n_gaps, closed = config.n_gaps, config.n_distances * config.n_gaps
    distance = _as_batch(rows.steps)[:, :, None] - _as_batch(places.steps)[:, None, :columns]
    shut = distance < 0 if rows.allowed is None else ~rows.allowed[..., :columns]
    entries = distance.clamp_(0, config.n_distances - 1).mul_(n_gaps).masked_fill(shut, closed + CLOSED_ENTRIES)
    if config.time_gaps:
        own, others = rows.hours.float(), places.hours.float()
        gaps = TIME_BUCKETS[config.time_buckets].of((own[:, :, None] - others[:, None, :columns]).abs_())
        entries = gaps.clamp_(0, n_gaps - 1).add_(entries)
    most = closed + torch.arange(columns, dtype=torch.int32, device=entries.device) % CLOSED_ENTRIES
    return torch.minimum(entries, most).long()


def _as_batch(steps: Tensor) -> Tensor:
    """(T,) or (B, T) int64 to (1, T) or (B, T) int32."""
    steps = steps.to(torch.int32)
    return steps if steps.dim() == 2 else steps[None]
