"""Evaluation that classification papers share."""

import lightning as L
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy


class ClassifierMetrics(nn.Module):
    """Accuracy and cross entropy (nats) per evaluation set, as counts over all ranks.

    Args:
        num_classes: C.
        sets: prefix and suffix of each set's keys, in the order of the validation loaders: `("val", "_noisy")` logs
            `val/acc_noisy` and `val/loss_noisy`.
    """

    def __init__(self, num_classes: int, sets: tuple[tuple[str, str], ...]) -> None:
        super().__init__()
        self.names = [(f"{prefix}/acc{suffix}", f"{prefix}/loss{suffix}") for prefix, suffix in sets]
        accuracy = [MulticlassAccuracy(num_classes, average="micro", validate_args=False) for _ in sets]
        self.pairs = [(acc, MeanMetric()) for acc in accuracy]
        self.metrics = nn.ModuleList(metric for pair in self.pairs for metric in pair)
        self._used: set[int] = set()

    def update(self, which: int, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch (B, C), (B,) of set `which`."""
        self._used.add(which)
        accuracy, loss = self.pairs[which]
        accuracy.update(logits, labels)
        loss.update(F.cross_entropy(logits.float(), labels), weight=len(labels))

    def log(self, module: L.LightningModule) -> None:
        """Logs what was added since the last call and starts anew."""
        for which in sorted(self._used):
            for name, metric in zip(self.names[which], self.pairs[which], strict=True):
                module.log(name, metric.compute(), prog_bar=name == "test/acc")
                metric.reset()
        self._used.clear()
