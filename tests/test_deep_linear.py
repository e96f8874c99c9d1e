"""Deep linear nets: reference, property, gradient, resume, recipes, bad input."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from synthetic import SyntheticImages
from torch import Tensor

from callbacks.rng import RngState
from datamodules.correlations import RandomModes, Tree, WhitenedImages, whitened_correlation
from lightning_modules import deep_linear as dl
from scripts import recipes
from scripts.__main__ import main

GOLDEN = np.load(Path(__file__).parent / "golden" / "deep_linear.npz")
"""Direct transcription of the method, float64; no official code is known."""


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


# 1. reference


@pytest.mark.parametrize("case", ["L2", "L4"])
@pytest.mark.parametrize("start", ["al", "rn"])
def test_descent_equals_the_golden_modes_losses_and_weights(case: str, start: str) -> None:
    layers, every = int(GOLDEN[f"{case}_L"]), int(GOLDEN[f"{case}_every"])
    weights = [golden(f"{case}_{start}_w0_{i}").clone() for i in range(layers)]
    left, right, count = golden(f"{case}_U"), golden(f"{case}_V"), len(GOLDEN[f"{case}_sv"])
    modes, losses = [], []
    for step in range(int(GOLDEN[f"{case}_steps"]) + 1):
        directions, error = dl.chain_gradients(weights, golden(f"{case}_Syx"))
        if step % every == 0:
            rotated = left.T @ dl.end_to_end(weights) @ right
            modes.append(rotated.diagonal()[:count])
            losses.append(error.square().sum() / 2)
        if step < int(GOLDEN[f"{case}_steps"]):
            weights = [w + float(GOLDEN[f"{case}_lr"]) * g for w, g in zip(weights, directions, strict=True)]
    torch.testing.assert_close(torch.stack(modes), golden(f"{case}_{start}_modes"), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.stack(losses), golden(f"{case}_{start}_loss"), rtol=1e-10, atol=1e-10)
    for i, weight in enumerate(weights):
        torch.testing.assert_close(weight, golden(f"{case}_{start}_wT_{i}"), rtol=1e-10, atol=1e-10)


def test_two_layers_follow_the_golden_formula() -> None:
    ours = dl.mode_strength(golden("L2_t"), golden("L2_sv"), float(GOLDEN["L2_a0"]))
    torch.testing.assert_close(ours, golden("L2_theory"), rtol=1e-10, atol=1e-10)
    times = dl.half_time(golden("L2_sv"), float(GOLDEN["L2_a0"]))
    torch.testing.assert_close(times, golden("L2_half_time_theory"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ["L2", "L4"])
def test_integrated_equation_equals_the_golden_theory(case: str) -> None:
    """To 1e-6: both integrate with steps of their own."""
    lr, every = float(GOLDEN[f"{case}_lr"]), int(GOLDEN[f"{case}_every"])
    singular = golden(f"{case}_sv")
    strength = torch.full_like(singular, float(GOLDEN[f"{case}_a0"]))
    rows = [strength]
    for _ in range(int(GOLDEN[f"{case}_steps"])):
        strength = dl.mode_step(strength, singular, int(GOLDEN[f"{case}_L"]), lr)
        rows.append(strength)
    torch.testing.assert_close(torch.stack(rows[::every]), golden(f"{case}_theory"), rtol=0, atol=1e-6)


def test_aligned_start_has_the_golden_product() -> None:
    """The hidden rotations are random, the product is not."""
    start = dl.aligned_start(golden("L4_Syx"), 2, [6, 8, 8, 8, 5], float(GOLDEN["L4_a0"]), generator())
    expected = dl.end_to_end([golden(f"L4_al_w0_{i}") for i in range(4)])
    torch.testing.assert_close(dl.end_to_end(start), expected, rtol=1e-10, atol=1e-12)


# 2. property


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_aligned_start_is_balanced() -> None:
    """W_{l+1}^T W_{l+1} = W_l W_l^T: what keeps the modes' equation exact."""
    start = dl.aligned_start(golden("L4_Syx"), 2, [6, 8, 8, 8, 5], 0.05, generator())
    for below, above in pairwise(start):
        torch.testing.assert_close(above.T @ above, below @ below.T, rtol=0, atol=1e-12)


def test_orthogonal_start_has_equal_singular_values_and_a_gaussian_one_has_not() -> None:
    sizes = [16] * 9
    spread = {}
    for name, draw in (("orth", dl.orthogonal_start), ("gauss", dl.gaussian_start)):
        values = torch.linalg.svdvals(dl.end_to_end(draw(sizes, 1.0, generator())))
        spread[name] = float(values[0] / values[-1])
    assert spread["orth"] == pytest.approx(1.0, abs=1e-9)
    assert spread["gauss"] > 1e3


