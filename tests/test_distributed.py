"""One process with B and two with B/2 give the same; what belongs to a rank differs between ranks.

Run as a script, this file is one of two ranks: `run_two(__file__, scenario, folder)`.
"""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from synthetic import SyntheticImages
from torch import Tensor, nn
from two_processes import run_two

from callbacks.memorization import Memorization
from callbacks.nonfinite import NonFiniteLossError, StopOnNonFiniteLoss
from callbacks.rng import RngState
from datamodules.images import ImageData
from datamodules.labels import Symmetric
from lightning_modules.elr import ELR, ELRPlus

pytestmark = pytest.mark.distributed
EPOCHS = 3
DATA = SyntheticImages(num_classes=4, channels=1, size=4, per_class=30)


def linear() -> nn.Module:
    # without batch norm, whose statistics are those of a rank's own batch
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class Steps(Callback):
    """Loss (mean over the global batch) and gradient of every step."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in pl_module.parameters()]))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean"))


class Bytes(Callback):
    """Bytes that this rank hands to all-reduce outside of DDP's own gradient exchange."""

    def __init__(self) -> None:
        self.bytes = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        original = torch.distributed.all_reduce

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.bytes += tensor.numel() * tensor.element_size()
            return original(tensor, *args, **kwargs)

        torch.distributed.all_reduce = counted


def train(
    out: Path,
    devices: int,
    lam: float = 3.0,
    epochs: int = EPOCHS,
    ckpt: Path | None = None,
    callbacks: tuple[Callback, ...] = (),
) -> tuple[L.Trainer, ELR]:
    """Trains ELR (lam 0: cross entropy), global batch 12; rank 0 writes all that must agree."""
    L.seed_everything(3)
    module, steps = ELR(linear, sgd, lam=lam, beta=0.7), Steps()
    data = ImageData(DATA, batch_size=12, val_fraction=0.2, noise=Symmetric(0.4))
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[RngState(), Memorization(), steps, *callbacks],
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    trainer.save_checkpoint(out.with_suffix(".ckpt"))
    if trainer.is_global_zero:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        found = {"weights": module.net.state_dict(), "targets": module.targets, "metrics": metrics}
        torch.save(found | {"losses": torch.stack(steps.losses), "gradients": torch.stack(steps.gradients)}, out)
    return trainer, module


class Draws(Callback):
    """What every rank has and draws, gathered on rank 0."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        first = next(iter(trainer.train_dataloader))
        weight, permutation = pl_module._draw_mixup(6)  # type: ignore[operator]
        mine = {
            "labels": data.train_labels()["label"],
            "weights": torch.cat([p.detach().flatten() for p in pl_module.parameters()]),
            "index": first["index"],
            "mixup": torch.tensor([weight, *permutation.tolist()]),
            "augment": torch.rand(3, generator=data.augment_generator),
        }
        self.of_ranks: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(self.of_ranks, mine)


class BadLoss(Callback):
    """The loss of rank 1 becomes NaN in the second step."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == 1 and batch_idx == 1:
            outputs["loss"] = outputs["loss"] * float("nan")


def draws(out: Path) -> None:
    L.seed_everything(3)
    module, seen = ELRPlus(linear, sgd), Draws()
    data = ImageData(DATA, batch_size=12, val_fraction=0.2, noise=Symmetric(0.4), passes=2, crop=4, padding=1)
    strategy = "ddp_find_unused_parameters_true"
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    trainer = L.Trainer(
        max_epochs=1,
        limit_train_batches=1,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        callbacks=[seen],
        **options,
    )
    trainer.fit(module, datamodule=data)
    if trainer.is_global_zero:
        torch.save(seen.of_ranks, out)


