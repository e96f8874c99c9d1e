"""Denoising Task Routing: masks and routed DiT against the official code, properties, gradient, random control."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.dtr import Routing, exclusive_share, index_of_flow, index_of_sigma, random_mask, routing_mask
from lightning_modules.networks.dit import DiT, DiTBlock
from lightning_modules.networks.mlp_denoiser import TinyResMLP
from lightning_modules.networks.unet import DDPMUNet, LeanUNet

GOLDEN = np.load(Path(__file__).parent / "golden" / "dtr.npz")
"""Outputs of the official code (byeongjun-park/DTR); the tables of C = 1024 as first channel and count only."""

CASES = ["T1000_C384_b0.8_a4", "T1000_C1024_b0.8_a4", "T100_C32_b0.5_a1", "T10_C10_b0.8_a4"]

OFFICIAL_NAMES = [
    ("positions", "pos_embed"),
    ("patches.proj", "x_embedder.proj"),
    ("time.first", "t_embedder.mlp.0"),
    ("time.second", "t_embedder.mlp.2"),
    ("label", "y_embedder.embedding_table"),
    ("final_modulation.linear", "final_layer.adaLN_modulation.1"),
    ("modulation.linear", "adaLN_modulation.1"),
    ("attention.", "attn."),
    ("last", "final_layer.linear"),
]
"""Ours and theirs, in the order of replacement."""


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def official_dit() -> DiT:
    """The routed DiT of the golden file, float64, eval mode."""
    net = DiT(preset=(2, 16, 2), image_size=4, patch_size=2, in_channels=1, num_classes=3, learn_sigma=False)

    def official(name: str) -> str:
        for ours, theirs in OFFICIAL_NAMES:
            if ours in name:
                return name.replace(ours, theirs)
        return name

    state = {name: golden(f"dit_sd/{official(name)}") for name in net.state_dict()}
    assert len(state) == sum(key.startswith("dit_sd/") for key in GOLDEN.files)
    net.load_state_dict(state)
    return net.double().eval()


def randomized(net: nn.Module) -> nn.Module:
    """Away from the zero initialisation, in float64 and eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net.double().eval()


def small_dit() -> nn.Module:
    return randomized(DiT(preset=(2, 16, 2), image_size=4, patch_size=2, in_channels=1, num_classes=3))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# 1. reference


@pytest.mark.parametrize("case", CASES)
def test_first_channel_and_count_equal_the_official_masks(case: str) -> None:
    tasks, channels, beta, alpha = GOLDEN[f"mask_{case}_args"]
    mask = routing_mask(int(tasks), int(channels), beta, alpha).int()
    assert torch.equal(mask.argmax(1).int(), golden(f"mask_{case}_start"))
    assert torch.equal(mask.sum(1).int(), golden(f"mask_{case}_count"))


@pytest.mark.parametrize("case", [case for case in CASES if "C1024" not in case])
def test_masks_equal_the_official_ones_bit_for_bit(case: str) -> None:
    tasks, channels, beta, alpha = GOLDEN[f"mask_{case}_args"]
    mask = routing_mask(int(tasks), int(channels), beta, alpha)
    np.testing.assert_array_equal(np.packbits(mask.numpy(), axis=1), GOLDEN[f"mask_{case}_packed"])


def test_routed_dit_equals_the_official_output() -> None:
    index = golden("dit_t")
    tasks, channels = (int(value) for value in GOLDEN["dit_cfg"][:2])
    extras = Routing(num_tasks=tasks, channels=channels, beta=float(GOLDEN["dit_cfg"][7]))(index)
    with torch.no_grad():
        out = official_dit()(golden("dit_x"), index.double(), golden("dit_y"), extras)
    torch.testing.assert_close(out, golden("dit_out"), rtol=1e-9, atol=1e-12)


def test_routed_block_equals_the_official_block() -> None:
    block, mask = official_dit().blocks[0], golden("dit_blk_mask")[:, 0].bool()
    with torch.no_grad():
        out = block(golden("dit_blk_x"), golden("dit_blk_c"), mask)
    torch.testing.assert_close(out, golden("dit_blk_out"), rtol=1e-9, atol=1e-12)


def test_fixed_positions_equal_the_official_table() -> None:
    net = DiT(preset=(2, 16, 2), image_size=4, patch_size=2, in_channels=1)
    torch.testing.assert_close(net.positions.double(), golden("dit_sd/pos_embed"), rtol=0, atol=1e-7)


# 2. properties


def test_counts_are_floored_as_the_official_code_floors() -> None:
    # int(10 * 0.7) is 7, int(100 * 0.29) is 28: floating point, not arithmetic
    assert routing_mask(3, 10, 0.7).sum(1).tolist() == [7, 7, 7]
    assert routing_mask(3, 100, 0.29).sum(1).tolist() == [28, 28, 28]


