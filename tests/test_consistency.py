"""Consistency training: formulas against hand-computed values, step, sampler, resume, parallel."""

import math
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from synthetic import SyntheticImages
from torch import Tensor, nn
from two_processes import run_two

from callbacks.assign_ahead import AssignAhead
from callbacks.rng import RngState, make_generator
from datamodules.images import ImageData
from lightning_modules.diffusion import consistency
from lightning_modules.diffusion.consistency import (
    BoundaryPreconditioner,
    ConsistencyEDM,
    ConsistencyModule,
    ConsistencySampler,
)
from lightning_modules.diffusion.couplings import Independent
from lightning_modules.diffusion.evaluation import PadAndPool, SampleEvaluation
from lightning_modules.diffusion.grids import Grid
from lightning_modules.diffusion.parameterization import Denoiser
from lightning_modules.diffusion.probe import probe_draws
from lightning_modules.diffusion.processes import EDM, LinearFlow
from lightning_modules.immiscible import ExactOT, LinearAssignment, NearestOfK

SMALL = SyntheticImages(num_classes=4, channels=1, size=8, per_class=30)


class Net(nn.Module):
    """Two layers that see pixels, time and label."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16 + 1, 12), nn.Linear(12, 16)
        self.labels = nn.Embedding(5, 12)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        h = self.first(torch.cat([x.flatten(1), time[:, None] / 1000], dim=1))
        h = h if label is None else h + self.labels(label)
        return self.last(h.tanh()).view_as(x)


def module(**options) -> ConsistencyModule:
    options = {"process": ConsistencyEDM(), "encoder": PadAndPool(pool=2), "last_levels": 8} | options
    return ConsistencyModule(
        Net, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2), ema_decay=0.9, **options
    )


def pictures(batch_size: int = 16) -> ImageData:
    return ImageData(SMALL, batch_size=batch_size, val_fraction=0.2, mean=[0.5], std=[0.5])


def fit(
    model: ConsistencyModule, epochs: int = 1, ckpt: Path | None = None, callbacks: tuple = (), **options
) -> L.Trainer:
    L.seed_everything(3)
    runner = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[RngState(), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **options,
    )
    runner.fit(model, datamodule=pictures(), ckpt_path=ckpt)
    return runner


# 1. formulas, values computed by hand


def test_boundary_coefficients_at_three_levels() -> None:
    """sigma_data 0.5: c_skip = 0.25 / ((s - e)^2 + 0.25), c_out = 0.5 (s - e) / sqrt(s^2 + 0.25)."""
    sigma = torch.tensor([0.5, 1.0, 1.2], dtype=torch.float64)
    c_skip, c_out, c_in = consistency.boundary_coefficients(sigma, 0.5)
    assert c_skip.tolist() == pytest.approx([1.0, 0.5, 0.25 / 0.74], rel=1e-12)
    assert c_out.tolist() == pytest.approx([0.0, 0.25 / math.sqrt(1.25), 0.35 / 1.3], rel=1e-12)
    assert c_in.tolist() == pytest.approx([math.sqrt(2), 1 / math.sqrt(1.25), 1 / 1.3], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_least_level_is_a_fixed_point_whatever_the_net_says(dtype: torch.dtype) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=dtype) * 1e-3
    denoiser = Denoiser(lambda x, time, label: x + 1e6, ConsistencyEDM(), "x0", BoundaryPreconditioner())
    assert torch.equal(denoiser(x, torch.zeros(5, dtype=torch.float64)).x0, x)


def test_preconditioner_wraps_the_net_by_its_coefficients() -> None:
    """The net returns its input, so f = (c_skip + c_out c_in) x; sigma 1, sigma_min 0.5."""
    process = ConsistencyEDM(sigma_min=0.5, sigma_max=2.0, rho=1.0)
    denoiser = Denoiser(lambda x, time, label: x, process, "x0", BoundaryPreconditioner())
    x = torch.ones(1, 2, dtype=torch.float64)
    found = denoiser(x, torch.tensor([1 / 3], dtype=torch.float64)).x0
    assert found[0].tolist() == pytest.approx([0.5 + 0.25 / 1.25] * 2, rel=1e-12)


def test_levels_are_those_of_karras() -> None:
    """rho 2 between 1 and 9: roots 1, 2, 3."""
    process = ConsistencyEDM(sigma_min=1.0, sigma_max=9.0, rho=2.0)
    sigma = process.sigma(consistency.level_times(torch.arange(3), 3))
    assert sigma.tolist() == pytest.approx([1.0, 4.0, 9.0], rel=1e-12)


def test_net_sees_250_times_the_log_of_sigma() -> None:
    process = ConsistencyEDM()
    time = process.u_of_sigma(torch.tensor([1.0, math.e], dtype=torch.float64))
    assert process.net_time(time).tolist() == pytest.approx([0.0, 250.0], abs=1e-9)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 2), (1, 16), (25, 76), (50, 107), (99, 151), (100, 151)],
)
def test_number_of_levels_with_the_official_settings(step: int, expected: int) -> None:
    """s0 2, s1 150, K 100: ceil(sqrt(227.97 k + 4) - 1) + 1; the roots are 2, 15.2, 75.5, 106.8, 150.2 and 151."""
    assert consistency.num_levels(step, 100, 2, 150) == expected


@pytest.mark.parametrize(("num", "expected"), [(2, 0.81), (3, 0.9), (5, math.sqrt(0.9)), (151, 0.9 ** (1 / 75))])
def test_decay_of_the_target(num: int, expected: float) -> None:
    assert consistency.following_decay(num, 2, 0.9) == pytest.approx(expected, rel=1e-12)


def test_pseudo_huber_by_hand() -> None:
    """c = scale 2 = 4 for D = 4; d = (3, 0, 0, 0): sqrt(9 + 16) - 4 = 1, and 0 for no difference."""
    output = torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert consistency.pseudo_huber(output, torch.zeros_like(output), 2.0).tolist() == [1.0, 0.0]


def test_pseudo_huber_has_the_gradient_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    output, wanted = (torch.randn(3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: consistency.pseudo_huber(x, wanted, 0.5), output.requires_grad_())


# 2. sampler


class Recorder:
    """f of a net that remembers x and sees sigma: denoiser with x0 = x / 4."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    def __call__(self, x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        self.inputs.append(x)
        return x / 4


