"""Real sequences from text files: who met what, when, and how it was rated.

Two formats, told apart by the file's name:

- RecBole's atomic files (``.inter``): fields between tabs, a header of ``name:type``;
- anything else: comma-separated values with a header, such as the ``ratings.csv`` of MovieLens.

`NAMES` says which columns are read; others are passed over. A user's events are put in the order of their times, those
of equal time in the order of the file. Users and titles are numbered in the order in which the file first names them.
"""

import csv as plain_csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv

from recsim_gr.errors import ConfigError, DataFileError
from recsim_gr.observations import HIGHEST_SCORE, LOWEST_SCORE, Observations

NAMES = {
    "user": ("user", "user_id", "userId", "uid"),
    "title": ("title", "title_id", "item", "item_id", "itemId", "movie_id", "movieId", "iid"),
    "rating": ("rating", "score"),
    "timestamp": ("timestamp", "time"),
}
"""What the columns are called, the first that is there; all but the rating must be."""

TIME_UNITS = {"seconds": 3600.0, "milliseconds": 3_600_000.0, "hours": 1.0}
"""How many of them are an hour."""

MOST_HOURS = 1e7
"""Half of what a file may span, two thousand years: more is no time, or of another unit."""

REPEATS = ("refuse", "first")
"""What is done where a user meets a title again."""

NEUTRAL_SCORE = (LOWEST_SCORE + HIGHEST_SCORE) / 2
"""Of events without a rating: a token of a backbone that reads scores carries nothing then."""


