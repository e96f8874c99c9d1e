"""A callback for runs in processes of their own: does at a given step what the environment asks for."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from conftest import fill_disk
from lightning.pytorch.callbacks import Callback

VARIABLE = "NOISEBENCH_TEST_FAULT"


class Fault(Callback):
    """`NOISEBENCH_TEST_FAULT="kill 1 11"`: rank 1 kills itself between backward and optimizer of step 11 (from 0).

    `term`: it sends itself SIGTERM there. `nan`: its loss becomes NaN. `full`: each checkpoint that it writes from then
    on meets a full disk half-way. `wandb`: it kills W&B's process. Without the variable nothing happens, so that a run
    and its resume have the same settings.
    """

    def __init__(self) -> None:
        self.kind, rank, step = os.environ.get(VARIABLE, "none -1 -1").split()
        self.rank, self.step = int(rank), int(step)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if (trainer.global_rank, trainer.global_step) != (self.rank, self.step):
            return
        print(f"fault at {time.monotonic()}", flush=True)
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.kind == "wandb":
            os.kill(_child("wandb-core"), signal.SIGKILL)
        elif self.kind == "full":
            fill_disk(pytest.MonkeyPatch(), ".ckpt")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.kind == "nan" and (trainer.global_rank, trainer.global_step - 1) == (self.rank, self.step):
            outputs["loss"] = outputs["loss"] * float("nan")


def _child(name: str) -> int:
    """Number of the child process that runs this program."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    (found,) = [pid for pid in children if name in Path(f"/proc/{pid}/cmdline").read_text()]
    return int(found)
