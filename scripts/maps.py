"""Effect maps as files: values of every seed at each cell of a grid, and where they come from. Imports no torch."""

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from scripts import recipes
from scripts.code_hash import code_hash_of
from scripts.errors import UserError
from scripts.records import current_recipe_hash

SCHEMA = 1
"""Version of the file; raised when a field changes its meaning."""
KEYS = {"title", "metric", "rows", "batches", "nfes", "overrides"}
"""Of a grid."""
STEPS = (("within", 0.15), ("some", 0.5), ("much", 1.0), ("most", math.inf))
"""Names of |log2 of the ratio| up to these: 1.11, 1.41 and 2 times."""


@dataclass(frozen=True)
class Cell:
    """Both arms at one process, batch and number of sampling steps.

    Args:
        row: label of the process.
        batch: global batch.
        nfe: evaluations per sample.
        treatment, control: metric of each seed, in the map's order; NaN for a run that diverged.
    """

    row: str
    batch: int
    nfe: int
    treatment: tuple[float, ...]
    control: tuple[float, ...]

    @property
    def differences(self) -> list[float]:
        """Treatment minus control of each seed; negative where the method's value is lower."""
        return [a - b for a, b in zip(self.treatment, self.control, strict=True)]

    @property
    def means(self) -> tuple[float, float]:
        """Of treatment and control over seeds; NaN if a run diverged."""
        return _mean(self.treatment), _mean(self.control)

    @property
    def difference(self) -> float:
        """Mean over seeds; NaN if a run diverged."""
        return _mean(self.differences)

    @property
    def complete(self) -> bool:
        """Whether no run diverged."""
        return math.isfinite(self.difference)

    @property
    def mixed(self) -> bool:
        """Whether the difference has not the same sign with every seed."""
        return self.complete and min(self.differences) <= 0 <= max(self.differences)

    @property
    def ratio(self) -> float:
        """Of the means, treatment over control; NaN where a mean is not positive or a run diverged."""
        treatment, control = self.means
        return treatment / control if treatment > 0 and control > 0 else math.nan

    @property
    def colour(self) -> str:
        """Class of the ratio: `within`, or one of `some`, `much`, `most` with `-lower` or `-higher`; `` without one."""
        if math.isnan(self.ratio):
            return ""
        log = math.log2(self.ratio)
        name = next(name for name, end in STEPS if abs(log) <= end)
        return name if name == "within" else f"{name}-{'lower' if log < 0 else 'higher'}"


@dataclass(frozen=True)
class EffectMap:
    """A measured grid: enough to show it, to make it again, and to tell whether it is stale.

    Args:
        paper: slug.
        title: what the differences are.
        metric: name of the metric with `{nfe}`.
        command: makes it again.
        steps: optimizer steps of a quick look, None for the grid's own.
        seeds: in the order of the cells' values.
        rows: for each process its recipes, `treatment` and `control`.
        batches, nfes: the axes.
        grid_hash: of the grid's file.
        recipes: for each recipe `recipe_hash`, `code_hash` and the `classes` from which the latter is computed.
        git: distinct `commit` and `dirty` of the runs.
        cpu_seconds: of all runs.
        finished_at: end of the last run (UTC).
        cells: row by row, batch by batch.
    """

    paper: str
    title: str
    metric: str
    command: str
    steps: int | None
    seeds: list[int]
    rows: dict[str, dict[str, str]]
    batches: list[int]
    nfes: list[int]
    grid_hash: str
    recipes: dict[str, dict[str, Any]]
    git: list[dict[str, Any]]
    cpu_seconds: float
    finished_at: str
    cells: list[Cell]

    def at(self, row: str, batch: int, nfe: int) -> Cell:
        """One cell."""
        return next(cell for cell in self.cells if (cell.row, cell.batch, cell.nfe) == (row, batch, nfe))

    def changes(self) -> list[str]:
        """What has changed since the runs: `the grid`, `recipe mini-flow`, `code of mini-flow`; empty if not stale."""
        found = [] if self.grid_hash == current_grid_hash(self.paper) else ["the grid"]
        for name, made in self.recipes.items():
            if made["recipe_hash"] != current_recipe_hash(f"{self.paper}/{name}"):
                found.append(f"recipe {name}")
            if made["code_hash"] != code_hash_of(made["classes"]):
                found.append(f"code of {name}")
        return found


