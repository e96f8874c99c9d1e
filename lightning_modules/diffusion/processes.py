"""Forward processes x = alpha x0 + sigma e, e ~ N(0, I).

Two clocks, never mixed. *unit* u in [0, 1]: 0 clean, 1 noise, for every process; papers with t = 0 at the noise convert
by t = 1 - u at their border. *index* t in {0, ..., T - 1}: 0 least noise, discrete processes only. A "time" below is a
value of the process's own clock: int64 indices for a `DiscreteProcess`, float units for all others. Coefficients are
float64, whatever the dtype of the time; they are cast where they meet images.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


def linear_betas(timesteps: int) -> Tensor:
    """(T,) float64 from 1e-4 to 0.02, both scaled by 1000 / T. Source: openai/guided-diffusion."""
    scale = 1000 / timesteps
    return torch.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=torch.float64)


def cosine_betas(timesteps: int) -> Tensor:
    """(T,) float64 min(1 - f((i + 1) / T) / f(i / T), 0.999), f(u) = cos^2((u + 0.008) / 1.008 pi / 2). Same source."""
    f = (((torch.arange(timesteps + 1, dtype=torch.float64) / timesteps + 0.008) / 1.008) * math.pi / 2).cos() ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def scaled_linear_betas(timesteps: int) -> Tensor:
    """(T,) float64, square of linspace(sqrt(0.00085), sqrt(0.012)): the schedule of Stable Diffusion."""
    return torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), timesteps, dtype=torch.float64) ** 2


class Process(nn.Module, ABC):
    """alpha and sigma as functions of the time, and the clocks.

    Attributes:
        clean_time: time at which alpha is 1 and sigma 0; ends a sampling grid.
        noise_scale: standard deviation of the start noise of a sampler (sigma at u = 1).
    """

    clean_time: float = 0.0
    noise_scale: float = 1.0
    discrete: bool = False

    @abstractmethod
    def alpha(self, time: Tensor) -> Tensor:
        """Factor of the data, float64."""

    @abstractmethod
    def sigma(self, time: Tensor) -> Tensor:
        """Factor of the noise, float64."""

    @abstractmethod
    def dalpha(self, time: Tensor) -> Tensor:
        """d alpha / d u, float64."""

    @abstractmethod
    def dsigma(self, time: Tensor) -> Tensor:
        """d sigma / d u, float64."""

    @abstractmethod
    def u_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Unit time with this log-SNR, the inverse of `log_snr` (discrete: between the indices, linear in log-SNR)."""

    def log_snr(self, time: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) in nats, float64; falls with the time."""
        return 2 * (self.alpha(time).log() - self.sigma(time).log())

    def unit(self, time: Tensor) -> Tensor:
        """Unit clock of a time, float64."""
        return time.double()

    def time_of_unit(self, unit: Tensor) -> Tensor:
        """Time nearest to a unit-clock value."""
        return unit.double()

    def time_of_mass(self, mass: Tensor) -> Tensor:
        """Time below which this share of the default training distribution lies; mass in [0, 1). Uniform in u here."""
        return mass.double()

    def net_time(self, time: Tensor) -> Tensor:
        """Float input of the network: 1000 u, in [0, 1000], for continuous processes."""
        return 1000 * time

    def marginal(self, data: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x = alpha x0 + sigma e.

        Args:
            data, noise: (B, ...) float.
            time: (B,) times.

        Returns:
            (B, ...) in the dtype of `data`.
        """
        return along(self.alpha(time), data) * data + along(self.sigma(time), data) * noise


def along(coefficient: Tensor, like: Tensor) -> Tensor:
    """Per-sample (B,) or 0-d coefficient, shaped and cast to multiply `like` (B, ...)."""
    return coefficient.to(like).view(-1, *[1] * (like.ndim - 1)) if coefficient.ndim else coefficient.to(like)


