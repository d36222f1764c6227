"""What everyone may know of the titles: the metadata that a service has before anybody watched anything."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from recsim_gr.errors import LogFormatError


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Public metadata of I titles; the arrays are copied and cannot be written to.

    Attributes:
        genre: (I,) int64, 0 or more.
        duration_minutes: (I,) float32.
        release: (I,) int64; the epoch that the title comes out in. Before it nobody can watch it.

    Raises:
        LogFormatError: not such metadata; says which title and what would do.
    """

    genre: NDArray[np.int64]
    duration_minutes: NDArray[np.float32]
    release: NDArray[np.int64]

    def __post_init__(self) -> None:
        for name, kind in (("genre", np.int64), ("duration_minutes", np.float32), ("release", np.int64)):
            values: NDArray[Any] = np.array(getattr(self, name), dtype=kind)
            if values.ndim != 1 or len(values) != len(self.genre):
                raise LogFormatError(f"catalogue: {name} must be one number a title, got shape {values.shape}")
            illegal = ~(np.isfinite(values) & (values > 0 if name == "duration_minutes" else values >= 0))
            if illegal.any():
                title = int(np.argmax(illegal))
                would_do = "more than 0" if name == "duration_minutes" else "0 or more"
                raise LogFormatError(f"catalogue: {name} of title {title} must be {would_do}, got {values[title]}")
            values.flags.writeable = False
            object.__setattr__(self, name, values)

    def __len__(self) -> int:
        return len(self.genre)

    @property
    def has_releases(self) -> bool:
        """Whether some title comes out after the first epoch."""
        return bool((self.release > 0).any())

    @property
    def n_genres(self) -> int:
        """Genres are 0 to n_genres − 1."""
        return int(self.genre.max(initial=0)) + 1

    def unreleased(self, epoch: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(n, I): the titles that are not out yet in each of (n,) epochs."""
        mask: NDArray[np.bool_] = self.release > np.asarray(epoch)[:, None]
        return mask

    def to_json(self) -> dict[str, Any]:
        """As JSON values; float32 durations survive, since a float64 prints them exactly."""
        return {name: getattr(self, name).tolist() for name in ("genre", "duration_minutes", "release")}

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """The inverse of `to_json`.

        Raises:
            LogFormatError: foreign values.
        """
        try:
            return cls(**{name: np.asarray(values[name]) for name in ("genre", "duration_minutes", "release")})
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, LogFormatError):
                raise
            raise LogFormatError(f"catalogue: genre, duration_minutes and release are needed ({error})") from error
