"""Robust matrix recovery: reference, property, gradient, resume, recipe, bad input."""

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from callbacks.rng import RngState, make_generator
from datamodules.measurements import MatrixMeasurements, corruption, low_rank_truth
from lightning_modules import subgm
from scripts import recipes
from scripts.__main__ import main

GOLDEN = np.load(Path(__file__).parent / "golden" / "subgm.npz")
"""Direct transcription of the method, float64; no official code is known."""


def golden(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(GOLDEN[name]).to(dtype)


# 1. reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_loss_and_gradient_equal_the_golden_values(loss: Any, dtype: torch.dtype, tolerance: float) -> None:
    matrix = subgm.symmetric(golden("A", dtype))
    factor, value = golden("Ugrad", dtype), golden("y", dtype)
    ours = subgm.recovery_loss(subgm.residuals(factor, matrix, value), loss)
    torch.testing.assert_close(ours, golden(f"{loss}_loss", dtype), rtol=tolerance, atol=tolerance)
    gradient = subgm.recovery_gradient(factor, matrix, value, loss)
    torch.testing.assert_close(gradient, golden(f"{loss}_grad", dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_150_steps_equal_the_golden_trajectory(loss: Any) -> None:
    matrix, value, truth = subgm.symmetric(golden("A")), golden("y"), golden("X")
    factor = golden("U0")
    lr, decay = (float(GOLDEN["eta0"]), float(GOLDEN["rho"])) if loss == "l1" else (float(GOLDEN["lr2"]), 1.0)
    errors = []
    for step in range(int(GOLDEN["steps"])):
        errors.append(subgm.relative_error(factor, truth))
        factor = factor - lr * decay**step * subgm.recovery_gradient(factor, matrix, value, loss)
    torch.testing.assert_close(torch.stack(errors), golden(f"{loss}_traj_err"), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(factor, golden(f"{loss}_U_final"), rtol=1e-7, atol=1e-7)


def test_sign_rip_parts_equal_the_golden_values() -> None:
    matrix, truth, s = subgm.symmetric(golden("A")), golden("X"), golden("s")
    delta = golden("Ugrad") @ golden("Ugrad").T - truth
    torch.testing.assert_close(subgm.sign_mean(delta, matrix, s), golden("signrip_M"), rtol=1e-10, atol=1e-10)
    phi = subgm.sign_shrinkage(torch.linalg.matrix_norm(delta), s)
    torch.testing.assert_close(phi, golden("signrip_phi"), rtol=1e-10, atol=1e-10)
    deviation, _ = subgm.sign_rip(golden("Ugrad"), matrix, truth, s)
    expected = torch.linalg.matrix_norm(golden("signrip_M") - phi * delta / delta.norm(), ord=2) / phi
    torch.testing.assert_close(deviation, expected, rtol=1e-10, atol=1e-10)


def test_spectral_start_equals_the_golden_matrix() -> None:
    start = subgm.spectral_start(subgm.symmetric(golden("A")), golden("y"), rank=6)
    torch.testing.assert_close(start @ start.T, golden("spec_BBt"), rtol=1e-10, atol=1e-10)


# 2. property


def test_escape_margin_is_that_of_the_worked_example() -> None:
    """r 2, eigenvalues 1, lr .25, rho .985, alpha 1e-6, p .1 with huge outliers: G 16.9, ln 13.8 (spec, section 3)."""
    truth = low_rank_truth(20, 2, torch.Generator().manual_seed(0))
    s = torch.zeros(400, dtype=torch.float64)
    s[:40] = 1e6
    margin = subgm.escape_margin(truth, 2, s, alpha=1e-6, lr=0.25, decay=0.985)
    gain = 2 * math.sqrt(2 / math.pi) * 0.9 / math.sqrt(2) * 0.25 / 0.015
    assert margin == pytest.approx(gain - math.log(1e6), abs=1e-9)
    assert gain == pytest.approx(16.9, abs=0.05)


def test_corruption_hits_exactly_the_given_share() -> None:
    s = corruption(50, 0.3, 10.0, 0.0, torch.Generator().manual_seed(0))
    assert int((s != 0).sum()) == 15


def test_columns_beyond_a_members_rank_stay_zero(tmp_path: Path) -> None:
    module, _ = fit(1, ranks=[2, 6])
    assert torch.equal(module.factor[0, :, 2:], torch.zeros(6, 4, dtype=torch.float64))
    assert float(module.factor.detach()[1, :, 2:].abs().min()) > 0


def test_members_do_not_mix() -> None:
    together, alone = fit(2, ranks=[2, 6])[0], fit(2, ranks=[6])[0]
    torch.testing.assert_close(together.factor[1], alone.factor[0], rtol=1e-9, atol=1e-12)


# 3. gradient


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_gradient_is_autograds_on_the_matrices_as_given(loss: Any) -> None:
    factor = golden("Ugrad").requires_grad_()
    value = subgm.recovery_loss(subgm.residuals(factor, golden("A"), golden("y")), loss)
    (expected,) = torch.autograd.grad(value, factor)
    ours = subgm.recovery_gradient(factor.detach(), subgm.symmetric(golden("A")), golden("y"), loss)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


# 4. resume


def fit(epochs: int, ckpt: Path | None = None, ranks: list[int] | None = None) -> tuple[subgm.SubGM, L.Trainer]:
    """A small problem on the CPU."""
    L.seed_everything(3)
    module = subgm.SubGM(alphas=[1e-3], ranks=ranks or [2, 6], decay=0.99, steps_per_epoch=20)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RngState()],
    )
    data = MatrixMeasurements(dim=6, rank=2, count=60, share=0.2)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    return module, trainer


def test_three_epochs_equal_one_and_a_resume_of_two(tmp_path: Path) -> None:
    whole, whole_trainer = fit(3)
    fit(1)[1].save_checkpoint(tmp_path / "one.ckpt")
    resumed, trainer = fit(3, tmp_path / "one.ckpt")
    assert torch.equal(resumed.factor, whole.factor)
    metrics = [{key: float(value) for key, value in t.callback_metrics.items()} for t in (trainer, whole_trainer)]
    assert metrics[0] == metrics[1]


# 5. recipe


def test_mini_recipe_makes_its_first_steps(tmp_path: Path) -> None:
    """80 steps against a plain loop over one of the four starts."""
    torch.set_num_threads(1)
    words = ["--config", "subgm/mini", "--seed_everything", "0", "--runs", str(tmp_path), "--trainer.max_epochs", "1"]
    assert main(["fit", *words, "--wandb", "false", "--trainer.enable_progress_bar", "false"]) == 0
    (record,) = tmp_path.glob("subgm/mini/*/seed0/record.json")
    facts = json.loads(record.read_text())
    data = MatrixMeasurements(dim=20, rank=2, count=400, share=0.2, data_seed=0)
    problem = data.problem()
    matrix = subgm.symmetric(problem["matrix"])
    draw = torch.randn(20, 20, generator=make_generator("start", seed=0), dtype=torch.float64) / 20**0.5
    factor = 0.001 * draw
    for step in range(80):
        gradient = subgm.recovery_gradient(factor, matrix, problem["value"], "l1")
        factor = factor - 0.25 * 0.985**step * gradient
    expected = float(subgm.relative_error(factor, problem["truth"]))
    assert facts["metrics"]["error/r20_a0.001_last"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("path", recipes.recipe_files("subgm"), ids=recipes.recipe_name)
def test_every_recipe_is_accepted_and_states_its_parameters(path: Path) -> None:
    documents = recipes.expand(path)
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for document in documents:
        model |= document.get("model", {}).get("init_args", {})
        data |= document.get("data", {}).get("init_args", {})
    module = subgm.SubGM(**model)
    MatrixMeasurements(**data)
    count = len(module.members) * data["dim"] * max(module.ranks)
    assert f", {count:,} parameters" in recipes.header(path)[4]


# 6. bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 7}, "data.rank must be between 1 and data.dim 6, got 7"),
        ({"share": -0.1}, r"data.share, the share of corrupted measurements, must be in \[0, 1\], got -0.1"),
        ({"dense_scale": -1.0}, "data.outlier_scale and data.dense_scale must not be negative, got 10.0 and -1.0"),
        ({"count": 0}, "data.dim and data.count must be at least 1, got 6 and 0"),
    ],
)
def test_impossible_problems_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatrixMeasurements(**{"dim": 6, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alphas": [0.0]}, r"model.alphas must be positive numbers, at least one, got \[0.0\]"),
        ({"decay": 1.5}, r"model.lr must be positive and model.decay in \(0, 1\], got 0.25 and 1.5"),
        ({"steps_per_epoch": 0}, "model.steps_per_epoch must be at least 1, got 0"),
    ],
)
def test_constants_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        subgm.SubGM(**{"alphas": [1e-3], "ranks": [2], **options})


@pytest.mark.parametrize("ranks", [[1], [7], []])
def test_model_ranks_outside_true_rank_and_width_are_refused(ranks: list[int]) -> None:
    module = subgm.SubGM(alphas=[1e-3], ranks=ranks)
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"model.ranks must lie between data.rank 2 and data.dim 6, got"):
        trainer.fit(module, datamodule=MatrixMeasurements(dim=6, rank=2, count=60))


def test_steps_that_end_too_early_are_announced() -> None:
    module = subgm.SubGM(alphas=[1e-6], ranks=[2], decay=0.9, steps_per_epoch=1)
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.warns(UserWarning, match="model.decay 0.9 may end the steps before the smallest start escapes zero"):
        trainer.fit(module, datamodule=MatrixMeasurements(dim=6, rank=2, count=60))
