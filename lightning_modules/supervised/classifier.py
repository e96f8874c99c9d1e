"""A classifier with cross entropy or squared error, and the precision of its loss as a switch."""

from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from callbacks.rng import seed_for
from lightning_modules.networks.evaluation import ClassifierMetrics


def classification_loss(
    logits: Tensor, labels: Tensor, kind: Literal["ce", "mse"] = "ce", float64: bool = False
) -> Tensor:
    """Mean loss over the batch.

    Args:
        logits: (B, C) float.
        labels: (B,) int64.
        kind: `ce` cross entropy in nats; `mse` squared error to one-hot labels, mean over batch and classes.
        float64: cast the logits first. In float32 a softmax rounds to 1 where a margin exceeds 24 ln 2 = 16.6.

    Returns:
        Scalar, float64 or the wider of float32 and the logits' dtype.

    Source: arXiv 2402.15555, official code (both losses).
    """
    wide = logits.double() if float64 else logits.to(torch.promote_types(logits.dtype, torch.float32))
    if kind == "mse":
        return F.mse_loss(wide, F.one_hot(labels, logits.shape[1]).to(wide.dtype))
    if kind != "ce":
        raise ValueError(f"model.loss must be ce or mse, got {kind!r}")
    return F.cross_entropy(wide, labels)


class Classifier(L.LightningModule):
    """One net, one loss. Batches are dicts with `image` (or another field) and `label`.

    Logged: `train/loss` and `train/acc`, means over the steps of the epoch; `val/acc`, `val/loss` of the first
    validation loader and `test/acc`, `test/loss` of the second.

    Args:
        net: makes the classifier, inputs (B, ...) -> logits (B, C); built with the run's seed on every rank.
        optimizer, scheduler: callables of the recipe; the scheduler steps once an epoch.
        loss, float64_loss: see `classification_loss`.
        field: batch field of the inputs.
    """

    def __init__(
        self,
        net: Callable[[], nn.Module],
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        loss: Literal["ce", "mse"] = "ce",
        float64_loss: bool = False,
        field: str = "image",
    ) -> None:
        super().__init__()
        self.save_hyperparameters("loss", "float64_loss", "field")
        self.optimizer, self.scheduler = optimizer, scheduler
        self.loss: Literal["ce", "mse"] = loss
        self.float64_loss, self.field = float64_loss, field
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for("weights/net"))
            self.net = net()

    def setup(self, stage: str) -> None:
        """Sizes the metrics by the data."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "num_classes"):
            raise ValueError(f"Classifier needs a datamodule with num_classes, got {type(data).__name__}")
        self.metrics = ClassifierMetrics(data.num_classes, (("val", ""), ("test", "")))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, C)."""
        return self.net(inputs)

    def on_train_epoch_start(self) -> None:
        """Starts the sums of this epoch: loss, right predictions, examples."""
        self._sums = torch.zeros(3, device=self.device, dtype=torch.float64)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The loss of the batch."""
        labels = batch["label"]
        logits = self.net(self._inputs(batch))
        loss = classification_loss(logits, labels, self.loss, self.float64_loss)
        right = (logits.detach().argmax(1) == labels).sum()
        count = len(labels)
        self._sums += torch.stack([loss.detach() * count, right, torch.full_like(right, count)])
        return {"loss": loss, "logits": logits}

    def on_train_epoch_end(self) -> None:
        """Logs the epoch's means."""
        sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        self.log_dict({"train/loss": (sums[0] / sums[2]).float(), "train/acc": (sums[1] / sums[2]).float()})

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loader 0 validates, loader 1 is the test set."""
        self.metrics.update(dataloader_idx, self(self._inputs(batch)), batch["label"])

    def on_validation_epoch_end(self) -> None:
        """Logs accuracy and cross entropy of both."""
        self.metrics.log(self)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Test set."""
        self.metrics.update(1, self(self._inputs(batch)), batch["label"])

    def on_test_epoch_end(self) -> None:
        """Logs test accuracy and cross entropy."""
        self.metrics.log(self)

    def configure_optimizers(self) -> Any:
        """Optimizer over all parameters; the scheduler steps once an epoch."""
        optimizer = self.optimizer(self.parameters())
        return optimizer if self.scheduler is None else ([optimizer], [self.scheduler(optimizer)])

    def _inputs(self, batch: dict[str, Any]) -> Tensor:
        """In the precision of the net: data modules give float32 pictures also where it trains in float64."""
        values = batch[self.field]
        return values.to(next(self.parameters()).dtype) if values.is_floating_point() else values
