"""Cost of a training step of the mini net: Trainer against a plain loop, ELR against cross entropy, data against step.

Each pair is timed in alternating epochs of one process with one thread, and reported as the ratio of medians.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import nn

from callbacks.memorization import Memorization
from callbacks.nonfinite import StopOnNonFiniteLoss
from callbacks.rng import RngState
from callbacks.run_record import RunRecord
from datamodules.images import ImageData
from datamodules.labels import Symmetric
from datamodules.sources import EmbeddedSample
from lightning_modules.elr import ELR
from lightning_modules.networks.image import SmallResNet

EPOCHS = 12


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=1e-3)


def mini_data() -> ImageData:
    return ImageData(EmbeddedSample(), val_fraction=1 / 6, noise=Symmetric(0.4))


class PlainCE(L.LightningModule):
    """The least that a LightningModule does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallResNet()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
        logits = self.net(batch["image"])
        return {"loss": F.cross_entropy(logits, batch["label"]), "logits": logits}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.parameters())


class PlainLoop:
    """A loop by hand with the same net, loader and optimizer."""

    def __init__(self) -> None:
        self.data = mini_data()
        self.data.setup()
        self.data.trainer = SimpleNamespace(
            training=True, global_rank=0, world_size=1, strategy=SimpleNamespace(root_device=torch.device("cpu"))
        )
        self.loader = self.data.train_dataloader()
        self.net = SmallResNet()
        self.optimizer = sgd(self.net.parameters())

    def load_epoch(self) -> int:
        return sum(len(self.data.on_after_batch_transfer(batch, 0)["image"]) for batch in self.loader)

    def epoch(self, loss_of: Callable[[dict[str, Any]], torch.Tensor] | None = None) -> None:
        for batch in self.loader:
            batch = self.data.on_after_batch_transfer(batch, 0)
            loss = F.cross_entropy(self.net(batch["image"]), batch["label"]) if loss_of is None else loss_of(batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


class Alternate(Callback):
    """Runs an epoch of the plain loop before each epoch of the Trainer, and times both."""

    def __init__(self, loop: PlainLoop) -> None:
        self.loop = loop
        self.ours: list[float] = []
        self.plain: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.plain.append(seconds(self.loop.epoch))
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ours.append(time.perf_counter() - self.started)


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def report(benchmark: Any, name: str, ours: list[float], plain: list[float], goal: str) -> None:
    """The first epoch of each is a warm-up; the ratio is that of the medians."""
    ratio = statistics.median(ours[1:]) / statistics.median(plain[1:])
    steps = 40
    benchmark.extra_info.update(ratio=ratio, goal=goal)
    print(
        f"\n{name}: {1000 * statistics.median(ours[1:]) / steps:.2f} ms against "
        f"{1000 * statistics.median(plain[1:]) / steps:.2f} ms a step, ratio {ratio:.3f} (goal {goal})"
    )


@pytest.mark.parametrize("kind", ["cross entropy", "ELR with all callbacks of a run"])
def test_trainer_against_plain_loop(kind: str, benchmark: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    alternate = Alternate(PlainLoop())
    callbacks: list[Callback] = [alternate]
    module: L.LightningModule = PlainCE()
    if kind != "cross entropy":
        module = ELR(SmallResNet, sgd)
        callbacks += [Memorization(), RngState(), StopOnNonFiniteLoss(), RunRecord(tmp_path, {"config": {}})]
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=tmp_path,
        use_distributed_sampler=False,
        callbacks=callbacks,
    )
    benchmark.pedantic(lambda: trainer.fit(module, datamodule=mini_data()), rounds=1)
    report(benchmark, f"Trainer, {kind}", alternate.ours, alternate.plain, "<= 1.10")


def test_elr_against_cross_entropy(benchmark: Any) -> None:
    """Both by hand, so that the Trainer's own cost does not hide the method's."""
    torch.set_num_threads(1)
    plain, loop = PlainLoop(), PlainLoop()
    module: Any = ELR(lambda: loop.net, sgd)
    module.trainer = SimpleNamespace(datamodule=loop.data)
    module.setup("fit")
    module.on_train_epoch_start()
    nn.Module.train(module)
    ours, theirs = [], []

    def both() -> None:
        theirs.append(seconds(plain.epoch))
        ours.append(seconds(lambda: loop.epoch(lambda batch: module.training_step(batch, 0)["loss"])))

    benchmark.pedantic(both, rounds=EPOCHS)
    report(benchmark, "ELR, cross entropy", ours, theirs, "<= 1.03")


def test_data_path_against_step(benchmark: Any) -> None:
    torch.set_num_threads(1)
    loop = PlainLoop()
    steps, loads = [], []

    def both() -> None:
        steps.append(seconds(loop.epoch))
        loads.append(seconds(loop.load_epoch))

    benchmark.pedantic(both, rounds=EPOCHS)
    report(benchmark, "step with its data, data alone", steps, loads, ">= 5")
