"""The table of finished nets, one row each: in memory and as parquet."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from callbacks.files import write_atomic


def as_columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Rows of members as columns."""
    rows = list(rows)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def write_members(path: Path, rows: list[dict[str, Any]]) -> None:
    """One row per member, as parquet, in one step."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    write_atomic(path, sink.getvalue().to_pybytes())


def read_members(files: list[str]) -> dict[str, dict[str, Any]]:
    """Rows of such files by member id.

    Raises:
        ValueError: a file is not there or not one of members.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            found = pq.read_table(file).to_pylist()
            rows |= {row["member_id"]: row for row in found}
        except (OSError, pa.ArrowException, KeyError) as error:
            raise ValueError(f"model.done must name members.parquet files of runs, got {file} ({error})") from error
    return rows