def scenario(name: str, folder: Path) -> None:
    """What one of two ranks does."""
    if name == "train":
        for lam in (0.0, 3.0):
            counted = Bytes()
            train(folder / f"two-{lam}.pt", 2, lam, callbacks=(counted,))
        train(folder / "first-of-two.pt", 2, epochs=1)
        train(folder / "two-resumed-on-two.pt", 2, ckpt=folder / "first-of-two.ckpt")
        train(folder / "one-resumed-on-two.pt", 2, ckpt=folder / "first-of-one.ckpt")
    elif name == "draws":
        draws(folder / "draws.pt")
    else:
        with pytest.raises(NonFiniteLossError):
            train(folder / "nan.pt", 2, callbacks=(BadLoss(), StopOnNonFiniteLoss(every_n_steps=1)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What runs of one and of two processes wrote, by name."""
    folder = tmp_path_factory.mktemp("runs")
    for lam in (0.0, 3.0):
        train(folder / f"one-{lam}.pt", 1, lam)
    train(folder / "first-of-one.pt", 1, epochs=1)
    run_two(__file__, "train", folder)
    train(folder / "two-resumed-on-one.pt", 1, ckpt=folder / "first-of-two.ckpt")
    return {file.stem: torch.load(file) for file in folder.glob("*.pt")}


@pytest.mark.parametrize("lam", [0.0, 3.0], ids=["cross entropy", "ELR"])
@pytest.mark.parametrize("quantity", ["losses", "gradients", "weights", "targets"])
def test_two_processes_equal_one(runs: dict[str, dict[str, Any]], lam: float, quantity: str) -> None:
    one, two = runs[f"one-{lam}"][quantity], runs[f"two-{lam}"][quantity]
    # float32 sums in another order; measured: differences up to 3e-7
    torch.testing.assert_close(two, one, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("lam", [0.0, 3.0], ids=["cross entropy", "ELR"])
def test_metrics_of_two_processes_equal_those_of_one(runs: dict[str, dict[str, Any]], lam: float) -> None:
    one, two = runs[f"one-{lam}"]["metrics"], runs[f"two-{lam}"]["metrics"]
    counts = {name for name in one if "loss" not in name}  # ratios of integers
    assert {"val/acc_noisy", "test/acc", "wrong/memorized", "detect/precision", "target/acc"} <= counts
    assert {name: two[name] for name in counts} == {name: one[name] for name in counts}
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("name", ["two-resumed-on-one", "one-resumed-on-two", "two-resumed-on-two"])
@pytest.mark.parametrize("quantity", ["weights", "targets"])
def test_checkpoint_continues_on_any_number_of_processes(
    runs: dict[str, dict[str, Any]], name: str, quantity: str
) -> None:
    torch.testing.assert_close(runs[name][quantity], runs["one-3.0"][quantity], rtol=1e-5, atol=2e-6)


def test_resume_on_the_same_number_of_processes_is_bit_equal(runs: dict[str, dict[str, Any]]) -> None:
    resumed, whole = runs["two-resumed-on-two"], runs["two-3.0"]
    assert torch.equal(resumed["targets"], whole["targets"])
    assert all(torch.equal(resumed["weights"][name], value) for name, value in whole["weights"].items())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What each rank has and draws at the start."""
    folder = tmp_path_factory.mktemp("draws")
    run_two(__file__, "draws", folder)
    first, second = torch.load(folder / "draws.pt")
    return first, second


@pytest.mark.parametrize("name", ["labels", "weights"])
def test_noise_of_the_data_and_initial_weights_agree(ranks: tuple[dict[str, Tensor], ...], name: str) -> None:
    assert torch.equal(ranks[0][name], ranks[1][name])


@pytest.mark.parametrize("name", ["mixup", "augment"])
def test_noise_of_the_step_differs(ranks: tuple[dict[str, Tensor], ...], name: str) -> None:
    assert not torch.equal(ranks[0][name], ranks[1][name])


def test_ranks_have_other_examples(ranks: tuple[dict[str, Tensor], ...]) -> None:
    assert not set(ranks[0]["index"].tolist()) & set(ranks[1]["index"].tolist())


def test_nan_on_one_rank_stops_all(tmp_path: Path) -> None:
    run_two(__file__, "nan", tmp_path)


if __name__ == "__main__":
    scenario(sys.argv[1], Path(sys.argv[2]))
