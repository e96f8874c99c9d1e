"""Records of runs: reading them, choosing those that count, and what they say of a claim. Imports no torch."""

import difflib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from callbacks.files import write_atomic
from scripts import recipes
from scripts.claims import Claim
from scripts.code_hash import code_hash
from scripts.errors import UserError
from scripts.verdicts import Verdict, judge

SCHEMA = 1
"""Version of record.json that this code reads."""

LEVELS = 4
"""Folders above a record: paper, recipe, config hash, seed."""

FIELDS: dict[str, type | tuple[type, ...]] = {
    "status": str,
    "recipe": str,
    "recipe_hash": (str, type(None)),
    "overrides": list,
    "config": dict,
    "config_hash": str,
    "code_hash": str,
    "seed": int,
    "metrics": dict,
    "cpu_seconds": (int, float),
    "finished_at": str,
}
"""What is read here; a record holds more."""


@dataclass(frozen=True)
class Record:
    """One record.json.

    Args:
        path: the file.
        data: its content; metrics that are null in the file (NaN, infinity) are NaN.
        stale: the recipe, or code that the run used, has changed since.
    """

    path: Path
    data: dict[str, Any]
    stale: bool

    @property
    def run(self) -> tuple[str, int]:
        """(recipe, seed), e.g. ("elr/mini-sym40", 10)."""
        return self.data["recipe"], self.data["seed"]

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.data["status"] == "finished"

    @property
    def repeatable_failure(self) -> bool:
        """Whether the run failed for a reason outside the method (full disk, killed worker ...): worth another try."""
        return not self.finished and not str(self.data.get("reason")).startswith("NonFiniteLossError")

    @property
    def metrics(self) -> dict[str, float]:
        """Final metrics."""
        return self.data["metrics"]

    @property
    def cpu_seconds(self) -> float:
        """Cost of the run."""
        return self.data["cpu_seconds"]


@dataclass(frozen=True)
class ClaimResult:
    """A claim, its verdict and where that comes from.

    Args:
        claim: the claim.
        verdict: its verdict.
        stale: a record used here is stale.
        cpu_seconds: cost of the distinct runs used here; other claims may share them.
        treatment, control: the metric for each seed; None without a record, NaN for a failed run. `control` is None
            for a claim against a threshold.
        missing: runs without a record that counts.
        failed: runs that failed or whose metric is not finite.
        to_run: runs that would change or renew the verdict: missing, stale, or failed for an outside reason.
    """

    claim: Claim
    verdict: Verdict
    stale: bool
    cpu_seconds: float
    treatment: tuple[float | None, ...]
    control: tuple[float | None, ...] | None
    missing: tuple[tuple[str, int], ...]
    failed: tuple[tuple[str, int], ...]
    to_run: tuple[tuple[str, int], ...]


def write_record(folder: Path, record: dict[str, Any]) -> Path:
    """Writes `folder`/record.json in one step: an earlier record is replaced or stays whole. NaN becomes null.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    metrics = {key: value if math.isfinite(value) else None for key, value in record["metrics"].items()}
    path = folder / "record.json"
    write_atomic(path, json.dumps({**record, "metrics": metrics}, indent=1))
    return path


def read_records(runs: Path) -> tuple[list[Record], list[str]]:
    """All records `<runs>/<slug>/<recipe>/<config hash>/seed<k>/record.json`, sorted by path.

    Returns:
        The records, and one line for each file or folder that cannot be used (unreadable, broken JSON, other schema
        version, missing field). Such files are left alone.

    Raises:
        UserError: `runs` exists but cannot be read.
    """
    if not runs.exists():
        return [], []
    problems: list[str] = []
    files = _record_files(runs, LEVELS, problems)
    if problems and not os.access(runs, os.R_OK | os.X_OK) or not runs.is_dir():
        raise UserError(f"--runs: cannot read {problems[0]}")
    recipe_hashes: dict[str, str | None] = {}
    code_hashes: dict[str, str] = {}
    records = []
    for file in files:
        data = _read(file, problems)
        if data is None:
            continue
        name, config = data["recipe"], data["config_hash"]
        if name not in recipe_hashes:
            recipe_hashes[name] = _current_recipe_hash(name)
        if config not in code_hashes:
            code_hashes[config] = code_hash(data["config"])
        stale = (data["recipe_hash"], data["code_hash"]) != (recipe_hashes[name], code_hashes[config])
        records.append(Record(file, data, stale))
    return records, problems


def evaluate(claim: Claim, records: Sequence[Record]) -> ClaimResult:
    """What the records say of a claim.

    Records with overrides do not count. Of several records of a run, one that is not stale comes first, then the
    latest. A stale record without the claim's metric counts as missing: an older version of the code wrote it.

    Raises:
        UserError: a current record has no such metric.
    """
    used: dict[tuple[str, int], Record] = {}
    arms = [_arm(claim, recipe, metric, records, used) for recipe, metric in claim.arms]
    control = arms[1] if len(arms) > 1 else None
    verdict = judge(
        arms[0], control, threshold=claim.threshold, direction=claim.direction, margin=claim.margin
    )
    runs = list(dict.fromkeys(claim.runs()))
    values = {
        (recipe, seed): value
        for (recipe, _), arm in zip(claim.arms, arms, strict=True)
        for seed, value in zip(claim.seeds, arm, strict=True)
    }
    missing = tuple(run for run in runs if run not in used)
    redo = {run for run, record in used.items() if record.stale or record.repeatable_failure}
    return ClaimResult(
        claim,
        verdict,
        stale=any(record.stale for record in used.values()),
        cpu_seconds=math.fsum(record.cpu_seconds for record in used.values()),
        treatment=arms[0],
        control=control,
        missing=missing,
        failed=tuple(run for run in runs if values[run] is not None and not math.isfinite(values[run] or 0.0)),
        to_run=tuple(run for run in runs if run in redo or run in missing),
    )
