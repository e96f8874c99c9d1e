"""DDPM++: published counts, a block by its formula, sizes, time."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.networks.edm_unet import DDPMPlusPlus, _Block

AUGMENTATION = 1152
"""Weights of the official nets that read the settings of EDM's augmentation: 9 x 128."""


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 61_805_571), ({"image_size": 32, "multipliers": (2, 2, 2)}, 55_733_891)],
    ids=["ffhq64", "cifar10"],
)
def test_parameters_are_the_official_ones_but_for_the_augmentation(options: dict, count: int) -> None:
    with torch.device("meta"):
        net = DDPMPlusPlus(**options)
    assert sum(p.numel() for p in net.parameters()) == count - AUGMENTATION


def small() -> DDPMPlusPlus:
    torch.manual_seed(0)
    return DDPMPlusPlus(2, 16, channels=32, multipliers=(1, 2), num_blocks=1, attention_resolutions=(8,)).eval()


@pytest.mark.parametrize("size", [0.5, 1.0, 2.0])
def test_block_is_its_formula(size: float) -> None:
    torch.manual_seed(1)
    block = _Block(32, 64, 16, 0.0, attend=True, size=size).double().eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, condition = torch.randn(2, 32, 8, 8).double(), torch.randn(2, 16).double()

    def resized(h: Tensor) -> Tensor:
        if size == 0.5:
            return (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4
        return h.repeat_interleave(int(size), -1).repeat_interleave(int(size), -2)

    w = dict(block.named_parameters())

    def norm(h: Tensor, name: str) -> Tensor:
        return F.group_norm(h, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def conv(h: Tensor, name: str) -> Tensor:
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], padding="same")

    h = conv(resized(F.silu(norm(x, "norm1"))), "conv1")
    h = h + F.linear(condition, w["condition.weight"], w["condition.bias"])[..., None, None]
    h = (conv(F.silu(norm(h, "norm2")), "conv2") + conv(resized(x), "shortcut")) / math.sqrt(2)
    query, key, value = conv(norm(h, "attention.norm"), "attention.qkv").flatten(2).chunk(3, dim=1)
    weights = torch.einsum("bcq,bck->bqk", query, key / math.sqrt(64)).softmax(-1)
    mixed = torch.einsum("bqk,bck->bcq", weights, value).reshape(h.shape)
    expected = (h + conv(mixed, "attention.projection")) / math.sqrt(2)
    torch.testing.assert_close(block(x, condition), expected, rtol=1e-10, atol=1e-10)


def test_output_starts_near_zero_and_depends_on_the_noise_level() -> None:
    net, x = small(), torch.randn(2, 2, 16, 16)
    assert net(x, torch.zeros(2)).abs().max() < 1e-3
    torch.nn.init.normal_(net.last.weight)
    for block in net.modules():
        if isinstance(block, _Block):
            torch.nn.init.normal_(block.conv2.weight, std=0.1)
    quiet, loud = net(x, torch.full((2,), -1.0)), net(x, torch.full((2,), 1.0))
    assert (quiet - loud).abs().mean() > 0.01 * quiet.abs().mean()


def test_gradient_reaches_every_weight() -> None:
    net = small()
    net(torch.randn(1, 2, 16, 16), torch.zeros(1)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_size_that_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match=r"net.image_size must divide by 2 for each of 4 levels, got 36"):
        DDPMPlusPlus(image_size=36)
