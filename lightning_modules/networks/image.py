"""Image classifiers. B batch, C channels, H, W pixels; every net maps float (B, C, H, W) to logits (B, num_classes).

All weights lie in channels-last order: convolutions are faster so, on CPUs (0.74 of the time of a step of `SmallResNet`
with one thread) as on GPUs with tensor cores. Values and checkpoints are the same in either order.

`block_names` of a net: its parts that `sharding.shard` gathers, and `CheckpointActivations` recomputes, one at a time.
"""

import difflib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallResNet(nn.Module):
    """Residual net for 28x28 pictures on a laptop: 77,754 parameters for one channel and ten classes.

    A 3x3 stem of stride 2, three basic blocks (16, 32 and 64 channels), global average pool, linear layer.

    Args:
        num_classes: number of logits.
        in_channels: 1 for grey pictures, 3 for colour.
    """

    block_names = ("blocks",)

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.stem = _conv_bn(in_channels, 16, kernel_size=3, stride=2)
        self.blocks = nn.Sequential(_BasicBlock(16, 16, stride=1), _BasicBlock(16, 32, 2), _BasicBlock(32, 64, 2))
        self.linear = nn.Linear(64, num_classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.linear(self.blocks(F.relu(self.stem(images))).mean((2, 3)))


class CifarResNet34(nn.Module):
    """timm's ResNet-34 with the CIFAR stem: 3x3, stride 1, no max-pool; 21,282,122 parameters for ten classes.

    Layers start from PyTorch's default initialisation, as in the official code of ELR (shengliu66/ELR,
    `ELR/model/ResNet_Zoo.py`); timm's own start (Kaiming normal, last BatchNorm of each block zero) trains differently.

    Args:
        num_classes: number of logits.
    """

    block_names = ("net.layer1", "net.layer2", "net.layer3", "net.layer4")

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        import timm

        self.net = timm.create_model("resnet34", num_classes=num_classes)
        self.net.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        self.net.maxpool = nn.Identity()
        for layer in self.net.modules():
            if isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
                layer.reset_parameters()
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.net(images)


class PreActResNet18(nn.Module):
    """Pre-activation ResNet-18 for 32x32 pictures: 11,171,274 parameters for ten classes.

    Three details follow the official code of ELR+ (shengliu66/ELR, `ELR_plus/model/PreResNet.py`) and not the paper
    that introduced the net (arXiv 1603.05027): the stem has its own BatchNorm and ReLU, every shortcut (the identity
    too) starts after the block's first BN-ReLU, and the last block goes into the pool without BN-ReLU.

    Args:
        num_classes: number of logits.
    """

    block_names = ("blocks",)

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = _conv_bn(3, 64, kernel_size=3)
        shapes = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        self.blocks = nn.Sequential(
            *(
                block
                for before, channels, stride in shapes
                for block in (_PreActBlock(before, channels, stride), _PreActBlock(channels, channels, stride=1))
            )
        )
        self.linear = nn.Linear(512, num_classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.linear(self.blocks(F.relu(self.stem(images))).mean((2, 3)))


class TimmNet(nn.Module):
    """Any image classifier of timm with a new head.

    Args:
        name: timm's name, with the tag of the weights if `pretrained`, e.g. `resnet50.tv_in1k`.
        num_classes: number of logits.
        pretrained: start from timm's weights, fetched from the Hugging Face hub or taken from its cache.
        options: further arguments of timm's model, e.g. for a ViT on 28x28 grey pictures `{img_size: 28, patch_size: 4,
            in_chans: 1, embed_dim: 48, depth: 4, num_heads: 3}`.

    Raises:
        ValueError: timm has no net of this name.
        OSError: the weights are neither in the cache nor to be had from the hub.
    """

    def __init__(
        self, name: str, num_classes: int, pretrained: bool = False, options: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        import timm

        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), n=3)
            raise ValueError(
                f"net.name must be a model of timm, got {name!r}; close names: {', '.join(close) or 'none'}"
            )
        try:
            self.net = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **(options or {}))
        except OSError as error:
            raise OSError(_missing_weights(name)) from error
        # ViTs, ConvNeXts, ResNets
        lists = ("blocks", "stages", "layer1", "layer2", "layer3", "layer4")
        self.block_names = tuple(f"net.{part}" for part in lists if hasattr(self.net, part))
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.net(images)


class _BasicBlock(nn.Module):
    """conv3x3-BN-ReLU-conv3x3-BN plus shortcut, then ReLU; the shortcut is a 1x1 conv-BN where the shape changes."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv_bn(before, channels, kernel_size=3, stride=stride)
        self.conv2 = _conv_bn(channels, channels, kernel_size=3)
        same = stride == 1 and before == channels
        self.shortcut = nn.Identity() if same else _conv_bn(before, channels, kernel_size=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class _PreActBlock(nn.Module):
    """BN-ReLU-conv3x3-BN-ReLU-conv3x3 plus the shortcut of the first ReLU; a 1x1 conv where the shape changes."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = stride == 1 and before == channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(active)))) + self.shortcut(active)


def _conv_bn(before: int, channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """Convolution of odd kernel size without bias, then BatchNorm; stride 1 keeps height and width."""
    conv = nn.Conv2d(before, channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


def _missing_weights(name: str) -> str:
    import timm
    from huggingface_hub import constants

    config = timm.get_pretrained_cfg(name)
    source = config.hf_hub_id if config and config.hf_hub_id else name
    return (
        f"net.pretrained: no weights for {name!r}. timm looked in {constants.HF_HUB_CACHE} and on the Hugging Face hub "
        f"for {source!r}. Set HF_HOME to a cache that holds them (on a machine with a connection, "
        f"`hf download {source}` fills it), or start from random weights: "
        "--model.init_args.net.init_args.pretrained false"
    )
