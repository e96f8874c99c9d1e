"""Processes, parameterisations, weights, time samplers, Frechet distance: reference, property, gradient."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_modules.diffusion import frechet, interpolants, processes, times, weighting
from lightning_modules.diffusion.parameterization import Prediction, edm_coefficients, target
from lightning_modules.diffusion.processes import EDM, DDPMCosine, DDPMLinear, LinearFlow, ScaledLinear, TrigFlow

GOLDEN = np.load(Path(__file__).parent / "golden" / "diffusion_common.npz")
"""Official code (tables), transcriptions of the formulas (EDM, Frechet distance); float64."""

EXACT = {"rtol": 1e-10, "atol": 1e-12}
ALL = [DDPMLinear(), DDPMCosine(), ScaledLinear(), EDM(), LinearFlow(), TrigFlow()]
NAMES = [type(process).__name__ for process in ALL]
KINDS = ["eps", "x0", "v", "score", "flow"]


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def some_times(process: processes.Process) -> Tensor:
    return process.time_of_unit(torch.tensor([0.05, 0.3, 0.5, 0.9], dtype=torch.float64))


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(4, 1, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))


# 1. reference


@pytest.mark.parametrize(("process", "name"), [(DDPMLinear(), "linear"), (DDPMCosine(), "cosine")])
def test_tables_equal_the_official_ones(process: processes.DiscreteProcess, name: str) -> None:
    torch.testing.assert_close(process.betas, golden(f"beta_{name}"), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(process.alphas_cumprod, golden(f"abar_{name}"), rtol=1e-12, atol=1e-15)


def test_edm_preconditioning_equals_the_transcription() -> None:
    ours = torch.stack(edm_coefficients(golden("edm_prec_sigma")), 1)
    torch.testing.assert_close(ours, golden("edm_prec_cskip_cout_cin_cnoise_w"), **EXACT)


def test_frechet_distance_equals_the_transcription() -> None:
    a, b = (frechet.moments(golden(name)) for name in ("fd_a", "fd_b"))
    torch.testing.assert_close(frechet.frechet_distance(a, b), golden("fd_value"), **EXACT)


# 2. property


@pytest.mark.parametrize("process", ALL, ids=NAMES)
def test_time_with_a_given_log_snr_is_found_again(process: processes.Process) -> None:
    time = some_times(process)
    torch.testing.assert_close(process.u_of_log_snr(process.log_snr(time)), process.unit(time), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", ALL, ids=NAMES)
def test_clean_end_keeps_the_data(process: processes.Process, pair: tuple[Tensor, Tensor]) -> None:
    time = torch.full((4,), process.clean_time, dtype=torch.int64 if process.discrete else torch.float64)
    assert torch.equal(process.marginal(*pair, time), pair[0])


@pytest.mark.parametrize("process", ALL, ids=NAMES)
def test_log_snr_falls_with_the_time(process: processes.Process) -> None:
    assert (process.log_snr(some_times(process)).diff() < 0).all()


@pytest.mark.parametrize("process", [EDM(), LinearFlow(), TrigFlow()], ids=["EDM", "LinearFlow", "TrigFlow"])
def test_slopes_are_the_derivatives(process: processes.Process) -> None:
    unit = some_times(process).requires_grad_()
    for value, slope in ((process.alpha, process.dalpha), (process.sigma, process.dsigma)):
        (gradient,) = torch.autograd.grad(value(unit).sum() + 0 * unit.sum(), unit)
        torch.testing.assert_close(slope(unit).detach(), gradient, **EXACT)


def test_slopes_of_a_table_are_those_of_the_continuous_schedule() -> None:
    """d log alpha / d u = -beta(u) T / 2 for a fine table, by hand from abar = prod(1 - beta)."""
    process, time = DDPMLinear(), torch.tensor([200, 500, 800])
    expected = -0.5 * process.betas[time] * 999
    torch.testing.assert_close(process.dalpha(time) / process.alpha(time), expected, rtol=0.01, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("process", ALL, ids=NAMES)
def test_conversions_go_round(process: processes.Process, kind: str, pair: tuple[Tensor, Tensor]) -> None:
    """From what the network should say to every other parameterisation: float64, but for table slopes exact."""
    data, noise = pair
    time = some_times(process)
    truth = target(kind, process, data, noise, time)
    prediction = Prediction(kind, truth, process.marginal(data, noise, time), process, time)
    for other in KINDS:
        expected = target(other, process, data, noise, time)
        torch.testing.assert_close(prediction.as_kind(other), expected, rtol=1e-8, atol=1e-8)


def test_flow_target_of_the_linear_flow_points_to_the_data(pair: tuple[Tensor, Tensor]) -> None:
    data, noise = pair
    assert torch.equal(target("flow", LinearFlow(), data, noise, torch.rand(4)), data - noise)


def test_x0_from_eps_at_pure_noise_is_refused(pair: tuple[Tensor, Tensor]) -> None:
    prediction = Prediction("eps", pair[0], pair[1], LinearFlow(), torch.ones(4))
    with pytest.raises(ValueError, match="x0 cannot be had from eps at this end of LinearFlow"):
        _ = prediction.x0


def test_eps_from_x0_without_noise_is_refused(pair: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="eps cannot be had from x0"):
        _ = Prediction("x0", pair[0], pair[1], LinearFlow(), torch.zeros(4)).eps


def test_float_times_are_refused_by_a_discrete_process() -> None:
    with pytest.raises(ValueError, match="DDPMLinear takes int64 indices"):
        DDPMLinear().alpha(torch.tensor(0.5))


def test_last_abar_of_the_linear_schedule_is_not_zero() -> None:
    assert float(DDPMLinear().alphas_cumprod[-1]) == pytest.approx(4.0e-5, rel=0.01)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_min_snr_weighs_the_same_error_in_every_parameterisation(kind: str, pair: tuple[Tensor, Tensor]) -> None:
    """An error d of x0 is -a/s d in eps and -d/s in v: weights times squares agree."""
    process, time = DDPMLinear(), torch.tensor([50, 300, 500, 900])
    a, s = process.alpha(time), process.sigma(time)
    factor = {"eps": a / s, "v": 1 / s}[kind]
    weigh = weighting.MinSNR(5.0)
    torch.testing.assert_close(weigh(process, kind, time) * factor**2, weigh(process, "x0", time), **EXACT)


def test_edm_weight_makes_the_net_output_error_count_one() -> None:
    process, unit = EDM(), torch.tensor([0.1, 0.5, 0.9])
    c_out = edm_coefficients(process.sigma(unit))[1]
    weights = weighting.EDMWeighting()(process, "x0", unit)
    torch.testing.assert_close(weights * c_out**2, torch.ones(3, dtype=torch.float64), **EXACT)


def test_p2_with_gamma_zero_is_constant() -> None:
    weights = weighting.P2(gamma=0.0)(DDPMLinear(), "eps", torch.tensor([0, 999]))
    assert torch.equal(weights, torch.ones(2, dtype=torch.float64))


def test_uncertainty_loss_at_zero_is_half_the_sum_of_interval_means() -> None:
    losses, unit = torch.arange(1.0, 9.0), (torch.arange(8) + 0.5) / 8
    ours = weighting.uncertainty_loss(losses, unit, torch.zeros(8))
    assert float(ours) == pytest.approx(0.5 * losses.mean().item())


def test_edm_draws_follow_the_log_normal() -> None:
    drawn = times.TimeSampler()(20000, EDM(), torch.Generator().manual_seed(0)).time
    log_sigma = EDM().sigma(drawn).log()
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=0.03)
    assert float(log_sigma.std()) == pytest.approx(1.2, abs=0.03)


def test_two_ways_to_draw_edm_sigmas_agree_in_distribution() -> None:
    process, shares = EDM(), torch.tensor([0.1, 0.9], dtype=torch.float64)
    quantiles = []
    for seed, sampler in enumerate((times.TimeSampler(), times.LogNormalSigma())):
        time = sampler(20000, process, torch.Generator().manual_seed(seed)).time
        quantiles.append(process.sigma(time).log().quantile(shares))
    torch.testing.assert_close(*quantiles, rtol=0.0, atol=0.06)


def test_strata_get_equally_many_in_order() -> None:
    drawn = times.StratifiedTimes(4)(16, DDPMLinear(), torch.Generator().manual_seed(0)).time
    assert (drawn // 250).tolist() == [k // 4 for k in range(16)]


def test_logit_normal_has_its_median_in_the_middle() -> None:
    drawn = times.LogitNormal()(20000, LinearFlow(), torch.Generator().manual_seed(0)).time
    assert float(drawn.median()) == pytest.approx(0.5, abs=0.01)


def test_loss_aware_weights_undo_the_bias() -> None:
    """E[w f(t)] over the draws is the uniform mean of f: exactly, by summing over p."""
    sampler, process = times.LossAware(timesteps=10, history=2), DDPMLinear(10)
    everything = torch.arange(10).repeat(2)
    sampler.observe(process, everything, 1.0 + everything)
    p = sampler.probabilities()
    assert float(p[9] / p[0]) == pytest.approx((0.999 * 10 / 55 + 1e-4) / (0.999 / 55 + 1e-4))
    time, weight = sampler(1000, process, torch.Generator().manual_seed(0))
    torch.testing.assert_close(weight * p[time], torch.full((1000,), 0.1, dtype=torch.float64))


def test_loss_aware_keeps_the_latest_losses_of_repeated_indices() -> None:
    sampler = times.LossAware(timesteps=3, history=2)
    sampler.observe(DDPMLinear(3), torch.tensor([1, 0, 1]), torch.tensor([1.0, 5.0, 2.0]))
    sampler.observe(DDPMLinear(3), torch.tensor([1]), torch.tensor([3.0]))
    assert sampler.losses[1].tolist() == [3.0, 2.0]
    assert sampler.counts.tolist() == [1, 3, 0]


def test_interpolant_without_gamma_is_its_path(pair: tuple[Tensor, Tensor]) -> None:
    bridge, unit = interpolants.StochasticInterpolant(LinearFlow(), scale=0.0), torch.tensor([0.1, 0.4, 0.6, 0.9])
    x = bridge.marginal(*pair, torch.ones(4, 1, 3, 3), unit)
    assert torch.equal(x, LinearFlow().marginal(*pair, unit))


def test_interpolant_flow_is_the_derivative_of_the_path(pair: tuple[Tensor, Tensor]) -> None:
    bridge, noise = interpolants.StochasticInterpolant(TrigFlow(), math.sqrt(2)), torch.ones_like(pair[0])
    unit, h = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64), 1e-6
    ahead, behind = (bridge.marginal(*pair, noise, unit + step) for step in (h, -h))
    torch.testing.assert_close(bridge.flow(*pair, noise, unit), (behind - ahead) / (2 * h), rtol=1e-7, atol=1e-7)


def test_frechet_distance_of_shifted_features_is_the_squared_shift() -> None:
    features = golden("fd_a")
    a, b = frechet.moments(features), frechet.moments(features + 2.0)
    assert float(frechet.frechet_distance(a, b)) == pytest.approx(4 * features.shape[1], rel=1e-9)


# 3. gradient


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_flows_through_conversions(kind: str, pair: tuple[Tensor, Tensor]) -> None:
    process, time = TrigFlow(), some_times(TrigFlow())

    def x0(output: Tensor, x: Tensor) -> Tensor:
        return Prediction(kind, output, x, process, time).x0

    assert torch.autograd.gradcheck(x0, tuple(part.clone().requires_grad_() for part in pair))


def test_uncertainty_loss_gradcheck() -> None:
    unit = torch.rand(12, generator=torch.Generator().manual_seed(0))
    losses = torch.rand(12, dtype=torch.float64, requires_grad=True)
    s = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda part, logs: weighting.uncertainty_loss(part, unit, logs), (losses, s))
