"""What the tests of packaging and gates share: the checkout, copies of it to break, commands run in them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("recsim_gr", "envs", "agents", "benchmarks", "tests")
# A make that runs these tests, or a path to the checkout, must not leak into the commands under test.
LEAKING = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHONPATH"}


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a command in a folder and return what it said; nothing is raised when it fails."""

    def run(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if name not in LEAKING}
        return subprocess.run(
            [str(word) for word in command],
            cwd=cwd,
            env={**clean, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=120,
        )

    return run


@pytest.fixture(scope="session")
def tool(run: Run) -> Run:
    """Run a tool that is installed beside the running interpreter."""

    def tool(name: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        return run(Path(sys.executable).with_name(name), *arguments, cwd=cwd)

    return tool


@pytest.fixture(scope="session")
def copy_checkout() -> Callable[[Path], Path]:
    """Copy what the project is made of, links as links, into a new folder."""

    def copy_checkout(to: Path) -> Path:
        to.mkdir(parents=True, exist_ok=True)
        for folder in FOLDERS:
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / folder, to / folder, symlinks=True, ignore=ignore)
        for path in ROOT.iterdir():
            if path.suffix in {".toml", ".md", ".txt"} or path.name in {"LICENSE", "Makefile"}:
                shutil.copy(path, to)
        shutil.copytree(ROOT / ".ci", to / ".ci")
        return to

    return copy_checkout


@pytest.fixture
def checkout(tmp_path: Path, copy_checkout: Callable[[Path], Path]) -> Path:
    """A copy of the checkout that a test may break."""
    return copy_checkout(tmp_path / "checkout")
