"""`noisebench list`: papers, recipes, claims and their verdicts. Imports no torch."""

import argparse
import sys
from pathlib import Path

from scripts import recipes
from scripts.claims import Paper, load_paper
from scripts.errors import UserError
from scripts.markdown import tally
from scripts.records import ClaimResult, evaluate, read_records


def verb(argv: list[str]) -> int:
    """Entry of `noisebench list`; 1 if a record could not be used."""
    parser = argparse.ArgumentParser(
        prog="noisebench list",
        description="Papers, claims and verdicts; with PAPER its recipes and their cost too.",
        epilog="example: noisebench list elr",
        allow_abbrev=False,
    )
    parser.add_argument("paper", nargs="?", metavar="PAPER", help="slug of a paper")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    options = parser.parse_args(argv)
    slugs = recipes.papers()
    if options.paper is not None and options.paper not in slugs:
        raise UserError(f"no paper {options.paper!r}; there are {', '.join(slugs)}")
    records, problems = read_records(options.runs)
    for slug in slugs if options.paper is None else [options.paper]:
        paper = load_paper(slug)
        results = [evaluate(claim, records) for claim in paper.claims]
        _print_paper(paper, results, whole=options.paper is not None)
    for problem in problems:
        print(f"skipped: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _print_paper(paper: Paper, results: list[ClaimResult], whole: bool) -> None:
    """One paper; unless `whole`, without recipes and without paper-scale claims that nobody has run."""
    files = recipes.recipe_files(paper.slug)
    print(f"{paper.slug}: {paper.title} ({paper.venue}, arXiv {paper.arxiv})")
    print(f"  {len(files)} recipes, {len(results)} claims: {tally(results)}")
    if whole:
        for path in files:
            _print_recipe(path)
    shown = [r for r in results if whole or r.claim.scale == "mini" or r.records]
    width = max((len(r.claim.id) for r in shown), default=0)
    for result in shown:
        claim = result.claim
        verdict = result.verdict.name + (" (stale)" if result.stale else "")
        extra = " [extra]" if claim.extra else ""
        print(f"  {claim.scale:5}  {verdict:22}  {claim.id:{width}}  {claim.text}{extra}")
    if len(shown) < len(results):
        print(f"  {len(results) - len(shown)} paper-scale claims without runs: `noisebench list {paper.slug}`")


def _print_recipe(path: Path) -> None:
    """Name, what it is, what it costs: from its header."""
    lines = recipes.header(path) or ["(no header)"]
    cost = next((line.partition("cost ")[2] for line in lines if "cost " in line), "not stated")
    print(f"  {recipes.recipe_name(path)}: {lines[0]}; cost: {cost}")
