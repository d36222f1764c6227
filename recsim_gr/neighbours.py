"""What a sequential recommender must beat: popularity, and item-based nearest neighbours.

Item-kNN (Deshpande and Karypis, "Item-based top-N recommendation algorithms", TOIS 22(1), 2004, §4): titles are alike
where the same users have both. With c_ij users who have both i and j, and n_i who have i::

    sim_ij = c_ij / (sqrt(n_i n_j) + λ)                       cosine, shrunk where it rests on few users
    score_i = Σ_j δ^age_j sim_ij                              over j in the user's last m events with i among the k
                                                              titles most like j; age_j is 0 for the last event

k, λ, m and δ are chosen on validation NDCG@10 over a stated grid (`KNN_GRID`). Short memories and δ < 1 say that the
last few events matter more, as they do in logs such as MovieLens; titles that follow each other are not told from those
that the same users have merely both met.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from recsim_gr.leave_one_out import HeldOut, LeaveOneOut, Scorer, ranking_figures, ranks

TITLES_AT_ONCE = 1024
"""Whose likeness to all titles is in memory together: a quarter of a GB in the catalogue of MovieLens-20M."""


@dataclass(frozen=True)
class KNNGrid:
    """What item-kNN is chosen from; 0 stands for all."""

    neighbours: tuple[int, ...] = (20, 50, 100, 200, 500)
    """k: the literature's range; more neighbours only add what is hardly alike."""
    shrinkage: tuple[float, ...] = (0.0, 10.0, 100.0)
    """λ: none, and two more, a decade apart each."""
    memory: tuple[int, ...] = (1, 5, 10, 20, 50, 0)
    """m, the events of a user that count."""
    decay: tuple[float, ...] = (1.0, 0.8, 0.5)
    """δ: none, and two that halve an event's say in three events and in one."""
    most_users: int = 10_000
    """Whose validation decides, evenly spaced among all where there are more: NDCG@10 to .003."""


KNN_GRID = KNNGrid()


class KNNChoice(NamedTuple):
    """One setting of item-kNN; see the module."""

    neighbours: int
    shrinkage: float
    memory: int
    decay: float = 1.0


def popularity(counts: NDArray[np.int64]) -> Scorer:
    """The same for everyone: how often each title is in the training part."""

    def score(held_out: HeldOut, rows: slice) -> NDArray[np.float64]:
        return np.tile(counts.astype(np.float64), (len(held_out.users[rows]), 1))

    return score


class ItemKNN:
    """Item-based nearest neighbours.

    Args:
        similarities: (I, I) CSR; row j holds the k titles most like j.
        memory: m, the events of a user that count; 0 for all.
        decay: δ, what an event says of the event after it.
    """

    def __init__(self, similarities: Any, memory: int, decay: float = 1.0) -> None:
        self.similarities, self.memory, self.decay = similarities, memory, decay

    def __call__(self, held_out: HeldOut, rows: slice) -> NDArray[np.float64]:
        user, titles = held_out.seen(rows)
        age = np.bincount(user)[user] - _number_within(user) - 1  # 0 for the last event
        if self.memory > 0:
            kept = age < self.memory
            user, titles, age = user[kept], titles[kept], age[kept]
        shape = (len(held_out.users[rows]), self.similarities.shape[0])
        profile = sparse.csr_array((self.decay**age, (user, titles)), shape=shape)
        scores: NDArray[np.float64] = (profile @ self.similarities).toarray()
        return scores


def similarities(split: LeaveOneOut, neighbours: tuple[int, ...], shrinkage: float) -> Iterator[tuple[int, Any]]:
    """For every k, from many to few, the (I, I) CSR matrix of the k likest titles of each title by the training part;
    of equally alike ones those of the lower index."""
    n = split.sequences.n_titles
    have = split.training_matrix()
    counts = np.asarray(have.sum(axis=0)).ravel()
    most = min(n - 1, max(neighbours))
    columns, values = np.zeros((n, most), dtype=np.int64), np.zeros((n, most))
    transposed = have.T.tocsr()
    for start in range(0, n, TITLES_AT_ONCE):
        some = slice(start, min(n, start + TITLES_AT_ONCE))
        both = (transposed[some] @ have).toarray()
        both[np.arange(len(both)), np.arange(some.start, some.stop)] = 0.0
        alike = both / np.maximum(np.sqrt(np.outer(counts[some], counts)) + shrinkage, 1e-12)
        columns[some] = np.argsort(-alike, axis=1, kind="stable")[:, :most]
        values[some] = np.take_along_axis(alike, columns[some], axis=1)
    for k in sorted({min(k, most) for k in neighbours}, reverse=True):
        kept = values[:, :k] > 0
        row = np.repeat(np.arange(n), kept.sum(axis=1))
        yield k, sparse.csr_array((values[:, :k][kept], (row, columns[:, :k][kept])), shape=(n, n))


def best_item_knn(split: LeaveOneOut, grid: KNNGrid = KNN_GRID) -> tuple[ItemKNN, KNNChoice]:
    """The item-kNN with the highest validation NDCG@10 of the grid; of equal ones the first."""
    best: tuple[float, ItemKNN, KNNChoice] | None = None
    judges = split.validation.some(grid.most_users)
    for shrinkage in grid.shrinkage:
        for k, alike in similarities(split, grid.neighbours, shrinkage):
            for memory, decay in product(grid.memory, grid.decay):
                model = ItemKNN(alike, memory, decay)
                found = ranking_figures(ranks(model, judges))["NDCG@10"].mean
                if best is None or found > best[0]:
                    best = found, model, KNNChoice(k, shrinkage, memory, decay)
    assert best is not None
    return best[1], best[2]


def _number_within(sorted_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) how many equal ones stand before each."""
    starts = np.flatnonzero(np.append(True, sorted_ids[1:] != sorted_ids[:-1]))
    return np.arange(len(sorted_ids)) - np.repeat(starts, np.diff(np.append(starts, len(sorted_ids))))
