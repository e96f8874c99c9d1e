"""Plain nets whose activations are modules, so that observers find them: multi-layer perceptron, small convolution net.

B batch, C channels, H, W pixels; every net maps float inputs to logits (B, num_classes).
"""

from typing import Literal

import torch
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


class MLP(nn.Module):
    """Linear layers with an activation between them, on flattened inputs.

    Submodules: `layers.linear1`, `layers.act1`, ... and the last `layers.linear<depth>` for the logits.

    Args:
        in_features: numbers per input.
        width: of the hidden layers.
        depth: linear layers, the last one included.
        num_classes: number of logits.
        activation: relu, gelu, tanh or sigmoid.
        init_scale: factor on all initial weights and biases (PyTorch's defaults), as in studies of grokking.

    Source of the scale: arXiv 2402.15555, official code.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        depth: int,
        num_classes: int = 10,
        activation: Literal["relu", "gelu", "tanh", "sigmoid"] = "relu",
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"net.depth must be at least 1, got {depth}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"net.activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        sizes = [in_features, *[width] * (depth - 1), num_classes]
        self.layers = nn.Sequential()
        for number in range(1, depth + 1):
            self.layers.add_module(f"linear{number}", nn.Linear(sizes[number - 1], sizes[number]))
            if number < depth:
                self.layers.add_module(f"act{number}", ACTIVATIONS[activation]())
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(init_scale)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, ...) -> logits."""
        return self.layers(inputs.flatten(1))


class SmallConvNet(nn.Module):
    """Two convolutions of stride 2 (16 and 32 channels), a hidden layer `features` after its ReLU, logits.

    Args:
        num_classes: number of logits.
        in_channels, size: of the square pictures.
        width: of the hidden layer.
        conv_init_std: standard deviation of normal initial convolution weights; None keeps PyTorch's default.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        size: int = 28,
        width: int = 128,
        conv_init_std: float | None = None,
    ) -> None:
        super().__init__()
        small = (size + 3) // 4
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.features = nn.Sequential(nn.Linear(32 * small * small, width), nn.ReLU())
        self.linear = nn.Linear(width, num_classes)
        if conv_init_std is not None:
            for layer in self.body:
                if isinstance(layer, nn.Conv2d):
                    nn.init.normal_(layer.weight, std=conv_init_std)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits."""
        return self.linear(self.features(self.body(images)))
