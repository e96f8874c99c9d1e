"""A paper's page claim by claim: seeds, settings, charts, reported numbers. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts import drawings, views
from scripts.aggregate import HolmVerdict
from scripts.errors import UserError
from scripts.external import External
from scripts.published import Curves, curves_of, thin
from scripts.records import ClaimResult


@dataclass
class ClaimView:
    """What a paper's page shows of a claim."""

    result: ClaimResult
    seeds: list[views.SeedRow]
    diff: list[tuple[str, str | None, str | None]]
    places: dict[str, list[views.Place]]
    plans: list[drawings.Plan]
    charts: list[drawings.Drawing]
    see: list[str]
    p: float | None
    adjusted: float | None
    external: list[External]

    @property
    def missing(self) -> bool:
        """Whether a run has no record."""
        return bool(self.result.missing)


def claim_views(
    results: Sequence[ClaimResult],
    curves: dict[Path, Curves],
    holm: dict[int, HolmVerdict],
    external: Sequence[External],
) -> list[ClaimView]:
    """Claims in order. A curve of the same runs is drawn once, at the first claim that has it; later ones refer."""
    drawn: dict[tuple[str, frozenset[Path]], str] = {}
    found = []
    for result in results:
        claim, adjusted = result.claim, holm[id(result)]
        plans, see = drawings.of_claim(result, curves, drawn)
        found.append(
            ClaimView(
                result,
                seeds=views.seed_rows(result),
                diff=views.config_diff(result),
                places={field: views.places(result.records, field) for field in ("hardware", "versions")},
                plans=plans,
                charts=[],
                see=see,
                p=adjusted.p,
                adjusted=adjusted.adjusted,
                external=[row for row in external if (row.paper, row.claim) == (claim.slug, claim.id)],
            )
        )
    return found


def read_curves(results: Sequence[ClaimResult]) -> tuple[dict[Path, Curves], list[str]]:
    """The curves of every record that counts, thinned as published ones are, and one line for each that is broken."""
    found: dict[Path, Curves] = {}
    broken = []
    for record in {record.path: record for result in results for record in result.records}.values():
        try:
            found[record.path] = thin(curves_of(record))
        except UserError as error:
            broken.append(str(error))
    return found, broken
