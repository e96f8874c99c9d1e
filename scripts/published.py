"""Published records: the small part of a run that is committed, one file a run, so that two people's merge plainly.

A file is `<target>/<slug>/<recipe>/<config hash>/seed<k>.json`: the content of record.json, and `curves`, the run's
metrics over its epochs, thinned. Imports no torch.
"""

import csv
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from callbacks.files import write_atomic
from scripts.errors import UserError
from scripts.pictures import publish_pictures
from scripts.records import Record, folders_below, load_records, readable

LEVELS = 3
"""Folders above a published record: paper, recipe, config hash."""

POINTS = 60
"""Most epochs that a published curve has."""

DIGITS = 6
"""Significant digits of a published curve; final metrics keep theirs."""

Curves = dict[str, list[float]]


def publish(records: Sequence[Record], target: Path, force: bool = False) -> list[Path]:
    """Writes one file for each run, each in one step; nothing is deleted.

    Of several records of a run (recipe, config hash, seed), among them the one that is published already, the one with
    the greatest rank is published.

    Args:
        records: records of local runs, with their metrics.csv beside them, or published ones.
        target: folder of all published records.
        force: publish also what is refused otherwise.

    Returns:
        Files written, sorted.

    Raises:
        UserError: a record comes from a changed tree or an unknown commit, failed for an outside reason, is stale or
            has overrides, and `force` is not set; broken curves; a file cannot be written. Nothing is written in the
            first two cases.
    """
    chosen: dict[Path, Record] = {}
    for record in records:
        file = _file_of(record, target)
        if file not in chosen or record.rank > chosen[file].rank:
            chosen[file] = record
    refused = [f"{r.path}: {', '.join(reasons)}" for r in chosen.values() if (reasons := doubts(r) + _overridden(r))]
    if refused and not force:
        lines = "\n  ".join(refused)
        raise UserError(
            f"--publish: {len(refused)} of {len(chosen)} records are not fit to be published, so none is:\n  {lines}\n"
            "run them again from a committed tree, or publish them as they are with --force"
        )
    there = {r.path: r for r in load_records([file for file in chosen if file.is_file()], [], _disagreement)}
    texts = {
        file: _as_text(record)
        for file, record in sorted(chosen.items())
        if file not in there or record.rank >= there[file].rank
    }
    for file, text in texts.items():
        try:
            write_atomic(file, text)
        except OSError as error:
            raise UserError(f"--publish: cannot write {file}: {error.strerror}") from error
    publish_pictures([chosen[file] for file in texts], {chosen[file].path: file for file in texts})
    return list(texts)


def read_published(target: Path) -> tuple[list[Record], list[str]]:
    """All published records, sorted by path.

    Returns:
        The records, and one line for each file or folder that cannot be used: as `read_records`, and records whose
        fields name another run than their path does, or whose curves are broken. Such files are left alone.

    Raises:
        UserError: `target` exists but cannot be read.
    """
    if not readable(target, "published records"):
        return [], []
    problems: list[str] = []
    files: list[Path] = []
    for folder in folders_below(target, LEVELS, problems):
        try:
            found = sorted(file for file in folder.iterdir() if file.suffix == ".json" and file.name[0] != ".")
        except OSError as error:
            problems.append(f"{folder}: {error.strerror}")
            continue
        named = {file: re.fullmatch(r"seed\d+\.json", file.name) for file in found}
        files += [file for file in found if named[file]]
        problems += [f"{file}: not named seed<k>.json" for file in found if not named[file]]
    return load_records(files, problems, _disagreement), problems


def curves_of(record: Record) -> Curves:
    """The run's metrics over its epochs: `epoch` and one list of the same length for each metric.

    Values are NaN where the metric was not finite or not logged. From a published record they are thinned and rounded;
    from the metrics.csv beside a local record.json they are whole.

    Returns:
        {} for a run without curves.

    Raises:
        UserError: the file is broken; names it and, for metrics.csv, the line.
    """
    if "curves" not in record.data:
        return _from_csv(record.path.with_name("metrics.csv"))
    curves = record.data["curves"]
    if wrong := _broken(curves):
        raise UserError(f"{record.path}: {wrong}")
    return {key: [math.nan if value is None else float(value) for value in values] for key, values in curves.items()}


def doubts(record: Record) -> list[str]:
    """Why others could not repeat or should not trust the run; empty for one that is fit to be published."""
    git = record.data.get("git")
    git = git if isinstance(git, dict) else {}
    found = []
    if not git.get("commit"):
        found.append("unknown commit")
    elif git.get("dirty") is not False:
        found.append("from a tree with changes that are in no commit")
    if record.failed_from_outside:  # one that diverged is a result, and stays in
        found.append(f"{record.data['status']} ({record.data.get('reason')})")
    if record.stale:
        found.append("stale: recipe or code have changed since")
    return found


