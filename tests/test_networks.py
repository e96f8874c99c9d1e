"""Image networks: parameter counts, values against plain functional versions, initialisation, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.networks.image import CifarResNet34, PreActResNet18, SmallResNet, TimmNet

State = dict[str, Tensor]


def num_parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def randomized(net: nn.Module) -> nn.Module:
    """The net in eval mode and float64, BatchNorms away from the identity, so that a wrong order shows."""
    generator = torch.Generator().manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return net.double().eval()


def conv(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight.contiguous(), stride=stride, padding=weight.shape[-1] // 2)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    kinds = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (state[f"{name}.{kind}"][:, None, None] for kind in kinds)
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def head(state: State, name: str, x: Tensor) -> Tensor:
    return x.mean((2, 3)) @ state[f"{name}.weight"].T + state[f"{name}.bias"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# counts: SmallResNet by hand (stem 176, blocks 4672 + 14528 + 57728, head 650); the others are those of the official
# nets (shengliu66/ELR), +46,170 for 90 more classes; ResNet-50 is 23,508,032 + 14 * 2049
@pytest.mark.parametrize(
    ("net", "count"),
    [
        (lambda: SmallResNet(), 77_754),
        (lambda: SmallResNet(num_classes=100, in_channels=3), 77_754 + 90 * 65 + 2 * 144),
        (lambda: CifarResNet34(), 21_282_122),
        (lambda: CifarResNet34(num_classes=100), 21_282_122 + 90 * 513),
        (lambda: PreActResNet18(), 11_171_274),
        (lambda: PreActResNet18(num_classes=100), 11_171_274 + 90 * 513),
        (lambda: TimmNet("resnet50.tv_in1k", num_classes=14), 23_508_032 + 14 * 2049),
    ],
)
def test_parameter_count(net, count):
    assert num_parameters(net()) == count


def test_small_resnet_equals_plain_functions():
    net = randomized(SmallResNet())
    images = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    state = net.state_dict()

    def conv_bn(name: str, x: Tensor, stride: int = 1) -> Tensor:
        return norm(state, f"{name}.1", conv(state, f"{name}.0", x, stride))

    x = conv_bn("stem", images, 2).relu()
    for k, stride in enumerate((1, 2, 2)):
        block = f"blocks.{k}"
        shortcut = conv_bn(f"{block}.shortcut", x, stride) if stride == 2 else x
        x = (conv_bn(f"{block}.conv2", conv_bn(f"{block}.conv1", x, stride).relu()) + shortcut).relu()
    assert x.shape[1:] == (64, 4, 4)
    torch.testing.assert_close(net(images), head(state, "linear", x), rtol=1e-10, atol=1e-10)


def test_cifar_resnet34_equals_plain_functions():
    net = randomized(CifarResNet34())
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    state = {name.removeprefix("net."): value for name, value in net.state_dict().items()}

    x = norm(state, "bn1", conv(state, "conv1", images)).relu()
    for stage, (blocks, first_stride) in enumerate(((3, 1), (4, 2), (6, 2), (3, 2)), start=1):
        for k in range(blocks):
            block, stride = f"layer{stage}.{k}", first_stride if k == 0 else 1
            shortcut = x
            if stride == 2:
                down = f"{block}.downsample"
                shortcut = norm(state, f"{down}.1", conv(state, f"{down}.0", x, stride))
            out = norm(state, f"{block}.bn1", conv(state, f"{block}.conv1", x, stride)).relu()
            x = (norm(state, f"{block}.bn2", conv(state, f"{block}.conv2", out)) + shortcut).relu()
    assert x.shape[1:] == (512, 2, 2)
    torch.testing.assert_close(net(images), head(state, "fc", x), rtol=1e-10, atol=1e-10)


def test_preact_resnet18_equals_plain_functions():
    net = randomized(PreActResNet18())
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    state = net.state_dict()

    x = norm(state, "stem.1", conv(state, "stem.0", images)).relu()
    for k, stride in enumerate((1, 1, 2, 1, 2, 1, 2, 1)):
        block = f"blocks.{k}"
        active = norm(state, f"{block}.bn1", x).relu()
        shortcut = conv(state, f"{block}.shortcut", active, stride) if stride == 2 else active
        inner = norm(state, f"{block}.bn2", conv(state, f"{block}.conv1", active, stride)).relu()
        x = conv(state, f"{block}.conv2", inner) + shortcut
    assert (x < 0).any()  # no ReLU before the pool
    torch.testing.assert_close(net(images), head(state, "linear", x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("net", "shape"),
    [(SmallResNet, (1, 28, 28)), (CifarResNet34, (3, 8, 8)), (PreActResNet18, (3, 8, 8))],
)
def test_permuting_the_batch_permutes_the_logits(net, shape):
    net = randomized(net())
    images = torch.rand(4, *shape, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(net(images)[order], net(images[order]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("net", [SmallResNet, CifarResNet34, PreActResNet18])
def test_default_initialisation(net):
    """PyTorch's: conv and linear weights uniform in +-1/sqrt(fan_in), BatchNorm the identity."""
    for layer in net().modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            # 144 draws (the smallest layer) miss the outer 5 % of the interval with probability 6e-4
            assert 0.95 * bound < layer.weight.abs().max() <= bound
        elif isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()


def test_same_seed_gives_same_weights():
    nets = []
    for _ in range(2):
        torch.manual_seed(7)
        nets.append(CifarResNet34())
    for first, second in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(first, second)


def test_weights_are_channels_last():
    for net in (SmallResNet(), CifarResNet34(), PreActResNet18(), TimmNet("resnet18", num_classes=3)):
        kernels = [p for p in net.parameters() if p.ndim == 4]
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def test_timm_net_has_the_requested_head():
    net = TimmNet("resnet18", num_classes=3).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(images), net.net.fc(net.net.forward_features(images).mean((2, 3))))
    assert net.net.fc.weight.shape == (3, 512)


def test_unknown_timm_net_names_close_ones():
    with pytest.raises(ValueError, match=r"net\.name must be a model of timm, got 'resnet51'.*resnet50"):
        TimmNet("resnet51", num_classes=3)


def test_missing_weights_error_says_what_where_and_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"net\.pretrained: no weights for 'resnet50\.tv_in1k'") as caught:
        TimmNet("resnet50.tv_in1k", num_classes=14, pretrained=True)
    message = str(caught.value)
    for part in (str(tmp_path), "'timm/resnet50.tv_in1k'", "HF_HOME", "init_args.pretrained false"):
        assert part in message
