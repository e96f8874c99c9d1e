"""Convolutional nets side by side: the small MNAS-like net of the SGD-noise paper.

Legend: N nets, B images, C channels, h width. One net's weights are a list of tensors, a stack's have N in front.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.stacks import nets
from lightning_modules.stacks.architectures import Architecture

BLOCKS = ((1, 5, 2), (1, 5, 1), (3, 5, 2), (3, 5, 1))
"""Inverted residuals: output channels in units of h, kernel, stride."""


def same_pad(inputs: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around images so that a convolution gives ceil(size / stride); the odd one goes below and to the right.

    PyTorch's own padding is the same on both sides: at stride 2 and even sizes it shifts the grid by a pixel.
    """
    pads = []
    for size in (inputs.shape[-1], inputs.shape[-2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(inputs, pads)


def convolve(inputs: Tensor, weight: Tensor, stride: int = 1, depthwise: bool = False) -> Tensor:
    """Convolution with `same_pad`, without bias, divided by the square root of its fan-in.

    Args:
        inputs: (B, C, H, W).
        weight: (out, C, k, k), or (C, 1, k, k) if depthwise; entries of order one.
        stride: 1 or 2.
        depthwise: each channel with its own kernel.

    Returns:
        (B, out, ceil(H / stride), ceil(W / stride)).
    """
    kernel = weight.shape[-1]
    scaled = weight / math.sqrt(weight[0].numel())
    groups = inputs.shape[1] if depthwise else 1
    return F.conv2d(same_pad(inputs, kernel, stride), scaled, stride=stride, groups=groups)


def mnas_shapes(channels: int, width: int) -> list[tuple[int, ...]]:
    """Shapes of the eighteen tensors of `mnas`, in the order of its layers: 16 convolutions, last layer, its bias.

    Args:
        channels: of the images.
        width: h.
    """
    shapes: list[tuple[int, ...]] = [(4 * width, channels, 5, 5), (4 * width, 1, 5, 5), (2 * width, 4 * width, 1, 1)]
    for units, kernel, _ in BLOCKS:
        before, middle = shapes[-1][0], 3 * shapes[-1][0]
        shapes += [(middle, before, 1, 1), (middle, 1, kernel, kernel), (units * width, middle, 1, 1)]
    return [*shapes, (20 * width, 3 * width, 1, 1), (20 * width, 1), (1,)]


def mnas(weights: list[Tensor], inputs: Tensor, activation: nets.Activation, norm: float) -> Tensor:
    """f(w, x) of one net: inverted residuals between two convolutions, global mean, linear with mean-field scaling.

    Args:
        weights: of `mnas_shapes`, N(0, 1) at the start.
        inputs: (B, C, H, W).
        activation: phi.
        norm: c by which phi is divided.

    Returns:
        (B,).

    Source: arXiv 2301.13703, official code: `mnas`; the bias of the last layer is divided by its fan-in too.
    """

    def act(features: Tensor) -> Tensor:
        return nets.activate(features, activation) / norm

    *kernels, last, bias = weights
    features = act(convolve(inputs, kernels[0], stride=2))
    features = act(convolve(features, kernels[1], depthwise=True))
    features = act(convolve(features, kernels[2]))
    for number, (_, _, stride) in enumerate(BLOCKS):
        widen, middle, narrow = kernels[3 + 3 * number : 6 + 3 * number]
        block = act(convolve(features, widen))
        block = act(convolve(block, middle, stride, depthwise=True))
        block = convolve(block, narrow)
        features = (block + features) / math.sqrt(2) if block.shape == features.shape else block
    features = act(convolve(features, kernels[15])).mean((-2, -1))
    return (features @ last[:, 0] + bias) / len(last)


class MNAS(Architecture):
    """Stack of `mnas`.

    On a CPU the nets are computed one after the other, so that a net's bits do not depend on its stack: at h = 32 four
    nets in grouped convolutions were no faster (at h = 4 sixteen were 1.6x). On other devices `torch.func.vmap` makes
    grouped convolutions.

    Args:
        width: h.
        activation: relu, gelu (tanh form) or silu.
    """

    def __init__(self, width: int = 64, activation: nets.Activation = "relu") -> None:
        if width < 1:
            raise ValueError(f"model.stack.width must be at least 1, got {width}")
        self.width, self.activation = width, activation

    def prepare(self, points: Tensor) -> Tensor:
        """(n, C, H, W); points without a channel axis get one."""
        return points if points.ndim == 4 else points.unsqueeze(1)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
        """All N(0, 1)."""
        return [torch.randn(size, generator=generator) for size in mnas_shapes(shape[0], self.width)]

    def forward(self, weights: list[Tensor], inputs: Tensor) -> Tensor:
        """f(w, x) (N, B)."""
        if inputs.device.type != "cpu":
            return torch.func.vmap(self.single)(weights, inputs)
        nets_alone = zip(*weights, strict=True)
        return torch.stack([self.single(list(net), points) for net, points in zip(nets_alone, inputs, strict=True)])

    @torch.enable_grad()
    def update_(
        self, weights: list[Tensor], inputs: Tensor, offset: Tensor, delta_of: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """As in `nets.update_`, by autograd."""
        leaves = [weight.detach().requires_grad_() for weight in weights]
        output = self.forward(leaves, inputs)
        centred = output.detach() - offset
        moves = torch.autograd.grad(output, leaves, delta_of(centred))
        with torch.no_grad():
            for weight, move in zip(weights, moves, strict=True):
                weight += move
        return centred

    def single(self, weights: list[Tensor], inputs: Tensor) -> Tensor:
        """f(w, x) (B,) of one net."""
        return mnas(weights, inputs, self.activation, nets.activation_norm(self.activation))


def jacobian_kernel(
    function: Callable[[list[Tensor], Tensor], Tensor], weights: list[Tensor], inputs: Tensor
) -> Tensor:
    """K = J J^T of any nets, net by net and tensor by tensor; `observables.kernel` is the cheaper way for an MLP.

    Args:
        function: f of one net, from its weights and (1, ...) inputs to (1,).
        weights: the stack.
        inputs: (N, m, ...).

    Returns:
        (N, m, m).
    """

    def gradient(net: list[Tensor], point: Tensor) -> list[Tensor]:
        return torch.func.grad(lambda w: function(w, point.unsqueeze(0))[0])(net)

    kernels = []
    for index, points in enumerate(inputs):
        parts = torch.func.vmap(gradient, (None, 0), chunk_size=64)([weight[index] for weight in weights], points)
        kernels.append(sum(part.flatten(1) @ part.flatten(1).T for part in parts))
    return torch.stack(kernels)  # type: ignore[arg-type]
