"""What stands for a title beside its own embedding: public metadata, for titles that nobody has watched yet."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recsim_gr.catalogue import Catalogue

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
        dimensions: d.
        id_dropout: share of known titles whose own embedding is dropped in a training step.
    """

    genre: Tensor
    minutes: Tensor
    release: Tensor
    known: Tensor

    def __init__(self, catalogue: Catalogue, known: NDArray[np.bool_], dimensions: int, id_dropout: float) -> None:
        super().__init__()
        self.n_genres, self.id_dropout = catalogue.n_genres, id_dropout
        minutes = np.log(catalogue.duration_minutes.astype(np.float64))
        minutes = (minutes - minutes.mean()) / max(float(minutes.std()), 1e-6)
        self.register_buffer("genre", torch.from_numpy(catalogue.genre.copy()))
        self.register_buffer("minutes", torch.from_numpy(minutes.astype(np.float32)))
        self.register_buffer("release", torch.from_numpy(catalogue.release.copy()))
        self.register_buffer("known", torch.from_numpy(known.astype(np.float32)))
        self.by_genre = nn.Parameter(torch.empty(self.n_genres, dimensions).normal_(std=0.02))
        self.by_minutes = nn.Parameter(torch.zeros(dimensions))

    @classmethod
    def empty(cls, n_titles: int, n_genres: int, dimensions: int, id_dropout: float) -> "TitleMetadata":
        """Of that shape, to load a saved state into."""
        zeros = np.zeros(n_titles, dtype=np.int64)
        genre = zeros.copy()
        genre[0] = n_genres - 1
        catalogue = Catalogue(genre, np.ones(n_titles, dtype=np.float32), zeros)
        return cls(catalogue, zeros.astype(bool), dimensions, id_dropout)

    def forward(self, own: Tensor) -> Tensor:
        """(I, d) embeddings of the titles' own to (I, d) vectors."""
        kept = self.known
        if self.training and self.id_dropout > 0:
            kept = kept * (torch.rand_like(kept) >= self.id_dropout)
        return own * kept[:, None] + self.by_genre[self.genre] + self.minutes[:, None] * self.by_minutes
