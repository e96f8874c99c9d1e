"""Fully connected nets side by side: forward, and one SGD step of the margin loss written by hand.

Legend: N nets, B batch, d inputs, h width, k hidden layers. Weights of a stack: k + 1 tensors (N, in, out), the last
(N, h, 1); k = 0 is the perceptron. All weights start as N(0, 1); the constants outside stand in `layer_scales`.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["relu", "gelu", "silu"]


def activate(inputs: Tensor, activation: Activation) -> Tensor:
    """phi, not normalised; gelu in its tanh form."""
    if activation == "gelu":
        return F.gelu(inputs, approximate="tanh")
    return F.relu(inputs) if activation == "relu" else F.silu(inputs)


@functools.cache
def activation_norm(activation: Activation) -> float:
    """c = sqrt(E phi(z)^2) for z ~ N(0, 1), by which phi is divided.

    Source: arXiv 2301.13703, official code `AntonioScl/SGD_learning_regimes`, which takes a mean over 10^6 draws.
    """
    if activation == "relu":
        return math.sqrt(0.5)
    # Gauss-Hermite: phi is smooth
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)
    squares = activate(torch.from_numpy(nodes), activation).square()
    return math.sqrt(float(squares @ torch.from_numpy(weights)) / math.sqrt(2 * math.pi))


def layer_scales(inputs: int, width: int, depth: int, norm: float) -> list[float]:
    """What each layer's product is multiplied by: NTK scaling, mean-field output, 1/c of the activation before.

    Args:
        inputs: d.
        width: h.
        depth: k hidden layers; 0 is the perceptron w.x / sqrt(d).
        norm: c of `activation_norm`.

    Returns:
        k + 1 numbers: 1/sqrt(d), then 1/(c sqrt(h)) for each further hidden layer, 1/(c h) for the output.

    Source: arXiv 2301.13703, official code: hidden layers 1/sqrt(fan_in), output 1/h.
    """
    if depth == 0:
        return [1 / math.sqrt(inputs)]
    return [1 / math.sqrt(inputs), *[1 / (norm * math.sqrt(width))] * (depth - 1), 1 / (norm * width)]


def draw_weights(inputs: int, width: int, depth: int, generator: torch.Generator) -> list[Tensor]:
    """Weights of one net, (in, out) each, all N(0, 1)."""
    sizes = [inputs, *[width] * depth, 1]
    return [torch.randn(a, b, generator=generator) for a, b in itertools.pairwise(sizes)]


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right in one call."""
    if len(left) == 1 and right.shape[-1] == 1:
        # torch sends a single product to a matrix-vector routine, which adds in another order than those of a stack
        return _scaled_product(left.expand(2, -1, -1), right.expand(2, -1, -1), scale)[:1]
    return torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=scale)


def forward(weights: list[Tensor], inputs: Tensor, scales: list[float], activation: Activation) -> Tensor:
    """f(w, x) of each net.

    Args:
        weights: the stack.
        inputs: (N, B, d), each net its own points.
        scales: `layer_scales`.
        activation: phi.

    Returns:
        (N, B); autograd works, and a net's values do not depend on the others in the stack.
    """
    *hidden, last = zip(weights, scales, strict=True)
    for weight, scale in hidden:
        inputs = activate(_scaled_product(inputs, weight, scale), activation)
    return _scaled_product(inputs, *last).squeeze(-1)


def _back_through(grad: Tensor, before: Tensor, activation: Activation) -> Tensor:
    """grad * phi'(before)."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, before, 0)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, before, approximate="tanh")
    return torch.ops.aten.silu_backward(grad, before)


def ascend_(
    weights: list[Tensor],
    before: list[Tensor],
    after: list[Tensor],
    delta: Tensor,
    scales: list[float],
    phi: Activation,
) -> None:
    """Adds sum_b delta_b df(x_b)/dw to the weights, in place.

    Args:
        weights: the stack.
        before, after: (N, B, h) of each hidden layer before and after phi; `after` begins with the inputs (N, B, d).
        delta: (N, B).
        scales: `layer_scales`.
        phi: activation.
    """
    grad = (delta * scales[-1]).unsqueeze(-1)
    for layer in range(len(weights) - 1, -1, -1):
        below = None
        if layer:
            turned, scale = weights[layer].mT, scales[layer - 1]
            # the last layer has one column: a product of outer form
            back = grad * scale * turned if turned.shape[-2] == 1 else _scaled_product(grad, turned, scale)
            below = _back_through(back, before[layer - 1], phi)
        weights[layer].baddbmm_(after[layer].mT, grad)
        if below is not None:
            grad = below


def update_(
    weights: list[Tensor],
    inputs: Tensor,
    offset: Tensor,
    delta_of: Callable[[Tensor], Tensor],
    scales: list[float],
    activation: Activation,
) -> Tensor:
    """w <- w + sum_b delta_b df(x_b)/dw of every net, in place, delta a function of the nets' predictions.

    Args:
        weights: the stack; changed.
        inputs: (N, B, d).
        offset: (N, B) f(w_0, x), which the predictor o = f - f(w_0, x) subtracts.
        delta_of: from o (N, B) to delta (N, B).
        scales, activation: as in `forward`.

    Returns:
        o (N, B) before the step.
    """
    before, after = [], [inputs]
    for weight, scale in zip(weights[:-1], scales[:-1], strict=True):
        before.append(_scaled_product(after[-1], weight, scale))
        # relu's derivative can be told from its result, so that it needs no memory of its own
        after.append(before[-1].clamp_min_(0) if activation == "relu" else activate(before[-1], activation))
    output = _scaled_product(after[-1], weights[-1], scales[-1]).squeeze(-1) - offset
    ascend_(weights, before, after, delta_of(output), scales, activation)
    return output


def sgd_step_(
    weights: list[Tensor],
    inputs: Tensor,
    labels: Tensor,
    offset: Tensor,
    alpha: Tensor,
    lr: Tensor,
    scales: list[float],
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    r"""One step w <- w - lr grad mean_b relu(1 - alpha o_b y_b) / alpha of every net, in place, without autograd.

    dl/do = -y [alpha o y < 1]: alpha sets the margin and does not scale the gradient.

    Args:
        weights: the stack; changed.
        inputs, offset, scales, activation: as in `update_`.
        labels: (N, B) in {-1, +1}.
        alpha: (N,) output scale.
        lr: (N,) learning rate (paper: eta, code: dt).

    Returns:
        o (N, B) before the step, and which points are unfitted (N, B) bool.

    Source: arXiv 2301.13703; official code, dynamics `sgd`, loss `hinge`.
    """

    def unfitted(output: Tensor) -> Tensor:
        return alpha.unsqueeze(-1) * output * labels < 1

    def delta(output: Tensor) -> Tensor:
        return unfitted(output) * labels * (lr / labels.shape[1]).unsqueeze(-1)

    output = update_(weights, inputs, offset, delta, scales, activation)
    return output, unfitted(output)
