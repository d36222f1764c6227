"""The usual protocol of sequential recommendation on real sequences: leave one out, full ranking.

The last event of a user is the test, the last but one the validation, all before them is for training. A title is
ranked among the whole catalogue less what its user had seen before, in all of the history and not only in the part that
a model reads; titles that no user has in training are ranked too. The model that is tested is trained without the
validation event, and reads it.

Events of one time stand in the order of the file, which decides what is held out where the last two share theirs
(`LeaveOneOut.tied_test_events`; 44 % of the users of MovieLens-100K).

A user with fewer than three events has nothing to train on once two are held out: such users are trained on whole and
not tested, which `LeaveOneOut.left_out` counts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from recsim_gr.backbones import Backbone
from recsim_gr.errors import ConfigError, DataFileError
from recsim_gr.histories import tensors
from recsim_gr.metrics import hit_rate, ndcg, rank_of, reciprocal_rank
from recsim_gr.observations import Observations
from recsim_gr.sequences import Sequences

FEWEST_EVENTS = 3
"""Of a user who is tested: one to train on, one to validate, one to test."""

USERS_AT_ONCE = 256
"""Whose scores of all titles are in memory together."""

Scorer = Callable[["HeldOut", slice], NDArray[np.float64]]
"""Of some held-out users, (n, I) scores of all titles, higher is better; those seen count for nothing."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What n users did next, and what came before.

    Attributes:
        sequences: whose.
        users: (n,) int64.
        events: (n,) int64, the place in ``sequences`` of what each did next; all before it of the same user is history.
    """

    sequences: Sequences
    users: NDArray[np.int64]
    events: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.users)

    @property
    def titles(self) -> NDArray[np.int64]:
        """(n,) the titles chosen next."""
        return self.sequences.titles[self.events]

    def some(self, most: int) -> "HeldOut":
        """So many of the users at most, evenly spaced among them."""
        step = -(-len(self) // most)
        return HeldOut(self.sequences, self.users[::step], self.events[::step])

    def contexts(self, rows: slice, length: int) -> Observations:
        """The last ``length`` events, or as many as there are, before what came next."""
        stop, first = self.events[rows], self.sequences.starts[self.users[rows]]
        return self.sequences.windows(np.maximum(first, stop - length), stop)

    def seen(self, rows: slice) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows, from 0, and titles: all pairs of a user and a title of the history, in order."""
        stop, first = self.events[rows], self.sequences.starts[self.users[rows]]
        lengths = stop - first
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return np.repeat(np.arange(len(first)), lengths), self.sequences.titles[np.repeat(first, lengths) + within]


