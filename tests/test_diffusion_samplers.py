"""Samplers, grids, guidance: reference, order of convergence, invariants, cost."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gaussian_model import GaussianAtWork
from torch import Tensor, nn

from lightning_modules.diffusion import grids, samplers
from lightning_modules.diffusion.guidance import ClassifierFree, ClassifierGuidance
from lightning_modules.diffusion.parameterization import Denoiser
from lightning_modules.diffusion.processes import EDM, DDPMCosine, DDPMLinear, LinearFlow, Process, TrigFlow

GOLDEN = np.load(Path(__file__).parent / "golden" / "diffusion_common.npz")
"""DDIM and DPM-Solver++: diffusers 0.42.1, whose alphas are float32; EDM and flow: transcription in float64."""


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


@pytest.fixture
def z() -> Tensor:
    return golden("z")


# 1. reference


def test_respacing_equals_the_official_indices() -> None:
    assert torch.equal(grids.respaced_indices(1000, 250), golden("respace_250"))
    assert torch.equal(grids.ddim_indices(1000, 20), golden("respace_ddim20"))


# the golden runs keep alphas in float32: at the end of the cosine schedule (abar 2e-9) that costs the solver 1e-3
@pytest.mark.parametrize("num", [5, 20])
@pytest.mark.parametrize(
    ("sampler", "key", "process", "tolerance"),
    [
        (samplers.DDIM(), "ddim_linear", DDPMLinear(), 1e-5),
        (samplers.DDIM(), "ddim_cosine", DDPMCosine(), 1e-5),
        (samplers.DPMSolver2M(), "dpmpp2m_linear", DDPMLinear(), 1e-5),
        (samplers.DPMSolver2M(), "dpmpp2m_cosine", DDPMCosine(), 1e-3),
    ],
)
def test_discrete_samplers_equal_diffusers(
    sampler: samplers.Sampler, key: str, process: Process, tolerance: float, num: int, z: Tensor
) -> None:
    grid = grids.Trailing()(process, num)
    assert torch.equal(grid[:-1], golden(f"{key}_{num}_t"))
    x, nfe = sampler(GaussianAtWork(process, *GOLDEN["mu_s"]), z, grid)
    torch.testing.assert_close(x, golden(f"{key}_{num}_x0"), rtol=0.0, atol=tolerance)
    assert nfe == num


@pytest.mark.parametrize(("heun", "nfe_per_step"), [(True, 2), (False, 1)])
@pytest.mark.parametrize("num", [5, 18])
def test_edm_sampler_equals_the_transcription(heun: bool, nfe_per_step: int, num: int, z: Tensor) -> None:
    process = EDM()
    grid = grids.Rho()(process, num)
    torch.testing.assert_close(process.sigma(grid), golden(f"edm_sigmas_{num}"), rtol=1e-12, atol=1e-15)
    x, nfe = samplers.EDMSampler(heun)(GaussianAtWork(process, *GOLDEN["mu_s"]), z * 80, grid)
    torch.testing.assert_close(x, golden(f"edm_{'heun' if heun else 'euler'}_{num}"), rtol=1e-10, atol=1e-12)
    assert nfe == nfe_per_step * num - (1 if heun else 0)


@pytest.mark.parametrize("num", [2, 10])
def test_flow_euler_equals_the_transcription(num: int, z: Tensor) -> None:
    process = LinearFlow()
    grid = grids.UniformUnitGrid()(process, num)
    x, nfe = samplers.FlowSampler()(GaussianAtWork(process, *GOLDEN["mu_s"]), z, grid)
    torch.testing.assert_close(x, golden(f"fm_euler_{num}"), rtol=1e-10, atol=1e-12)
    assert nfe == num


@pytest.mark.parametrize("solver", ["ddim", "dpm", "euler"])
def test_samplers_equal_an_installed_diffusers(solver: str, z: Tensor) -> None:
    diffusers = pytest.importorskip("diffusers")
    process = DDPMLinear()
    options = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    if solver in ("ddim", "dpm"):
        options |= {"timestep_spacing": "trailing", "prediction_type": "epsilon"}
        extra = {"clip_sample": False, "set_alpha_to_one": True} if solver == "ddim" else {"final_sigmas_type": "zero"}
        kind = diffusers.DDIMScheduler if solver == "ddim" else diffusers.DPMSolverMultistepScheduler
        theirs, ours = kind(**options, **extra), samplers.DDIM() if solver == "ddim" else samplers.DPMSolver2M()
        # a divisor of 1000: diffusers steps back by 1000 // S, whatever the grid
        denoiser, grid, start = GaussianAtWork(process), grids.Trailing()(process, 10), z
    else:
        edm = EDM()
        theirs = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0)
        ours = samplers.EDMSampler(heun=False)
        denoiser, grid, start = GaussianAtWork(edm), grids.Rho()(edm, 10), z * 80
    theirs.set_timesteps(10)
    x = start.clone()
    for number, step in enumerate(theirs.timesteps):
        if solver == "euler":
            # the scheduler undoes the preconditioning of the raw network
            sigma = theirs.sigmas[number].double()
            unit = denoiser.process.u_of_sigma(sigma)
            c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
            output = (denoiser(x, unit).x0 - c_skip * x) / c_out
            theirs.scale_model_input(x, step)
        else:
            output = denoiser(x, step.long()).eps
        x = theirs.step(output, step, x).prev_sample.double()
    torch.testing.assert_close(ours(denoiser, start, grid)[0], x, rtol=0.0, atol=2e-5)


# 2. property


@pytest.mark.parametrize(
    ("sampler", "process", "order"),
    [
        (samplers.FlowSampler(1), TrigFlow(), 1),
        (samplers.FlowSampler(2), TrigFlow(), 2),
        (samplers.FlowSampler(2, midpoint=True), TrigFlow(), 2),
        (samplers.FlowSampler(1), LinearFlow(), 1),
        (samplers.FlowSampler(2), LinearFlow(), 2),
    ],
)
def test_error_of_flow_solvers_falls_with_their_order(
    sampler: samplers.Sampler, process: Process, order: int, z: Tensor
) -> None:
    denoiser, steps = GaussianAtWork(process), [16, 32, 64]
    exact = denoiser.model.transport(z)
    errors = [float((sampler(denoiser, z, grids.Grid()(process, n))[0] - exact).abs().max()) for n in steps]
    assert slope(steps, errors) == pytest.approx(-order, abs=0.25)


@pytest.mark.parametrize(
    ("sampler", "process", "order"),
    [
        (samplers.EDMSampler(heun=False), EDM(), 1),
        (samplers.EDMSampler(heun=True), EDM(), 2),
        (samplers.DDIM(), TrigFlow(), 1),
        (samplers.DPMSolver2M(), TrigFlow(), 2),
    ],
)
def test_error_between_two_noise_levels_falls_with_the_order(
    sampler: samplers.Sampler, process: Process, order: int, z: Tensor
) -> None:
    """On a smooth stretch without the clean end; the exact flow map keeps quantiles."""
    denoiser, steps = GaussianAtWork(process), [16, 32, 64]
    ends = torch.tensor([0.8, 0.3], dtype=torch.float64)
    low, high = process.log_snr(ends)
    model, levels = denoiser.model, (process.alpha(ends), process.sigma(ends))
    spread = (levels[0] ** 2 * model.s**2 + levels[1] ** 2).sqrt()
    start = levels[0][0] * model.mu + spread[0] * z
    exact = levels[0][1] * model.mu + spread[1] * z
    errors = []
    for n in steps:
        grid = process.u_of_log_snr(low + (high - low) * torch.linspace(0, 1, n + 1, dtype=torch.float64))
        errors.append(float((sampler(denoiser, start, grid)[0] - exact).abs().max()))
    assert slope(steps, errors) == pytest.approx(-order, abs=0.25)


def slope(steps: list[int], errors: list[float]) -> float:
    """Of log error against log steps, least squares."""
    return float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def test_ancestral_sampling_is_ddim_with_eta_one(z: Tensor) -> None:
    process = DDPMLinear()
    grid = grids.Linspace()(process, 10)
    images = [
        sampler(GaussianAtWork(process), z, grid, torch.Generator().manual_seed(0))[0]
        for sampler in (samplers.DDPM(), samplers.DDIM(eta=1.0))
    ]
    torch.testing.assert_close(*images, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("sampler", "process", "num"),
    [
        (samplers.DDPM(), DDPMLinear(), 1000),  # its variance is exact only for small steps
        (samplers.EulerMaruyama(1.0), TrigFlow(), 100),
        (samplers.EDMSampler(churn=8.0), EDM(), 40),
    ],
)
def test_stochastic_samplers_give_the_data_distribution(sampler: samplers.Sampler, process: Process, num: int) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = process.noise_scale * torch.randn(10000, 1, generator=generator, dtype=torch.float64)
    grid = (grids.Rho() if isinstance(process, EDM) else grids.Grid())(process, num)
    x, _ = sampler(GaussianAtWork(process), noise, grid, generator)
    # mean 0.3 and deviation 0.5 of the data; 3 standard errors are 0.015
    assert float(x.mean()) == pytest.approx(0.3, abs=0.02)
    assert float(x.std()) == pytest.approx(0.5, abs=0.02)


def test_ddim_clips_x0_and_takes_eps_from_it() -> None:
    """x0 = 3 becomes 1; then x' = a' + s' (x - a) / s, by hand."""
    process = TrigFlow()
    denoiser = Denoiser(Constant(3.0), process, "x0")
    time, after = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.25, dtype=torch.float64)
    x = torch.full((1, 1), 0.7, dtype=torch.float64)
    out = samplers.DDIM(clip=True)(denoiser, x, torch.stack([time, after]))[0]
    a, s = process.alpha(time), process.sigma(time)
    expected = process.alpha(after) + process.sigma(after) * (0.7 - a) / s
    torch.testing.assert_close(out.squeeze(), expected)


