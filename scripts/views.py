"""What the pages show of a claim beyond its verdict: seeds, runs, settings, where it ran. Imports no torch."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import recipes
from scripts.claims import Claim
from scripts.pictures import relative_address
from scripts.records import ClaimResult, Record

METRICS = {
    "test/acc": "Test accuracy (fraction of 1)",
    "wrong/memorized": "Wrong labels predicted as given (share)",
    "wrong/correct": "Wrong labels predicted as their true class (share)",
}
"""Metrics whose curves are drawn for every claim that has them."""


@dataclass(frozen=True)
class Cell:
    """One value of one run: the metric, or why there is none, and the record it comes from."""

    value: float | None
    note: str
    record: Record | None


@dataclass(frozen=True)
class SeedRow:
    """One seed of a claim.

    Args:
        seed: the seed.
        cells: treatment and, where there is one, control.
        effect: ±(treatment − control or threshold); None if a run is missing or failed.
    """

    seed: int
    cells: tuple[Cell, ...]
    effect: float | None


@dataclass(frozen=True)
class Place:
    """Hardware or versions that several runs share."""

    runs: str
    facts: dict[str, str]


@dataclass(frozen=True)
class RecipeRow:
    """A recipe and what its header says: the first line, and `Run:`, `Paper:` ... by their names."""

    name: str
    what: str
    notes: dict[str, str]


def seed_rows(result: ClaimResult) -> list[SeedRow]:
    """One row for each seed, in the claim's order; failed and missing runs are rows like the others."""
    claim, found = result.claim, {record.run: record for record in result.records}
    sign = 1 if claim.direction == "greater" else -1
    arms = [result.treatment] if result.control is None else [result.treatment, result.control]
    rows = []
    for index, seed in enumerate(claim.seeds):
        cells = tuple(
            _cell(arm[index], found.get((recipe, seed))) for (recipe, _), arm in zip(claim.arms, arms, strict=True)
        )
        other, first = result.against[index], cells[0].value
        known = all(cell.value is not None for cell in cells)
        effect = sign * (first - other) if known and first is not None and other is not None else None
        rows.append(SeedRow(seed, cells, effect))
    return rows


def config_diff(result: ClaimResult) -> list[tuple[str, str | None, str | None]]:
    """(key, treatment's value, control's value) of settings that differ; None where an arm lacks the key.

    From the resolved settings of the first seed that has both records.
    """
    found = {record.run: record for record in result.records}
    recipes_of = [recipe for recipe, _ in result.claim.arms]
    for seed in result.claim.seeds:
        pair = [found.get((recipe, seed)) for recipe in recipes_of]
        if len(pair) == 2 and pair[0] is not None and pair[1] is not None:
            left, right = (dict(_flat(record.data["config"])) for record in pair if record is not None)
            keys = [*left, *(key for key in right if key not in left)]
            return [(key, left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)]
    return []


def places(records: Iterable[Record], field: str) -> list[Place]:
    """Runs grouped by what their records say under `field` (hardware, versions), the largest group first."""
    groups: dict[tuple[tuple[str, str], ...], list[Record]] = {}
    for record in records:
        facts = tuple((str(key), plain(value)) for key, value in mapping(record.data.get(field)).items())
        groups.setdefault(facts, []).append(record)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [Place(_named(runs, len(ordered) == 1), dict(facts)) for facts, runs in ordered]


def commit(record: Record) -> str:
    """The record's commit, see `commit_of`."""
    return commit_of(record.data.get("git"))


def commit_of(state: Any) -> str:
    """`dac409390ed9`, with ` (uncommitted changes)` for a dirty tree; `unknown` without a commit."""
    git = mapping(state)
    name = git.get("commit")
    if not isinstance(name, str) or not name:
        return "unknown"
    return name[:12] + ("" if git.get("dirty") is False else " (uncommitted changes)")


def href(record: Record, target: Path) -> str:
    """Relative address of the record's file from a page in `target`."""
    return relative_address(record.path, target)


def curve_key(metric: str, keys: Iterable[str]) -> str | None:
    """The curve that a final metric sums up: `test/acc_last5` comes from `test/acc`."""
    return max((key for key in keys if metric == key or metric.startswith(f"{key}_")), key=len, default=None)


def curve_metrics(claim: Claim, keys: Sequence[str]) -> list[str]:
    """Metrics whose curves go with a claim: its own first, then `METRICS`, each once, those that exist."""
    own = [curve_key(metric, keys) for _, metric in claim.arms]
    return [key for key in dict.fromkeys([*own, *METRICS]) if key is not None and key in keys]


def recipe_rows(slug: str) -> list[RecipeRow]:
    """The recipes of a paper with their headers."""
    rows = []
    for path in recipes.recipe_files(slug):
        lines = recipes.header(path)
        pairs = [line.partition(":") for line in lines[1:]]
        notes = {name.strip(): text.strip() for name, colon, text in pairs if colon}
        rows.append(RecipeRow(path.stem, lines[0] if lines else "", notes))
    return rows


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, otherwise an empty one: optional parts of a record may hold anything."""
    return value if isinstance(value, dict) else {}


def plain(value: Any) -> str:
    """Text as it is, other values as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _cell(value: float | None, record: Record | None) -> Cell:
    if record is None or value is None:
        return Cell(None, "no record", None)
    if not record.finished:
        return Cell(None, f"failed: {record.data.get('reason') or 'no reason given'}", record)
    if not math.isfinite(value):
        return Cell(None, "not finite", record)
    return Cell(value, "", record)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values as text; an empty mapping or list is a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inside:
        yield prefix, plain(value)
        return
    for key, item in inside:
        yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))


def _named(runs: list[Record], alone: bool) -> str:
    if alone:
        return f"all {len(runs)} runs" if len(runs) > 1 else "the run"
    return ", ".join(f"{recipe.partition('/')[2]} seed {seed}" for recipe, seed in sorted(run.run for run in runs))
