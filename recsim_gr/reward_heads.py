"""A member of the reward model: a backbone with a shallow head, in one of two forms.

``shallow`` predicts the score of every title at once, from the state h after the history::

    r̂(x, a) = m + u·h + b_a + ⟨W h, ê_a⟩

with m the log's mean score, ê_a the backbone's own title embedding (length 1, scaled by 5 as its logits are by 20), so
that what imitation learned about titles serves the reward.

``appended`` is the study's literal form (A-SFT, Netflix 2025): the head reads the state after the candidate title a is
appended to the history, without the score that it does not have yet::

    r̂(x, a) = m + w·h(x ⊕ a) + b_a

so that the title meets the history inside the backbone. It costs a token a title where the other costs a product.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from recsim_gr.backbones import Backbone
from recsim_gr.histories import Batch, HistorySource
from recsim_gr.prefixes import prefix_states

EMBEDDING_SCALE = 5.0
"""Length of the title embeddings in the shallow head: W then starts and stays near 1 where predictions differ by a few
points of the score."""

CANDIDATES = 48
"""Titles that are appended in one pass: twice a history's tokens, so that most of the work is theirs."""

PASS_ENTRIES = 1 << 18
"""Pairs of tokens in one pass of `AppendedScorer` over the whole catalogue, at most: some 15 MB while it lasts. Of 16
to 200 titles and 2^18 to 2^22 pairs these were the fastest: 4 µs a title and context (d = 32, 20 events, one core)."""


