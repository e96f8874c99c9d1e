"""Denoisers: parameter counts, reference values, embeddings, initialisation, null class, precision, compilation."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_modules.networks.conditioning import Modulation, drop_labels, sinusoidal
from lightning_modules.networks.dit import DiT
from lightning_modules.networks.mlp_denoiser import TinyResMLP
from lightning_modules.networks.unet import DDPMUNet, LeanUNet, TinyUNet

GOLDEN = np.load(Path(__file__).parent / "golden" / "unet.npz")
"""Output of torchcfm 1.0.7 `UNetModel` (guided-diffusion) in float64 with the weights of `drawn`: 16x16x1 pictures,
model_channels 32, channel_mult (1, 2), one block per level, attention at 8x8, 32 channels per head, 4 label rows."""


def num_parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def randomized(net: nn.Module) -> nn.Module:
    """Away from the zero initialisation, in float64 and eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net.double().eval()


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def small_dit(num_classes: int = 3, learn_sigma: bool = False) -> DiT:
    return DiT((2, 16, 2), image_size=4, in_channels=1, num_classes=num_classes, learn_sigma=learn_sigma)


def small_mlp(num_classes: int = 3) -> TinyResMLP:
    return TinyResMLP(shape=(1, 4, 4), width=16, depth=2, num_classes=num_classes)


NETS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: small_dit(), (1, 4, 4)),
    (lambda: small_mlp(), (1, 4, 4)),
    (lambda: LeanUNet(num_classes=3), (1, 14, 14)),
    (lambda: TinyUNet(image_size=8, num_classes=3), (1, 8, 8)),
    (lambda: DDPMUNet(3, 8, 32, (1, 2), 1, attention_resolutions=(4,), head_channels=32, num_classes=3), (3, 8, 8)),
]
NAMES = ["dit", "mlp", "lean", "tiny", "ddpm"]
every_net = pytest.mark.parametrize(("make", "shape"), NETS, ids=NAMES)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


# 1. parameter counts


def dit_count(depth: int, width: int, patch: int, channels: int, out: int, side: int, rows: int) -> int:
    """By hand: 18 C^2 + 15 C per block (qkv 3, projection 1, MLP 8, adaLN 6), then what surrounds the blocks."""
    block = 18 * width**2 + 15 * width
    patches = patch**2 * channels * width + width
    time = 256 * width + width + width**2 + width
    final = 2 * width**2 + 2 * width + (width + 1) * patch**2 * out
    return depth * block + patches + time + rows * width + final + side**2 * width


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize(
    ("preset", "depth", "width"), [("S", 12, 384), ("B", 12, 768), ("L", 24, 1024), ("XL", 28, 1152)]
)
def test_dit_has_the_parameters_of_the_formula(preset: str, depth: int, width: int, patch: int) -> None:
    with torch.device("meta"):
        net = DiT(preset, patch_size=patch)
    assert num_parameters(net) == dit_count(depth, width, patch, 4, 8, 32 // patch, 1001)


# XL/2 is the count of the official code; the paper rounds to 33, 130 (131 here), 458 and 675 million
@pytest.mark.parametrize(
    ("preset", "count"), [("S", 32_963_360), ("B", 130_512_416), ("L", 458_102_816), ("XL", 675_129_632)]
)
def test_dit_of_patch_two_has_the_published_parameters(preset: str, count: int) -> None:
    with torch.device("meta"):
        assert num_parameters(DiT(preset)) == count


# TinyResMLP by hand: first 6240, time 12384 + 9312, three blocks of 65088, last adaLN 18624, last layer 6208.
# DDPMUNet: torchcfm's `UNetModelWrapper` and diffusers' `UNet2DModel` of the CIFAR-10 configuration.
@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: TinyResMLP(), 6240 + 12384 + 9312 + 3 * 65088 + 18624 + 6208),
        (lambda: TinyResMLP(num_classes=10), 248_032 + 11 * 96),
        (lambda: LeanUNet(), 368_929),
        (lambda: LeanUNet(num_classes=0), 368_929 - 11 * 128),
        (lambda: TinyUNet(), 651_041),
        (lambda: TinyUNet(num_classes=10), 651_041 + 11 * 128),
        (lambda: DDPMUNet(), 35_746_307),
        (lambda: DDPMUNet(num_classes=10), 35_746_307 + 11 * 512),
    ],
)
def test_number_of_parameters(make: Callable[[], nn.Module], count: int) -> None:
    with torch.device("meta"):
        assert num_parameters(make()) == count


