"""The interaction log: everything an algorithm may see, and nothing else."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsim_gr.catalogue import Catalogue
from recsim_gr.errors import ConfigError, LogFormatError, MissingPropensitiesError
from recsim_gr.files import atomic_path
from recsim_gr.observations import HIGHEST_SCORE, LOWEST_SCORE, Observations
from recsim_gr.shards import FORMAT, METADATA_KEY, ShardDirectory, checked_columns

SCHEMA_VERSION = 2  # 2: the catalogue

COLUMNS: dict[str, type[np.generic]] = {
    "user": np.int64,
    "epoch": np.int64,
    "step": np.int64,
    "hours": np.float32,
    "title": np.int64,
    "duration_minutes": np.float32,
    "watch_minutes": np.float32,
    "score": np.float32,
}
"""The columns of a log and their types, in order."""


@dataclass(frozen=True, eq=False)
class InteractionLog:
    """Logged events, a row each: the events of a user stand together, in the order in which they happened.

    Construction goes through `check_log`; the arrays are copied (unless they own their memory, have the right type and
    are frozen already) and cannot be written to.

    Attributes:
        user, epoch, step: (E,) int64; ``step`` counts a user's events from 0.
        hours: (E,) float32; since the user's epoch began.
        title: (E,) int64 in [0, n_titles); no title twice for a user.
        duration_minutes, watch_minutes: (E,) float32.
        score: (E,) float32; in [1, 5] where ``bounded_scores``.
        n_titles: the size of the catalogue, I.
        bounded_scores: whether the noise model keeps scores in [1, 5].
        propensities: (E,) float64, the logging policy's probability of each event given the titles before it; None
            when the log was made without exposing them.
        catalogue: public metadata of the titles; None for a log that came without.
        provenance: where the log comes from, as JSON values (a world's config); for people, not for algorithms.

    Raises:
        LogFormatError: not a legal log; says which row and what would do.
    """

    user: NDArray[np.int64]
    epoch: NDArray[np.int64]
    step: NDArray[np.int64]
    hours: NDArray[np.float32]
    title: NDArray[np.int64]
    duration_minutes: NDArray[np.float32]
    watch_minutes: NDArray[np.float32]
    score: NDArray[np.float32]
    n_titles: int
    bounded_scores: bool = True
    propensities: NDArray[np.float64] | None = None
    provenance: dict[str, Any] | None = None
    catalogue: Catalogue | None = None

    def __post_init__(self) -> None:
        for name, kind in COLUMNS.items():
            object.__setattr__(self, name, _frozen(getattr(self, name), kind, name))
        if self.propensities is not None:
            object.__setattr__(self, "propensities", _frozen(self.propensities, np.float64, "propensities"))
        check_log(self)

    def __len__(self) -> int:
        return len(self.user)

    @property
    def n_users(self) -> int:
        """How many users the log holds."""
        return int((self.step == 0).sum())

    def sequences(self) -> Observations:
        """The log as one row a user: (U, L) arrays, padded behind as `Observations` are, L the longest history."""
        starts = np.flatnonzero(self.step == 0)
        lengths = np.diff(np.append(starts, len(self)))
        shape = (len(starts), int(lengths.max(initial=0)))
        rows = np.repeat(np.arange(len(starts)), lengths)
        titles = np.full(shape, self.n_titles, dtype=np.int64)
        scores, times = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
        for dense, column in ((titles, self.title), (scores, self.score), (times, self.hours)):
            dense[rows, self.step] = column
        return Observations(titles, scores, times, lengths, self.epoch[starts], self.n_titles, self.catalogue)

    def rows(self, rows: slice) -> "InteractionLog":
        """A part of the log; it must cut between users, or it is no legal log."""
        columns = {name: getattr(self, name)[rows] for name in COLUMNS}
        propensities = None if self.propensities is None else self.propensities[rows]
        return replace(self, **columns, propensities=propensities)

    def require_propensities(self) -> NDArray[np.float64]:
        """The propensities.

        Raises:
            MissingPropensitiesError: the log was made without them.
        """
        if self.propensities is None:
            raise MissingPropensitiesError(
                "this log carries no propensities; make it with generate_log(..., expose_propensities=True)"
            )
        return self.propensities

    def write(self, path: str | Path) -> None:
        """Writes one Parquet file, whole or not at all.

        Raises:
            RunDirectoryError: the file cannot be written.
        """
        columns = {name: getattr(self, name) for name in COLUMNS}
        if self.propensities is not None:
            columns["propensity"] = self.propensities
        about = {
            "schema_version": SCHEMA_VERSION,
            "n_titles": self.n_titles,
            "bounded_scores": self.bounded_scores,
            "provenance": self.provenance,
            "catalogue": None if self.catalogue is None else self.catalogue.to_json(),
        }
        table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(about)})
        with atomic_path(Path(path)) as temporary:
            # a checksum a page: without it one flipped bit in three is read back as other data
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)

    @classmethod
    def read(cls, path: str | Path) -> "InteractionLog":
        """Reads what `write` wrote; runs no code from the file.

        Raises:
            LogFormatError: missing, truncated, foreign, of another schema version, or not a legal log.
        """
        try:
            # memory_map off, one file: a reader must not fail later because the file went away
            file = pq.ParquetFile(Path(path), memory_map=False, page_checksum_verification=True)
            table = file.read()
            names = table.column_names
        except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: a name that is not UTF-8
            reason = str(error).splitlines()[0]
            raise LogFormatError(
                f"{path} cannot be read as a Parquet log ({reason}); write it with InteractionLog.write"
            ) from error
        about = _metadata(table, path)
        wanted = [*COLUMNS, *(["propensity"] if "propensity" in names else [])]
        arrays = checked_columns(table, wanted, path)
        propensities = arrays.pop("propensity", None)
        return cls(
            **arrays,
            propensities=propensities,
            n_titles=about["n_titles"],
            bounded_scores=about["bounded_scores"],
            provenance=about["provenance"],
            catalogue=None if about["catalogue"] is None else Catalogue.from_json(about["catalogue"]),
        )

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> "InteractionLog | ShardedLog":
        """Opens a log on disk: a directory in shards lazily, a file that `write` wrote whole.

        Args:
            path: what `recsim-gr generate` made, or a Parquet file.
            verify: whether the sha256 of a shard is checked when it is first read.

        Raises:
            LogFormatError: missing, damaged, foreign, not finished, or of another schema version; names the file.
        """
        if not Path(path).is_dir():
            return cls.read(path)
        return ShardedLog(ShardDirectory(Path(path), verify))


class _Piece(NamedTuple):
    """Some users of a part of a shard, those from ``start`` to ``stop`` by their place in it."""

    shard: int
    part: int
    start: int
    stop: int


class ShardedLog:
    """A log in shards on disk, which `recsim-gr generate` makes and `InteractionLog.open` opens.

    It knows the facts of the log and reads its events a part of some thousand users at a time::

        for part in recsim_gr.InteractionLog.open("logs"):  # each a checked InteractionLog
            print(part.score.mean())

    ``pretrain``, ``fit_reward_ensemble`` and the agents that keep no table of the whole log learn from it as it is,
    and others (`PPO` apart) where ``RewardEnsemble.tables_in`` says where to keep the table.

    Attributes:
        n_titles: the size of the catalogue, I.
        bounded_scores: whether the noise model keeps scores in [1, 5].
        provenance: where the log comes from, as JSON values (a world's config); for people, not for algorithms.
        catalogue: public metadata of the titles.
        has_propensities: whether its parts carry propensities.
        longest: the length of its longest history.
    """

    def __init__(self, directory: ShardDirectory, pieces: list[_Piece] | None = None) -> None:
        manifest = directory.manifest
        self._directory, self._pieces = directory, _all_pieces(directory) if pieces is None else pieces
        self.n_titles, self.bounded_scores = manifest.n_titles, manifest.bounded_scores
        self.provenance: dict[str, Any] = manifest.identity["provenance"]
        self.catalogue = directory.catalogue
        self.has_propensities = bool(manifest.identity["propensities"])
        self.longest = max(shard.longest for shard in manifest.shards)

    def __len__(self) -> int:
        return self._n_events

    @cached_property
    def _n_events(self) -> int:
        """Where a part is cut, it must be read to know how many events are left of it."""
        events = 0
        for number, piece in enumerate(self._pieces):
            whole = piece.stop - piece.start == self._users_in(piece)
            shard = self._directory.manifest.shards[piece.shard]
            events += shard.parts[piece.part] if whole else len(self.part(number))
        return events

    @property
    def n_users(self) -> int:
        """How many users the log holds."""
        return sum(self.part_users)

    @property
    def size(self) -> int:
        """Bytes on disk of all files of the log."""
        return sum(record.bytes for record in self._directory.manifest.files)

    @property
    def fingerprint(self) -> str:
        """A sha256 of everything in it, from those of its files."""
        manifest = self._directory.manifest
        about = [manifest.n_titles, [file.sha256 for file in manifest.files], [list(piece) for piece in self._pieces]]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    @property
    def part_users(self) -> list[int]:
        """How many users each part holds."""
        return [piece.stop - piece.start for piece in self._pieces]

    def part(self, number: int) -> InteractionLog:
        """The part with that number, checked as every log is.

        Raises:
            LogFormatError: its shard is missing, damaged or another log's, or what it holds is no legal log.
        """
        piece = self._pieces[number]
        columns = self._directory.part(piece.shard, piece.part)
        log = self._log(columns)
        if log.n_users != self._users_in(piece):
            file = self._directory.manifest.shards[piece.shard].file
            raise LogFormatError(f"{self._directory.path / file} lacks users that its manifest says it has")
        if log.n_users == piece.stop - piece.start:
            return log
        cuts = np.append(np.flatnonzero(log.step == 0), len(log))
        return log.rows(slice(int(cuts[piece.start]), int(cuts[piece.stop])))

    def __iter__(self) -> Iterator[InteractionLog]:
        return (self.part(number) for number in range(len(self._pieces)))

    def read(self) -> InteractionLog:
        """The whole log in memory, about 60 bytes an event, and three times that while it is read.

        Raises:
            LogFormatError: as for `part`.
        """
        parts: list[dict[str, NDArray[Any]]] = []
        for part in self:
            columns = {name: getattr(part, name) for name in COLUMNS}
            parts.append(columns if part.propensities is None else {**columns, "propensity": part.propensities})
        return self._log({name: np.concatenate([columns[name] for columns in parts]) for name in parts[0]})

    def users(self, start: int, stop: int) -> "ShardedLog":
        """The log of some of its users, those from ``start`` to ``stop`` by their place in it; nothing is read.

        Raises:
            ConfigError: no such users.
        """
        if not 0 <= start < stop <= self.n_users:
            raise ConfigError(f"users {start} to {stop} of a log of {self.n_users}: must be some of them")
        pieces, before = [], 0
        for piece in self._pieces:
            first, last = max(start - before, 0), min(stop - before, piece.stop - piece.start)
            if first < last:
                pieces.append(piece._replace(start=piece.start + first, stop=piece.start + last))
            before += piece.stop - piece.start
        return ShardedLog(self._directory, pieces)

    def _users_in(self, piece: _Piece) -> int:
        return _users_of_part(self._directory, piece.shard, piece.part)

    def _log(self, columns: dict[str, NDArray[Any]]) -> InteractionLog:
        propensities = columns.pop("propensity", None)
        return InteractionLog(
            **columns,
            propensities=propensities,
            n_titles=self.n_titles,
            bounded_scores=self.bounded_scores,
            provenance=self.provenance,
            catalogue=self.catalogue,
        )

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            if name in (*COLUMNS, "propensities", "require_propensities", "sequences", "rows", "write"):
                raise ConfigError(
                    f"a log in shards has no {name!r} in memory; read() it first, or go through its parts"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


AnyLog = InteractionLog | ShardedLog
"""What can be learned from."""


def title_counts(log: AnyLog) -> NDArray[np.int64]:
    """(I,): how many events each title has; a log in shards is read once, a part at a time."""
    counts = np.zeros(log.n_titles, dtype=np.int64)
    for part in log if isinstance(log, ShardedLog) else [log]:
        counts += np.bincount(part.title, minlength=log.n_titles)
    return counts


def _all_pieces(directory: ShardDirectory) -> list[_Piece]:
    return [
        _Piece(shard, part, 0, _users_of_part(directory, shard, part))
        for shard, record in enumerate(directory.manifest.shards)
        for part in range(len(record.parts))
    ]


def _users_of_part(directory: ShardDirectory, shard: int, part: int) -> int:
    each = directory.manifest.users_per_part
    return min(each, directory.manifest.shards[shard].users - part * each)


def check_log(log: InteractionLog) -> None:
    """What a legal log is; every log, made or read, goes through here.

    Raises:
        LogFormatError: names the column, the first offending row, what stands there and what would do.
    """
    if not isinstance(log.n_titles, int) or log.n_titles < 1:
        raise LogFormatError(f"n_titles of a log must be a positive integer, got {log.n_titles!r}")
    lengths = {name: len(getattr(log, name)) for name in COLUMNS}
    if log.propensities is not None:
        lengths["propensities"] = len(log.propensities)
    if len(set(lengths.values())) > 1:
        raise LogFormatError(f"the columns of a log must be equally long, got {lengths}")
    if len(log) == 0:
        return
    for name in ("hours", "duration_minutes", "watch_minutes", "score"):
        _refuse(log, name, ~np.isfinite(getattr(log, name)), "a finite number")
    _refuse(log, "user", log.user < 0, "a user id of 0 or more")
    _refuse(log, "epoch", log.epoch < 0, "an epoch of 0 or more")
    _refuse(log, "title", (log.title < 0) | (log.title >= log.n_titles), f"in 0 to {log.n_titles - 1}")
    _refuse(log, "hours", log.hours < 0, "0 or more")
    _refuse(log, "duration_minutes", log.duration_minutes <= 0, "more than 0")
    too_long = log.watch_minutes > log.duration_minutes * (1 + 1e-5)
    _refuse(log, "watch_minutes", (log.watch_minutes < 0) | too_long, "between 0 and the duration")
    if log.bounded_scores:
        outside = (log.score < LOWEST_SCORE) | (log.score > HIGHEST_SCORE)
        _refuse(log, "score", outside, "between 1 and 5")
    if log.propensities is not None:
        illegal = ~((log.propensities > 0) & (log.propensities <= 1))
        _refuse(log, "propensities", illegal, "in (0, 1]")
    _check_catalogue(log)
    _check_histories(log)


def _check_catalogue(log: InteractionLog) -> None:
    """One entry a title, and nothing watched before it was out."""
    if log.catalogue is None:
        return
    if len(log.catalogue) != log.n_titles:
        raise LogFormatError(f"the catalogue of a log must have its {log.n_titles} titles, got {len(log.catalogue)}")
    early = log.catalogue.release[log.title] > log.epoch
    _refuse(log, "title", early, "one that is out in the epoch of the event")


def _check_histories(log: InteractionLog) -> None:
    """Events of a user together, steps from 0 upward, times in order, one epoch, no title twice."""
    starts = np.append(True, log.user[1:] != log.user[:-1])
    first = np.flatnonzero(starts)
    lengths = np.diff(first, append=len(log))
    position = np.arange(len(log)) - np.repeat(first, lengths)
    _refuse(log, "step", log.step != position, "0, 1, 2, … along the events of each user")
    _, index, counts = np.unique(log.user[first], return_index=True, return_counts=True)
    split = np.zeros(len(log), dtype=bool)
    split[first[index[counts > 1]]] = True
    _refuse(log, "user", split, "a user whose events stand together")
    inside = ~starts[1:]
    backward = np.append(False, inside & (log.hours[1:] < log.hours[:-1]))
    _refuse(log, "hours", backward, "no earlier than the event before")
    moved = np.append(False, inside & (log.epoch[1:] != log.epoch[:-1]))
    _refuse(log, "epoch", moved, "the same for all events of a user")
    if _repeats_a_title(log.title, first, lengths):
        history = np.cumsum(starts)
        order = np.lexsort((log.title, history))
        again = np.append(False, (np.diff(log.title[order]) == 0) & (np.diff(history[order]) == 0))
        repeated = np.zeros(len(log), dtype=bool)
        repeated[order] = again
        _refuse(log, "title", repeated, "a title that this user has not seen before")


def _repeats_a_title(title: NDArray[np.int64], first: NDArray[np.int64], lengths: NDArray[np.int64]) -> bool:
    """Whether any history has a title twice. Histories of one length are sorted side by side, a row each, which is
    many times cheaper than sorting all events; where lengths vary that is a sort a length."""
    for length in np.unique(lengths):
        rows = first[lengths == length]
        if len(rows) == len(first):
            ordered = np.sort(title.reshape(-1, length), axis=1)
        else:
            ordered = np.sort(title[rows[:, None] + np.arange(length)], axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            return True
    return False


def _refuse(log: InteractionLog, name: str, illegal: NDArray[np.bool_], would_do: str) -> None:
    if illegal.any():
        row = int(np.argmax(illegal))
        got = getattr(log, name)[row]
        raise LogFormatError(f"row {row} of the log: {name} must be {would_do}, got {got}")


def _frozen(values: Any, kind: type[np.generic], name: str) -> NDArray[Any]:
    array = np.asarray(values)
    if (
        array.ndim != 1
        or array.dtype.kind not in "iuf"
        or (array.dtype.kind == "f" and np.issubdtype(kind, np.integer))
    ):
        expected = f"a one-dimensional array of {np.dtype(kind)}"
        raise LogFormatError(f"column {name!r} of a log must be {expected}, got {array.dtype} of {array.shape}")
    if array.dtype == kind and array.base is None and not array.flags.writeable:
        return array  # whoever made it has frozen it for us
    copy = array.astype(kind, copy=True)
    copy.flags.writeable = False
    return copy


def _metadata(table: pa.Table, path: str | Path) -> dict[str, Any]:
    try:
        about = json.loads((table.schema.metadata or {})[METADATA_KEY])
        if about.get("format") == FORMAT:
            raise LogFormatError(f"{path} is one shard of a log; give InteractionLog.open its directory")
        version = about["schema_version"]
        if version == SCHEMA_VERSION:
            return {key: about[key] for key in ("n_titles", "bounded_scores", "provenance", "catalogue")}
    except LogFormatError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        message = f"{path} is Parquet, but not a log of recsim_gr: its metadata is missing or foreign"
        raise LogFormatError(message) from error
    raise LogFormatError(f"{path} has log schema version {version}; this version reads {SCHEMA_VERSION}")