class ScoreHead(nn.Module):
    """Scores of all titles from a state of the backbone: the module docstring's first formula.

    Args:
        dimensions: d.
        n_titles: I.
        mean: m, what a title scores before anything is learned.
    """

    mean: Tensor

    def __init__(self, dimensions: int, n_titles: int, mean: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.user = nn.Parameter(torch.zeros(dimensions))
        self.title = nn.Parameter(torch.zeros(n_titles))
        self.mix = nn.Parameter(torch.empty(dimensions, dimensions).normal_(std=0.1 / math.sqrt(dimensions)))

    def state_side(self, states: Tensor) -> Tensor:
        """(..., d) states to (..., d + 1): what `title_side` is multiplied with."""
        return torch.cat([states @ self.mix, (self.mean + states @ self.user).unsqueeze(-1)], dim=-1)

    def title_side(self, backbone: Backbone) -> tuple[Tensor, Tensor]:
        """(I, d + 1) vectors and (I,) biases of the titles."""
        vectors = nn.functional.normalize(backbone.title_vectors(), dim=-1) * EMBEDDING_SCALE
        return torch.cat([vectors, vectors.new_ones(len(vectors), 1)], dim=1), self.title

    def all_titles(self, states: Tensor, backbone: Backbone) -> Tensor:
        """(..., I): the score of every title."""
        vectors, biases = self.title_side(backbone)
        return self.state_side(states) @ vectors.T + biases

    def at(self, states: Tensor, titles: Tensor, backbone: Backbone) -> Tensor:
        """(B, T): the score of one title a state; padding (index I) scores as the last title and must be masked."""
        vectors, biases = self.title_side(backbone)
        titles = titles.clamp(max=len(biases) - 1)
        return (self.state_side(states) * vectors[titles]).sum(-1) + biases[titles]


class AppendedHead(nn.Module):
    """The score of a title from the state after it is appended: the module docstring's second formula.

    Args:
        dimensions: d.
        n_titles: I.
        mean: m, what every title scores before anything is learned.
    """

    mean: Tensor

    def __init__(self, dimensions: int, n_titles: int, mean: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.marker = nn.Parameter(torch.empty(dimensions).normal_(std=0.02))
        """Added to the token of a candidate: tells it from a title that was watched and got a middling score."""
        self.weight = nn.Parameter(torch.zeros(dimensions))
        self.title = nn.Parameter(torch.zeros(n_titles))

    def forward(self, states: Tensor, titles: Tensor) -> Tensor:
        """(..., d) states at appended titles and (...) those titles, below I, to (...) scores."""
        return self.mean + states @ self.weight + self.title[titles]


class RewardMember(nn.Module, ABC):
    """A backbone with a head that predicts scores.

    Args:
        backbone: copied.
        head: of the form.
    """

    form: ClassVar[str]
    """Its name in `FORMS`."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        self.head = head.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return self.backbone.titles.device

    @abstractmethod
    def forward(self, titles: Tensor, scores: Tensor, times: Tensor) -> Tensor:
        """(B, I): the score of every title after the whole history."""

    @abstractmethod
    def at(self, batch: Batch, titles: Tensor, states: Tensor | None = None) -> Tensor:
        """(B, T): the score of one title after each prefix; where it is padding (index I), whatever: mask it.

        Args:
            batch: the histories.
            titles: (B, T) int64, the title that comes after the first t events.
            states: (B, T, d) `prefix_states` of the batch, where they are known: some forms need them.
        """

    def batches(self, histories: HistorySource, users: int = 256) -> Iterator[Batch]:
        """All histories in order, some users at a time, where its parameters are."""
        for batch in histories.chunks(users):
            yield batch.to(self.device)

    def groups(self, head_rate: float) -> list[dict[str, object]]:
        """Optimiser groups with the head at ``head_rate`` times the rate of the backbone."""
        return [
            {"params": list(self.backbone.parameters())},
            {"params": list(self.head.parameters()), "scale": head_rate},
        ]


class Scorer(RewardMember):
    """The form ``shallow``; also the Q function of `CQL`.

    Args:
        backbone: copied.
        mean: m.
    """

    form = "shallow"
    head: ScoreHead

    def __init__(self, backbone: Backbone, mean: float) -> None:
        super().__init__(backbone, ScoreHead(backbone.config.dimensions, backbone.n_titles, mean))

    def forward(self, titles: Tensor, scores: Tensor, times: Tensor) -> Tensor:
        state = self.backbone.encode_last(titles, scores, times)
        return self.head.all_titles(state, self.backbone)

    def at(self, batch: Batch, titles: Tensor, states: Tensor | None = None) -> Tensor:
        states = prefix_states(self.backbone, batch) if states is None else states
        return self.head.at(states, titles, self.backbone)


class AppendedScorer(RewardMember):
    """The form ``appended``.

    Args:
        backbone: copied.
        mean: m.
    """

    form = "appended"
    head: AppendedHead

    def __init__(self, backbone: Backbone, mean: float) -> None:
        super().__init__(backbone, AppendedHead(backbone.config.dimensions, backbone.n_titles, mean))

    def forward(self, titles: Tensor, scores: Tensor, times: Tensor) -> Tensor:
        n_titles, length = self.backbone.n_titles, (titles < self.backbone.n_titles).sum(dim=1)
        every = torch.arange(n_titles, device=titles.device)
        users = max(1, PASS_ENTRIES // (titles.shape[1] + 1 + min(CANDIDATES, n_titles)) ** 2)
        rows = []
        for start in range(0, len(titles), users):
            history = [column[start : start + users] for column in (titles, scores, times, length)]
            parts = [self._after(some, *history) for some in every.split(CANDIDATES)]
            rows.append(torch.cat(parts, dim=1))
        return torch.cat(rows)

    def at(self, batch: Batch, titles: Tensor, states: Tensor | None = None) -> Tensor:
        candidates = titles.clamp(max=self.backbone.n_titles - 1)
        after = torch.arange(titles.shape[1], device=titles.device).expand(titles.shape)
        history = batch.titles[:, :-1], batch.scores[:, :-1], batch.times[:, :-1]
        appended = self.backbone.encode_appended(*history, candidates, after, self.head.marker)
        return self.head(appended, candidates)

    def _after(self, some: Tensor, titles: Tensor, scores: Tensor, times: Tensor, length: Tensor) -> Tensor:
        """(B, C): the scores of some titles, (C,), after whole histories of (B,) events."""
        candidates = some.expand(len(titles), -1)
        after = length[:, None].expand(candidates.shape)
        appended = self.backbone.encode_appended(titles, scores, times, candidates, after, self.head.marker)
        return self.head(appended, candidates)


FORMS: dict[str, type[Scorer] | type[AppendedScorer]] = {kind.form: kind for kind in (Scorer, AppendedScorer)}
"""The forms of a member by name."""


__all__ = [
    "FORMS",
    "AppendedHead",
    "AppendedScorer",
    "RewardMember",
    "ScoreHead",
    "Scorer",
]
