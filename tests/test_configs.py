"""Configs (refusals, ids, JSON) and files (whole or not at all)."""

import errno
import hashlib
import json
import math
import os
import stat
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsim_gr.configs import config_id, from_dict, require, require_finite_numbers, to_dict
from recsim_gr.errors import ConfigError, RunDirectoryError
from recsim_gr.files import atomic_path, read_json, write_json, write_text
from recsim_gr.noise import NOISE_MODELS
from recsim_gr.world import WorldConfig

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Inner:
    depth: int = 2


@dataclass(frozen=True)
class Toy:
    """One field of each kind that a config has."""

    layers: int = 2
    rate: float = 0.5
    name: str = "toy"
    widths: tuple[int, ...] = (4, 8)
    on: bool = False

    def __post_init__(self) -> None:
        require_finite_numbers(self)
        require(self.layers >= 1, self, "layers", "at least 1")


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    strength: float = 1.0


toys = st.builds(
    Toy,
    layers=st.integers(1, 10**6),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    name=st.text(max_size=8),
    widths=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    on=st.booleans(),
)
worlds = st.builds(
    WorldConfig,
    n_titles=st.integers(100, 10_000),
    history_length=st.integers(1, 99),
    reward_noise=st.floats(0.0, 1.0),
    pull_strength=st.floats(0.0, 50.0),
    noise_model=st.sampled_from(list(NOISE_MODELS)),
    seed=st.integers(0, 2**63),
)


# ----- refusals


def test_a_refusal_names_the_field_the_value_and_what_would_do() -> None:
    with pytest.raises(ConfigError) as refusal:
        Toy(layers=0)
    assert str(refusal.value) == "Toy.layers must be at least 1, got 0"


@pytest.mark.parametrize(
    "value", [1.0, 1.5, "3", True, None, math.nan, [1], 1j, np.True_, np.array([1]), np.float64(2.0)]
)
def test_what_is_no_integer_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError) as refusal:
        Toy(layers=value)
    assert str(refusal.value) == f"Toy.layers must be an integer, got {value!r}"


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, "0.5", b"0.5", True, None, [0.5], 1j, np.True_, np.array([0.5]), 10**400],
)
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError) as refusal:
        Toy(rate=value)
    assert str(refusal.value) == f"Toy.rate must be a finite number, got {value!r}"


@pytest.mark.parametrize("value", [3, np.int64(3), np.int32(3), np.uint8(3)])
def test_integers_of_numpy_are_stored_as_plain_ones(value: Any) -> None:
    assert type(Toy(layers=value).layers) is int
    assert to_dict(Toy(layers=value)) == to_dict(Toy(layers=3))


@pytest.mark.parametrize("value", [1, np.int64(1), np.float32(1.0), np.float64(1.0)])
def test_numbers_of_numpy_and_integers_are_stored_as_floats(value: Any) -> None:
    assert type(Toy(rate=value).rate) is float
    assert Toy(rate=value) == Toy(rate=1.0)
    assert config_id(Toy(rate=value)) == config_id(Toy(rate=1.0))


# ----- JSON and ids


@PROPERTY
@given(toys)
def test_a_config_survives_json(config: Toy) -> None:
    assert from_dict(Toy, json.loads(json.dumps(to_dict(config)))) == config


@PROPERTY
@given(worlds)
def test_a_world_config_survives_json(config: WorldConfig) -> None:
    again = from_dict(WorldConfig, json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert config_id(again) == config_id(config)


def test_nested_configs_become_nested_json() -> None:
    assert to_dict(Outer()) == {"inner": {"depth": 2}, "strength": 1.0}


def test_an_unknown_key_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as refusal:
        from_dict(Toy, {"layers": 1, "laters": 2})
    assert str(refusal.value) == "Toy has no field 'laters'; it has layers, name, on, rate, widths"


def test_a_bad_value_from_json_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"WorldConfig\.reward_noise must be between 0 and 1, got 1\.5"):
        from_dict(WorldConfig, {"reward_noise": 1.5})


def test_an_id_is_the_hash_of_the_content() -> None:
    # sorted keys, no spaces, a list over the parts; the first 8 of 64 hexadecimal digits
    text = '[{"layers":2,"name":"toy","on":false,"rate":0.5,"widths":[4,8]},"seed",3]'
    assert config_id(Toy(), "seed", 3) == hashlib.sha256(text.encode()).hexdigest()[:8]


