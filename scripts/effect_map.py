"""`noisebench effect-map`: where a paper's effect lives, one page over process, sampling steps and batch."""

import argparse
import io
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from callbacks.files import write_atomic
from scripts import leaderboard, provenance
from scripts.code_hash import project_classes
from scripts.errors import UserError
from scripts.maps import Cell, EffectMap, as_csv, as_json, grid_hash, load_study
from scripts.options import overrides
from scripts.published import doubts
from scripts.records import Record, read_records
from scripts.reproduce import parse_seeds


@dataclass(frozen=True, order=True)
class Run:
    """One training: a recipe of the paper with a batch and a seed; rows may share it."""

    recipe: str
    batch: int
    seed: int


def verb(argv: list[str]) -> int:
    """Entry of `noisebench effect-map`; 1 if a published file could not be used."""
    options = _parser().parse_args(argv)
    study, seeds = load_study(options.paper), parse_seeds(options.seeds)
    out = options.out or options.runs / options.paper / "effect_map.svg"
    if out.suffix not in (".svg", ".png"):
        raise UserError(f"--out must end in .svg or .png, got {str(out)!r}")
    if options.publish:
        _check_publishable(options)
    records = measure(options.paper, _shortened(study, options.steps), seeds, options.runs, _tree_check(options))
    words = ["--steps", str(options.steps)] if options.steps is not None else []
    command = shlex.join(["noisebench", "effect-map", options.paper, "--seeds", options.seeds, *words])
    found = build(options.paper, study, seeds, records, command, options.steps)
    files: dict[Path, str | bytes] = {
        out: draw(found, out.suffix[1:]),
        out.with_suffix(".csv"): as_csv(found),
        out.with_suffix(".json"): as_json(found),
    }
    for file, content in files.items():
        _write(file, content, "--out")
    print(f"written: {', '.join(map(str, files))}")
    return _publish(found, records.values(), options.force) if options.publish else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="noisebench effect-map",
        description="Trains both arms at each process and batch of recipes/PAPER/_effect_map.yaml (finished runs are "
        "kept) and draws the difference of their FD for each number of sampling steps. `noisebench leaderboard` shows "
        "RUNS/PAPER/effect_map.json on its page effect_map.html.",
        epilog="examples: noisebench effect-map immiscible --seeds 0..1 --out effect_map.svg; "
        "noisebench effect-map immiscible --publish",
        allow_abbrev=False,
    )
    parser.add_argument("paper", metavar="PAPER", help="e.g. immiscible")
    parser.add_argument("--seeds", default="0..1", metavar="A..B", help="two or more; default: 0..1")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument(
        "--out", type=Path, help="*.svg or *.png; default: RUNS/PAPER/effect_map.svg; .json and .csv beside it"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps of each run, for a quick look")
    parser.add_argument(
        "--publish", action="store_true", help="in a checkout: also copy the map to docs/leaderboard and its pages"
    )
    parser.add_argument("--force", action="store_true", help="publish a map of runs from a changed tree too")
    return parser


def _check_publishable(options: argparse.Namespace) -> None:
    """What can be told before anything is trained."""
    if options.steps is not None:
        raise UserError("--publish shows the grid as it is; give it without --steps")
    if not leaderboard.README.is_file():
        raise UserError(f"--publish: no {leaderboard.README.absolute()}; it works in a checkout of noisebench")


def _tree_check(options: argparse.Namespace) -> Callable[[], None]:
    """Called before something is trained: minutes of runs that could not be published would be lost."""

    def check() -> None:
        state = provenance.git_state()
        if options.publish and not options.force and (not state["commit"] or state["dirty"] is not False):
            raise UserError(
                "--publish: runs made now would come from an unknown commit or a tree with changes that are in no "
                "commit; commit them first, or publish as it is with --force"
            )

    return check


def _shortened(study: dict[str, Any], steps: int | None) -> dict[str, Any]:
    """The grid with runs of so many steps."""
    if steps is None:
        return study
    return study | {
        "overrides": study["overrides"] | {"trainer.max_steps": steps, "model.evaluation.steps": [steps]},
    }


def measure(
    paper: str, study: dict[str, Any], seeds: list[int], runs: Path, before_training: Callable[[], None]
) -> dict[Run, Record]:
    """The record of every run of the grid, once trained where there is none that is current.

    A record that is there is used as it is: training would not run again, but put today's commit in the record.

    Raises:
        UserError: a run failed for an outside reason, or code or recipes changed meanwhile.
    """
    arms = dict.fromkeys(recipe for row in study["rows"].values() for recipe in row.values())
    wanted = [Run(recipe, batch, seed) for recipe in arms for batch in study["batches"] for seed in seeds]
    found = _there(paper, study, wanted, runs)
    missing = [run for run in wanted if run not in found]
    print(f"the map needs {len(wanted)} runs; {len(found)} are there, {len(missing)} to run")
    if missing:
        before_training()
    for number, run in enumerate(missing, start=1):
        label = f"run {number} of {len(missing)}: {run.recipe}, batch {run.batch}, seed {run.seed}"
        print(label, file=sys.stderr, flush=True)
        _train(f"{paper}/{run.recipe}", _words(study, run.batch), run.seed, runs)
    if missing:
        found = _there(paper, study, wanted, runs)
    if lost := [run for run in wanted if run not in found]:
        raise UserError(
            f"{len(lost)} runs, e.g. {lost[0].recipe} with batch {lost[0].batch} and seed {lost[0].seed}, are stale: "
            "recipe or code have changed since they began; the same command runs them again"
        )
    return found


def _words(study: dict[str, Any], batch: int) -> list[str]:
    """The grid's settings at one batch as words of `noisebench fit`."""
    settings = {**study["overrides"], "model.evaluation.nfes": study["nfes"], "data.batch_size": batch}
    return [word for key, value in settings.items() for word in (f"--{key}", json.dumps(value))]


def _there(paper: str, study: dict[str, Any], wanted: list[Run], runs: Path) -> dict[Run, Record]:
    """Current records of runs that finished or diverged, in the order wanted."""
    usable: dict[tuple[str, int, tuple[str, ...]], Record] = {}
    for record in read_records(runs)[0]:
        if record.stale or record.failed_from_outside:
            continue
        key = (*record.run, tuple(record.data["overrides"]))
        if key not in usable or record.rank > usable[key].rank:
            usable[key] = record
    found = {}
    for run in wanted:
        key = (f"{paper}/{run.recipe}", run.seed, tuple(overrides(_words(study, run.batch))))
        if key in usable:
            found[run] = usable[key]
    return found


def _train(recipe: str, words: list[str], seed: int, runs: Path) -> None:
    """Trains one run; one that diverges is a result, told by its record."""
    import torch

    from callbacks.nonfinite import NonFiniteLossError
    from scripts import train

    torch.set_num_threads(1)  # as `reproduce` does
    words = ["--config", recipe, *words, "--seed_everything", str(seed), "--runs", str(runs), "--wandb", "false"]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    try:
        train.explained(lambda: train.run("fit", words, resume=True), recipe)
    except UserError as error:
        if not isinstance(error.__cause__, NonFiniteLossError):
            raise
        print(f"diverged: {error}", file=sys.stderr)


def build(
    paper: str, study: dict[str, Any], seeds: list[int], records: dict[Run, Record], command: str, steps: int | None
) -> EffectMap:
    """The map of these records.

    Raises:
        UserError: a record lacks the metric.
    """
    cells = []
    for row, arms in study["rows"].items():
        for batch in study["batches"]:
            for nfe in study["nfes"]:
                name = f"{study['metric'].format(nfe=nfe)}_last"
                values = {
                    arm: tuple(_value(records[Run(recipe, batch, seed)], name) for seed in seeds)
                    for arm, recipe in arms.items()
                }
                cells.append(Cell(row, batch, nfe, **values))
    states = {json.dumps(record.data.get("git"), sort_keys=True) for record in records.values()}
    # a stale record speaks for its recipe
    by_recipe = {run.recipe: records[run] for run in sorted(records, key=lambda run: records[run].stale)}
    return EffectMap(
        paper=paper,
        title=study["title"],
        metric=study["metric"],
        command=command,
        steps=steps,
        seeds=seeds,
        rows=study["rows"],
        batches=study["batches"],
        nfes=study["nfes"],
        grid_hash=grid_hash(study),
        recipes={name: _made_with(record) for name, record in sorted(by_recipe.items())},
        git=[json.loads(state) for state in sorted(states)],
        cpu_seconds=round(math.fsum(record.cpu_seconds for record in records.values()), 2),
        finished_at=max(record.data["finished_at"] for record in records.values()),
        cells=cells,
    )


def _value(record: Record, metric: str) -> float:
    if not record.finished:
        return math.nan
    if metric not in record.metrics:
        raise UserError(f"no metric {metric!r} in {record.path}; it has {', '.join(sorted(record.metrics))}")
    return record.metrics[metric]


def _made_with(record: Record) -> dict[str, Any]:
    """What tells later whether the run is stale."""
    hashes = {key: record.data[key] for key in ("recipe_hash", "code_hash")}
    return {**hashes, "classes": project_classes(record.data["config"])}


def _publish(found: EffectMap, records: Iterable[Record], force: bool) -> int:
    """Copies the map beside the published records and writes the pages anew; 1 if a published file cannot be used."""
    refuse(list(records), force)
    file = leaderboard.DOCS / leaderboard.MAPS / f"{found.paper}.json"
    _write(file, as_json(found), "--publish")
    print(f"published {file}")
    problems = leaderboard.write_committed()
    for problem in problems:
        print(f"skipped: {problem}", file=sys.stderr)
    return 1 if problems else 0


def refuse(records: list[Record], force: bool) -> None:
    """Stops before a map is published that others could not repeat.

    Raises:
        UserError: a record comes from a changed tree or an unknown commit, or is stale, and `force` is not set.
    """
    refused = [f"{record.path}: {', '.join(reasons)}" for record in records if (reasons := doubts(record))]
    if refused and not force:
        lines = "\n  ".join(refused)
        raise UserError(
            f"--publish: {len(refused)} of {len(records)} records are not fit to be published, so the map is not:\n"
            f"  {lines}\nrun them again from a committed tree with another --runs, or publish as it is with --force"
        )


def _write(file: Path, content: str | bytes, option: str) -> None:
    try:
        write_atomic(file, content)
    except OSError as error:
        raise UserError(f"{option}: cannot write {file}: {error.strerror}") from error


def draw(found: EffectMap, kind: str) -> bytes:
    """One panel for each process, batch against sampling steps; numbers are differences, colours ratios."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "noisebench", "font.size": 9}):
        figure = Figure(figsize=(0.9 + 2.6 * len(found.rows), 3.0), layout="constrained")
        for axes, row in zip(figure.subplots(1, len(found.rows), squeeze=False)[0], found.rows, strict=True):
            grid = [[found.at(row, batch, nfe) for nfe in found.nfes] for batch in found.batches]
            logs = [[math.log2(cell.ratio) for cell in cells] for cells in grid]
            image = axes.imshow(logs, cmap="PuOr_r", vmin=-1.5, vmax=1.5, aspect="auto")
            for y, cells in enumerate(grid):
                for x, cell in enumerate(cells):
                    text = f"{cell.difference:+.2f}{'*' * cell.mixed}" if cell.complete else "diverged"
                    axes.text(x, y, text, ha="center", va="center")
            axes.set_xticks(range(len(found.nfes)), found.nfes)
            axes.set_yticks(range(len(found.batches)), found.batches)
            axes.set_title(row, fontsize=9)
            axes.set_xlabel("Evaluations per sample")
            axes.set_ylabel("Batch")
        figure.colorbar(image, ax=figure.axes, label="log2 of the ratio of FD", shrink=0.9)
        note = f"means of {len(found.seeds)} seeds, * where they disagree in sign"
        figure.suptitle(f"{found.title}\n{note}", fontsize=10)
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, facecolor="white", metadata={"Date": None} if kind == "svg" else None)
    return stream.getvalue()
