"""Frozen dataclass configs: checked by name, written to JSON, told apart by a short id."""

import dataclasses
import hashlib
import json
import math
from numbers import Integral, Real
from typing import Any, TypeVar

from recsim_gr.errors import ConfigError

ConfigT = TypeVar("ConfigT")


def require(holds: bool, config: object, field: str, would_do: str) -> None:
    """Refuses a field of a config with its name, the value it got and what would do.

    Raises:
        ConfigError: ``holds`` is false.
    """
    if not holds:
        got = getattr(config, field)
        raise ConfigError(f"{type(config).__name__}.{field} must be {would_do}, got {got!r}")


def require_finite_numbers(config: object) -> None:
    """Refuses NaN, infinities and non-numbers in the fields annotated as numbers.

    What passes is stored as a plain int or float, so that equal configs have equal ids: NumPy's scalars are
    no JSON, and 1 and 1.0 are not the same JSON.

    Raises:
        ConfigError: names the first such field.
    """
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if field.type in (int, "int"):
            require(_is_integer(value), config, field.name, "an integer")
            object.__setattr__(config, field.name, int(value))
        elif field.type in (float, "float"):
            require(_is_finite_number(value), config, field.name, "a finite number")
            object.__setattr__(config, field.name, float(value))


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON values, nested configs included."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))


def from_dict(kind: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Builds a flat config from JSON values; lists become tuples.

    Raises:
        ConfigError: a key that the config does not have, or a value that it refuses.
    """
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"{kind.__name__} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def config_id(*parts: Any) -> str:
    """Eight hexadecimal digits that name the content of configs (or of JSON values).

    A field of a config whose metadata say ``{"identity": False}`` has no part in it: where a file lies, say.
    """
    plain = [_identity(part) if dataclasses.is_dataclass(part) else part for part in parts]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _identity(config: Any) -> dict[str, Any]:
    fields = dataclasses.fields(config)
    left_out = {field.name for field in fields if not field.metadata.get("identity", True)}
    return {name: value for name, value in to_dict(config).items() if name not in left_out}


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite_number(value: object) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False
