"""Histories of a log as tensors: all of them in memory, or from disk a few parts of a log in shards at a time."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import NamedTuple, overload

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from recsim_gr.catalogue import Catalogue
from recsim_gr.errors import ConfigError
from recsim_gr.log import AnyLog, InteractionLog, ShardedLog
from recsim_gr.observations import Observations
from recsim_gr.randomness import generator


class Batch(NamedTuple):
    """Histories of B users of up to T events, as tensors.

    Attributes:
        rows: (B,) which users of the log.
        titles: (B, T) int64, padding n_titles.
        scores, times: (B, T) float32.
        valid: (B, T) bool, false on padding.
        unreleased: (B, I) bool, the titles that are not out yet; None where all are.
    """

    rows: Tensor
    titles: Tensor
    scores: Tensor
    times: Tensor
    valid: Tensor
    unreleased: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return Batch(*(None if part is None else part.to(device) for part in self))  # type: ignore[arg-type]


class HistorySource(ABC):
    """Where training gets its histories from.

    Attributes:
        n_titles: the size of the catalogue, I.
    """

    n_titles: int

    @abstractmethod
    def __len__(self) -> int:
        """How many users."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """The length of the longest history."""

    @property
    @abstractmethod
    def mean_score(self) -> float:
        """The mean score of all events."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """The sha256 of everything in it: equal histories have equal ones."""

    @abstractmethod
    def batches(self, size: int, rng: np.random.Generator, skip: int = 0) -> Iterator[Batch]:
        """Batches without end, of ``size`` users or of all where there are fewer: every user once an epoch, in a new
        order each time; a remainder is left out.

        Args:
            size: users of a batch.
            rng: draws the orders.
            skip: batches that are passed over, as if they had been taken, without being loaded.
        """

    @abstractmethod
    def chunks(self, users: int = 256) -> Iterator[Batch]:
        """All histories in order, ``users`` at a time."""

    @abstractmethod
    def resampled(self, seed: int, purpose: str) -> "HistorySource":
        """As many users, drawn from these with replacement, the same ones for the same arguments."""


class Histories(HistorySource):
    """A log as tensors, a row a user.

    Args:
        log: anything but an empty one; or its histories as observations, which is what real sequences come as.

    Raises:
        ConfigError: the log is empty, or in shards.
    """

    def __init__(self, log: InteractionLog | Observations) -> None:
        if len(log) == 0:
            raise ConfigError("the log is empty; generate_log(n_users=...) makes one with events")
        self.observations = obs = log if isinstance(log, Observations) else log.sequences()
        self.n_titles = log.n_titles
        self.titles, self.scores, self.times = tensors(obs)
        self.valid = torch.arange(self.titles.shape[1]) < torch.from_numpy(obs.length)[:, None]

    def __len__(self) -> int:
        return len(self.titles)

    @property
    def longest(self) -> int:
        """The length of the longest history."""
        return self.titles.shape[1]

    @property
    def mean_score(self) -> float:
        return float(self.scores[self.valid].mean())

    @cached_property
    def fingerprint(self) -> str:
        obs = self.observations
        about = [self.n_titles, self.titles.shape, None if obs.catalogue is None else obs.catalogue.to_json()]
        columns = [x.numpy() for x in (self.titles, self.scores, self.times, self.valid)]
        return _sha256(about, *columns, np.ascontiguousarray(obs.epoch))

    def batch(self, rows: Tensor) -> Batch:
        """The histories at ``rows``."""
        unreleased = _unreleased(self.observations.catalogue, self.observations.epoch[rows.numpy()])
        return Batch(rows, self.titles[rows], self.scores[rows], self.times[rows], self.valid[rows], unreleased)

    def batches(self, size: int, rng: np.random.Generator, skip: int = 0) -> Iterator[Batch]:
        return map(self.batch, islice(_endless_rows(len(self), size, rng), skip, None))

    def chunks(self, users: int = 256) -> Iterator[Batch]:
        for rows in torch.arange(len(self)).split(users):
            yield self.batch(rows)

    def resampled(self, seed: int, purpose: str) -> HistorySource:
        drawn = generator(seed, purpose).integers(len(self), size=len(self))
        return _Rows(self, torch.from_numpy(drawn))


class _Rows(HistorySource):
    """Users at some rows of other histories, repeats allowed, sharing their memory."""

    def __init__(self, histories: Histories, rows: Tensor) -> None:
        self.histories, self.rows, self.n_titles = histories, rows, histories.n_titles

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def longest(self) -> int:
        return self.histories.longest

    @property
    def mean_score(self) -> float:
        batch = self.histories.batch(self.rows)
        return float(batch.scores[batch.valid].mean())

    @cached_property
    def fingerprint(self) -> str:
        return _sha256(self.histories.fingerprint, self.rows.numpy())

    def batches(self, size: int, rng: np.random.Generator, skip: int = 0) -> Iterator[Batch]:
        orders = islice(_endless_rows(len(self), size, rng), skip, None)
        return (self.histories.batch(self.rows[places]) for places in orders)

    def chunks(self, users: int = 256) -> Iterator[Batch]:
        return map(self.histories.batch, self.rows.split(users))

    def resampled(self, seed: int, purpose: str) -> HistorySource:
        drawn = generator(seed, purpose).integers(len(self), size=len(self))
        return _Rows(self.histories, self.rows[torch.from_numpy(drawn)])


WINDOW_PARTS = 4
"""Parts of a log in shards that are shuffled together. Users do not depend on each other or on their place, so that a
window as large as hundreds of batches (four parts of 4,096 users) mixes as well as the whole; it takes some ten MB."""


class _Loaded(NamedTuple):
    """Users of a log in shards that are in memory: a `Batch`, but for what a large catalogue makes large."""

    rows: Tensor
    titles: Tensor
    scores: Tensor
    times: Tensor
    valid: Tensor
    epoch: Tensor

    def at(self, rows: Tensor | slice) -> "_Loaded":
        """Some of them."""
        return _Loaded(*(column[rows] for column in self))

    def batch(self, catalogue: Catalogue) -> Batch:
        """All of them, as training takes them."""
        unreleased = _unreleased(catalogue, self.epoch.numpy())
        return Batch(self.rows, self.titles, self.scores, self.times, self.valid, unreleased)


class ShardedHistories(HistorySource):
    """A log in shards, of which a few parts are in memory at a time.

    An epoch goes through the parts in a new order, `WINDOW_PARTS` at a time: their users are shuffled together and
    handed out; what does not fill a batch goes into the next window. The order follows from the generator that
    `batches` is given, and every user comes once an epoch, as from `Histories`, though not in the same order.

    Args:
        log: the log in shards, or some of its users.
        resample: (seed, purpose) of a resample of the users, if any: each part draws from its own users, as often as
            it has users, so that a part is always the same.
    """

    def __init__(self, log: ShardedLog, resample: tuple[int, str] | None = None) -> None:
        self.log, self.n_titles, self._resample = log, log.n_titles, resample
        self._starts = np.append(0, np.cumsum(log.part_users))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def longest(self) -> int:
        """The longest history of the whole log, also where only some of its users are here."""
        return self.log.longest

    @cached_property
    def mean_score(self) -> float:
        """The mean score of all events; reads the log once."""
        total, events = 0.0, 0
        for part in range(len(self._starts) - 1):
            loaded = self._load(part)
            total += loaded.scores[loaded.valid].sum(dtype=torch.float64).item()
            events += int(loaded.valid.sum())
        return total / events

    @property
    def fingerprint(self) -> str:
        """From the checksums of its files."""
        return _sha256([self.log.fingerprint, self._resample])

    def batches(self, size: int, rng: np.random.Generator, skip: int = 0) -> Iterator[Batch]:
        size = min(size, len(self))
        held = None
        for places in self._windows(size, rng):
            full = len(places) // size * size
            if skip * size >= full:
                skip, held = skip - full // size, None
                continue
            window = self._at(places, held)
            for first in range(skip * size, full, size):
                yield window.at(slice(first, first + size)).batch(self.log.catalogue)
            skip, held = 0, (places[full:], window.at(torch.arange(full, len(places))))

    def _windows(self, size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
        """The places of the users of each window, in the order in which they are handed out; nothing is read."""
        n_parts = len(self._starts) - 1
        while True:
            order, left = rng.permutation(n_parts), np.empty(0, dtype=np.int64)
            for start in range(0, n_parts, WINDOW_PARTS):
                parts = order[start : start + WINDOW_PARTS]
                new = [np.arange(self._starts[part], self._starts[part + 1]) for part in parts]
                places = np.concatenate([left, *new])
                places = places[rng.permutation(len(places))]
                yield places
                left = places[len(places) // size * size :]

    def _at(self, places: NDArray[np.int64], held: tuple[NDArray[np.int64], _Loaded] | None) -> _Loaded:
        """The users at those places, out of some that are in memory and of the parts that hold the others."""
        there = [] if held is None else [held]
        missing = places if held is None else places[~np.isin(places, held[0])]
        parts = np.unique(np.searchsorted(self._starts, missing, side="right") - 1).tolist()
        there += [(np.arange(self._starts[part], self._starts[part + 1]), self._load(part)) for part in parts]
        every = np.concatenate([at for at, _ in there])
        order = np.argsort(every)
        rows = order[np.searchsorted(every, places, sorter=order)]
        return _joined([loaded for _, loaded in there]).at(torch.from_numpy(rows))

    def chunks(self, users: int = 256) -> Iterator[Batch]:
        for part in range(len(self._starts) - 1):
            loaded = self._load(part)
            for start in range(0, len(loaded.rows), users):
                yield loaded.at(slice(start, start + users)).batch(self.log.catalogue)

    def resampled(self, seed: int, purpose: str) -> HistorySource:
        return ShardedHistories(self.log, (seed, purpose))

    def _load(self, part: int) -> _Loaded:
        """All users of a part, padded to the longest history of the log."""
        histories = Histories(self.log.part(part))
        n = len(histories)
        rows = torch.arange(n)
        if self._resample is not None:
            seed, purpose = self._resample
            rows = torch.from_numpy(generator(seed, f"{purpose} of part {part}").integers(n, size=n))
        wider = (0, self.longest - histories.longest)
        return _Loaded(
            rows + int(self._starts[part]),
            F.pad(histories.titles[rows], wider, value=self.n_titles),
            F.pad(histories.scores[rows], wider),
            F.pad(histories.times[rows], wider),
            F.pad(histories.valid[rows], wider),
            torch.from_numpy(histories.observations.epoch)[rows],
        )


def _joined(loaded: list[_Loaded]) -> _Loaded:
    return _Loaded(*(torch.cat(columns) for columns in zip(*loaded, strict=True)))


def _unreleased(catalogue: Catalogue | None, epoch: NDArray[np.int64]) -> Tensor | None:
    """(B, I): the titles that are not out yet; None where all are."""
    if catalogue is None or not catalogue.has_releases:
        return None
    return torch.from_numpy(catalogue.unreleased(epoch))


def histories_of(log: AnyLog) -> HistorySource:
    """A log's histories: as tensors, or from disk a few parts at a time.

    Raises:
        ConfigError: the log is empty.
    """
    return ShardedHistories(log) if isinstance(log, ShardedLog) else Histories(log)


def tensors(observations: Observations) -> tuple[Tensor, Tensor, Tensor]:
    """Titles, scores and times of observations, sharing their memory."""
    return tuple(  # type: ignore[return-value]
        torch.from_numpy(np.ascontiguousarray(x))
        for x in (observations.titles, observations.scores, observations.times)
    )


MOST_VALIDATION_USERS = 8_192
"""Held out of a log in shards at most: their 160,000 events give the objective to half a percent, and it is measured
several times a run."""


@overload
def split_logs(log: InteractionLog, validation: InteractionLog | None) -> tuple[InteractionLog, InteractionLog]: ...


@overload
def split_logs(log: AnyLog, validation: AnyLog | None) -> tuple[AnyLog, AnyLog]: ...


def split_logs(log: AnyLog, validation: AnyLog | None) -> tuple[AnyLog, AnyLog]:
    """Training and validation logs: the two given, or nine tenths and one tenth of the users of the one.

    Of a log in shards at most `MOST_VALIDATION_USERS` are held out, its last ones.

    Raises:
        ConfigError: a log too short to be split, or logs over different catalogues.
    """
    if validation is not None:
        if validation.n_titles != log.n_titles:
            raise ConfigError(
                f"the validation log has {validation.n_titles} titles and the training log {log.n_titles}; "
                "both must come from one world"
            )
        return log, validation
    n = log.n_users
    if n < 2:
        raise ConfigError(f"a log of {n} users cannot be split; give a validation log, or more users")
    held_out = max(1, n // 10)
    if isinstance(log, ShardedLog):
        cut = n - min(held_out, MOST_VALIDATION_USERS)
        return log.users(0, cut), log.users(cut, n)
    event = int(np.flatnonzero(log.step == 0)[n - held_out])
    return log.rows(slice(0, event)), log.rows(slice(event, len(log)))


def _endless_rows(n: int, size: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Batches of user rows: every user once an epoch, in a new order each time; a remainder is left out."""
    size = min(size, n)
    while True:
        order = torch.from_numpy(rng.permutation(n))
        yield from order[: n // size * size].split(size)


def _sha256(about: object, *arrays: NDArray[np.generic]) -> str:
    """Of JSON values and the bytes of arrays, whose shapes and types the values decide."""
    found = hashlib.sha256(json.dumps(about).encode())
    for array in arrays:
        found.update(array.data)
    return found.hexdigest()
