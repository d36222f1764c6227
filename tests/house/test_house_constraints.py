"""Every dependency is pinned: the ones that pyproject.toml names, and all that come with them."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def pins(root: Path) -> dict[str, str]:
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pairs = [re.fullmatch(r"([A-Za-z0-9._-]+)==([^+\s]+)", line) for line in lines]
    assert all(pairs), [line for line, pair in zip(lines, pairs, strict=True) if not pair]
    return {canonicalize_name(pair[1]): pair[2] for pair in pairs if pair}


def named(root: Path) -> list[Requirement]:
    """The requirements that pyproject.toml names to run, to develop and to build."""
    table = tomllib.loads((root / "pyproject.toml").read_text())
    # peers are pinned where they stand and installed by nobody here; they want older versions of what we run on
    extras = [group for extra, group in table["project"]["optional-dependencies"].items() if extra != "peers"]
    groups = [table["build-system"]["requires"], table["project"]["dependencies"], *extras]
    return [Requirement(text) for group in groups for text in group]


def closure(requirements: list[Requirement]) -> set[str]:
    """Names of everything that the requirements pull in here, by the metadata of what is installed."""
    seen: set[tuple[str, str]] = set()
    todo = [(requirement, extra) for requirement in requirements for extra in ("", *requirement.extras)]
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in metadata.requires(name) or []:
            pulled = Requirement(text)
            if pulled.marker is None or pulled.marker.evaluate({"extra": extra}):
                todo += [(pulled, e) for e in ("", *pulled.extras)]
    return {name for name, _ in seen}


def test_what_pyproject_names_is_pinned_within_its_range(root: Path) -> None:
    pinned = pins(root)
    for requirement in named(root):
        assert canonicalize_name(requirement.name) in pinned, requirement
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_what_comes_along_is_pinned_and_nothing_more(root: Path) -> None:
    pinned = set(pins(root))
    pulled = closure(named(root))
    # torch with CUDA brings more, at the versions that torch itself pins.
    unpinned = {name for name in pulled - pinned if not re.match(r"nvidia-|cuda-|triton", name)}
    assert not unpinned
    assert not pinned - pulled


@pytest.mark.parametrize("name", ["torch", "numpy", "gymnasium"])
def test_the_tests_run_on_the_pinned_version(root: Path, name: str) -> None:
    assert metadata.version(name).split("+")[0] == pins(root)[name]
