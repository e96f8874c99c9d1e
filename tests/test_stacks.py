"""Nets side by side: reference, property, gradient, bad input. Serves the SGD-noise paper (arXiv 2301.13703)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_modules.stacks import nets
from lightning_modules.stacks.batches import counter_subsets, splitmix64, take_points

GOLDEN = np.load(Path(__file__).parent / "golden" / "sgd_noise.npz")
"""Official functions (AntonioScl/SGD_learning_regimes), float64: d = 6, h = 8, three hidden layers, 12 points."""
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def golden(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name])).to(dtype)


def golden_weights(phi: str, part: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """A stack of one net."""
    return [golden(f"mlp_{phi}_{part}_{layer}", dtype).unsqueeze(0) for layer in range(4)]


def golden_scales(phi: str) -> list[float]:
    return nets.layer_scales(6, 8, 3, float(GOLDEN[f"act_c_{phi}"]))


# 1. reference


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("phi", ["relu", "gelu"])
def test_centred_predictor_equals_the_golden_values(phi: Any, dtype: torch.dtype, tolerance: float) -> None:
    inputs, scales = golden("x", dtype).unsqueeze(0), golden_scales(phi)
    start = nets.forward(golden_weights(phi, "w0", dtype), inputs, scales, phi)[0]
    torch.testing.assert_close(start, golden(f"mlp_{phi}_out0", dtype), rtol=tolerance, atol=tolerance)
    moved = nets.forward(golden_weights(phi, "w1", dtype), inputs, scales, phi)[0] - start
    torch.testing.assert_close(moved, golden(f"mlp_{phi}_pred1", dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("phi", ["relu", "gelu"])
def test_five_sgd_steps_equal_the_golden_trajectory(phi: Any, dtype: torch.dtype, tolerance: float) -> None:
    weights, scales = golden_weights(phi, "w0", dtype), golden_scales(phi)
    inputs, labels = golden("x", dtype).unsqueeze(0), golden("y", dtype).unsqueeze(0)
    offset = nets.forward(weights, inputs, scales, phi)
    alpha, lr = golden("alpha", dtype).view(1), golden("dt", dtype).view(1)
    losses = []
    for rows in golden(f"mlp_{phi}_sgd_idx", torch.int64):
        target = labels[:, rows]
        output, _ = nets.sgd_step_(weights, inputs[:, rows], target, offset[:, rows], alpha, lr, scales, phi)
        losses.append((1 - alpha * output * target).relu().mean() / alpha[0])
    torch.testing.assert_close(
        torch.stack(losses), golden(f"mlp_{phi}_sgd_batchloss", dtype), rtol=tolerance, atol=tolerance
    )
    for ours, theirs in zip(weights, golden_weights(phi, "sgd_w", dtype), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("phi", ["relu", "gelu"])
def test_step_on_all_points_is_the_golden_gradient_of_the_loss(phi: Any) -> None:
    """Some points are fitted at w1, so the margin's mask counts."""
    before, scales = golden_weights(phi, "w1"), golden_scales(phi)
    inputs, labels = golden("x").unsqueeze(0), golden("y").unsqueeze(0)
    offset = nets.forward(golden_weights(phi, "w0"), inputs, scales, phi)
    after = [weight.clone() for weight in before]
    lr = torch.ones(1, dtype=torch.float64)
    _, unfitted = nets.sgd_step_(after, inputs, labels, offset, golden("alpha").view(1), lr, scales, phi)
    assert int(unfitted.sum()) == int(GOLDEN[f"mlp_{phi}_nd1"])
    for old, new, gradient in zip(before, after, golden_weights(phi, "gradloss1"), strict=True):
        torch.testing.assert_close(old - new, gradient, rtol=1e-10, atol=1e-10)


