"""Observables of nets side by side: reference, property. Serves the SGD-noise paper (arXiv 2301.13703)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_modules.stacks import nets, observables

FOLDER = Path(__file__).parent / "golden"
GOLDEN = {**np.load(FOLDER / "sgd_noise.npz"), **np.load(FOLDER / "sgd_noise_observables.npz")}
"""Official functions (AntonioScl/SGD_learning_regimes), float64: d = 6, h = 8, three hidden layers, 12 points."""
PHIS = ["relu", "gelu"]


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name])).double()


def stack_of_one(phi: str, part: str) -> list[Tensor]:
    return [golden(f"mlp_{phi}_{part}_{layer}").unsqueeze(0) for layer in range(4)]


def factors(phi: Any, part: str, rows: slice = slice(None)) -> list[tuple[Tensor, Tensor]]:
    scales = nets.layer_scales(6, 8, 3, float(GOLDEN[f"act_c_{phi}"]))
    return observables.layer_factors(stack_of_one(phi, part), golden("x")[rows].unsqueeze(0), scales, phi)


def kernel(phi: str, part: str) -> Tensor:
    return observables.kernel(factors(phi, part))


def close(ours: Tensor, theirs: Tensor | float, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(theirs, dtype=ours.dtype), rtol=tolerance, atol=tolerance)


# 1. reference


@pytest.mark.parametrize("part", ["0", "1"])
@pytest.mark.parametrize("phi", PHIS)
def test_kernel_equals_the_golden_one(phi: str, part: str) -> None:
    close(kernel(phi, f"w{part}")[0], golden(f"mlp_{phi}_ntk{part}"))


@pytest.mark.parametrize("phi", PHIS)
def test_kernel_statistics_equal_the_golden_values(phi: str) -> None:
    found = observables.kernel_statistics(kernel(phi, "w1"), kernel(phi, "w0"), golden("y").unsqueeze(0))
    for ours, name in zip(found, ("change", "norm", "yky", "y_norm"), strict=True):
        close(ours[0], golden(f"mlp_{phi}_kernel_{name}"))


@pytest.mark.parametrize("phi", PHIS)
def test_gradient_statistics_equal_the_golden_values(phi: str) -> None:
    output, labels, matrix = golden(f"mlp_{phi}_pred1").unsqueeze(0), golden("y").unsqueeze(0), kernel(phi, "w1")
    slopes = observables.loss_slopes(output, labels, golden("alpha").view(1))
    for letter, given in (("f", None), ("l", slopes)):
        signal, noise = observables.gradient_statistics(matrix, given)
        close(signal[0], golden(f"mlp_{phi}_grad_{letter}_norm1"))
        close(noise[0], golden(f"mlp_{phi}_grad_{letter}_var1"))


@pytest.mark.parametrize("phi", PHIS)
def test_fit_statistics_equal_the_golden_values(phi: str) -> None:
    """Their error is a float32."""
    output, labels = golden(f"mlp_{phi}_pred1").unsqueeze(0), golden("y").unsqueeze(0)
    found = observables.fit_statistics(output, labels, golden("alpha").view(1))
    close(found.loss[0], golden(f"mlp_{phi}_loss1"))
    assert int(found.n_unfitted) == int(GOLDEN[f"mlp_{phi}_nd1"])
    close(found.error[0], golden(f"mlp_{phi}_err1"), 1e-7)
    close(found.min_margin[0], float((GOLDEN[f"mlp_{phi}_pred1"] * GOLDEN["y"]).min()))


@pytest.mark.parametrize("phi", PHIS)
def test_running_loss_equals_the_golden_estimate(phi: str) -> None:
    """It starts from the full loss at w0, where o = 0: 1 / alpha."""
    estimate = 1 / golden("alpha").view(1)
    for batch_loss in golden(f"mlp_{phi}_sgd_batchloss"):
        estimate = observables.running_loss(estimate, batch_loss.view(1), torch.tensor([12]), 4)
    close(estimate[0], golden(f"mlp_{phi}_sgd_until_loss"))


@pytest.mark.parametrize("phi", PHIS)
def test_mean_relative_distance_equals_the_golden_value(phi: str) -> None:
    found = observables.mean_relative_distance(golden(f"mlp_{phi}_pred1").unsqueeze(0))
    close(found[0], golden(f"mlp_{phi}_mean_relative_distance"))


def test_perceptron_observables_equal_the_golden_values_with_their_slips() -> None:
    start, weights = (golden(name).unsqueeze(0) for name in ("lin_w0", "lin_w1"))
    inputs, labels = golden("dep_x").unsqueeze(0), golden("dep_y").unsqueeze(0)
    found = observables.perceptron_observables(weights, start, inputs, labels, golden("alpha").view(1))
    close(found.ampli_factor[0], golden("lin_ampli_factor"))
    close(found.first[0], golden("lin_dw1"))
    close(torch.cat([found.first_squared, found.others_squared]), golden("lin_dw"))
    close(found.mean_x1_unfit[0], golden("lin_mean_x1_unfit"))


# 2. property


def test_lambda_is_the_ratio_of_signal_and_spread() -> None:
    close(observables.signal_to_spread(torch.tensor([[6.0, 3.0, 4.0], [-1.0, 0.0, 2.0]]).unsqueeze(-1))[0], 1.2)
    close(observables.signal_to_spread(torch.tensor([[-1.0, 0.0, 2.0]]).unsqueeze(-1))[0], -0.5)


def test_cross_kernel_is_the_block_of_the_whole_kernel() -> None:
    found = observables.kernel(factors("gelu", "w1", slice(0, 5)), factors("gelu", "w1", slice(5, 12)))
    close(found, kernel("gelu", "w1")[:, :5, 5:])


def test_factors_are_autograds_gradients_for_every_net_of_a_stack() -> None:
    generator = torch.Generator().manual_seed(0)
    single = [nets.draw_weights(4, 5, 2, generator) for _ in range(3)]
    weights = [torch.stack(layer).double() for layer in zip(*single, strict=True)]
    inputs = torch.randn(3, 7, 4, generator=generator, dtype=torch.float64)
    scales = nets.layer_scales(4, 5, 2, nets.activation_norm("silu"))
    found = observables.layer_factors(weights, inputs, scales, "silu")
    leaves = [weight.clone().requires_grad_() for weight in weights]
    for point in range(7):
        output = nets.forward(leaves, inputs[:, point : point + 1], scales, "silu").sum()
        for (a, delta), gradient in zip(found, torch.autograd.grad(output, leaves), strict=True):
            close(a[:, point].unsqueeze(-1) * delta[:, point].unsqueeze(-2), gradient)


def test_overlap_is_the_cosine_of_the_mean_gradients() -> None:
    """Against gradients written out as vectors."""
    left, right = factors("gelu", "w1", slice(0, 5)), factors("gelu", "w1", slice(5, 12))
    slopes = [golden("y")[:5].unsqueeze(0), golden("y")[5:].unsqueeze(0).clamp(min=0)]
    means = [
        torch.cat([torch.einsum("num,nuk,nu->nmk", a, delta, weight).flatten() for a, delta in side])
        for side, weight in zip((left, right), slopes, strict=True)
    ]
    kernels = observables.kernel(left), observables.kernel(right), observables.kernel(left, right)
    found = observables.gradient_overlap(*kernels, *slopes)
    close(found[0], torch.cosine_similarity(means[0], means[1], dim=0))


def test_overlap_with_itself_is_one() -> None:
    matrix = kernel("relu", "w1")
    close(observables.gradient_overlap(matrix, matrix, matrix)[0], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_or_broken_kernel_has_no_inverse_form(dtype: torch.dtype) -> None:
    """Rank 3 of 5, and one with an infinity; the regular one beside them keeps its value, 5 / 4 / 25."""
    basis = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    kernels = torch.stack([basis @ basis.T, torch.eye(5, dtype=dtype) * torch.inf, 4 * torch.eye(5, dtype=dtype)])
    found = observables.kernel_statistics(kernels, kernels, torch.ones(3, 5, dtype=dtype)).inverse_alignment
    assert found.isnan().tolist() == [True, True, False]
    close(found[2], 0.05, 1e-6)


def test_output_that_is_not_finite_is_an_error_and_unfitted() -> None:
    output = torch.tensor([[torch.inf, torch.nan, 2.0, -2.0]])
    found = observables.fit_statistics(output, torch.ones(1, 4), torch.ones(1))
    assert (float(found.error), int(found.n_unfitted)) == (0.75, 3)


def test_relative_change_is_over_all_layers() -> None:
    """Eight weights of 1, one of which moves by 2."""
    start = [torch.ones(1, 1, 4), torch.full((1, 4, 1), 1.0)]
    now = [start[0].clone(), start[1] + torch.tensor([[[0.0], [0.0], [0.0], [2.0]]])]
    squares, moved = observables.layer_norms(now, start)
    assert squares.tolist() == [[4, 12]]
    assert moved.tolist() == [[0, 4]]
    close(observables.relative_change(now, start)[0], 0.5**0.5, 1e-6)
