"""What every generative backbone is: tokens of titles with their scores in, a state after every prefix out.

Position t of the output is the state after t events (position 0: nothing seen yet) and predicts title t+1: every prefix
of a history is one context, and one forward pass gives all of them. What happens in between is the backbone's own, one
method of one file: `Backbone.mix`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsim_gr import configs
from recsim_gr.backbones.elementwise import dropout
from recsim_gr.backbones.titles import METADATA, TitleMetadata
from recsim_gr.configs import require, require_finite_numbers
from recsim_gr.errors import ConfigError, UnknownNameError

SIMILARITIES = ("cosine", "dot")
"""How a state is compared with a title: by direction over a temperature, or by the plain product."""


@dataclass(frozen=True)
class BackboneConfig:
    """What all backbones have in common."""

    dimensions: int = 32
    """d: four times the latent dimensions of the default world; small enough for a laptop."""
    max_length: int = 0
    """N: positions. 0 takes the longest history of the log."""
    dropout: float = 0.2
    """The value of the public research codes of HSTU and SASRec."""
    positions: bool = True
    """Positional parameters; without them a backbone is blind to order beyond causality, and time where it reads it."""
    scores: bool = True
    """Whether a token carries the score that its title got; sequences without feedback have none."""
    similarity: str = "cosine"
    """How a state is compared with a title, one of `SIMILARITIES`."""
    temperature: float = 0.05
    """Of the cosine: HSTU's research code."""
    metadata: str = "when_cold"
    """Whether titles are represented by their metadata too (`METADATA`): by default where some come out later, since
    those have no history; elsewhere their own embeddings say more."""
    id_dropout: float = 0.2
    """Share of titles whose own embedding is dropped in a training step, where metadata are used: enough that the
    metadata learn to stand alone, little enough that the embeddings do too."""

    def __post_init__(self) -> None:
        require_finite_numbers(self)
        require(self.metadata in METADATA, self, "metadata", f"one of {', '.join(METADATA)}")
        require(self.similarity in SIMILARITIES, self, "similarity", f"one of {', '.join(SIMILARITIES)}")
        require(0.0 <= self.id_dropout < 1.0, self, "id_dropout", "in [0, 1)")
        require(self.dimensions >= 1, self, "dimensions", "at least 1")
        require(self.max_length >= 0, self, "max_length", "0 or more")
        require(self.temperature > 0, self, "temperature", "positive")
        require(0.0 <= self.dropout < 1.0, self, "dropout", "in [0, 1)")


class Places(NamedTuple):
    """Where the tokens of a batch of sequences stand.

    Attributes:
        steps: (T,) or (B, T) int64: the place of each token, 0 for the one that opens the sequence.
        hours: (B, T) float32, the time of each token.
        allowed: (T, T) or (B, T, T) bool, which token (row) may read which (column); None where each reads itself and
            those before it.
    """

    steps: Tensor
    hours: Tensor
    allowed: Tensor | None = None

    def may_read(self) -> Tensor:
        """(T, T) or (B, T, T) bool: ``allowed``, or its causal default."""
        if self.allowed is not None:
            return self.allowed
        return self.steps.unsqueeze(-1) >= self.steps.unsqueeze(-2)


BACKBONES: dict[str, type["Backbone"]] = {}
"""All registered backbones by name."""


def register_backbone(backbone: type["Backbone"]) -> type["Backbone"]:
    """Makes a backbone known by its ``name``: to `pretrain` (by its config's type), to checkpoints, to the command line
    and to the contract test.

    Raises:
        ConfigError: the name is taken by another class, or its config's type by another name (a config says which
            backbone is meant).
    """
    for name, known in BACKBONES.items():
        if name == backbone.name and _place(known) != _place(backbone):
            raise ConfigError(f"there is already a backbone {backbone.name!r}; choose another name")
        if name != backbone.name and known.config_type is backbone.config_type:
            config = backbone.config_type.__name__
            raise ConfigError(
                f"backbone {backbone.name!r} has the {config} of backbone {name!r}; give it one of its own, "
                f"class MyConfig({config})"
            )
    BACKBONES[backbone.name] = backbone
    return backbone


