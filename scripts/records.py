"""Records of runs: reading them, choosing those that count, and what they say of a claim. Imports no torch."""

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from callbacks.files import SCHEMA
from scripts import recipes
from scripts.claims import Claim
from scripts.code_hash import code_hash
from scripts.errors import UserError
from scripts.verdicts import Verdict, judge

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
    def failed_from_outside(self) -> bool:
        """Whether the run failed, but not by diverging (full disk, out of memory ...): worth another try."""
        return not self.finished and not str(self.data.get("reason")).startswith("NonFiniteLossError")

    @property
    def metrics(self) -> dict[str, float]:
        """Final metrics."""
        return self.data["metrics"]

    @property
    def cpu_seconds(self) -> float:
        """Cost of the run."""
        return self.data["cpu_seconds"]

    @property
    def rank(self) -> tuple[bool, str]:
        """Of two records of a run the one with the greater rank counts: not stale first, then the latest (UTC)."""
        return not self.stale, self.data["finished_at"]


@dataclass(frozen=True)
class ClaimResult:
    """A claim, its verdict and where that comes from.

    Args:
        claim: the claim.
        verdict: its verdict.
        records: the records that count, one for each run.
        treatment, control: the metric for each seed; None without a record, NaN for a failed run. `control` is None
            for a claim against a threshold.
        missing: runs without a record that counts.
        failed: runs that failed or whose metric is not finite.
        to_run: runs that would change or renew the verdict: missing, stale, or failed for an outside reason.
    """

    claim: Claim
    verdict: Verdict
    records: tuple[Record, ...]
    treatment: tuple[float | None, ...]
    control: tuple[float | None, ...] | None
    missing: tuple[tuple[str, int], ...]
    failed: tuple[tuple[str, int], ...]
    to_run: tuple[tuple[str, int], ...]

    @property
    def against(self) -> tuple[float | None, ...]:
        """What each seed's treatment is held against: the threshold, or the control times the claim's factor."""
        return held_against(self.claim, self.control)

    @property
    def stale(self) -> bool:
        """Whether recipe or code of a run that counts have changed since."""
        return any(record.stale for record in self.records)

    @property
    def cpu_seconds(self) -> float:
        """Cost of the distinct runs that count; other claims may share them."""
        return math.fsum(record.cpu_seconds for record in self.records)


def held_against(claim: Claim, control: Sequence[float | None] | None) -> tuple[float | None, ...]:
    """See `ClaimResult.against`."""
    if control is None:
        return (claim.threshold,) * len(claim.seeds)
    return tuple(value if value is None else claim.factor * value for value in control)


def read_records(runs: Path) -> tuple[list[Record], list[str]]:
    """All records `<runs>/<slug>/<recipe>/<config hash>/seed<k>/record.json`, sorted by path.

    Returns:
        The records, and one line for each file or folder that cannot be used (unreadable, broken JSON, other schema
        version, missing field). Such files are left alone.

    Raises:
        UserError: `runs` exists but cannot be read.
    """
    if not readable(runs, "--runs"):
        return [], []
    problems: list[str] = []
    return load_records(_record_files(runs, problems), problems), problems


def readable(folder: Path, option: str) -> bool:
    """Whether the folder exists.

    Raises:
        UserError: it exists but cannot be read; names the option that gave it.
    """
    try:
        os.scandir(folder).close()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"{option}: cannot read {folder.absolute()}: {error.strerror}") from error
    return True


def load_records(
    files: Iterable[Path],
    problems: list[str],
    check: Callable[[Path, dict[str, Any]], str | None] = lambda file, data: None,
) -> list[Record]:
    """The records in these files; adds a line to `problems` for each that cannot be used.

    Args:
        files: record files, wherever they lie.
        problems: is added to.
        check: what is wrong with a record beyond its fields' types; None for nothing.
    """
    recipe_hashes: dict[str, str | None] = {}
    code_hashes: dict[str, str] = {}
    records = []
    for file in files:
        data = _read(file, problems)
        if data is None:
            continue
        if wrong := check(file, data):
            problems.append(f"{file}: {wrong}")
            continue
        name, config = data["recipe"], data["config_hash"]
        if name not in recipe_hashes:
            recipe_hashes[name] = current_recipe_hash(name)
        if config not in code_hashes:
            code_hashes[config] = code_hash(data["config"])
        stale = (data["recipe_hash"], data["code_hash"]) != (recipe_hashes[name], code_hashes[config])
        records.append(Record(file, data, stale))
    return records


