"""Worlds of real users: a fully observed matrix of real ratings, replayed under synthetic choices.

What a user thinks of every title is real, so every counterfactual is known. Everything else is ours: the logging
policy (its propensities are therefore exact), the appeal of titles (which has nothing to do with their real ratings),
watch time and its noise, and the durations where the data have none.
"""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv

from recsim_gr.behaviour import SPLITS, BehaviourConfig, FloatArray, Users, require_room
from recsim_gr.configs import require
from recsim_gr.errors import ConfigError, DataFileError
from recsim_gr.observations import HIGHEST_SCORE, LOWEST_SCORE
from recsim_gr.randomness import generator, uniforms
from recsim_gr.world_base import WorldBase, require_integers

# ----------------------------------------------------------------------------------------------- rating files


@dataclass(frozen=True, eq=False)
class RatingMatrix:
    """What every user thinks of every title.

    Construction checks it; the arrays are copied and cannot be written to.

    Attributes:
        satisfaction: (U, I) float32 in [1, 5], no cell missing.
        name: what the data are, for people.
        durations: (I,) float64 minutes, or None where the data have none.
        sha256: of the file it was read from, 64 hexadecimal digits; of the matrix itself if it was not read.
        provenance: whether the file is, byte for byte, one that the project knows.

    Raises:
        DataFileError: not such a matrix; says what is wrong.
    """

    satisfaction: NDArray[np.float32]
    name: str = "ratings"
    durations: FloatArray | None = None
    sha256: str = ""
    provenance: str = "made in memory"

    def __post_init__(self) -> None:
        satisfaction = np.array(self.satisfaction, dtype=np.float32)
        if satisfaction.ndim != 2 or satisfaction.shape[0] < 1 or satisfaction.shape[1] < 2:
            raise DataFileError(
                f"{self.name}: ratings must be (users, titles), 2 titles or more, got {satisfaction.shape}"
            )
        _refuse(self.name, "satisfaction", ~_within(satisfaction, LOWEST_SCORE, HIGHEST_SCORE), "in [1, 5]")
        satisfaction.flags.writeable = False
        object.__setattr__(self, "satisfaction", satisfaction)
        if self.durations is not None:
            object.__setattr__(self, "durations", self._durations(np.array(self.durations, dtype=np.float64)))
        if not self.sha256:
            object.__setattr__(self, "sha256", hashlib.sha256(satisfaction.tobytes()).hexdigest())

    def _durations(self, durations: FloatArray) -> FloatArray:
        if durations.shape != self.satisfaction.shape[1:]:
            n_titles = self.satisfaction.shape[1]
            raise DataFileError(f"{self.name}: there must be {n_titles} durations, got shape {durations.shape}")
        _refuse(self.name, "durations", ~(np.isfinite(durations) & (durations > 0)), "a positive number")
        durations.flags.writeable = False
        return durations


class KnownFile(NamedTuple):
    """A file that the project was tested with."""

    sha256: str
    source: str


KNOWN_FILES = {
    "jester1_full7200.npz": KnownFile(
        "9829a82f00e1eeb7f88166cbac1a3dc6fb88ea4ed89e7abc758f870e9e519616",
        "the 7,200 users who rated every joke of Jester dataset 1 (Goldberg et al., 'Eigentaste', 2001), "
        "from eigentaste.berkeley.edu/dataset",
    ),
    "kuairec_small.npz": KnownFile(
        "bff57d6661f0ff395d0195ed315810fcdaa65657e29afe96cec1e14d0a07823c",
        "KuaiRec v2, zenodo.org/records/18164998, whose small_matrix.csv may be given as it is",
    ),
}
"""By file name: what a missing file is told apart by. A file with another checksum is read all the same (a larger
extract is as good), after the same checks of shape, type and range; `RatingMatrix.provenance` says which it is."""

HOW_TO_MAKE_ONE = "numpy.savez(path, ratings=matrix) with a (users, titles) matrix makes one"


