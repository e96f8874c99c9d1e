"""Held-out denoising loss with fixed times and noise: cheap, and nearly free of noise between evaluations."""

import torch
from torch import Tensor

from callbacks.rng import make_generator
from lightning_modules.diffusion.processes import Process
from lightning_modules.diffusion.ranks import is_parallel

SEED = 99
"""Of everything that is drawn for evaluation: the same in all runs."""


def probe_draws(process: Process, data: Tensor, first_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fixed draws for a batch (B, ...) of held-out images, whose first image has this position in its set.

    Returns:
        Masses (B,) in [0, 1), stratified over the batch; the times at these masses of the training distribution; noise
        like `data`.
    """
    generator = make_generator(f"probe/{first_index}", seed=SEED)
    mass = torch.rand(len(data), generator=generator, dtype=torch.float64)
    mass = (torch.randperm(len(data), generator=generator) + mass) / len(data)
    noise = torch.randn(data.shape, generator=generator, dtype=torch.float32)
    mass = mass.to(data.device)
    return mass, process.time_of_mass(mass), noise.to(data)


class QuarterLosses:
    """Sums of losses by quarter of the training distribution (of u, where it is uniform), from clean to noise.

    Args:
        device: of the losses.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(4, 2, dtype=torch.float64, device=device)

    def add(self, mass: Tensor, losses: Tensor) -> None:
        """Adds losses (B,) at masses (B,) in [0, 1)."""
        pairs = torch.stack([losses.double(), torch.ones_like(mass)], dim=1)
        self.sums.index_add_(0, (4 * mass).long().clamp(0, 3), pairs)

    def means(self) -> dict[str, Tensor]:
        """`loss` and `loss_q1` to `loss_q4`, over all ranks."""
        sums = self.sums.clone()
        if is_parallel():
            torch.distributed.all_reduce(sums)
        means = {"loss": sums[:, 0].sum() / sums[:, 1].sum()}
        return means | {f"loss_q{quarter + 1}": row[0] / row[1] for quarter, row in enumerate(sums)}
