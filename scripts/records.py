"""Run records, and what they say of a claim. Imports no torch."""

import difflib
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import recipes
from scripts.claims import Claim
from scripts.code_hash import code_hash
from scripts.errors import UserError
from scripts.verdicts import Verdict, judge

SCHEMA = 1
"""The version of record.json that this code reads; `callbacks.run_record` writes it."""

NEEDED = ("status", "recipe", "recipe_hash", "overrides", "config", "code_hash", "seed", "metrics", "finished_at")


@dataclass(frozen=True)
class Record:
    """One record.json."""

    path: Path
    data: dict[str, Any]

    @property
    def finished(self) -> bool:
        """False for a failed run."""
        return bool(self.data["status"] == "finished")

    @property
    def cpu_seconds(self) -> float:
        """Cost of the run."""
        return float(self.data.get("cpu_seconds") or 0.0)

    @functools.cached_property
    def stale(self) -> bool:
        """Whether recipe or code have changed since."""
        try:
            recipe_hash = recipes.recipe_hash(recipes.find_recipe(self.data["recipe"]))
        except UserError:
            return True
        return bool(recipe_hash != self.data["recipe_hash"] or code_hash(self.data["config"]) != self.data["code_hash"])

    def value(self, metric: str, place: str) -> float | None:
        """A metric; None where the run failed or the value is not finite.

        Raises:
            UserError: the run has no such metric.
        """
        if not self.finished:
            return None
        metrics = self.data["metrics"]
        if metric not in metrics:
            close = difflib.get_close_matches(metric, metrics, n=5, cutoff=0.3) or sorted(metrics)
            raise UserError(f"{place}: no metric {metric!r} in {self.path}; it has {', '.join(close)}")
        value = metrics[metric]
        return float(value) if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class ClaimResult:
    """A claim with what its records say.

    Attributes:
        claim, verdict: what is claimed, what came out.
        stale: a record that counts is older than its recipe or code.
        treatment, control: the values of the seeds that have run; None each for a failed run.
        cpu_seconds: of all runs that count.
        to_run: (recipe, seed) without a finished, fresh record, in the claim's order.
        records: the records that count.
    """

    claim: Claim
    verdict: Verdict
    stale: bool
    treatment: tuple[float | None, ...]
    control: tuple[float | None, ...] | None
    cpu_seconds: float
    to_run: tuple[tuple[str, int], ...]
    records: tuple[Record, ...]


def read_records(runs: Path) -> tuple[list[Record], list[str]]:
    """All records below a folder, and one line for each file that cannot be used; those files stay as they are.

    Raises:
        UserError: the folder cannot be read.
    """
    records, problems = [], []
    try:
        files = sorted(runs.glob("*/*/*/seed*/record.json"))
    except OSError as error:
        raise UserError(f"--runs: cannot read {runs}: {error.strerror}") from error
    for file in files:
        try:
            data = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            problems.append(f"{file} is not a readable record: {error}")
            continue
        version = data.get("schema") if isinstance(data, dict) else None
        if version != SCHEMA:
            problems.append(f"{file} has schema {version!r}; this version of noisebench reads schema {SCHEMA}")
        elif missing := [key for key in NEEDED if key not in data]:
            problems.append(f"{file} lacks {', '.join(missing)}")
        else:
            records.append(Record(file, data))
    return records, problems


def evaluate(claim: Claim, records: list[Record]) -> ClaimResult:
    """Verdict of a claim from records: those of its recipes and seeds without overrides, fresh before stale."""
    chosen = {run: _best(records, *run) for run in claim.runs()}
    place = f"claim {claim.id}"
    present = [seed for seed in claim.seeds if all(chosen[run] for run in claim.runs() if run[1] == seed)]

    def arm(recipe: str, metric: str) -> tuple[float | None, ...]:
        return tuple(record.value(metric, place) for seed in present if (record := chosen[recipe, seed]))

    treatment = arm(claim.treatment, claim.metric)
    control = None if claim.control is None else arm(claim.control, claim.control_metric)
    verdict = judge(
        treatment,
        control,
        threshold=claim.threshold,
        sign=claim.sign,
        margin=claim.margin,
        missing=len(claim.seeds) - len(present),
    )
    used = tuple(record for record in chosen.values() if record)
    fresh = {run for run, record in chosen.items() if record and record.finished and not record.stale}
    return ClaimResult(
        claim,
        verdict,
        any(record.stale for record in used),
        treatment,
        control,
        sum(record.cpu_seconds for record in used),
        tuple(run for run in claim.runs() if run not in fresh),
        used,
    )


def _best(records: list[Record], recipe: str, seed: int) -> Record | None:
    fitting = [
        record
        for record in records
        if record.data["recipe"] == recipe and record.data["seed"] == seed and not record.data["overrides"]
    ]
    return max(fitting, key=lambda record: (not record.stale, record.data["finished_at"]), default=None)
