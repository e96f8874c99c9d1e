"""The exact denoiser of Gaussian data, for tests of samplers."""

import torch
from torch import Tensor, nn

from lightning_modules.diffusion.parameterization import Denoiser, Kind
from lightning_modules.diffusion.processes import EDM, Process, along


class GaussianDenoiser(nn.Module):
    """Conditional means for x0 ~ N(mu, s^2 I): of the flow, or of x0 or eps where the process has no smooth flow."""

    def __init__(self, process: Process, mu: float, s: float) -> None:
        super().__init__()
        self.process, self.mu, self.s = process, mu, s
        self.kind: Kind = "eps" if process.discrete else "x0" if isinstance(process, EDM) else "flow"

    def exact(self, x: Tensor, time: Tensor) -> Tensor:
        process = self.process
        a, sigma = along(process.alpha(time), x), along(process.sigma(time), x)
        centred = (x - a * self.mu) / (a**2 * self.s**2 + sigma**2)
        x0, eps = self.mu + a * self.s**2 * centred, sigma * centred
        if self.kind != "flow":
            return {"x0": x0, "eps": eps}[self.kind]
        return -along(process.dalpha(time), x) * x0 - along(process.dsigma(time), x) * eps

    def transport(self, z: Tensor) -> Tensor:
        """Where the probability flow carries start noise at u = 1: quantiles are kept."""
        time = self.process.time_of_unit(torch.ones((), dtype=torch.float64))
        a, sigma = self.process.alpha(time), self.process.sigma(time)
        return self.mu + self.s * (z - a * self.mu) / (a**2 * self.s**2 + sigma**2).sqrt()


class _Exact(nn.Module):
    """The wrapper sees only network times; this one remembers the process's."""

    def __init__(self, model: GaussianDenoiser) -> None:
        super().__init__()
        self.model = model
        self.time = torch.zeros(())

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        return self.model.exact(x, self.time)


class GaussianAtWork(Denoiser):
    """`Denoiser` around the exact network."""

    def __init__(self, process: Process, mu: float = 0.3, s: float = 0.5) -> None:
        self.model = GaussianDenoiser(process, mu, s)
        super().__init__(_Exact(self.model), process, self.model.kind)

    def __call__(self, x, time, label=None):
        self.net.time = time
        return super().__call__(x, time, label)
