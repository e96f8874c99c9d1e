"""Times at which a sampler evaluates: (S + 1,) times of the process's clock, falling, the clean end last."""

import torch
from torch import Tensor

from lightning_modules.diffusion.processes import DiscreteProcess, Process


def respaced_indices(timesteps: int, num: int) -> Tensor:
    """`num` rounded even steps from 0 to T - 1, ascending. Source: openai/guided-diffusion, `space_timesteps`."""
    if not 1 <= num <= timesteps:
        raise ValueError(f"steps must be between 1 and {timesteps}, got {num}")
    stride = (timesteps - 1) / (num - 1) if num > 1 else 1.0
    position, picked = 0.0, []
    # the official code adds up the stride; a product rounds some halves to the other side
    for _ in range(num):
        picked.append(round(position))
        position += stride
    return torch.tensor(picked)


def ddim_indices(timesteps: int, num: int) -> Tensor:
    """0, k, 2k, ... with the integer stride k that gives exactly `num` indices. Source: as above, option `ddimN`."""
    for stride in range(1, timesteps):
        picked = torch.arange(0, timesteps, stride)
        if len(picked) == num:
            return picked
    raise ValueError(f"steps: no integer stride over {timesteps} indices gives {num} of them")


class Grid:
    """Evenly spaced in the process's own clock from the noise end (discrete: trailing)."""

    def __call__(self, process: Process, num: int) -> Tensor:
        """`num` times and the clean end."""
        if isinstance(process, DiscreteProcess):
            return Trailing()(process, num)
        return UniformUnitGrid()(process, num)


class UniformUnitGrid(Grid):
    """u = 1, ..., 1 / S, then the clean end: S equal steps. For EDM use `Rho`.

    Args:
        start: first u; below 1 for processes that cannot be converted at pure noise.
    """

    def __init__(self, start: float = 1.0) -> None:
        self.start = start

    def __call__(self, process: Process, num: int) -> Tensor:
        """As in `Grid`."""
        unit = torch.linspace(self.start, 0, num + 1, dtype=torch.float64)[:-1]
        return _closed(process.time_of_unit(unit), process)


class Trailing(Grid):
    """round(T - i T / S) - 1: starts at T - 1."""

    def __call__(self, process: Process, num: int) -> Tensor:
        """As in `Grid`."""
        total = _timesteps(process)
        position = total - torch.arange(num, dtype=torch.float64) * total / num
        return _closed(position.round().long() - 1, process)


class Leading(Grid):
    """i (T // S), from the largest down to 0.

    Args:
        final_clean: False ends at index 0 instead of the clean end, as the official code of the inversion papers
            (final abar = abar[0]).
    """

    def __init__(self, final_clean: bool = True) -> None:
        self.final_clean = final_clean

    def __call__(self, process: Process, num: int) -> Tensor:
        """As in `Grid`."""
        index = torch.arange(num).flip(0) * (_timesteps(process) // num)
        return _closed(index, process) if self.final_clean else torch.cat([index, index.new_zeros(1)])


class Linspace(Grid):
    """round(linspace(0, T - 1, S)), descending: the respacing of the ancestral sampler."""

    def __call__(self, process: Process, num: int) -> Tensor:
        """As in `Grid`."""
        return _closed(respaced_indices(_timesteps(process), num).flip(0), process)


class Quadratic(Grid):
    """Squares of equal steps, dense near the data: floor(linspace(0, sqrt(0.8 T), S)^2), descending.

    Source: ermongroup/ddim (official code), `skip_type: quad`.
    """

    def __call__(self, process: Process, num: int) -> Tensor:
        """As in `Grid`."""
        root = (_timesteps(process) * 0.8) ** 0.5
        return _closed((torch.linspace(0, root, num, dtype=torch.float64) ** 2).long().flip(0), process)


class Rho(Grid):
    """EDM's sigmas: equal steps of sigma^(1 / rho), which is the unit clock of the process `EDM`; both ends, then 0."""

    def __call__(self, process: Process, num: int) -> Tensor:
        """As in `Grid`."""
        return _closed(process.time_of_unit(torch.linspace(1, 0, num, dtype=torch.float64)), process)


class UniformLogSNR(Grid):
    """Equal steps of the log-SNR between two unit times, then the clean end.

    Args:
        start, end: first and last u; the log-SNR must be finite there.
    """

    def __init__(self, start: float = 0.999, end: float = 0.001) -> None:
        self.start, self.end = start, end

    def __call__(self, process: Process, num: int) -> Tensor:
        """As in `Grid`."""
        ends = process.log_snr(process.time_of_unit(torch.tensor([self.start, self.end], dtype=torch.float64))).cpu()
        log_snr = ends[0] + (ends[1] - ends[0]) * torch.linspace(0, 1, num, dtype=torch.float64)
        return _closed(process.time_of_unit(process.u_of_log_snr(log_snr).cpu()), process)


def _closed(times: Tensor, process: Process) -> Tensor:
    return torch.cat([times, times.new_full((1,), process.clean_time)])


def _timesteps(process: Process) -> int:
    if not isinstance(process, DiscreteProcess):
        raise ValueError(f"this grid counts indices and needs a discrete process, got {type(process).__name__}")
    return process.timesteps
