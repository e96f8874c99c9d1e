"""A paper of three recipes in a temporary folder, and records of its runs, for tests of claims and verdicts."""

from pathlib import Path
from typing import Any

import yaml

from callbacks.files import SCHEMA, write_record
from scripts import recipes
from scripts.code_hash import code_hash

CLAIM: dict[str, Any] = {
    "id": "beats",
    "text": "The method beats the control",
    "scale": "mini",
    "treatment": "mini.yaml",
    "control": "mini-ce.yaml",
    "metric": "test/acc_last",
    "direction": "greater",
    "margin": 0.05,
    "seeds": [0, 1, 2],
    "paper": {"treatment": 0.89, "control": 0.81, "source": "Table 1"},
}
CLEAN = {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False}
CONFIG = {"model": {"class_path": "lightning_modules.networks.image.SmallResNet"}}


def claim(**changes: Any) -> dict[str, Any]:
    """`CLAIM` with other values; None takes a key away."""
    return {key: value for key, value in {**CLAIM, **changes}.items() if value is not None}


def write_paper(root: Path, *claims: dict[str, Any], slug: str = "toy", family: str = "toys", **document: Any) -> Path:
    """Writes `root`/`slug` with its recipes and claims.yaml; returns that file."""
    folder = root / slug
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("mini", "mini-ce", "full"):
        (folder / f"{name}.yaml").write_text(f"# Recipe {name}\n# Paper: none; cost 1 CPU-minute\nname: {name}\n")
    paper = {"title": "A Toy Paper", "arxiv": "2001.00001", "venue": "ToyConf 2020", "family": family}
    path = folder / "claims.yaml"
    path.write_text(yaml.safe_dump({"paper": paper, "claims": list(claims) or [CLAIM], **document}, sort_keys=False))
    return path


def add_record(runs: Path, recipe: str, seed: int, value: float | None, slug: str = "toy", **changes: Any) -> Path:
    """Writes the record of a run of `<slug>/<recipe>` with this `test/acc_last`; a failed one for None."""
    record = {
        "schema": SCHEMA,
        "status": "failed" if value is None else "finished",
        "reason": "NonFiniteLossError: diverged" if value is None else None,
        "recipe": f"{slug}/{recipe}",
        "recipe_hash": recipes.recipe_hash(recipes.ROOT / slug / f"{recipe}.yaml"),
        "overrides": [],
        "config": CONFIG,
        "config_hash": "c0ffee",
        "code_hash": code_hash(CONFIG),
        "seed": seed,
        "metrics": {} if value is None else {"test/acc_last": value, "test/acc_best_oracle": value + 0.01},
        "cpu_seconds": 10.0,
        "finished_at": "2026-01-01T00:00:00+00:00",
    } | changes
    return write_record(runs / slug / recipe / str(record["config_hash"]) / f"seed{seed}", record)


def add_arms(runs: Path, treatment: list[float | None], control: list[float | None]) -> None:
    """Records of `mini` and `mini-ce` for seeds 0, 1, ..."""
    for recipe, values in (("mini", treatment), ("mini-ce", control)):
        for seed, value in enumerate(values):
            add_record(runs, recipe, seed, value)


def add_curves(record: Path, **curves: list[float]) -> Path:
    """Writes metrics.csv beside a record: `epoch` and `step` count up, keywords give the metrics."""
    length = len(next(iter(curves.values())))
    columns = {"epoch": list(range(length)), "step": [80 * (epoch + 1) for epoch in range(length)], **curves}
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    path = record.with_name("metrics.csv")
    path.write_text("\n".join(lines) + "\n")
    return path
