"""What ELR sends between two processes for its targets, and what its checkpoint weighs.

Run as a script, this file is one of two ranks: `run_two(__file__, out)`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from synthetic import SyntheticImages
from two_processes import run_two

from callbacks.ema import Ema
from callbacks.rng import RngState
from datamodules.images import ImageData
from datamodules.labels import Symmetric
from lightning_modules.elr import ELR
from lightning_modules.networks.image import SmallResNet
from scripts import memory
from scripts.checkpoints import LastCheckpoint

EXAMPLES, CLASSES, BATCH, RANKS = 45_000, 10, 128, 2
"""CIFAR-10 without its validation part, the recipe's batch; 352 steps an epoch."""
OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "use_distributed_sampler": False,
}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class Sent(Callback):
    """Bytes and calls of collectives: those of the targets' join, and those of an all-gather in each step.

    The all-gather of (index, rows) is what the join saves; it is done here to be counted.
    """

    def __init__(self) -> None:
        self.found = {name: [0, 0] for name in ("join", "gather")}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        all_reduce, join = torch.distributed.all_reduce, pl_module._join_targets

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._count("join", tensor)
            return all_reduce(tensor, *args, **kwargs)

        def counting_join() -> None:
            torch.distributed.all_reduce = counted
            join()
            torch.distributed.all_reduce = all_reduce

        pl_module._join_targets = counting_join

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for mine in (batch["index"], pl_module.targets[0, batch["index"]]):
            torch.distributed.all_gather([torch.empty_like(mine) for _ in range(trainer.world_size)], mine)
            self._count("gather", mine)

    def _count(self, name: str, tensor: Tensor) -> None:
        self.found[name][0] += tensor.numel() * tensor.element_size()
        self.found[name][1] += 1


def rank(out: Path) -> None:
    """One epoch at the size of CIFAR-10 (pictures of 4 x 4 pixels); rank 0 writes what it counted."""
    torch.set_num_threads(1)
    L.seed_everything(0)
    sent = Sent()
    source = SyntheticImages(num_classes=CLASSES, channels=1, size=4, per_class=EXAMPLES // (9 * CLASSES) * 10)
    data = ImageData(source, BATCH, val_fraction=0.1, noise=Symmetric(0.4))
    module = ELR(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES)), sgd)
    trainer = L.Trainer(devices=RANKS, strategy="ddp", callbacks=[RngState(), sent], **OPTIONS)
    trainer.fit(module, datamodule=data)
    if trainer.is_global_zero:
        steps = int(trainer.num_training_batches)
        out.write_text(json.dumps({**sent.found, "examples": data.num_train, "steps": steps}))


def test_bytes_of_the_join_and_of_a_gather_in_each_step(tmp_path: Path) -> None:
    run_two(__file__, tmp_path / "out", seconds=300)
    found = json.loads((tmp_path / "out").read_text())
    assert found["examples"] == EXAMPLES
    for name, words in (("join", "joined once an epoch"), ("gather", "gathered in each step")):
        size, calls = found[name]
        print(f"\nELR's targets, {words}: {size:,} bytes an epoch from each rank, {calls} collectives", end="")
    print(f" ({found['steps']} steps)")
    # float32 rows, int32 marks of visited rows
    assert found["join"] == [EXAMPLES * CLASSES * 4 + EXAMPLES * 4, 2]
    # int64 index, float32 rows
    assert found["gather"] == [EXAMPLES // RANKS * (8 + CLASSES * 4), 2 * found["steps"]]


class Plain(L.LightningModule):
    """Cross entropy and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallResNet()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch["image"]), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd([p for p in self.parameters() if p.requires_grad])


@pytest.mark.parametrize("name", ["plain", "EMA", "ELR"])
def test_size_of_a_checkpoint(name: str, tmp_path: Path) -> None:
    L.seed_everything(0)
    source = SyntheticImages(num_classes=CLASSES, channels=1, size=28, per_class=600)
    data = ImageData(source, BATCH, val_fraction=1 / 6, noise=Symmetric(0.4))
    module: Any = ELR(SmallResNet, sgd) if name == "ELR" else Plain()
    callbacks = [RngState(), *([Ema(0.9)] if name == "EMA" else []), LastCheckpoint(tmp_path)]
    options = {**OPTIONS, "limit_train_batches": 1, "enable_checkpointing": True}
    L.Trainer(callbacks=callbacks, **options).fit(module, datamodule=data)
    size = os.path.getsize(tmp_path / "last.ckpt")
    parameters = memory.tensor_bytes(p for p in module.parameters() if p.requires_grad)
    print(f"\n{name}: checkpoint {size:,} bytes, parameters {parameters:,} bytes, ratio {size / parameters:.2f}")
    # weights and momentum; averages; targets of 5,000 examples
    tensors = 2 * parameters + {"plain": 0, "EMA": parameters, "ELR": 5000 * CLASSES * 4}[name]
    assert tensors < size < tensors + 100_000


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