def test_perceptron_equals_the_golden_values() -> None:
    output = nets.forward(
        [golden("lin_w1").unsqueeze(0)], golden("x").unsqueeze(0), nets.layer_scales(6, 1, 0, 1), "relu"
    )
    torch.testing.assert_close(output[0], golden("lin_out1"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("phi", ["relu", "gelu", "silu"])
def test_activation_norm_is_the_limit_of_the_official_mean(phi: Any) -> None:
    """Theirs is a mean over 10^6 draws: 2e-3 is above three of its standard errors."""
    assert nets.activation_norm(phi) == pytest.approx(float(GOLDEN[f"act_c_{phi}"]), rel=2e-3)


def test_first_numbers_of_splitmix64() -> None:
    """Seed 0 of the public-domain reference `splitmix64.c`."""
    counters = torch.arange(3) * gamma()
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [value % 2**64 for value in splitmix64(counters).tolist()] == expected


def gamma() -> int:
    """0x9E3779B97F4A7C15, the step of the reference's state, as int64."""
    return 0x9E3779B97F4A7C15 - 2**64


# 2. property


def stack(count: int, depth: int, inputs: int = 49, width: int = 32) -> list[Tensor]:
    """Nets of different starts."""
    single = [nets.draw_weights(inputs, width, depth, torch.Generator().manual_seed(k)) for k in range(count)]
    return [torch.stack(layer) for layer in zip(*single, strict=True)]


def train(chosen: slice, depth: int, batch: int, steps: int) -> list[Tensor]:
    """Trains a part of 64 nets on counter-based batches."""
    weights, keys = [w[chosen].clone() for w in stack(64, depth)], torch.arange(64)[chosen]
    generator = torch.Generator().manual_seed(7)
    pool, labels = torch.randn(200, 49, generator=generator), torch.randn(200, generator=generator).sign()
    points, scales = torch.full_like(keys, 200), nets.layer_scales(49, 32, depth, nets.activation_norm("relu"))
    alpha, lr = (2.0 ** (torch.arange(64) % 9))[chosen], (2.0 ** (torch.arange(64) % 5))[chosen]
    offset = torch.zeros(len(keys), batch)
    for rows in counter_subsets(keys, torch.zeros_like(keys), steps, points, batch):
        nets.sgd_step_(weights, pool[rows], labels[rows], offset, alpha, lr, scales, "relu")
    return weights


@pytest.mark.parametrize(("depth", "batch"), [(0, 2), (3, 16)])
@pytest.mark.parametrize("chosen", [slice(5, 6), slice(0, 16), slice(1, 64, 4)], ids=["alone", "chunk", "shard"])
def test_net_is_bit_equal_in_any_stack(depth: int, batch: int, chosen: slice) -> None:
    torch.set_num_threads(1)
    whole, part = train(slice(None), depth, batch, 200), train(chosen, depth, batch, 200)
    assert all(torch.equal(ours[chosen], theirs) for ours, theirs in zip(whole, part, strict=True))
    assert not torch.equal(part[0], stack(64, depth)[0][chosen])


def test_fitted_batch_changes_no_bit() -> None:
    weights, inputs = stack(3, 2), torch.randn(3, 4, 49, generator=torch.Generator().manual_seed(0))
    scales = nets.layer_scales(49, 32, 2, nets.activation_norm("relu"))
    labels = torch.ones(3, 4)
    # o = 1 and margin 1 / alpha = 1/2
    offset = nets.forward(weights, inputs, scales, "relu") - 1
    after = [weight.clone() for weight in weights]
    nets.sgd_step_(after, inputs, labels, offset, torch.full((3,), 2.0), torch.ones(3), scales, "relu")
    assert all(torch.equal(old, new) for old, new in zip(weights, after, strict=True))


def test_subsets_have_no_repeats_and_are_uniform() -> None:
    """Chi-square over the pairs drawn from 8 points; 27 degrees of freedom, 60 is beyond 1 - 3e-4."""
    keys = torch.arange(40)
    drawn = (
        counter_subsets(keys, torch.zeros_like(keys), 500, torch.full_like(keys, 8), 2).sort(-1).values.flatten(0, 1)
    )
    assert bool((drawn[:, 0] < drawn[:, 1]).all())
    counts = torch.bincount(drawn[:, 0] * 8 + drawn[:, 1], minlength=64).double()
    counts, expected = counts[counts > 0], 40 * 500 / 28
    assert len(counts) == 28
    assert float((counts - expected).square().sum() / expected) < 60


def test_batch_of_all_points_is_every_point() -> None:
    keys = torch.arange(3)
    drawn = counter_subsets(keys, torch.zeros_like(keys), 4, torch.full_like(keys, 6), 6)
    assert torch.equal(drawn.sort(-1).values, torch.arange(6).expand(4, 3, 6))


def test_draws_depend_on_the_step_alone() -> None:
    keys, points = torch.tensor([3, 9]), torch.tensor([50, 80])
    whole = counter_subsets(keys, torch.zeros(2, dtype=torch.int64), 30, points, 4)
    late = counter_subsets(keys[1:], torch.tensor([20]), 10, points[1:], 4)
    assert torch.equal(late[:, 0], whole[20:, 1])


def test_taken_points_are_those_of_indexing_and_use_the_memory_again() -> None:
    pool, out = torch.arange(30.0).view(5, 2, 3), torch.empty(0)
    first = take_points(pool, torch.tensor([[4, 0], [1, 1]]), out)
    assert torch.equal(first, pool[torch.tensor([[4, 0], [1, 1]])])
    second = take_points(pool, torch.tensor([[2, 3], [0, 4]]), out)
    assert torch.equal(second, pool[torch.tensor([[2, 3], [0, 4]])])
    assert second.data_ptr() == first.data_ptr()


# 3. gradient


@pytest.mark.parametrize("phi", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("depth", [0, 1, 5])
def test_step_is_autograds(phi: Any, depth: int) -> None:
    weights = [weight.double() for weight in stack(3, depth, inputs=6, width=8)]
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(3, 10, 6, generator=generator, dtype=torch.float64)
    labels = torch.randn(3, 10, generator=generator, dtype=torch.float64).sign()
    alpha, lr = (torch.tensor(v, dtype=torch.float64) for v in ([0.5, 2.0, 8.0], [0.1, 1.0, 3.0]))
    scales, offset = nets.layer_scales(6, 8, depth, nets.activation_norm(phi)), torch.zeros_like(labels)
    leaves = [weight.clone().requires_grad_() for weight in weights]
    margin = 1 - alpha[:, None] * nets.forward(leaves, inputs, scales, phi) * labels
    gradients = torch.autograd.grad((margin.relu().mean(1) / alpha).sum(), leaves)
    after = [weight.clone() for weight in weights]
    nets.sgd_step_(after, inputs, labels, offset, alpha, lr, scales, phi)
    for old, new, gradient in zip(weights, after, gradients, strict=True):
        torch.testing.assert_close(new, old - lr[:, None, None] * gradient, rtol=1e-12, atol=1e-12)


# 4. bad input


def test_batch_beyond_the_smallest_training_set_is_refused() -> None:
    keys = torch.arange(2)
    with pytest.raises(ValueError, match="a batch must not be larger than the training set 4, got 5"):
        counter_subsets(keys, torch.zeros_like(keys), 1, torch.tensor([9, 4]), 5)
