"""Residual and convolution nets of the local-complexity study: narrow, with or without batch norm."""

from torch import Tensor, nn


class NarrowPreActResNet18(nn.Module):
    """Pre-activation ResNet-18 of adjustable width for 32 x 32 pictures; 699,066 parameters at width 16.

    The inputs of all ReLUs are outputs of `layer*.*.bn*` (identities without batch norm), which observers name.

    Args:
        num_classes: number of logits.
        width: channels of the first stage; the later ones have 2, 4 and 8 times as many.
        batch_norm: False puts identities in their place.

    Source: arXiv 2402.15555, official code (ResNet18, k = 16).
    """

    def __init__(self, num_classes: int = 10, width: int = 16, batch_norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        before = width
        for stage in range(4):
            channels, stride = width * 2**stage, 1 if stage == 0 else 2
            blocks = [_Block(before, channels, stride, batch_norm), _Block(channels, channels, 1, batch_norm)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            before = channels
        self.linear = nn.Linear(before, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 32, 32) -> logits."""
        x = self.conv1(images)
        for stage in range(4):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.linear(nn.functional.avg_pool2d(x, 4).flatten(1))


class PlainConvNet(nn.Module):
    """Four 3 x 3 convolutions of stride 2 without batch norm, ReLUs as modules, a linear layer.

    An approximation: the paper's convolution net is not in its code.

    Args:
        num_classes: number of logits.
        channels: of the convolutions.
    """

    def __init__(self, num_classes: int = 10, channels: tuple[int, ...] = (32, 64, 128, 128)) -> None:
        super().__init__()
        pairs = zip((3, *channels), channels, strict=False)
        layers = [part for a, b in pairs for part in (nn.Conv2d(a, b, 3, stride=2, padding=1), nn.ReLU())]
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(channels[-1] * 4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 32, 32) -> logits."""
        return self.linear(self.layers(images).flatten(1))


class _Block(nn.Module):
    """norm-ReLU-conv-norm-ReLU-conv plus shortcut; a 1 x 1 convolution of the first ReLU where the shape changes."""

    def __init__(self, before: int, channels: int, stride: int, batch_norm: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before) if batch_norm else nn.Identity()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = stride == 1 and before == channels
        self.shortcut = None if same else nn.Sequential(nn.Conv2d(before, channels, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        active = self.bn1(x).relu()
        skipped = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(self.bn2(self.conv1(active)).relu()) + skipped