def recording(process: EDM) -> tuple[Recorder, Denoiser]:
    net = Recorder()
    return net, Denoiser(net, process, "x0")


def test_one_step_is_one_evaluation_of_the_start_noise_without_a_generator() -> None:
    _, denoiser = recording(ConsistencyEDM())
    z = torch.tensor([[2.0, -8.0]])
    images, nfe = ConsistencySampler()(denoiser, z, Grid()(denoiser.process, 1))
    assert nfe == 1
    assert images.tolist() == [[0.5, -1.0]]  # -2 is clamped
    assert ConsistencySampler(clip=False)(denoiser, z, Grid()(denoiser.process, 1))[0].tolist() == [[0.5, -2.0]]


def test_second_step_starts_from_fresh_noise_at_the_middle_level() -> None:
    process = ConsistencyEDM(sigma_min=3.0, sigma_max=7.0, rho=1.0)
    net, denoiser = recording(process)
    z = torch.tensor([[2.0, -8.0]], dtype=torch.float64)
    images, nfe = ConsistencySampler()(denoiser, z, Grid()(process, 2), torch.Generator().manual_seed(5))
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    second = torch.tensor([[0.5, -1.0]]) + 4.0 * noise  # sqrt(5^2 - 3^2)
    torch.testing.assert_close(net.inputs[1], second)
    torch.testing.assert_close(images, (second / 4).clamp(-1, 1))
    assert nfe == 2


def test_several_steps_ask_for_a_generator() -> None:
    _, denoiser = recording(ConsistencyEDM())
    with pytest.raises(ValueError, match="needs a generator"):
        ConsistencySampler()(denoiser, torch.zeros(1, 2), Grid()(denoiser.process, 2))