def _place(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def backbone_type(name: str) -> type["Backbone"]:
    """The registered backbone of that name.

    Raises:
        UnknownNameError: no such backbone; lists those that are.
    """
    if name not in BACKBONES:
        raise UnknownNameError(f"no backbone {name!r}; there are {', '.join(BACKBONES)}")
    return BACKBONES[name]


def new_backbone(config: BackboneConfig, n_titles: int, metadata: TitleMetadata | None = None) -> "Backbone":
    """An untrained backbone of the kind that the config belongs to.

    Raises:
        UnknownNameError: no registered backbone has a config of that type.
    """
    return backbone_for(config)(config, n_titles, metadata)


def backbone_for(config: BackboneConfig) -> type["Backbone"]:
    """The registered backbone that the config belongs to.

    Raises:
        UnknownNameError: no registered backbone has a config of that type.
    """
    for kind in BACKBONES.values():
        if kind.config_type is type(config):
            return kind
    known = ", ".join(kind.config_type.__name__ for kind in BACKBONES.values())
    raise UnknownNameError(f"no backbone takes a {type(config).__name__}; there are {known}")


class Backbone(nn.Module, ABC):
    """A generative recommender over a catalogue of ``n_titles``.

    A subclass sets ``name`` and ``config_type``, builds its layers in its constructor and gives `mix`.

    Args:
        config: its shape; ``max_length`` must be set.
        n_titles: I.
        metadata: what titles are represented by beside their own embeddings, if anything.
    """

    name: ClassVar[str]
    config_type: ClassVar[type[BackboneConfig]]

    def __init__(self, config: Any, n_titles: int, metadata: TitleMetadata | None = None) -> None:
        super().__init__()
        require(config.max_length >= 1, config, "max_length", "set before the backbone is built")
        self.config, self.n_titles = config, n_titles
        d = config.dimensions
        self.titles = nn.Parameter(torch.empty(n_titles, d).normal_(std=0.02))
        self.first = nn.Parameter(torch.empty(d).normal_(std=0.02))
        if config.positions:
            self.position = nn.Parameter(torch.empty(config.max_length, d).normal_(std=math.sqrt(1 / d)))
        if config.scores:
            self.by_score = nn.Linear(d, d, bias=False)
            self.score_level = nn.Parameter(torch.zeros(d))
        self.metadata = metadata

    @abstractmethod
    def mix(self, x: Tensor, places: Places) -> Tensor:
        """What makes a backbone: (B, T, d) tokens to (B, T, d) states, each from the tokens that it may read.

        Nothing that a token may not read may enter its state, not even through a mean over the batch or its width.
        """

    def mix_last(self, x: Tensor, places: Places, last: Tensor) -> Tensor:
        """`mix`, of one token a sequence: (B, T, d) tokens and (B,) int64 places to (B, d) states.

        A subclass overrides it where one row costs less than all, as where only a last layer's query is asked for.
        """
        return rows_at(self.mix(x, places), last).squeeze(1)

    def encode(self, titles: Tensor, scores: Tensor, times: Tensor) -> Tensor:
        """States after every prefix.

        Args:
            titles: (B, T) int64; padding ``n_titles``, behind the real ones only.
            scores: (B, T) float32.
            times: (B, T) float32, hours.

        Returns:
            (B, T + 1, d), of length 1 where the similarity is the cosine; position t has seen the first t events.
        """
        steps = torch.arange(titles.shape[1] + 1, device=titles.device)
        return self._states(self._history(titles, scores), Places(steps, self._hours(titles, times)))

    def encode_appended(
        self, titles: Tensor, scores: Tensor, times: Tensor, candidates: Tensor, after: Tensor, marker: Tensor
    ) -> Tensor:
        """States after a candidate title is appended to a prefix, without its score: the study's literal reward model.

        Args:
            titles, scores, times: as for `encode`.
            candidates: (B, C) int64 titles.
            after: (B, C) int64, how many events each candidate comes after; its time is that of the last of them.
            marker: (d,), added to a candidate's token, which has no score.

        Returns:
            (B, C, d): the state at the candidate, which has read the first ``after`` events and itself. Candidates do
            not read each other.
        """
        t = titles.shape[1]
        appended = self._embedded(candidates) + marker
        x = torch.cat([self._history(titles, scores), appended], dim=1)
        hours = self._hours(titles, times)
        steps = torch.arange(t + 1, device=titles.device).expand(len(titles), -1)
        places = Places(
            torch.cat([steps, after + 1], dim=1),
            torch.cat([hours, hours.gather(1, after)], dim=1),
            _appended_allowed(t + 1, after),
        )
        return self._states(x, places)[:, t + 1 :]

    def encode_last(self, titles: Tensor, scores: Tensor, times: Tensor) -> Tensor:
        """(B, d): the state after the whole of each history, wherever its padding begins."""
        length = (titles < self.n_titles).sum(dim=1)
        places = Places(torch.arange(titles.shape[1] + 1, device=titles.device), self._hours(titles, times))
        tokens = self._placed(self._history(titles, scores), places)
        return self._compared(self.mix_last(tokens, places, length))

    def title_vectors(self) -> Tensor:
        """(I, d): what stands for each title."""
        return self.titles if self.metadata is None else self.metadata(self.titles)

    def title_directions(self) -> Tensor:
        """(I, d): what states are multiplied with; under the cosine, vectors of length 1 over the temperature."""
        vectors = self.title_vectors()
        if self.config.similarity == "dot":
            return vectors
        return F.normalize(vectors, dim=-1) / self.config.temperature

    def logits(self, states: Tensor) -> Tensor:
        """(..., d) states to (..., I) logits, seen titles included."""
        return states @ self.title_directions().T

    def _history(self, titles: Tensor, scores: Tensor) -> Tensor:
        """(B, T + 1, d): the opening token, then a token an event."""
        embedded = self._embedded(titles)
        if self.config.scores:
            # a score on padding counts for nothing, and must not be rubbish times 0: NaN would reach every later mean
            liked = ((scores - 3.0) / 2.0).masked_fill(titles == self.n_titles, 0.0).unsqueeze(-1)
            embedded = embedded + liked * (self.by_score(embedded) + self.score_level)
        return torch.cat([self.first.expand(len(titles), 1, -1), embedded], dim=1)

    def _embedded(self, titles: Tensor) -> Tensor:
        """(B, T, d): titles' vectors times sqrt(d); 0 on padding."""
        padded = F.pad(self.title_vectors(), (0, 0, 0, 1))
        return padded[titles] * math.sqrt(self.config.dimensions)

    def _hours(self, titles: Tensor, times: Tensor) -> Tensor:
        """(B, T + 1): the times of the tokens, 0 on padding; the opening token stands at the first event."""
        times = times.masked_fill(titles == self.n_titles, 0.0)
        opening = times[:, :1].sum(dim=1, keepdim=True)  # (B, 1) also where T is 0
        return torch.cat([opening, times], dim=1)

    def _states(self, x: Tensor, places: Places) -> Tensor:
        return self._compared(self.mix(self._placed(x, places), places))

    def _placed(self, x: Tensor, places: Places) -> Tensor:
        if self.config.positions:
            x = x + self.position[places.steps.clamp(max=self.config.max_length - 1)]
        return dropout(x, self.config.dropout, self.training)

    def _compared(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.config.similarity == "cosine" else x

    # -- saving: see `recsim_gr.checkpoints` ----------------------------------------------------------------------

    def shape(self) -> dict[str, Any]:
        """What `build_backbone` needs, as JSON values."""
        genres = None if self.metadata is None else self.metadata.n_genres
        return {
            "kind": self.name,
            "n_titles": self.n_titles,
            "config": configs.to_dict(self.config),
            "genres": genres,
        }


def build_backbone(shape: dict[str, Any]) -> Backbone:
    """An untrained backbone of a saved `Backbone.shape`.

    Raises:
        UnknownNameError: a backbone that is not registered.
        ConfigError: a config that it refuses.
    """
    kind = backbone_type(shape["kind"])
    config, n_titles = configs.from_dict(kind.config_type, shape["config"]), int(shape["n_titles"])
    if shape["genres"] is None:
        return kind(config, n_titles)
    metadata = TitleMetadata.empty(n_titles, int(shape["genres"]), config.dimensions, config.id_dropout)
    return kind(config, n_titles, metadata)


def rows_at(x: Tensor, last: Tensor) -> Tensor:
    """(B, 1, d): of (B, T, d), the row of each sequence that (B,) ``last`` names."""
    return x.gather(1, last[:, None, None].expand(-1, 1, x.shape[-1]))


def _appended_allowed(n_history: int, after: Tensor) -> Tensor:
    """(B, T + C, T + C) bool: the history reads causally, a candidate its prefix and itself.

    Args:
        n_history: T, the tokens of the history, the opening token included.
        after: (B, C) events that each candidate comes after.
    """
    b, c = after.shape
    order = torch.arange(n_history, device=after.device)
    allowed = after.new_zeros(b, n_history + c, n_history + c, dtype=torch.bool)
    allowed[:, :n_history, :n_history] = order[:, None] >= order[None, :]
    allowed[:, n_history:, :n_history] = order <= after[:, :, None]
    allowed[:, n_history:, n_history:] = torch.eye(c, dtype=torch.bool, device=after.device)
    return allowed
