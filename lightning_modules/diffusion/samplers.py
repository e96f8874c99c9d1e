"""Samplers. Each is called as sampler(denoiser, z, grid, generator, callback) and returns (images, NFE).

`z` (B, ...) is the start noise at its full scale (for EDM: times sigma_max), `grid` a falling sequence of times as made
in `grids`. Coefficients are float64, images keep the dtype of `z`; run in float64 for comparisons.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_modules.diffusion.learned_variance import learned_log_variance, posterior
from lightning_modules.diffusion.parameterization import Denoiser, Prediction
from lightning_modules.diffusion.processes import Process

Callback = Callable[[int, Tensor], None]
"""Called after each step with its number and the images."""


class Sampler(ABC):
    """Loop over the grid; a sampler writes one step."""

    def __call__(
        self,
        denoiser: Denoiser,
        z: Tensor,
        grid: Tensor,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> tuple[Tensor, int]:
        """Images (B, ...) and evaluations per image; `generator` is needed by samplers that add noise."""
        x, before = z, denoiser.rows
        self.begin()
        grid = grid.to(z.device)
        for number in range(len(grid) - 1):
            x = self.step(denoiser, x, grid[number], grid[number + 1], generator)
            if callback is not None:
                callback(number, x)
        return x, (denoiser.rows - before) // len(z)

    def begin(self) -> None:  # noqa: B027 (only multistep samplers remember anything)
        """Forgets the last trajectory."""

    @abstractmethod
    def step(
        self, denoiser: Denoiser, x: Tensor, time: Tensor, after: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Images at `after` from those at `time`, both 0-d."""

    def steps_for(self, nfe: int) -> int:
        """Steps that cost `nfe` evaluations without guidance."""
        return nfe


