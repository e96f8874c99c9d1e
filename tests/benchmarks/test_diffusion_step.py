"""Training of the M8 denoiser: Trainer against a loop by hand with the same net, data, loss and optimizer."""

import statistics
import time

import lightning as L
import pytest
import torch

from callbacks.nonfinite import StopOnNonFiniteLoss
from callbacks.rng import RngState
from datamodules.images import ImageData
from datamodules.sources import EmbeddedSample
from lightning_modules.diffusion.evaluation import PadAndPool
from lightning_modules.diffusion.module import DiffusionModule
from lightning_modules.diffusion.processes import LinearFlow
from lightning_modules.networks.mlp_denoiser import TinyResMLP

EPOCHS = 5


class Clock(L.Callback):
    """Seconds of each epoch."""

    def __init__(self) -> None:
        self.spent: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.spent.append(time.perf_counter() - self.start)


def adam(parameters):  # type: ignore[no-untyped-def]
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)


def by_hand(images: torch.Tensor, epochs: int) -> list[float]:
    """The least that flow matching needs, with an average of the weights."""
    net, average = TinyResMLP(), TinyResMLP()
    optimizer, encode, spent = adam(net.parameters()), PadAndPool(padding=2, pool=4), []
    for _ in range(epochs):
        start = time.perf_counter()
        for rows in torch.randperm(len(images)).split(128):
            data = encode((images[rows].float() / 255 - 0.5) / 0.5)
            noise, u = torch.randn_like(data), torch.rand(len(data))
            mixed = (1 - u)[:, None, None, None] * data + u[:, None, None, None] * noise
            loss = (net(mixed, 1000 * u) - (data - noise)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_([*average.parameters()], [*net.parameters()], 0.005)
        spent.append(time.perf_counter() - start)
    return spent


def by_trainer(data: ImageData) -> list[float]:
    """The same by Lightning, with all that a run's module and callbacks do at each step."""
    clock = Clock()
    model = DiffusionModule(
        TinyResMLP, LinearFlow(), adam, parameterization="flow", encoder=PadAndPool(padding=2, pool=4), ema_decay=0.995
    )
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        enable_model_summary=False,
        callbacks=[RngState(), StopOnNonFiniteLoss(), clock],
        **options,  # type: ignore[arg-type]
    )
    trainer.fit(model, datamodule=data)
    assert len(clock.spent) == EPOCHS
    return clock.spent


def test_trainer_against_loop(capsys: pytest.CaptureFixture[str]) -> None:
    """Both in turn, five times; the first epoch of each does not count."""
    torch.set_num_threads(1)
    L.seed_everything(0)
    data = ImageData(EmbeddedSample(), val_fraction=0.02, mean=[0.5], std=[0.5])
    ratios, rates = [], []
    for _ in range(5):
        spent = statistics.median(by_trainer(data)[1:])
        images = data.examples("train")[torch.arange(data.num_train)]["image"]
        ratios.append(spent / statistics.median(by_hand(images, EPOCHS)[1:]))
        rates.append(data.num_train / spent)
    with capsys.disabled():
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(f"\nTrainer {statistics.median(rates):,.0f} images/s; Trainer / loop by hand {middle:.3f}", end=" ")
        print(f"({low:.3f} to {high:.3f})")
