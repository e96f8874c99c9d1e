"""The record of a run: what it was, what it measured, what it cost."""

import csv
import io
import math
import re
import resource
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.flop_counter import FlopCounterMode

from callbacks.files import SCHEMA, write_atomic, write_record


def summarize(history: list[dict[str, float]], monitor: str | None = None, mode: str = "max") -> dict[str, float]:
    """Final metrics of a run from its epochs.

    Args:
        history: one row per epoch with `epoch`, `step` and metrics.
        monitor: metric that picks the best epoch (on noisy validation labels), `mode` max or min; first one on ties.

    Returns:
        For each metric: `<k>_last`; `<k>_last5`, the mean of the last five epochs, where there are five; and
        `<k>_max`, `<k>_min`, `<k>_max_epoch`, `<k>_min_epoch`. Test metrics get instead `<k>_best_oracle` (over
        epochs, lowest for a loss: chosen with the test labels, never a headline) and `<k>_at_best_val`.
    """
    if not history:
        return {}
    best = None
    if monitor is not None:
        watched = [row for row in history if math.isfinite(row.get(monitor, math.nan))]
        if watched:
            best = (max if mode == "max" else min)(watched, key=lambda row: row[monitor])
    metrics = {} if best is None else {"best_epoch": best["epoch"]}
    for key in sorted({key for row in history for key in row} - {"epoch", "step"}):
        rows = [row for row in history if key in row]
        values = [row[key] for row in rows]
        metrics[f"{key}_last"] = values[-1]
        if len(values) >= 5:
            metrics[f"{key}_last5"] = sum(values[-5:]) / 5
        finite = [row for row in rows if math.isfinite(row[key])]
        if not finite:
            continue
        high, low = max(finite, key=lambda row: row[key]), min(finite, key=lambda row: row[key])
        if key.startswith("test/"):
            metrics[f"{key}_best_oracle"] = (low if "loss" in key else high)[key]
            if best is not None and key in best:
                metrics[f"{key}_at_best_val"] = best[key]
            continue
        metrics |= {f"{key}_max": high[key], f"{key}_max_epoch": high["epoch"]}
        metrics |= {f"{key}_min": low[key], f"{key}_min_epoch": low["epoch"]}
    return metrics


class RunRecord(Checkpoint):
    """Writes config.yaml, metrics.csv (each epoch) and record.json (at the end, or on failure) into the run's folder.

    A `Checkpoint`, placed before ModelCheckpoint: so it sees the metrics that modules log at an epoch's end, and its
    own state is complete when the checkpoint is written. The history of earlier epochs comes back with a resume.
    A run that is interrupted (Ctrl-C, SIGTERM) leaves no record; it can be resumed.

    Args:
        folder: the run's folder.
        facts: what the command knows of the run (recipe, resolved config, hashes, seed, versions ...); goes into the
            record, and `config` and `code_hash` into checkpoints too.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.facts = facts
        self.history: list[dict[str, float]] = []
        self.flops_per_step: int | None = None
        self.spent = {"cpu_seconds": 0.0, "wall_seconds": 0.0}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clocks and writes config.yaml."""
        self._started = _clocks()
        _reset_peak_memory()
        if trainer.is_global_zero:
            write_atomic(self.folder / "config.yaml", yaml.safe_dump(self.facts["config"], sort_keys=False))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Counts the FLOPs of the first step."""
        if self.flops_per_step is None:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the count."""
        if self.flops_per_step is None:
            self._counter.__exit__(None, None, None)
            self.flops_per_step = self._counter.get_total_flops()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adds a row to metrics.csv."""
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        self.history.append({"epoch": trainer.current_epoch, "step": trainer.global_step, **metrics})
        if trainer.is_global_zero:
            write_atomic(self.folder / "metrics.csv", _as_csv(self.history))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the record of a finished run."""
        self._write(trainer, pl_module, "finished", None)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Writes the record of a failed run; if that fails too, the first error is the one to see."""
        if self.flops_per_step is None and hasattr(self, "_counter"):
            self._counter.__exit__(None, None, None)
        if not isinstance(exception, Exception) or isinstance(exception, SIGTERMException):
            return
        try:
            self._write(trainer, pl_module, "failed", f"{type(exception).__name__}: {exception}")
        except OSError as error:
            print(f"warning: the failure could not be recorded in {self.folder}: {error}", file=sys.stderr)

    def state_dict(self) -> dict[str, Any]:
        """History and costs up to now."""
        spent = self._spent()
        return {"history": self.history, "flops_per_step": self.flops_per_step, "spent": spent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the history and costs of the run that wrote the checkpoint."""
        self.history = list(state_dict["history"])
        self.flops_per_step = state_dict["flops_per_step"]
        self.spent = dict(state_dict["spent"])

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Tells a later resume what the checkpoint was made with."""
        checkpoint["noisebench"] = {name: self.facts[name] for name in ("config", "code_hash")} | {
            "wandb_id": self.facts.get("wandb_id")
        }

    def _spent(self) -> dict[str, float]:
        now = _clocks()
        return {name: self.spent[name] + now[name] - self._started[name] for name in self.spent}

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, status: str, reason: str | None) -> None:
        if not hasattr(self, "_started"):
            self._started = _clocks()
        spent, flops_per_step = self._spent(), self.flops_per_step
        if status == "finished":
            # only now: after a failure the other ranks may not answer any more
            mine = [round(spent["cpu_seconds"] * 1e6), self.flops_per_step or 0]
            sums = trainer.strategy.reduce(torch.tensor(mine, device=trainer.strategy.root_device), reduce_op="sum")
            spent["cpu_seconds"] = int(sums[0]) / 1e6
            flops_per_step = int(sums[1]) or None
        if not trainer.is_global_zero:
            return
        savers = [s for s in trainer.checkpoint_callbacks if getattr(s, "monitor", None) is not None]
        monitor, mode = (savers[0].monitor, savers[0].mode) if savers else (None, "max")  # type: ignore[attr-defined]
        record = {
            "schema": SCHEMA,
            "status": status,
            "reason": reason,
            **self.facts,
            "metrics": summarize(self.history, monitor, mode),
            "epochs": len(self.history),
            **{name: round(seconds, 2) for name, seconds in spent.items()},
            "world_size": trainer.world_size,
            "peak_memory_bytes": _peak_memory(),
            "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "parameters": sum(p.numel() for p in pl_module.parameters()),
            "flops_per_step": flops_per_step,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_record(self.folder, record)


def _as_csv(history: list[dict[str, float]]) -> str:
    keys = sorted({key for row in history for key in row} - {"epoch", "step"})
    text = io.StringIO()
    writer = csv.DictWriter(text, ["epoch", "step", *keys], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()


def _clocks() -> dict[str, float]:
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "cpu_seconds": time.process_time() + workers.ru_utime + workers.ru_stime,
        "wall_seconds": time.monotonic(),
    }


def _reset_peak_memory() -> None:
    """Several runs share a process; Linux can start its high-water mark anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_memory() -> int:
    """Largest resident size of this process in bytes, since the run began where the system can tell."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
