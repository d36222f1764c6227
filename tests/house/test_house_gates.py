"""Each gate is broken once on purpose: it must turn red, and for the right reason."""

import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

Tool = Callable[..., CompletedProcess[str]]


@pytest.fixture
def small(root: Path, tmp_path: Path) -> Path:
    """The project's settings over one empty module, so that a tool has little to read."""
    shutil.copy(root / "pyproject.toml", tmp_path)
    (tmp_path / "recsim_gr").mkdir()
    (tmp_path / "recsim_gr" / "__init__.py").touch()
    (tmp_path / "recsim_gr" / "module.py").touch()
    return tmp_path


def test_ruff_check_turns_red(small: Path, tool: Tool) -> None:
    assert tool("ruff", "check", ".", cwd=small).returncode == 0
    (small / "recsim_gr" / "module.py").write_text("import os\n")
    result = tool("ruff", "check", ".", cwd=small)
    assert result.returncode == 1
    assert "F401" in result.stdout


def test_ruff_check_refuses_to_unpickle(small: Path, tool: Tool) -> None:
    (small / "recsim_gr" / "module.py").write_text('import torch\n\nweights = torch.load("weights.pt")\n')
    result = tool("ruff", "check", ".", cwd=small)
    assert result.returncode == 1
    assert "TID251" in result.stdout


def test_ruff_format_turns_red(small: Path, tool: Tool) -> None:
    assert tool("ruff", "format", "--check", ".", cwd=small).returncode == 0
    (small / "recsim_gr" / "module.py").write_text("x = ( 1,2 )\n")
    assert tool("ruff", "format", "--check", ".", cwd=small).returncode == 1


def test_mypy_turns_red(small: Path, tool: Tool) -> None:
    module = small / "recsim_gr" / "module.py"
    module.write_text("def double(x: int) -> int:\n    return 2 * x\n")
    clean = tool("mypy", "recsim_gr", cwd=small)
    assert clean.returncode == 0, clean.stdout
    module.write_text('def double(x):\n    return 2 * x\n\n\nwrong: int = "one"\n')
    result = tool("mypy", "recsim_gr", cwd=small)
    assert result.returncode == 1
    assert "[no-untyped-def]" in result.stdout
    assert "[assignment]" in result.stdout


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("recsim_gr.randomness", "recsim_gr.cli"),  # upward
        ("recsim_gr.agents", "recsim_gr.envs"),  # sideways
        ("recsim_gr.agents", "recsim_gr.world"),  # downward, but a learner
    ],
)
def test_the_layers_turn_red(checkout: Path, tool: Tool, importer: str, imported: str) -> None:
    inject_import(checkout, importer, imported)
    result = tool("lint-imports", "--no-cache", "--no-logo", cwd=checkout)
    assert result.returncode == 1
    assert f"{importer} is not allowed to import {imported}" in result.stdout


def test_a_learner_may_not_reach_the_truth_through_another_module(checkout: Path, tool: Tool) -> None:
    inject_import(checkout, "recsim_gr.agents", "recsim_gr.go_between")
    inject_import(checkout, "recsim_gr.go_between", "recsim_gr.world")
    result = tool("lint-imports", "--no-cache", "--no-logo", "--contract", "truth", cwd=checkout)
    assert result.returncode == 1
    assert "recsim_gr.agents is not allowed to import recsim_gr.world" in result.stdout


def test_an_import_for_types_only_may_point_anywhere(checkout: Path, tool: Tool) -> None:
    before = tool("lint-imports", "--no-cache", "--no-logo", cwd=checkout)
    with open(module_file(checkout, "recsim_gr.agents"), "a") as file:
        file.write("\nfrom typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import recsim_gr.world\n")
    after = tool("lint-imports", "--no-cache", "--no-logo", cwd=checkout)
    assert after.returncode == before.returncode, after.stdout


def test_a_module_without_a_layer_turns_red(checkout: Path, tool: Tool) -> None:
    (checkout / "recsim_gr" / "stray.py").touch()
    result = tool("lint-imports", "--no-cache", "--no-logo", cwd=checkout)
    assert result.returncode == 1
    assert "recsim_gr.stray" in result.stdout


def inject_import(checkout: Path, importer: str, imported: str) -> None:
    """Append an import to a module; whichever of the two is missing is made."""
    module_file(checkout, imported)
    with open(module_file(checkout, importer), "a") as file:
        file.write(f"\nimport {imported}\n")


def module_file(checkout: Path, module: str) -> Path:
    path = checkout.joinpath(*module.split("."))
    if path.is_dir():
        return path / "__init__.py"
    path.with_suffix(".py").touch()
    return path.with_suffix(".py")
