"""What a suite is: a list of cells, each worked out on its own, and a table that they fill."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from recsim_gr.errors import ConfigError, UnknownNameError

Notify = Callable[[float, str], None]
"""Told the share of a cell that is done, in [0, 1], and what is being done."""


@dataclass(frozen=True)
class Cell:
    """One piece of work, independent of every other.

    Attributes:
        name: names its file.
        settings: what sets it apart from the other cells, as JSON values.
    """

    name: str
    settings: dict[str, Any]


@dataclass
class CellResult:
    """What a cell found.

    Attributes:
        rows: rows of the table: agent, metric, value, and the cell's own columns.
        costs: per agent: seconds to fit, gradient steps, samples.
        failed: agent to the reason of its failure; a cell with any is run again next time.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class Suite(ABC):
    """A named experiment: a frozen config with presets, cells, and what to show of the results."""

    name: ClassVar[str]
    presets: ClassVar[dict[str, Any]]
    """Preset name to config."""
    most_workers: ClassVar[int] = 2**31
    """Processes that may work on cells at a time: 1 for what measures time, which a neighbour would falsify."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def preset(cls, name: str) -> Any:
        """The config of a preset.

        Raises:
            UnknownNameError: no such preset; lists those that are.
        """
        if name not in cls.presets:
            raise UnknownNameError(f"suite {cls.name!r} has no preset {name!r}; it has {', '.join(cls.presets)}")
        return cls.presets[name]

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The config as JSON values: what a run directory is told apart by."""

    @abstractmethod
    def cells(self) -> list[Cell]:
        """All cells, in the order in which they are run."""

    @abstractmethod
    def run_cell(self, cell: Cell, notify: Notify) -> CellResult:
        """Works a cell out; called in a process of its own, with one thread."""

    @abstractmethod
    def estimate_cell_seconds(self) -> float:
        """About how long a cell takes on this machine and one core, from a measurement of a second or so."""

    @abstractmethod
    def report(self, run_dir: Path) -> tuple[Path, list[str]]:
        """Draws the results; the page, and lines worth printing."""


SUITES: dict[str, type[Suite]] = {}
"""All registered suites by name."""


def register(suite: type[Suite]) -> type[Suite]:
    """Makes a suite known by its ``name``.

    Raises:
        ConfigError: the name is taken by another class.
    """
    if SUITES.get(suite.name, suite).__qualname__ != suite.__qualname__:
        raise ConfigError(f"there is already a suite {suite.name!r}; choose another name")
    SUITES[suite.name] = suite
    return suite


def suite_type(name: str) -> type[Suite]:
    """The registered suite of that name.

    Raises:
        UnknownNameError: no such suite; lists those that are.
    """
    if name not in SUITES:
        raise UnknownNameError(f"no suite {name!r}; there are {', '.join(SUITES)}")
    return SUITES[name]
