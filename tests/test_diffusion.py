"""The diffusion module: step, average, evaluation, resume, prior."""

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from synthetic import SyntheticImages
from torch import Tensor, nn

from callbacks.rng import RngState
from datamodules.images import ImageData
from lightning_modules.curriculum_diffusion import CurriculumTimes
from lightning_modules.diffusion import frechet, samplers
from lightning_modules.diffusion.average import WarmupHoldDecay, WeightAverage, ema_decay
from lightning_modules.diffusion.evaluation import PadAndPool, SampleEvaluation
from lightning_modules.diffusion.module import DiffusionModule
from lightning_modules.diffusion.parameterization import EDMPreconditioner
from lightning_modules.diffusion.prior import Prior
from lightning_modules.diffusion.probe import QuarterLosses, probe_draws
from lightning_modules.diffusion.processes import EDM, DDPMLinear, LinearFlow, TrigFlow
from lightning_modules.diffusion.times import LossAware, StratifiedTimes
from lightning_modules.diffusion.weighting import EDMWeighting, MinSNR, UncertaintyWeighting
from lightning_modules.immiscible import ExactOT, LinearAssignment

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


def adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def warm(optimizer: torch.optim.Optimizer) -> WarmupHoldDecay:
    return WarmupHoldDecay(optimizer, warmup=4)


@pytest.fixture(autouse=True)
def quick_feature_net(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "IMAGES", 360)


def module(**options) -> DiffusionModule:
    options = {"process": LinearFlow(), "parameterization": "flow", "encoder": PadAndPool(pool=2)} | options
    return DiffusionModule(Net, optimizer=adam, scheduler=warm, ema_decay=0.9, **options)


def pictures() -> ImageData:
    return ImageData(SMALL, batch_size=16, val_fraction=0.2, mean=[0.5], std=[0.5])


def trainer(epochs: int = 1, **options) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[RngState()],
        **quiet,
        **options,
    )


def fit(model: DiffusionModule, epochs: int = 1, ckpt: Path | None = None, **options) -> L.Trainer:
    L.seed_everything(3)
    runner = trainer(epochs, **options)
    runner.fit(model, datamodule=pictures(), ckpt_path=ckpt)
    return runner


