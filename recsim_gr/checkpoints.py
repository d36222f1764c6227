"""Saved models and trainings: tensors in a safetensors file, all else in the JSON beside it, and never pickle.

    NAME.json          what it is, and the sha256 of the tensors and of itself
    NAME.safetensors   the tensors

A pair that is written over an older one is whole at every moment, also for who is killed in between: new tensors wait
as ``NAME.next.safetensors`` until the JSON names them, and a reader takes the file that the JSON names.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from recsim_gr.backbones import Backbone, build_backbone
from recsim_gr.errors import CheckpointError, RecsimError, RunDirectoryError
from recsim_gr.files import atomic_path, write_text

SCHEMA_VERSION = 1

BROKEN = (
    RecsimError,
    OSError,
    SafetensorError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    OverflowError,
)
"""What building something from a file raises where the file holds something else than it should."""

_OWN = ("schema_version", "tensors", "sha256")


class Checkpoint(NamedTuple):
    """What `write_checkpoint` was given: JSON values, and tensors by name."""

    about: dict[str, Any]
    tensors: dict[str, Tensor]


def write_checkpoint(directory: str | Path, name: str, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes ``name.json`` and ``name.safetensors`` into a directory, made where it is missing.

    Args:
        directory: where.
        name: of the files; what stood under it is replaced, and stays whole until the new one is.
        about: JSON values, without NaN or infinities.
        tensors: of any type and device; their memory may overlap.

    Raises:
        RunDirectoryError: the directory cannot be written.
        ValueError: ``about`` has a number that is no JSON, or a key that the format needs itself.
    """
    taken = [key for key in _OWN if key in about]
    if taken:
        raise ValueError(f"a checkpoint writes {taken[0]!r} itself; call it something else")
    json_file, kept, waiting = _paths(directory, name)
    _finish_last(json_file, kept, waiting)
    digest = save_tensors(waiting, tensors)
    content = {"schema_version": SCHEMA_VERSION, **about, "tensors": digest}
    content["sha256"] = _digest(content)
    write_text(json_file, json.dumps(content, indent=1, allow_nan=False) + "\n")
    _renamed(waiting, kept)


def _finish_last(json_file: Path, kept: Path, waiting: Path) -> None:
    """Does what the last writer was killed before it could."""
    try:
        unfinished = waiting.exists() and _names(json_file) == _digest_of(waiting)
    except OSError as error:
        raise RunDirectoryError(f"{waiting} cannot be read ({error}); remove it") from error
    if unfinished:
        _renamed(waiting, kept)


def _renamed(waiting: Path, kept: Path) -> None:
    try:
        waiting.replace(kept)
    except OSError as error:
        raise RunDirectoryError(f"cannot write {kept} ({error}); remove what stands there") from error


def read_checkpoint(directory: str | Path, name: str) -> Checkpoint:
    """Reads what `write_checkpoint` wrote, tensors on the CPU; runs no code from the files.

    Raises:
        CheckpointError: files that are missing, damaged, of another version, or do not belong to each other.
    """
    json_file, kept, waiting = _paths(directory, name)
    content = _content(json_file)
    for path in (kept, waiting):
        tensors = _tensors(path, content["tensors"]) if path.exists() else None
        if tensors is not None:
            return Checkpoint({key: value for key, value in content.items() if key not in _OWN}, tensors)
    found = "is damaged, or belongs to another checkpoint" if kept.exists() else "is missing"
    raise CheckpointError(f"{kept} {found}; remove {json_file.name} and {kept.name} and make them again")


def checkpoint_exists(directory: str | Path, name: str) -> bool:
    """Whether there is one of that name, whole or not."""
    json_file, kept, _ = _paths(directory, name)
    return json_file.exists() or kept.exists()


# -- tensors -----------------------------------------------------------------------------------------------------


def save_tensors(path: str | Path, tensors: dict[str, Tensor]) -> str:
    """Writes a safetensors file, whole or not at all; returns its sha256 in hexadecimal digits.

    Raises:
        RunDirectoryError: it cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(Path(path)) as temporary:
        try:
            save_file(plain, temporary)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error
        return _digest_of(temporary)


def tensors_under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those whose name starts with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# -- backbones ---------------------------------------------------------------------------------------------------


def save_backbone(backbone: Backbone, directory: str | Path) -> None:
    """Writes ``backbone.json``, its kind and shape, and ``backbone.safetensors``, its weights.

    Raises:
        RunDirectoryError: they cannot be written.
    """
    write_checkpoint(directory, "backbone", {"backbone": backbone.shape()}, backbone.state_dict())


def load_backbone(directory: str | Path) -> Backbone:
    """Loads what `save_backbone` wrote, on the CPU and in eval mode.

    Raises:
        CheckpointError: files that are missing, damaged, or hold no backbone that is registered here.
    """
    about, tensors = read_checkpoint(directory, "backbone")
    try:
        with torch.random.fork_rng(devices=[]):  # building it draws weights that are replaced at once
            backbone = build_backbone(about["backbone"])
        backbone.load_state_dict(tensors)
    except BROKEN as error:
        raise CheckpointError(f"{directory} holds no backbone that can be loaded ({error}); save it again") from error
    return backbone.eval()


# -- files -------------------------------------------------------------------------------------------------------


def _paths(directory: str | Path, name: str) -> tuple[Path, Path, Path]:
    directory = Path(directory)
    return tuple(directory / f"{name}.{end}" for end in ("json", "safetensors", "next.safetensors"))  # type: ignore[return-value]


def _content(path: Path) -> dict[str, Any]:
    """The JSON, checked against its own checksum."""
    advice = f"remove it and {path.stem}.safetensors, and make them again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(content, dict) and content.pop("sha256", None) == _digest(content)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; there is no checkpoint without it") from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, no JSON, an endless integer
        raise CheckpointError(f"{path} cannot be read ({error}); {advice}") from error
    if not whole:
        raise CheckpointError(f"{path} is damaged: its content does not have the sha256 that it names; {advice}")
    if content.get("schema_version") != SCHEMA_VERSION or not isinstance(content.get("tensors"), str):
        version = content.get("schema_version")
        raise CheckpointError(f"{path} has version {version!r}, and this code reads {SCHEMA_VERSION}; {advice}")
    return content


def _tensors(path: Path, digest: str) -> dict[str, Tensor] | None:
    """Those of a file; None where it is not the one that is meant."""
    try:
        content = path.read_bytes()
        return load(content) if hashlib.sha256(content).hexdigest() == digest else None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); make it again") from error


def _names(json_file: Path) -> str | None:
    """The tensors that an older JSON names, where there is one."""
    try:
        return str(_content(json_file)["tensors"])
    except CheckpointError:
        return None


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
