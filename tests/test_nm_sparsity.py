"""N:M sparsity: reference, property, gradient, storage, parallel, resume, bad input. Recipes: test_recipes.py."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from synthetic import SyntheticImages
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from two_processes import run_two

from callbacks.ema import Ema
from callbacks.rng import RngState
from callbacks.sparse_export import SparseExport
from callbacks.sparsity_noise import SparsityNoise, flip_rate, pruned_share
from datamodules.images import ImageData
from datamodules.photo_folders import ImageNet
from lightning_modules import nm_sparsity
from lightning_modules.networks import nm_sparse, nm_storage
from lightning_modules.networks.image import TimmNet
from lightning_modules.networks.nm_sparse import NMSparse, nm_mask, sparse_weight, sparsify
from lightning_modules.nm_sparsity import NMSparsity, Phase, Schedule, structure_frames

GOLDEN = np.load(Path(__file__).parent / "golden" / "nm_sparsity.npz")
"""Outputs of the official functions, float64."""
SMALL = SyntheticImages(num_classes=4, channels=1, size=8, per_class=30)
LAYERS = ("*.mlp.fc?", "*.attn.qkv")
METHODS = ["dense", "ste", "srste", "mdgf_linear", "mdgf_exp", "sdgf_step", "sdgf_geo"]


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


# 1. reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "name", [k for k in GOLDEN.files if k.startswith(("mask_row", "mask_col", "mask_conv_1", "mask_conv_2"))]
)
def test_masks_equal_the_official_ones(name: str, dtype: torch.dtype) -> None:
    _, kind, n, m = name.split("_")
    weight = golden("mask_conv_W" if kind == "conv" else "mask_W").to(dtype)
    ours = nm_mask(weight, int(n), int(m), "col" if kind == "col" else "row")
    assert torch.equal(ours, golden(name).bool())


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_unstructured_masks_equal_the_official_ones(rate: float) -> None:
    ours = nm_sparse.unstructured_mask(golden("mask_W"), rate)
    assert torch.equal(ours, golden(f"mask_unstructured_{rate}").bool())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", [k[3:-4] for k in GOLDEN.files if k.endswith("_out") and k != "fb_grad_out"])
def test_weight_and_gradient_equal_the_official_functions(case: str, dtype: torch.dtype, tolerance: float) -> None:
    weight = golden("mask_W").to(dtype).requires_grad_()
    decay, lam = 0.0, 2e-4 if case == "srste" else 0.0
    if case.startswith(("linear", "exp")):
        kind, coef, step = case.split("_")
        decay = nm_sparsity.mask_decay(kind, int(step[1:]), float(coef[1:]))
    out = sparse_weight(weight, nm_mask(weight, *GOLDEN["fb_nm"].tolist()), torch.tensor(decay, dtype=dtype), lam)
    out.backward(golden("fb_grad_out").to(dtype))
    torch.testing.assert_close(out.detach(), golden(f"fb_{case}_out").to(dtype), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weight.grad, golden(f"fb_{case}_grad").to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [k for k in GOLDEN.files if k.startswith(("sched_sparsify", "sched_fine"))])
def test_frames_equal_the_official_ones(name: str) -> None:
    _, kind, n, m, total, dense, fine_tune = name.split("_")
    start = int(dense[1:])
    length = int(total[1:]) - start - int(fine_tune[1:])
    ours = structure_frames("step" if kind == "sparsify" else "geo", int(n), int(m), start, length)
    assert ours == [tuple(row) for row in GOLDEN[name].tolist()]


RECIPES: dict[str, dict[str, Any]] = {
    "srste": {"method": "srste"},
    "ste": {"method": "ste"},
    "mdlin": {"method": "mdgf_linear", "decay_rate": 0.04},
    "mdlin_ft": {"method": "mdgf_linear", "decay_rate": 0.01, "fine_tune": 8},
    "mdexp": {"method": "mdgf_exp", "decay_rate": 0.1},
    "mdexp_ft": {"method": "mdgf_exp", "decay_rate": 0.02, "fine_tune": 8},
    "sdstep": {"method": "sdgf_step"},
    "sdgeo": {"method": "sdgf_geo"},
}
"""Coefficients per step. The official fine-tune phase of 3 of 10 epochs begins an epoch late: 2 epochs of 4 steps."""


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", RECIPES)
def test_40_steps_equal_the_official_trajectory(name: str, optimizer: str) -> None:
    settings = dict(RECIPES[name])
    fine_tune = settings.pop("fine_tune", 0)
    rate = settings.pop("decay_rate", 8.0) * (40 - fine_tune)
    n, m = GOLDEN["traj_nm"].tolist()
    schedule = Schedule(n=n, m=m, total=40, dense=0, fine_tune=fine_tune, decay_rate=rate, **settings)
    # official frames begin with an epoch of 4 steps, i.e. the same frames counted in epochs
    epochs = Schedule(n=n, m=m, total=10, dense=0, fine_tune=0, **settings)
    layer = nn.Linear(32, 8, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(golden("traj_W0"))
    (sparse,) = sparsify(nn.Sequential(layer), ["0"], n, m).values()
    sparse.double()
    makers = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.01),
    }
    steps, losses = makers[optimizer](layer.parameters()), []
    for step in range(40):
        phase = epochs.at(step // 4) if name.startswith("sd") else schedule.at(step)
        sparse.set_phase(phase.n, phase.m, phase.decay, phase.lam, phase.dense)
        loss = (layer(golden("traj_X")) - golden("traj_Y")).square().mean()
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.detach())
    weight = nm_sparse.dense_weight(layer)
    expected = {part: golden(f"traj_{name}_{optimizer}_{part}") for part in ("loss", "W", "mask")}
    torch.testing.assert_close(torch.stack(losses), expected["loss"], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(weight.detach(), expected["W"], rtol=1e-8, atol=1e-8)
    assert torch.equal(nm_mask(weight, n, m), expected["mask"].bool())


# 2. property


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 8), (4, 16), (2, 32), (4, 32), (5, 5)])
def test_of_equal_magnitudes_the_first_are_kept(n: int, m: int, dtype: torch.dtype) -> None:
    """Whole numbers between -2 and 2 make ties in all groups, of zeros too; a stable sort says who is first."""
    weight = torch.randint(-2, 3, (16, 160), generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0] = 0
    first = weight.abs().view(-1, m).argsort(dim=1, descending=True, stable=True)[:, :n]
    expected = torch.zeros(weight.numel() // m, m, dtype=torch.bool).scatter_(1, first, True).view(16, 160)
    assert torch.equal(nm_mask(weight, n, m), expected)


def test_kernels_give_the_same_masks_in_channels_last_order() -> None:
    weight = golden("mask_conv_W")
    moved = weight.to(memory_format=torch.channels_last)
    assert torch.equal(nm_mask(moved, 2, 4), nm_mask(weight, 2, 4))


def test_schedule_has_a_dense_and_a_hard_part_and_decays_between() -> None:
    schedule = Schedule("mdgf_exp", 1, 64, total=800, dense=40, fine_tune=160, decay_rate=8.0)
    assert schedule.at(39) == Phase(1, 64, dense=True)
    assert schedule.at(40) == Phase(1, 64, decay=1.0)
    assert schedule.at(639).decay == pytest.approx(np.exp(-8 * 599 / 600))
    assert schedule.at(640) == Phase(1, 64)


@pytest.mark.parametrize(
    ("method", "step", "pattern"),
    [("sdgf_step", 40, (63, 64)), ("sdgf_step", 126, (32, 64)), ("sdgf_geo", 40, (8, 512))],
)
def test_structure_decays_in_equal_frames(method: Any, step: int, pattern: tuple[int, int]) -> None:
    """K = 7 frames of 600 / 7 steps, or 4 of 150."""
    phase = Schedule(method, 1, 64, total=800, dense=40, fine_tune=160).at(step)
    assert (phase.n, phase.m) == pattern


def test_structure_ends_early_where_it_is_told_to() -> None:
    late, early = (Schedule("sdgf_step", 1, 64, 800, 40, 160, sparsify_frac=share) for share in (1.0, 0.4))
    assert [next(s for s in range(800) if p.at(s) == Phase(1, 64)) for p in (late, early)] == [554, 245]


def test_flops_are_those_of_the_worked_example() -> None:
    """ViT-B/16 at 224: 17.56 G multiply-adds, 63.5 % of them in the MLPs; 1:32 costs 0.385 and 0.590 (spec, 4.1)."""
    with torch.device("meta"):
        net = TimmNet("vit_base_patch16_224", 1000)
    layers = [f"net.blocks.{block}.mlp.fc{k}" for block in range(12) for k in (1, 2)]
    total, sparse = nm_sparsity.forward_macs(net, layers, torch.zeros(1, 3, 224, 224, device="meta"))
    assert total / 1e9 == pytest.approx(17.56, abs=0.005)
    assert sparse / total == pytest.approx(0.635, abs=5e-4)
    assert nm_sparsity.inference_cost(sparse / total, 1 / 32) == pytest.approx(0.385, abs=5e-4)
    assert nm_sparsity.step_cost(sparse / total, 1 / 32) == pytest.approx(0.590, abs=5e-4)


def test_training_flops_count_a_faded_weight_as_dense_until_it_is_zero() -> None:
    """10 dense, 60 faded and 30 hard steps of a net that is all sparse, at 1:4: 70 + 30 (2/4 + 1) / 3."""
    schedule = Schedule("mdgf_exp", 1, 4, total=100, dense=10, fine_tune=30)
    assert nm_sparsity.training_cost(schedule, 1.0, range(100)) == pytest.approx(70 + 30 * 0.5)
    # exp(-8 j / 60) is at most 1e-3 from j = 52 on
    assert nm_sparsity.training_cost(schedule, 1.0, range(100), cut=1e-3) == pytest.approx(62 + 38 * 0.5)


def test_equal_flops_give_a_run_that_costs_no_more() -> None:
    control = Schedule("srste", 1, 64, 800, 40, 160)
    budget = nm_sparsity.training_cost(control, 0.8, range(800))
    steps = nm_sparsity.iso_flop_steps(budget, Schedule("mdgf_exp", 1, 64, 800, 40, 160), 0.8)
    ours = Schedule("mdgf_exp", 1, 64, steps, int(0.05 * steps), int(0.2 * steps))
    assert nm_sparsity.training_cost(ours, 0.8, range(steps)) == pytest.approx(budget, rel=0.01)


def test_flip_rate_is_the_share_of_kept_weights_that_moved() -> None:
    before, after = torch.tensor([1, 0, 0, 1]).bool(), torch.tensor([0, 1, 0, 1]).bool()
    assert flip_rate(before, after) == 0.5


def test_pruned_share_is_that_of_the_squared_gradient_outside_the_mask() -> None:
    """1 + 4 of 1 + 4 + 9."""
    share = pruned_share(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([False, False, True]))
    assert float(share) == pytest.approx(5 / 14)
    assert float(pruned_share(torch.zeros(3), torch.zeros(3).bool())) == 0


@pytest.mark.parametrize(("method", "steps"), [("mdgf_exp", 440), ("mdgf_linear", 640)])
def test_recipes_of_equal_flops_are_as_long_as_800_steps_of_srste_allow(method: Any, steps: int) -> None:
    """The share is that of mini-srste's net; whole epochs of a tenth."""
    options: dict[str, Any] = {"img_size": 28, "patch_size": 14, "in_chans": 1, "embed_dim": 64, "depth": 2}
    options |= {"num_heads": 4, "class_token": False, "global_pool": "avg", "fc_norm": False}
    with torch.device("meta"):
        net = TimmNet("vit_tiny_patch16_224", 10, options=options)
    layers = [f"net.blocks.{block}.{name}" for block in (0, 1) for name in ("mlp.fc1", "mlp.fc2", "attn.qkv")]
    total, sparse = nm_sparsity.forward_macs(net, layers, torch.zeros(1, 1, 28, 28, device="meta"))
    control = Schedule("srste", 1, 64, 800, 40, 160)
    budget = nm_sparsity.training_cost(control, sparse / total, range(800))
    ours = Schedule(method, 1, 64, 800, 40, 160, decay_rate=8.0 if method == "mdgf_exp" else 3.3333)
    assert nm_sparsity.iso_flop_steps(budget, ours, sparse / total) // 10 * 10 == steps


