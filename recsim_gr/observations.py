"""What an agent sees of a user, and what only a referee sees beside it."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from recsim_gr.catalogue import Catalogue

LOWEST_SCORE, HIGHEST_SCORE = 1.0, 5.0
"""The scale of satisfaction, and of every score whose noise model keeps to it."""


@dataclass(frozen=True, eq=False)
class Observations:
    """A batch of contexts, as the environments and every agent see them.

    Attributes:
        titles: (n, L) int64; the titles seen, in order; padding is ``n_titles``.
        scores: (n, L) float32; the scores they got; padding is 0.
        times: (n, L) float32; hours since the epoch began; padding is 0.
        length: (n,) int64; how many of the L are real; the real ones come first.
        epoch: (n,) int64.
        n_titles: the size of the catalogue, I.
        catalogue: what everyone may know of the titles, where it is known; titles that are not out yet in a context's
            epoch cannot be chosen.
    """

    titles: NDArray[np.int64]
    scores: NDArray[np.float32]
    times: NDArray[np.float32]
    length: NDArray[np.int64]
    epoch: NDArray[np.int64]
    n_titles: int
    catalogue: Catalogue | None = None

    def __len__(self) -> int:
        return len(self.titles)

    def __getitem__(self, rows: slice | NDArray[np.int64] | NDArray[np.bool_]) -> Self:
        """The contexts at ``rows``, as observations."""
        return type(self)(
            titles=self.titles[rows],
            scores=self.scores[rows],
            times=self.times[rows],
            length=self.length[rows],
            epoch=self.epoch[rows],
            n_titles=self.n_titles,
            catalogue=self.catalogue,
        )

    def seen(self) -> NDArray[np.bool_]:
        """(n, I) bool: which titles are in the history, and so cannot be chosen again."""
        return seen_mask(self.titles, self.n_titles)

    def unavailable(self) -> NDArray[np.bool_]:
        """(n, I) bool: which titles cannot be chosen, since they were seen or are not out yet."""
        if self.catalogue is None or not self.catalogue.has_releases:
            return self.seen()
        return self.seen() | self.catalogue.unreleased(self.epoch)

    def append(self, titles: NDArray[np.int64], scores: NDArray[np.float32], gap_hours: float) -> "Observations":
        """The contexts after one more event each: one column wider, the event after the last real one.

        Args:
            titles: (n,) the titles chosen.
            scores: (n,) the scores they got.
            gap_hours: hours between the last event and this one.
        """
        rows = np.arange(len(self))
        one_more = ((0, 0), (0, 1))
        wider_titles = np.pad(self.titles, one_more, constant_values=self.n_titles)
        wider_scores, wider_times = np.pad(self.scores, one_more), np.pad(self.times, one_more)
        last = wider_times[rows, np.maximum(self.length - 1, 0)]  # 0, the padding, where there was no event
        wider_titles[rows, self.length] = titles
        wider_scores[rows, self.length] = scores
        wider_times[rows, self.length] = last + gap_hours
        return Observations(
            wider_titles, wider_scores, wider_times, self.length + 1, self.epoch, self.n_titles, self.catalogue
        )


@dataclass(frozen=True, eq=False)
class Contexts:
    """Test contexts: observations, and what only a referee may know about them.

    Attributes:
        observations: what an agent is shown.
        users: (n,) int64 user ids, for the world's own methods.
        next_titles: (n,) int64; the title that the user really chose next.
        next_scores: (n,) float32; the score it got.
        next_times: (n,) float32; hours since the epoch began when it was chosen.
    """

    observations: Observations
    users: NDArray[np.int64]
    next_titles: NDArray[np.int64]
    next_scores: NDArray[np.float32]
    next_times: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.users)


def seen_mask(histories: NDArray[np.int64], n_titles: int) -> NDArray[np.bool_]:
    """(n, I) bool: the titles that stand in each history; the padding index ``n_titles`` is dropped."""
    mask = np.zeros((len(histories), n_titles + 1), dtype=bool)
    np.put_along_axis(mask, histories, True, axis=1)
    return mask[:, :n_titles]
