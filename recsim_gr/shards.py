"""The format of a log in shards: Parquet files of whole users, and a manifest that is written last.

::

    manifest.json          what the log is, and the sha256 of every file: where it stands, the log is whole
    catalogue.parquet      a row a title: what the events need not repeat
    shard-00000.parquet    the events of some thousand users, a row group a *part*, which is what is read at a time

While a log is being made there is no manifest, but ``unfinished.json``, which says what is being made, and beside every
finished shard its record, ``shard-00000.json``. This module knows files, columns and checksums; what a legal log is, is
`recsim_gr.log`'s.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsim_gr.catalogue import Catalogue
from recsim_gr.errors import LogFormatError, RunDirectoryError
from recsim_gr.files import atomic_path, read_json, write_json

FORMAT = "recsim_gr log in shards"
SHARDS_VERSION = 1
MANIFEST, UNFINISHED, CATALOGUE = "manifest.json", "unfinished.json", "catalogue.parquet"
METADATA_KEY = b"recsim_gr"

STORED = ("user", "epoch", "step", "hours", "title", "watch_minutes", "score")
"""Columns of a shard; the duration of an event is that of its title, and stands in the catalogue."""

CATALOGUE_COLUMNS = ("genre", "duration_minutes", "release")

COMPRESSION_LEVEL = 1
"""Of zstd. What is left after the encodings are the random bits of floats, which no level compresses: level 3 takes
longer for less than 1 %."""

LARGEST_DICTIONARY = 4_096
"""Titles up to which a dictionary pays (1.28 bytes an event at 1,000 titles, against 1.43 as split bytes); beyond, its
own page, one a part, costs more than it saves."""

Columns = dict[str, NDArray[Any]]


class Shard(NamedTuple):
    """The record of a finished shard.

    Attributes:
        file: its name in the directory.
        first_user, last_user: its users have every id between, these included.
        longest: the length of its longest history.
        parts: events of each of its row groups.
        bytes, sha256: of the file.
    """

    file: str
    first_user: int
    last_user: int
    longest: int
    parts: tuple[int, ...]
    bytes: int
    sha256: str

    @property
    def users(self) -> int:
        """How many."""
        return self.last_user - self.first_user + 1


class FileRecord(NamedTuple):
    """A small file beside the shards."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a log in shards is.

    Attributes:
        identity: everything that decides the bytes of the shards: format, provenance (kind of world, its config,
            split), ``n_users``, ``propensities``, ``users_per_shard``, ``users_per_part``.
        n_titles, bounded_scores: as an `InteractionLog` has them.
        catalogue: the file that describes the titles.
        shards: in the order of their users.
    """

    identity: dict[str, Any]
    n_titles: int
    bounded_scores: bool
    catalogue: FileRecord
    shards: tuple[Shard, ...]

    @property
    def users_per_part(self) -> int:
        """Users of every part but a shard's last."""
        return int(self.identity["users_per_part"])

    @property
    def files(self) -> tuple[Shard | FileRecord, ...]:
        """All files that it vouches for."""
        return (self.catalogue, *self.shards)

    def write(self, directory: Path) -> None:
        """Writes ``manifest.json``, with a checksum of its own."""
        content = {
            **self.identity,
            "n_titles": self.n_titles,
            "bounded_scores": self.bounded_scores,
            "n_events": sum(sum(shard.parts) for shard in self.shards),
            "catalogue": self.catalogue._asdict(),
            "shards": [shard._asdict() for shard in self.shards],
        }
        write_json(directory / MANIFEST, {**content, "sha256": _content_checksum(content)})

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Reads ``manifest.json``.

        Raises:
            LogFormatError: missing, foreign, of a newer version, changed since it was written, or inconsistent.
        """
        path = directory / MANIFEST
        content = _manifest_content(path)
        try:
            manifest = cls(
                identity={key: content[key] for key in IDENTITY_KEYS},
                n_titles=int(content["n_titles"]),
                bounded_scores=bool(content["bounded_scores"]),
                catalogue=FileRecord(**content["catalogue"]),
                shards=tuple(shard_record(record) for record in content["shards"]),
            )
            wrong = _contradiction(manifest, int(content["n_events"]))
        except (KeyError, TypeError, ValueError) as error:
            raise LogFormatError(
                f"{path} lacks something that a manifest has ({error!r}); make the log again"
            ) from error
        if wrong:
            raise LogFormatError(f"{path} contradicts itself: {wrong}; make the log again")
        return manifest


IDENTITY_KEYS = (
    "format",
    "schema_version",
    "provenance",
    "n_users",
    "propensities",
    "users_per_shard",
    "users_per_part",
)


def shard_name(index: int) -> str:
    """The file of the shard with that number."""
    return f"shard-{index:05d}.parquet"


def shard_record(values: dict[str, Any]) -> Shard:
    """A record from JSON values.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    numbers = {name: int(values[name]) for name in ("first_user", "last_user", "longest", "bytes")}
    return Shard(str(values["file"]), parts=tuple(map(int, values["parts"])), sha256=str(values["sha256"]), **numbers)