def test_samples_come_from_the_averaged_weights_at_the_largest_level() -> None:
    model = module(evaluation=SampleEvaluation(ConsistencySampler(clip=False), nfes=[1]))
    with torch.no_grad():
        model.average.module.last.bias.fill_(2.0)
    seen = model.evaluation.sample(model.denoiser(), (1, 4, 4), 0, 1, count=4)
    z = torch.randn(4, 1, 4, 4, generator=make_generator("samples", seed=99)) * 80
    c_skip, c_out, c_in = consistency.boundary_coefficients(torch.tensor(80.0, dtype=torch.float64), 0.002)
    output = model.average.module(float(c_in) * z, torch.full((4,), 250 * math.log(80)))
    torch.testing.assert_close(seen, float(c_skip) * z + float(c_out) * output, rtol=1e-5, atol=1e-5)


# 3. module


@pytest.mark.parametrize("coupling", [Independent(), LinearAssignment(), NearestOfK(3)], ids=["none", "linear", "knn"])
@pytest.mark.parametrize("loss", ["l2", "huber"])
def test_step_is_the_formula(coupling: nn.Module, loss: str) -> None:
    """Loss of the second step, written out, from the module's own draws: one z of the coupling for both levels."""
    model, seen = module(coupling=coupling, loss=loss), []
    step = model.training_step

    def spy(batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        generators = model.noise_generator, model.time_generator
        states = [generator.get_state() for generator in generators]
        out = step(batch, batch_idx)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        data = nn.functional.avg_pool2d(batch["image"], 2)
        noise = coupling(data, model.noise_generator).noise
        # two steps with s0 2, s1 8: N(0) = 2; N(1) = ceil(sqrt(77 / 2 + 4) - 1) + 1 = 7
        num = (2, 7)[batch_idx]
        lower = torch.randint(num - 1, (len(data),), generator=model.time_generator)
        seen.append((float(out["loss"].detach()), written_out(model, data, noise, lower, num, loss)))
        return out

    model.training_step = spy
    fit(model, limit_train_batches=2, limit_val_batches=0)
    assert len(seen) == 2
    for found, expected in seen:
        assert found == pytest.approx(expected, rel=1e-5)


def written_out(model: ConsistencyModule, data: Tensor, noise: Tensor, lower: Tensor, num: int, loss: str) -> float:
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)

    def f(net: nn.Module, level: Tensor) -> Tensor:
        s = (low + level.double() / (num - 1) * (high - low)) ** 7
        wide = s[:, None, None, None]
        x = data + wide.to(data) * noise
        skip, out = 0.25 / ((wide - 0.002) ** 2 + 0.25), 0.5 * (wide - 0.002) / (wide**2 + 0.25).sqrt()
        inner = net((x / (wide**2 + 0.25).sqrt().to(x)), (250 * s.log()).float())
        return skip.to(x) * x + out.to(x) * inner

    with torch.no_grad():
        difference = f(model.net, lower + 1) - f(model.target.module, lower)
    if loss == "l2":
        return float(difference.square().mean())
    c = 0.00054 * 4
    return float(((difference.square().sum((1, 2, 3)) + c**2).sqrt() - c).mean())


def test_target_has_no_gradient_and_the_net_has() -> None:
    model = prepared(module())
    model.training_step({"image": torch.zeros(4, 1, 8, 8), "label": torch.zeros(4, dtype=torch.int64)}, 0)[
        "loss"
    ].backward()
    assert float(model.net.last.weight.grad.abs().sum()) > 0
    assert all(p.grad is None for p in model.target.parameters())


def prepared(model: ConsistencyModule) -> ConsistencyModule:
    """As in the first step of a hundred, without a Trainer."""
    model.time_generator, model.noise_generator, model.label_generator = (torch.Generator() for _ in range(3))
    model._steps, model._total = 0, 100
    model.on_train_epoch_start()
    return model


def test_labels_move_with_their_images_under_transport() -> None:
    model, seen = prepared(module(coupling=ExactOT(), num_classes=4, label_dropout=0.0)), []
    predict = model._predict
    model._predict = lambda net, data, noise, time, label: (
        seen.append((data, label)) or predict(net, data, noise, time, label)
    )
    classes = torch.arange(4).repeat(4)
    images = (classes / 2.0 - 1)[:, None, None, None].expand(16, 1, 8, 8)
    model.training_step({"image": images, "label": classes}, 0)
    for data, label in seen:
        assert torch.equal(data[:, 0, 0, 0], label / 2.0 - 1)