@dataclass(frozen=True, eq=False)
class Sequences:
    """Histories of E events of U users, one behind the other; 24 bytes an event.

    Attributes:
        starts: (U + 1,) int64; the events of user u stand from ``starts[u]`` to ``starts[u + 1]``.
        titles: (E,) int64 in [0, I); no title twice for a user.
        scores: (E,) float32 in [1, 5]; `NEUTRAL_SCORE` where the file has no ratings.
        hours: (E,) float64 since the user's first event, not falling.
        user_names: (U,) strings, as the file names them.
        title_names: (I,) strings.
        has_ratings: whether the file has ratings.
        sha256: of the file, 64 hexadecimal digits.
        left_out: events that were repeats of a user and a title, and passed over.
        time_unit: that the file's timestamps were read in.
    """

    starts: NDArray[np.int64]
    titles: NDArray[np.int64]
    scores: NDArray[np.float32]
    hours: NDArray[np.float64]
    user_names: pa.Array
    title_names: pa.Array
    has_ratings: bool
    sha256: str
    left_out: int = 0
    time_unit: str = "seconds"

    def __len__(self) -> int:
        """How many users."""
        return len(self.starts) - 1

    @property
    def n_titles(self) -> int:
        """I."""
        return len(self.title_names)

    @property
    def n_events(self) -> int:
        """E."""
        return len(self.titles)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(U,) events of each user."""
        return np.diff(self.starts)

    def windows(self, first: NDArray[np.int64], stop: NDArray[np.int64]) -> Observations:
        """Stretches of events as rows, padded behind; times are hours since the first event of the row.

        Args:
            first, stop: (n,) the events of each row stand from one to the other; no row spans two users.
        """
        lengths = stop - first
        shape = (len(first), int(lengths.max(initial=0)))
        titles = np.full(shape, self.n_titles, dtype=np.int64)
        scores, times = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
        filled = np.arange(shape[1]) < lengths[:, None]
        events = (first[:, None] + np.arange(shape[1]))[filled]
        titles[filled], scores[filled] = self.titles[events], self.scores[events]
        # float32 hours since one's first event of years ago would blur a minute; since the row's own only where a row
        # spans years itself
        times[filled] = self.hours[events] - np.repeat(self.hours[np.minimum(first, self.n_events - 1)], lengths)
        return Observations(titles, scores, times, lengths, np.zeros(len(first), dtype=np.int64), self.n_titles)

    def observations(self, max_length: int = 0) -> Observations:
        """The last ``max_length`` events of every user, or all of them where it is 0: as wide as the longest history.

        Raises:
            ConfigError: a negative length.
        """
        if max_length < 0:
            raise ConfigError(f"max_length must be 0 or more, got {max_length}")
        first, stop = self.starts[:-1], self.starts[1:]
        return self.windows(first if max_length == 0 else np.maximum(first, stop - max_length), stop)


def read_sequences(path: str | Path, repeats: str = "refuse", time_unit: str = "seconds") -> Sequences:
    """Reads the sequences of a file.

    Ratings become scores in [1, 5]: as they are where all lie in there, else by the straight line that takes the lowest
    of the file to 1 and the highest to 5 (half stars do not start at 1).

    Args:
        path: an ``.inter`` file, or comma-separated values with a header.
        repeats: one of `REPEATS`: a user who meets a title again is an error, or only the first time counts. A backbone
            here never recommends what was seen, so that it cannot learn to repeat.
        time_unit: of the timestamps, one of `TIME_UNITS`.

    Raises:
        ConfigError: an unknown option.
        DataFileError: the file is missing, no text, empty, lacks a column, or has a line that cannot be read; names
            the file and the line.
    """
    if repeats not in REPEATS:
        raise ConfigError(f"repeats must be one of {', '.join(REPEATS)}, got {repeats!r}")
    if time_unit not in TIME_UNITS:
        raise ConfigError(f"time_unit must be one of {', '.join(TIME_UNITS)}, got {time_unit!r}")
    file = _TextFile(Path(path))
    table = file.read()
    users, titles = (_numbered(table.column(name)) for name in ("user", "title"))
    times = file.numbers(table, "timestamp")
    span = (times.max() / 2 - times.min() / 2) / TIME_UNITS[time_unit]  # of halves, which cannot overflow
    if span > MOST_HOURS:
        raise DataFileError(f"{path} spans {2 * span:.3g} hours; check its timestamps, which are read in {time_unit}")
    has_ratings = "rating" in file.columns
    scores = _scores(file.numbers(table, "rating")) if has_ratings else np.full(len(times), NEUTRAL_SCORE, np.float32)
    order = np.lexsort((times, users.numbers))  # stable: events of one time stay in the order of the file
    again = _repeats(users.numbers[order], titles.numbers[order], len(titles.names))
    if again.any() and repeats == "refuse":
        raise file.complaint(int(order[again].min()), "has a user and a title that an earlier event has", _KEEP_FIRST)
    kept = order[~again]
    user, hours = users.numbers[kept], times[kept] / TIME_UNITS[time_unit]
    starts = np.append(0, np.cumsum(np.bincount(user, minlength=len(users.names)))).astype(np.int64)
    return Sequences(
        starts=starts,
        titles=titles.numbers[kept].astype(np.int64),
        scores=scores[kept],
        hours=hours - hours[starts[:-1]][user],
        user_names=users.names,
        title_names=titles.names,
        has_ratings=has_ratings,
        sha256=file.sha256(),
        left_out=int(again.sum()),
        time_unit=time_unit,
    )


_KEEP_FIRST = 'repeats="first" (--repeats first) keeps the first of them'


class _Numbered(NamedTuple):
    """A column of names as numbers."""

    numbers: NDArray[np.int32]
    names: pa.Array


def _numbered(column: pa.ChunkedArray) -> _Numbered:
    whole = column.unify_dictionaries().combine_chunks()
    whole = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
    return _Numbered(whole.indices.to_numpy(zero_copy_only=False).astype(np.int32), whole.dictionary)


def _scores(ratings: NDArray[np.float64]) -> NDArray[np.float32]:
    low, high = ratings.min(), ratings.max()
    if not np.isfinite(np.float32(high) - np.float32(low)):
        raise DataFileError(f"ratings from {low:.3g} to {high:.3g} are too wide apart; check the column")
    if low < LOWEST_SCORE or high > HIGHEST_SCORE:
        span = high - low if high > low else 1.0
        ratings = LOWEST_SCORE + (HIGHEST_SCORE - LOWEST_SCORE) * (ratings - low) / span
    return ratings.astype(np.float32)


def _repeats(user: NDArray[np.int32], title: NDArray[np.int32], n_titles: int) -> NDArray[np.bool_]:
    """(E,) bool: events whose user met the title in an earlier row."""
    pairs = user.astype(np.int64) * n_titles + title
    order = np.argsort(pairs, kind="stable")
    again = np.zeros(len(pairs), dtype=bool)
    again[order[1:]] = pairs[order[1:]] == pairs[order[:-1]]
    return again


# -- files -------------------------------------------------------------------------------------------------------


class _TextFile:
    """A file of events being read; every complaint names it, and the line where there is one.

    Attributes:
        columns: what is read, by `NAMES`, and the header's name for it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.atomic = path, path.suffix == ".inter"
        self.delimiter = "\t" if self.atomic else ","
        try:
            with path.open("rb") as file:
                start = file.read(2**16)
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataFileError(f"{path} cannot be read ({reason}); give the path of a file of events") from error
        if not start.strip():
            raise DataFileError(f"{path} is empty; {_FORMATS}")
        if b"\0" in start:
            raise DataFileError(f"{path} is no text in UTF-8; {_FORMATS}")
        self.columns = self._columns(start)

    def _columns(self, start: bytes) -> dict[str, str]:
        try:
            header = start.lstrip(b"\xef\xbb\xbf").splitlines()[0].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._not_text(1) from error
        names = next(self._fields([header]))
        bare = [name.split(":")[0].strip() if self.atomic else name.strip() for name in names]
        if len(set(bare)) < len(bare):
            raise DataFileError(f"{self.path} line 1: a column is named twice; name each once")
        plain = dict(zip(bare, names, strict=True))
        found = {what: plain[name] for what, known in NAMES.items() for name in known[::-1] if name in plain}
        missing = [what for what in NAMES if what not in found and what != "rating"]
        if missing:
            known, between = ", ".join(NAMES[missing[0]]), "tabs" if self.atomic else "commas"
            raise DataFileError(
                f"{self.path} line 1: no column for the {missing[0]} among {', '.join(names)[:200]!r}; "
                f"it is found by one of the names {known}, with {between} between the fields"
            )
        return found

    def read(self) -> pa.Table:
        """The columns, by their names in `NAMES`; there is one row at least, and no empty name.

        Raises:
            DataFileError: a line that cannot be read.
        """
        names = pa.dictionary(pa.int32(), pa.string())
        kinds = {"user": names, "title": names, "rating": pa.float64(), "timestamp": pa.float64()}
        quote = False if self.atomic else '"'
        try:
            table = csv.read_csv(
                self.path,
                parse_options=csv.ParseOptions(delimiter=self.delimiter, quote_char=quote),
                convert_options=csv.ConvertOptions(
                    column_types={column: kinds[what] for what, column in self.columns.items()},
                    include_columns=list(self.columns.values()),
                    strings_can_be_null=False,
                ),
            )
        except (pa.ArrowException, OSError) as error:  # an OSError: plain text under a name like x.csv.gz
            raise self._first_bad_line(error) from error
        if len(table) == 0:
            raise DataFileError(f"{self.path} has a header and no events; {_FORMATS}")
        table = table.rename_columns(list(self.columns))
        for what in ("user", "title"):
            empty = np.concatenate([_empty(chunk) for chunk in table.column(what).chunks])
            if empty.any():
                raise self.complaint(int(empty.argmax()), f"has no {what}", "name it, or remove the line")
        return table

    def numbers(self, table: pa.Table, what: str) -> NDArray[np.float64]:
        """A column of finite numbers."""
        values: NDArray[np.float64] = table.column(what).to_numpy()
        bad = ~np.isfinite(values)
        if bad.any():
            raise self.complaint(int(bad.argmax()), f"has no number as its {what}", "correct or remove the line")
        return values

    def complaint(self, row: int, what: str, would_do: str) -> DataFileError:
        """An error about the event of a row, from 0."""
        line = self._line_of(row)
        where = f"line {line}" if line else f"event {row + 1}"
        return DataFileError(f"{self.path} {where} {what}; {would_do}")

    def sha256(self) -> str:
        """Of the whole file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    # what follows runs only where something is wrong, a line at a time

    def _line_of(self, row: int) -> int:
        """The number of the line, from 1, of an event's row; empty lines are no rows. 0 where lines and rows are not
        the same thing: a quoted field may span several."""
        at = []
        with self.path.open(encoding="utf-8-sig") as file:  # all three kinds of line ends
            for number, line in enumerate(file, start=1):
                if '"' in line and not self.atomic:
                    return 0
                if line.strip("\n"):
                    at.append(number)
        return at[row + 1] if row + 1 < len(at) else 0

    def _first_bad_line(self, error: Exception) -> DataFileError:
        width, at = 0, {}
        number = 0
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                for number, line in enumerate(file, start=1):
                    if not line.strip():
                        continue
                    fields = next(self._fields([line]))
                    if width == 0:
                        width, at = len(fields), {what: fields.index(name) for what, name in self.columns.items()}
                    elif len(fields) != width:
                        return DataFileError(
                            f"{self.path} line {number} has {len(fields)} fields where the header has {width}; "
                            "correct or remove it"
                        )
                    else:
                        for what in ("rating", "timestamp"):
                            if what in at and not _is_number(fields[at[what]]):
                                return DataFileError(
                                    f"{self.path} line {number} has {fields[at[what]][:40]!r} as its {what}, "
                                    "which is no number; correct or remove the line"
                                )
        except UnicodeDecodeError:
            return self._not_text(number + 1)
        reason = " ".join(str(error).split())[:200]
        return DataFileError(f"{self.path} cannot be read ({reason}); {_FORMATS}")

    def _fields(self, lines: list[str]) -> Iterator[list[str]]:
        if self.atomic:
            return plain_csv.reader(lines, delimiter=self.delimiter, quoting=plain_csv.QUOTE_NONE)
        return plain_csv.reader(lines, delimiter=self.delimiter)

    def _not_text(self, line: int) -> DataFileError:
        return DataFileError(f"{self.path} line {line} or the next ones are no text in UTF-8; save the file in UTF-8")


_FORMATS = "RecBole's .inter files and comma-separated values with a header (user, title, rating, timestamp) are read"


def _empty(chunk: Any) -> NDArray[np.bool_]:
    blank = np.array([not name.strip() for name in chunk.dictionary.to_pylist()] or [False])
    indices: NDArray[np.int32] = chunk.indices.to_numpy(zero_copy_only=False)
    return blank[indices]


def _is_number(text: str) -> bool:
    try:
        float(text or "nan")
    except ValueError:
        return False
    return True