# module


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"process": TrigFlow(), "parameterization": "v", "coupling": LinearAssignment()},
        {"process": DDPMLinear(), "parameterization": "eps", "weighting": MinSNR()},
        {
            "process": EDM(),
            "parameterization": "x0",
            "weighting": EDMWeighting(),
            "preconditioner": EDMPreconditioner(),
        },
    ],
    ids=["flow", "assigned", "min-snr", "edm"],
)
def test_step_is_the_formula(options: dict) -> None:
    """The loss of the first step, written out, from the module's own draws."""
    L.seed_everything(3)
    model = module(**options)
    seen = {}
    step = model.training_step

    def spy(batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        states = [generator.get_state() for generator in (model.noise_generator, model.time_generator)]
        out = step(batch, batch_idx)
        for generator, state in zip((model.noise_generator, model.time_generator), states, strict=True):
            generator.set_state(state)
        x0 = nn.functional.avg_pool2d(batch["image"], 2)
        e = model.coupling(x0, model.noise_generator).noise
        t, _ = model.time_sampler(len(x0), model.process, model.time_generator)
        seen.update(loss=out["loss"].detach(), expected=written_out(model, x0, e, t))
        return out

    model.training_step = spy
    fit(model, limit_train_batches=1, limit_val_batches=0)
    torch.testing.assert_close(seen["loss"], seen["expected"], rtol=1e-5, atol=1e-6)


def written_out(model: DiffusionModule, x0: Tensor, e: Tensor, t: Tensor) -> Tensor:
    a, s = (part.float()[:, None, None, None] for part in (model.process.alpha(t), model.process.sigma(t)))
    x = a * x0 + s * e
    if isinstance(model.process, EDM):
        c_in, c_skip = (s**2 + 0.25).rsqrt(), 0.25 / (s**2 + 0.25)
        c_out = s * 0.5 * c_in
        denoised = c_skip * x + c_out * model.net(c_in * x, s.flatten().log() / 4)
        return ((denoised - x0) ** 2 * (s**2 + 0.25) / (s * 0.5) ** 2).mean()
    if isinstance(model.process, DDPMLinear):
        snr = (a / s) ** 2
        return ((model.net(x, t.float()) - e) ** 2 * snr.clamp(max=5) / snr).mean()
    wanted = x0 - e if isinstance(model.process, LinearFlow) else a * e - s * x0
    return ((model.net(x, 1000 * t.float()) - wanted) ** 2).mean()


def test_labels_move_with_their_images_under_transport() -> None:
    """A net that returns its label and zero images make the loss a function of which labels went in."""
    model = module(coupling=ExactOT(), num_classes=4, label_dropout=0.0)
    model.time_generator, model.noise_generator, model.label_generator = (torch.Generator() for _ in range(3))
    pictures_of_class = torch.arange(4).repeat(4)
    images = (pictures_of_class / 2.0 - 1)[:, None, None, None].expand(16, 1, 8, 8)
    seen = []
    predict = model._predict
    model._predict = lambda net, data, noise, time, label: (
        seen.append((data, label)) or predict(net, data, noise, time, label)
    )
    model.on_train_epoch_start()
    model.training_step({"image": images, "label": pictures_of_class}, 0)
    data, label = seen[0]
    assert torch.equal(data[:, 0, 0, 0], label / 2.0 - 1)


def test_runs_that_differ_in_the_coupling_see_the_same_draws() -> None:
    """Paired comparison: first loss of both arms at t and data alike, noise a permutation."""
    draws = []
    for coupling in (None, LinearAssignment()):
        model = module(coupling=coupling)
        kept = model._predict
        seen: list[tuple[Tensor, ...]] = []
        model._predict = lambda net, *rest, kept=kept, seen=seen: seen.append(rest) or kept(net, *rest)
        fit(model, limit_train_batches=1, limit_val_batches=0)
        draws.append(seen[0])
    (data, noise, time, _), (other_data, other_noise, other_time, _) = draws
    assert torch.equal(data, other_data)
    assert torch.equal(time, other_time)
    assert torch.equal(noise.flatten().sort().values, other_noise.flatten().sort().values)


def test_average_follows_its_formula_over_a_run() -> None:
    model, weights = module(), []
    update = model.average.update
    model.average.update = lambda count: (weights.append(model.net.last.bias.detach().clone()), update(count))
    fit(model, epochs=1, limit_val_batches=0)
    expected = weights[0]
    for count, weight in enumerate(weights[1:], start=1):
        expected = torch.lerp(expected, weight, 1 - min(0.9, (1 + count) / (10 + count)))
    torch.testing.assert_close(model.average.module.last.bias, expected)
    assert len(weights) == 6  # 96 training images in batches of 16


def test_average_is_updated_once_per_optimizer_step_under_accumulation() -> None:
    model, counts = module(), []
    model.average.update = lambda count: counts.append(count)
    fit(model, accumulate_grad_batches=3, limit_val_batches=0)
    assert counts == [0, 1]


def test_first_update_of_the_average_copies() -> None:
    assert [round(ema_decay(n, 0.5), 3) for n in (0, 1, 2, 20)] == [0.0, 0.182, 0.25, 0.5]


def test_average_copies_buffers_and_leaves_frozen_parameters() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net[0].bias.requires_grad_(False)
    average = WeightAverage(net, 0.9)
    with torch.no_grad():
        net[0].bias.add_(1.0)
        net[1].running_mean.add_(3.0)
    before = average.module[0].bias.clone()
    average.update(5)
    assert torch.equal(average.module[0].bias, before)
    assert torch.equal(average.module[1].running_mean, net[1].running_mean)


def test_rate_warms_up_holds_and_falls() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = WarmupHoldDecay(optimizer, warmup=2, total=8, hold=0.5, final=0.2), []
    for _ in range(9):
        rates.append(round(optimizer.param_groups[0]["lr"], 6))
        optimizer.step()
        scheduler.step()
    assert rates == [0.5, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]


def test_uncertainty_weights_learn_with_their_own_rate() -> None:
    model = module(aggregator=UncertaintyWeighting(4), time_sampler=StratifiedTimes(4))
    fit(model, limit_train_batches=2, limit_val_batches=0)
    # AdamW moves by about its rate: 0.025 in each step, warm-up 1/4 and 2/4 of it
    assert model.aggregator.log_variances.abs().max().item() == pytest.approx(0.025 * 0.75, rel=0.05)


# evaluation


def test_probe_draws_depend_on_the_position_only() -> None:
    data = torch.zeros(8, 1, 2, 2)
    first, again, other = (probe_draws(LinearFlow(), data, at) for at in (0, 0, 128))
    assert torch.equal(first[2], again[2])
    assert not torch.equal(first[2], other[2])
    assert ((8 * first[0]).long().sort().values == torch.arange(8)).all()


def test_quarters_are_means_of_their_losses() -> None:
    probe = QuarterLosses()
    probe.add(torch.tensor([0.1, 0.2, 0.3, 0.9], dtype=torch.float64), torch.tensor([1.0, 3.0, 5.0, 7.0]))
    probe.add(torch.tensor([0.6], dtype=torch.float64), torch.tensor([9.0]))
    means = {name: float(value) for name, value in probe.means().items()}
    assert means == {"loss": 5.0, "loss_q1": 2.0, "loss_q2": 5.0, "loss_q3": 9.0, "loss_q4": 7.0}


def test_feature_net_comes_back_from_the_cache(tmp_path: Path) -> None:
    sets = SMALL.load()
    train = (sets.train_images.float() / 127.5 - 1, sets.train_labels)
    test = sets.test_images.float() / 127.5 - 1
    made, found = (frechet.reference(train, test, 4, tmp_path) for _ in range(2))
    assert made.digest == found.digest
    assert torch.equal(made.net.features(test), found.net.features(test))
    assert torch.equal(made.moments.cov, found.moments.cov)
    assert len([*tmp_path.iterdir()]) == 1


def test_share_of_samples_that_show_their_class(tmp_path: Path) -> None:
    evaluation = SampleEvaluation(samplers.FlowSampler(), nfes=[2], steps=[2], num_samples=40, cache=str(tmp_path))
    model = module(evaluation=evaluation, num_classes=4)
    found = fit(model).callback_metrics["samples/accuracy_nfe2"]
    net = evaluation._reference.net
    images = evaluation.sample(model.denoiser(), (1, 4, 4), 4, 2)
    # only the last measurement uses these weights; this one was taken after step 2
    assert 0 <= float(found) <= 1
    assert float(found) * 40 == pytest.approx(round(float(found) * 40), abs=1e-5)
    hits = net(images).argmax(1) == torch.arange(40) % 4
    assert float(evaluation.distances(model.denoiser(), (1, 4, 4), 4)["samples/accuracy_nfe2"]) == float(
        hits.double().mean()
    )


def test_frechet_distance_is_measured_at_its_steps(tmp_path: Path) -> None:
    evaluation = SampleEvaluation(
        samplers.FlowSampler(), nfes=[1, 3], steps=[2, 6], num_samples=64, cache=str(tmp_path)
    )
    model = module(evaluation=evaluation)
    runner = fit(model)
    names = {name for name in runner.callback_metrics if name.startswith("fd/")}
    assert names == {"fd/feature_net"} | {f"fd/nfe{n}{step}" for n in (1, 3) for step in ("", "_step2", "_step6")}
    # the last value by hand: same start noise, averaged weights, Euler in three steps
    x = torch.randn(64, 1, 4, 4, generator=generator_of_samples())
    net = model.average.module
    for k in range(3):
        x = x + net(x, torch.full((64,), 1000 * (1 - k / 3))) / 3
    reference = evaluation._reference
    made = frechet.moments(reference.net.features(x.detach()))
    expected = float(frechet.frechet_distance(reference.moments, made))
    assert float(runner.callback_metrics["fd/nfe3_step6"]) == pytest.approx(expected, rel=1e-3)


def generator_of_samples() -> torch.Generator:
    from callbacks.rng import make_generator

    return make_generator("samples", seed=99)


def test_two_ranks_sample_what_one_does() -> None:
    evaluation = SampleEvaluation(samplers.DDIM(), num_samples=10)
    model = module(num_classes=4)
    whole = evaluation.sample(model.denoiser(), (1, 4, 4), 4, 5)
    parts = [evaluation.sample(model.denoiser(), (1, 4, 4), 4, 5, rank, 2) for rank in (0, 1)]
    torch.testing.assert_close(torch.stack(parts, dim=1).flatten(0, 1), whole)


def test_predict_writes_the_samples(tmp_path: Path) -> None:
    model = module(evaluation=SampleEvaluation(samplers.FlowSampler(), nfes=[2]))
    runner = trainer(default_root_dir=tmp_path)
    runner.predict(model, datamodule=pictures(), return_predictions=False)
    images = np.load(tmp_path / "samples.npz")["images"]
    expected = model.evaluation.sample(model.denoiser(), (1, 4, 4), 0, 2, count=100)
    np.testing.assert_array_equal(images, expected.numpy())
    assert (tmp_path / "samples.png").stat().st_size > 0


def test_pictures_are_padded_with_black_and_averaged() -> None:
    out = PadAndPool(padding=2, pool=4)(torch.ones(1, 1, 4, 4))
    assert out.tolist() == [[[[-0.5, -0.5], [-0.5, -0.5]]]]  # four pixels of 1 and twelve of -1


# resume


@pytest.mark.parametrize(
    "build",
    [
        lambda: module(coupling=LinearAssignment(), num_classes=4),
        lambda: module(process=DDPMLinear(), parameterization="eps", time_sampler=CurriculumTimes(tau=1)),
        lambda: module(process=DDPMLinear(50), parameterization="eps", time_sampler=LossAware(50, history=1)),
    ],
    ids=["assigned", "curriculum", "loss-aware"],
)
def test_three_epochs_equal_one_and_a_resume_of_two(build, tmp_path: Path) -> None:
    L.seed_everything(3)
    whole = build()
    metrics = fit(whole, 3).callback_metrics
    L.seed_everything(3)
    fit(build(), 1).save_checkpoint(tmp_path / "one.ckpt")
    L.seed_everything(3)
    resumed = build()
    torch.rand(7)
    resumed_metrics = fit(resumed, 3, tmp_path / "one.ckpt").callback_metrics
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert {k: float(v) for k, v in resumed_metrics.items()} == {k: float(v) for k, v in metrics.items()}


# parallel


def parallel_run(out: str) -> None:
    """Two epochs on two processes: 96 images in global batches of 18, so that the last one is uneven."""
    L.seed_everything(3)
    evaluation = SampleEvaluation(samplers.DDIM(), nfes=[2], steps=[8], num_samples=33, cache=out)
    model = module(
        process=DDPMLinear(50),
        parameterization="eps",
        time_sampler=CurriculumTimes(tau=1),
        coupling=LinearAssignment(scope="global"),
        num_classes=4,
        evaluation=evaluation,
    )
    data = ImageData(SMALL, batch_size=18, val_fraction=0.2, mean=[0.5], std=[0.5])
    runner = trainer(2, devices=2, strategy="ddp")
    runner.fit(model, datamodule=data)
    found = {"state": model.state_dict(), "time": model.time_generator.get_state(), "fd": model.distances}
    found["probe"] = {name: float(value) for name, value in runner.callback_metrics.items() if "probe" in name}
    torch.save(found, f"{out}/{runner.global_rank}.pt")


@pytest.mark.distributed
def test_two_processes_agree_on_state_and_metrics_and_draw_their_own_times(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, value in first["state"].items():
        assert torch.equal(second["state"][name], value), name
    assert first["fd"] == second["fd"]
    accuracies = {"samples/accuracy_nfe2", "samples/accuracy_nfe2_step8"}
    assert set(first["fd"]) == {"fd/feature_net", "fd/nfe2", "fd/nfe2_step8"} | accuracies
    assert first["probe"] == second["probe"]
    assert not torch.equal(first["time"], second["time"])


# prior


class V(nn.Module):
    """v = (1 + label) x / 10."""

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        return x * (1 + label.to(x))[:, None] / 10


def test_prior_gives_eps_from_v_and_guides_from_the_null_label() -> None:
    prior = Prior(V(), DDPMLinear(), "v", null_label=10).double()
    x, t, y = torch.ones(2, 3, dtype=torch.float64), torch.tensor([0, 999]), torch.tensor([1, 2])
    a, s = prior.alphas_cumprod[t].sqrt(), (1 - prior.alphas_cumprod[t]).sqrt()
    conditional, null = (a * (1 + label) / 10 + s for label in (y, torch.tensor([10, 10])))
    torch.testing.assert_close(prior.eps(x, t, y)[:, 0], conditional)
    torch.testing.assert_close(prior.eps(x, t, y, guidance=2.0)[:, 0], null + 2 * (conditional - null))


def test_prior_from_a_checkpoint_has_the_averaged_weights(tmp_path: Path) -> None:
    model = module(process=DDPMLinear(), parameterization="v", num_classes=4)
    fit(model).save_checkpoint(tmp_path / "prior.ckpt")
    prior = Prior.from_checkpoint(tmp_path / "prior.ckpt", Net(), DDPMLinear())
    assert torch.equal(prior.net.last.weight, model.average.module.last.weight)
    assert prior.null_label == 4
    assert not any(p.requires_grad for p in prior.parameters())


if __name__ == "__main__":
    parallel_run(sys.argv[1])
