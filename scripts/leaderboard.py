"""`noisebench leaderboard`: the table of all claims. Imports no torch."""

import argparse
import math
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from callbacks.files import write_atomic
from scripts import recipes
from scripts.claims import Paper, load_paper
from scripts.errors import UserError
from scripts.records import ClaimResult, evaluate, read_records
from scripts.verdicts import VERDICTS

LEGEND = """Effect: mean over seeds of ±(treatment − control or threshold), positive in the direction that the claim
says, with one-sided 95 % t bounds [L, U]; both are held against the margin. Other values are mean ± sd (n seeds);
accuracies and shares are fractions of 1. CPU-s: all runs of a claim; claims may share runs.

| verdict | means | does not mean |
|---|---|---|
| **reproduced** | every seed finished and L exceeds the margin | that the paper's own numbers are met |
| **not reproduced** | U is below the margin, or at least two treatment seeds failed | that it is false elsewhere |
| **inconclusive** | neither: the bounds enclose the margin, or a seed failed | that there is no effect |
| **not run** | a run has no record | anything about the claim |
| *stale* | recipe or code have changed since a run | that the code of today was judged |"""

SECTIONS = {
    "mini": "Mini scale\n\nSmall nets and data: whether the effect shows at all. Says nothing of the paper's scale.",
    "paper": "Paper scale\n\nThe papers' own nets, data and settings.",
}
COLUMNS = (
    "Paper",
    "Claim",
    "Scale",
    "Verdict",
    "Effect [L, U], margin",
    "Treatment mean ± sd (n)",
    "Control mean ± sd (n)",
    "Paper's numbers",
    "Cost (CPU-s)",
)


def render(papers: Sequence[Paper], results: Sequence[ClaimResult]) -> str:
    """The page in Markdown: one table per scale, claims in the papers' order, failing ones among the others."""
    lines = ["# Verdicts", "", LEGEND, ""]
    for scale, heading in SECTIONS.items():
        rows = [result for result in results if result.claim.scale == scale]
        if rows:
            lines += [f"## {heading}", "", f"{tally(rows)}.", ""]
            lines += [_row(COLUMNS), _row(["---"] * len(COLUMNS))]
            lines += [_row(_cells(result)) for result in rows] + [""]
    lines += ["## Papers", ""]
    lines += [f"- `{paper.slug}`: {paper.title} ({paper.venue}, arXiv {paper.arxiv})" for paper in papers]
    return "\n".join(lines) + "\n"


def tally(results: Sequence[ClaimResult]) -> str:
    """How many claims have each verdict: `6 reproduced, 1 not reproduced, 0 inconclusive, 2 not run`."""
    counts = Counter(result.verdict.name for result in results)
    return ", ".join(f"{counts[name]} {name}" for name in VERDICTS)


def verdict_lines(result: ClaimResult) -> str:
    """One claim for the terminal, two or three lines."""
    claim, verdict = result.claim, result.verdict
    stale = " (stale)" if result.stale else ""
    lines = [f"{verdict.name.upper()}{stale}  {claim.slug}/{claim.id}: {claim.text}"]
    if result.records:
        arms = f"{claim.treatment.removesuffix('.yaml')} {mean_sd(result.treatment)}, "
        if result.control is None or claim.control is None:
            arms += f"threshold {claim.threshold:g}"
        else:
            other = f" {claim.control_metric}" if claim.control_metric else ""
            arms += f"{claim.control.removesuffix('.yaml')}{other} {mean_sd(result.control)}"
        lines.append(f"    {claim.metric}: {arms}; effect {_effect(result)}")
    lines.append(f"    {verdict.reason}; {result.cpu_seconds:.0f} CPU-s")
    return "\n".join(lines)