class DiscreteProcess(Process):
    """T steps given by betas: alpha^2 = abar = cumprod(1 - beta). Index -1 is the clean end (alpha 1, sigma 0).

    u = t / (T - 1). Derivatives are central differences of the tables.

    Args:
        betas: (T,) float64.
    """

    clean_time = -1
    discrete = True
    betas: Tensor
    alphas_cumprod: Tensor
    alpha_table: Tensor
    sigma_table: Tensor
    dalpha_table: Tensor
    dsigma_table: Tensor

    def __init__(self, betas: Tensor) -> None:
        super().__init__()
        self.timesteps = len(betas)
        abar = (1 - betas).cumprod(0)
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        step = 1 / (self.timesteps - 1)
        tables = {"alpha": alpha, "sigma": sigma}
        tables |= {f"d{name}": torch.gradient(table, spacing=step)[0] for name, table in tables.items()}
        self.register_buffer("betas", betas, persistent=False)
        self.register_buffer("alphas_cumprod", abar, persistent=False)
        for (name, table), clean in zip(tables.items(), (1, 0, math.nan, math.nan), strict=True):
            # the clean end comes first, so that index t is row t + 1
            row = torch.cat([torch.tensor([clean], dtype=torch.float64), table])
            self.register_buffer(f"{name}_table", row, persistent=False)

    def alpha(self, time: Tensor) -> Tensor:
        """sqrt(abar_t)."""
        return self._look_up(self.alpha_table, time)

    def sigma(self, time: Tensor) -> Tensor:
        """sqrt(1 - abar_t)."""
        return self._look_up(self.sigma_table, time)

    def dalpha(self, time: Tensor) -> Tensor:
        """As in `Process`."""
        return self._look_up(self.dalpha_table, time)

    def dsigma(self, time: Tensor) -> Tensor:
        """As in `Process`."""
        return self._look_up(self.dsigma_table, time)

    def u_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """As in `Process`."""
        # ascending for searchsorted
        curve = -self.log_snr(torch.arange(self.timesteps))
        wanted = -log_snr.to(curve)
        right = torch.searchsorted(curve, wanted).clamp(1, self.timesteps - 1)
        share = (wanted - curve[right - 1]) / (curve[right] - curve[right - 1])
        return (right - 1 + share.clamp(0, 1)) / (self.timesteps - 1)

    def unit(self, time: Tensor) -> Tensor:
        """t / (T - 1)."""
        return time.double() / (self.timesteps - 1)

    def time_of_unit(self, unit: Tensor) -> Tensor:
        """round(u (T - 1)), int64."""
        return (unit.double() * (self.timesteps - 1)).round().long()

    def time_of_mass(self, mass: Tensor) -> Tensor:
        """floor(mass T), int64: every index gets the same share."""
        return (mass.double() * self.timesteps).floor().long().clamp(max=self.timesteps - 1)

    def net_time(self, time: Tensor) -> Tensor:
        """The index itself, as float."""
        return time.float()

    def _look_up(self, table: Tensor, time: Tensor) -> Tensor:
        if time.is_floating_point():
            raise ValueError(f"{type(self).__name__} takes int64 indices as times, got {time.dtype}; see time_of_unit")
        return table[(time + 1).to(table.device)]


class DDPMLinear(DiscreteProcess):
    """`linear_betas`; abar of the last index is 4e-5, not 0.

    Args:
        timesteps: T.
    """

    def __init__(self, timesteps: int = 1000) -> None:
        super().__init__(linear_betas(timesteps))


class DDPMCosine(DiscreteProcess):
    """`cosine_betas`.

    Args:
        timesteps: T.
    """

    def __init__(self, timesteps: int = 1000) -> None:
        super().__init__(cosine_betas(timesteps))


class ScaledLinear(DiscreteProcess):
    """`scaled_linear_betas`.

    Args:
        timesteps: T.
    """

    def __init__(self, timesteps: int = 1000) -> None:
        super().__init__(scaled_linear_betas(timesteps))


