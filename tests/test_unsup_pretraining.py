"""Unsupervised pre-training of a factor model: reference, property, gradient, resume, recipes, bad input."""

import json
import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from callbacks.rng import RngState
from datamodules.factors import FactorModel
from lightning_modules import unsup_pretraining as up
from scripts import recipes
from scripts.__main__ import main

GOLDEN = np.load(Path(__file__).parent / "golden" / "unsup_pretraining.npz")
"""Direct transcription of the closed forms, float64; no official code is known."""


def golden(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name])).to(dtype)


def moment(name: str) -> Tensor:
    points = golden(name)
    return points.T @ points / len(points)


RANK, FACTOR_NOISE = int(GOLDEN["r"]), float(GOLDEN["fn"])

# 1. reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_likelihood_and_features_equal_the_golden_values(dtype: torch.dtype, tolerance: float) -> None:
    loading, noise = (value.to(dtype) for value in up.factor_mle(moment("Xu"), RANK))
    options: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(loading @ loading.T, golden("WWt", dtype), **options)
    torch.testing.assert_close(noise, golden("s2", dtype), **options)
    torch.testing.assert_close(up.factor_nll(moment("Xu").to(dtype), loading, noise), golden("nll", dtype), **options)
    basis = torch.linalg.qr(up.feature_map(loading, noise)).Q
    torch.testing.assert_close(basis @ basis.T, golden("PPt_proj", dtype), **options)


def test_closed_form_evaluation_equals_the_golden_values() -> None:
    covariance = up.input_covariance(golden("B"), FACTOR_NOISE)
    best = up.bayes_weights(golden("B"), golden("beta"), FACTOR_NOISE)
    torch.testing.assert_close(covariance, golden("Sxx"), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(best, golden("w_bayes"), rtol=1e-10, atol=1e-10)
    risk = up.bayes_risk(best, covariance, float(GOLDEN["ln"]))
    torch.testing.assert_close(risk, golden("risk_bayes"), rtol=1e-10, atol=1e-10)
    zero = up.excess_risk(torch.zeros_like(best), best, covariance)
    torch.testing.assert_close(zero, golden("excess_zero"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("points", ["Xu", "Xl"])
def test_two_stages_equal_the_golden_predictors(points: str) -> None:
    """Pre-training on the unlabelled points, and labelled-PCA on the labelled ones."""
    name = "pre" if points == "Xu" else "labpca"
    features = up.feature_map(*up.factor_mle(moment(points), RANK))
    weights = up.stage_two(features, golden("Xl"), golden("y"))
    torch.testing.assert_close(weights, golden(f"w_{name}"), rtol=1e-10, atol=1e-10)
    excess = up.excess_risk(weights, golden("w_bayes"), golden("Sxx"))
    torch.testing.assert_close(excess, golden(f"excess_{name}"), rtol=1e-10, atol=1e-10)


def test_ridge_equals_the_golden_predictor() -> None:
    weights = up.ridge(golden("Xl"), golden("y"), golden("lam").reshape(1))[0]
    torch.testing.assert_close(weights, golden("w_ridge"), rtol=1e-10, atol=1e-10)
    excess = up.excess_risk(weights, golden("w_bayes"), golden("Sxx"))
    torch.testing.assert_close(excess, golden("excess_ridge"), rtol=1e-10, atol=1e-10)


# 2. property


def test_rotating_the_loading_changes_no_prediction() -> None:
    loading, noise = up.factor_mle(moment("Xu"), RANK)
    rotation = torch.linalg.qr(torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(0)).double()).Q
    features = (up.feature_map(w, noise) for w in (loading, loading @ rotation))
    first, second = (up.stage_two(feature, golden("Xl"), golden("y")) for feature in features)
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)
    assert float(up.subspace_error(loading @ rotation, loading)) == pytest.approx(0, abs=1e-10)


def test_likelihood_is_that_of_the_full_covariance() -> None:
    loading, noise = up.factor_mle(moment("Xu"), RANK)
    covariance = loading @ loading.T + noise * torch.eye(len(loading))
    density = torch.distributions.MultivariateNormal(torch.zeros(len(loading)).double(), covariance)
    expected = -density.log_prob(golden("Xu")).mean()
    torch.testing.assert_close(up.factor_nll(moment("Xu"), loading, noise), expected, rtol=1e-10, atol=1e-10)


def test_cross_validation_chooses_the_penalty_of_a_plain_loop() -> None:
    x, y = golden("Xl"), golden("y")
    fold, errors = np.arange(len(y)) % 5, []
    for lam in up.LAMBDAS.tolist():
        total = 0.0
        for k in range(5):
            a, b = x[fold != k], y[fold != k]
            w = torch.linalg.solve(a.T @ a + lam * torch.eye(a.shape[1]), a.T @ b)
            total += float((x[fold == k] @ w - y[fold == k]).square().sum())
        errors.append(total)
    _, chosen = up.cross_validated_ridge(x, y)
    assert float(chosen) == up.LAMBDAS.tolist()[int(np.argmin(errors))]


def test_the_label_is_the_factors_weighted_by_a_unit_vector() -> None:
    """Many points, little noise: least squares on the true features comes near the label."""
    problem = FactorModel(8, 2, 0.1, 0.0, 5, 200, data_seed=1).problem()
    assert float(problem["beta"].norm()) == pytest.approx(1.0)
    features = up.feature_map(problem["loading"], torch.tensor(0.01).double())
    fitted = problem["labelled"] @ features @ problem["beta"]
    # what is left is the posterior variance of the factors, 0.01 / (eigenvalue of B^T B)
    smallest = float(torch.linalg.eigvalsh(problem["loading"].T @ problem["loading"])[0])
    assert float((fitted - problem["label"]).square().mean()) < 2 * 0.01 / smallest


# 3. gradient


def test_gradient_of_the_likelihood_vanishes_at_the_closed_form() -> None:
    loading, noise = up.factor_mle(moment("Xu"), RANK)
    loading, noise = loading.requires_grad_(), noise.requires_grad_()
    gradients = torch.autograd.grad(up.factor_nll(moment("Xu"), loading, noise), (loading, noise))
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)


