"""ELR and ELR+: reference, property, gradient, parallel, resume. Recipes are run by test_recipes.py."""

import copy
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from synthetic import SyntheticImages
from torch import Tensor, nn
from two_processes import run_two

from callbacks.memorization import Memorization
from callbacks.rng import RngState
from datamodules.images import ImageData
from datamodules.labels import Symmetric
from lightning_modules import elr
from lightning_modules.noisy_labels.targets import detection_metrics

GOLDEN = np.load(Path(__file__).parent / "golden" / "elr.npz")
"""Outputs of the official functions (shengliu66/ELR) on fixed inputs, float64."""


def golden(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    value = torch.from_numpy(GOLDEN[name])
    return value.to(dtype) if value.is_floating_point() else value


# 1. reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", ["a", "b"])
def test_four_steps_equal_the_official_loss_gradient_and_targets(
    case: str, dtype: torch.dtype, tolerance: float
) -> None:
    lam, beta = float(GOLDEN[f"elr_{case}_lambda"]), float(GOLDEN[f"elr_{case}_beta"])
    targets = torch.zeros(40, 10, dtype=dtype)
    for step in range(4):
        logits = golden(f"elr_{case}_logits", dtype)[step].clone().requires_grad_()
        index, labels = golden(f"elr_{case}_index")[step], golden(f"elr_{case}_labels")[step]
        targets[index] = elr.elr_targets(targets[index], logits, beta)
        loss = elr.elr_loss(logits, labels, targets[index], lam)
        loss.backward()
        for ours, name in ((targets, "target"), (loss, "loss"), (logits.grad, "grad")):
            expected = golden(f"elr_{case}_{name}", dtype)[step]
            torch.testing.assert_close(ours.detach(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("case", "classes"), [("c10", 10), ("c100", 100)])
def test_four_steps_of_elr_plus_equal_the_official_code(
    case: str, classes: int, dtype: torch.dtype, tolerance: float
) -> None:
    lam, beta = float(GOLDEN[f"plus_{case}_lambda"]), float(GOLDEN[f"plus_{case}_beta"])
    targets = torch.zeros(40, classes, dtype=dtype)
    for step in range(4):
        index, permutation = golden(f"plus_{case}_index")[step], golden(f"plus_{case}_mix_index")[step]
        targets[index] = elr.elr_plus_targets(targets[index], golden(f"plus_{case}_ema_logits", dtype)[step], beta)
        mixed = elr.mixup(targets[index], float(GOLDEN[f"plus_{case}_mix_l"][step]), permutation)
        ramp = elr.sigmoid_ramp(int(GOLDEN[f"plus_{case}_iter"][step]), int(GOLDEN[f"plus_{case}_coef_step"]))
        logits = golden(f"plus_{case}_logits", dtype)[step].clone().requires_grad_()
        labels = golden(f"plus_{case}_y", dtype)[step]
        loss = elr.elr_plus_loss(logits, labels, mixed, lam * ramp, label_reweight=classes == 100)
        loss.backward()
        history = targets if classes == 10 else targets[index]
        for ours, name in ((mixed, "q"), (loss, "loss"), (logits.grad, "grad"), (history, "hist")):
            expected = golden(f"plus_{case}_{name}", dtype)[step]
            torch.testing.assert_close(ours.detach(), expected, rtol=tolerance, atol=tolerance)


def test_ramp_equals_the_official_values() -> None:
    ours = [elr.sigmoid_ramp(int(step), int(GOLDEN["ramp_len"])) for step in GOLDEN["ramp_current"]]
    np.testing.assert_allclose(ours, GOLDEN["ramp_value"], rtol=1e-12)
    assert elr.sigmoid_ramp(7, 0) == GOLDEN["ramp_zero_len"]


@pytest.mark.parametrize(("case", "ramp_steps"), [("ramp", 40000), ("warm", None)])
def test_weight_average_equals_the_official_values(case: str, ramp_steps: int | None) -> None:
    average = golden(f"ema_{case}_init")
    for step, weight, expected in zip(
        GOLDEN[f"ema_{case}_step"], golden(f"ema_{case}_w"), golden(f"ema_{case}_out"), strict=True
    ):
        decay = elr.ema_decay(int(step), float(GOLDEN[f"ema_{case}_alpha"]), ramp_steps)
        average = torch.lerp(average, weight, 1 - decay)
        torch.testing.assert_close(average, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("values", "expected"), [("mix_x", "mix_xo"), ("mix_y", "mix_yo")])
def test_mixup_equals_the_official_values(values: str, expected: str) -> None:
    ours = elr.mixup(golden(values), float(GOLDEN["mix_l"]), golden("mix_perm"))
    torch.testing.assert_close(ours, golden(expected), rtol=1e-12, atol=1e-12)


# 2. property


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    targets = torch.rand(6, 4, generator=generator, dtype=torch.float64).softmax(1)
    return logits, torch.tensor([0, 1, 2, 3, 0, 1]), targets


def test_lam_zero_is_cross_entropy(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, targets = batch
    torch.testing.assert_close(
        elr.elr_loss(logits, labels, targets, lam=0.0), nn.functional.cross_entropy(logits, labels), rtol=0, atol=0
    )


def test_permuting_the_batch_keeps_the_loss(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, targets = batch
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(
        elr.elr_loss(logits[order], labels[order], targets[order], 3.0), elr.elr_loss(logits, labels, targets, 3.0)
    )


def test_rows_of_the_targets_sum_to_one_minus_beta_to_the_visits(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    rows = torch.zeros(6, 4, dtype=torch.float64)
    for _ in range(3):
        rows = elr.elr_targets(rows, batch[0], beta=0.7)
    torch.testing.assert_close(rows.sum(1), torch.full((6,), 1 - 0.7**3, dtype=torch.float64))


def test_lowest_regulariser_is_the_papers() -> None:
    """Confident and converged: log(9.99e-4) = -6.91 for 10 classes, -4.62 for 100 (spec of the official code)."""
    for classes, lowest in ((10, -6.91), (100, -4.62)):
        logits = 50 * torch.eye(classes, dtype=torch.float64)
        targets = elr.elr_targets(torch.zeros_like(logits), logits, beta=0.0)
        assert float(elr.elr_regularizer(logits, targets)) == pytest.approx(lowest, abs=5e-3)


def test_bf16_logits_give_a_finite_regulariser() -> None:
    logits = 50 * torch.eye(10, dtype=torch.bfloat16)
    targets = elr.elr_targets(torch.zeros(10, 10), logits, beta=0.0)
    assert float(elr.elr_regularizer(logits, targets)) == pytest.approx(-6.91, abs=5e-3)


def test_reweighting_keeps_a_zero_row_where_the_targets_vanish_on_both_labels() -> None:
    labels = torch.tensor([[0.5, 0.5, 0.0], [0.7, 0.3, 0.0]])
    targets = torch.tensor([[0.0, 0.0, 0.9], [0.2, 0.6, 0.1]])
    expected = torch.tensor([[0.0, 0.0, 0.0], [0.14 / 0.32, 0.18 / 0.32, 0.0]])
    torch.testing.assert_close(elr.reweighted_labels(labels, targets), expected)


def test_targets_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape of logits \(2, 3\), got \(2, 4\)"):
        elr.elr_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4), 3.0)


def test_detection_counts_only_visited_rows() -> None:
    targets = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.0, 0.0], [0.3, 0.7]])
    label, clean = torch.tensor([0, 0, 1, 1, 0]), torch.tensor([0, 1, 1, 0, 0])
    found = {name: float(value) for name, value in detection_metrics(targets, label, clean).items()}
    # visited: 0 (right, not flagged), 1 (wrong, flagged), 2 (right, flagged), 4 (right, flagged)
    assert found == {"target/acc": 0.5, "detect/precision": pytest.approx(1 / 3), "detect/recall": 1.0}


