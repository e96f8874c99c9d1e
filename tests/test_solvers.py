"""DPM-Solver++ 2S and 3M, PLMS, adaptive Dormand-Prince: diffusers, orders of convergence, cost."""

import numpy as np
import pytest
import torch
from gaussian_model import GaussianAtWork
from torch import Tensor

from lightning_modules.diffusion import grids
from lightning_modules.diffusion.plms import PLMS, LeadingFromOne
from lightning_modules.diffusion.processes import DDPMLinear, LinearFlow, ScaledLinear, TrigFlow
from lightning_modules.diffusion.samplers import DDIM, Sampler
from lightning_modules.diffusion.solvers import Dopri5, DPMSolver2S, DPMSolver3M, exponential_step


def start(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("sampler", [DPMSolver3M(), DPMSolver2S()], ids=["3M", "2S"])
def test_solvers_equal_an_installed_diffusers(sampler: Sampler) -> None:
    diffusers = pytest.importorskip("diffusers")
    third = isinstance(sampler, DPMSolver3M)
    options = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    options |= {"algorithm_type": "dpmsolver++", "solver_order": 3 if third else 2, "final_sigmas_type": "zero"}
    if third:
        theirs = diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing", **options)
    else:
        theirs = diffusers.DPMSolverSinglestepScheduler(**options)
    theirs.set_timesteps(20)
    steps = theirs.timesteps.long()
    denoiser = GaussianAtWork(DDPMLinear())
    x = start(4, 1, 4, 4)
    ours, nfe = sampler(denoiser, x, torch.cat([steps, torch.tensor([-1])]))
    for step in steps:
        x = theirs.step(denoiser(x, step).eps, step, x).prev_sample.double()
    # its tables are float32
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-5)
    assert nfe == 20


@pytest.mark.parametrize(("sampler", "order"), [(DPMSolver2S(), 2), (DPMSolver3M(), 2)], ids=["2S", "3M"])
def test_error_between_two_noise_levels_falls_with_the_order(sampler: Sampler, order: int) -> None:
    """On a smooth stretch without the clean end; the exact flow map keeps quantiles."""
    process, z, steps = TrigFlow(), start(4, 4), [16, 32, 64]
    denoiser = GaussianAtWork(process)
    ends = torch.tensor([0.8, 0.3], dtype=torch.float64)
    low, high = process.log_snr(ends)
    model, errors = denoiser.model, []

    def at(time: Tensor) -> Tensor:
        alpha, sigma = process.alpha(time), process.sigma(time)
        return alpha * model.mu + (alpha**2 * model.s**2 + sigma**2).sqrt() * z

    for n in steps:
        grid = process.u_of_log_snr(low + (high - low) * torch.linspace(0, 1, n + 1, dtype=torch.float64))
        errors.append(float((sampler(denoiser, at(grid[0]), grid)[0] - at(ends[1])).abs().max()))
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(-order, abs=0.35)


@pytest.mark.parametrize("process", [LinearFlow(), TrigFlow()], ids=["linear", "trigonometric"])
def test_adaptive_error_falls_with_the_tolerance_to_the_exact_transport(process: LinearFlow) -> None:
    z, denoiser = start(4, 4), GaussianAtWork(process)
    exact, costs = denoiser.model.transport(z), []
    for tolerance in (1e-5, 1e-7, 1e-9):
        x, nfe = Dopri5(tolerance, tolerance)(denoiser, z, grids.Grid()(process, 1))
        assert (x - exact).abs().max() < 10 * tolerance
        costs.append(nfe)
    assert costs == sorted(set(costs))


def test_adaptive_solver_asks_for_one_interval() -> None:
    assert Dopri5().steps_for(50) == 1


def test_exponential_step_with_a_constant_prediction_is_ddim() -> None:
    """One DDIM step holds x0 fixed as well."""
    process, x = DDPMLinear(), start(3, 2)
    denoiser, time, after = GaussianAtWork(process), torch.tensor(700), torch.tensor(300)
    made = exponential_step(process, x, time, after, denoiser(x, time).x0)
    torch.testing.assert_close(made, DDIM().step(denoiser, x, time, after, None), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num", [5, 6])
def test_single_step_solver_forgets_its_pair(num: int) -> None:
    sampler, process, z = DPMSolver2S(), DDPMLinear(), start(2, 2)
    grid = grids.Trailing()(process, num)
    first, again = (sampler(GaussianAtWork(process), z, grid)[0] for _ in range(2))
    assert torch.equal(first, again)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"sampler.rtol and atol must be positive, got 0 and 1e-05"):
        Dopri5(rtol=0)
    with pytest.raises(ValueError, match="Dopri5 needs a continuous process, got DDPMLinear"):
        Dopri5()(GaussianAtWork(DDPMLinear()), start(1, 1), torch.tensor([999, -1]))


def test_plms_with_its_times_equals_an_installed_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    theirs = diffusers.PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **options)
    theirs.set_timesteps(20)
    process = ScaledLinear()
    denoiser, sampler = GaussianAtWork(process), PLMS()
    x = start(4, 1, 4, 4)
    ours, nfe = sampler(denoiser, x, LeadingFromOne()(process, sampler.steps_for(21)))
    for step in theirs.timesteps:
        x = theirs.step(denoiser(x, step).eps, step, x).prev_sample.double()
    # its tables are float32
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-5)
    assert nfe == len(theirs.timesteps) == 21


def test_plms_forgets_the_last_trajectory() -> None:
    process = ScaledLinear()
    denoiser, sampler, z = GaussianAtWork(process), PLMS(), start(2, 1, 4, 4)
    grid = LeadingFromOne()(process, 10)
    assert torch.equal(sampler(denoiser, z, grid)[0], sampler(denoiser, z, grid)[0])


def test_plms_names_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"PLMS needs at least 2 evaluations, got 1 in evaluation.nfes"):
        PLMS().steps_for(1)
    with pytest.raises(ValueError, match=r"LeadingFromOne counts indices .* got LinearFlow"):
        LeadingFromOne()(LinearFlow(), 20)
