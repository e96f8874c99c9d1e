"""Rich and lazy learning: reference, property, gradient, resume, recipes, bad input."""

import json
import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from synthetic import SyntheticImages
from torch import Tensor

from callbacks.rng import RngState
from datamodules.sequences import COHERENCES, IGNORED, PictureRows, TwoAlternatives, two_alternatives
from datamodules.teachers import LinearTeacher
from lightning_modules import rich_lazy as rl
from scripts import recipes
from scripts.__main__ import main

GOLDEN = np.load(Path(__file__).parent / "golden" / "rich_lazy.npz")
"""Outputs of the official classes (Helena-Yuhan-Liu/BioRNN_RichLazy) on fixed inputs, float64."""


def golden(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    value = torch.from_numpy(GOLDEN[name])
    return value.to(dtype) if value.is_floating_point() else value


def leak_of(case: str) -> float:
    return float(GOLDEN[f"{case}_dt"]) / 100


def features(case: str, w_in: Tensor, w: Tensor, w_out: Tensor) -> Tensor:
    states = rl.rnn_states(golden(f"{case}_x"), w_in[None], w[None], leak_of(case))[:, 0]
    return rl.tangent_features(states, w, w_out, list(range(len(states))), leak_of(case))


# 1. reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", ["a", "b"])
def test_states_and_outputs_equal_the_official_net(case: str, dtype: torch.dtype, tolerance: float) -> None:
    w_in, w, w_out = (golden(f"{case}_{name}", dtype)[None] for name in ("W_in", "W_rank", "W_out"))
    states = rl.rnn_states(golden(f"{case}_x", dtype), w_in, w, leak_of(case))
    torch.testing.assert_close(states[:, 0], golden(f"{case}_act0", dtype), rtol=tolerance, atol=tolerance)
    outputs = (states @ w_out.mT)[:, 0]
    torch.testing.assert_close(outputs, golden(f"{case}_out0", dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", ["a", "b"])
def test_cut_and_rescaled_matrix_equals_the_official_one(case: str) -> None:
    ours = rl.low_rank(golden(f"{case}_W_full"), int(GOLDEN[f"{case}_rank"]))
    torch.testing.assert_close(ours, golden(f"{case}_W_rank"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ["a", "b"])
def test_training_equals_the_official_losses_weights_and_measures(case: str) -> None:
    x, y, leak = golden(f"{case}_x"), golden(f"{case}_y"), leak_of(case)
    weights = [golden(f"{case}_{name}")[None].clone().requires_grad_() for name in ("W_in", "W_rank", "W_out")]
    optimizer = _official_sgd(case, weights)
    losses = []
    for _ in range(int(GOLDEN[f"{case}_steps"])):
        loss = rl.rnn_loss(rl.rnn_states(x, weights[0], weights[1], leak) @ weights[2].mT, y)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(torch.cat(losses), golden(f"{case}_losses"), rtol=1e-10, atol=1e-10)
    for weight, name in zip(weights, ("W_in", "W_rec", "W_out"), strict=True):
        torch.testing.assert_close(weight.detach()[0], golden(f"{case}_{name}_T"), rtol=1e-10, atol=1e-10)
    after = rl.rnn_states(x, weights[0].detach(), weights[1].detach(), leak)[-1, 0]
    before = golden(f"{case}_act0")[-1]
    rsa = rl.alignment(after @ after.T, before @ before.T)
    torch.testing.assert_close(rsa, golden(f"{case}_rep_sim").squeeze(), rtol=1e-10, atol=1e-10)


def _official_sgd(case: str, weights: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr=float(GOLDEN[f"{case}_lr"]) if f"{case}_lr" in GOLDEN else 0.05, momentum=0.9)


@pytest.mark.parametrize("case", ["a", "b"])
def test_tangent_kernel_equals_the_official_one_before_and_after_training(case: str) -> None:
    first = features(case, *(golden(f"{case}_{name}") for name in ("W_in", "W_rank", "W_out")))
    last = features(case, *(golden(f"{case}_{name}_T") for name in ("W_in", "W_rec", "W_out")))
    kernels = first @ first.T, last @ last.T
    torch.testing.assert_close(kernels[0], golden(f"{case}_ntk0"), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(kernels[1], golden(f"{case}_ntkT"), rtol=1e-10, atol=1e-10)
    ours = rl.alignment(*kernels)
    torch.testing.assert_close(ours, golden(f"{case}_kernel_alignment").squeeze(), rtol=1e-10, atol=1e-10)


# 2. property


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_rank_has_the_norm_of_the_full_matrix() -> None:
    matrix = torch.randn(8, 8, generator=generator(), dtype=torch.float64)
    for rank in (1, 3, 8):
        cut = rl.low_rank(matrix, rank)
        assert float(cut.norm()) == pytest.approx(float(matrix.norm()), rel=1e-12)
        assert int(torch.linalg.matrix_rank(cut)) == rank


def test_alignment_ignores_the_scale_of_a_kernel() -> None:
    kernel = torch.randn(5, 5, generator=generator(), dtype=torch.float64)
    assert float(rl.alignment(3 * kernel, kernel)) == pytest.approx(1.0, abs=1e-12)


def test_steps_without_a_target_have_no_loss() -> None:
    outputs = torch.randn(3, 2, 4, 5, generator=generator())
    targets = torch.full((3, 4), IGNORED)
    targets[-1] = torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(rl.rnn_loss(outputs, targets), rl.rnn_loss(outputs[-1:], targets[-1:]))


def test_stimulus_means_differ_by_the_coherence() -> None:
    inputs, targets = two_alternatives(400, 0.0, generator())
    gap = (inputs[0, :, 1] - inputs[0, :, 2]) * (3 - 2 * targets[7])
    shown = {round(float(value) * 100, 1) for value in gap.unique()}
    assert shown == set(COHERENCES)
    assert torch.equal(inputs[7], torch.zeros(400, 3))
    assert torch.equal(targets[:7], torch.zeros(7, 400, dtype=torch.int64))


def test_blocks_are_a_function_of_seed_and_number() -> None:
    data = TwoAlternatives(batch_size=2, iterations=3, data_seed=1)
    again = TwoAlternatives(batch_size=2, iterations=3, data_seed=1)
    assert torch.equal(data.block(4)["input"], again.block(4)["input"])
    assert not torch.equal(data.block(4)["input"], data.block(5)["input"])


def test_pictures_are_read_row_by_row_and_labelled_at_the_end() -> None:
    source = SyntheticImages(num_classes=2, channels=1, size=4, per_class=3)
    data = PictureRows(source, batch_size=2, iterations=1, stored_trials=5)
    data.setup()
    inputs, targets = data.stored()
    images, labels = source.load().train_images[:, 0].float() / 255, source.load().train_labels
    for trial in range(5):
        match = (images == inputs[:, trial]).all((1, 2)).nonzero().squeeze(1)
        assert labels[match[0]] == targets[-1, trial]
    assert (targets[:-1] == IGNORED).all()


# 3. gradient and closed form


def test_tangent_features_are_autograds() -> None:
    case, leak = "b", 0.5
    w_in, w, w_out = (golden(f"{case}_{name}") for name in ("W_in", "W_rank", "W_out"))

    def outputs(weight: Tensor) -> Tensor:
        return (rl.rnn_states(golden("b_x"), w_in[None], weight[None], leak)[:, 0] @ w_out.T).flatten()

    expected = torch.autograd.functional.jacobian(outputs, w).flatten(1)
    torch.testing.assert_close(features(case, w_in, w, w_out), expected, rtol=1e-10, atol=1e-12)


def test_linear_gradients_and_kernel_are_autograds() -> None:
    points = torch.randn(7, 3, generator=generator(), dtype=torch.float64)
    teacher = torch.randn(3, generator=generator(1), dtype=torch.float64)
    first = torch.randn(4, 3, generator=generator(2), dtype=torch.float64).requires_grad_()
    second = torch.randn(4, generator=generator(3), dtype=torch.float64).requires_grad_()
    loss = (points @ first.T @ second - points @ teacher).square().mean() / 2
    expected = torch.autograd.grad(loss, (first, second))
    ours = rl.linear_gradients(points.T @ points / 7, teacher, first.detach()[None], second.detach()[None])
    for value, reference in zip(ours, (*expected, loss.detach()), strict=True):
        torch.testing.assert_close(value[0], reference, rtol=1e-10, atol=1e-12)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(point @ first.T @ second, (first, second))])
        for point in points
    ]
    jacobian = torch.stack(rows)
    torch.testing.assert_close(rl.linear_kernel(points, first.detach(), second.detach()), jacobian @ jacobian.T)


# 4. resume


def rnn_module() -> L.LightningModule:
    return rl.RichLazyRNN([1, 6], hidden=6, lr=0.05, kernel_trials=3)


def linear_module() -> L.LightningModule:
    return rl.RichLazyLinear([1, 4], hidden=6, steps_per_epoch=5)


def rnn_data() -> L.LightningDataModule:
    return TwoAlternatives(batch_size=4, iterations=3, blocks=2, stored_trials=9)


def fit(
    module: L.LightningModule, data: L.LightningDataModule, epochs: int, ckpt: Path | None = None
) -> tuple[L.LightningModule, L.Trainer]:
    L.seed_everything(2)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RngState()],
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    return module, trainer


@pytest.mark.parametrize(
    ("build", "data"), [(rnn_module, rnn_data), (linear_module, lambda: LinearTeacher(dim=4, count=9))]
)
def test_three_epochs_equal_one_and_a_resume_of_two(build: Any, data: Any, tmp_path: Path) -> None:
    whole, whole_trainer = fit(build(), data(), 3)
    fit(build(), data(), 1)[1].save_checkpoint(tmp_path / "one.ckpt")
    resumed, trainer = fit(build(), data(), 3, tmp_path / "one.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    metrics = [{key: float(value) for key, value in t.callback_metrics.items()} for t in (trainer, whole_trainer)]
    assert metrics[0] == metrics[1]


def test_a_members_training_does_not_depend_on_the_others() -> None:
    together, _ = fit(rnn_module(), rnn_data(), 1)
    alone, _ = fit(rl.RichLazyRNN([6], hidden=6, lr=0.05, kernel_trials=3), rnn_data(), 1)
    torch.testing.assert_close(together.weights["w"][1], alone.weights["w"][0], rtol=1e-5, atol=1e-6)


# 5. recipes


def test_mini_recipe_makes_its_first_steps(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    words = ["--config", "rich_lazy/mini-linear", "--seed_everything", "0", "--runs", str(tmp_path)]
    words += ["--trainer.max_epochs", "1", "--wandb", "false", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", *words]) == 0
    (record,) = tmp_path.glob("rich_lazy/mini-linear/*/seed0/record.json")
    facts = json.loads(record.read_text())
    # 200 steps of 0.02 at a curvature of about 6: gone, but for the aligned start, which overshoots the teacher
    assert facts["metrics"]["loss/r20_last"] < 1e-8
    assert facts["metrics"]["loss/aligned_last"] > facts["metrics"]["loss/r20_last"]


@pytest.mark.parametrize("path", recipes.recipe_files("rich_lazy"), ids=recipes.recipe_name)
def test_header_states_the_parameters(path: Path) -> None:
    model: dict[str, Any] = {}
    for document in recipes.expand(path):
        model |= document.get("model", {}).get("init_args", {})
    if "aligned" in model:
        count = (len(model["ranks"]) + 1) * model["hidden"] * 21
    else:
        edges = 28 + 10 if "smnist" in path.name else 3 + 3
        count = len(model["ranks"]) * model["hidden"] * (model["hidden"] + edges)
    assert f", {count:,} parameters" in recipes.header(path)[4]


# 6. bad input


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: rl.RichLazyRNN([]), "model.ranks must be at least one, all different, got []"),
        (lambda: rl.RichLazyRNN([1], leak=0.0), "model.leak must be in (0, 1], got 0.0"),
        (lambda: rl.RichLazyLinear([1], lr=-1.0), "model.lr and model.gain positive, got 100, -1.0 and 1.0"),
        (lambda: TwoAlternatives(noise=-0.1), "data.noise must not be negative, got -0.1"),
        (lambda: TwoAlternatives(iterations=0), "data.iterations must be at least 1, got 0"),
        (lambda: LinearTeacher(dim=0), "data.dim and data.count must be at least 1, got 0 and 400"),
    ],
)
def test_impossible_settings_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_a_rank_larger_than_the_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.ranks must be between 1 and the width 6, got 7"):
        fit(rl.RichLazyRNN([1, 7], hidden=6, kernel_trials=3), rnn_data(), 1)


def test_more_kernel_trials_than_stored_ones_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model.kernel_trials must be between 1 and data.stored_trials 9, got 10"):
        fit(rl.RichLazyRNN([1], hidden=6, kernel_trials=10), rnn_data(), 1)