def mean_sd(values: Sequence[float | None]) -> str:
    """`mean ± sd (n, k failed)` over the finished seeds; a dash for none."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    failed = sum(value is not None for value in values) - len(found)
    count = f"({len(found)}{f', {failed} failed' if failed else ''})"
    if not found:
        return f"– {count}"
    if len(found) == 1:
        return f"{found[0]:.4g} {count}"
    return f"{statistics.fmean(found):.4g} ± {statistics.stdev(found):.2g} {count}"


def build(runs: Path) -> tuple[list[Paper], list[ClaimResult], list[str]]:
    """All papers, the results of their claims, and problems with single records."""
    records, problems = read_records(runs)
    papers = [load_paper(slug) for slug in recipes.papers()]
    return papers, [evaluate(claim, records) for paper in papers for claim in paper.claims], problems


def write(runs: Path) -> Path:
    """Writes `<runs>/leaderboard.md` in one step and returns it.

    Raises:
        UserError: the folder cannot be read or written.
    """
    papers, results, problems = build(runs)
    return _write(runs, papers, results, problems)


def verb(argv: list[str]) -> int:
    """Entry of `noisebench leaderboard`; 1 if a record could not be used."""
    parser = argparse.ArgumentParser(
        prog="noisebench leaderboard",
        description="Reads the records of all runs and writes the table of verdicts to leaderboard.md among them.",
        epilog="example: noisebench leaderboard --runs runs",
        allow_abbrev=False,
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    options = parser.parse_args(argv)
    papers, results, problems = build(options.runs)
    if not options.runs.exists():
        raise UserError(f"--runs: no folder {options.runs.absolute()}; `noisebench reproduce` makes it")
    for result in results:
        if result.records:
            print(verdict_lines(result))
    print(f"{len(results)} claims: {tally(results)}")
    for problem in problems:
        print(f"skipped: {problem}", file=sys.stderr)
    print(f"table of all claims: {_write(options.runs, papers, results, problems)}")
    return 1 if problems else 0


def _write(runs: Path, papers: list[Paper], results: list[ClaimResult], problems: list[str]) -> Path:
    text = render(papers, results)
    if problems:
        text += "\n## Records that could not be used\n\n" + "".join(f"- {problem}\n" for problem in problems)
    path = runs / "leaderboard.md"
    try:
        write_atomic(path, text)
    except OSError as error:
        raise UserError(f"--runs: cannot write {path}: {error.strerror}") from error
    return path


def _row(cells: Sequence[str]) -> str:
    inside = " | ".join(cell.replace("|", "\\|") for cell in cells)
    return f"| {inside} |"


def _cells(result: ClaimResult) -> list[str]:
    claim, verdict = result.claim, result.verdict
    control = f"threshold {claim.threshold:g}" if claim.threshold is not None else ""
    if claim.control is not None and result.control is not None:
        control = _arm(claim.control, claim.control_metric or claim.metric, result.control)
    return [
        claim.slug,
        f"`{claim.id}` {' '.join(claim.text.split())}",
        claim.scale,
        f"**{verdict.name}**{' *stale*' if result.stale else ''}: {verdict.reason}",
        _effect(result),
        _arm(claim.treatment, claim.metric, result.treatment),
        control,
        _paper_numbers(claim.paper) or "–",
        f"{result.cpu_seconds:.0f}" if result.records else "–",
    ]


def _arm(recipe: str, metric: str, values: Sequence[float | None]) -> str:
    return f"{mean_sd(values)} `{recipe.removesuffix('.yaml')}` {metric}"


def _paper_numbers(paper: dict[str, Any]) -> str:
    source = f" ({paper['source']})" if "source" in paper else ""
    return ", ".join(f"{key} {value}" for key, value in paper.items() if key != "source") + source


def _effect(result: ClaimResult) -> str:
    """`+0.26 [+0.25, +0.27], margin 0.18`."""
    verdict, margin = result.verdict, f"margin {result.claim.margin:g}"
    if verdict.effect is None:
        return f"–, {margin}"
    return f"{verdict.effect:+.4g} [{verdict.lower:+.4g}, {verdict.upper:+.4g}], {margin}"
