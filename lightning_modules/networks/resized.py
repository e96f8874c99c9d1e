"""Nets of timm on pictures that are resized on the device, started as in the study of spectral entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResizedTimmNet(nn.Module):
    """Any image net of timm with a linear head of its own; `net` gives the features, `linear` the logits.

    Initial weights: convolutions Kaiming normal (fan in), or normal with `conv_init_std`; norms 1 and 0; linear layers,
    those inside transformers too, normal with standard deviation 0.001 and bias 0.

    Args:
        name: timm's name.
        num_classes: number of logits.
        size: edge length in pixels, bicubic; grey pictures become three equal channels.
        conv_init_std: for the study of initial weights; None for Kaiming normal.

    Source: arXiv 2312.04823, official code (history).
    """

    def __init__(self, name: str, num_classes: int = 10, size: int = 224, conv_init_std: float | None = None) -> None:
        super().__init__()
        import timm

        self.size = size
        self.net = timm.create_model(name, pretrained=False, num_classes=0)
        self.linear = nn.Linear(self.net.num_features, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d) and conv_init_std is not None:
                nn.init.normal_(layer.weight, std=conv_init_std)
            elif isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_in")
            elif isinstance(layer, nn.BatchNorm2d):
                layer.reset_parameters()
            elif isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=1e-3)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) -> logits."""
        wide = F.interpolate(images.expand(-1, 3, -1, -1), size=(self.size, self.size), mode="bicubic")
        return self.linear(self.net(wide))
