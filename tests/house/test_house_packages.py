"""Four folders, one package: the list that an install goes by, the links of a checkout, and the names."""

import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

Run = Callable[..., CompletedProcess[str]]

FOLDERS = ("envs", "agents", "benchmarks")


def setuptools_table(root: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    return table


def packages_in_tree(root: Path) -> set[str]:
    """Every folder that holds Python files, by the name it is imported under (links are not followed)."""
    packages = set()
    for package, folder in setuptools_table(root)["package-dir"].items():
        for path in (root / folder).rglob("*.py"):
            packages.add(".".join([package, *path.parent.relative_to(root / folder).parts]))
    return packages


def test_the_package_list_is_the_tree(root: Path) -> None:
    assert set(setuptools_table(root)["packages"]) == packages_in_tree(root)


def test_an_unlisted_folder_is_noticed(checkout: Path) -> None:
    (checkout / "envs" / "extra").mkdir()
    (checkout / "envs" / "extra" / "module.py").touch()
    unlisted = packages_in_tree(checkout) - set(setuptools_table(checkout)["packages"])
    assert unlisted == {"recsim_gr.envs.extra"}


def test_every_listed_package_has_an_init(root: Path) -> None:
    for package in setuptools_table(root)["packages"]:
        assert (root / package.replace(".", "/") / "__init__.py").is_file(), package


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_link_leads_to_the_folder(root: Path, folder: str) -> None:
    assert os.readlink(root / "recsim_gr" / folder) == f"../{folder}"
    assert setuptools_table(root)["package-dir"][f"recsim_gr.{folder}"] == folder


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_short_name_is_refused(root: Path, run: Run, folder: str) -> None:
    result = run(sys.executable, "-c", f"import {folder}", cwd=root)
    assert result.returncode != 0
    assert f"ImportError: import recsim_gr.{folder} instead of {folder}" in result.stdout