@PROPERTY
@given(worlds, worlds)
def test_ids_are_equal_exactly_when_configs_are(one: WorldConfig, other: WorldConfig) -> None:
    assert (config_id(one) == config_id(other)) == (one == other)
    assert config_id(one, other) != config_id(one)


def test_every_field_changes_the_id() -> None:
    changes: dict[str, Any] = {}
    for field in fields(WorldConfig):
        value = getattr(WorldConfig(), field.name)
        if isinstance(value, str):
            changes[field.name] = {"noise_model": "gaussian", "sampler": "stepwise"}[field.name]
        elif isinstance(value, bool):
            changes[field.name] = not value
        else:
            changes[field.name] = value + 1 if isinstance(value, int) else value / 2 or 0.25
    ids = [config_id(replace(WorldConfig(), **{name: value})) for name, value in changes.items()]
    assert len({config_id(WorldConfig()), *ids}) == len(ids) + 1


def test_an_id_is_the_same_in_another_process() -> None:
    # hash() of a string is salted per process; an id that went through it would differ
    code = "from recsim_gr.configs import config_id; print(config_id({'b': 1, 'a': [2.5, 'x']}), end='')"
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert told.stdout.decode() == config_id({"a": [2.5, "x"], "b": 1})


# ----- files


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@PROPERTY
@given(content=json_values)
def test_json_survives_the_disk(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    path = tmp_path_factory.mktemp("json") / "content.json"
    write_json(path, content)
    assert read_json(path) == content
    assert leftovers(path.parent) == ["content.json"]


def test_what_json_cannot_say_becomes_null(tmp_path: Path) -> None:
    content = {"b": [math.nan, 1.5], "a": (math.inf, -math.inf), 3: {"deep": math.nan}}
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"b": [None, 1.5], "a": [None, None], "3": {"deep": None}}
    assert text.index('"b"') < text.index('"a"')  # keys in the order given
    assert text.endswith("\n")


def test_parent_folders_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "x.txt", "größer ν")
    assert (tmp_path / "a" / "b" / "x.txt").read_bytes() == "größer ν".encode()


def test_a_file_is_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "x.txt", "x")
        assert os.umask(0o022) == 0o022  # and writing has not changed it
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.txt").stat().st_mode) == 0o644


@pytest.mark.parametrize("step", ["fsync", "replace", "write"])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, old: str | None
) -> None:
    path = tmp_path / "x.txt"
    if old is not None:
        path.write_text(old)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target, name = {"fsync": (os, "fsync"), "replace": (Path, "replace"), "write": (Path, "write_text")}[step]
    monkeypatch.setattr(target, name, full)
    with pytest.raises(RunDirectoryError) as refusal:
        write_text(path, "new")
    monkeypatch.undo()
    assert str(refusal.value).startswith(f"cannot write {path}: No space left on device; ")
    assert leftovers(tmp_path) == ([] if old is None else ["x.txt"])
    if old is not None:
        assert path.read_text() == old


def test_any_other_error_leaves_what_was_there_and_keeps_its_name(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")

    def broken() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyError("a bug, not a disk")

    with pytest.raises(KeyError, match="a bug"):
        broken()
    assert leftovers(tmp_path) == ["x.txt"]
    assert path.read_text() == "old"


def test_a_folder_that_cannot_be_made_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunDirectoryError, match="cannot write"):
        write_text(tmp_path / "file" / "x.txt", "x")
    with pytest.raises(RunDirectoryError, match="cannot write"):
        write_text(tmp_path, "a folder has that name")
    assert leftovers(tmp_path) == ["file"]


def test_json_that_is_missing_or_none_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"x\.json is missing; is this the output directory of a run\?"):
        read_json(tmp_path / "x.json")
    for name, content in (("cut", b'{"a": [1, '), ("bytes", b"\xff\xfe\x00"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RunDirectoryError, match=f"{name} cannot be read as JSON"):
            read_json(tmp_path / name)
    with pytest.raises(RunDirectoryError, match="cannot be read as JSON"):
        read_json(tmp_path)
