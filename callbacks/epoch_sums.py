"""Sums over an epoch in checkpoints that are written within it."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class EpochSums(Callback):
    """Lets a module's sums over the epoch (`_sums`, a tensor made in `on_train_epoch_start`) go on after a resume.

    Lightning does not call `on_train_epoch_start` where a run continues within an epoch, so such a module would miss
    the attribute. A module that keeps its sums itself sets them after this callback.
    """

    def __init__(self) -> None:
        self._stored: Tensor | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds `module_sums`, one row for each rank."""
        sums = vars(pl_module).get("_sums")
        if not isinstance(sums, Tensor):
            return
        rows = [sums]
        if trainer.world_size > 1:
            rows = [torch.empty_like(sums) for _ in range(trainer.world_size)]
            torch.distributed.all_gather(rows, sums)
        checkpoint["module_sums"] = torch.stack(rows).cpu()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps them until training starts."""
        self._stored = checkpoint.get("module_sums")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hands them out; a next epoch starts its own."""
        if self._stored is None:
            return
        rows, self._stored = self._stored, None
        same = len(rows) == trainer.world_size
        mine = rows[trainer.global_rank] if same else rows.sum(0) * (trainer.global_rank == 0)
        vars(pl_module)["_sums"] = mine.clone().to(pl_module.device)
