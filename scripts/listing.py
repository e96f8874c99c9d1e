"""`noisebench list`: papers, recipes, claims and their verdicts. Imports no torch."""

import argparse
import sys
from pathlib import Path

from scripts import recipes
from scripts.claims import load_paper
from scripts.errors import UserError
from scripts.records import evaluate, read_records


def verb(argv: list[str]) -> int:
    """Entry of `noisebench list`."""
    parser = argparse.ArgumentParser(
        prog="noisebench list",
        description="Papers, claims and verdicts; with PAPER its recipes too.",
        epilog="example: noisebench list elr",
        allow_abbrev=False,
    )
    parser.add_argument("paper", nargs="?", help="slug of a paper")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    options = parser.parse_args(argv)
    slugs = recipes.papers()
    if options.paper is not None and options.paper not in slugs:
        raise UserError(f"no paper {options.paper!r}; there are {', '.join(slugs)}")
    records, problems = read_records(options.runs)
    for slug in slugs if options.paper is None else [options.paper]:
        paper = load_paper(slug)
        print(f"{slug}: {paper.title} ({paper.venue}, arXiv {paper.arxiv})")
        print(f"  {len(recipes.recipe_files(slug))} recipes, {len(paper.claims)} claims")
        if options.paper is not None:
            _print_recipes(slug)
        for claim in paper.claims:
            result = evaluate(claim, records)
            if options.paper is None and claim.scale == "paper" and not result.records:
                continue
            flags = (" (stale)" if result.stale else "") + (", extra" if claim.extra else "")
            print(f"  {result.verdict.name + flags:24} {claim.scale:6} {claim.id}: {claim.text}")
        hidden = sum(claim.scale == "paper" for claim in paper.claims)
        if options.paper is None and hidden:
            print(f"  paper scale: {hidden} claims, shown by `noisebench list {slug}` and once they have runs")
    for problem in problems:
        print(f"skipped: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _print_recipes(slug: str) -> None:
    for path in recipes.recipe_files(slug):
        lines = recipes.header(path)
        cost = next((line.partition("cost ")[2] for line in lines if "cost " in line), "not stated")
        print(f"  {recipes.recipe_name(path):30} {lines[0] if lines else ''}; cost: {cost}")
