"""A net of timm on pictures that are resized on the device, with timm's own initial weights."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.networks.image import TimmNet


class ResizedImages(nn.Module):
    """Bicubic resize, then `TimmNet`.

    Args:
        name, num_classes, options: as in `TimmNet`.
        size: edge length in pixels.
    """

    def __init__(self, name: str, num_classes: int, size: int = 224, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.size = size
        self.net = TimmNet(name, num_classes, options=options)
        self.block_names = tuple(f"net.{part}" for part in self.net.block_names)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits."""
        return self.net(F.interpolate(images, size=(self.size, self.size), mode="bicubic"))
