"""Image data modules set up for one of several processes, and their epochs."""

from types import SimpleNamespace
from typing import Any

import torch
from synthetic import SyntheticImages
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.images import ImageData
from datamodules.sources import ImageSource

SMALL = SyntheticImages(num_classes=4, channels=3, size=8, per_class=20)
"""80 training and 40 test images."""


def ready(source: ImageSource = SMALL, rank: int = 0, replicas: int = 1, training: bool = True, **options: Any) -> Any:
    """Data module that is set up for one of several processes, in training or in evaluation."""
    data = ImageData(source, **{"batch_size": 16, **options})
    trainer: Any = SimpleNamespace(
        training=training,
        testing=False,
        global_rank=rank,
        world_size=replicas,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    data.trainer = trainer
    data.setup()
    return data


def epoch(data: ImageData, loader: DataLoader, number: int = 0) -> list[dict[str, Any]]:
    """Batches of an epoch as the module sees them."""
    order: Any = loader.sampler
    order.set_epoch(number)
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def field(batches: list[dict[str, Any]], name: str) -> Tensor:
    return torch.cat([batch[name] for batch in batches])