def folders_below(folder: Path, levels: int, problems: list[str]) -> list[Path]:
    """Folders so many levels below, sorted; adds a line to `problems` for each that cannot be read."""
    try:
        inside = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        problems.append(f"{folder}: {error.strerror}")
        return []
    return inside if levels == 1 else [file for below in inside for file in folders_below(below, levels - 1, problems)]


def evaluate(claim: Claim, records: Sequence[Record]) -> ClaimResult:
    """What the records say of a claim.

    Records with overrides do not count. Of several records of a run, one that is not stale comes first, then the
    latest. A stale record without the claim's metric counts as missing: an older version of the code wrote it.

    Raises:
        UserError: a current record has no such metric.
    """
    used = _choose(claim, records)
    arms = [
        tuple(_value(claim, used.get((recipe, seed)), metric) for seed in claim.seeds) for recipe, metric in claim.arms
    ]
    control = arms[1] if claim.control is not None else None
    scaled = None if control is None else held_against(claim, control)
    runs = list(dict.fromkeys(claim.runs()))
    redo = {run for run, record in used.items() if record.stale or record.failed_from_outside}
    bad = {
        (recipe, seed)
        for (recipe, _), arm in zip(claim.arms, arms, strict=True)
        for seed, value in zip(claim.seeds, arm, strict=True)
        if value is not None and not math.isfinite(value)
    }
    return ClaimResult(
        claim,
        verdict=judge(arms[0], scaled, threshold=claim.threshold, direction=claim.direction, margin=claim.margin),
        records=tuple(used.values()),
        treatment=arms[0],
        control=control,
        missing=tuple(run for run in runs if run not in used),
        failed=tuple(run for run in runs if run in bad),
        to_run=tuple(run for run in runs if run not in used or run in redo),
    )


def _choose(claim: Claim, records: Sequence[Record]) -> dict[tuple[str, int], Record]:
    """The record that counts for each run of the claim that has one."""
    needed: dict[tuple[str, int], set[str]] = {}
    for recipe, metric in claim.arms:
        for seed in claim.seeds:
            needed.setdefault((recipe, seed), set()).add(metric)
    used: dict[tuple[str, int], Record] = {}
    for record in records:
        if record.run not in needed or record.data["overrides"]:
            continue
        if record.stale and record.finished and not needed[record.run] <= record.metrics.keys():
            continue
        if record.run not in used or record.rank > used[record.run].rank:
            used[record.run] = record
    return used


def _value(claim: Claim, record: Record | None, metric: str) -> float | None:
    """The metric; None without a record, NaN for a failed run."""
    if record is None:
        return None
    if not record.finished:
        return math.nan
    if metric not in record.metrics:
        close = difflib.get_close_matches(metric, record.metrics, n=5, cutoff=0.5)
        others = [key for key in sorted(record.metrics) if key not in close]
        raise UserError(
            f"claim {claim.id!r} of {claim.slug}: no metric {metric!r} in {record.path}; "
            f"it has {', '.join([*close, *others]) or 'none'}"
        )
    return record.metrics[metric]


def current_recipe_hash(name: str) -> str | None:
    """Hash of the recipe as it is now; None if it is gone or broken."""
    try:
        return recipes.recipe_hash(recipes.ROOT / f"{name}.yaml")
    except UserError:
        return None


def _record_files(runs: Path, problems: list[str]) -> list[Path]:
    """The record.json of every run; runs that were set aside (`seed0.old1`) are left out."""
    folders = folders_below(runs, LEVELS, problems)
    files = [folder / "record.json" for folder in folders if re.fullmatch(r"seed\d+", folder.name)]
    return [file for file in files if os.path.lexists(file)]


def _read(file: Path, problems: list[str]) -> dict[str, Any] | None:
    """The content of a record, or None and a line in `problems`."""
    try:
        data = json.loads(file.read_text())
    except OSError as error:
        problems.append(f"{file}: {error.strerror}")
        return None
    except ValueError as error:
        problems.append(f"{file}: not readable as JSON: {error}")
        return None
    version = data.get("schema") if isinstance(data, dict) else None
    if version != SCHEMA:
        problems.append(f"{file}: record of schema {version!r}; this version of noisebench reads schema {SCHEMA}")
        return None
    wrong = [key for key, kinds in FIELDS.items() if key not in data or not isinstance(data[key], kinds)]
    if "metrics" not in wrong:
        wrong += [key for key, v in data["metrics"].items() if not isinstance(v, int | float | None)]
    if wrong:
        problems.append(f"{file}: missing or of the wrong type: {', '.join(wrong)}")
        return None
    return {**data, "metrics": {key: math.nan if value is None else value for key, value in data["metrics"].items()}}