class Archive:
    """An npz file being read; every complaint names the file.

    Args:
        path: where it lies.
        content: its bytes.

    Raises:
        DataFileError: truncated, or no npz.
    """

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        try:
            opened = np.load(io.BytesIO(content), allow_pickle=False)
        except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
            what = "is truncated" if content[:2] == b"PK" else "is not an npz file"
            raise DataFileError(f"{path} {what}; {HOW_TO_MAKE_ONE}") from error
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise DataFileError(f"{path} is not an npz file but a single array; {HOW_TO_MAKE_ONE}")
        self.arrays = opened
        self.keys = frozenset(opened.files)

    def array(self, key: str, kinds: str, ndim: int) -> NDArray[Any]:
        """The array of that key, of one of the dtype ``kinds`` (letters as in ``numpy.dtype.kind``)."""
        try:
            array = self.arrays[key]
        except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise self.error(f"key {key!r} cannot be read ({error}); get the file again") from error
        if array.dtype.kind not in kinds or array.ndim != ndim:
            raise self.error(
                f"key {key!r} must have {ndim} dimensions and dtype kind {' or '.join(kinds)}, "
                f"got {array.dtype} of {array.shape}"
            )
        return np.asarray(array)

    def error(self, sentence: str) -> DataFileError:
        """The complaint, with the name of the file."""
        return DataFileError(f"{self.path}: {sentence}")


def _jester(archive: Archive) -> RatingMatrix:
    """Ratings in hundredths on Jester's scale of −10 to 10."""
    hundredths = archive.array("rating_x100", "i", 2)
    _refuse(str(archive.path), "rating_x100", ~_within(hundredths, -1_000, 1_000), "in −1000 to 1000")
    return RatingMatrix(_rescaled(hundredths, -1_000, 1_000), name=str(archive.path))