def test_samplers_that_add_noise_ask_for_a_generator(z: Tensor) -> None:
    process = DDPMLinear()
    with pytest.raises(ValueError, match="needs a generator"):
        samplers.DDPM()(GaussianAtWork(process), z, grids.Trailing()(process, 5))


def test_callback_sees_every_step(z: Tensor) -> None:
    seen = []
    grid = grids.Trailing()(DDPMLinear(), 4)
    x, _ = samplers.DDIM()(GaussianAtWork(DDPMLinear()), z, grid, callback=lambda n, image: seen.append((n, image)))
    assert [number for number, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[-1][1], x)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (grids.Trailing(), [9, 7, 4, 1, -1]),  # round(10, 7.5, 5, 2.5) - 1, halves to even
        (grids.Leading(), [6, 4, 2, 0, -1]),
        (grids.Leading(final_clean=False), [6, 4, 2, 0, 0]),
        (grids.Linspace(), [9, 6, 3, 0, -1]),
        (grids.Quadratic(), [8, 3, 0, 0, -1]),  # floor of linspace(0, sqrt(8), 4)^2 = 0, .89, 3.56, 8
    ],
)
def test_grids_of_ten_indices(grid: grids.Grid, expected: list[int]) -> None:
    assert grid(DDPMLinear(10), 4).tolist() == expected


