"""Kinds of nets that can stand side by side: how one is drawn, what a stack computes, how a stack is updated."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_modules.stacks import nets, observables


class Architecture(ABC):
    """A net as a recipe names it. A stack is a list of tensors (N, ...), one per layer.

    Attributes:
        depth: hidden layers, for the table of results.
    """

    depth: int = -1

    def describe(self) -> dict[str, Any]:
        """Name and settings, from which a member's id is made."""
        return {"class": type(self).__name__, **vars(self)}

    @abstractmethod
    def prepare(self, points: Tensor) -> Tensor:
        """Points (n, ...) in the shape that the nets take."""

    @abstractmethod
    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
        """Weights of one net for inputs of this shape."""

    @abstractmethod
    def forward(self, weights: list[Tensor], inputs: Tensor) -> Tensor:
        """f(w, x) (N, B) of inputs (N, B, ...), each net its own."""

    @abstractmethod
    def update_(
        self, weights: list[Tensor], inputs: Tensor, offset: Tensor, delta_of: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """w <- w + sum_b delta_b df(x_b)/dw in place; see `nets.update_`. Returns o (N, B) before the step."""

    def kernel(self, weights: list[Tensor], inputs: Tensor) -> Tensor:
        """Neural tangent kernel K = J J^T (N, m, m) of inputs (N, m, ...), a plain sum over all weights."""
        from lightning_modules.stacks.cnn import jacobian_kernel

        def single(net: list[Tensor], points: Tensor) -> Tensor:
            return self.forward([layer.unsqueeze(0) for layer in net], points.unsqueeze(0))[0]

        return jacobian_kernel(single, weights, inputs)


class MLP(Architecture):
    """Fully connected net without biases, NTK scaling, mean-field output; see `nets`.

    Args:
        width: h.
        depth: hidden layers; 0 is the perceptron w.x / sqrt(d).
        activation: relu, gelu (tanh form) or silu.
    """

    def __init__(self, width: int = 128, depth: int = 5, activation: nets.Activation = "relu") -> None:
        if width < 1 or depth < 0:
            raise ValueError(f"model.stack.width must be at least 1 and depth at least 0, got {width} and {depth}")
        self.width, self.depth, self.activation = width, depth, activation

    def prepare(self, points: Tensor) -> Tensor:
        """Flattened."""
        return points.flatten(1)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
        """All N(0, 1)."""
        return nets.draw_weights(shape[0], self.width, self.depth, generator)

    def forward(self, weights: list[Tensor], inputs: Tensor) -> Tensor:
        """As in `nets.forward`."""
        return nets.forward(weights, inputs, self._scales(inputs), self.activation)

    def update_(
        self, weights: list[Tensor], inputs: Tensor, offset: Tensor, delta_of: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """As in `nets.update_`, the backward written by hand."""
        return nets.update_(weights, inputs, offset, delta_of, self._scales(inputs), self.activation)

    def kernel(self, weights: list[Tensor], inputs: Tensor) -> Tensor:
        """As in `Architecture`, without J."""
        return observables.kernel(observables.layer_factors(weights, inputs, self._scales(inputs), self.activation))

    def _scales(self, inputs: Tensor) -> list[float]:
        return nets.layer_scales(inputs.shape[-1], self.width, self.depth, nets.activation_norm(self.activation))
