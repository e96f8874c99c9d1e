"""Bandlimited random features: reference, property, closed form, resume, bad input. test_recipes.py runs recipes."""

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from callbacks.rng import RngState
from datamodules.sinusoids import Sinusoids, midpoints, sinusoids
from lightning_modules import bandlimited
from scripts import recipes
from scripts.__main__ import main

GOLDEN = np.load(Path(__file__).parent / "golden" / "bandlimited.npz")
"""Direct transcription of the formulas in NumPy, float64: case a has k 8, L 1; case b k 4, L 20; both 60 units."""


def golden(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(GOLDEN[name]).to(dtype)


def golden_features(case: str, grid: str, dtype: torch.dtype = torch.float64) -> Tensor:
    position, weight, bias = (golden(f"{case}_{name}", dtype) for name in (grid, "w", "b"))
    return bandlimited.hidden_features(position, weight, bias, "tanh")


def golden_fit(case: str, solver: bandlimited.Solver) -> tuple[Tensor, Tensor]:
    lam, rcond = float(GOLDEN[f"{case}_lam"]), float(GOLDEN[f"{case}_rcond"])
    target = golden(f"{case}_y")[:, None]
    return bandlimited.output_weights(golden_features(case, "x"), target, solver, lam, rcond)


# 1. reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", ["a", "b"])
def test_features_equal_the_reference(case: str, dtype: torch.dtype, tolerance: float) -> None:
    ours = golden_features(case, "x", dtype)
    torch.testing.assert_close(ours, golden(f"{case}_H", dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", ["a", "b"])
def test_singular_values_and_their_number_equal_the_reference(case: str) -> None:
    _, singular = golden_fit(case, "ridge")
    torch.testing.assert_close(singular, golden(f"{case}_sv"), rtol=1e-10, atol=1e-10)
    assert bandlimited.numerical_rank(singular, float(GOLDEN[f"{case}_rcond"])) == GOLDEN[f"{case}_rank"]


# tolerances of the predictions: the condition number of H multiplies rounding (spec of the reference)
@pytest.mark.parametrize(("solver", "tolerance"), [("ridge", 1e-6), ("tsvd", 1e-5)])
@pytest.mark.parametrize("case", ["a", "b"])
def test_predictions_errors_and_norms_equal_the_reference(
    case: str, solver: bandlimited.Solver, tolerance: float
) -> None:
    weights, _ = golden_fit(case, solver)
    prediction = golden_features(case, "xt") @ weights
    target = sinusoids(golden(f"{case}_xt"), [int(GOLDEN[f"{case}_k"])])
    torch.testing.assert_close(prediction[:, 0], golden(f"{case}_pred_{solver}"), rtol=0, atol=tolerance)
    error = bandlimited.rmse(prediction, target)
    assert float(error) == pytest.approx(float(GOLDEN[f"{case}_rmse_{solver}"]), abs=tolerance)
    assert float(weights.norm()) == pytest.approx(float(GOLDEN[f"{case}_cnorm_{solver}"]), rel=1e-4)


@pytest.mark.parametrize("case", ["a", "b"])
def test_targets_equal_the_reference(case: str) -> None:
    ours = sinusoids(midpoints(80), [int(GOLDEN[f"{case}_k"])])
    torch.testing.assert_close(ours[:, 0], golden(f"{case}_y"), rtol=1e-10, atol=1e-10)


# 2. property


def draws(width: int) -> tuple[Tensor, Tensor]:
    return bandlimited.unit_draws(width, torch.Generator().manual_seed(0))


def test_a_wider_net_contains_the_narrower() -> None:
    for wide, narrow in zip(draws(50), draws(20), strict=True):
        assert torch.equal(wide[:20], narrow)


def test_centre_biases_put_each_unit_inside_the_data() -> None:
    weight, bias = bandlimited.hidden_parameters(*draws(100), bandwidth=7.0, bias="centre")
    centre = -bias / weight
    assert 0 <= float(centre.min()) < 0.1
    assert 0.9 < float(centre.max()) <= 1
    assert 6.5 < float(weight.abs().max()) <= 7


def test_box_biases_fill_the_band() -> None:
    _, bias = bandlimited.hidden_parameters(*draws(200), bandwidth=7.0, bias="box")
    assert -7 <= float(bias.min()) < -6.5
    assert 6.5 < float(bias.max()) <= 7


def test_relu_with_truncation_knows_no_bandwidth() -> None:
    position = midpoints(40)
    target, predictions = sinusoids(position, [3]), []
    for bandwidth in (1.0, 20.0):
        weight, bias = bandlimited.hidden_parameters(*draws(15), bandwidth, "centre")
        features = bandlimited.hidden_features(position, weight, bias, "relu")
        predictions.append(features @ bandlimited.output_weights(features, target, "tsvd", 1.0, 1e-8)[0])
    torch.testing.assert_close(predictions[1], predictions[0], rtol=1e-8, atol=1e-8)


def test_failed_bandwidths_counts_up_to_the_first_success() -> None:
    # columns: fits at once, at the second, never, at the first but not later
    errors = torch.tensor([[0.01, 0.5, 0.5, 0.01], [0.01, 0.01, 0.5, 0.5], [0.01, 0.01, 0.5, 0.01]])
    assert bandlimited.failed_bandwidths(errors).tolist() == [0, 1, 3, 0]


@pytest.mark.parametrize(("activation", "expected"), [("sigmoid", 1 / (1 + math.exp(-2))), ("gauss", math.exp(-4))])
def test_activation_is_its_formula(activation: bandlimited.Activation, expected: float) -> None:
    value = bandlimited.activate(torch.tensor(2.0, dtype=torch.float64), activation)
    assert float(value) == pytest.approx(expected, rel=1e-12)


# 3. closed form


def test_ridge_is_the_minimiser_of_its_objective() -> None:
    """The gradient of mean (Hc - y)^2 + lam |c|^2 vanishes at the solution."""
    features, target, lam = golden_features("b", "x"), golden("b_y")[:, None], 1e-4
    weights = bandlimited.output_weights(features, target, "ridge", lam, 1.0)[0].requires_grad_()
    objective = (features @ weights - target).square().mean() + lam * weights.square().sum()
    (gradient,) = torch.autograd.grad(objective, weights)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_batched_solution_equals_the_single_ones() -> None:
    features = torch.stack([golden_features("a", "x"), golden_features("b", "x")])
    target = sinusoids(midpoints(80), [1, 4])
    together, _ = bandlimited.output_weights(features, target, "ridge", 1e-6, 1.0)
    for one, both in zip(features, together, strict=True):
        torch.testing.assert_close(both, bandlimited.output_weights(one, target, "ridge", 1e-6, 1.0)[0])


# 4. module and resume


def fit(epochs: int, ckpt: Path | None = None, **options: Any) -> tuple[bandlimited.BandlimitedFeatures, L.Trainer]:
    L.seed_everything(5)
    module = bandlimited.BandlimitedFeatures(**{"bandwidths": [1.0, 20.0], "widths": [10, 30], **options})
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[RngState()],
    )
    trainer.fit(module, datamodule=Sinusoids([1, 3], num_train=40, num_test=100), ckpt_path=ckpt)
    return module, trainer


def test_module_logs_the_error_of_its_own_solution() -> None:
    module, trainer = fit(1)
    position = midpoints(100)
    features = module.features(position, 30)[1]
    train = module.features(midpoints(40), 30)[1]
    weights, _ = bandlimited.output_weights(train, sinusoids(midpoints(40), [1, 3]), "ridge", 1e-10, 1.0)
    expected = bandlimited.rmse(features @ weights, sinusoids(position, [1, 3]))
    logged = [float(trainer.callback_metrics[f"test/rmse_k{k}_L20_n30"]) for k in (1, 3)]
    assert logged == pytest.approx(expected.tolist(), rel=1e-5)


def test_three_epochs_equal_one_and_a_resume_of_two(tmp_path: Path) -> None:
    whole, whole_trainer = fit(3)
    _, first = fit(1)
    first.save_checkpoint(tmp_path / "one.ckpt")
    resumed, resumed_trainer = fit(3, tmp_path / "one.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert resumed_trainer.callback_metrics == whole_trainer.callback_metrics


def test_testing_after_training_keeps_the_solution() -> None:
    module, trainer = fit(1)
    trained = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
    (tested,) = trainer.test(module, datamodule=trainer.datamodule, verbose=False)
    assert {name: tested[name] for name in trained} == pytest.approx(trained, rel=1e-12)


def test_seed_alone_decides_the_draws() -> None:
    L.seed_everything(1)
    one = bandlimited.BandlimitedFeatures([1.0], [10])
    torch.rand(3)
    again = bandlimited.BandlimitedFeatures([1.0], [10])
    L.seed_everything(2)
    other = bandlimited.BandlimitedFeatures([1.0], [10])
    assert torch.equal(one.unit_weight, again.unit_weight)
    assert not torch.equal(one.unit_weight, other.unit_weight)


# 5. recipe


def test_every_metric_that_a_claim_names_is_in_the_record(tmp_path: Path) -> None:
    """A small cut of mini-grid through the real entry point has the names of the grid."""
    config = recipes.ROOT / "bandlimited" / "mini-grid.yaml"
    words = ["--config", str(config), "--runs", str(tmp_path), "--wandb", "false", "--data.num_train", "50"]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    assert main(["fit", *words, "--data.num_test", "100"]) == 0
    (file,) = tmp_path.glob("bandlimited/*/*/seed*/record.json")
    names = json.loads(file.read_text())["metrics"].keys()
    document = recipes.read_yaml(recipes.ROOT / "bandlimited" / "claims.yaml")
    assert {c["metric"] for c in document["claims"] if c["treatment"] == "mini-grid.yaml"} <= names


# 6. bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bandwidths": []}, r"model.bandwidths must be positive numbers in rising order, got \[\]"),
        ({"bandwidths": [5.0, 1.0]}, r"model.bandwidths must be positive numbers in rising order"),
        ({"widths": [0, 5]}, r"model.widths must be positive numbers in rising order, got \[0, 5\]"),
        ({"lam": 0.0}, "model.lam and model.rcond must be positive, got 0.0"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bandlimited.BandlimitedFeatures(**{"bandwidths": [1.0], "widths": [5], **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frequencies": []}, r"data.frequencies must be different whole numbers of at least 1, got \[\]"),
        ({"frequencies": [0]}, r"data.frequencies must be different whole numbers of at least 1, got \[0\]"),
        ({"num_train": 30, "num_test": 90}, "data.num_train 30 and num_test 90 give grids that share points"),
    ],
)
def test_data_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sinusoids(**{"frequencies": [1], **options})


def test_grids_share_points_exactly_where_the_rule_says() -> None:
    for train, test in ((400, 1000), (30, 90), (40, 100), (15, 20)):
        shared = (midpoints(train)[:, None] - midpoints(test)).abs().min() < 1e-12
        try:
            Sinusoids([1], train, test)
        except ValueError:
            assert shared
        else:
            assert not shared
