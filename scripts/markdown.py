"""Verdicts in words: for the terminal, and the page in Markdown. Imports no torch."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from scripts.claims import Paper
from scripts.external import External
from scripts.records import ClaimResult
from scripts.verdicts import VERDICTS

MEANINGS = (
    ("reproduced", "every seed finished and L exceeds the margin", "that the paper’s own numbers are met"),
    ("not reproduced", "U is below the margin, or two or more treatment seeds failed", "that it is false elsewhere"),
    ("inconclusive", "neither: the bounds enclose the margin, or a seed failed", "that there is no effect"),
    ("not run", "a run has no record", "anything about the claim"),
    ("stale", "recipe or code have changed since a run", "that the code of today was judged"),
)
"""Each verdict, and the flag: what it means, what it does not mean."""

LEGEND = """Effect: mean over seeds of ±(treatment − control or threshold), positive in the direction that the claim
says, with one-sided 95 % t bounds [L, U]; both are held against the margin. Other values are mean ± sd (n seeds);
accuracies and shares are fractions of 1. CPU-s: all runs of a claim; claims may share runs.

| verdict | means | does not mean |
|---|---|---|
""" + "\n".join(f"| **{name}** | {means} | {denies} |" for name, means, denies in MEANINGS)

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


def render(
    papers: Sequence[Paper],
    results: Sequence[ClaimResult],
    reported: Sequence[External] = (),
    problems: Sequence[str] = (),
) -> str:
    """The page in Markdown: one table per scale, claims in the papers' order, failing ones among the others."""
    lines = ["# Verdicts", "", LEGEND, ""]
    for scale, heading in SECTIONS.items():
        rows = [result for result in results if result.claim.scale == scale]
        if rows:
            lines += [f"## {heading}", "", f"{tally(rows)}.", ""]
            lines += [_row(COLUMNS), _row(["---"] * len(COLUMNS))]
            lines += [_row(_cells(result)) for result in rows] + [""]
    lines += [*_many_claims(results), *_reported(reported), "## Papers", ""]
    lines += [f"- `{paper.slug}`: {paper.title} ({paper.venue}, arXiv {paper.arxiv})" for paper in papers]
    if problems:
        lines += ["", "## Records that could not be used", "", *(f"- {problem}" for problem in problems)]
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
            factor = "" if claim.factor == 1 else f"{claim.factor:g} times "
            arms += f"{factor}{claim.control.removesuffix('.yaml')}{other} {mean_sd(result.control)}"
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


def summary(papers: Sequence[Paper], results: Sequence[ClaimResult]) -> str:
    """For the README: how many claims of each paper have which verdict, and those that do not hold as they stand."""
    rows: list[Sequence[str]] = [("Paper", "About", "Mini scale", "Paper scale"), ("---",) * 4]
    for paper in papers:
        own = [result for result in results if result.claim.slug == paper.slug]
        cells = [_counts([r for r in own if r.claim.scale == scale]) for scale in SECTIONS]
        link = f"[`{paper.slug}`](recipes/{paper.slug}/README.md)"
        rows.append((link, f"{paper.title}, {paper.venue}, arXiv {paper.arxiv}; {paper.family}", *cells))
    lines = [*map(_row, rows), "", f"Of all {len(results)} claims: {tally(results)}.", ""]
    for name in ("not reproduced", "inconclusive"):
        found = [result for result in results if result.verdict.name == name]
        lines += [f"{name.capitalize()}:", ""] if found else []
        lines += [f"- `{r.claim.slug}` ({r.claim.scale}) {r.claim.text}: effect {_effect(r)}" for r in found]
        lines += [""] if found else []
    return "\n".join(lines).rstrip()


def _counts(results: Sequence[ClaimResult]) -> str:
    """`5 reproduced, 1 inconclusive`, without the verdicts that no claim has."""
    counts = Counter(result.verdict.name for result in results)
    stale = sum(result.stale for result in results)
    words = [f"{counts[name]} {name}" for name in VERDICTS if counts[name]] + ([f"*{stale} stale*"] if stale else [])
    return ", ".join(words) or "–"


def _many_claims(results: Sequence[ClaimResult]) -> list[str]:
    """What Holm's correction changes, and the figure over papers where there is one."""
    from scripts.aggregate import aggregate, holm_verdicts, why_none  # with NumPy, which `list` need not load

    adjusted = holm_verdicts(results)
    changed = [
        f"`{after.claim.slug}/{after.claim.id}` (p {after.p:.2g}, adjusted {after.adjusted:.2g})"
        for after, result in zip(adjusted, results, strict=True)
        if after.name != result.verdict.name
    ]
    held = sum(after.name == "reproduced" for after in adjusted)
    lines = ["## Many claims at once", "", f"Holm's correction over the claims of each scale leaves {held} reproduced."]
    lines += [f"It takes the verdict from: {', '.join(changed)}."] if changed else []
    for scale in SECTIONS:
        found = aggregate(results, scale)
        if found is None:
            lines += [why_none(results, scale)]
            continue
        lines += [
            f"At {scale} scale a treatment beats its control with probability {found.improvement:.2f} "
            f"[{found.low:.2f}, {found.high:.2f}], mean over {len(found.per_paper)} papers ({found.num_claims} claims)."
        ]
    return [*lines, ""]


def _reported(reported: Sequence[External]) -> list[str]:
    """Results of others, apart from ours."""
    if not reported:
        return []
    head = ("Paper", "Claim or recipe", "Metric", "Treatment", "Control", "Source")
    rows = [head, ("---",) * len(head)]
    for result in reported:
        source = f"{result.source} <{result.url}>" if result.url else result.source
        control = "–" if result.control is None else f"{result.control:g}"
        beside = result.claim or result.recipe or ""
        rows.append((result.paper, beside, result.metric, f"{result.treatment:g}", control, source))
    return ["## Reported by others", "", "Not verified here.", "", *map(_row, rows), ""]


def _row(cells: Sequence[str]) -> str:
    inside = " | ".join(cell.replace("|", "\\|") for cell in cells)
    return f"| {inside} |"


def _cells(result: ClaimResult) -> list[str]:
    claim, verdict = result.claim, result.verdict
    control = f"threshold {claim.threshold:g}" if claim.threshold is not None else ""
    if claim.control is not None and result.control is not None:
        factor = "" if claim.factor == 1 else f"{claim.factor:g} × "
        control = factor + _arm(claim.control, claim.control_metric or claim.metric, result.control)
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