def thin(curves: Curves, points: int = POINTS) -> Curves:
    """The same curves at no more than so many epochs, about evenly spaced.

    First and last epoch are always there, and so are the first and last value of a metric that is logged now and then.
    Between them each stretch of epochs keeps the one with the most values.
    """
    length = len(curves.get("epoch", []))
    if length <= points:
        return curves
    have = [[index for index, value in enumerate(values) if not math.isnan(value)] for values in curves.values()]
    kept = {0, length - 1} | {end for indices in have if indices for end in (indices[0], indices[-1])}
    counts = [0] * length
    for index in (index for indices in have for index in indices):
        counts[index] += 1
    between = [index for index in range(length) if index not in kept]
    stretches = max(points - len(kept), 0)
    for number in range(stretches):
        stretch = between[number * len(between) // stretches : (number + 1) * len(between) // stretches]
        kept.add(max(stretch, key=counts.__getitem__))
    return {key: [values[index] for index in sorted(kept)] for key, values in curves.items()}


def _file_of(record: Record, target: Path) -> Path:
    """Where the record is published; its fields come from a file that anyone may have written."""
    (recipe, seed), config_hash = record.run, record.data["config_hash"]
    slug, slash, name = recipe.partition("/")
    for part in (slug, name, config_hash):
        if not slash or not part or part[0] == "." or re.search(r"[/\\\0]", part):
            raise UserError(
                f"{record.path}: recipe must read <paper>/<recipe> and config_hash be a folder's name, "
                f"got {recipe!r} and {config_hash!r}"
            )
    if seed < 0:
        raise UserError(f"{record.path}: seed must be at least 0, got {seed}")
    return target / slug / name / config_hash / f"seed{seed}.json"


def _overridden(record: Record) -> list[str]:
    """Why the run says nothing of its recipe as it stands."""
    words = record.data["overrides"]
    return [f"other settings than its recipe's: {' '.join(map(str, words))}"] if words else []


def _disagreement(file: Path, data: dict[str, Any]) -> str | None:
    """What shows that a published record was edited or moved by hand."""
    in_path = {
        "recipe": f"{file.parts[-4]}/{file.parts[-3]}",
        "config_hash": file.parts[-2],
        "seed": file.stem.removeprefix("seed"),
    }
    other = [f"{key} {data[key]!r}, path says {said}" for key, said in in_path.items() if str(data[key]) != said]
    if other:
        return f"names another run than its path: {'; '.join(other)}"
    return _broken(data["curves"]) if "curves" in data else None


def _broken(curves: Any) -> str | None:
    """What is wrong with the curves of a published record."""
    if not isinstance(curves, dict) or not all(isinstance(values, list) for values in curves.values()):
        return "curves must map names to lists"
    if not curves:
        return None
    if "epoch" not in curves:
        return "curves need a list named epoch"
    for key, values in curves.items():
        if not set(map(type, values)) <= {int, float, type(None)}:
            return f"curves: {key} must hold numbers or null"
        if len(values) != len(curves["epoch"]):
            return f"curves: {key} has {len(values)} values for {len(curves['epoch'])} epochs"
    if not all(value is not None and math.isfinite(value) for value in curves["epoch"]):
        return "curves: epoch must hold finite numbers"
    return None


def _from_csv(file: Path) -> Curves:
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.reader(lines)
            header = next(reader, [])
            if "epoch" not in header or len(set(header)) < len(header):
                raise UserError(f"{file}, line 1: must name epoch and each metric once, got {','.join(header)!r}")
            rows = [_numbers(file, reader.line_num, header, row) for row in reader]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    if not rows:
        return {}
    return {key: list(values) for key, values in zip(header, zip(*rows, strict=True), strict=True) if key != "step"}


def _numbers(file: Path, line: int, header: list[str], row: list[str]) -> list[float]:
    """One row; an empty cell is a metric that was not logged."""
    if len(row) != len(header):
        raise UserError(f"{file}, line {line}: must have {len(header)} values as its first line has, got {len(row)}")
    values = []
    for key, cell in zip(header, row, strict=True):
        try:
            values.append(float(cell) if cell or key == "epoch" else math.nan)
        except ValueError:
            raise UserError(f"{file}, line {line}: {key} must be a number, got {cell!r}") from None
    if not math.isfinite(values[header.index("epoch")]):
        raise UserError(f"{file}, line {line}: epoch must be finite, got {row[header.index('epoch')]!r}")
    return values


def _as_text(record: Record) -> str:
    """Sorted keys, a line for each value, and one for each curve, so that versions compare and merge line by line."""
    curves = thin(curves_of(record))
    data = {key: value for key, value in record.data.items() if key != "curves"}
    data["metrics"] = {key: value if math.isfinite(value) else None for key, value in record.metrics.items()}
    body = json.dumps(data, indent=1, sort_keys=True).removesuffix("\n}")
    rows = [f"  {json.dumps(key)}: {json.dumps(_short(key, curves[key]))}" for key in _ordered(curves)]
    inside = "{\n" + ",\n".join(rows) + "\n }" if rows else "{}"
    return f'{body},\n "curves": {inside}\n}}\n'


def _ordered(keys: Iterable[str]) -> list[str]:
    return sorted(keys, key=lambda key: (key != "epoch", key))


def _short(key: str, values: list[float]) -> list[float | None]:
    """Values as they are published: few digits, whole numbers as such, null for what is not finite."""
    short = [value if key == "epoch" or not math.isfinite(value) else float(f"{value:.{DIGITS}g}") for value in values]
    return [None if not math.isfinite(v) else int(v) if v.is_integer() and abs(v) < 1e15 else v for v in short]