def test_whitened_inputs_have_unit_variance_in_every_direction() -> None:
    """With the inputs as targets Sigma_yx Sigma_yx^T is their covariance."""
    inputs = torch.randn(50, 6, generator=generator(), dtype=torch.float64) * torch.arange(1, 7)
    correlation = whitened_correlation(inputs, inputs, dims=6)
    centred = inputs - inputs.mean(0)
    torch.testing.assert_close(correlation @ correlation.T, centred.T @ centred / 50, rtol=1e-9, atol=1e-9)


def test_singular_values_of_a_tree_fall_by_level() -> None:
    """8 leaves: shared ancestors give eigenvalues 15, 7, 3, 3, 1, 1, 1, 1 of Y Y^T (by hand)."""
    values = torch.linalg.svdvals(Tree(3).correlation()) ** 2 * 8
    torch.testing.assert_close(values, torch.tensor([15.0, 7, 3, 3, 1, 1, 1, 1]).double(), rtol=0, atol=1e-9)


# 3. gradient


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_directions_are_autograds(dtype: torch.dtype, tolerance: float) -> None:
    weights = [golden(f"L4_rn_w0_{i}").clone().requires_grad_() for i in range(4)]
    loss = (golden("L4_Syx") - dl.end_to_end(weights)).square().sum() / 2
    expected = torch.autograd.grad(loss, weights)
    directions, _ = dl.chain_gradients([w.detach().to(dtype) for w in weights], golden("L4_Syx").to(dtype))
    for ours, gradient in zip(directions, expected, strict=True):
        torch.testing.assert_close(-ours.double(), gradient, rtol=tolerance, atol=tolerance)


# 4. module and resume


def modes_module() -> L.LightningModule:
    return dl.DeepLinearModes(["aligned", "gauss_small"], a0=1e-3, lr=0.01, steps_per_epoch=50)


def depth_module() -> L.LightningModule:
    return dl.DeepLinearDepth("gauss", [2, 4], width=8, half_octaves=(-8, 2), steps_per_epoch=3)


def fit(
    module: L.LightningModule, data: L.LightningDataModule, epochs: int, ckpt: Path | None = None
) -> tuple[L.LightningModule, L.Trainer]:
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


