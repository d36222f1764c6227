"""The measure of training speed: HSTU as the public research code computes it, written anew from its equations.

The structure is that of facebookresearch/generative-recommenders, ``generative_recommenders/research/modeling/
sequential`` (`hstu.py`, and the preprocessor and postprocessor of its configuration for MovieLens). Embeddings times
sqrt(d) plus learned positions, dropout, padding multiplied away; in every layer a layer norm, one product to U, V, Q
and K, SiLU, attention by einsum over padded heads, the relative bias by position and by time bucket worked out anew in
each layer, SiLU over N, the causal mask multiplied in, a layer norm of what was attended to, the gate, dropout, an
output layer, the residual; states of length 1. A training step here takes the full softmax at temperature .05, all
logits in one tensor and divided there as in that code, by `F.cross_entropy`, and AdamW.

It is meant to be as good as a direct transcription can be, so what differs favours it: histories are dense here, and
the conversions between jagged and padded tensors, which the research code makes in every layer, are left out; AdamW is
the fused one. Three things are ours, so that equal weights and batches give equal losses (a test holds that, over
training steps): the learned token that opens every sequence, the buckets of time gaps, and a row's gap measured from
its own event (there it is from the next one).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsim_gr.backbones import HSTU
from recsim_gr.backbones.hstu import HSTULayer
from recsim_gr.histories import Batch

TEMPERATURE = 0.05
BUCKETS = 16


class ReferenceLayer(nn.Module):
    """A sequential transduction unit over padded sequences of one length N.

    Args:
        d: width.
        heads: H; queries, keys and values have d/H each.
        n: N.
        dropout: of what the output layer reads.
        epsilon: of both layer norms.
    """

    places: Tensor

    def __init__(self, d: int, heads: int, n: int, dropout: float, epsilon: float) -> None:
        super().__init__()
        self.d, self.heads, self.n, self.dropout, self.epsilon = d, heads, n, dropout, epsilon
        self.uvqk = nn.Parameter(torch.empty(d, 4 * d).normal_(std=0.02))
        self.output = nn.Linear(d, d)
        nn.init.xavier_uniform_(self.output.weight)
        self.by_position = nn.Parameter(torch.empty(2 * n - 1).normal_(std=0.02))
        self.by_time = nn.Parameter(torch.empty(BUCKETS).normal_(std=0.02))
        order = torch.arange(n)
        self.register_buffer("places", order[:, None] - order[None, :] + n - 1)

    def forward(self, x: Tensor, hours: Tensor, causal: Tensor) -> Tensor:
        """x (B, N, d), hours (B, N), causal (N, N) of 1 and 0."""
        b, n, d = x.shape
        normed = F.layer_norm(x, (d,), eps=self.epsilon)
        u, v, q, k = torch.split(F.silu(torch.mm(normed.view(-1, d), self.uvqk)), d, dim=1)
        q, k, v = (part.reshape(b, n, self.heads, -1) for part in (q, k, v))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k)
        scores = scores + self.bias(hours).unsqueeze(1)
        weights = F.silu(scores) / self.n
        weights = weights * causal[None, None]
        attended = torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(b * n, d)
        gated = u * F.layer_norm(attended, (d,), eps=self.epsilon)
        out = self.output(F.dropout(gated, self.dropout, self.training)).view(b, n, d)
        return out + x

    def bias(self, hours: Tensor) -> Tensor:
        """(B, N, N): by position and by time bucket."""
        minutes = 60.0 * (hours[:, :, None] - hours[:, None, :])
        buckets = torch.log2(torch.abs(minutes).clamp(min=1.0)).long()
        buckets = torch.clamp(buckets, min=0, max=BUCKETS - 1).detach()
        by_time = torch.index_select(self.by_time, 0, buckets.view(-1)).view(buckets.shape)
        return self.by_position[self.places] + by_time


class Reference(nn.Module):
    """The whole model, over sequences of N tokens: one that opens, then N − 1 titles.

    Args:
        n_titles: I; padding is title I.
        d, n_layers, heads, n: sizes.
        dropout: before the first layer and in every layer.
        epsilon: of the layer norms; the research code's.
    """

    causal: Tensor

    def __init__(
        self, n_titles: int, d: int, n_layers: int, heads: int, n: int, dropout: float, epsilon: float = 1e-6
    ) -> None:
        super().__init__()
        self.n_titles, self.d, self.dropout = n_titles, d, dropout
        self.embedding = nn.Embedding(n_titles + 1, d, padding_idx=n_titles)
        self.opening = nn.Parameter(torch.empty(d).normal_(std=0.02))
        self.position = nn.Embedding(n, d)
        self.layers = nn.ModuleList(ReferenceLayer(d, heads, n, dropout, epsilon) for _ in range(n_layers))
        self.register_buffer("causal", torch.tril(torch.ones(n, n)))

    def forward(self, titles: Tensor, hours: Tensor) -> Tensor:
        """(B, N − 1) titles and their hours to (B, N, d) states of length 1."""
        b = len(titles)
        tokens = torch.cat([self.opening.expand(b, 1, -1), self.embedding(titles) * math.sqrt(self.d)], dim=1)
        x = tokens + self.position(torch.arange(tokens.shape[1], device=titles.device)).unsqueeze(0)
        x = F.dropout(x, self.dropout, self.training)
        valid = F.pad(titles != self.n_titles, (1, 0), value=True).unsqueeze(-1).to(x.dtype)
        x = x * valid
        opened = torch.cat([hours[:, :1], hours], dim=1)
        for layer in self.layers:
            x = layer(x, opened, self.causal)
        x = x * valid
        return x / torch.clamp(torch.linalg.norm(x, dim=-1, keepdim=True), min=1e-6)

    def logits(self, states: Tensor) -> Tensor:
        """(..., d) states to (..., I)."""
        titles = self.embedding.weight[: self.n_titles]
        titles = titles / torch.clamp(torch.linalg.norm(titles, dim=-1, keepdim=True), min=1e-6)
        return states @ titles.T / TEMPERATURE

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of the title at each event of dense histories, over all titles."""
        states = self(batch.titles[:, :-1], batch.times[:, :-1])
        return F.cross_entropy(self.logits(states).flatten(0, 1), batch.titles.flatten())

    def last_loss(self, batch: Batch) -> Tensor:
        """The same, of the last event alone: all states are worked out, as the research code does, and one is read."""
        states = self(batch.titles[:, :-1], batch.times[:, :-1])
        return F.cross_entropy(self.logits(states[:, -1]), batch.titles[:, -1])


@torch.no_grad()
def reference_of(backbone: HSTU) -> Reference:
    """The reference with the weights of one of our backbones, which must read no scores and have no metadata."""
    config = backbone.config
    epsilon = getattr(config, "norm_epsilon", 1e-5)
    made = Reference(
        backbone.n_titles,
        config.dimensions,
        config.n_layers,
        config.n_heads,
        config.max_length,
        config.dropout,
        epsilon,
    )
    made.embedding.weight[:-1] = backbone.titles
    made.opening.copy_(backbone.first)
    made.position.weight.copy_(backbone.position)
    for theirs, ours in zip(made.layers, backbone.layers, strict=True):
        assert isinstance(theirs, ReferenceLayer)
        assert isinstance(ours, HSTULayer)
        theirs.uvqk.copy_(ours.uvqk)
        theirs.output.load_state_dict(ours.out.state_dict())
        theirs.by_position.zero_()
        theirs.by_position[config.max_length - 1 :] = ours.by_distance
        theirs.by_time.copy_(ours.by_gap)
    return made.to(backbone.titles.device)
