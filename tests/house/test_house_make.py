"""`make test` and `.ci/run`: what runs, in which order, and what a failure does. The tools are stand-ins."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

Run = Callable[..., CompletedProcess[str]]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make to test")

GATES = ("ruff check .", "ruff format --check .", "mypy recsim_gr tests", "lint-imports --no-logo")
# Notes how it was called, says something, and fails when told to.
STAND_IN = """#!/bin/sh
call="${0##*/}${*:+ $*}"
echo "$call" >> calls
echo "said by $call"
[ "$call" != "$BREAK" ]
"""


@pytest.fixture
def staged(checkout: Path) -> Path:
    """A copy of the checkout whose .venv, up to date, holds stand-ins for the tools."""
    tools = checkout / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name in ("ruff", "mypy", "lint-imports", "pytest", "recsim-gr"):
        (tools / name).write_text(STAND_IN)
        (tools / name).chmod(0o755)
    (checkout / ".venv" / ".installed").touch()
    return checkout


def calls(checkout: Path) -> list[str]:
    path = checkout / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_the_gates_come_before_pytest(root: Path, run: Run) -> None:
    plan = run("make", "-n", "test", cwd=root).stdout
    positions = [plan.index(f".venv/bin/{command}") for command in (*GATES, "pytest")]
    assert positions == sorted(positions)


def test_pytest_has_the_last_word(staged: Path, run: Run) -> None:
    result = run("make", "test", cwd=staged)
    assert result.returncode == 0
    assert calls(staged) == [*GATES, "pytest"]
    assert result.stdout == "said by pytest\n"


@pytest.mark.parametrize("gate", GATES)
def test_a_failing_gate_fails_make_test_and_is_heard(staged: Path, run: Run, gate: str) -> None:
    result = run("make", "test", cwd=staged, env={"BREAK": gate})
    assert result.returncode != 0
    assert "pytest" not in calls(staged)
    assert f"said by {gate}\n" in result.stdout


@pytest.mark.parametrize("broken", ["", "mypy recsim_gr tests", "pytest"])
def test_ci_fails_as_make_does_and_ends_on_what_failed(staged: Path, run: Run, broken: str) -> None:
    result = run(staged / ".ci" / "run", cwd=staged.parent, env={"BREAK": broken})
    assert (result.returncode == 0) == (broken == "")
    assert result.stdout.splitlines()[-1] == f"said by {broken or 'pytest'}"


def test_landscape_runs_the_quick_preset_on_one_thread_a_process(staged: Path, run: Run) -> None:
    tool = staged / ".venv" / "bin" / "recsim-gr"
    tool.write_text('#!/bin/sh\necho "$* $OMP_NUM_THREADS $OMP_WAIT_POLICY" > calls\n')
    assert run("make", "landscape", cwd=staged).returncode == 0
    assert calls(staged) == ["run landscape --preset quick --out runs/landscape --workers 2 1 PASSIVE"]


def test_an_old_python_is_refused_in_one_line(staged: Path, run: Run) -> None:
    shutil.rmtree(staged / ".venv")
    result = run("make", "lint", "PYTHON=false", cwd=staged)
    assert result.returncode != 0
    assert result.stdout.startswith("recsim_gr needs Python 3.11 or newer and false is not")
    assert not (staged / ".venv").exists()


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_dependency_sets_up_again(staged: Path, run: Run, name: str) -> None:
    assert "pip install" not in run("make", "-n", "lint", cwd=staged).stdout
    newer = (staged / ".venv" / ".installed").stat().st_mtime + 1
    command = f"import os; os.utime({name!r}, ({newer}, {newer}))"
    run(sys.executable, "-c", command, cwd=staged)
    assert "pip install" in run("make", "-n", "lint", cwd=staged).stdout
