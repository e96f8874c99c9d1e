"""Run records, and files that are whole or absent."""

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from callbacks.nonfinite import NonFiniteLossError, StopOnNonFiniteLoss
from callbacks.run_record import RunRecord, summarize
from scripts.checkpoints import LastCheckpoint

FACTS: dict[str, Any] = {"recipe": "toy/line", "config": {"model": {"lr": 0.1}}, "code_hash": "c0de", "seed": 0}


class Line(L.LightningModule):
    """Least squares with one weight; `nan_at` makes the loss NaN in that epoch."""

    def __init__(self, nan_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, 1))
        self.nan_at = nan_at

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = ((batch @ self.weight - 1) ** 2).mean()
        return loss * math.nan if self.current_epoch == self.nan_at else loss

    def on_train_epoch_end(self) -> None:
        self.log("weight/sum", self.weight.sum().detach())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(folder: Path, max_epochs: int, module: Line | None = None, ckpt_path: Path | None = None) -> L.Trainer:
    callbacks = [
        StopOnNonFiniteLoss(),
        RunRecord(folder, FACTS),
        LastCheckpoint(folder / "checkpoints"),
    ]
    trainer = L.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(module or Line(), torch.utils.data.DataLoader(torch.eye(3), batch_size=2), ckpt_path=ckpt_path)
    return trainer


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


def test_finished_run_records_the_last_epoch(tmp_path: Path) -> None:
    trainer = train(tmp_path, 6)
    record = record_of(tmp_path)
    expected = float(trainer.lightning_module.weight.detach().sum())
    assert record["status"] == "finished"
    assert record["metrics"]["weight/sum_last"] == pytest.approx(expected)
    assert record["epochs"] == 6
    assert record["parameters"] == 3
    # forward (2, 3) @ (3, 1) and the gradient of the weight: 2 * 2 * 3 FLOPs each
    assert record["flops_per_step"] == 24


def test_metrics_csv_has_one_row_per_epoch(tmp_path: Path) -> None:
    train(tmp_path, 3)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0] == "epoch,step,weight/sum"
    assert [line.split(",")[:2] for line in lines[1:]] == [["0", "2"], ["1", "4"], ["2", "6"]]


def test_resumed_run_has_the_metrics_of_an_undisturbed_one(tmp_path: Path) -> None:
    train(tmp_path / "whole", 3)
    train(tmp_path / "parts", 1)
    train(tmp_path / "parts", 3, ckpt_path=tmp_path / "parts" / "checkpoints" / "last.ckpt")
    whole, parts = record_of(tmp_path / "whole"), record_of(tmp_path / "parts")
    assert parts["metrics"] == whole["metrics"]
    assert (tmp_path / "parts" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


def test_non_finite_loss_fails_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError):
        train(tmp_path, 3, Line(nan_at=1))
    record = record_of(tmp_path)
    assert record["status"] == "failed"
    assert record["reason"].startswith("NonFiniteLossError: the training loss became NaN or infinite in epoch 1")
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt")["epoch"] == 0


def test_interrupted_run_leaves_no_record(tmp_path: Path) -> None:
    class Interrupted(Line):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(tmp_path, 3, Interrupted())
    assert not (tmp_path / "record.json").exists()
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_full_disk_at_a_checkpoint_keeps_the_earlier_checkpoint(tmp_path: Path, full_disk: Any) -> None:
    train(tmp_path, 1)
    before = (tmp_path / "checkpoints" / "last.ckpt").read_bytes()
    full_disk(".ckpt")
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path, 2, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert (tmp_path / "checkpoints" / "last.ckpt").read_bytes() == before
    assert record_of(tmp_path)["reason"] == "OSError: [Errno 28] No space left on device"


def test_summary_values() -> None:
    accuracy = [0.5, 0.9, 0.8, 0.7, 0.6, 0.4]
    rows = [
        {"epoch": e, "step": e, "test/acc": a, "val/acc_noisy": 1 - a, "wrong/correct": a}
        for e, a in enumerate(accuracy)
    ]
    found = summarize(rows, monitor="val/acc_noisy", mode="max")
    assert found["test/acc_last"] == 0.4
    assert found["test/acc_last5"] == pytest.approx((0.9 + 0.8 + 0.7 + 0.6 + 0.4) / 5)
    assert found["test/acc_best_oracle"] == 0.9
    assert found["test/acc_at_best_val"] == 0.4
    assert found["best_epoch"] == 5
    assert (found["wrong/correct_max"], found["wrong/correct_max_epoch"]) == (0.9, 1)
    assert "test/acc_max" not in found


def test_summary_of_fewer_than_five_epochs_has_no_mean_of_five() -> None:
    assert "loss_last5" not in summarize([{"epoch": e, "step": e, "loss": 1.0} for e in range(4)])
