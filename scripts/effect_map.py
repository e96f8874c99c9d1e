"""`noisebench effect-map`: where a paper's effect lives, one page over process, sampling steps and batch."""

import argparse
import csv
import importlib
import io
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from callbacks.files import write_atomic
from scripts import recipes
from scripts.errors import UserError
from scripts.reproduce import parse_seeds

KEYS = {"title", "metric", "rows", "batches", "nfes", "overrides"}


@dataclass(frozen=True)
class Cell:
    """One pair of runs' metric at one number of sampling steps; several seeds are averaged.

    Args:
        row: label of the process.
        batch: global batch.
        nfe: evaluations per sample.
        treatment, control: means over seeds.
    """

    row: str
    batch: int
    nfe: int
    treatment: float
    control: float

    @property
    def difference(self) -> float:
        """Treatment minus control; negative where the method helps."""
        return self.treatment - self.control


def verb(argv: list[str]) -> int:
    """Entry of `noisebench effect-map`."""
    parser = argparse.ArgumentParser(
        prog="noisebench effect-map",
        description="Trains both arms at each process and batch of recipes/PAPER/_effect_map.yaml (finished runs are "
        "kept) and draws the difference of their FD for each number of sampling steps.",
        epilog="example: noisebench effect-map immiscible --seeds 0..1 --out effect_map.svg",
        allow_abbrev=False,
    )
    parser.add_argument("paper", metavar="PAPER", help="e.g. immiscible")
    parser.add_argument("--seeds", default="0..1", metavar="A..B", help="two or more; default: 0..1")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="*.svg or *.png; default: RUNS/PAPER/effect_map.svg; a .csv beside it")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run, for a quick look")
    options = parser.parse_args(argv)
    study = load_study(options.paper)
    if options.steps is not None:
        study["overrides"] |= {"trainer.max_steps": options.steps, "model.evaluation.steps": [options.steps]}
    out = options.out or options.runs / options.paper / "effect_map.svg"
    if out.suffix not in (".svg", ".png"):
        raise UserError(f"--out must end in .svg or .png, got {str(out)!r}")
    cells = measure(options.paper, study, parse_seeds(options.seeds), options.runs)
    write_atomic(out.with_suffix(".csv"), table(cells))
    write_atomic(out, draw(cells, study, out.suffix[1:]))
    print(f"written: {out}, {out.with_suffix('.csv')}")
    return 0


def load_study(paper: str) -> dict[str, Any]:
    """The grid of a paper.

    Raises:
        UserError: there is none, or a key is missing or unknown.
    """
    path = recipes.ROOT / paper / "_effect_map.yaml"
    if not path.is_file():
        known = sorted(file.parent.name for file in recipes.ROOT.glob("*/_effect_map.yaml"))
        raise UserError(f"no effect map of {paper!r}; there are {', '.join(known)}")
    study = recipes.read_yaml(path)
    if set(study) != KEYS:
        raise UserError(f"{path} must have the keys {', '.join(sorted(KEYS))}, got {', '.join(sorted(study))}")
    return study


def measure(paper: str, study: dict[str, Any], seeds: list[int], runs: Path) -> list[Cell]:
    """Trains what is missing and reads the metric of every cell."""
    cells = []
    total = 2 * len(study["rows"]) * len(study["batches"]) * len(seeds)
    done = 0
    for row, arms in study["rows"].items():
        for batch in study["batches"]:
            found: dict[str, list[dict[str, float]]] = {}
            for arm in ("treatment", "control"):
                for seed in seeds:
                    done += 1
                    print(
                        f"run {done} of {total}: {arms[arm]}, batch {batch}, seed {seed}", file=sys.stderr, flush=True
                    )
                    found.setdefault(arm, []).append(_metrics(f"{paper}/{arms[arm]}", study, batch, seed, runs))
            for nfe in study["nfes"]:
                name = f"{study['metric'].format(nfe=nfe)}_last"
                means = {arm: sum(metrics[name] for metrics in found[arm]) / len(seeds) for arm in found}
                cells.append(Cell(row, batch, nfe, **means))
    return cells


def _metrics(recipe: str, study: dict[str, Any], batch: int, seed: int, runs: Path) -> dict[str, float]:
    """Of one run, trained unless its folder holds it already."""
    overrides = {**study["overrides"], "model.evaluation.nfes": study["nfes"], "data.batch_size": batch}
    words = [word for key, value in overrides.items() for word in (f"--{key}", json.dumps(value))]
    words += ["--seed_everything", str(seed), "--runs", str(runs), "--wandb", "false"]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    cli = importlib.import_module("scripts.train").run("fit", ["--config", recipe, *words], resume=True)
    return json.loads((cli.folder / "record.json").read_text())["metrics"]


def table(cells: list[Cell]) -> str:
    """The cells as CSV."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["process", "batch", "evaluations", "treatment", "control", "difference"])
    for cell in cells:
        writer.writerow([cell.row, cell.batch, cell.nfe, cell.treatment, cell.control, cell.difference])
    return stream.getvalue()


def draw(cells: list[Cell], study: dict[str, Any], kind: str) -> bytes:
    """One panel for each process, batch against sampling steps; numbers are differences, colours ratios."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = list(study["rows"])
    with matplotlib.rc_context({"svg.hashsalt": "noisebench", "font.size": 9}):
        figure = Figure(figsize=(0.9 + 2.6 * len(rows), 2.8), layout="constrained")
        for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
            at = {(cell.batch, cell.nfe): cell for cell in cells if cell.row == row}
            grid = [[math.log2(at[b, n].treatment / at[b, n].control) for n in study["nfes"]] for b in study["batches"]]
            image = axes.imshow(grid, cmap="PuOr", vmin=-1.5, vmax=1.5, aspect="auto")
            for y, batch in enumerate(study["batches"]):
                for x, nfe in enumerate(study["nfes"]):
                    axes.text(x, y, f"{at[batch, nfe].difference:+.2f}", ha="center", va="center")
            axes.set_xticks(range(len(study["nfes"])), study["nfes"])
            axes.set_yticks(range(len(study["batches"])), study["batches"])
            axes.set_title(row, fontsize=9)
            axes.set_xlabel("Evaluations per sample")
            axes.set_ylabel("Batch")
        figure.colorbar(image, ax=figure.axes, label="log2 of the ratio of FD", shrink=0.9)
        figure.suptitle(study["title"], fontsize=10)
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, facecolor="white", metadata={"Date": None} if kind == "svg" else None)
    return stream.getvalue()