def test_log_snr_grid_has_equal_steps() -> None:
    steps = TrigFlow().log_snr(grids.UniformLogSNR()(TrigFlow(), 6)[:-1]).diff()
    torch.testing.assert_close(steps, steps[:1].expand(5))


# guidance


class Constant(nn.Module):
    """Predicts a constant, or the label."""

    def __init__(self, value: float | None = None) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        value = label.to(x)[:, None] if self.value is None else self.value
        return torch.zeros_like(x) + value


def test_guidance_extrapolates_from_the_null_label_and_counts_two() -> None:
    base = Denoiser(Constant(), TrigFlow(), "v")
    guided = ClassifierFree(base, torch.tensor([2, 3]), null_label=10, scale=3.0)
    output = guided(torch.zeros(2, 1), torch.tensor(0.5)).output
    assert output.tolist() == [[10 + 3 * (2 - 10)], [10 + 3 * (3 - 10)]]
    assert guided.rows == 4


@pytest.mark.parametrize(("unit", "expected"), [(0.5, -14.0), (0.9, 2.0)])
def test_guidance_acts_only_in_its_interval(unit: float, expected: float) -> None:
    base = Denoiser(Constant(), TrigFlow(), "v")
    guided = ClassifierFree(base, torch.tensor([2]), null_label=10, scale=3.0, interval=(0.2, 0.8))
    assert float(guided(torch.zeros(1, 1), torch.tensor(unit)).output) == expected


def test_classifier_guidance_of_a_gaussian_is_the_posterior() -> None:
    """A classifier p(y | x) ~ exp(c x) adds c to the score, so -s c to eps."""
    base = GaussianAtWork(TrigFlow())
    x, time = torch.ones(2, 1, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    plain = Denoiser(Constant(0.25), TrigFlow(), "eps")
    guided = ClassifierGuidance(plain, lambda at, _, __: 3.0 * at.sum(1), torch.zeros(2, dtype=torch.int64), 2.0)
    torch.testing.assert_close(guided(x, time).eps, 0.25 - base.process.sigma(time) * 6.0 * torch.ones_like(x))
    torch.testing.assert_close(guided(x, time).score, plain(x, time).score + 6.0)
