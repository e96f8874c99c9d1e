"""`noisebench leaderboard`: the table of all claims. Imports no torch."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from callbacks.files import write_atomic
from scripts import recipes
from scripts.claims import Paper, load_paper
from scripts.errors import UserError
from scripts.records import ClaimResult, evaluate, read_records

LEGEND = """Effect: mean over seeds of ±(treatment − control or threshold), with one-sided 95 % t bounds [L, U];
both are held against the margin.

- **reproduced**: all seeds finished and L is above the margin.
- **not reproduced**: U is below it, or more than one treatment seed failed.
- **inconclusive**: neither; more seeds may decide.
- **not run**: a seed has no record.
- *stale*: recipe or code have changed since these runs.

A mini verdict says that the effect shows at this small scale, not that the paper's numbers hold; a paper-scale verdict
speaks of the paper's own setting. Values are mean ± sd (n seeds); accuracies and shares are fractions of 1."""

COLUMNS = ("paper", "claim", "verdict", "effect [L, U]", "margin", "treatment", "control", "paper says", "CPU-s")


def render(papers: Sequence[Paper], results: Sequence[ClaimResult]) -> str:
    """The page in Markdown: one table per scale, claims in the papers' order, failing ones among the others."""
    lines = ["# Verdicts", "", LEGEND, ""]
    titles = {paper.slug: paper for paper in papers}
    for scale, heading in (("mini", "Mini scale"), ("paper", "Paper scale")):
        rows = [result for result in results if result.claim.scale == scale]
        if not rows:
            continue
        lines += [f"## {heading}", "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        lines += [f"| {' | '.join(_cells(result))} |" for result in rows] + [""]
    lines += [f"- `{slug}`: {p.title}, {p.venue}, arXiv {p.arxiv}" for slug, p in titles.items()]
    return "\n".join(lines) + "\n"


def verdict_lines(result: ClaimResult) -> str:
    """One claim for the terminal."""
    claim, verdict = result.claim, result.verdict
    stale = " (stale)" if result.stale else ""
    lines = [f"{verdict.name.upper()}{stale}  {claim.slug}/{claim.id}: {claim.text}"]
    if verdict.effect is not None:
        arms = f"{_recipe(claim.treatment)} {_mean_sd(result.treatment)}"
        if result.control is None:
            arms += f" against the threshold {claim.threshold:g}"
        else:
            arms += f", {_recipe(claim.control or '')} {_mean_sd(result.control)}"
        lines.append(f"    {claim.metric}: {arms}; effect {_effect(result)}, margin {claim.margin:g}")
    lines.append(f"    {verdict.reason}; {result.cpu_seconds:.0f} CPU-s")
    return "\n".join(lines)


def build(runs: Path) -> tuple[list[Paper], list[ClaimResult], list[str]]:
    """All papers, the results of their claims, and problems with single records."""
    records, problems = read_records(runs)
    papers = [load_paper(slug) for slug in recipes.papers()]
    return papers, [evaluate(claim, records) for paper in papers for claim in paper.claims], problems


def write(runs: Path) -> Path:
    """Writes `<runs>/leaderboard.md`.

    Raises:
        UserError: the folder cannot be written.
    """
    papers, results, _ = build(runs)
    path = runs / "leaderboard.md"
    try:
        write_atomic(path, render(papers, results))
    except OSError as error:
        raise UserError(f"--runs: cannot write {path}: {error.strerror}") from error
    return path


def verb(argv: list[str]) -> int:
    """Entry of `noisebench leaderboard`."""
    parser = argparse.ArgumentParser(
        prog="noisebench leaderboard",
        description="Reads the records of all runs and writes the table of verdicts.",
        epilog="example: noisebench leaderboard --runs runs",
        allow_abbrev=False,
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    options = parser.parse_args(argv)
    if not options.runs.is_dir():
        raise UserError(f"--runs: no folder {options.runs.absolute()}; `noisebench reproduce` makes it")
    _, results, problems = build(options.runs)
    run = [result for result in results if result.records]
    for result in run:
        print(verdict_lines(result))
    print(f"{len(results) - len(run)} of {len(results)} claims have no runs here")
    print(f"table of all claims: {write(options.runs)}")
    for problem in problems:
        print(f"skipped: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _cells(result: ClaimResult) -> list[str]:
    claim, verdict = result.claim, result.verdict
    control = f"threshold {claim.threshold:g}" if result.control is None else _mean_sd(result.control)
    return [
        claim.slug,
        f"`{claim.id}` {claim.text}".replace("|", "\\|"),
        f"**{verdict.name}**{' *stale*' if result.stale else ''}; {verdict.reason}",
        _effect(result),
        f"{claim.margin:g}",
        f"`{_recipe(claim.treatment)}` {claim.metric}: {_mean_sd(result.treatment)}",
        control if claim.control is None else f"`{_recipe(claim.control)}` {claim.control_metric}: {control}",
        ", ".join(f"{key} {value}" for key, value in claim.paper) or "–",
        f"{result.cpu_seconds:.0f}" if result.records else "–",
    ]


def _recipe(name: str) -> str:
    return name.partition("/")[2]


def _effect(result: ClaimResult) -> str:
    verdict = result.verdict
    if verdict.effect is None:
        return "–"
    if verdict.lower is None or verdict.upper is None:
        return f"{verdict.effect:.3f}"
    return f"{verdict.effect:.3f} [{verdict.lower:.3f}, {verdict.upper:.3f}]"


def _mean_sd(values: Sequence[float | None]) -> str:
    """`mean ± sd (n)` of the finished seeds; failed ones are named."""
    found = [value for value in values if value is not None]
    failed = f", {len(values) - len(found)} failed" if len(found) < len(values) else ""
    if not found:
        return f"–{failed}"
    mean = math.fsum(found) / len(found)
    if len(found) == 1:
        return f"{mean:.3f} (1{failed})"
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in found) / (len(found) - 1))
    return f"{mean:.3f} ± {deviation:.3f} ({len(found)}{failed})"