# 2. reference


def drawn(net: nn.Module) -> nn.Module:
    """Weights from NumPy's legacy stream in the order of the parameters, which is that of the official net."""
    stream = np.random.RandomState(0)
    with torch.no_grad():
        for parameter in net.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_(torch.from_numpy(stream.standard_normal(parameter.numel()) / fan**0.5).view_as(parameter))
    return net


def test_unet_equals_the_official_output() -> None:
    net = DDPMUNet(1, 16, 32, (1, 2), num_res_blocks=1, attention_resolutions=(8,), head_channels=32, num_classes=3)
    x, time, y, out = (torch.from_numpy(GOLDEN[name]) for name in ("x", "time", "y", "out"))
    ours = drawn(net.double().eval())(x, time, y)
    torch.testing.assert_close(ours.detach(), out, rtol=1e-10, atol=1e-10)


def test_lean_unet_equals_its_plain_functional_version() -> None:
    net = randomized(LeanUNet())
    state, x, time, y = (
        dict(net.named_parameters()),
        normal(2, 1, 14, 14),
        torch.tensor([3, 900]),
        torch.tensor([1, 10]),
    )

    def conv(name: str, h: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(h, weight, state[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)

    def norm(name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, 8, state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])

    angles = time[:, None] * torch.exp(-math.log(1e4) * torch.arange(32) / 32)
    features = torch.cat([angles.cos(), angles.sin()], 1).double()
    hidden = linear("condition.time.second", F.silu(linear("condition.time.first", features)))
    e = F.silu(hidden + state["condition.label.weight"][y])

    def res(name: str, h: Tensor) -> Tensor:
        a, b = linear(f"{name}.modulation.linear", e)[:, :, None, None].chunk(2, 1)
        inner = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", h)))
        inner = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", inner) * (1 + a) + b))
        return inner + (conv(f"{name}.shortcut", h) if f"{name}.shortcut.weight" in state else h)

    h0 = res("down_high", conv("first", x))
    h1 = res("down_low", conv("downsample", h0, stride=2))
    h = res("up_low", torch.cat([res("middle", h1), h1], 1))
    h = F.interpolate(conv("narrow", h), size=(14, 14))
    h = res("up_high", torch.cat([h, h0], 1))
    expected = conv("last", F.silu(norm("norm", h)))
    torch.testing.assert_close(net(x, time, y), expected, rtol=1e-10, atol=1e-10)


def test_residual_mlp_equals_its_plain_functional_version() -> None:
    net = randomized(small_mlp(num_classes=0))
    state, x, time = dict(net.named_parameters()), normal(3, 1, 4, 4), torch.tensor([0.0, 12.5, 999.0])

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(h: Tensor) -> Tensor:
        return (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + 1e-6).sqrt()

    features = sinusoidal(time, 128).double()
    c = F.silu(linear("condition.time.second", F.silu(linear("condition.time.first", features))))
    h = linear("first", x.flatten(1))
    for k in range(2):
        shift, scale, gate = linear(f"blocks.{k}.modulation.linear", c).chunk(3, 1)
        inner = F.gelu(linear(f"blocks.{k}.mlp.0", norm(h) * (1 + scale) + shift))
        h = h + gate * linear(f"blocks.{k}.mlp.2", inner)
    shift, scale = linear("final_modulation.linear", c).chunk(2, 1)
    expected = linear("last", norm(h) * (1 + scale) + shift).view_as(x)
    torch.testing.assert_close(net(x, time), expected, rtol=1e-10, atol=1e-10)


def test_time_features_equal_the_closed_form() -> None:
    time = torch.tensor([0.0, 0.5, 7.0, 999.0])
    expected = [
        [math.cos(t * 1e4 ** (-i / 4)) for i in range(4)] + [math.sin(t * 1e4 ** (-i / 4)) for i in range(4)]
        for t in time.tolist()
    ]
    # angles up to 999 rounded to float32: 999 * 2^-24
    torch.testing.assert_close(sinusoidal(time, 8), torch.tensor(expected), rtol=0, atol=1e-4)


def test_time_features_are_the_same_for_index_and_float() -> None:
    assert torch.equal(sinusoidal(torch.tensor([3, 999]), 64), sinusoidal(torch.tensor([3.0, 999.0]), 64))


# 3. initialisation


@every_net
def test_output_starts_at_zero(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    out = make()(normal(2, *shape, dtype=torch.float32), torch.tensor([3.0, 900.0]), torch.tensor([0, 3]))
    assert torch.equal(out, torch.zeros(2, *shape))


@every_net
def test_gradient_reaches_the_last_layer_at_the_start(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    net = make()
    net(normal(2, *shape, dtype=torch.float32), torch.tensor([3.0, 900.0])).sum().backward()
    assert net.last.weight.grad.abs().max() > 0


def test_dit_blocks_start_as_the_identity() -> None:
    block, x = small_dit().blocks[0], normal(2, 4, 16, dtype=torch.float32)
    assert torch.equal(block(x, normal(2, 16, dtype=torch.float32)), x)


def test_dit_starts_with_the_official_scales() -> None:
    net = DiT((1, 256, 4), num_classes=1000)
    spread = {name: parameter.std().item() for name, parameter in net.named_parameters() if parameter.ndim > 1}
    # Xavier uniform: sqrt(2 / (fan_in + fan_out)), the patch convolution taken as a linear layer of 2 * 2 * 4 inputs
    expected = {
        "blocks.0.attention.qkv.weight": (2 / (256 + 768)) ** 0.5,
        "blocks.0.mlp.fc1.weight": (2 / (256 + 1024)) ** 0.5,
        "patches.proj.weight": (2 / (16 + 256)) ** 0.5,
        "time.first.weight": 0.02,
        "time.second.weight": 0.02,
        "label.weight": 0.02,
        "blocks.0.modulation.linear.weight": 0.0,
        "final_modulation.linear.weight": 0.0,
        "last.weight": 0.0,
    }
    assert {name: spread[name] for name in expected} == pytest.approx(expected, rel=0.03)


def test_dit_from_the_meta_device_equals_direct_construction() -> None:
    torch.manual_seed(0)
    direct = small_dit()
    with torch.device("meta"):
        net = small_dit()
    net.to_empty(device="cpu")
    torch.manual_seed(0)
    net.reset_parameters()
    torch.manual_seed(0)
    direct.reset_parameters()
    for name, value in direct.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


# 4. labels


@every_net
def test_no_label_is_the_null_class(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    net, x, time = randomized(make()), normal(2, *shape), torch.tensor([3.0, 900.0])
    assert torch.equal(net(x, time), net(x, time, torch.tensor([3, 3])))


@every_net
def test_labels_change_the_output(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    net, x, time = randomized(make()), normal(2, *shape), torch.tensor([3.0, 900.0])
    difference = (net(x, time, torch.tensor([0, 1])) - net(x, time)).abs().flatten(1).amax(1)
    assert difference.min() > 1e-6


def test_net_without_classes_does_not_look_at_labels() -> None:
    x, time, y = normal(2, 1, 4, 4), torch.tensor([3.0, 900.0]), torch.tensor([5, 7])
    for net in (randomized(small_dit(num_classes=0)), randomized(small_mlp(num_classes=0))):
        assert torch.equal(net(x, time, y), net(x, time))


def test_label_dropout_replaces_by_the_null_class_at_its_rate() -> None:
    labels = torch.arange(20_000) % 10
    dropped = drop_labels(labels, null_class=10, rate=0.1, generator=torch.Generator().manual_seed(0))
    kept = dropped != 10
    assert torch.equal(dropped[kept], labels[kept])
    # standard deviation of a mean of 20,000 draws: 0.0021
    assert abs((~kept).double().mean().item() - 0.1) < 4 * 0.0021


@pytest.mark.parametrize(("rate", "expected"), [(0.0, [0, 1, 2]), (1.0, [3, 3, 3])])
def test_label_dropout_at_its_limits(rate: float, expected: list[int]) -> None:
    assert drop_labels(torch.arange(3), 3, rate, torch.Generator().manual_seed(0)).tolist() == expected


def test_label_dropout_rate_is_checked() -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got 1.5"):
        drop_labels(torch.arange(3), 3, 1.5, torch.Generator())


# 5. shape conventions


def test_dit_unfolds_patches_in_their_place() -> None:
    net = small_dit()
    tokens = torch.arange(4.0)[:, None] * 10 + torch.arange(4.0)
    # token k is patch (k // 2, k % 2); inside a patch values run row by row
    expected = torch.tensor([[0.0, 1, 10, 11], [2, 3, 12, 13], [20, 21, 30, 31], [22, 23, 32, 33]])
    assert torch.equal(net._to_image(tokens[None])[0, 0], expected)


def test_learned_variance_doubles_the_output_channels() -> None:
    out = randomized(small_dit(learn_sigma=True))(normal(2, 1, 4, 4), torch.zeros(2))
    assert out.shape == (2, 2, 4, 4)
    assert not torch.equal(out[:, 0], out[:, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiT(patch_size=3), "net.patch_size must divide net.image_size 32, got 3"),
        (lambda: DiT((1, 16, 3)), "width must divide by 4 and by the number of heads, got 16 and 3"),
        (lambda: DDPMUNet(image_size=28), "net.image_size must divide by 2 for each of 4 levels, got 28"),
        (lambda: DDPMUNet(head_channels=48), "net.head_channels must divide the 256 channels, got 48"),
    ],
)
def test_sizes_that_do_not_divide_are_named(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# 6. precision and execution


def test_embeddings_and_modulation_stay_in_float32_under_bf16() -> None:
    net = small_dit()
    dtypes: dict[str, torch.dtype] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda layer, args, out: dtypes.__setitem__(name, out.dtype)

    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(keep(name))
    with torch.autocast("cpu", torch.bfloat16):
        net(normal(2, 1, 4, 4, dtype=torch.float32), torch.tensor([3.0, 900.0]))
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    modulations = {f"{name}.linear" for name, layer in net.named_modules() if isinstance(layer, Modulation)}
    assert wide == modulations | {"time.first", "time.second"}
    assert dtypes["blocks.0.mlp.fc1"] == dtypes["blocks.0.attention.qkv"] == torch.bfloat16


def test_checkpointed_blocks_give_the_same_gradient() -> None:
    net, x, time = randomized(small_dit()), normal(2, 1, 4, 4), torch.tensor([3.0, 900.0])
    mask = torch.arange(16).expand(2, 16) < 12
    net(x, time, None, {"mask": mask}).square().sum().backward()
    plain = [block.mlp.fc1.weight.grad.clone() for block in net.blocks]
    net.zero_grad()
    for block in net.blocks:
        inner = block.forward
        block.forward = lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=False)
    net(x, time, None, {"mask": mask}).square().sum().backward()
    for block, gradient in zip(net.blocks, plain, strict=True):
        assert torch.equal(block.mlp.fc1.weight.grad, gradient)


# the last net is left out: the tiny one is of the same class, and tracing takes seconds
@pytest.mark.parametrize(("make", "shape"), NETS[:-1], ids=NAMES[:-1])
def test_net_is_one_graph_for_the_compiler(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    net, x, time, y = randomized(make()), normal(2, *shape), torch.tensor([3.0, 900.0]), torch.tensor([0, 3])
    channels = getattr(net, "routed_channels", [16, 16])
    extras = {"mask": [torch.arange(count).expand(2, count) < count // 2 for count in channels]}
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, time, y, extras), net(x, time, y, extras), rtol=1e-12, atol=1e-12)