def metrics_of(trainer: L.Trainer) -> dict[str, float]:
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("build", [modes_module, depth_module])
def test_three_epochs_equal_one_and_a_resume_of_two(build: Any, tmp_path: Path) -> None:
    L.seed_everything(4)
    data = RandomModes([3.0, 2.0, 1.0])
    whole, whole_trainer = fit(build(), data, 3)
    fit(build(), data, 1)[1].save_checkpoint(tmp_path / "one.ckpt")
    resumed, trainer = fit(build(), data, 3, tmp_path / "one.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert metrics_of(trainer) == metrics_of(whole_trainer)


def test_half_times_are_those_of_the_formula_to_a_step() -> None:
    """Euler steps of 0.002: one step and the Euler error, which the spec's prototype puts at 0.4 %."""
    L.seed_everything(4)
    module = dl.DeepLinearModes(["aligned"], a0=1e-2, steps_per_epoch=1500)
    metrics = metrics_of(fit(module, RandomModes([4.0, 2.0, 1.0]), 1)[1])
    times = dl.half_time(torch.tensor([4.0, 2.0, 1.0]), 1e-2)
    for k, expected in enumerate(times.tolist(), start=1):
        assert metrics[f"half_time/aligned_{k}"] == pytest.approx(expected, rel=0.01)
    assert metrics["ordered/aligned"] == 1


def test_half_time_is_infinite_until_it_is_reached() -> None:
    L.seed_everything(4)
    module = dl.DeepLinearModes(["aligned"], a0=1e-2, steps_per_epoch=2)
    metrics = metrics_of(fit(module, RandomModes([4.0, 2.0]), 1)[1])
    assert metrics["half_time/aligned_1"] == math.inf
    assert metrics["ordered/aligned"] == 0


def test_depth_counts_the_steps_of_the_fastest_rate() -> None:
    """Against a plain loop over the learning rates."""
    L.seed_everything(4)
    data = RandomModes([3.0, 2.0, 1.0])
    module = dl.DeepLinearDepth("orth", [2], width=8, half_octaves=(-8, 0), steps_per_epoch=200)
    metrics = metrics_of(fit(module, data, 1)[1])
    start = dl.orthogonal_start([8, 8, 8], 1.0, dl.make_generator("start/2"))
    correlation = data.correlation().float()
    found = {}
    for octave in range(-8, 1):
        weights = [weight.float() for weight in start]
        for step in range(200):
            directions, error = dl.chain_gradients(weights, correlation)
            if error.square().sum() <= 0.05 * correlation.square().sum():
                found[2 ** (octave / 2)] = step
                break
            weights = [w + 2 ** (octave / 2) * g for w, g in zip(weights, directions, strict=True)]
    best = min(found, key=lambda rate: found[rate])
    assert metrics["steps/L2"] == found[best]
    assert metrics["best_lr/L2"] == pytest.approx(best)


def test_a_depth_where_every_net_diverges_counts_all_steps_as_made() -> None:
    L.seed_everything(4)
    module = dl.DeepLinearDepth("gauss", [4], width=8, half_octaves=(20, 22), steps_per_epoch=7)
    metrics = metrics_of(fit(module, RandomModes([3.0, 2.0]), 2)[1])
    assert (metrics["steps/L4"], metrics["reached/L4"]) == (14, 0)


# 5. recipes


def test_mini_recipe_makes_its_first_steps(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    words = ["--config", "deep_linear/mini-modes", "--seed_everything", "0", "--runs", str(tmp_path)]
    words += ["--trainer.max_epochs", "1", "--wandb", "false", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", *words]) == 0
    (record,) = tmp_path.glob("deep_linear/mini-modes/*/seed0/record.json")
    metrics = json.loads(record.read_text())["metrics"]
    # 300 steps of 0.002; the Euler error of the spec's prototype is 0.0085 at its largest
    expected = dl.mode_strength(torch.tensor(0.6).double(), torch.tensor([4.0, 2, 1]).double(), 1e-4)
    assert metrics["mode/aligned_1_last"] == pytest.approx(float(expected[0]), abs=0.0085 * 4)
    assert metrics["theory/1_last"] == pytest.approx(float(expected[0]), rel=1e-6)


@pytest.mark.parametrize("path", recipes.recipe_files("deep_linear"), ids=recipes.recipe_name)
def test_header_states_the_parameters(path: Path) -> None:
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for document in recipes.expand(path):
        model |= document["model"].get("init_args", {}) if "model" in document else {}
        data |= document["data"].get("init_args", {}) if "data" in document else {}
    if "levels" in data:
        inputs, outputs = 2 ** data["levels"], 2 ** (data["levels"] + 1) - 1
    else:
        inputs, outputs = (data["dims"], 10) if "dims" in data else (data["num_inputs"], data["num_outputs"])
    count = 0
    for depth in model.get("depths", [model.get("num_layers")]):
        sizes = [inputs, *[model["width"]] * (depth - 1), outputs]
        count += sum(a * b for a, b in pairwise(sizes))
    low, high = model.get("half_octaves", (1, len(model.get("starts", []))))
    assert f", {count * (high - low + 1):,} parameters" in recipes.header(path)[4]


# 6. bad input


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandomModes([]), "data.singular_values must be positive numbers, at least one, got []"),
        (
            lambda: RandomModes([1.0, -2.0]),
            "data.singular_values must be positive numbers, at least one, got [1.0, -2.0]",
        ),
        (lambda: RandomModes([1.0] * 9), "data.singular_values: at most 8 fit 8 inputs and 8 outputs, got 9"),
        (lambda: Tree(0), "data.levels must be between 1 and 10, got 0"),
        (lambda: dl.DeepLinearModes([]), "model.starts must be at least one, all different, got []"),
        (lambda: dl.DeepLinearModes(["aligned"], a0=0.0), "model.a0 and model.lr must be positive, got 0.0 and 0.002"),
        (lambda: dl.DeepLinearDepth("orth", [0]), "model.depths must be at least 1 and all different, got [0]"),
        (lambda: dl.DeepLinearDepth("orth", [2], threshold=1.0), "model.threshold must be in (0, 1), got 1.0"),
    ],
)
def test_impossible_settings_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (dl.DeepLinearModes(["aligned"], width=2), "model.width must be at least the number of modes 3, got 2"),
        (dl.DeepLinearModes(["aligned"], a0=1.5), "model.a0 must be below the weakest singular value 1, got 1.5"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(module: L.LightningModule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(module, RandomModes([3.0, 2.0, 1.0]), 1)


def test_more_whitened_directions_than_pixels_vary_are_refused() -> None:
    source = SyntheticImages(num_classes=2, channels=1, size=2, per_class=10)
    with pytest.raises(ValueError, match=r"data.dims must be between 1 and the 4 directions .* vary, got 5"):
        WhitenedImages(source, dims=5).correlation()
