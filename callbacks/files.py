"""Writing files so that a crash, a full disk or a second reader never meets half a file. Imports no torch."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

SCHEMA = 1
"""Version of record.json; raised when a field changes its meaning."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replaces `path` by `content` in one step; on failure the old file stays and nothing else is left behind.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; records are for everyone who may read the folder
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_record(folder: Path, record: dict[str, Any]) -> Path:
    """Writes `folder`/record.json in one step: an earlier record is replaced or stays whole. NaN becomes null.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    metrics = {key: value if math.isfinite(value) else None for key, value in record["metrics"].items()}
    path = folder / "record.json"
    write_atomic(path, json.dumps({**record, "metrics": metrics}, indent=1))
    return path