def test_arms_that_differ_in_the_coupling_see_the_same_levels_and_noises() -> None:
    seen: list[tuple[Tensor, ...]] = []
    for coupling in (None, LinearAssignment()):
        model = module(coupling=coupling)
        kept = model._neighbours
        model._neighbours = lambda net, target, *rest, kept=kept: seen.append(rest) or kept(net, target, *rest)
        fit(model, limit_train_batches=1, limit_val_batches=0)
    (data, noise, lower, *_), (other_data, other_noise, other_lower, *_) = seen
    assert torch.equal(data, other_data)
    assert torch.equal(lower, other_lower)
    assert torch.equal(noise.flatten().sort().values, other_noise.flatten().sort().values)
    assert not torch.equal(noise, other_noise)


def test_target_follows_with_the_decay_of_the_step_just_done() -> None:
    """Six steps, s0 2, s1 8, mu0 0.9; N(k) = 2, 5, 6, 7, 8, 9 from sqrt(77 k / 6 + 4) = 2, 4.1, 5.4, 6.5, 7.4, 8.3."""
    model, weights = module(), []
    expected = model.net.last.bias.detach().clone()
    update = model.average.update
    model.average.update = lambda count: (weights.append(model.net.last.bias.detach().clone()), update(count))
    fit(model, limit_val_batches=0)
    for num, weight in zip((2, 5, 6, 7, 8, 9), weights, strict=True):
        mu = 0.9 ** (2 / (num - 1))
        expected = mu * expected + (1 - mu) * weight
    torch.testing.assert_close(model.target.module.last.bias, expected)


def test_target_follows_once_per_optimizer_step_under_accumulation() -> None:
    model, decays = module(), []
    model.target.follow = decays.append
    fit(model, accumulate_grad_batches=3, limit_val_batches=0)
    assert decays == pytest.approx([0.9**2, 0.9 ** (2 / 6)])  # N(0) = 2, N(1) = 7 of two steps


def test_pairs_assigned_ahead_change_nothing() -> None:
    models = [module(coupling=LinearAssignment()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, callbacks in zip(models, ((), (AssignAhead(),)), strict=True):
        fit(model, callbacks=callbacks, limit_val_batches=0)
    assert torch.equal(models[0].net.last.weight, models[1].net.last.weight)


def test_decay_of_zero_makes_the_target_the_net() -> None:
    model = module(target_decay=0.0)
    fit(model, limit_val_batches=0)
    assert torch.equal(model.target.module.last.weight, model.net.last.weight)


def test_schedules_are_logged() -> None:
    metrics = fit(module(), limit_val_batches=0).callback_metrics
    assert float(metrics["consistency/levels"]) == 9
    assert float(metrics["consistency/target_decay"]) == pytest.approx(0.9 ** (2 / 8), rel=1e-6)


def test_probe_is_the_mean_difference_on_the_finest_grid() -> None:
    """f(x, t) = x without a net: neighbours differ by (t' - t) z, whatever the image."""
    model = module(num_classes=0)
    model.on_validation_epoch_start()
    steps = []
    model._predict = lambda net, data, noise, time, label: (
        steps.append(model.process.sigma(time)) or Denoiser(lambda x, t, y: x, model.process, "x0")(
            model.process.marginal(data, noise, time), time
        )
    )  # fmt: skip
    model._probe({"image": torch.zeros(8, 1, 8, 8), "index": torch.arange(8)})
    noise = probe_draws(model.process, torch.zeros(8, 1, 4, 4), 0)[2]
    # eight images, strata of the eight pairs of nine levels: each pair once
    assert sorted(steps[1].tolist()) == pytest.approx(model.process.sigma(torch.arange(8) / 8).tolist(), rel=1e-12)
    expected = ((steps[0] - steps[1]) ** 2 * noise.double().square().mean((1, 2, 3))).mean()
    assert float(model._probes[""].means()["loss"]) == pytest.approx(float(expected), rel=1e-4)


def test_probe_takes_the_averaged_weights_and_the_trained_ones_as_raw() -> None:
    model = module()
    model.on_validation_epoch_start()
    with torch.no_grad():
        model.average.module.last.bias.fill_(100.0)  # c_out changes between neighbours, so they disagree
    model._probe({"image": torch.zeros(8, 1, 8, 8), "index": torch.arange(8)})
    averaged, raw = (float(model._probes[name].means()["loss"]) for name in ("", "_raw"))
    assert averaged > 10 * raw


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process": LinearFlow()}, "model.process must be an EDM for consistency training, got LinearFlow"),
        ({"loss": "lpips"}, "model.loss must be one of l2, huber, got 'lpips'"),
        ({"first_levels": 9}, "model.first_levels must be at least 2 and at most last_levels, got 9 and 8"),
        ({"target_decay": 1.0}, "model.target_decay must be in .0, 1., got 1.0"),
    ],
)
def test_unknown_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_endless_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer.max_steps or max_epochs"):
        fit(module(), epochs=-1, limit_val_batches=0)