def test_mixup_is_with_the_reversed_batch() -> None:
    image, soft = nm_sparsity.mixed(torch.tensor([[1.0], [5.0]]), torch.tensor([0, 2]), 3, 0.75)
    assert image.tolist() == [[2.0], [4.0]]
    assert soft.tolist() == [[0.75, 0, 0.25], [0.25, 0, 0.75]]


# 3. gradient


def test_exact_gradient_is_that_of_autograd_and_fades_with_the_weight() -> None:
    weight = golden("mask_W").clone().requires_grad_()
    mask, decay = nm_mask(weight, 2, 8), torch.tensor(0.3, dtype=torch.float64)
    upstream = golden("fb_grad_out")
    (ours,) = torch.autograd.grad(sparse_weight(weight, mask, decay, gradient="masked"), weight, upstream)
    (plain,) = torch.autograd.grad(torch.where(mask, weight, 0.3 * weight), weight, upstream)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_backward_keeps_a_bool_mask_and_no_copy_of_the_weight() -> None:
    weight = torch.randn(8, 64, requires_grad=True)
    kept: list[Tensor] = []
    mask = nm_mask(weight, 1, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sparse_weight(weight, mask, torch.tensor(0.0), lam=2e-4)
    assert [(t.dtype, t.data_ptr()) for t in kept] == [
        (torch.bool, mask.data_ptr()),
        (torch.float32, weight.data_ptr()),
    ]


def test_compiled_layer_is_one_graph_for_all_steps_and_equals_the_eager_one() -> None:
    layer = nn.Linear(16, 8)
    (sparse,) = sparsify(nn.Sequential(layer), ["0"], 1, 8).values()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    image, results = torch.randn(4, 16), {}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for decay in (0.9, 0.5, 0.0):
            sparse.set_phase(1, 8, decay, 0.0, False)
            for name, net in (("compiled", compiled), ("eager", layer)):
                layer.zero_grad()
                out = net(image)
                out.square().sum().backward()
                results[name] = (out.detach(), nm_sparse.dense_weight(layer).grad.clone())
            assert all(torch.equal(a, b) for a, b in zip(*results.values(), strict=True))


# 4. storage


@pytest.mark.parametrize(("n", "m", "share"), [(1, 4, 4.25 / 16), (1, 16, 4.5 / 64), (2, 4, 8.5 / 16)])
@pytest.mark.parametrize("axis", ["row", "col"])
def test_compressed_weight_comes_back_and_has_the_stated_bytes(n: int, m: int, share: float, axis: Any) -> None:
    """A float32 value and log2 M bits for each kept weight."""
    dense = torch.randn(32, 64)
    weight = dense * nm_mask(dense, n, m, axis)
    values, places = nm_storage.compress(weight, n, m, axis)
    assert torch.equal(nm_storage.decompress(values, places, [32, 64], m, axis), weight)
    assert values.nbytes + places.nbytes == nm_storage.compressed_bytes(weight.numel(), 4, n, m)
    assert (values.nbytes + places.nbytes) / weight.nbytes == share


def test_kernels_come_back_too() -> None:
    dense = golden("mask_conv_W").float()
    weight = dense * nm_mask(dense, 2, 4)
    assert torch.equal(nm_storage.decompress(*nm_storage.compress(weight, 2, 4), [4, 8, 3, 3], 4), weight)


def test_weight_that_is_not_sparse_is_not_stored_as_if_it_were() -> None:
    with pytest.raises(ValueError, match="stored as 1:4 has a group with more than 1 weights"):
        nm_storage.compress(torch.ones(4, 4), 1, 4)


def fading_vit() -> tuple[TimmNet, Tensor, Tensor]:
    """A net whose pruned weights still count, pictures, and the logits with the final masks."""
    net, image = vit(), torch.randn(3, 1, 8, 8)
    layers = sparsify(net, LAYERS, 1, 8).values()
    expected = net(image)
    for layer in layers:
        layer.set_phase(1, 8, 0.5, 0.0, False)
    assert not torch.equal(net(image), expected)
    return net, image, expected


def test_file_of_a_net_gives_the_same_logits_and_leaves_the_net_alone(tmp_path: Path) -> None:
    net, image, expected = fading_vit()
    before = net(image)
    sizes = nm_storage.save_compressed(net, tmp_path / "net.safetensors")
    assert sizes["compressed"] / sizes["dense"] == (4 + 3 / 8) / 32
    assert sizes["file"] == (tmp_path / "net.safetensors").stat().st_size
    plain = vit()
    plain.load_state_dict(nm_storage.load_compressed(tmp_path / "net.safetensors"))
    assert torch.equal(plain(image), expected)
    assert torch.equal(net(image), before)


def test_burnt_in_net_is_plain_and_exactly_sparse() -> None:
    net, image, expected = fading_vit()
    assert set(nm_sparse.burn_in(net).values()) == {(1, 8)}
    assert net.state_dict().keys() == vit().state_dict().keys()
    assert torch.equal(net(image), expected)
    assert nm_sparse.kept_per_group(net.net.blocks[0].mlp.fc1.weight, 8).tolist() == [1] * 128


def test_sparse_kernels_need_a_gpu() -> None:
    with pytest.raises(
        ValueError, match=r"2:4 kernels need a CUDA device and fp16 or bf16, got cpu and torch\.float32"
    ):
        nm_sparse.semi_structured(nn.Linear(64, 64))


@pytest.mark.gpu
def test_sparse_kernels_give_the_dense_result() -> None:
    layer = nn.Linear(128, 128, device="cuda", dtype=torch.float16)
    layer.weight.data *= nm_mask(layer.weight, 2, 4)
    image = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    expected = layer(image)
    assert nm_sparse.semi_structured(nn.Sequential(layer)) == ["0"]
    torch.testing.assert_close(layer(image), expected, rtol=1e-2, atol=1e-2)


# 5. module, parallel and resume


def vit() -> TimmNet:
    options = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return TimmNet("vit_tiny_patch16_224", 4, options=options)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def module(method: Any, optimizer: Any = adamw, **options: Any) -> NMSparsity:
    fracs = {"dense_frac": 0.1, "fine_tune_frac": 0.2}
    return NMSparsity(vit, optimizer, method=method, layers=LAYERS, n=1, m=8, **{**fracs, **options})


class StopAt(Callback):
    """Writes a checkpoint after some steps and ends the run there."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.limit_val_batches = 0
            trainer.should_stop = True


def fit(model: NMSparsity, ckpt: Path | None = None, extra: tuple[Callback, ...] = (), **options: Any) -> L.Trainer:
    """Three epochs of eight steps on the CPU."""
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
        callbacks=[RngState(), Ema(0.9), SparsityNoise(), *extra],
        **options,
    )
    trainer.fit(model, datamodule=ImageData(SMALL, 12, val_fraction=0.2), ckpt_path=ckpt)
    return trainer


def metrics_of(trainer: L.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("method", METHODS)
def test_run_stopped_in_the_middle_of_its_schedule_ends_as_an_undisturbed_one(method: str, tmp_path: Path) -> None:
    # step 9 of 24 lies within a frame, and b is between 0 and 1
    options = {"mdgf_exp": {"mixup": 0.5}, "mdgf_linear": {"decay_rate": 1.0}}.get(method, {})
    L.seed_everything(5)
    whole = module(method, **options)
    trainer = fit(whole)
    L.seed_everything(5)
    fit(module(method, **options), extra=(StopAt(9, tmp_path / "9.ckpt"),))
    torch.rand(7)
    resumed = module(method, **options)
    resumed_trainer = fit(resumed, tmp_path / "9.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert metrics_of(resumed_trainer) == metrics_of(trainer)


def test_each_step_has_the_phase_of_its_number_whatever_the_accumulation() -> None:
    seen = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            seen.append((trainer.global_step, pl_module.sparse[0].decay.item()))

    fit(module("mdgf_exp"), extra=(Watch(),), accumulate_grad_batches=2)
    schedule = Schedule("mdgf_exp", 1, 8, total=12, dense=1, fine_tune=2)
    assert [step for step, _ in seen] == list(range(12))
    assert [decay for _, decay in seen] == pytest.approx([schedule.at(step).decay for step in range(12)])


def test_headline_is_with_the_final_mask_and_soft_with_the_current_weights() -> None:
    model = module("mdgf_exp", fine_tune_frac=0.0, decay_rate=0.5)
    trainer = fit(model)
    trainer.callbacks = []
    found = metrics_of(trainer)
    image, label = evaluated(trainer)
    for suffix, phase in (("", Phase(1, 8)), ("_soft", model.plan.at(23))):
        model.apply_phase(phase)
        ema = model.ema_weights
        kept = ema.swap_in(model)
        with torch.no_grad():
            loss = F.cross_entropy(model.eval()(image), label)
        ema.swap_out(model, kept)
        assert found[f"test/loss{suffix}"] == pytest.approx(float(loss), rel=1e-5)
    assert found["test/loss"] != pytest.approx(found["test/loss_soft"], rel=1e-3)


def test_test_set_meets_the_final_mask_whatever_the_last_step_had() -> None:
    """Without validation the weights of the last step would still be soft."""
    model = module("mdgf_exp", fine_tune_frac=0.0, decay_rate=0.5)
    trainer = fit(model, limit_train_batches=1, limit_val_batches=0)
    trainer.callbacks = []
    trainer.test(model, datamodule=trainer.datamodule, verbose=False)  # type: ignore[attr-defined]
    image, label = evaluated(trainer)
    model.apply_phase(Phase(1, 8))
    with torch.no_grad():
        loss = F.cross_entropy(model.eval()(image), label)
    assert metrics_of(trainer)["test/loss"] == pytest.approx(float(loss), rel=1e-5)


def evaluated(trainer: L.Trainer) -> tuple[Tensor, Tensor]:
    """All test pictures as they are evaluated."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    batch = data.as_evaluated(data.examples("test")[torch.arange(len(data.examples("test")))])
    return batch["image"], batch["label"]


def test_dense_method_equals_a_net_without_any_parametrization() -> None:
    model = module("dense")
    image = torch.randn(3, 1, 8, 8)
    plain = vit()
    plain.load_state_dict(
        {k.replace("parametrizations.weight.original", "weight"): v for k, v in model.net.state_dict().items()}
    )
    assert torch.equal(model(image), plain(image))


def test_biases_norms_and_positions_are_not_decayed() -> None:
    model = module("ste")
    fit(model, limit_train_batches=1, limit_val_batches=0)
    first, second = model.trainer.optimizers[0].param_groups
    names = {p: name for name, p in model.named_parameters()}
    assert (first["weight_decay"], second["weight_decay"]) == (0.01, 0.0)
    assert all(names[p].endswith((".weight", ".original")) for p in first["params"])
    assert {"net.net.pos_embed", "net.net.cls_token", "net.net.norm.weight"} <= {names[p] for p in second["params"]}


def test_export_callback_writes_what_it_counts(tmp_path: Path) -> None:
    model = module("srste")
    trainer = fit(model, extra=(SparseExport(),), default_root_dir=tmp_path)
    state = nm_storage.load_compressed(tmp_path / "sparse.safetensors")
    plain = vit()
    plain.load_state_dict(state)
    image, _ = evaluated(trainer)
    torch.testing.assert_close(plain.eval()(image), model.eval()(image), rtol=0, atol=0)
    assert metrics_of(trainer)["storage/share"] == pytest.approx((4 + 3 / 8) / 32)


def test_noise_is_that_of_the_last_step() -> None:
    """Of the dense weights' gradients and of Adam's state, by hand from what the run leaves behind."""
    gradients = {}

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            for name in nm_sparse.sparse_layers(pl_module):
                gradients[name] = nm_sparse.dense_weight(pl_module.get_submodule(name)).grad.clone()

    model = module("ste")
    trainer = fit(model, extra=(Watch(),))
    state = trainer.optimizers[0].state
    weights = [nm_sparse.dense_weight(model.get_submodule(name)) for name in gradients]
    found = metrics_of(trainer)
    assert len(gradients) == 6
    assert found["noise/grad_var"] == pytest.approx(float(torch.stack([g.var() for g in gradients.values()]).mean()))
    variances = torch.stack([state[w]["exp_avg_sq"].var() for w in weights])
    assert found["noise/adam_v_var"] == pytest.approx(float(variances.mean()))


def parallel_run(out: Path, **options: Any) -> None:
    """SR-STE and MDGF-Exp; rank 0 writes whole weights and metrics.

    With SGD: Adam would make steps of full length of the rounding errors that are the gradients of the keys' biases.
    """
    for method in ("srste", "mdgf_exp"):
        L.seed_everything(3)
        model = module(method, sgd)
        trainer = fit(model, **options)
        weights = {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in model.named_parameters()
        }
        if trainer.is_global_zero:
            torch.save({"weights": weights, "metrics": metrics_of(trainer)}, out / f"{method}.pt")


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_one(strategy: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    parallel_run(tmp_path / "one")
    run_two(__file__, tmp_path / "two", strategy)
    for method in ("srste", "mdgf_exp"):
        one, two = (torch.load(tmp_path / name / f"{method}.pt") for name in ("one", "two"))
        torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-5, atol=1e-6)
        assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4)


