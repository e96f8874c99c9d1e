"""How training times are drawn. A sampler returns times of the process's clock and importance weights, (B,) each."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.diffusion.processes import EDM, DiscreteProcess, Process
from lightning_modules.diffusion.ranks import gather_rows


class Times(NamedTuple):
    """Drawn times and the factors that undo the bias of drawing them so."""

    time: Tensor
    weight: Tensor


class TimeSampler(nn.Module):
    """The process's own training distribution: uniform index, uniform u, or log-normal sigma (EDM).

    Samplers with state keep it in buffers, so that a checkpoint has it.
    """

    def forward(self, count: int, process: Process, generator: torch.Generator) -> Times:
        """`count` times on the device of the generator."""
        return _unweighted(process.time_of_mass(self.draw_mass(count, generator)))

    def draw_mass(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) float64 in [0, 1), positions in the training distribution."""
        return _rand(count, generator)

    def start(self, process: Process, total_steps: float) -> None:
        """Called once before training; `total_steps` is the budget of optimizer steps, may be inf."""

    def observe(self, process: Process, time: Tensor, losses: Tensor) -> None:
        """Called after each batch with its times (B,) and its detached, weighted losses (B,)."""

    def step(self, num_steps: int) -> None:
        """Called after each optimizer step, with the number of steps so far."""

    def progress(self) -> dict[str, Tensor]:
        """What to log once an epoch."""
        return {}


class UniformIndex(TimeSampler):
    """Uniform over the indices of a discrete process."""

    def forward(self, count: int, process: Process, generator: torch.Generator) -> Times:
        """As in `TimeSampler`."""
        if not process.discrete:
            raise ValueError(f"UniformIndex needs a discrete process, got {type(process).__name__}")
        return super().forward(count, process, generator)


class UniformUnit(TimeSampler):
    """Uniform in u, whatever the process's own distribution.

    Args:
        low, high: ends in u.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        if not 0 <= low < high <= 1:
            raise ValueError(f"time_sampler.low and high must satisfy 0 <= low < high <= 1, got {low} and {high}")
        self.low, self.high = low, high

    def forward(self, count: int, process: Process, generator: torch.Generator) -> Times:
        """As in `TimeSampler`."""
        return _unweighted(process.time_of_unit(self.low + (self.high - self.low) * _rand(count, generator)))


class LogNormalSigma(TimeSampler):
    """ln(sigma / alpha) ~ N(mean, std^2).

    Args:
        mean, std: of the log noise-to-signal ratio, in nats.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, count: int, process: Process, generator: torch.Generator) -> Times:
        """As in `TimeSampler`."""
        unit = process.u_of_log_snr(-2 * (self.mean + self.std * _randn(count, generator)))
        return _unweighted(process.time_of_unit(unit))


class LogitNormal(TimeSampler):
    """u = sigmoid(z), z ~ N(mean, std^2). Source: arXiv 2403.03206.

    Args:
        mean, std: of z.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, count: int, process: Process, generator: torch.Generator) -> Times:
        """As in `TimeSampler`."""
        unit = (self.mean + self.std * _randn(count, generator)).sigmoid()
        return _unweighted(process.time_of_unit(unit))


class StratifiedTimes(TimeSampler):
    """The process's training distribution in strata: the first B / K samples from the least noisy stratum, and so on.

    Args:
        strata: K, which must divide the batch of a rank; None gives every sample its own stratum.
    """

    def __init__(self, strata: int | None = None) -> None:
        super().__init__()
        self.strata = strata

    def draw_mass(self, count: int, generator: torch.Generator) -> Tensor:
        """As in `TimeSampler`."""
        strata = self.strata or count
        if count % strata:
            raise ValueError(f"time_sampler.strata must divide the {count} images of a process, got {strata}")
        which = torch.arange(count, device=generator.device) // (count // strata)
        return (which + _rand(count, generator)) / strata


class LossAware(TimeSampler):
    """Draws index t with p_t ~ sqrt(mean of the last losses^2) plus a little uniform; uniform until all are known.

    Ranks share what they saw: each gathers the times and losses of all.

    Args:
        timesteps: T of the discrete process.
        history: losses kept per index.
        uniform: share of the uniform distribution.

    Source: arXiv 2102.09672, Eq. 18; constants from openai/improved-diffusion (`LossSecondMomentResampler`).
    """

    losses: Tensor
    counts: Tensor

    def __init__(self, timesteps: int = 1000, history: int = 10, uniform: float = 0.001) -> None:
        super().__init__()
        self.history, self.uniform = history, uniform
        self.register_buffer("losses", torch.zeros(timesteps, history, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(timesteps, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """(T,) float64, sum 1."""
        num = len(self.losses)
        weights = self.losses.square().mean(1).sqrt()
        mixed = weights / weights.sum().clamp_min(torch.finfo(torch.float64).tiny) * (1 - self.uniform)
        known = (self.counts >= self.history).all()
        return torch.where(known, mixed + self.uniform / num, torch.full_like(mixed, 1 / num))

    def forward(self, count: int, process: Process, generator: torch.Generator) -> Times:
        """As in `TimeSampler`; weights 1 / (T p_t)."""
        if not isinstance(process, DiscreteProcess) or process.timesteps != len(self.losses):
            raise ValueError(f"LossAware needs a discrete process of time_sampler.timesteps {len(self.losses)} steps")
        probabilities = self.probabilities()
        time = probabilities.multinomial(count, replacement=True, generator=generator)
        return Times(time, 1 / (len(probabilities) * probabilities[time]))

    def observe(self, process: Process, time: Tensor, losses: Tensor) -> None:
        """Puts the losses into the rings of their indices."""
        time, losses = gather_rows(time), gather_rows(losses.double())
        # repeated indices of a batch take neighbouring places: position = rank of the sample among its equals
        order = time.argsort(stable=True)
        equal = time[order]
        position = torch.arange(len(equal), device=equal.device) - torch.searchsorted(equal, equal)
        place = (self.counts[equal] + position) % self.history
        self.losses[equal, place] = losses[order]
        self.counts += time.bincount(minlength=len(self.counts))


def edm_quantiles(process: EDM, num: int) -> Tensor:
    """(num + 1,) float64 sigmas that cut EDM's training distribution into equal parts; 0 and inf at the ends."""
    shares = torch.arange(1, num, dtype=torch.float64) / num
    inner = process.p_mean + process.p_std * torch.special.ndtri(shares)
    ends = torch.tensor([-torch.inf, torch.inf], dtype=torch.float64)
    return torch.cat([ends[:1], inner, ends[1:]]).exp()


def _unweighted(time: Tensor) -> Times:
    return Times(time, torch.ones_like(time, dtype=torch.float64))


def _rand(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)


def _randn(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, generator=generator, device=generator.device, dtype=torch.float64)
