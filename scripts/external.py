"""Results that others report: read from CSV, shown as reported, never as verified. Imports no torch.

Columns, in any order, first line their names, UTF-8, separated by commas:

| column | content |
|---|---|
| paper | the paper's folder in recipes/, such as elr |
| claim, recipe | what the numbers are held beside: the id of one of its claims, or one of its recipes; one of the two |
| metric | what was measured, such as test/acc_last |
| treatment | the number, in the metric's own unit: shares and accuracies as fractions of 1 |
| control | the control's number; may be empty or absent |
| source | where the number stands, such as "Smith et al. 2021, Table 3" |
| url | http(s) address of the source; may be empty or absent |
"""

import csv
import difflib
import io
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from callbacks.files import write_atomic
from scripts import recipes
from scripts.claims import load_paper
from scripts.errors import UserError

COLUMNS = ("paper", "claim", "recipe", "metric", "treatment", "control", "source", "url")
REQUIRED = ("paper", "metric", "treatment", "source")
FILE = "reported.csv"
"""Its name beside the page."""


@dataclass(frozen=True)
class External:
    """One reported result. It has no seeds, no record and no verdict.

    Args:
        paper: slug.
        claim: id of a claim of the paper; None where `recipe` is given.
        recipe: file name of a recipe of the paper without `.yaml`; None where `claim` is given.
        metric: what was measured.
        treatment: its value.
        control: the control's value; None if not reported.
        source: where it stands.
        url: http or https address of the source; None if not given.
    """

    paper: str
    claim: str | None
    recipe: str | None
    metric: str
    treatment: float
    control: float | None
    source: str
    url: str | None


def read_external(path: Path) -> list[External]:
    """All rows of a CSV file with the columns above, in order, repeated ones once.

    Raises:
        UserError: the file cannot be read, or a value is not acceptable; names file, line, column, value and the rule.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = [name.strip() for name in next(reader, [])]
        _check_header(path, header)
        rows = [
            _row(f"{path}, line {reader.line_num}", header, cells) for cells in reader if any(map(str.strip, cells))
        ]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path} as CSV in UTF-8: {error}") from error
    return list(dict.fromkeys(rows))


def add_external(file: Path, target: Path) -> Path:
    """Appends the rows of a CSV file that are not yet among the reported ones, in one step.

    Args:
        file: CSV with the columns above.
        target: the leaderboard's folder.

    Returns:
        `target`/reported.csv.

    Raises:
        UserError: either file is broken, has no rows, or cannot be written; nothing is changed then.
    """
    new = read_external(file)
    if not new:
        raise UserError(f"{file} has no rows below its first line; columns: {', '.join(COLUMNS)}")
    reported = target / FILE
    rows = dict.fromkeys([*(read_external(reported) if reported.exists() else []), *new])
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    try:
        write_atomic(reported, text.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {reported}: {error.strerror}") from error
    return reported


def _check_header(path: Path, header: list[str]) -> None:
    place = f"{path}, line 1"
    for name in header:
        if name not in COLUMNS:
            raise UserError(f"{place}: unknown column {name!r}; {_hint(name, COLUMNS)}")
        if header.count(name) > 1:
            raise UserError(f"{place}: column {name!r} is there twice")
    missing = [name for name in REQUIRED if name not in header]
    if missing or not {"claim", "recipe"} & set(header):
        raise UserError(f"{place}: missing column {', '.join(missing) or 'claim or recipe'}; got {', '.join(header)}")


def _row(place: str, header: list[str], cells: list[str]) -> External:
    if len(cells) != len(header):
        raise UserError(f"{place}: must have {len(header)} values as the first line has, got {len(cells)}")
    row = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
    for name in REQUIRED:
        if not row[name]:
            raise UserError(f"{place}: {name} must not be empty")
    slug, claim, recipe = row["paper"], row.get("claim", ""), row.get("recipe", "").removesuffix(".yaml")
    _check_known(place, "paper", slug, recipes.papers())
    if bool(claim) == bool(recipe):
        raise UserError(f"{place}: give either claim or recipe, got {claim!r} and {recipe!r}")
    if claim:
        _check_known(place, "claim", claim, [known.id for known in load_paper(slug).claims])
    else:
        _check_known(place, "recipe", recipe, [file.stem for file in recipes.recipe_files(slug)])
    url = row.get("url", "")
    if url and not url.lower().startswith(("http://", "https://")):
        raise UserError(f"{place}: url must start with http:// or https://, got {url!r}")
    return External(
        paper=slug,
        claim=claim or None,
        recipe=recipe or None,
        metric=row["metric"],
        treatment=_number(place, "treatment", row["treatment"]),
        control=_number(place, "control", row["control"]) if row.get("control") else None,
        source=row["source"],
        url=url or None,
    )


def _number(place: str, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or "_" in text:
        raise UserError(f"{place}: {column} must be a finite number with a decimal point, got {text!r}")
    return value


def _check_known(place: str, column: str, value: str, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        raise UserError(f"{place}: unknown {column} {value!r}; {_hint(value, known)}")


def _hint(value: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(value, known, n=3, cutoff=0.4)
    return f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(known) or 'none'}"