def test_halves_are_rounded_to_even() -> None:
    # C - n = 5, alpha 1, T = 3: the middle start is 2.5
    assert routing_mask(3, 10, 0.5, alpha=1).int().argmax(1).tolist() == [0, 2, 5]


def test_noisy_tasks_own_more_channels() -> None:
    mask = routing_mask(1000, 384)
    # windows of 307 channels move up: what lies beyond the window of task 749 belongs to the last quarter alone, and
    # the last quarter begins before the first channel that the others could have for themselves
    beyond = 384 - (int(mask[749].int().argmax()) + 307)
    assert exclusive_share(mask).tolist() == [0, 0, 0, beyond / 384]


@pytest.mark.parametrize("host", ["dit", "mlp", "unet"])
def test_beta_one_is_the_unrouted_net_bit_for_bit(host: str) -> None:
    net, x, channels = _host(host)
    time = torch.tensor([0.0, 500.0, 999.0])
    extras = Routing(channels=channels, num_blocks=2, beta=1.0)(time.long())
    assert torch.equal(net(x, time, None, extras), net(x, time))


@pytest.mark.parametrize("host", ["dit", "mlp", "unet"])
def test_masks_change_what_is_read(host: str) -> None:
    net, x, channels = _host(host)
    time = torch.tensor([0.0, 500.0, 999.0])
    extras = Routing(channels=channels, num_blocks=2, beta=0.5)(time.long())
    difference = (net(x, time, None, extras) - net(x, time)).abs().flatten(1).amax(1)
    assert difference.min() > 1e-4


def _host(host: str) -> tuple[nn.Module, Tensor, int | list[int]]:
    if host == "dit":
        return small_dit(), normal(3, 1, 4, 4), 16
    if host == "mlp":
        return randomized(TinyResMLP(shape=(1, 4, 4), width=16, depth=2)), normal(3, 1, 4, 4), 16
    net = LeanUNet()
    return randomized(net), normal(3, 1, 14, 14), net.routed_channels


def test_block_writes_masked_channels_but_does_not_read_them() -> None:
    block, condition = randomized(DiTBlock(16, 2)), normal(1, 16)
    x, mask = normal(1, 4, 16), routing_mask(2, 16, 0.5)[:1]
    changed = x.clone()
    changed[..., 8:] += 1
    out, out_changed = block(x, condition, mask), block(changed, condition, mask)
    # nothing reads channels 8.., so they only pass the residual path; branches write to all channels
    torch.testing.assert_close(out_changed - out, changed - x, rtol=1e-12, atol=1e-12)
    assert (out - x)[..., 8:].abs().min() > 1e-6


def test_residual_block_of_a_unet_writes_but_does_not_read_masked_channels() -> None:
    block = randomized(LeanUNet()).middle
    x, condition, mask = normal(1, 64, 7, 7), normal(1, 128), routing_mask(2, 64, 0.5)[:1]
    changed = x.clone()
    changed[:, 32:] += 1
    difference = block(changed, condition, mask) - block(x, condition, mask)
    torch.testing.assert_close(difference, changed - x, rtol=1e-12, atol=1e-12)


def test_routing_costs_no_counted_flops() -> None:
    net, x, time = small_dit(), normal(3, 1, 4, 4), torch.tensor([0.0, 5.0, 9.0])
    totals = []
    for mode in ("none", "dtr", "random"):
        extras = Routing(mode, channels=16, num_blocks=2, num_tasks=10)(time.long())
        with FlopCounterMode(display=False) as counter:
            net(x, time, None, extras)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == totals[2] > 0


@pytest.mark.parametrize("mode", ["none", "dtr", "random"])
def test_routing_has_no_parameters(mode: str) -> None:
    assert not [*Routing(mode, channels=16, num_tasks=10).parameters()]


def test_mode_none_gives_no_mask() -> None:
    assert Routing("none")(torch.tensor([3])) == {}


def test_extras_are_the_rows_of_the_tasks() -> None:
    index = torch.tensor([9, 0, 4])
    extras = Routing(channels=16, num_tasks=10)(index)
    assert torch.equal(extras["mask"], routing_mask(10, 16)[index])


def test_blocks_of_different_width_get_masks_of_their_own() -> None:
    index = torch.tensor([9, 0])
    masks = Routing(channels=[8, 16, 8], num_tasks=10)(index)["mask"]
    for mask, width in zip(masks, [8, 16, 8], strict=True):
        assert torch.equal(mask, routing_mask(10, width)[index])


def test_uneven_unet_takes_its_masks_in_the_order_of_its_blocks() -> None:
    net = randomized(DDPMUNet(1, 8, channels=8, multipliers=(1, 2), num_res_blocks=2, head_channels=8, groups=4))
    assert net.routed_channels == [8, 8, 16, 16, 16]
    seen: list[int] = []
    for module in net.modules():
        if getattr(module, "keeps_channels", False):
            module.register_forward_hook(lambda block, args, out: seen.append(args[2].shape[1]))
    net(normal(2, 1, 8, 8), torch.tensor([0.0, 9.0]), None, Routing(channels=net.routed_channels)(torch.tensor([0, 9])))
    assert seen == net.routed_channels


