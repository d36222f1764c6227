"""r̂(x, ·) on every prefix x of a log: worked out once, and shared by whoever needs it, by memory map if wanted.

A table on disk is a directory of .npy files named after what is in it, a hash of the ensemble's parameters and of the
log. It is written beside its place and renamed as a whole, so that of processes that race one wins and all read the
same; it is opened by memory map, so that processes share its pages and nothing is loaded that is not asked for. A log
in shards is gone through a part at a time.
"""

import hashlib
import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsim_gr.errors import CheckpointError, ConfigError, RunDirectoryError
from recsim_gr.files import read_json, write_json
from recsim_gr.histories import Batch, HistorySource, histories_of
from recsim_gr.log import AnyLog, ShardedLog
from recsim_gr.prefixes import prefix_states
from recsim_gr.reward_heads import RewardMember, ScoreHead

MOST_BYTES = 1 << 30
"""Of a table in memory. The shallow form's takes 4·M·(d + 1) bytes an event, 32 MB for 80,000 events of three
members with d = 32; the appended form's 8·I bytes, 128 MB for the same events and 200 titles."""

FORMAT = 1
"""Of a table on disk."""


class RewardTable(ABC):
    """r̂(x, ·) for every prefix x of a log; row u is the u-th user of ``log.sequences()``, step t has seen t events."""

    arrays: ClassVar[tuple[str, ...]]
    """Names of the arrays that a table is made of, those with a row a user first."""

    @classmethod
    @abstractmethod
    def common(cls, members: Sequence[RewardMember]) -> dict[str, Tensor]:
        """The arrays that are the same for all users."""

    @classmethod
    @abstractmethod
    def rows(cls, members: Sequence[RewardMember], batch: Batch) -> dict[str, Tensor]:
        """The rows of the users of a batch, of every array that has a row a user."""

    @classmethod
    @abstractmethod
    def bytes_of(cls, members: Sequence[RewardMember], users: int, steps: int) -> int:
        """How large a table is."""

    @abstractmethod
    def mean(self, rows: Tensor) -> Tensor:
        """(B, L, I): the ensemble's mean on the prefixes of the users at ``rows``."""

    @abstractmethod
    def deviation(self, rows: Tensor) -> Tensor:
        """(B, L, I): the members' deviation there, with M − 1 degrees of freedom."""

    @abstractmethod
    def spread(self, rows: Tensor, titles: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation, (B, L, K) each, of K titles a prefix.

        Args:
            rows: (B,) users.
            titles: (B, L, K) int64.
        """

    @abstractmethod
    def at(self, rows: NDArray[np.int64], steps: NDArray[np.int64], titles: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n,): the ensemble's mean for one title a context.

        Args:
            rows: (n,) users.
            steps: (n,) how many events each has seen.
            titles: (n,) the titles.
        """

    @abstractmethod
    def spread_at(
        self, rows: NDArray[np.int64], steps: NDArray[np.int64], titles: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        """Mean and deviation, (n,) each, for one title a context; arguments as `at`."""

    def members(self, rows: Tensor) -> Tensor:
        """(M, B, L, I): every member's prediction on the prefixes of the users at ``rows``.

        Raises:
            ConfigError: a table that does not hold them.
        """
        raise self._without_members()

    def members_at(self, rows: NDArray[np.int64], steps: NDArray[np.int64], titles: NDArray[np.int64]) -> Tensor:
        """(M, n): every member's prediction for one title a context; arguments as `at`, errors as `members`."""
        raise self._without_members()

    def _without_members(self) -> ConfigError:
        return ConfigError(
            f"a {type(self).__name__} holds the members' mean and deviation, not each of them: choose a reward that "
            'needs no more, or an ensemble of form="shallow"'
        )


class FactoredTable(RewardTable):
    """Of the shallow form: two factors a member, U·L·M·(d + 1) numbers and not U·L·I.

    Args:
        states: (U, L, M, d + 1).
        vectors: (M, I, d + 1).
        biases: (M, I).
    """

    arrays = ("states", "vectors", "biases")

    def __init__(self, states: Tensor, vectors: Tensor, biases: Tensor) -> None:
        self.states, self.vectors, self.biases = states, vectors, biases

    @classmethod
    def common(cls, members: Sequence[RewardMember]) -> dict[str, Tensor]:
        sides = [_factors(member).title_side(member.backbone) for member in members]
        return {"vectors": torch.stack([v for v, _ in sides]), "biases": torch.stack([b for _, b in sides])}

    @classmethod
    def rows(cls, members: Sequence[RewardMember], batch: Batch) -> dict[str, Tensor]:
        states = [_factors(member).state_side(prefix_states(member.backbone, batch)) for member in members]
        return {"states": torch.stack(states, dim=2)}

    @classmethod
    def bytes_of(cls, members: Sequence[RewardMember], users: int, steps: int) -> int:
        return 4 * users * steps * len(members) * (members[0].backbone.config.dimensions + 1)

    def members(self, rows: Tensor) -> Tensor:
        """(M, B, L, I): every member's prediction."""
        states = self.states[rows].permute(2, 0, 1, 3)  # (M, B, L, d + 1)
        flat = states.flatten(1, 2) @ self.vectors.transpose(1, 2) + self.biases[:, None]
        return flat.view(*states.shape[:3], -1)

    def mean(self, rows: Tensor) -> Tensor:
        states = self.states[rows].flatten(2)  # (B, L, M·(d + 1)): all members in one product
        vectors = self.vectors.permute(1, 0, 2).flatten(1)  # (I, M·(d + 1))
        return states @ (vectors.T / len(self.vectors)) + self.biases.mean(dim=0)

    def deviation(self, rows: Tensor) -> Tensor:
        return self.members(rows).std(dim=0)

    def spread(self, rows: Tensor, titles: Tensor) -> tuple[Tensor, Tensor]:
        members = torch.stack([member.gather(-1, titles) for member in self.members(rows)])
        return members.mean(dim=0), members.std(dim=0)

    def at(self, rows: NDArray[np.int64], steps: NDArray[np.int64], titles: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.members_at(rows, steps, titles).T.mean(dim=1).cpu().numpy().astype(np.float32)

    def spread_at(
        self, rows: NDArray[np.int64], steps: NDArray[np.int64], titles: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        members = self.members_at(rows, steps, titles)
        return members.mean(dim=0), members.std(dim=0)

    def members_at(self, rows: NDArray[np.int64], steps: NDArray[np.int64], titles: NDArray[np.int64]) -> Tensor:
        which = torch.from_numpy(np.asarray(titles))
        states = self.states[torch.from_numpy(np.asarray(rows)), torch.from_numpy(np.asarray(steps))]  # (n, M, d + 1)
        scores = (states * self.vectors[:, which].transpose(0, 1)).sum(-1) + self.biases[:, which].T
        return scores.T


def _factors(member: RewardMember) -> ScoreHead:
    """The head of a member whose scores are a product."""
    assert isinstance(member.head, ScoreHead)
    return member.head


class DenseTable(RewardTable):
    """Of a form that has no factors: the numbers themselves.

    Args:
        means, deviations: (U, L, I) float32.
    """

    arrays = ("means", "deviations")

    def __init__(self, means: Tensor, deviations: Tensor) -> None:
        self.means, self.deviations = means, deviations

    @classmethod
    def common(cls, members: Sequence[RewardMember]) -> dict[str, Tensor]:
        return {}

    @classmethod
    def rows(cls, members: Sequence[RewardMember], batch: Batch) -> dict[str, Tensor]:
        means, deviations = [], []
        for step in range(batch.titles.shape[1]):
            prefix = batch.titles[:, :step], batch.scores[:, :step], batch.times[:, :step]
            scores = torch.stack([member(*prefix) for member in members])
            means.append(scores.mean(dim=0))
            deviations.append(scores.std(dim=0))
        return {"means": torch.stack(means, dim=1), "deviations": torch.stack(deviations, dim=1)}

    @classmethod
    def bytes_of(cls, members: Sequence[RewardMember], users: int, steps: int) -> int:
        return 8 * users * steps * members[0].backbone.n_titles

    def mean(self, rows: Tensor) -> Tensor:
        return self.means[rows]

    def deviation(self, rows: Tensor) -> Tensor:
        return self.deviations[rows]

    def spread(self, rows: Tensor, titles: Tensor) -> tuple[Tensor, Tensor]:
        return self.means[rows].gather(-1, titles), self.deviations[rows].gather(-1, titles)

    def at(self, rows: NDArray[np.int64], steps: NDArray[np.int64], titles: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.spread_at(rows, steps, titles)[0].cpu().numpy()

    def spread_at(
        self, rows: NDArray[np.int64], steps: NDArray[np.int64], titles: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        row, step, title = (torch.from_numpy(np.asarray(index)) for index in (rows, steps, titles))
        return self.means[row, step, title], self.deviations[row, step, title]


TABLES: dict[str, type[FactoredTable] | type[DenseTable]] = {"shallow": FactoredTable, "appended": DenseTable}
"""What a table of each form is."""


@torch.no_grad()
def table_in_memory(members: Sequence[RewardMember], log: AnyLog) -> RewardTable:
    """The table of a log.

    Raises:
        ConfigError: a log in shards, or a table larger than `MOST_BYTES`.
    """
    if isinstance(log, ShardedLog):
        raise ConfigError(
            "a table of r̂ on every prefix of a log in shards does not stay in memory: give on(log, directory) or "
            "RewardEnsemble.tables_in a directory to keep it in, or read() the log first, or some of its users, as in "
            "log.users(0, 10_000).read()"
        )
    kind, histories = TABLES[members[0].form], histories_of(log)
    size = kind.bytes_of(members, len(histories), histories.longest)
    if size > MOST_BYTES:
        raise ConfigError(
            f"a table of r̂ on every prefix of this log takes {size / 2**30:.1f} GiB, of which {MOST_BYTES / 2**30:.0f} "
            "are allowed in memory: give on(log, directory) or RewardEnsemble.tables_in a directory to keep it in"
        )
    parts = [kind.rows(members, batch) for batch in members[0].batches(histories)]
    by_user = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return kind(**by_user, **kind.common(members))


def table_on_disk(members: Sequence[RewardMember], log: AnyLog, directory: Path, verify: bool = True) -> RewardTable:
    """The table of a log, from a directory where it is kept; made there if it is not there yet.

    Args:
        members: the ensemble's.
        log: in memory or in shards.
        directory: holds a subdirectory a table.
        verify: whether the sha256 of the files is checked, a second a gigabyte or two.

    Raises:
        CheckpointError: a table that is damaged; says which file.
        RunDirectoryError: it cannot be written.
    """
    kind, key = TABLES[members[0].form], table_key(members, log)
    place = Path(directory) / key
    if not place.is_dir():
        _write(kind, members, histories_of(log), place)
    return _open(kind, place, verify)


def table_key(members: Sequence[RewardMember], log: AnyLog) -> str:
    """16 hexadecimal digits of what a table follows from: the members' parameters, and the histories of the log.

    The same for a log in shards and for the same log in memory.
    """
    whole = hashlib.sha256(f"table {FORMAT}".encode())
    for member in members:
        whole.update(json.dumps([member.form, member.backbone.shape()], sort_keys=True).encode())
        for name, value in sorted(member.state_dict().items()):
            whole.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            whole.update(value.detach().cpu().contiguous().numpy().tobytes())
    longest = log.longest if isinstance(log, ShardedLog) else int(log.step.max()) + 1
    whole.update(str(longest).encode())
    columns = {name: hashlib.sha256() for name in ("step", "title", "score", "hours")}  # each through all parts
    for part in log if isinstance(log, ShardedLog) else [log]:
        for name, digest in columns.items():
            digest.update(np.ascontiguousarray(getattr(part, name)).tobytes())
    for name, digest in columns.items():
        whole.update(name.encode() + digest.digest())
    return whole.hexdigest()[:16]


# -- files ------------------------------------------------------------------------------------------------------------


class _Column(NamedTuple):
    """What the index of a table says of a file."""

    shape: tuple[int, ...]
    sha256: str


@torch.no_grad()
def _write(kind: type[RewardTable], members: Sequence[RewardMember], histories: HistorySource, place: Path) -> None:
    """Writes a table beside its place, and puts it there unless another process was faster."""
    temporary = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}.", suffix=".part"))
        index = {name: _write_array(temporary / f"{name}.npy", value) for name, value in kind.common(members).items()}
        index |= _write_rows(kind, members, histories, temporary)
        files = {name: column._asdict() for name, column in index.items()}
        write_json(temporary / "table.json", {"format": FORMAT, "kind": kind.__name__, "files": files})
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)  # mkdtemp makes folders private; a table is meant to be shared
        try:
            temporary.rename(place)
        except OSError:
            if not place.is_dir():  # else another process made the same table in the meantime
                raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunDirectoryError(f"cannot write {place}: {reason}; free space or choose another place") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_rows(
    kind: type[RewardTable], members: Sequence[RewardMember], histories: HistorySource, directory: Path
) -> dict[str, _Column]:
    writers: dict[str, _Writer] = {}
    try:
        for batch in members[0].batches(histories):
            for name, rows in kind.rows(members, batch).items():
                if name not in writers:
                    shape = (len(histories), *rows.shape[1:])
                    writers[name] = _Writer(directory / f"{name}.npy", shape)
                writers[name].append(rows)
        return {name: writer.finish() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.file.close()


def _write_array(path: Path, value: Tensor) -> _Column:
    writer = _Writer(path, tuple(value.shape))
    try:
        writer.append(value)
        return writer.finish()
    finally:
        writer.file.close()


class _Writer:
    """A .npy file of float32, a few rows at a time. (Into a memory map, a full disk would be a crash, not an error.)"""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.file, self.shape, self.digest = path.open("wb"), shape, hashlib.sha256()
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, rows: Tensor) -> None:
        content = rows.cpu().contiguous().numpy().astype("<f4", copy=False).tobytes()
        self.file.write(content)
        self.digest.update(content)

    def finish(self) -> _Column:
        self.file.flush()
        os.fsync(self.file.fileno())
        return _Column(self.shape, self.digest.hexdigest())


def _open(kind: type[RewardTable], place: Path, verify: bool) -> RewardTable:
    try:
        index = read_json(place / "table.json")
        if index["format"] != FORMAT or index["kind"] != kind.__name__:
            raise ValueError(f"it is a {index['kind']} of format {index['format']}")
        arrays = {name: _mapped(place / f"{name}.npy", index["files"][name], verify) for name in kind.arrays}
    except (OSError, EOFError, ValueError, TypeError, LookupError, RunDirectoryError) as error:
        raise CheckpointError(
            f"{place} holds no table that can be read ({error}); remove it, and it is made again"
        ) from error
    return kind(**arrays)


def _mapped(path: Path, column: Mapping[str, Any], verify: bool) -> Tensor:
    # mode "c": the pages are shared until somebody writes to them, and then are their own, so that nothing can change
    # the file; torch warns of arrays that are marked read-only, and would crash on writing to them
    array = np.load(path, mmap_mode="c", allow_pickle=False)
    if array.dtype != np.dtype("<f4") or list(array.shape) != list(column["shape"]):
        raise ValueError(f"{path.name} is {array.dtype} {array.shape}, not float32 {tuple(column['shape'])}")
    if verify and hashlib.sha256(memoryview(array).cast("B")).hexdigest() != column["sha256"]:
        raise ValueError(f"the sha256 of {path.name} is not the one that was written")
    return torch.from_numpy(np.asarray(array))
