"""``results.parquet``: the tidy table of a run."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recsim_gr.files import atomic_path

SCHEMA = pa.schema(
    [
        ("suite", pa.string()),
        ("env", pa.string()),
        ("agent", pa.string()),
        ("config_id", pa.string()),
        ("reward_noise", pa.float64()),
        ("noise_model", pa.string()),
        ("reliability", pa.float64()),
        ("seed", pa.int64()),
        ("metric", pa.string()),
        ("value", pa.float64()),
    ]
)
"""Columns of the table; rows of the world itself have an empty ``agent``, and ``reliability`` is within user."""

TRIAL_SCHEMA = pa.schema(
    [
        *SCHEMA,
        ("log_size", pa.int64()),
        ("option", pa.string()),
        ("strength", pa.float64()),
        ("choice", pa.string()),
    ]
)
"""Columns of suites that fit an agent several times: training users, the option that sets the trials apart, its value
there (NaN for an agent that has none), and which rules choose the trial."""


def write_results(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes the table, in the order of the cells; a figure that is not finite is NaN.

    Raises:
        RunDirectoryError: it cannot be written.
    """
    schema = schema_of(rows[0])
    columns = {name: [row[name] for row in rows] for name in schema.names}
    for name in floats(schema):
        columns[name] = [float("nan") if value is None else float(value) for value in columns[name]]
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns, schema=schema), temporary, compression="zstd")


def schema_of(row: dict[str, Any]) -> pa.Schema:
    """Which of the two tables a row belongs to; all rows of a run belong to one."""
    return TRIAL_SCHEMA if "option" in row else SCHEMA


def integers(schema: pa.Schema) -> list[str]:
    """Names of its columns of integers."""
    return [field.name for field in schema if field.type == pa.int64()]


def floats(schema: pa.Schema) -> list[str]:
    """Names of its columns of floats."""
    return [field.name for field in schema if field.type == pa.float64()]


def is_row(row: Any) -> bool:
    """Whether JSON values are a row of the table: its columns and no others, of the right kinds."""
    if not isinstance(row, dict) or set(row) != set(schema_of(row).names):
        return False
    schema = schema_of(row)
    texts = all(isinstance(row[f.name], str) for f in schema if f.type == pa.string())
    numbers = all(row[name] is None or isinstance(row[name], (int, float)) for name in floats(schema))
    return texts and numbers and all(isinstance(row[name], int) for name in integers(schema))
