"""Memorization of wrong labels, seen in the predictions made while training."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


def memorization_shares(predicted: Tensor, label: Tensor, clean_label: Tensor) -> dict[str, Tensor]:
    """Shares of wrongly and of correctly labelled examples by what the net predicts for them.

    Args:
        predicted: (n,) int64 predicted classes; negative entries were not seen and are left out.
        label: (n,) int64 given (noisy) labels.
        clean_label: (n,) int64 true labels. An example is *wrong* if the two differ.

    Returns:
        0-d float64 tensors: `wrong/correct` (predicts the true class), `wrong/memorized` (predicts the given wrong
        class), `wrong/other`, `clean/correct`, `clean/incorrect`. NaN where there is no such example.

    Source: arXiv 2007.00151, Figure 1.
    """
    seen = predicted >= 0
    wrong, clean = (label != clean_label) & seen, (label == clean_label) & seen
    true, given = predicted == clean_label, predicted == label
    num_wrong, num_clean = wrong.sum().double(), clean.sum().double()
    return {
        "wrong/correct": (wrong & true).sum() / num_wrong,
        "wrong/memorized": (wrong & given).sum() / num_wrong,
        "wrong/other": (wrong & ~true & ~given).sum() / num_wrong,
        "clean/correct": (clean & true).sum() / num_clean,
        "clean/incorrect": (clean & ~true).sum() / num_clean,
    }


class Memorization(Callback):
    """Logs the shares of `memorization_shares` once an epoch, from the train-mode predictions of that epoch.

    Works on any module whose `training_step` returns a dict with `logits` (B, C), and any datamodule whose
    `train_labels()` gives `label` and `clean_label` (n,). Batches must carry `index` (positions among the n). Where an
    epoch passes over the data more than once (`pass` in the batch), the first pass counts.
    """

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets the predictions of the epoch before."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not hasattr(datamodule, "train_labels"):
            raise ValueError(
                f"Memorization needs a datamodule with train_labels(), got {type(datamodule).__name__}; "
                "datamodules.images.ImageData has it"
            )
        label = datamodule.train_labels()["label"]
        self._predicted = torch.full_like(label, -1, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stores the predicted classes of this batch."""
        if not isinstance(outputs, dict) or "logits" not in outputs:
            raise ValueError(f"Memorization needs training_step of {type(pl_module).__name__} to return `logits`")
        if batch.get("pass", 0) == 0:
            self._predicted[batch["index"]] = outputs["logits"].argmax(1)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The predictions travel in a checkpoint written within an epoch, joined over the ranks."""
        if hasattr(self, "_predicted"):
            self._join(trainer)
            checkpoint["predicted"] = self._predicted.cpu().clone()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes the predictions back."""
        if "predicted" in checkpoint:
            self._predicted = checkpoint["predicted"].clone()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Moves them to where the batches are."""
        if hasattr(self, "_predicted"):
            self._predicted = self._predicted.to(pl_module.device)

    def _join(self, trainer: L.Trainer) -> None:
        """Ranks hold disjoint examples, so the maximum joins them."""
        if trainer.world_size > 1:
            torch.distributed.all_reduce(self._predicted, op=torch.distributed.ReduceOp.MAX)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the shares."""
        self._join(trainer)
        labels = trainer.datamodule.train_labels()  # type: ignore[attr-defined]
        shares = memorization_shares(self._predicted.cpu(), labels["label"], labels["clean_label"])
        pl_module.log_dict({k: v.float() for k, v in shares.items()}, rank_zero_only=False)
