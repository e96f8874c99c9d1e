"""Learned variance: bound and sampler against written-out formulas and diffusers, gradient of the head alone."""

import math

import lightning as L
import pytest
import torch
from synthetic import SyntheticImages
from torch import Tensor, nn

from datamodules.images import ImageData
from lightning_modules.diffusion import samplers
from lightning_modules.diffusion.guidance import ClassifierFree
from lightning_modules.diffusion.learned_variance import (
    discretized_log_likelihood,
    gaussian_kl,
    learned_log_variance,
    posterior,
    variance_bound,
)
from lightning_modules.diffusion.module import DiffusionModule
from lightning_modules.diffusion.parameterization import Denoiser, Prediction
from lightning_modules.diffusion.processes import DDPMCosine, DDPMLinear, LinearFlow
from lightning_modules.networks.dit import DiT


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prediction(process: DDPMLinear, time: Tensor) -> tuple[Prediction, Tensor]:
    data, noise = normal(len(time), 2, 3, 3).clamp(-1, 1), normal(len(time), 2, 3, 3, seed=1)
    output, spread = normal(len(time), 2, 3, 3, seed=2), 0.5 * normal(len(time), 2, 3, 3, seed=3)
    x = process.marginal(data, noise, time)
    return Prediction("eps", output.requires_grad_(), x, process, time, spread.requires_grad_()), data


# 1. reference


def test_kl_is_that_of_torch() -> None:
    mean1, log1, mean2, log2 = (normal(5, seed=seed) for seed in range(4))
    made, wanted = (torch.distributions.Normal(m, (v / 2).exp()) for m, v in ((mean1, log1), (mean2, log2)))
    torch.testing.assert_close(
        gaussian_kl(mean1, log1, mean2, log2), torch.distributions.kl_divergence(made, wanted), rtol=1e-10, atol=1e-12
    )


def test_likelihoods_of_all_bins_sum_to_one() -> None:
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)[:, None]
    mean, log_scale = torch.tensor([[-0.9, 0.1, 1.2]]).double(), torch.tensor([[-1.0, -3.0, -0.5]]).double()
    total = discretized_log_likelihood(bins, mean, log_scale).exp().sum(0)
    # bins that hold less than 1e-12 count as that much
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64), rtol=0, atol=256e-12 + 1e-9)


def test_likelihood_is_near_the_exact_normal_one() -> None:
    data, mean, scale = torch.tensor([-1.0, 0.0, 0.5, 1.0]).double(), 0.1, 0.4
    exact = torch.distributions.Normal(torch.tensor(mean).double(), torch.tensor(scale).double()).cdf
    low = torch.where(data < -0.999, 0.0, exact(data - 1 / 255))
    high = torch.where(data > 0.999, 1.0, exact(data + 1 / 255))
    found = discretized_log_likelihood(data, torch.full_like(data, mean), torch.full_like(data, math.log(scale)))
    # the official tanh approximation of the distribution function is good to 2e-4, which a tail's whole mass feels
    torch.testing.assert_close(found.exp(), high - low, rtol=0.02, atol=2e-4)


def test_bound_is_the_official_formula_written_out() -> None:
    """Tables and coefficients in the official code's own notation (`GaussianDiffusion.__init__`, `_vb_terms_bpd`)."""
    process, time = DDPMLinear(100), torch.tensor([0, 1, 7, 19])
    made, data = prediction(process, time)
    betas = process.betas
    bar = (1 - betas).cumprod(0)
    bar_before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    variance = betas * (1 - bar_before) / (1 - bar)
    clipped = torch.cat([variance[1:2], variance[1:]]).log()
    coef1, coef2 = betas * bar_before.sqrt() / (1 - bar), (1 - bar_before) * (1 - betas).sqrt() / (1 - bar)

    def at(table: Tensor) -> Tensor:
        return table[time].view(-1, 1, 1, 1)

    x0 = (made.x - at((1 - bar).sqrt()) * made.output) / at(bar.sqrt())
    share = (made.spread + 1) / 2
    log_variance = share * at(betas.log()) + (1 - share) * at(clipped)
    true_mean, mean = (at(coef1) * start + at(coef2) * made.x for start in (data, x0))
    kl = 0.5 * (
        -1.0 + log_variance - at(clipped) + (at(clipped) - log_variance).exp()
        + (true_mean - mean) ** 2 * (-log_variance).exp()
    )  # fmt: skip
    likelihood = discretized_log_likelihood(data, mean, 0.5 * log_variance)
    expected = torch.where(at(torch.arange(100)) == 0, -likelihood, kl).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(variance_bound(process, made, data), expected, rtol=1e-8, atol=1e-10)


def test_variance_of_a_step_equals_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(1000, 1e-4, 0.02, "linear", variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(1000)
    spread = normal(2, 3)
    for index in (1, 500, 999):
        step = posterior(DDPMLinear(), torch.tensor(index), torch.tensor(index - 1))
        ours = learned_log_variance(spread, step.log_small, step.log_large)
        theirs = scheduler._get_variance(index, predicted_variance=spread)
        # its tables are float32
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-3, atol=1e-3)


