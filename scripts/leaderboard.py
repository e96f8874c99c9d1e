"""`noisebench leaderboard`: the pages of all claims. Imports no torch."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from callbacks.files import write_atomic
from scripts import recipes
from scripts.claims import Paper, load_paper
from scripts.errors import UserError
from scripts.external import FILE as REPORTED
from scripts.external import External, add_external, read_external
from scripts.maps import EffectMap, read_maps
from scripts.markdown import render, summary, tally, verdict_lines
from scripts.published import publish, read_published
from scripts.readme import between_markers
from scripts.records import ClaimResult, Record, evaluate, read_records

DOCS = Path("docs/leaderboard")
"""In a checkout: published records and effect maps, reported results and the pages made from them."""
MAPS = "effect_maps"
PICTURE = "effects.svg"
README = Path("README.md")


@dataclass(frozen=True)
class Board:
    """All papers, what the records say of each of their claims, unusable files, numbers of others, effect maps."""

    papers: list[Paper]
    results: list[ClaimResult]
    problems: list[str]
    reported: list[External]
    maps: list[EffectMap] = field(default_factory=list)


def judge(
    records: Sequence[Record], problems: Sequence[str], reported: Sequence[External] = (), maps: Iterable[Path] = ()
) -> Board:
    """Judges every claim of every paper from these records, and reads these files of effect maps."""
    papers = [load_paper(slug) for slug in recipes.papers()]
    of_paper: dict[str, list[Record]] = {}
    for record in records:
        of_paper.setdefault(record.run[0].partition("/")[0], []).append(record)
    results = [evaluate(claim, of_paper.get(paper.slug, ())) for paper in papers for claim in paper.claims]
    found, broken = read_maps(sorted(maps), [paper.slug for paper in papers])
    return Board(papers, results, [*problems, *broken], list(reported), found)


def board_of_runs(runs: Path) -> Board:
    """What the records and effect maps in a folder of runs say.

    Raises:
        UserError: the folder cannot be read.
    """
    return judge(*read_records(runs), maps=runs.glob("*/effect_map.json"))


def board_of_docs(docs: Path) -> Board:
    """What the published records say, beside reported results and published effect maps."""
    reported = read_external(docs / REPORTED) if (docs / REPORTED).exists() else []
    return judge(*read_published(docs / "records"), reported, (docs / MAPS).glob("*.json"))


def write_pages(board: Board, target: Path, option: str) -> Path:
    """Writes index.html, a page for each paper and one of all maps to `target`; returns the index.

    Adds broken curves to the problems.

    Raises:
        UserError: a page cannot be written; names `option`.
    """
    from scripts import page  # with Matplotlib and Jinja2, which `list` and `--help` need not load

    pages, broken = page.render(board.papers, board.results, board.problems, target, board.reported, board.maps)
    board.problems.extend(broken)
    for file, text in pages.items():
        _write(file, text, option)
    return target / "index.html"


def verb(argv: list[str]) -> int:
    """Entry of `noisebench leaderboard`; 1 if a record could not be used."""
    parser = argparse.ArgumentParser(
        prog="noisebench leaderboard",
        description="Reads the records of all runs and writes pages with verdicts, charts, commands and settings to "
        "leaderboard/ among them. In a checkout it also writes docs/leaderboard and the README's table and picture "
        "anew from the published records.",
        epilog="examples: noisebench leaderboard --runs runs; noisebench leaderboard --publish",
        allow_abbrev=False,
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="first copy the records that count for a claim to docs/leaderboard/records",
    )
    parser.add_argument("--force", action="store_true", help="publish records of a changed tree, stale or failed too")
    parser.add_argument(
        "--add", type=Path, metavar="CSV", help="results that others report; columns: scripts/external.py"
    )
    options = parser.parse_args(argv)
    committed = options.publish or options.add is not None or (DOCS / "records").is_dir()
    if not options.runs.is_dir() and (options.publish or not committed):
        raise UserError(f"--runs: no folder {options.runs.absolute()}; `noisebench reproduce` makes it")
    board = board_of_runs(options.runs)
    for result in board.results:
        if result.records:
            print(verdict_lines(result))
    print(f"{len(board.results)} claims: {tally(board.results)}")
    if options.runs.is_dir():
        print(f"page of all claims: {write_pages(board, options.runs / 'leaderboard', '--runs')}")
    problems = board.problems
    if committed:
        problems = problems + _publish(board.results if options.publish else [], options.add, options.force)
    for problem in problems:
        print(f"skipped: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _publish(results: Sequence[ClaimResult], reported: Path | None, force: bool) -> list[str]:
    """Adds what is new to the published records and reported results, and writes what is made from them."""
    if not README.is_file():
        raise UserError(f"--publish, --add: no {README.absolute()}; they work in a checkout of noisebench")
    if reported is not None:
        print(f"reported results: {add_external(reported, DOCS)}")
    if results:
        chosen = {record.path: record for result in results for record in result.records}
        print(f"published {len(publish(list(chosen.values()), DOCS / 'records', force))} records")
    return write_committed()


def write_committed() -> list[str]:
    """Writes pages, README's table and picture of a checkout from what is published; returns unusable files.

    Raises:
        UserError: one cannot be written.
    """
    board = board_of_docs(DOCS)
    old = README.read_text()
    picture = DOCS / PICTURE
    readme, drawn = _readme(board, old, picture)
    print(f"page of published records: {write_pages(board, DOCS, '--publish')}")
    _write(DOCS / "README.md", render(board.papers, board.results, board.reported, board.problems), "--publish")
    if drawn is not None:
        _write(picture, drawn, "--publish")
    if readme != old:
        _write(README, readme, "--publish")
    return board.problems


def _readme(board: Board, old: str, picture: Path) -> tuple[str, str | None]:
    """The README with its table and picture, and the picture itself where there is a claim to draw."""
    from scripts import drawings

    drawn = drawings.picture(board.results, picture)
    link = f"![Effects of the claims that were run, their bounds and margins]({picture.as_posix()})"
    text = between_markers(old, "verdicts", summary(board.papers, board.results))
    return between_markers(text, "picture", "" if drawn is None else link), drawn


def _write(path: Path, text: str, option: str) -> Path:
    try:
        write_atomic(path, text)
    except OSError as error:
        raise UserError(f"{option}: cannot write {path}: {error.strerror}") from error
    return path