class LeaveOneOut:
    """Sequences, split.

    Args:
        sequences: of all users.

    Attributes:
        validation, test: what is held out.
        left_out: users who are not tested.

    Raises:
        DataFileError: no user has three events.
    """

    def __init__(self, sequences: Sequences) -> None:
        lengths = sequences.lengths
        users = np.flatnonzero(lengths >= FEWEST_EVENTS)
        if len(users) == 0:
            raise DataFileError(
                f"no user has {FEWEST_EVENTS} events, so that none can be tested; give longer histories"
            )
        self.sequences, self.left_out = sequences, len(sequences) - len(users)
        self.validation = HeldOut(sequences, users, sequences.starts[users + 1] - 2)
        self.test = HeldOut(sequences, users, sequences.starts[users + 1] - 1)
        self._stops = sequences.starts[1:].copy()
        self._stops[users] -= 2

    @property
    def tied_test_events(self) -> int:
        """Test events of the very time of the validation event before them: only their order in the file says which of
        the two is the test, and whoever compares figures must have the same order."""
        hours = self.sequences.hours
        return int((hours[self.test.events] == hours[self.validation.events]).sum())

    @property
    def n_training_events(self) -> int:
        """Events that are trained on."""
        return int((self._stops - self.sequences.starts[:-1]).sum())

    def training_matrix(self) -> Any:
        """(U, I) CSR of float64, 1 where a user has a title in the training part."""
        sequences = self.sequences
        place = np.arange(sequences.n_events) - np.repeat(sequences.starts[:-1], sequences.lengths)
        trained = place < np.repeat(self._stops - sequences.starts[:-1], sequences.lengths)
        starts = np.append(0, np.cumsum(self._stops - sequences.starts[:-1]))
        shape = (len(sequences), sequences.n_titles)
        return sparse.csr_array((np.ones(starts[-1]), sequences.titles[trained], starts), shape=shape)

    def counts(self) -> NDArray[np.int64]:
        """(I,) how often each title is in the training part."""
        return np.bincount(self.training_matrix().indices, minlength=self.sequences.n_titles)

    def training_windows(self, length: int) -> Observations:
        """The training part in windows of up to ``length`` events, a row each: the last ``length`` events of each user,
        those before, and so on, so that every event is learned once an epoch.

        Raises:
            ConfigError: a length below 2, of which nothing could be learned.
        """
        if length < 2:
            raise ConfigError(f"windows must have 2 events or more, got {length}")
        starts, stops = self.sequences.starts[:-1], self._stops
        per_user = -(-(stops - starts) // length)
        number = np.arange(per_user.sum()) - np.repeat(np.cumsum(per_user) - per_user, per_user)
        ends = np.repeat(stops, per_user) - number * length
        return self.sequences.windows(np.maximum(np.repeat(starts, per_user), ends - length), ends)


# -- ranking -----------------------------------------------------------------------------------------------------


class Figure(NamedTuple):
    """A mean over users, and its standard error."""

    mean: float
    error: float


def ranks(scorer: Scorer, held_out: HeldOut, exclude_seen: bool = True) -> NDArray[np.int64]:
    """(n,) ranks, from 1, of what the users did next among all titles; of equal scores the lower index comes first, as
    in `recsim_gr.metrics.rank_of`.

    Args:
        scorer: whose.
        held_out: users, and what they did next.
        exclude_seen: whether titles of the history are left out. Not in some public figures: RecBole, say, ranks them
            with the others where a model is sequential.
    """
    found = []
    for start in range(0, len(held_out), USERS_AT_ONCE):
        rows = slice(start, start + USERS_AT_ONCE)
        scores = np.array(scorer(held_out, rows), dtype=np.float64)
        if exclude_seen:
            scores[held_out.seen(rows)] = -np.inf
        found.append(rank_of(scores, held_out.titles[rows]))
    return np.concatenate(found)


def ranking_figures(found: NDArray[np.int64], k: int = 10) -> dict[str, Figure]:
    """HR@k, NDCG@k and MRR of ranks, over users."""
    metrics = {f"HR@{k}": hit_rate(found, k), f"NDCG@{k}": ndcg(found, k), "MRR": reciprocal_rank(found)}
    return {name: _figure(values) for name, values in metrics.items()}


def _figure(values: NDArray[np.float64]) -> Figure:
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return Figure(float(values.mean()), error)


def backbone_scorer(backbone: Backbone) -> Scorer:
    """What a backbone thinks of all titles after as much of the history as it has positions for: N − 1 events, since
    the first position is that of the opening token."""

    def score(held_out: HeldOut, rows: slice) -> NDArray[np.float64]:
        scores: NDArray[np.float64] = _logits(backbone, held_out, rows).double().cpu().numpy()
        return scores

    return score


def held_out_nll(backbone: Backbone, held_out: HeldOut) -> float:
    """Mean −log π(what came next | history), in nats, over all titles that the user had not seen; no gradients."""
    total = 0.0
    for start in range(0, len(held_out), USERS_AT_ONCE):
        rows = slice(start, start + USERS_AT_ONCE)
        logits = _logits(backbone, held_out, rows)
        seen_rows, seen_titles = (torch.from_numpy(x).to(logits.device) for x in held_out.seen(rows))
        logits[seen_rows, seen_titles] = -torch.inf
        titles = torch.from_numpy(held_out.titles[rows]).to(logits.device)
        total += torch.nn.functional.cross_entropy(logits, titles, reduction="sum").item()
    return total / len(held_out)


@torch.no_grad()
def _logits(backbone: Backbone, held_out: HeldOut, rows: slice) -> torch.Tensor:
    was_training = backbone.training
    backbone.eval()
    device = backbone.titles.device
    contexts = held_out.contexts(rows, max(1, backbone.config.max_length - 1))
    logits = backbone.logits(backbone.encode_last(*(x.to(device) for x in tensors(contexts))))
    backbone.train(was_training)
    return logits.float()
