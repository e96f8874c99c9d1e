"""`noisebench plot`: learning curves of runs as a PNG or SVG for papers and slides. Imports no torch."""

import argparse
import difflib
import glob
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from callbacks.files import write_atomic
from scripts.errors import UserError
from scripts.published import Curves, curves_of
from scripts.records import Record
from scripts.views import METRICS

SUFFIXES = (".png", ".svg")
METRIC = "test/acc"


@dataclass(frozen=True)
class Run:
    """One run as it is drawn.

    Args:
        folder: where it lies, or its published record.
        recipe: `<slug>/<recipe>` and the overrides that it was started with.
        config_hash: sets runs of the same name apart that had other settings.
        curves: its metrics over epochs.
    """

    folder: Path
    recipe: str
    config_hash: str
    curves: Curves


def verb(argv: list[str]) -> int:
    """Entry of `noisebench plot`."""
    parser = argparse.ArgumentParser(
        prog="noisebench plot",
        description="Draws metrics over epochs from the metrics.csv of runs, finished or not. Runs of one recipe are "
        "seeds of one arm: their mean, and a band from the lowest to the highest seed.",
        epilog="example: noisebench plot 'runs/elr/mini-sym40/*/seed*' 'runs/elr/mini-sym40-ce/*/seed*' "
        "--metric test/acc wrong/memorized --out curves.svg",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, record.json, published record, or glob")
    parser.add_argument(
        "--metric", nargs="+", action="extend", help=f"columns of metrics.csv, a panel each (default: {METRIC})"
    )
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="*.png or *.svg (default: curves.png)")
    options = parser.parse_args(argv)
    suffix = options.out.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"--out must end in {' or '.join(SUFFIXES)}, got {str(options.out)!r}")
    metrics = list(dict.fromkeys(options.metric or [METRIC]))
    arms = group([read_run(path) for path in find_runs(options.runs)])
    check_metrics(arms, metrics)
    _write(options.out, _draw(arms, metrics, suffix))
    num_runs = sum(map(len, arms.values()))
    print(f"{options.out}: {', '.join(metrics)} of {_count(num_runs, 'run')} of {_count(len(arms), 'recipe')}")
    for name, metric in ((name, metric) for name in arms for metric in metrics):
        if missing := sum(not has_values(run, metric) for run in arms[name]):
            print(f"note: {missing} of {_count(len(arms[name]), 'run')} of {name} without {metric}", file=sys.stderr)
    return 0


def find_runs(names: Iterable[str]) -> list[Path]:
    """The run folders and published records that the arguments name, each once, in their order.

    Raises:
        UserError: an argument names nothing.
    """
    found: dict[Path, Path] = {}
    for name in names:
        paths = [Path(name)] if Path(name).exists() else [Path(match) for match in sorted(glob.glob(name))]
        if not paths:
            pattern = " matches" if glob.has_magic(name) else ""
            raise UserError(f"no such run: nothing{pattern or ' at'} {name!r} in {Path.cwd()}")
        for path in paths:
            run = path.parent if path.name in ("record.json", "metrics.csv") else path
            found.setdefault(run.resolve(), run)
    return list(found.values())


def read_run(path: Path) -> Run:
    """A run from its folder or from a published record.

    The recipe comes from the record; of a run that has none yet, from its folder `<slug>/<recipe>/<hash>/seed<k>`.
    A run that failed before the end of its first epoch has a record and no curves: it is counted, not left out.

    Raises:
        UserError: neither record nor metrics.csv, or a broken file.
    """
    file = path / "record.json" if path.is_dir() else path
    if path.is_dir() and not file.is_file() and not (path / "metrics.csv").is_file():
        below = (run for depth in range(1, 5) for run in path.glob("*/" * depth + "metrics.csv"))
        first = next(below, None)
        hint = f"; runs lie below it, e.g. {first.parent}: name them or a glob" if first else ""
        raise UserError(f"{path}: no metrics.csv, which a run writes after its first epoch{hint}")
    data = _read_json(file) if file.exists() else {}
    curves = curves_of(Record(file, data, stale=False))
    parts = path.resolve().parts
    from_path = "/".join(parts[-4:-2]) if path.is_dir() else path.stem
    overrides = data.get("overrides")
    words = [data.get("recipe", from_path), *(overrides if isinstance(overrides, list) else [])]
    return Run(path, " ".join(map(str, words)), str(data.get("config_hash", parts[-2])), curves)


def group(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by recipe; with its config hash where runs of one name had different settings."""
    hashes: dict[str, set[str]] = {}
    for run in runs:
        hashes.setdefault(run.recipe, set()).add(run.config_hash)
    arms: dict[str, list[Run]] = {}
    for run in runs:
        name = run.recipe if len(hashes[run.recipe]) == 1 else f"{run.recipe} ({run.config_hash})"
        arms.setdefault(name, []).append(run)
    return arms


def check_metrics(arms: dict[str, list[Run]], metrics: Sequence[str]) -> None:
    """Raises:
    UserError: no run has a finite value of a metric; lists those there are, close matches first.
    """
    runs = [run for arm in arms.values() for run in arm]
    known = sorted({key for run in runs for key in run.curves} - {"epoch"})
    for metric in metrics:
        if any(has_values(run, metric) for run in runs):
            continue
        if metric in known:
            raise UserError(f"--metric: {metric!r} has no finite value in these runs")
        close = difflib.get_close_matches(metric, known, n=5, cutoff=0.5)
        others = [key for key in known if key not in close]
        raise UserError(f"--metric: no {metric!r} in these runs; there are {', '.join([*close, *others]) or 'none'}")


def has_values(run: Run, metric: str) -> bool:
    """Whether there is anything to draw."""
    return any(map(math.isfinite, run.curves.get(metric, [])))


def _draw(arms: dict[str, list[Run]], metrics: Sequence[str], suffix: str) -> bytes:
    from scripts import charts  # Matplotlib, which no error above has to wait for

    figure = charts.panels(
        {name: [run.curves for run in runs] for name, runs in arms.items()},
        {metric: METRICS.get(metric, metric) for metric in metrics},
    )
    if suffix == ".png":
        return charts.to_png(figure)
    return charts.to_svg(figure, f"{', '.join(metrics)} of {', '.join(arms)}", inline=False).encode()


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomic(path, content)
    except OSError as error:
        raise UserError(f"--out: cannot write {path}: {error.strerror}") from error


def _read_json(file: Path) -> dict[str, object]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{file}: must hold a record, got {type(data).__name__}")
    return data


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