# 6. bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "model.method must be one of dense, ste, .* got 'magic'"),
        ({"n": 9}, "model.n must be between 1 and model.m 8, got 9"),
        ({"m": 24}, "net.blocks.0.mlp.fc1: 1024 weights do not divide into groups of 24"),
        ({"axis": "diagonal"}, "model.axis must be row or col, got 'diagonal'"),
        ({"gradient": "none"}, "model.gradient must be ste or masked, got 'none'"),
        ({"layers": ("*.fc9",)}, r"model.layers: no layer matches '\*.fc9'; there are .*mlp.fc1"),
        ({"dense_frac": 0.9}, "leave a part of the run between them, got 0.9 and 0.2"),
        ({"sparsify_frac": 0.0}, r"model.sparsify_frac must be in \(0, 1\], got 0.0"),
        ({"lam": -1.0}, "must not be negative, got 8.0, -1.0 and 0.0"),
        ({"method": "sdgf_step", "m": 8, "n": 3}, "needs an m / n that is a power of two, got 3:8"),
        ({"method": "sdgf_geo", "m": 256}, "do not divide into groups of 2048"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    settings = {"method": "ste", "layers": LAYERS, "m": 8, "fine_tune_frac": 0.2, **options}
    with pytest.raises(ValueError, match=message):
        NMSparsity(vit, adamw, **settings)


def test_convolutions_have_no_groups_along_the_outputs() -> None:
    with pytest.raises(ValueError, match=r"N:M groups need a Linear or \(row only\) a Conv2d, got \(4, 8, 3, 3\)"):
        nm_mask(golden("mask_conv_W"), 1, 4, "col")


def test_observer_without_sparse_layers_is_refused() -> None:
    plain: Any = L.LightningModule()
    with pytest.raises(ValueError, match="SparsityNoise needs layers with N:M weights, LightningModule has none"):
        SparsityNoise().setup(None, plain, "fit")


def test_missing_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train, expected a folder of pictures for each class; ImageNet-1k"):
        ImageNet(str(tmp_path)).read()


def test_assigned_weight_becomes_the_dense_one() -> None:
    layer = nn.Linear(8, 4)
    sparsify(nn.Sequential(layer), ["0"], 1, 8)
    layer.weight = torch.ones(4, 8)
    assert torch.equal(nm_sparse.dense_weight(layer), torch.ones(4, 8))
    assert isinstance(layer.parametrizations["weight"][0], NMSparse)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parallel_run(Path(sys.argv[1]), devices=2, strategy=sys.argv[2])
