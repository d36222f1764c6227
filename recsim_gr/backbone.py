"""The generative backbone: HSTU over titles with their scores (Zhai et al., ICML 2024, arXiv:2402.17152, §3).

A layer, on X of shape (B, T, d)::

    U, V, Q, K = split(SiLU(LN(X) W))
    A = SiLU(Q Kᵀ + rab) / N, causal        pointwise: no softmax, no 1/sqrt(d); N the configured maximum length
    Y = X + W_o Dropout(LN(A V) ⊙ U)

Position t of the output is the state after t events (position 0: nothing seen yet) and predicts title t+1: every prefix
of a history is one context, and one forward pass gives all of them. The output is L2-normalised and compared with the
L2-normalised title embeddings at temperature .05, as in the paper's public research code.

Departures from that code, each because a context here is more than a list of titles: a token carries the score that
the title got; a learned token opens every sequence, so that the empty history is a context too; positions beyond the
maximum length share the last position's parameters, so that a session may go on past the longest history of the log.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from recsim_gr.catalogue import Catalogue
from recsim_gr.configs import require, require_finite_numbers

TIME_BUCKETS = 16
"""Time gaps in minutes, in powers of two: the last bucket starts at 2^15 minutes, three weeks."""


@dataclass(frozen=True)
class HSTUConfig:
    """The size and shape of the backbone."""

    dimensions: int = 32
    """d: four times the latent dimensions of the default world; small enough for a laptop."""
    n_layers: int = 2
    """Two, as in the paper's smaller public configurations."""
    n_heads: int = 2
    """Heads of d/2: the attention is pointwise, so heads cost nothing and give two patterns of relevance."""
    max_length: int = 0
    """N: positions, and the divisor of the attention. 0 takes the longest history of the log."""
    temperature: float = 0.05
    """Of the cosine score: the paper's research code."""
    dropout: float = 0.2
    """On the gated values and the embeddings: the research code's."""
    positions: bool = True
    """Positional parameters; without them the backbone is blind to order beyond causality and time."""

    metadata: str = "when_cold"
    """Whether titles are represented by their metadata too (`METADATA`): by default where some come out later, since
    those have no history; elsewhere their own embeddings say more."""
    id_dropout: float = 0.2
    """Share of titles whose own embedding is dropped in a training step, where metadata are used: enough that the
    metadata learn to stand alone, little enough that the embeddings do too."""

    def __post_init__(self) -> None:
        require_finite_numbers(self)
        require(self.metadata in METADATA, self, "metadata", f"one of {', '.join(METADATA)}")
        require(0.0 <= self.id_dropout < 1.0, self, "id_dropout", "in [0, 1)")
        for name in ("dimensions", "n_layers", "n_heads"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        require(self.dimensions % self.n_heads == 0, self, "n_heads", f"a divisor of {self.dimensions}")
        require(self.max_length >= 0, self, "max_length", "0 or more")
        require(self.temperature > 0, self, "temperature", "positive")
        require(0.0 <= self.dropout < 1.0, self, "dropout", "in [0, 1)")


METADATA = ("never", "when_cold", "always")
"""When a title is represented by its metadata beside its own embedding."""


class TitleMetadata(nn.Module):
    """What stands for a title that nobody has watched yet: its genre and duration, as vectors beside its embedding.

    A title that the training log does not hold has no embedding of its own, only these; and so that they learn to stand
    alone, training drops the others' own embeddings now and then (DropoutNet: Volkovs, Yu, Poutanen, NeurIPS 2017).
    The release epoch says which titles are out, and is no feature: nobody in the log has seen the latest.

    Args:
        catalogue: the metadata.
        known: (I,) bool; which titles the training log holds.
        config: dimensions and ``id_dropout``.
    """

    genre: Tensor
    minutes: Tensor
    release: Tensor
    known: Tensor

    def __init__(self, catalogue: Catalogue, known: NDArray[np.bool_], config: "HSTUConfig") -> None:
        super().__init__()
        self.n_genres, self.id_dropout = catalogue.n_genres, config.id_dropout
        minutes = np.log(catalogue.duration_minutes.astype(np.float64))
        minutes = (minutes - minutes.mean()) / max(float(minutes.std()), 1e-6)
        self.register_buffer("genre", torch.from_numpy(catalogue.genre.copy()))
        self.register_buffer("minutes", torch.from_numpy(minutes.astype(np.float32)))
        self.register_buffer("release", torch.from_numpy(catalogue.release.copy()))
        self.register_buffer("known", torch.from_numpy(known.astype(np.float32)))
        self.by_genre = nn.Parameter(torch.empty(self.n_genres, config.dimensions).normal_(std=0.02))
        self.by_minutes = nn.Parameter(torch.zeros(config.dimensions))

    @classmethod
    def empty(cls, n_titles: int, n_genres: int, config: "HSTUConfig") -> "TitleMetadata":
        """Of that shape, to load a saved state into."""
        zeros = np.zeros(n_titles, dtype=np.int64)
        genre = zeros.copy()
        genre[0] = n_genres - 1
        return cls(Catalogue(genre, np.ones(n_titles, dtype=np.float32), zeros), zeros.astype(bool), config)

    def forward(self, own: Tensor) -> Tensor:
        """(I, d) embeddings of the titles' own to (I, d) vectors."""
        kept = self.known
        if self.training and self.id_dropout > 0:
            kept = kept * (torch.rand_like(kept) >= self.id_dropout)
        return own * kept[:, None] + self.by_genre[self.genre] + self.minutes[:, None] * self.by_minutes


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

    def forward(self, x: Tensor, gap_bucket: Tensor, distance: Tensor, causal: Tensor) -> Tensor:
        """x (B, T, d); gap_bucket (B, T, T) and distance (T, T) integer; causal (T, T) of 1 and 0."""
        b, t, d = x.shape
        mixed = F.silu(F.layer_norm(x, (d,)) @ self.uvqk)
        u, v, q, k = mixed.split(d, dim=-1)
        q, k, v = (part.view(b, t, self.heads, -1).transpose(1, 2) for part in (q, k, v))  # (B, H, T, d/H)
        bias = self.by_gap[gap_bucket]
        if self.positions:
            bias = bias + self.by_distance[distance]
        attention = F.silu(q @ k.transpose(-1, -2) + bias.unsqueeze(1)) * (causal / self.max_length)
        values = (attention @ v).transpose(1, 2).reshape(b, t, d)
        gated = F.dropout(F.layer_norm(values, (d,)) * u, self.dropout, self.training)
        return x + self.out(gated)


class HSTU(nn.Module):
    """The backbone over a catalogue of ``n_titles``.

    Args:
        config: its shape; ``max_length`` must be set.
        n_titles: I.
        metadata: what titles are represented by beside their own embeddings, if anything.
    """

    def __init__(self, config: HSTUConfig, n_titles: int, metadata: TitleMetadata | None = None) -> None:
        super().__init__()
        require(config.max_length >= 1, config, "max_length", "set before the backbone is built")
        self.config, self.n_titles = config, n_titles
        d = config.dimensions
        self.titles = nn.Parameter(torch.empty(n_titles, d).normal_(std=0.02))
        self.first = nn.Parameter(torch.empty(d).normal_(std=0.02))
        self.position = nn.Parameter(torch.empty(config.max_length, d).normal_(std=math.sqrt(1 / d)))
        self.by_score = nn.Linear(d, d, bias=False)
        self.score_level = nn.Parameter(torch.zeros(d))
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.n_layers))
        self.metadata = metadata

    def encode(self, titles: Tensor, scores: Tensor, times: Tensor) -> Tensor:
        """States after every prefix.

        Args:
            titles: (B, T) int64; padding ``n_titles``, behind the real ones only.
            scores: (B, T) float32.
            times: (B, T) float32, hours.

        Returns:
            (B, T + 1, d) of length 1; position t has seen the first t events.
        """
        b, t = titles.shape
        x = torch.cat([self.first.expand(b, 1, -1), self._tokens(titles, scores)], dim=1)
        steps = torch.arange(t + 1, device=titles.device)
        if self.config.positions:
            x = x + self.position[steps.clamp(max=self.config.max_length - 1)]
        x = F.dropout(x, self.config.dropout, self.training)
        distance = (steps[:, None] - steps[None, :]).clamp(0, self.config.max_length - 1)
        causal = (steps[:, None] >= steps[None, :]).to(x.dtype)
        gaps = _gap_buckets(times)
        for layer in self.layers:
            x = layer(x, gaps, distance, causal)
        return F.normalize(x, dim=-1)

    def encode_last(self, titles: Tensor, scores: Tensor, times: Tensor) -> Tensor:
        """(B, d): the state after the whole of each history, wherever its padding begins."""
        states = self.encode(titles, scores, times)
        length = (titles < self.n_titles).sum(dim=1)
        return states[torch.arange(len(states), device=states.device), length]

    def title_vectors(self) -> Tensor:
        """(I, d): what stands for each title."""
        return self.titles if self.metadata is None else self.metadata(self.titles)

    def title_directions(self) -> Tensor:
        """(I, d): the titles' embeddings, of length 1 over the temperature; logits are states @ these."""
        return F.normalize(self.title_vectors(), dim=-1) / self.config.temperature

    def logits(self, states: Tensor) -> Tensor:
        """(..., d) states to (..., I) cosine scores over the temperature, seen titles included."""
        return states @ self.title_directions().T

    def _tokens(self, titles: Tensor, scores: Tensor) -> Tensor:
        """(B, T, d): the title's embedding, and the same turned by how much the title was liked."""
        padded = F.pad(self.title_vectors(), (0, 0, 0, 1))
        embedded = padded[titles] * math.sqrt(self.config.dimensions)
        liked = ((scores - 3.0) / 2.0).unsqueeze(-1)
        return embedded + liked * (self.by_score(embedded) + self.score_level)


def _gap_buckets(times: Tensor) -> Tensor:
    """(B, T + 1, T + 1) int64: bucket of the time between two positions; the opening token stands at the first."""
    opening = times[:, :1].sum(dim=1, keepdim=True)  # (B, 1) also where T is 0
    when = torch.cat([opening, times], dim=1)
    minutes = 60.0 * (when[:, :, None] - when[:, None, :]).abs()
    return torch.log2(minutes.clamp(min=1.0)).long().clamp(max=TIME_BUCKETS - 1)