def load_study(paper: str) -> dict[str, Any]:
    """The grid of a paper.

    Raises:
        UserError: there is none, or a key is missing or unknown.
    """
    path = recipes.ROOT / paper / "_effect_map.yaml"
    if not path.is_file():
        known = sorted(file.parent.name for file in recipes.ROOT.glob("*/_effect_map.yaml"))
        raise UserError(f"no effect map of {paper!r}; there are {', '.join(known)}")
    study = recipes.read_yaml(path)
    if set(study) != KEYS:
        raise UserError(f"{path} must have the keys {', '.join(sorted(KEYS))}, got {', '.join(sorted(study))}")
    return study


def grid_hash(study: dict[str, Any]) -> str:
    """Hash of what the grid says; its title and comments do not count."""
    return recipes.short_hash({key: value for key, value in study.items() if key != "title"})


def current_grid_hash(paper: str) -> str | None:
    """Hash of the grid as it is now; None if it is gone or broken."""
    try:
        return grid_hash(load_study(paper))
    except UserError:
        return None


def as_json(found: EffectMap) -> str:
    """A line for each value, and one for each cell, so that versions compare line by line. NaN becomes null."""
    data = {"schema": SCHEMA} | {field.name: getattr(found, field.name) for field in fields(found)}
    del data["cells"]
    lines = [
        json.dumps(
            {
                "process": cell.row,
                "batch": cell.batch,
                "evaluations": cell.nfe,
                "treatment": [value if math.isfinite(value) else None for value in cell.treatment],
                "control": [value if math.isfinite(value) else None for value in cell.control],
            }
        )
        for cell in found.cells
    ]
    head, inside = json.dumps(data, indent=1).removesuffix("\n}"), ",\n  ".join(lines)
    return f'{head},\n "cells": [\n  {inside}\n ]\n}}\n'


def as_csv(found: EffectMap) -> str:
    """The cells: means, then both arms of each seed."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    of_seeds = [f"{arm}_seed{seed}" for seed in found.seeds for arm in ("treatment", "control")]
    writer.writerow(["process", "batch", "evaluations", "treatment", "control", "difference", *of_seeds])
    for cell in found.cells:
        values = [value for pair in zip(cell.treatment, cell.control, strict=True) for value in pair]
        writer.writerow([cell.row, cell.batch, cell.nfe, *cell.means, cell.difference, *values])
    return stream.getvalue()


def read_maps(files: Iterable[Path], papers: Iterable[str]) -> tuple[list[EffectMap], list[str]]:
    """Maps from files, sorted by paper.

    Args:
        files: `<paper>.json`, or `<paper>/effect_map.json`.
        papers: slugs that may have one.

    Returns:
        The maps, and one line for each file that cannot be used (unreadable, broken, of another paper than its name
        says). Such files are left alone.
    """
    found, problems, known = [], [], set(papers)
    for file in files:
        slug = file.parent.name if file.name == "effect_map.json" else file.stem
        try:
            one = from_json(file.read_text())
        except OSError as error:
            problems.append(f"{file}: {error.strerror}")
            continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{file}: no effect map: {error}")
            continue
        if one.paper != slug or slug not in known:
            problems.append(f"{file}: effect map of {one.paper!r}, which is not its name or not a paper")
            continue
        found.append(one)
    return sorted(found, key=lambda one: one.paper), problems


def from_json(text: str) -> EffectMap:
    """What `as_json` wrote.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it did not write this.
    """
    data = json.loads(text)
    if data.pop("schema", None) != SCHEMA:
        raise ValueError(f"not of schema {SCHEMA}")
    cells = [
        Cell(
            row=str(cell["process"]),
            batch=int(cell["batch"]),
            nfe=int(cell["evaluations"]),
            treatment=_numbers(cell["treatment"], len(data["seeds"])),
            control=_numbers(cell["control"], len(data["seeds"])),
        )
        for cell in data.pop("cells")
    ]
    found = EffectMap(**data, cells=cells)
    grid = [(row, batch, nfe) for row in found.rows for batch in found.batches for nfe in found.nfes]
    if [(cell.row, cell.batch, cell.nfe) for cell in cells] != grid:
        raise ValueError("its cells are not those of its grid")
    texts = (found.paper, found.title, found.command, found.finished_at)
    used = {arms[arm] for arms in found.rows.values() for arm in ("treatment", "control")}
    made = {name for name, one in found.recipes.items() if {"recipe_hash", "code_hash", "classes"} <= one.keys()}
    if not all(isinstance(value, str) for value in texts) or not found.seeds or used != made:
        raise ValueError("paper, title, command and finished_at must be texts, and recipes those of its rows")
    float(found.cpu_seconds)
    return found


def _numbers(values: list[float | None], length: int) -> tuple[float, ...]:
    if len(values) != length:
        raise ValueError(f"{len(values)} values for {length} seeds")
    return tuple(math.nan if value is None else float(value) for value in values)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)