class DDIM(Sampler):
    """x' = a' x0 + sqrt(s'^2 - n^2) eps + n z with n^2 = eta^2 (s'^2 / s^2) (s^2 - (a / a')^2 s'^2).

    eta 0 is deterministic and works for every process; eta 1 is ancestral sampling with the smaller variance.

    Args:
        eta: share of fresh noise.
        clip: clamp x0 to [-1, 1] and take eps anew from it; off for latents.

    Source: arXiv 2010.02502, Eqs. 12 and 16.
    """

    def __init__(self, eta: float = 0.0, clip: bool = False) -> None:
        if eta < 0:
            raise ValueError(f"sampler.eta must not be negative, got {eta}")
        self.eta, self.clip = eta, clip

    def step(
        self, denoiser: Denoiser, x: Tensor, time: Tensor, after: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """As in `Sampler`."""
        process = denoiser.process
        prediction = clipped(denoiser(x, time)) if self.clip else denoiser(x, time)
        a, s, a_next, s_next = _coefficients(process, time, after)
        fresh = self.eta * s_next / s * (s**2 - (a / a_next * s_next) ** 2).clamp_min(0).sqrt()
        kept = (s_next**2 - fresh**2).clamp_min(0).sqrt()
        x = a_next.to(x) * prediction.x0 + kept.to(x) * prediction.eps
        return _with_noise(x, fresh, generator) if self.eta else x


class DDPM(Sampler):
    """Ancestral sampling on any subset of the indices: posterior mean plus noise.

    Args:
        large_variance: variance beta instead of beta (1 - abar') / (1 - abar). A network that predicts its variance
            uses that instead.
        clip: as in `DDIM`.

    Source: arXiv 2006.11239, Eq. 7; respacing as in arXiv 2102.09672.
    """

    def __init__(self, large_variance: bool = False, clip: bool = False) -> None:
        self.large_variance, self.clip = large_variance, clip

    def step(
        self, denoiser: Denoiser, x: Tensor, time: Tensor, after: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """As in `Sampler`."""
        prediction = clipped(denoiser(x, time)) if self.clip else denoiser(x, time)
        a, s, a_next, s_next = _coefficients(denoiser.process, time, after)
        beta = 1 - (a / a_next) ** 2
        mean = (a_next * beta / s**2).to(x) * prediction.x0 + (a / a_next * s_next**2 / s**2).to(x) * x
        last = s_next == 0
        if prediction.spread is not None and not last:
            step = posterior(denoiser.process, time, after)
            spread = learned_log_variance(prediction.spread, step.log_small, step.log_large)
            return _with_noise(mean, (spread / 2).exp(), generator)
        variance = beta if self.large_variance else beta * s_next**2 / s**2
        return _with_noise(mean, torch.where(last, 0, variance.clamp_min(0).sqrt()), generator)


class DPMSolver2M(Sampler):
    """DPM-Solver++ (2M): x' = (s' / s) x - a' expm1(-h) D, second order in the log-SNR; the last step returns x0.

    Args:
        clip: clamp x0 to [-1, 1].

    Source: arXiv 2211.01095, Algorithm 2.
    """

    def __init__(self, clip: bool = False) -> None:
        self.clip = clip
        self.begin()

    def begin(self) -> None:
        """As in `Sampler`."""
        self._last: tuple[Tensor, Tensor] | None = None

    def step(
        self, denoiser: Denoiser, x: Tensor, time: Tensor, after: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """As in `Sampler`."""
        process, x0 = denoiser.process, denoiser(x, time).x0
        x0 = x0.clamp(-1, 1) if self.clip else x0
        _, s, a_next, s_next = _coefficients(process, time, after)
        if s_next == 0:
            return a_next.to(x) * x0
        h = (process.log_snr(after) - process.log_snr(time)) / 2
        slope = x0
        if self._last is not None:
            last_x0, last_h = self._last
            slope = x0 + (h / (2 * last_h)).to(x) * (x0 - last_x0)
        self._last = (x0, h)
        return (s_next / s).to(x) * x - (a_next * torch.expm1(-h)).to(x) * slope


class EDMSampler(Sampler):
    """Euler or Heun on d x / d sigma = (x - D) / sigma, with optional churn; the step to sigma 0 is Euler.

    Args:
        heun: second-order correction.
        churn: S_churn; 0 is deterministic.
        churn_min, churn_max: sigmas between which noise is added.
        churn_noise: standard deviation of what is added.

    Raises:
        ValueError: the process has alpha other than 1.

    Source: arXiv 2206.00364, Algorithm 2.
    """

    def __init__(
        self,
        heun: bool = True,
        churn: float = 0.0,
        churn_min: float = 0.0,
        churn_max: float = float("inf"),
        churn_noise: float = 1.0,
    ) -> None:
        self.heun, self.churn = heun, churn
        self.churn_min, self.churn_max, self.churn_noise = churn_min, churn_max, churn_noise

    def __call__(
        self,
        denoiser: Denoiser,
        z: Tensor,
        grid: Tensor,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> tuple[Tensor, int]:
        """As in `Sampler`."""
        if (denoiser.process.alpha(grid) != 1).any():
            raise ValueError(f"EDMSampler needs a process with alpha 1, got {type(denoiser.process).__name__}")
        self._gamma = min(self.churn / (len(grid) - 1), 2**0.5 - 1)
        return super().__call__(denoiser, z, grid, generator, callback)

    def step(
        self, denoiser: Denoiser, x: Tensor, time: Tensor, after: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """As in `Sampler`."""
        process = denoiser.process
        s, s_next = process.sigma(time), process.sigma(after)
        if self._gamma > 0 and self.churn_min <= s <= self.churn_max:
            raised = s * (1 + self._gamma)
            x = _with_noise(x, self.churn_noise * (raised**2 - s**2).sqrt(), generator)
            s, time = raised, process.time_of_unit(process.u_of_log_snr(-2 * raised.log()))
        h = s_next - s
        slope = (x - denoiser(x, time).x0) / s.to(x)
        moved = x + h.to(x) * slope
        if not self.heun or s_next == 0:
            return moved
        second = (moved - denoiser(moved, after).x0) / s_next.to(x)
        return x + (h / 2).to(x) * (slope + second)

    def steps_for(self, nfe: int) -> int:
        """As in `Sampler`: Heun costs 2 S - 1."""
        return (nfe + 1) // 2 if self.heun else nfe


class FlowSampler(Sampler):
    """Euler, midpoint or Heun on the velocity d x / d(1 - u), for continuous processes.

    Args:
        order: 1 (Euler) or 2.
        midpoint: second order by the midpoint instead of Heun's rule.
    """

    def __init__(self, order: int = 1, midpoint: bool = False) -> None:
        if order not in (1, 2):
            raise ValueError(f"sampler.order must be 1 or 2, got {order}")
        if midpoint and order == 1:
            raise ValueError("sampler.midpoint needs sampler.order 2, got 1")
        self.order, self.midpoint = order, midpoint

    def step(
        self, denoiser: Denoiser, x: Tensor, time: Tensor, after: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """As in `Sampler`."""
        if denoiser.process.discrete:
            raise ValueError(f"FlowSampler needs a continuous process, got {type(denoiser.process).__name__}")
        h = (time - after).to(x)
        slope = denoiser(x, time).flow
        if self.midpoint:
            return x + h * denoiser(x + h / 2 * slope, (time + after) / 2).flow
        moved = x + h * slope
        return moved if self.order == 1 else x + h / 2 * (slope + denoiser(moved, after).flow)

    def steps_for(self, nfe: int) -> int:
        """As in `Sampler`: second order costs 2 S."""
        return max(1, nfe // self.order)


class EulerMaruyama(Sampler):
    """Reverse SDE d x = (flow + c score) d(1 - u) + sqrt(2 c) d W with diffusion c(u) = scale sigma(u).

    The marginals are those of the flow for every c >= 0. Each step evaluates at its noisier end, so the score is never
    taken at the clean end.

    Args:
        scale: of the diffusion; 0 is Euler on the flow.

    Source: arXiv 2303.08797, Eq. 2.33, with t = 1 - u.
    """

    def __init__(self, scale: float = 1.0) -> None:
        if scale < 0:
            raise ValueError(f"sampler.scale must not be negative, got {scale}")
        self.scale = scale

    def step(
        self, denoiser: Denoiser, x: Tensor, time: Tensor, after: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """As in `Sampler`."""
        prediction, h = denoiser(x, time), time - after
        # c score = -scale eps: no division
        drift = prediction.flow - self.scale * prediction.eps
        spread = (2 * self.scale * denoiser.process.sigma(time) * h).sqrt()
        return _with_noise(x + h.to(x) * drift, spread, generator)


def clipped(prediction: Prediction) -> Prediction:
    """The same with x0 in [-1, 1], and eps taken from that x0."""
    return prediction.with_output("x0", prediction.x0.clamp(-1, 1))


def _coefficients(process: Process, time: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return process.alpha(time), process.sigma(time), process.alpha(after), process.sigma(after)


def _with_noise(x: Tensor, spread: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        raise ValueError("this sampler adds noise and needs a generator")
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x + spread.to(x) * noise
