"""More samplers, called as those of `samplers`: DPM-Solver++ 2S and 3M, and an adaptive one."""

import numpy as np
import torch
from torch import Tensor

from lightning_modules.diffusion.parameterization import Denoiser
from lightning_modules.diffusion.processes import Process
from lightning_modules.diffusion.samplers import Sampler


class DPMSolver2S(Sampler):
    """DPM-Solver++ (2S): two intervals of the grid make one second-order step, the time between is its midpoint.

    Costs one evaluation per interval, as the multistep solvers, and remembers nothing beyond a pair. The interval that
    reaches the clean end returns x0; a last interval without a partner is of first order.

    Args:
        clip: clamp x0 to [-1, 1].

    Source: arXiv 2211.01095, Algorithm 1; intermediate times on the grid as in diffusers' single-step scheduler.
    """

    def __init__(self, clip: bool = False) -> None:
        self.clip = clip
        self.begin()

    def begin(self) -> None:
        """As in `Sampler`."""
        self._start: tuple[Tensor, Tensor, Tensor] | None = None

    def step(
        self, denoiser: Denoiser, x: Tensor, time: Tensor, after: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """As in `Sampler`."""
        process, x0 = denoiser.process, _data(denoiser, x, time, self.clip)
        if process.sigma(after) == 0:
            return process.alpha(after).to(x) * x0
        if self._start is None:
            self._start = (x, x0, time)
            return exponential_step(process, x, time, after, x0)
        (first_x, first_x0, first), self._start = self._start, None
        share = (_half_log_snr(process, time) - _half_log_snr(process, first)) / (
            _half_log_snr(process, after) - _half_log_snr(process, first)
        )
        slope = first_x0 + (1 / (2 * share)).to(x) * (x0 - first_x0)
        return exponential_step(process, first_x, first, after, slope)


class DPMSolver3M(Sampler):
    """DPM-Solver++ (3M) from the last three predictions; the first steps have orders 1 and 2, the last returns x0.

    The official second-difference term is half of the Taylor term that it stands for (divided difference against second
    derivative), so errors fall with order 2, not 3, though with a smaller constant than those of 2M. Kept as it is.

    Args:
        clip: clamp x0 to [-1, 1].

    Source: official code LuChengTHU/dpm-solver, in the form of diffusers' multistep scheduler; arXiv 2211.01095.
    """

    def __init__(self, clip: bool = False) -> None:
        self.clip = clip
        self.begin()

    def begin(self) -> None:
        """As in `Sampler`."""
        self._past: list[tuple[Tensor, Tensor]] = []

    def step(
        self, denoiser: Denoiser, x: Tensor, time: Tensor, after: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """As in `Sampler`."""
        process, x0 = denoiser.process, _data(denoiser, x, time, self.clip)
        if process.sigma(after) == 0:
            return process.alpha(after).to(x) * x0
        here = _half_log_snr(process, time)
        h = _half_log_snr(process, after) - here
        past = [((at - here) / h, old) for at, old in reversed(self._past)]
        self._past = [*self._past[-1:], (here, x0)]
        if not past:
            return exponential_step(process, x, time, after, x0)
        if len(past) == 1:
            (at, old), *_ = past
            return exponential_step(process, x, time, after, x0 + (x0 - old) * (-1 / (2 * at)).to(x))
        (at1, old1), (at2, old2) = past
        r0, r1 = -at1, at1 - at2
        near, far = (x0 - old1) / r0.to(x), (old1 - old2) / r1.to(x)
        first = near + (r0 / (r0 + r1)).to(x) * (near - far)
        second = (near - far) / (r0 + r1).to(x)
        e = torch.expm1(-h)
        moved = exponential_step(process, x, time, after, x0)
        alpha = process.alpha(after)
        return moved + (alpha * (e / h + 1)).to(x) * first - (alpha * ((e + h) / h**2 - 0.5)).to(x) * second


class Dopri5(Sampler):
    """Adaptive Dormand-Prince 4(5) on the velocity of a continuous process; NFE is what the tolerances ask for.

    SciPy's RK45, which is the same pair as torchdiffeq's `dopri5` and is installed anyway: its state is float64 on the
    CPU and moves to the device for each evaluation, which costs little beside the network. The step size is one for the
    whole batch. Between the times of the grid, of which one interval is enough (`nfes: [1]`), it steps as it likes.

    Args:
        rtol, atol: of an image element; 1e-5 as in the flow-matching codes.
    """

    def __init__(self, rtol: float = 1e-5, atol: float = 1e-5) -> None:
        if min(rtol, atol) <= 0:
            raise ValueError(f"sampler.rtol and atol must be positive, got {rtol} and {atol}")
        self.rtol, self.atol = rtol, atol

    def step(
        self, denoiser: Denoiser, x: Tensor, time: Tensor, after: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """As in `Sampler`."""
        from scipy.integrate import solve_ivp

        if denoiser.process.discrete:
            raise ValueError(f"Dopri5 needs a continuous process, got {type(denoiser.process).__name__}")

        def slope(unit: float, flat: np.ndarray) -> np.ndarray:
            now = torch.from_numpy(flat).to(x).view_as(x)
            at = torch.tensor(unit, dtype=torch.float64, device=x.device)
            return -denoiser(now, at).flow.double().cpu().numpy().ravel()

        start = x.double().cpu().numpy().ravel()
        found = solve_ivp(slope, (float(time), float(after)), start, "RK45", rtol=self.rtol, atol=self.atol)
        if not found.success:
            raise RuntimeError(f"Dopri5 stopped at u = {found.t[-1]:.3g}: {found.message}")
        return torch.from_numpy(found.y[:, -1].copy()).to(x).view_as(x)

    def steps_for(self, nfe: int) -> int:
        """One interval, whatever the evaluations."""
        return 1


def exponential_step(process: Process, x: Tensor, time: Tensor, after: Tensor, data: Tensor) -> Tensor:
    """x' = (s' / s) x - a' expm1(-h) D, h the step of the half log-SNR: exact if the prediction D of x0 is constant."""
    h = _half_log_snr(process, after) - _half_log_snr(process, time)
    ratio = process.sigma(after) / process.sigma(time)
    return ratio.to(x) * x - (process.alpha(after) * torch.expm1(-h)).to(x) * data


def _half_log_snr(process: Process, time: Tensor) -> Tensor:
    return process.log_snr(time) / 2


def _data(denoiser: Denoiser, x: Tensor, time: Tensor, clip: bool) -> Tensor:
    x0 = denoiser(x, time).x0
    return x0.clamp(-1, 1) if clip else x0