class EDM(Process):
    """alpha = 1; the unit clock is that of the sampling grid, sigma(u) = (a + u (b - a))^rho, a, b the rho-th roots.

    Training draws ln sigma ~ N(p_mean, p_std^2), which may leave [0, 1] a little on the unit clock.

    Args:
        sigma_min, sigma_max: sigma at u = 0 and 1. The clean end, sigma 0, is u = -1.
        rho: exponent.
        p_mean, p_std: of ln sigma in training.

    Source: arXiv 2206.00364, Eq. 5 and Table 1.
    """

    clean_time = -1.0

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        p_mean: float = -1.2,
        p_std: float = 1.2,
    ) -> None:
        super().__init__()
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"process.sigma_min must be in (0, sigma_max), got {sigma_min} and {sigma_max}")
        self.noise_scale = sigma_max
        self.rho, self.p_mean, self.p_std = rho, p_mean, p_std
        self.low = sigma_min ** (1 / rho)
        self.span = sigma_max ** (1 / rho) - self.low

    def alpha(self, time: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(time, dtype=torch.float64)

    def sigma(self, time: Tensor) -> Tensor:
        """Noise level; 0 from u = -low / span downwards."""
        return (self.low + time.double() * self.span).clamp_min(0) ** self.rho

    def dalpha(self, time: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(time, dtype=torch.float64)

    def dsigma(self, time: Tensor) -> Tensor:
        """As in `Process`."""
        return self.rho * self.span * (self.low + time.double() * self.span).clamp_min(0) ** (self.rho - 1)

    def u_of_sigma(self, sigma: Tensor) -> Tensor:
        """Inverse of `sigma`."""
        return (sigma.double() ** (1 / self.rho) - self.low) / self.span

    def u_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """As in `Process`."""
        return self.u_of_sigma((-log_snr.double() / 2).exp())

    def time_of_mass(self, mass: Tensor) -> Tensor:
        """sigma = exp(p_mean + p_std Phi^-1(mass)), on the unit clock."""
        # float64's neighbours of 0 and 1 keep the normal quantile finite
        inside = mass.double().clamp(1e-12, 1 - 1e-12)
        return self.u_of_sigma((self.p_mean + self.p_std * torch.special.ndtri(inside)).exp())

    def net_time(self, time: Tensor) -> Tensor:
        """c_noise = ln(sigma) / 4."""
        return self.sigma(time).log() / 4


class LinearFlow(Process):
    """alpha = 1 - u, sigma = u: rectified flow, conditional flow matching with sigma 0."""

    def alpha(self, time: Tensor) -> Tensor:
        """1 - u."""
        return 1 - time.double()

    def sigma(self, time: Tensor) -> Tensor:
        """u."""
        return time.double()

    def dalpha(self, time: Tensor) -> Tensor:
        """-1."""
        return -torch.ones_like(time, dtype=torch.float64)

    def dsigma(self, time: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(time, dtype=torch.float64)

    def u_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """As in `Process`."""
        return (-log_snr.double() / 2).sigmoid()


class TrigFlow(Process):
    """alpha = cos(pi u / 2), sigma = sin(pi u / 2): the variance-preserving interpolant."""

    def alpha(self, time: Tensor) -> Tensor:
        """cos(pi u / 2)."""
        return (time.double() * math.pi / 2).cos()

    def sigma(self, time: Tensor) -> Tensor:
        """sin(pi u / 2)."""
        return (time.double() * math.pi / 2).sin()

    def dalpha(self, time: Tensor) -> Tensor:
        """As in `Process`."""
        return -math.pi / 2 * self.sigma(time)

    def dsigma(self, time: Tensor) -> Tensor:
        """As in `Process`."""
        return math.pi / 2 * self.alpha(time)

    def u_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """As in `Process`."""
        return 2 / math.pi * (-log_snr.double() / 2).exp().atan()
