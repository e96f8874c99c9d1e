"""A small classifier and its data, for tests of observers."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from synthetic import SyntheticImages
from torch import Tensor, nn

from callbacks.rng import RngState
from datamodules.images import ImageData
from lightning_modules.supervised.classifier import Classifier

SMALL = SyntheticImages(num_classes=4, channels=1, size=6, per_class=20)
"""80 training and 40 test images of 6 x 6 pixels."""


def normed() -> nn.Module:
    """Batch norm and dropout: modes, buffers and the global generator would show an observer."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 4)
    )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def fit(root: Path, callbacks: list[Callback], epochs: int = 2, net: Any = normed, **options: Any) -> L.Trainer:
    """Trains on the CPU with crop and flip (ranks draw different ones) unless told otherwise, seed 5."""
    L.seed_everything(5)
    augment = {"crop": 6, "padding": 1, "flip": True} if options.pop("augment", True) else {}
    ckpt_path = options.pop("ckpt_path", None)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=root,
        callbacks=[*callbacks, RngState()],
        **{"num_sanity_val_steps": 0, "enable_checkpointing": False} | options,
    )
    data = ImageData(SMALL, batch_size=16, val_fraction=0.2, **augment)
    trainer.fit(Classifier(net, sgd), datamodule=data, ckpt_path=ckpt_path)
    return trainer


def weights(trainer: L.Trainer) -> dict[str, Tensor]:
    """Parameters and buffers of the net after training."""
    return {name: value.clone() for name, value in trainer.lightning_module.net.state_dict().items()}  # type: ignore[union-attr]