# 3. gradient


def test_gradient_of_a_routed_block() -> None:
    block, mask = randomized(DiTBlock(8, 2)), routing_mask(4, 8, 0.5, 1.0)[[0, 3]]
    x, condition = normal(2, 3, 8).requires_grad_(), normal(2, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, condition: block(x, condition, mask), (x, condition))


def test_gradient_of_a_routed_mlp() -> None:
    net = randomized(TinyResMLP(shape=(1, 2, 2), width=8, depth=2))
    extras, time = Routing("random", channels=8, num_blocks=2, num_tasks=4)(torch.tensor([0, 3])), torch.tensor([0, 3])
    assert torch.autograd.gradcheck(lambda x: net(x, time, None, extras), (normal(2, 1, 2, 2).requires_grad_(),))


# 4. random control and state


def test_random_masks_follow_from_the_seed() -> None:
    tables = [Routing("random", channels=16, num_blocks=2, num_tasks=10, seed=seed).block0 for seed in (0, 0, 1)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_random_masks_do_not_move_the_global_stream() -> None:
    before = torch.get_rng_state()
    Routing("random", channels=16, num_blocks=2, num_tasks=10)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_blocks_draw_their_own_subsets() -> None:
    masks = Routing("random", channels=16, num_blocks=2, num_tasks=10)(torch.arange(10))["mask"]
    assert not torch.equal(masks[0], masks[1])


def test_random_masks_are_uniform_subsets_of_the_right_size() -> None:
    mask = random_mask(4000, 10, 0.8, torch.Generator().manual_seed(0))
    assert mask.sum(1).unique().tolist() == [8]
    # 4000 draws of probability 0.8: standard deviation 0.0063 per channel, 0.0068 for a pair's 8/10 * 7/9
    assert (mask.double().mean(0) - 0.8).abs().max() < 4 * 0.0063
    assert abs((mask[:, 0] & mask[:, 1]).double().mean().item() - 8 / 10 * 7 / 9) < 4 * 0.0068


def test_random_masks_come_back_from_the_checkpoint() -> None:
    saved = Routing("random", channels=16, num_blocks=2, num_tasks=10, seed=0)
    other = Routing("random", channels=16, num_blocks=2, num_tasks=10, seed=1)
    other.load_state_dict(saved.state_dict())
    index = torch.arange(10)
    for ours, theirs in zip(other(index)["mask"], saved(index)["mask"], strict=True):
        assert torch.equal(ours, theirs)


def test_sliding_masks_are_not_in_the_checkpoint() -> None:
    assert Routing("dtr", channels=16, num_tasks=10).state_dict() == {}


# 5. indices of continuous hosts


def test_flow_time_maps_clean_to_zero_and_noise_to_the_last_task() -> None:
    assert index_of_flow(torch.tensor([0.0, 0.25, 0.5004, 1.0]), 1000).tolist() == [0, 250, 500, 999]


def test_sigma_maps_to_the_step_of_equal_signal_to_noise_ratio() -> None:
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    sigma = ((1 - abar) / abar).sqrt()
    assert torch.equal(index_of_sigma(sigma, abar), torch.arange(1000))
    assert index_of_sigma(torch.tensor([1e-4, 1e4]), abar).tolist() == [0, 999]


# 6. errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.0}, r"routing.beta must be in \(0, 1\], got 0.0"),
        ({"beta": 1.1}, r"routing.beta must be in \(0, 1\], got 1.1"),
        ({"beta": 0.01}, "leaves none of 16 channels"),
        ({"channels": 0}, "routing.channels must be at least 1, got 0"),
        ({"num_tasks": 0}, "routing.num_tasks must be at least 1, got 0"),
        ({"alpha": 0.0}, "routing.alpha must be positive, got 0.0"),
        ({"mode": "task"}, "routing.mode must be none, dtr or random, got 'task'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Routing(**{"channels": 16, "num_tasks": 10, **arguments})


def test_continuous_time_is_not_taken_for_an_index() -> None:
    with pytest.raises(ValueError, match=r"int64 indices 0\.\.999, got torch.float32"):
        Routing(channels=16)(torch.tensor([0.5]))


def test_mask_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be bool \(3, 16\), got torch.bool \(3, 8\)"):
        small_dit()(normal(3, 1, 4, 4), torch.zeros(3), None, Routing(channels=8)(torch.zeros(3, dtype=torch.int64)))


def test_masks_for_another_number_of_blocks_are_refused() -> None:
    extras = Routing("random", channels=16, num_blocks=3, num_tasks=10)(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="each of the 2 blocks, got 3"):
        small_dit()(normal(3, 1, 4, 4), torch.zeros(3), None, extras)
