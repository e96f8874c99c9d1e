"""`reproduce` with real worker processes: verdicts, skipping, resuming what was killed."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import recipes
from scripts.errors import UserError
from scripts.reproduce import chosen_claims, parse_seeds

ROOT = Path(__file__).parents[1]
RECIPE: dict[str, Any] = {
    "trainer": {
        "max_epochs": 4,
        "accelerator": "cpu",
        "callbacks": [{"class_path": "callbacks.memorization.Memorization"}],
    },
    "checkpoint": {"monitor": "val/acc_noisy", "mode": "max", "filename": "best"},
    "model": {
        "class_path": "lightning_modules.elr.ELR",
        "init_args": {
            "net": {"class_path": "lightning_modules.networks.image.SmallResNet"},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
            "lam": 0.0,
        },
    },
    "data": {
        "class_path": "datamodules.images.ImageData",
        "init_args": {
            "source": {
                "class_path": "synthetic.SyntheticImages",
                "init_args": {"num_classes": 10, "channels": 1, "size": 28, "per_class": 20},
            },
            "batch_size": 25,
            "val_fraction": 0.5,
            "noise": {"class_path": "datamodules.labels.Symmetric", "init_args": {"rate": 0.4}},
        },
    },
}
CLAIM: dict[str, Any] = {
    "id": "learns",
    "text": "The net beats chance",
    "scale": "mini",
    "treatment": "mini.yaml",
    "metric": "test/acc_last",
    "threshold": 0.1,
    "direction": "greater",
    "seeds": [0, 1],
}


def write(house: Path, claims: list[dict[str, Any]], **named: dict[str, Any]) -> None:
    """Writes claims and recipes of the paper."""
    folder = house / "recipes" / "toy"
    folder.mkdir(parents=True, exist_ok=True)
    for name, recipe in named.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    paper = {"title": "Toy", "arxiv": "2001.00001", "venue": "none", "family": "toys"}
    (folder / "claims.yaml").write_text(yaml.safe_dump({"paper": paper, "claims": claims}))


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A folder with a paper `toy` of its own; `run` starts the command there."""
    write(tmp_path, [CLAIM], mini=RECIPE)
    # worker processes import sitecustomize too, and so see the same recipes
    folder = str(tmp_path / "recipes")
    code = f"from pathlib import Path\nfrom scripts import recipes\nrecipes.ROOT = Path({folder!r})\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    return tmp_path


def start(house: Path, *words: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join(map(str, (house, ROOT, ROOT / "tests")))
    command = [sys.executable, "-m", "scripts", "reproduce", "toy", *words]
    environment = {**os.environ, "PYTHONPATH": paths}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=house, env=environment, start_new_session=True, **pipes)


def run(house: Path, *words: str) -> tuple[int, str]:
    process = start(house, *words)
    out, err = process.communicate(timeout=180)
    return process.returncode, out + err


def records(house: Path, runs: str = "runs") -> dict[int, dict[str, Any]]:
    found = (json.loads(path.read_text()) for path in (house / runs).glob("toy/mini/*/seed*/record.json"))
    return {record["seed"]: record for record in found}


def test_runs_what_is_missing_then_skips_it_and_runs_again_when_the_recipe_changes(house: Path) -> None:
    code, text = run(house, "--jobs", "2")
    assert code == 0, text
    assert "1 claims need 2 runs; 0 are there, 2 to run" in text
    assert "toy/learns: The net beats chance" in text
    assert (house / "runs" / "leaderboard" / "index.html").is_file()
    first = records(house)
    assert sorted(first) == [0, 1]
    assert first[0]["command"] == "noisebench fit --config recipes/toy/mini.yaml --seed_everything 0"

    code, text = run(house)
    assert "2 are there, 0 to run" in text
    assert records(house) == first

    write(house, [CLAIM], mini={**RECIPE, "trainer": {**RECIPE["trainer"], "max_epochs": 1}})
    code, text = run(house)
    assert "0 are there, 2 to run" in text
    assert code == 0


def test_killed_in_the_middle_it_continues_to_the_records_of_an_undisturbed_run(house: Path) -> None:
    code, text = run(house, "--runs", "undisturbed", "--jobs", "1")
    assert code == 0, text
    process = start(house, "--jobs", "1")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        tables = list((house / "runs").glob("toy/mini/*/seed1/metrics.csv"))
        if tables and len(tables[0].read_text().splitlines()) >= 2:
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert sorted(records(house)) == [0], "killed while seed 1 was running"
    code, text = run(house, "--jobs", "1")
    assert "1 are there, 1 to run" in text
    assert code == 0, text
    for seed, whole in records(house, "undisturbed").items():
        assert records(house)[seed]["metrics"] == whole["metrics"]


def test_workers_end_with_a_killed_parent(house: Path) -> None:
    process = start(house, "--jobs", "2")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((house / "runs").glob("toy/mini/*/seed*/config.yaml")):
        time.sleep(0.05)
    workers = _children(process.pid)
    assert workers
    process.kill()
    process.communicate()
    while time.monotonic() < deadline and any(_alive(worker) for worker in workers):
        time.sleep(0.05)
    assert not [worker for worker in workers if _alive(worker)]


def _children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_failing_run_is_named_and_the_others_finish(house: Path) -> None:
    broken = copy.deepcopy(RECIPE)
    broken["data"]["init_args"]["noise"]["init_args"]["rate"] = 1.4
    write(house, [CLAIM, {**CLAIM, "id": "fails", "treatment": "broken.yaml"}], broken=broken)
    code, text = run(house, "--jobs", "2")
    assert code == 1
    assert "FAILED toy/broken seed 0: noise.rate must be in [0, 1], got 1.4 (recipe toy/broken" in text
    assert sorted(records(house)) == [0, 1]


def test_misspelt_metric_is_named_and_nothing_is_lost(house: Path) -> None:
    write(house, [{**CLAIM, "metric": "test/accuracy_last"}])
    code, text = run(house, "--jobs", "2")
    assert code == 1
    assert "no metric 'test/accuracy_last'" in text
    assert "test/acc_last" in text
    assert sorted(records(house)) == [0, 1]


def test_seeds_are_read_as_ranges_and_lists() -> None:
    assert parse_seeds("0..3") == [0, 1, 2, 3]
    assert parse_seeds("7,3") == [3, 7]
    for bad in ("3", "3..1", "a..b", "-1,2", ""):
        with pytest.raises(UserError, match="--seeds must name at least two seeds"):
            parse_seeds(bad)


def test_extra_claims_run_only_when_asked_for() -> None:
    slugs = ["elr"]
    ordinary = [claim.id for claim in chosen_claims(slugs, None, "mini")]
    everything = [claim.id for claim in chosen_claims(slugs, "all", "mini")]
    assert "plus-not-worse" not in ordinary
    assert set(everything) - set(ordinary) == {"targets-need-memory", "kl-memorizes-more", "plus-not-worse"}
    assert [claim.id for claim in chosen_claims(slugs, "plus-not-worse", "mini")] == ["plus-not-worse"]
    assert recipes.papers() == ["elr"]