def _kuairec(archive: Archive) -> RatingMatrix:
    """y = [watch ratio ≥ 2], a bit a cell, rows padded to whole bytes: satisfaction is 1 or 5."""
    shape = archive.array("shape", "iu", 1)
    packed = archive.array("pos_packed", "u", 2)
    n_users, n_titles = len(archive.array("user_id", "iu", 1)), len(archive.array("video_id", "iu", 1))
    wanted = (n_users, -(-n_titles // 8))
    if shape.tolist() != [n_users, n_titles] or packed.shape != wanted or packed.dtype != np.uint8:
        raise archive.error(
            f"{n_users} users and {n_titles} videos need shape [{n_users}, {n_titles}] and pos_packed uint8 "
            f"of {wanted}, got {shape.tolist()} and {packed.dtype} of {packed.shape}"
        )
    return RatingMatrix(_rescaled(np.unpackbits(packed, axis=1, count=n_titles), 0, 1), name=str(archive.path))


def _own(archive: Archive) -> RatingMatrix:
    """A user's own file: ``ratings`` (U, I), and if wanted ``low``, ``high`` and ``duration_minutes`` (I,)."""
    ratings = archive.array("ratings", "iuf", 2).astype(np.float64)
    _refuse(str(archive.path), "ratings", ~np.isfinite(ratings), "a finite number: every cell is needed")
    if ratings.size == 0:
        raise archive.error(f"ratings must be (users, titles) with 2 titles or more, got {ratings.shape}")
    low = float(archive.array("low", "iuf", 0)) if "low" in archive.keys else float(ratings.min())
    high = float(archive.array("high", "iuf", 0)) if "high" in archive.keys else float(ratings.max())
    if not low < high:
        raise archive.error(f"the scale must have low below high, got {low:g} and {high:g}; give both keys")
    _refuse(str(archive.path), "ratings", ~_within(ratings, low, high), f"in {low:g} to {high:g}")
    given = "duration_minutes" in archive.keys
    durations = archive.array("duration_minutes", "iuf", 1).astype(np.float64) if given else None
    return RatingMatrix(_rescaled(ratings, low, high), name=str(archive.path), durations=durations)


TABLE_COLUMNS = ("user_id", "video_id", "watch_ratio", "video_duration")
"""Columns of KuaiRec's own ``small_matrix.csv`` that are read; the last in milliseconds."""

TOP_WATCH_RATIO = 2.0
"""Watched twice over: satisfaction 5, as in the reduced file, whose likes are ratios of 2 and more."""

LEAST_COVERAGE = 0.99
"""KuaiRec's table lacks 0.4 % of its cells, videos whose authors the user had blocked; they count as never watched."""


def _is_table(content: bytes) -> bool:
    header = content[:4_096].split(b"\n")[0].decode(errors="replace").strip().split(",")
    return set(TABLE_COLUMNS) <= set(header)


def _kuairec_table(path: Path, content: bytes) -> RatingMatrix:
    """The official table, a row a watched video: satisfaction rises with the watch ratio, up to `TOP_WATCH_RATIO`."""
    options = csv.ConvertOptions(include_columns=TABLE_COLUMNS)
    try:
        table = csv.read_csv(io.BytesIO(content), convert_options=options)
        columns = {name: table[name].to_numpy().astype(np.float64) for name in TABLE_COLUMNS}
    except (pa.ArrowException, ValueError) as error:
        raise DataFileError(f"{path} is not KuaiRec's table ({str(error).splitlines()[0]}); get it again") from error
    for name, values in columns.items():
        _refuse(str(path), name, ~(np.isfinite(values) & (values >= 0)), "a number of 0 or more")
    users, row = np.unique(columns["user_id"], return_inverse=True)
    videos, first, column = np.unique(columns["video_id"], return_index=True, return_inverse=True)
    ratio = np.full((len(users), len(videos)), np.nan)
    ratio[row, column] = np.minimum(columns["watch_ratio"], TOP_WATCH_RATIO)
    coverage = np.isfinite(ratio).mean() if ratio.size else 0.0
    if coverage < LEAST_COVERAGE:
        raise DataFileError(
            f"{path} has {coverage:.1%} of its (user, video) cells; a replayed matrix needs {LEAST_COVERAGE:.0%}: "
            "give small_matrix.csv, whole"
        )
    minutes = columns["video_duration"][first] / 60_000
    return RatingMatrix(_rescaled(np.nan_to_num(ratio), 0, TOP_WATCH_RATIO), "KuaiRec", minutes)


class Format(NamedTuple):
    """What the data are called (empty: after their file), and what reads them."""

    name: str
    read: Callable[[Archive], RatingMatrix]


FORMATS = {
    frozenset({"rating_x100"}): Format("Jester", _jester),
    frozenset({"user_id", "video_id", "shape", "pos_packed"}): Format("KuaiRec", _kuairec),
    frozenset({"ratings"}): Format("", _own),
}
"""By the keys that an npz must have."""


def load_matrix(path: str | Path) -> RatingMatrix:
    """Reads a fully observed rating matrix; which format it is in follows from its keys, never from its name.

    Ratings are mapped linearly onto satisfaction, the ends of their scale to 1 and 5. No code from the file is run.

    Args:
        path: KuaiRec's own ``small_matrix.csv``, or an npz file in one of `FORMATS`: Jester's or KuaiRec's reduced
            matrix, or your own with the key ``ratings`` (U, I); without scalars ``low`` and ``high``, the least and
            greatest rating are the ends of its scale; ``duration_minutes`` (I,) may be given.

    Raises:
        DataFileError: missing (names the official source of a known file), truncated, no npz, foreign, or with cells
            that are missing or out of range.
    """
    path = Path(path)
    content = _content(path)
    sha256 = hashlib.sha256(content).hexdigest()
    matrix = _kuairec_table(path, content) if _is_table(content) else _from_archive(Archive(path, content))
    return replace(matrix, sha256=sha256, provenance=_provenance(sha256))


def _from_archive(archive: Archive) -> RatingMatrix:
    for keys, form in FORMATS.items():
        if keys <= archive.keys:
            return replace(form.read(archive), name=form.name or archive.path.stem)
    wanted = "; or ".join(", ".join(sorted(keys)) for keys in FORMATS)
    found = ", ".join(sorted(archive.keys)) or "none"
    raise archive.error(f"no format has its keys ({found}); known are {wanted}")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        known = KNOWN_FILES.get(path.name)
        where = f"its official source is {known.source}; {HOW_TO_MAKE_ONE}" if known else HOW_TO_MAKE_ONE
        raise DataFileError(f"{path} is missing; {where}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataFileError(f"{path} cannot be read: {reason}; give the path of an npz file") from error


def _provenance(sha256: str) -> str:
    names = [name for name, known in KNOWN_FILES.items() if known.sha256 == sha256]
    return f"{names[0]}, byte for byte" if names else "a file whose checksum the project does not know"


def _within(values: NDArray[Any], low: float, high: float) -> NDArray[np.bool_]:
    return (values >= low) & (values <= high)


def _rescaled(values: NDArray[Any], low: float, high: float) -> NDArray[np.float32]:
    fraction = (values.astype(np.float64) - low) / (high - low)
    return (LOWEST_SCORE + (HIGHEST_SCORE - LOWEST_SCORE) * fraction).astype(np.float32)


def _refuse(name: str, what: str, illegal: NDArray[np.bool_], would_do: str) -> None:
    if illegal.any():
        place = ", ".join(str(int(i)) for i in np.unravel_index(int(np.argmax(illegal)), illegal.shape))
        raise DataFileError(f"{name}: {what}[{place}] must be {would_do}")


# ------------------------------------------------------------------------------------------------------ world


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(BehaviourConfig):
    """A world of real users.

    `recsim_gr.configs.config_id` leaves the path out: what names a replayed world is the content of its file.
    """

    path: str = field(metadata={"identity": False})
    """The data file, see `load_matrix`."""
    pull_strength: float = 1.0
    """κ, half of a simulated world's. Binary ratings make z two-valued: where a user likes 5 % of the titles, a like
    has z = 4.4, and at κ = 2 a discerning user picks a like 510 times in 511. On KuaiRec 31 % of the histories then
    hold a single rating, from which nothing can be learned; at κ = 1 it is 8 %. On Jester the policy's
    perplexity at κ = 1 is about 50 of 100 titles."""
    sha256: str = ""
    """Checksum that the file must have; empty accepts any, and `ReplayWorld.config` then holds the one it found, so
    that the config saved beside a result pins its data."""
    train_share: float = 0.56
    """Of the users, by a permutation that the seed decides: 4,032 of Jester's 7,200, the quick preset's 4,000."""
    validation_share: float = 0.12
    """864 of Jester's: a mean over them has a standard error of 0.03 points."""
    test_share: float = 0.2
    """1,440 of Jester's: more than for validation, since these are the users that results are about."""
    judge_share: float = 0.12
    """864 of Jester's: the judge is trained on users that nobody else sees."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.path, str) and self.path != "", self, "path", "the path of an npz file")
        digits = isinstance(self.sha256, str) and set(self.sha256) <= set("0123456789abcdef")
        require(digits and len(self.sha256) in (0, 64), self, "sha256", "64 hexadecimal digits, or empty")
        for split in SPLITS:
            require(0.0 < self.share(split) < 1.0, self, f"{split}_share", "between 0 and 1")
        total = sum(self.share(split) for split in SPLITS)
        require(total <= 1.0 + 1e-9, self, "test_share", f"smaller: the shares sum to {total:g}, more than 1")

    def share(self, split: str) -> float:
        """Of the users, how many belong to the split."""
        return float(getattr(self, f"{split}_share"))


DIRECTIONS = 8
"""Dimensions of likeness between real titles (``order_effect``): as many as a simulated world's tastes."""


class ReplayWorld(WorldBase):
    """A world of real users: real satisfaction, synthetic choices.

    A user is pulled by ``δ·z_u + sqrt(1−δ²)·z_v``: z_u is the user's own row of satisfaction, centred and of
    unit variance (0 throughout for a user who likes everything alike), z_v that of another real user of the
    same split, whose suggestions these are. It stands where a simulated world has ``⟨φ_u, v_i⟩``, with one
    difference: real users agree on many titles, so the variance of the sum lies somewhat above 1.

    Args:
        config: the file, the splits and how users behave.
        matrix: the file's content, where it has been read before; by default it is read here.

    Raises:
        DataFileError: the file cannot be used, or has not the checksum that the config asks for.
        ConfigError: histories as long as the catalogue, or a split with fewer than two users.
    """

    env_id = "recsim_gr/Replay-v0"
    config: ReplayConfig

    def __init__(self, config: ReplayConfig, matrix: RatingMatrix | None = None) -> None:
        self.matrix = matrix or load_matrix(config.path)
        if config.sha256 not in ("", self.matrix.sha256):
            raise DataFileError(
                f"{config.path} has sha256 {self.matrix.sha256}, but its config asks for {config.sha256}; "
                "give the file that the config was made with, or an empty sha256"
            )
        self.config = replace(config, sha256=self.matrix.sha256)
        require_room(config, self.n_titles)
        self._members = self._split_users()
        self._place = np.empty(len(self.matrix.satisfaction), dtype=np.int64)  # of each user within its split
        self._split = np.full(len(self._place), -1, dtype=np.int64)
        for number, split in enumerate(SPLITS):
            members = self._members[split]
            self._place[members], self._split[members] = np.arange(len(members)), number

    @property
    def n_titles(self) -> int:
        return self.matrix.satisfaction.shape[1]

    def n_users(self, split: str) -> int:
        """How many users the split has.

        Raises:
            ConfigError: no such split.
        """
        if split not in SPLITS:
            raise ConfigError(f"no split {split!r}; there are {', '.join(SPLITS)}")
        return len(self._members[split])

    def users(self, split: str, n: int, offset: int = 0) -> Users:
        there_are = self.n_users(split)
        require_integers(n, offset)
        if n < 1 or offset < 0 or offset + n > there_are:
            raise ConfigError(
                f"users {offset} to {offset + n} of split {split!r}: {self.matrix.name} has {there_are} there"
            )
        return self._members[split][offset : offset + n].copy()

    def in_split(self, users: Users, split: str) -> NDArray[np.bool_]:
        return self._split[users] == SPLITS.index(split)

    def satisfaction(self, users: Users) -> NDArray[np.float32]:
        return self.matrix.satisfaction[users]

    def satisfaction_with(self, users: Users, titles: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.matrix.satisfaction[users[:, None], titles]

    def pull(self, users: Users) -> FloatArray:
        own, outside = self.pull_weights(users)
        return own[:, None] * self.standardised[users] + outside[:, None] * self.standardised[self.partners(users)]

    @cached_property
    def durations(self) -> FloatArray:
        """(I,) minutes: the data's own where they have them."""
        return super().durations if self.matrix.durations is None else self.matrix.durations

    @cached_property
    def directions(self) -> FloatArray:
        """(I, d): titles are alike that the same users like, by the leading right singular vectors of `standardised`,
        each title's scaled to length 1."""
        _, strength, right = np.linalg.svd(self.standardised.astype(np.float64), full_matrices=False)
        vectors = (strength[:DIRECTIONS, None] * right[:DIRECTIONS]).T
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float64).tiny)

    @cached_property
    def standardised(self) -> NDArray[np.float32]:
        """(U, I): z, satisfaction centred and of unit variance for each user; 0 for a user without variance."""
        centred = self.matrix.satisfaction - self.matrix.satisfaction.mean(axis=1, keepdims=True, dtype=np.float64)
        deviation = centred.std(axis=1, keepdims=True)
        # a constant row is centred to rounding errors, which must not be blown up
        flat = self.matrix.satisfaction.min(axis=1) == self.matrix.satisfaction.max(axis=1)
        deviation[flat] = np.inf
        return (centred / deviation).astype(np.float32)

    def partners(self, users: Users) -> Users:
        """(n,): whose suggestions each user follows, another user of the same split."""
        u = uniforms(self.config.seed, "partner", users, 1)[:, 0]
        partners = np.empty(len(users), dtype=np.int64)
        for number, split in enumerate(SPLITS):
            members, here = self._members[split], self._split[users] == number
            others = np.floor(u[here] * (len(members) - 1)).astype(np.int64)
            partners[here] = members[others + (others >= self._place[users[here]])]
        return partners

    def pull_weights(self, users: Users) -> tuple[FloatArray, FloatArray]:
        """(n,) δ and (n,) sqrt(1 − δ²): of the own row and of the partner's."""
        delta = self.behaviour(users).discernment
        return delta, np.sqrt(1.0 - delta**2)

    # -- inside ----------------------------------------------------------------------------------------------

    def _split_users(self) -> dict[str, Users]:
        n = len(self.matrix.satisfaction)
        order = generator(self.config.seed, "split").permutation(n).astype(np.int64)
        sizes = [int(self.config.share(split) * n + 1e-9) for split in SPLITS]
        for split, size in zip(SPLITS, sizes, strict=True):
            if size < 2:
                raise ConfigError(
                    f"{self.matrix.name} has {n} users, of which split {split!r} gets {size}; "
                    f"it needs 2 or more: raise {split}_share"
                )
        return dict(zip(SPLITS, np.split(order, np.cumsum(sizes))[: len(SPLITS)], strict=True))

    def at_most(self, split: str, n: int) -> int:
        return min(n, self.n_users(split))

    def _sample_users(self, split: str, n: int, seed: int) -> Users:
        """(n,) users of the split without repeats, a random subset for each seed."""
        members = self.users(split, self.n_users(split))
        if not 1 <= n <= len(members):
            return self.users(split, n)  # which says how many there are
        return generator(self.config.seed, f"contexts/{split}/{seed}").permutation(members)[:n]


__all__ = [
    "FORMATS",
    "KNOWN_FILES",
    "KnownFile",
    "RatingMatrix",
    "ReplayConfig",
    "ReplayWorld",
    "load_matrix",
]
