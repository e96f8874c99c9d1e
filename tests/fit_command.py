"""`noisebench fit` in processes of its own, on a small recipe, with a fault if asked for."""

import json
import os
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import torch
from faulty import VARIABLE

ROOT = Path(__file__).parents[1]
EPOCHS, STEPS = 3, 8
FIT = ["fit", "--config", "elr/mini-sym40", "--trainer.max_epochs", str(EPOCHS), "--data.val_fraction", "0.5"]
FIT += ["--data.source", "synthetic.SyntheticImages", "--data.source.num_classes", "10", "--data.source.channels", "1"]
FIT += ["--data.source.size", "28", "--data.source.per_class", "24", "--data.batch_size", "16"]
FIT += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
FIT += ["--trainer.callbacks+=faulty.Fault"]
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu", "--wandb", "false"]


def command(runs: Path, *words: str, fault: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m scripts fit ...`; a minute after the fault no process of it may be left."""
    mark = f"NOISEBENCH_TEST={uuid.uuid4()}"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    environment |= dict([mark.split("=")], **({VARIABLE: fault} if fault else {}))
    with (runs.parent / f"{runs.name}.log").open("w+") as log:
        words = (sys.executable, "-m", "scripts", *FIT, "--runs", str(runs), *words)
        done = subprocess.run(words, env=environment, stdout=log, stderr=log, timeout=300)
        while left := _processes(mark):
            log.seek(0)
            assert _seconds_since_fault(log.read()) < 60, left
            time.sleep(0.2)
        log.seek(0)
        said = log.read()
    if fault:
        seconds = _seconds_since_fault(said)
        print(f"{fault}: exit code {done.returncode}, all processes ended after {seconds:.1f} s")
        assert fault.startswith("wandb") or seconds < 60
    return subprocess.CompletedProcess(done.args, done.returncode, said, "")


def _seconds_since_fault(said: str) -> float:
    """How long ago the first fault was; of any rank, as they share the clock."""
    found = re.search(r"fault at ([\d.]+)", said)
    return time.monotonic() - float(found[1]) if found else 0.0


def _processes(mark: str) -> list[str]:
    """Command lines of live processes with this variable."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def run_folder(runs: Path) -> Path:
    (folder,) = runs.glob("elr/mini-sym40/*/seed10")
    return folder


def last(runs: Path, name: str = "last.ckpt") -> dict[str, Any]:
    return torch.load(run_folder(runs) / "checkpoints" / name, weights_only=True)


def record(runs: Path) -> dict[str, Any]:
    return json.loads((run_folder(runs) / "record.json").read_text())
