"""Convolutional nets side by side: reference, property, gradient. Serves the SGD-noise paper (arXiv 2301.13703)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_modules.stacks import cnn, nets, observables

GOLDEN = {
    **np.load(Path(__file__).parent / "golden" / "sgd_noise.npz"),
    **np.load(Path(__file__).parent / "golden" / "sgd_noise_observables.npz"),
}
"""Official functions (AntonioScl/SGD_learning_regimes), float64: the MNAS net with h = 1 on three images."""
NAMES = ["conv2_d/w", *(f"conv2_d_{number}/w" for number in range(1, 16)), "linear/w", "linear/b"]


def golden_weights() -> list[Tensor]:
    """Of one net; convolutions from (k, k, in, out) to (out, in, k, k)."""
    arrays = [torch.from_numpy(GOLDEN[f"mnas_p_{name}"]) for name in NAMES]
    return [array.permute(3, 2, 0, 1).contiguous() if array.ndim == 4 else array for array in arrays]


def golden_inputs() -> Tensor:
    return torch.from_numpy(GOLDEN["mnas_x"]).permute(0, 3, 1, 2)


def golden_net(weights: list[Tensor], inputs: Tensor) -> Tensor:
    return cnn.mnas(weights, inputs, "relu", float(GOLDEN["act_c_relu"]))


def stack(count: int, width: int = 2, size: int = 8) -> tuple[cnn.MNAS, list[Tensor], Tensor, Tensor]:
    """An architecture with `count` nets, and images and labels for each, float64."""
    generator, arch = torch.Generator().manual_seed(0), cnn.MNAS(width)
    single = [arch.draw((3, size, size), generator) for _ in range(count)]
    inputs = torch.randn(count, 5, 3, size, size, generator=generator, dtype=torch.float64)
    labels = torch.randn(count, 5, generator=generator, dtype=torch.float64).sign()
    return arch, [torch.stack(layer).double() for layer in zip(*single, strict=True)], inputs, labels


# 1. reference


def test_output_equals_the_golden_values() -> None:
    found = golden_net(golden_weights(), golden_inputs())
    torch.testing.assert_close(found, torch.from_numpy(GOLDEN["mnas_out"]), rtol=1e-10, atol=1e-10)


def test_gradients_have_the_golden_squared_norms() -> None:
    assert GOLDEN["mnas_names"].tolist() == NAMES
    leaves = [weight.requires_grad_() for weight in golden_weights()]
    gradients = torch.autograd.grad(golden_net(leaves, golden_inputs()).sum(), leaves)
    norms = torch.stack([gradient.square().sum() for gradient in gradients])
    torch.testing.assert_close(norms, torch.from_numpy(GOLDEN["mnas_grad_sqnorm"]), rtol=1e-10, atol=1e-10)


def test_shapes_are_those_of_the_official_weights() -> None:
    assert cnn.mnas_shapes(1, 1) == [tuple(weight.shape) for weight in golden_weights()]


# 2. property


@pytest.mark.parametrize(("size", "pads"), [(28, (1, 2)), (32, (1, 2)), (14, (1, 2)), (7, (2, 2))])
def test_padding_at_stride_two_is_that_of_same(size: int, pads: tuple[int, int]) -> None:
    """A single one in the corner tells where the zeros are."""
    image = torch.zeros(1, 1, size, size)
    image[..., 0, 0] = 1
    padded = cnn.same_pad(image, 5, 2)
    assert padded.nonzero()[0].tolist() == [0, 0, pads[0], pads[0]]
    assert padded.shape[-2:] == (size + sum(pads), size + sum(pads))


def test_net_is_bit_equal_in_any_stack() -> None:
    arch, weights, inputs, _ = stack(3)
    found = arch.forward(weights, inputs)
    assert torch.equal(found[1:2], arch.forward([weight[1:2] for weight in weights], inputs[1:2]))
    assert not torch.equal(found[1], found[2])


def test_grouped_convolutions_compute_what_the_nets_compute_alone() -> None:
    """The way taken off the CPU, here on it."""
    arch, weights, inputs, _ = stack(3)
    grouped = torch.func.vmap(arch.single)(weights, inputs)
    torch.testing.assert_close(grouped, arch.forward(weights, inputs), rtol=1e-12, atol=1e-12)


def test_forward_off_the_cpu_takes_grouped_convolutions() -> None:
    """On the meta device, which computes shapes alone."""
    arch, weights, inputs, _ = stack(3)
    assert arch.forward([weight.to("meta") for weight in weights], inputs.to("meta")).shape == (3, 5)


def test_kernel_by_jacobians_is_the_layerwise_one() -> None:
    """On a perceptron of two layers, where both ways exist."""
    generator = torch.Generator().manual_seed(0)
    single = [nets.draw_weights(4, 5, 2, generator) for _ in range(2)]
    weights = [torch.stack(layer).double() for layer in zip(*single, strict=True)]
    inputs = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    scales = nets.layer_scales(4, 5, 2, nets.activation_norm("gelu"))

    def single_net(net: list[Tensor], points: Tensor) -> Tensor:
        return nets.forward([weight.unsqueeze(0) for weight in net], points.unsqueeze(0), scales, "gelu")[0]

    layerwise = observables.kernel(observables.layer_factors(weights, inputs, scales, "gelu"))
    found = cnn.jacobian_kernel(single_net, weights, inputs)
    torch.testing.assert_close(found, layerwise, rtol=1e-12, atol=1e-12)


# 3. gradient


def test_update_is_a_step_of_each_net_alone() -> None:
    """Hinge loss of the margin, step by autograd of the net alone, alpha and learning rate differing."""
    arch, weights, inputs, labels = stack(3)
    offset = arch.forward(weights, inputs) - 0.02 * labels
    alpha, lr = (torch.tensor(v, dtype=torch.float64).unsqueeze(-1) for v in ([1.0, 40.0, 99.0], [0.5, 1.0, 2.0]))

    def delta(output: Tensor) -> Tensor:
        return (alpha * output * labels < 1) * labels * lr / labels.shape[1]

    after = [weight.clone() for weight in weights]
    output = arch.update_(after, inputs, offset, delta)
    torch.testing.assert_close(output, 0.02 * labels, rtol=1e-10, atol=1e-10)
    norm = nets.activation_norm("relu")
    for index in range(3):
        leaves: Any = [weight[index].clone().requires_grad_() for weight in weights]
        predicted = cnn.mnas(leaves, inputs[index], "relu", norm) - offset[index]
        loss = (1 - alpha[index] * predicted * labels[index]).relu().mean() / alpha[index, 0]
        gradients = torch.autograd.grad(loss, leaves)
        for old, new, gradient in zip(weights, after, gradients, strict=True):
            expected = old[index] - lr[index, 0] * gradient
            torch.testing.assert_close(new[index], expected, rtol=1e-10, atol=1e-12)
    # alpha o y = 1.98 in the last: fitted
    assert all(torch.equal(old[2], new[2]) for old, new in zip(weights, after, strict=True))
    assert not torch.equal(weights[0][0], after[0][0])


def test_width_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.stack\.width must be at least 1, got 0"):
        cnn.MNAS(0)
