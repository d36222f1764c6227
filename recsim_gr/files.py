"""Writing files so that one which looks whole is whole."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recsim_gr.errors import RunDirectoryError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary neighbour of ``path`` to write to; it takes the name only when the block succeeds.

    Raises:
        RunDirectoryError: the file cannot be written (no space, no permission); nothing is left behind.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes files private; results are meant to be read
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunDirectoryError(f"cannot write {path}: {reason}; free space or choose another place") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically, keys in the order given; NaN becomes null, which every JSON reader accepts."""
    write_text(path, json.dumps(without_nan(content), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        RunDirectoryError: the file is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunDirectoryError(f"{path} is missing; is this the output directory of a run?") from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, no JSON, an endless integer
        advice = "remove that directory and run again, or give another"
        raise RunDirectoryError(f"{path} cannot be read as JSON ({error}); {advice}") from error


def without_nan(content: Any) -> Any:
    """JSON values with None in place of NaN and infinities."""
    if isinstance(content, float):
        return content if content == content and abs(content) != float("inf") else None
    if isinstance(content, dict):
        return {str(key): without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_nan(value) for value in content]
    return content