def file_checksum(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(directory: Path, record: Shard | FileRecord) -> bool:
    """Whether a file is byte for byte what its record says."""
    path = directory / record.file
    try:
        return path.stat().st_size == record.bytes and file_checksum(path) == record.sha256
    except OSError:
        return False


# -- writing --------------------------------------------------------------------------------------------------------


def write_shard(directory: Path, index: int, parts: Iterable[Columns], durations: NDArray[np.float32]) -> Shard:
    """Writes a shard, whole or not at all, holding one part in memory at a time, and then its record.

    Args:
        directory: where.
        index: which shard.
        parts: the columns of a log, a part at a time, users in order and without gaps; ``propensity`` where exposed.
        durations: (I,) minutes of every title.

    Raises:
        RunDirectoryError: it cannot be written.
        LogFormatError: a duration that is not that of its title, which the format does not store.
    """
    path = directory / shard_name(index)
    events, first, last, longest = [], -1, -1, 0
    with atomic_path(path) as temporary:
        writer = None
        try:
            for columns in parts:
                table = _table(columns, durations)
                writer = writer or _writer(temporary, table.schema, len(durations))
                writer.write_table(table, row_group_size=len(table))
                events.append(len(table))
                first = int(columns["user"][0]) if first < 0 else first
                last, longest = int(columns["user"][-1]), max(longest, int(columns["step"].max()) + 1)
        finally:
            if writer is not None:
                writer.close()
        size, checksum = temporary.stat().st_size, file_checksum(temporary)
    shard = Shard(path.name, first, last, longest, tuple(events), size, checksum)
    write_json(path.with_suffix(".json"), shard._asdict())
    return shard


def write_catalogue(directory: Path, catalogue: Catalogue) -> FileRecord:
    """Writes ``catalogue.parquet``, a row a title."""
    path = directory / CATALOGUE
    columns = {name: getattr(catalogue, name) for name in CATALOGUE_COLUMNS}
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd", write_page_checksum=True)
        size, checksum = temporary.stat().st_size, file_checksum(temporary)
    return FileRecord(path.name, size, checksum)


def part_bytes(columns: Columns, durations: NDArray[np.float32]) -> int:
    """How many bytes a part takes in a shard."""
    sink = pa.BufferOutputStream()
    table = _table(columns, durations)
    with _writer(sink, table.schema, len(durations)) as writer:
        writer.write_table(table)
    return int(sink.getvalue().size)


def _table(columns: Columns, durations: NDArray[np.float32]) -> pa.Table:
    if not np.array_equal(durations[columns["title"]], columns["duration_minutes"]):
        raise LogFormatError("a log whose durations are not those of its titles cannot be written in shards; use write")
    small: dict[str, Any] = {
        # 32 bits on disk whatever is said here; delta coding makes nothing of the rest
        "epoch": np.uint32,
        "step": np.uint32,
        "title": np.min_scalar_type(len(durations) - 1),
    }
    names = [*STORED, *(["propensity"] if "propensity" in columns else [])]
    table = pa.table({name: columns[name].astype(small.get(name, columns[name].dtype)) for name in names})
    about = {"format": FORMAT, "schema_version": SHARDS_VERSION}
    return table.replace_schema_metadata({METADATA_KEY: json.dumps(about)})


def _writer(where: Any, schema: pa.Schema, n_titles: int) -> pq.ParquetWriter:
    """Integers as deltas or through a dictionary; floats byte by byte, so that exponents stand together."""
    dictionary = ["epoch", *(["title"] if n_titles <= LARGEST_DICTIONARY else [])]
    delta = ("user", "step")
    encodings = {n: "DELTA_BINARY_PACKED" if n in delta else "BYTE_STREAM_SPLIT" for n in schema.names}
    return pq.ParquetWriter(
        where,
        schema,
        compression="zstd",
        compression_level=COMPRESSION_LEVEL,
        use_dictionary=dictionary,
        column_encoding={name: encoding for name, encoding in encodings.items() if name not in dictionary},
        write_page_checksum=True,  # also found with verify=False: one flipped bit in three is read as other data
    )


# -- reading --------------------------------------------------------------------------------------------------------


class ShardDirectory:
    """A log in shards on disk: its manifest, and the columns of one part at a time.

    Args:
        path: the directory.
        verify: whether the sha256 of a shard is checked when it is first read, and again if the file has changed.

    Raises:
        LogFormatError: no log in shards, a manifest that is not to be trusted, or a file missing or cut short.
    """

    def __init__(self, path: Path, verify: bool = True) -> None:
        self.path, self.verify = Path(path), verify
        self.manifest = Manifest.read(self.path)
        self._verified: dict[str, tuple[int, int, int]] = {}
        for record in self.manifest.files:
            self._state_of(record)
        self.catalogue = self._catalogue()

    def part(self, shard: int, index: int) -> Columns:
        """The columns of a part, durations restored.

        Raises:
            LogFormatError: the shard is missing, damaged, or holds other users than the manifest says.
        """
        record = self.manifest.shards[shard]
        path = self._trusted(record)
        names = [*STORED, *(["propensity"] if self.manifest.identity["propensities"] else [])]
        try:
            file = pq.ParquetFile(path, memory_map=False, page_checksum_verification=True)
            if file.num_row_groups != len(record.parts):
                raise LogFormatError(f"{path} has {file.num_row_groups} parts, its manifest says {len(record.parts)}")
            table = file.read_row_group(index, use_threads=False)
        except (OSError, ValueError, pa.ArrowException) as error:
            if isinstance(error, LogFormatError):
                raise
            raise LogFormatError(f"{path} cannot be read as a shard ({_first_line(error)}); make it again") from error
        columns = checked_columns(table, names, path)
        first = record.first_user + index * self.manifest.users_per_part
        last = min(first + self.manifest.users_per_part - 1, record.last_user)
        users, titles = columns["user"], columns["title"]
        if len(users) != record.parts[index] or (users[0], users[-1]) != (first, last):
            raise LogFormatError(f"{path} does not hold users {first} to {last} in part {index}; is it another log's?")
        if titles.max() >= self.manifest.n_titles:
            raise LogFormatError(f"{path} holds title {titles.max()}; its log has {self.manifest.n_titles}")
        return {**columns, "duration_minutes": self.catalogue.duration_minutes[titles]}

    def _catalogue(self) -> Catalogue:
        record = self.manifest.catalogue
        path = self._trusted(record)
        try:
            table = pq.read_table(path, memory_map=False, page_checksum_verification=True, use_threads=False)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise LogFormatError(f"{path} cannot be read as a catalogue ({_first_line(error)})") from error
        if len(table) != self.manifest.n_titles:
            raise LogFormatError(f"{path} describes {len(table)} titles; its log has {self.manifest.n_titles}")
        return Catalogue(**checked_columns(table, CATALOGUE_COLUMNS, path))

    def _state_of(self, record: Shard | FileRecord) -> tuple[int, int, int]:
        path = self.path / record.file
        try:
            state = path.stat()
        except OSError as error:
            message = f"{path} is missing, but the manifest names it; the command that made the log makes it again"
            raise LogFormatError(message) from error
        if state.st_size != record.bytes:
            raise LogFormatError(
                f"{path} has {state.st_size} bytes, its manifest says {record.bytes}; the command that made the log "
                "makes it again"
            )
        return state.st_ino, state.st_size, state.st_mtime_ns

    def _trusted(self, record: Shard | FileRecord) -> Path:
        """Where a file lies, its checksum checked unless it was and the file is the same."""
        path, state = self.path / record.file, self._state_of(record)
        if self.verify and self._verified.get(record.file) != state:
            if not is_whole(self.path, record):
                raise LogFormatError(
                    f"{path} does not have the checksum that its manifest says: damaged, or another log's; the "
                    "command that made the log makes it again"
                )
            self._verified[record.file] = state
        return path


def checked_columns(table: pa.Table, wanted: Iterable[str], path: str | Path) -> Columns:
    """The columns of a log's table as arrays.

    Raises:
        LogFormatError: one that is missing, there twice, or has empty cells.
    """
    names, wanted = table.column_names, list(wanted)
    missing = [name for name in wanted if name not in names]
    if missing:
        raise LogFormatError(f"{path} has no column {missing[0]!r}; a log has {', '.join(wanted)}")
    double = [name for name in wanted if names.count(name) > 1]
    if double:
        raise LogFormatError(f"{path} has column {double[0]!r} twice; a log has it once")
    empty = [name for name in wanted if table[name].null_count]
    if empty:
        raise LogFormatError(f"{path} has empty cells in column {empty[0]!r}; every cell of a log is set")
    return {name: table[name].to_numpy() for name in wanted}


def _manifest_content(path: Path) -> dict[str, Any]:
    """The JSON of a manifest that is ours, of a version that we read, and unchanged."""
    if not path.exists():
        if (path.parent / UNFINISHED).exists():
            raise LogFormatError(f"{path.parent} holds an unfinished log; the same generate command goes on with it")
        raise LogFormatError(f"{path} is missing; `recsim-gr generate` makes a directory with one")
    try:
        content = read_json(path)
    except RunDirectoryError as error:
        raise LogFormatError(f"{path} cannot be read as a manifest; make the log again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise LogFormatError(f"{path} is not the manifest of a log in shards of recsim_gr")
    version = content.get("schema_version")
    if version != SHARDS_VERSION:
        raise LogFormatError(f"{path} has schema version {version!r}; this version reads {SHARDS_VERSION}")
    if content.pop("sha256", None) != _content_checksum(content):
        raise LogFormatError(f"{path} does not have the checksum that it says: it was changed; make the log again")
    return content


def _content_checksum(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _contradiction(manifest: Manifest, n_events: int) -> str | None:
    """What cannot be in a manifest, if anything is."""
    shards, size = manifest.shards, int(manifest.identity["users_per_shard"])
    if [shard.file for shard in shards] != [shard_name(i) for i in range(len(shards))] or not shards:
        return "its shards are not shard-00000.parquet and so on"
    if manifest.catalogue.file != CATALOGUE:
        return f"its catalogue is not {CATALOGUE}"
    if any(b.first_user != a.last_user + 1 for a, b in pairwise(shards)):
        return "its shards leave users out"
    if any(shard.users != size for shard in shards[:-1]) or not 1 <= shards[-1].users <= size:
        return "a shard has not as many users as it says"
    if sum(shard.users for shard in shards) != manifest.identity["n_users"]:
        return "the users of its shards do not add up"
    if sum(sum(shard.parts) for shard in shards) != n_events:
        return "the events of its shards do not add up"
    each = manifest.users_per_part
    if each < 1 or any(len(shard.parts) != -(-shard.users // each) for shard in shards):
        return "a shard has not as many parts as its users make"
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
