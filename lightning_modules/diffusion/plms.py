"""PLMS, the default sampler of Stable Diffusion 1's pipeline, and its times."""

import torch
from torch import Tensor

from lightning_modules.diffusion.grids import Grid
from lightning_modules.diffusion.parameterization import Denoiser
from lightning_modules.diffusion.processes import DiscreteProcess, Process
from lightning_modules.diffusion.samplers import Sampler

WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Adams and Bashforth's, the newest prediction first."""


class PLMS(Sampler):
    """DDIM's step with eps extrapolated from up to four predictions; the first step is done twice, as Heun's.

    S steps cost S + 1 evaluations. There is no clipping: it is for latents.

    Source: arXiv 2202.09778, pseudo linear multi-step; the first step as in diffusers' `PNDMScheduler` with
        `skip_prk_steps`.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """As in `Sampler`."""
        self._past: list[Tensor] = []

    def step(
        self, denoiser: Denoiser, x: Tensor, time: Tensor, after: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """As in `Sampler`."""
        process, eps = denoiser.process, denoiser(x, time).eps
        if not self._past:
            self._past = [eps]
            ahead = denoiser(_moved(process, x, time, after, eps), after).eps
            return _moved(process, x, time, after, (eps + ahead) / 2)
        self._past = [eps, *self._past[:3]]
        weights = WEIGHTS[len(self._past) - 1]
        mixed = sum((w * old for w, old in zip(weights, self._past, strict=True)), torch.zeros_like(eps))
        return _moved(process, x, time, after, mixed)

    def steps_for(self, nfe: int) -> int:
        """One less: the first step has two evaluations.

        Raises:
            ValueError: `nfe` is below 2.
        """
        if nfe < 2:
            raise ValueError(f"PLMS needs at least 2 evaluations, got {nfe} in evaluation.nfes")
        return nfe - 1


class LeadingFromOne(Grid):
    """1 + i (T // S) from the largest down, then index 0: Stable Diffusion's times (`steps_offset` 1, no clean end)."""

    def __call__(self, process: Process, num: int) -> Tensor:
        """As in `Grid`."""
        if not isinstance(process, DiscreteProcess):
            raise ValueError(
                f"LeadingFromOne counts indices and needs a discrete process, got {type(process).__name__}"
            )
        index = 1 + torch.arange(num).flip(0) * (process.timesteps // num)
        return torch.cat([index, index.new_zeros(1)])


def _moved(process: Process, x: Tensor, time: Tensor, after: Tensor, eps: Tensor) -> Tensor:
    """DDIM's step with this eps."""
    x0 = (x - process.sigma(time).to(x) * eps) / process.alpha(time).to(x)
    return process.alpha(after).to(x) * x0 + process.sigma(after).to(x) * eps