# 2. properties


@pytest.mark.parametrize(("spread", "name"), [(-1.0, "log_small"), (1.0, "log_large")])
def test_ends_of_the_head_are_the_two_variances(spread: float, name: str) -> None:
    step = posterior(DDPMCosine(), torch.tensor([30, 600]), torch.tensor([10, 599]))
    head = torch.full((2, 1), spread, dtype=torch.float64)
    found = learned_log_variance(head, step.log_small, step.log_large)[:, 0]
    torch.testing.assert_close(found, getattr(step, name), rtol=1e-12, atol=0)


def test_exact_prediction_with_the_posteriors_variance_has_no_bound() -> None:
    process, time = DDPMLinear(100), torch.tensor([1, 7, 19])
    data, noise = normal(3, 2, 3, 3).clamp(-1, 1), normal(3, 2, 3, 3, seed=1)
    x = process.marginal(data, noise, time)
    exact = Prediction("eps", noise, x, process, time, -torch.ones_like(noise))
    torch.testing.assert_close(variance_bound(process, exact, data), torch.zeros(3).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("large", [False, True])
def test_sampler_with_the_head_at_an_end_is_the_one_with_a_fixed_variance(large: bool) -> None:
    class Head(nn.Module):
        def __init__(self, twice: bool) -> None:
            super().__init__()
            self.twice, self.weight = twice, nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
            end = torch.full_like(x, 1.0 if large else -1.0)
            return torch.cat([0.1 * x, end], dim=1) if self.twice else 0.1 * x

    process, grid = DDPMLinear(50), torch.tensor([49, 30, 11, 2, -1])
    images = [
        samplers.DDPM(large_variance=large)(
            Denoiser(Head(twice), process, "eps"), normal(2, 1, 2, 2), grid, torch.Generator().manual_seed(0)
        )[0]
        for twice in (False, True)
    ]
    torch.testing.assert_close(images[1], images[0], rtol=1e-10, atol=1e-12)


def test_guidance_takes_the_variance_of_the_class() -> None:
    class Labelled(nn.Module):
        def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
            return torch.cat([x, label.to(x).view(-1, 1, 1, 1).expand_as(x)], dim=1)

    label = torch.tensor([1, 2])
    guided = ClassifierFree(Denoiser(Labelled(), DDPMLinear(), "eps"), label, null_label=9, scale=1.5)
    spread = guided(normal(2, 1, 2, 2), torch.tensor(5)).spread
    assert spread[:, 0, 0, 0].tolist() == [1, 2]


# 3. gradient


def test_bound_trains_the_head_alone() -> None:
    process = DDPMLinear(100)
    made, data = prediction(process, torch.tensor([0, 1, 7, 19]))
    variance_bound(process, made, data).sum().backward()
    assert made.output.grad is None
    assert made.spread.grad.flatten(1).abs().sum(1).gt(0).all()


def test_gradient_of_the_head() -> None:
    process, time = DDPMLinear(100), torch.tensor([0, 7])
    made, data = prediction(process, time)

    def bound(spread: Tensor) -> Tensor:
        return variance_bound(process, Prediction("eps", made.output, made.x, process, time, spread), data)

    assert torch.autograd.gradcheck(bound, made.spread.detach().requires_grad_())


# 4. module


def test_loss_of_a_step_is_weighted_error_plus_bound() -> None:
    L.seed_everything(0)
    model = DiffusionModule(
        lambda: DiT((1, 16, 2), image_size=8, in_channels=1, num_classes=4),
        DDPMLinear(100),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        num_classes=4,
    )
    with torch.no_grad():
        model.net.last.weight.normal_()
    seen = {}
    predict = model._predict

    def spy(net: nn.Module, data: Tensor, noise: Tensor, time: Tensor, label: Tensor) -> Prediction:
        made = predict(net, data, noise, time, label)
        error = (made.output - noise).square().flatten(1).mean(1)
        seen["loss"] = (error + variance_bound(model.process, made, data)).mean()
        return made

    model._predict = spy
    data = ImageData(SyntheticImages(4, channels=1, size=8), batch_size=16, val_fraction=0.2, mean=[0.5], std=[0.5])
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    assert trainer.callback_metrics["train/loss"] == pytest.approx(float(seen["loss"]), rel=1e-5)
    assert trainer.callback_metrics["train/loss"] > trainer.callback_metrics["train/mse"]


# 5. errors


def test_continuous_processes_are_refused() -> None:
    x, time = normal(1, 1, 2, 2), torch.tensor([0.5])
    made = Prediction("flow", x, x, LinearFlow(), time, x)
    with pytest.raises(ValueError, match="needs a discrete process, got LinearFlow"):
        variance_bound(LinearFlow(), made, x)
