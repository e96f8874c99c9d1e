"""Averages of the weights: formula, when they move, what they leave alone, evaluation, resume."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from callbacks.ema import Ema, EmaWeights, warm_decay


class Toy(L.LightningModule):
    """A trained and a frozen layer and a batch norm; logs the loss of each evaluation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.trained = nn.Linear(3, 2)
        self.evaluated: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.trained(self.norm(self.frozen(x)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluated.append(self.trained.weight.detach().clone())

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


class Track(Callback):
    """Remembers the trained weight before training and after each batch."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.weights = [pl_module.trained.weight.detach().clone()]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.weights.append(pl_module.trained.weight.detach().clone())


def data() -> torch.utils.data.DataLoader:
    pictures = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pictures), batch_size=2)


def fit(epochs: int, ema: Ema, ckpt: Path | None = None, save: Path | None = None, **options: Any) -> tuple[Toy, Track]:
    module, seen = Toy(), Track()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ema, seen],
        **options,
    )
    trainer.fit(module, data(), data() if options.get("limit_val_batches") else None, ckpt_path=ckpt)
    if save is not None:
        trainer.save_checkpoint(save)
    return module, seen


def average(module: Any) -> Tensor:
    return module.ema_weights.get_parameter("trained/weight")


@pytest.mark.parametrize(("updates", "decay"), [(0, 0.1), (1, 2 / 11), (90, 0.91), (10**9, 0.9999)])
def test_warm_up_is_the_formula(updates: int, decay: float) -> None:
    assert warm_decay(updates, 0.9999) == pytest.approx(decay)


def test_first_copy_is_exact() -> None:
    module = Toy()
    for name, value in EmaWeights(module).named_parameters():
        assert torch.equal(value, module.get_parameter(name.replace("/", ".")))


@pytest.mark.parametrize("warm_up", [True, False])
def test_average_of_an_epoch_is_the_recursion_over_its_weights(warm_up: bool) -> None:
    module, seen = fit(1, Ema(0.7, warm_up))
    expected = seen.weights[0].double()
    for number, weight in enumerate(seen.weights[1:]):
        decay = min(0.7, (1 + number) / (10 + number)) if warm_up else 0.7
        expected = decay * expected + (1 - decay) * weight.double()
    torch.testing.assert_close(average(module).double(), expected, rtol=1e-6, atol=1e-7)


def test_micro_batches_do_not_move_the_average() -> None:
    ema = Ema(0.7)
    module, seen = fit(1, ema, accumulate_grad_batches=4)
    assert ema.updates == 1
    expected = 0.1 * seen.weights[0] + 0.9 * seen.weights[-1]
    torch.testing.assert_close(average(module).detach(), expected)


def test_frozen_parameters_and_buffers_are_the_modules_own() -> None:
    module, _ = fit(1, Ema())
    names = {name for name, _ in module.ema_weights.named_parameters()}
    assert names == {"norm/weight", "norm/bias", "trained/weight", "trained/bias"}
    assert not list(module.ema_weights.buffers())
    assert all(not p.requires_grad for p in module.ema_weights.parameters())


def test_validation_sees_the_average_and_training_goes_on_with_the_weights() -> None:
    plain, without = fit(2, Ema(0.7))
    module, seen = fit(2, Ema(0.7), limit_val_batches=1, num_sanity_val_steps=0)
    for ours, expected in zip(seen.weights, without.weights, strict=True):
        assert torch.equal(ours, expected)
    assert torch.equal(module.evaluated[-1], average(module))
    assert not torch.equal(module.evaluated[-1], module.trained.weight)
    assert torch.equal(average(module), average(plain))


def test_test_sees_the_average_of_a_checkpoint(tmp_path: Path) -> None:
    trained, _ = fit(1, Ema(0.7), save=tmp_path / "a.ckpt")
    module = Toy()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[Ema(0.7)])
    trainer.test(module, data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert torch.equal(module.evaluated[0], average(trained))
    assert torch.equal(module.trained.weight, trained.trained.weight)


def test_exception_in_validation_gives_the_weights_back() -> None:
    class Broken(Toy):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            raise RuntimeError("broken")

    module, ema = Broken(), Ema(0.7)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        callbacks=[ema],
    )
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(module, data(), data())
    trained, _ = fit(1, Ema(0.7))
    assert torch.equal(module.trained.weight, trained.trained.weight)


def test_resume_equals_an_undisturbed_run_bit_for_bit(tmp_path: Path) -> None:
    whole, _ = fit(3, Ema(0.7))
    fit(1, Ema(0.7), save=tmp_path / "a.ckpt")
    ema = Ema(0.7)
    resumed, _ = fit(3, ema, ckpt=tmp_path / "a.ckpt")
    assert ema.updates == 12
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_averages_of_bf16_weights_are_float32() -> None:
    weights = EmaWeights(nn.Linear(2, 2).to(torch.bfloat16))
    assert {p.dtype for p in weights.parameters()} == {torch.float32}


def test_decay_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Ema.decay must be in \[0, 1\), got 1.0"):
        Ema(1.0)