# 4. module and resume


def fit(stage_one: Any, epochs: int, ckpt: Path | None = None, **options: Any) -> tuple[up.UnsupPretraining, L.Trainer]:
    L.seed_everything(2)
    settings = {"unlabelled": [50, 100], "labelled": [10, 20], "rank": 2, "stage_one": stage_one}
    module = up.UnsupPretraining(**(settings | options))
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RngState()],
    )
    trainer.fit(module, datamodule=FactorModel(12, 2, 1.5, 0.3, 100, 20), ckpt_path=ckpt)
    return module, trainer


def metrics_of(trainer: L.Trainer) -> dict[str, float]:
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def test_three_epochs_equal_one_and_a_resume_of_two(tmp_path: Path) -> None:
    whole, whole_trainer = fit("gradient", 3)
    fit("gradient", 1)[1].save_checkpoint(tmp_path / "one.ckpt")
    resumed, trainer = fit("gradient", 3, tmp_path / "one.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert metrics_of(trainer) == metrics_of(whole_trainer)


def test_gradient_descent_reaches_the_closed_form() -> None:
    exact = metrics_of(fit("exact", 1)[1])
    descended = metrics_of(fit("gradient", 4, lr=0.1, steps_per_epoch=100)[1])
    for name in ("train/loss", "nll/m50", "excess/pretrain_m100_n20"):
        assert descended[name] == pytest.approx(exact[name], rel=1e-3)


# 5. recipes


def test_mini_recipe_runs_and_its_baseline_is_the_better_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    words = ["--config", "unsup_pretraining/mini-lownoise", "--seed_everything", "0", "--runs", str(tmp_path)]
    assert main(["fit", *words, "--wandb", "false", "--trainer.enable_progress_bar", "false"]) == 0
    (record,) = tmp_path.glob("unsup_pretraining/mini-lownoise/*/seed0/record.json")
    metrics = json.loads(record.read_text())["metrics"]
    better = min(metrics["excess/ridge_n50_last"], metrics["excess/labpca_n50_last"])
    assert metrics["excess/baseline_n50_last"] == better


@pytest.mark.parametrize("path", recipes.recipe_files("unsup_pretraining"), ids=recipes.recipe_name)
def test_header_states_the_parameters(path: Path) -> None:
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for document in recipes.expand(path):
        model |= document.get("model", {}).get("init_args", {})
        data |= document.get("data", {}).get("init_args", {})
    count = len(model["unlabelled"]) * (data["dim"] * model["rank"] + 1)
    assert f", {count:,} parameters" in recipes.header(path)[4]


# 6. bad input


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FactorModel(dim=3, rank=3), "data.rank must be at least 1 and below data.dim 3, got 3"),
        (lambda: FactorModel(factor_noise=0.0), "data.factor_noise must be positive"),
        (lambda: FactorModel(num_labelled=0), "data.num_labelled must be at least 1, got 10000 and 0"),
        (
            lambda: up.UnsupPretraining([10], [2, 20], rank=3),
            "model.labelled must not be smaller than the latent dimension model.rank (at least 1), and "
            "model.unlabelled at least 1, got [2, 20], 3 and [10]",
        ),
        (lambda: up.UnsupPretraining([], [20]), "model.unlabelled must be at least one number, all different, got []"),
    ],
)
def test_impossible_settings_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 12, "labelled": [20]}, "model.rank must be below data.dim 12, got 12"),
        ({"unlabelled": [101]}, "model.unlabelled must not exceed data.num_unlabelled 100, got 101"),
        ({"labelled": [21]}, "model.labelled must not exceed data.num_labelled 20, got 21"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fit("exact", 1, **options)
