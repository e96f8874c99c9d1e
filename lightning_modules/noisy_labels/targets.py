"""What methods against noisy labels share: running targets per example, and what they know of the true labels."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_modules.networks.evaluation import ClassifierMetrics


def detection_metrics(targets: Tensor, label: Tensor, clean_label: Tensor) -> dict[str, Tensor]:
    """How well argmax of the targets finds the truth.

    Args:
        targets: (n, C) float. Rows never visited (all zero) are left out.
        label, clean_label: (n,) int64 given and true labels.

    Returns:
        0-d float64: `target/acc` (argmax = true class), `detect/precision` and `detect/recall` of the rule
        "argmax differs from the given label" for wrong labels; NaN where there is nothing to count.
    """
    visited = targets.any(1)
    predicted = targets.argmax(1)[visited]
    label, clean_label = label[visited], clean_label[visited]
    flagged, wrong = predicted != label, label != clean_label
    hits = (flagged & wrong).sum().double()
    return {
        "target/acc": (predicted == clean_label).double().mean(),
        "detect/precision": hits / flagged.sum(),
        "detect/recall": hits / wrong.sum(),
    }


class NoisyLabelModule(L.LightningModule):
    """Classifier trained on noisy labels with running targets per example: state, epoch sums, evaluation, optimizer.

    `targets` (num_passes, n, C) is float32 outside parameters and buffers, since DDP overwrites the buffers of a rank.
    Within an epoch each example is visited once, by one rank, so ranks join their rows once an epoch (and before a
    checkpoint): n * C * 4 bytes an epoch instead of a collective in each step.
    """

    num_passes = 1

    def __init__(self, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.scheduler = scheduler
        self._sums = torch.zeros(4)
        self._stored_sums: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Sizes targets and metrics by the data."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if not (hasattr(data, "num_classes") and hasattr(data, "num_train") and hasattr(data, "train_labels")):
            raise ValueError(
                f"{type(self).__name__} needs a datamodule with num_train, num_classes and train_labels(), "
                f"got {type(data).__name__}; datamodules.images.ImageData has them"
            )
        if getattr(data, "passes", 1) != self.num_passes:
            raise ValueError(f"data.passes must be {self.num_passes} for {type(self).__name__}, got {data.passes}")
        self.metrics = ClassifierMetrics(data.num_classes, (("val", "_noisy"), ("test", "")))
        shape = (self.num_passes, data.num_train, data.num_classes)
        if getattr(self, "targets", None) is None:
            self.targets = torch.zeros(shape)
            self._visited = torch.zeros(shape[:2], dtype=torch.bool)
        elif self.targets.shape != shape:
            raise ValueError(f"the targets have shape {tuple(self.targets.shape)}, the data need {shape}")

    def on_train_start(self) -> None:
        """Moves the state to where the batches are; on another number of ranks the first takes all the sums."""
        if self._stored_sums is not None:
            same = len(self._stored_sums) == self.trainer.world_size
            mine = self._stored_sums[self.global_rank] if same else self._stored_sums.sum(0) * (self.global_rank == 0)
            self._sums, self._stored_sums = mine.clone(), None
        self._sums = self._sums.to(self.device)
        self.targets = self.targets.to(self.device)
        self._visited = self._visited.to(self.device)

    def on_train_epoch_start(self) -> None:
        """Starts the sums of this epoch: loss, cross entropy, regulariser, examples."""
        self._sums = torch.zeros(4, device=self.device)

    def update_targets(self, which: int, index: Tensor, rows: Tensor) -> None:
        """Stores new rows (B, C) of pass `which`; each index at most once an epoch."""
        self.targets[which, index] = rows
        self._visited[which, index] = True

    def add_losses(self, loss: Tensor, cross_entropy: Tensor, regularizer: Tensor, count: int) -> None:
        """Adds a batch of `count` examples to the sums of the epoch; 0-d means, no gradient kept."""
        means = torch.stack([loss, cross_entropy, regularizer, torch.ones_like(loss)]).detach()
        self._sums.add_(means, alpha=count)

    def _join_targets(self) -> None:
        if self.trainer.world_size > 1:
            mine = torch.where(self._visited[..., None], self.targets, 0)
            torch.distributed.all_reduce(mine)
            visited = self._visited.int()
            torch.distributed.all_reduce(visited)
            self.targets = torch.where(visited[..., None] > 0, mine, self.targets)
        self._visited.zero_()

    def on_train_epoch_end(self) -> None:
        """Logs the losses, and what the (first net's) targets know of the true labels."""
        self._join_targets()
        sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        self.log_dict(dict(zip(("train/loss", "loss/ce", "loss/reg"), sums[:3] / sums[3], strict=True)), prog_bar=True)
        labels = self.trainer.datamodule.train_labels()  # type: ignore[attr-defined]
        detected = detection_metrics(self.targets[0].cpu(), labels["label"], labels["clean_label"])
        self.log_dict({name: value.float() for name, value in detected.items()})

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loader 0 is the noisy validation set, loader 1 the test set."""
        self.metrics.update(dataloader_idx, self(batch["image"]), batch["label"])

    def on_validation_epoch_end(self) -> None:
        """Logs accuracy and cross entropy of both."""
        self.metrics.log(self)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Clean test set."""
        self.metrics.update(1, self(batch["image"]), batch["label"])

    def on_test_epoch_end(self) -> None:
        """Logs test accuracy and cross entropy."""
        self.metrics.log(self)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Class probabilities (B, C) and the position of each image."""
        return {"index": batch["index"], "probability": self(batch["image"]).float().softmax(1)}

    def configure_optimizers(self) -> Any:
        """Optimizer over all trained parameters; the scheduler steps once an epoch."""
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        return optimizer if self.scheduler is None else ([optimizer], [self.scheduler(optimizer)])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The targets travel in the checkpoint, joined over the ranks, and each rank's sums of the epoch."""
        self._join_targets()
        checkpoint["targets"] = self.targets.cpu().clone()
        sums = [torch.empty_like(self._sums) for _ in range(self.trainer.world_size)]
        if len(sums) > 1:
            torch.distributed.all_gather(sums, self._sums)
        else:
            sums = [self._sums]
        checkpoint["epoch_sums"] = torch.stack(sums).cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the targets and the sums back."""
        self._stored_sums = checkpoint["epoch_sums"]
        targets = checkpoint["targets"]
        if getattr(self, "targets", None) is not None and self.targets.shape != targets.shape:
            raise ValueError(
                f"the checkpoint's targets have shape {tuple(targets.shape)}, the data need {tuple(self.targets.shape)}"
            )
        self.targets = targets.clone()
        self._visited = torch.zeros(targets.shape[:2], dtype=torch.bool)
