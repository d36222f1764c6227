"""The wheel is whole, and works where there is no checkout."""

import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

Run = Callable[..., CompletedProcess[str]]

IMPORT_ALL = """
import importlib, importlib.metadata, sys
for name in sys.argv[1:]:
    print(importlib.import_module(name).__file__)
print(importlib.metadata.version("recsim_gr"))
"""


@pytest.fixture(scope="module")
def wheel(
    tmp_path_factory: pytest.TempPathFactory,
    copy_checkout: Callable[[Path], Path],
    run: Run,
) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    checkout = copy_checkout(folder / "checkout")
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    result = run(sys.executable, "-m", "pip", "wheel", *offline, "-w", folder, checkout, cwd=folder)
    assert result.returncode == 0, result.stdout
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, run: Run) -> Path:
    """An interpreter with the wheel installed, that borrows its dependencies from the running environment."""
    venv = wheel.parent / "venv"
    made = run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=wheel.parent)
    assert made.returncode == 0, made.stdout
    scripts = "Scripts" if sys.platform == "win32" else "bin"
    python = venv / scripts / Path(sys.executable).name
    pip = (sys.executable, "-m", "pip", "--python", python)
    installed = run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=wheel.parent)
    assert installed.returncode == 0, installed.stdout
    # A folder named in a .pth file is searched last and its own .pth files are not read, so the editable
    # install of the running environment stays out of it.
    asked = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=venv)
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(asked.stdout.strip(), "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return python


def test_the_wheel_holds_the_package_and_nothing_else(root: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package_dir = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    modules = {
        "/".join([*package.split("."), *path.relative_to(root / folder).parts])
        for package, folder in package_dir.items()
        for path in (root / folder).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules
    assert "recsim_gr/py.typed" in names
    metadata_folder = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    assert {name.split("/")[0] for name in names} == {"recsim_gr", metadata_folder}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_installed_wheel_imports_without_the_checkout(root: Path, python: Path, tmp_path: Path, run: Run) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    result = run(python, "-c", IMPORT_ALL, *packages, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    *files, version = result.stdout.splitlines()
    venv = python.parents[1]
    assert [Path(file).is_relative_to(venv) for file in files] == [True] * len(packages), files
    assert version == project["project"]["version"]
    assert python.with_name("recsim-gr").exists()