# 4. resume


def test_three_epochs_equal_one_and_a_resume_of_two(tmp_path: Path) -> None:
    """The budget is part of the schedule: the first run is stopped in the middle of three epochs."""
    build = lambda: module(coupling=LinearAssignment(), num_classes=4)  # noqa: E731
    L.seed_everything(3)
    whole = build()
    metrics = fit(whole, 3).callback_metrics
    L.seed_everything(3)
    first = build()
    on_end = first.on_train_epoch_end
    first.on_train_epoch_end = lambda: (on_end(), setattr(first.trainer, "should_stop", True))
    fit(first, 3).save_checkpoint(tmp_path / "one.ckpt")
    L.seed_everything(3)
    resumed = build()
    torch.rand(7)
    resumed_metrics = fit(resumed, 3, tmp_path / "one.ckpt").callback_metrics
    assert first.trainer.global_step * 3 == whole.trainer.global_step == resumed.trainer.global_step
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert {k: float(v) for k, v in resumed_metrics.items()} == {k: float(v) for k, v in metrics.items()}


# 5. parallel


class SharedLevels(ConsistencyModule):
    """Level by the image, so that it does not depend on the rank that has it."""

    def training_step(self, batch: dict, batch_idx: int) -> dict[str, Tensor]:
        index = batch["index"]
        kept, torch.randint = torch.randint, lambda high, size, **_: index % high
        try:
            return super().training_step(batch, batch_idx)
        finally:
            torch.randint = kept


class DoublePool(PadAndPool):
    """Makes the whole run float64, so that sums over other parts of a batch agree."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.double())


def parallel_run(out: str, devices: int) -> None:
    """An epoch of six steps with globally assigned noise on one or two processes."""
    L.seed_everything(3)
    model = SharedLevels(
        Net,
        ConsistencyEDM(),
        lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
        coupling=LinearAssignment(scope="global"),
        encoder=DoublePool(pool=2),
        num_classes=4,
        label_dropout=0.0,
        ema_decay=0.9,
        last_levels=8,
    ).double()
    options = {"devices": 2, "strategy": "ddp"} if devices == 2 else {"devices": 1}
    runner = fit(model, **options)
    # the probe draws by the batches of a rank, and the permuted distance by its neighbours
    names = ("train/loss", "train/mse", "coupling/distance", "coupling/noise_power", "consistency/levels")
    metrics = {name: float(runner.callback_metrics[name]) for name in names}
    torch.save({"state": model.state_dict(), "metrics": metrics}, f"{out}/{devices}-{runner.global_rank}.pt")


@pytest.mark.distributed
def test_two_processes_with_global_assignment_equal_one(tmp_path: Path) -> None:
    """Weights, target, average and metrics; the net in float64."""
    parallel_run(str(tmp_path), 1)
    run_two(__file__, tmp_path)
    whole, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for name, value in whole["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        torch.testing.assert_close(first["state"][name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert first["metrics"] == pytest.approx(whole["metrics"], rel=1e-5, abs=1e-6)


if __name__ == "__main__":
    parallel_run(sys.argv[1], 2)
