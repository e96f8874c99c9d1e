"""Stop on a non-finite loss."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite."""


class StopOnNonFiniteLoss(Callback):
    """Ends the run as failed when the loss of any rank is NaN or infinite.

    The flag stays on the device and is read every `every_n_steps` steps (all ranks together) and at each epoch's end,
    before a checkpoint is written: no host-device sync per step, and no checkpoint of a diverged net.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._bad: torch.Tensor | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Folds this step's loss into the flag."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is None:
            return
        bad = ~torch.isfinite(loss.detach())
        self._bad = bad if self._bad is None else self._bad | bad
        if (batch_idx + 1) % self.every_n_steps == 0:
            self._check(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks before the epoch's checkpoint is written."""
        self._check(trainer)

    def _check(self, trainer: L.Trainer) -> None:
        if self._bad is None:
            return
        bad = trainer.strategy.reduce(self._bad.float(), reduce_op="sum")
        if float(bad) > 0:
            raise NonFiniteLossError(
                f"the training loss became NaN or infinite in epoch {trainer.current_epoch}, "
                f"at or before step {trainer.global_step}"
            )
