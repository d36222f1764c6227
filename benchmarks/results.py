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


FLOATS = [field.name for field in SCHEMA if field.type == pa.float64()]


def write_results(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes the table, in the order of the cells; a figure that is not finite is NaN.

    Raises:
        RunDirectoryError: it cannot be written.
    """
    columns = {name: [row[name] for row in rows] for name in SCHEMA.names}
    for name in FLOATS:
        columns[name] = [float("nan") if value is None else float(value) for value in columns[name]]
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns, schema=SCHEMA), temporary, compression="zstd")


def is_row(row: Any) -> bool:
    """Whether JSON values are a row of the table: its columns and no others, of the right kinds."""
    if not isinstance(row, dict) or set(row) != set(SCHEMA.names):
        return False
    texts = all(isinstance(row[f.name], str) for f in SCHEMA if f.type == pa.string())
    numbers = all(
        row[f.name] is None or isinstance(row[f.name], (int, float)) for f in SCHEMA if f.type == pa.float64()
    )
    return texts and numbers and isinstance(row["seed"], int)