def test_theory_setting_separates_elr_from_cross_entropy() -> None:
    """Two Gaussians, 40 % flipped labels, linear softmax, full batch: predicate of the paper's theory setting."""
    final = {lam: _two_gaussians(lam) for lam in (0.0, 3.0)}
    assert final[3.0]["test"] >= 0.97
    assert final[3.0]["memorized"] <= 0.05
    assert final[0.0]["test"] <= 0.75
    assert final[0.0]["memorized"] >= 0.8


def _two_gaussians(lam: float) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    n, dim, sigma = 125, 100, 0.1

    def sample(count: int) -> tuple[Tensor, Tensor]:
        label = torch.arange(count) % 2
        noise = sigma * torch.randn(count, dim, generator=generator, dtype=torch.float64)
        noise[:, 0] += 2 * label - 1
        return noise, label

    (x, clean), (x_test, y_test) = sample(n), sample(2000)
    noisy = clean.clone()
    flipped = torch.randperm(n, generator=generator)[: int(0.4 * n)]
    noisy[flipped] = 1 - noisy[flipped]
    weight = (0.01 * torch.randn(dim, 2, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.zeros(n, 2, dtype=torch.float64)
    for _ in range(2000):
        logits = x @ weight
        targets = elr.elr_targets(targets, logits, beta=0.9)
        (gradient,) = torch.autograd.grad(elr.elr_loss(logits, noisy, targets, lam), weight)
        weight.data -= 0.5 * gradient
    predicted = (x @ weight).argmax(1)
    return {
        "memorized": float((predicted == noisy)[flipped].double().mean()),
        "test": float(((x_test @ weight).argmax(1) == y_test).double().mean()),
    }


# 3. gradient


def test_gradient_of_the_regulariser_is_the_closed_form(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """g_c = p_c / (1 - <p, t>) * sum_k (t_k - t_c) p_k inside the clamp, by hand from the definition."""
    logits, _, targets = batch
    logits.requires_grad_()
    (ours,) = torch.autograd.grad(elr.elr_regularizer(logits, targets), logits)
    p = logits.detach().softmax(1)
    inner = (p * targets).sum(1, keepdim=True)
    closed = p / (1 - inner) * (inner - targets) / len(p)
    torch.testing.assert_close(ours, closed, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", [elr.elr_regularizer, elr.kl_regularizer])
def test_gradcheck(loss, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, targets = batch
    assert torch.autograd.gradcheck(lambda z: loss(z, targets), logits.requires_grad_())


def test_no_gradient_flows_into_the_targets(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, targets = batch
    targets.requires_grad_()
    loss = elr.elr_loss(logits.requires_grad_(), labels, elr.elr_targets(targets, logits, 0.7), 3.0)
    assert torch.autograd.grad(loss, targets, allow_unused=True) == (None,)


# 4. parallel


SMALL = SyntheticImages(num_classes=4, channels=1, size=4, per_class=30)


def linear() -> nn.Module:
    # without batch norm, whose statistics are those of a rank's own batch
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def normed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def step_lr(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)


def fit(
    module: L.LightningModule,
    data: ImageData,
    epochs: int,
    ckpt: Path | None = None,
    save: Path | None = None,
    **options,
) -> L.Trainer:
    """Trains on the CPU and optionally saves a checkpoint."""
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[RngState(), Memorization()],
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    if save is not None:
        trainer.save_checkpoint(save)
    return trainer


def parallel_run(out: Path, devices: int) -> None:
    """Three epochs of ELR on `devices` processes, global batch 12; rank 0 writes weights, targets and metrics."""
    L.seed_everything(3)
    module = elr.ELR(linear, sgd, step_lr, lam=3.0, beta=0.7)
    data = ImageData(SMALL, batch_size=12, val_fraction=0.2, noise=Symmetric(0.4))
    options = {"devices": devices} | ({"strategy": "ddp"} if devices > 1 else {})
    trainer = fit(module, data, epochs=3, save=out.with_suffix(".ckpt"), **options)
    if trainer.is_global_zero:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save({"weights": module.net.state_dict(), "targets": module.targets, "metrics": metrics}, out)


@pytest.mark.distributed
def test_two_processes_equal_one(tmp_path: Path) -> None:
    parallel_run(tmp_path / "one.pt", 1)
    run_two(__file__, tmp_path / "two.pt")
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two["targets"], one["targets"], rtol=1e-5, atol=1e-6)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5)


# 5. module and resume


def elr_module() -> L.LightningModule:
    return elr.ELR(normed, sgd, step_lr)


def elr_plus_module() -> L.LightningModule:
    return elr.ELRPlus(normed, sgd, step_lr, coef_step=10, ema_ramp_steps=20, label_reweight=True)


def pictures(passes: int) -> ImageData:
    noise = Symmetric(0.4)
    return ImageData(SMALL, 16, val_fraction=0.2, noise=noise, passes=passes, crop=4, padding=1, flip=True)


@pytest.mark.parametrize(("build", "passes"), [(elr_module, 1), (elr_plus_module, 2)])
def test_three_epochs_equal_one_and_a_resume_of_two(build, passes: int, tmp_path: Path) -> None:
    results = []
    for parts in ([3], [1, 3]):
        ckpt = None
        for epochs in parts:
            L.seed_everything(5)
            module = build()
            if ckpt is not None:
                # the process that resumes has drawn other numbers before
                torch.rand(7)
                np.random.rand(7)
            trainer = fit(module, pictures(passes), epochs, ckpt, save=tmp_path / f"{len(parts)}-{epochs}.ckpt")
            ckpt = tmp_path / f"{len(parts)}-{epochs}.ckpt"
        results.append((module, dict(trainer.callback_metrics)))
    (whole, whole_metrics), (resumed, resumed_metrics) = results
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert torch.equal(resumed.targets, whole.targets)
    assert {k: float(v) for k, v in resumed_metrics.items()} == {k: float(v) for k, v in whole_metrics.items()}


def test_step_updates_the_targets_before_the_loss() -> None:
    L.seed_everything(5)
    module, seen = elr_module(), {}
    step = module.training_step

    def spy(batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        out = step(batch, batch_idx)
        rows = elr.elr_targets(torch.zeros(len(batch["index"]), 4), out["logits"], beta=0.7)
        seen.update(loss=out["loss"], expected=elr.elr_loss(out["logits"], batch["label"], rows, lam=3.0))
        return out

    module.training_step = spy
    fit(module, pictures(1), epochs=1, limit_train_batches=1)
    torch.testing.assert_close(seen["loss"], seen["expected"])


def test_elr_plus_trains_one_net_per_pass_and_moves_its_average_only() -> None:
    L.seed_everything(5)
    module = elr_plus_module()
    before = {name: value.clone() for name, value in module.named_parameters()}
    steps = 96 // 16
    fit(module, pictures(2), epochs=1, limit_train_batches=steps)
    changed = {
        name.rsplit(".", 2)[0] for name, value in module.named_parameters() if not torch.equal(value, before[name])
    }
    assert {name[: len("averages.0")].rstrip(".") for name in changed} == {"nets.0", "averages.0"}


def test_average_moves_by_one_minus_the_decay() -> None:
    L.seed_everything(5)
    module = elr_plus_module()
    before = [value.clone() for value in module.averages[0].parameters()]
    fit(module, pictures(2), epochs=1, limit_train_batches=1)
    decay = elr.ema_decay(step=1, cap=0.997, ramp_steps=20)
    for old, new, trained in zip(before, module.averages[0].parameters(), module.nets[0].parameters(), strict=True):
        torch.testing.assert_close(new.detach(), decay * old + (1 - decay) * trained.detach())


@pytest.mark.parametrize("which", [0, 1])
def test_elr_plus_step_is_the_formula_with_the_other_nets_average(which: int) -> None:
    L.seed_everything(5)
    module, seen = elr_plus_module(), {}
    step = module.training_step

    def spy(batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        if batch["pass"] != which or seen:
            return step(batch, batch_idx)
        draws = module.mixup_generator.get_state()
        teacher, student = copy.deepcopy(module.averages[1 - which]), copy.deepcopy(module.nets[which])
        out = step(batch, batch_idx)
        module.mixup_generator.set_state(draws)
        weight, permutation = module._draw_mixup(16)
        teacher_logits = teacher(batch["image"])
        rows = elr.elr_plus_targets(torch.zeros(16, 4), teacher_logits, beta=0.7)
        one_hot = nn.functional.one_hot(batch["label"], 4).float()
        mixed = [elr.mixup(values, weight, permutation) for values in (batch["image"], one_hot, rows)]
        lam = 3.0 * elr.sigmoid_ramp(1, 10)
        loss = elr.elr_plus_loss(student(mixed[0]), mixed[1], mixed[2], lam, label_reweight=True)
        seen.update(out=out, loss=loss, logits=teacher_logits)
        return out

    module.training_step = spy
    fit(module, pictures(2), epochs=1)
    torch.testing.assert_close(seen["out"]["logits"], seen["logits"])
    torch.testing.assert_close(seen["out"]["loss"], seen["loss"])


def test_elr_plus_needs_two_passes() -> None:
    with pytest.raises(ValueError, match=r"data.passes must be 2 for ELRPlus, got 1"):
        fit(elr_plus_module(), pictures(1), epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -1.0}, "model.lam must not be negative, got -1.0"),
        ({"beta": 1.0}, r"model.beta must be in \[0, 1\), got 1.0"),
    ],
)
def test_constants_outside_their_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        elr.ELR(normed, sgd, **options)


if __name__ == "__main__":
    parallel_run(Path(sys.argv[1]), devices=2)
