"""Denoising Task Routing: fixed channel masks per time step for any diffusion backbone (arXiv 2310.07138).

Legend: T tasks (time steps, index 0 = least noise), C channels, B batch. Where paper and official code
(byeongjun-park/DTR) differ, the code decides.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from callbacks.rng import make_generator


def active_channels(channels: int, beta: float) -> int:
    """floor(C beta) channels that every task reads.

    Raises:
        ValueError: channels below 1, beta outside (0, 1], or no channel left.
    """
    if channels < 1:
        raise ValueError(f"routing.channels must be at least 1, got {channels}")
    if not 0 < beta <= 1:
        raise ValueError(f"routing.beta must be in (0, 1], got {beta}")
    if (count := int(channels * beta)) == 0:
        raise ValueError(
            f"routing.beta {beta} leaves none of {channels} channels: int(channels * beta) must be positive"
        )
    return count


def routing_mask(num_tasks: int, channels: int, beta: float = 0.8, alpha: float = 4.0) -> Tensor:
    r"""A window of floor(C beta) channels that slides from the first channels to the last ones as noise grows.

    Task t reads the n = floor(C beta) channels from start_t = round((t / (T - 1))^alpha (C - n)) on, halves to even.

    Args:
        num_tasks: T.
        channels: C, the width of the block.
        beta: share of channels read; 1 is the unrouted net.
        alpha: above 1 the window stays near the first channels for small t, so noisy tasks own more channels.

    Returns:
        (T, C) bool, True where the channel is read.

    Raises:
        ValueError: num_tasks or channels below 1, beta outside (0, 1], alpha not positive.

    Source: official code byeongjun-park/DTR; the paper's notation has (t - 1) / T with t = 1..T.
    """
    if num_tasks < 1:
        raise ValueError(f"routing.num_tasks must be at least 1, got {num_tasks}")
    if not alpha > 0:
        raise ValueError(f"routing.alpha must be positive, got {alpha}")
    count = active_channels(channels, beta)
    # NumPy's linspace and power: torch's differ in the last bit, which moves a start that falls on a half
    start = np.round(np.linspace(0, 1, num_tasks) ** alpha * (channels - count)).astype(np.int64)[:, None]
    channel = np.arange(channels)
    return torch.from_numpy((start <= channel) & (channel < start + count))


def random_mask(num_tasks: int, channels: int, beta: float, generator: torch.Generator) -> Tensor:
    """Control: every task reads floor(C beta) channels drawn uniformly without replacement, independently per task.

    Args:
        num_tasks, channels, beta: as in `routing_mask`.
        generator: on the CPU and equal on all ranks.

    Returns:
        (T, C) bool.

    Source: arXiv 2310.07138, ablation; the official code draws from NumPy's global generator.
    """
    if num_tasks < 1:
        raise ValueError(f"routing.num_tasks must be at least 1, got {num_tasks}")
    count = active_channels(channels, beta)
    chosen = torch.rand(num_tasks, channels, generator=generator, device="cpu").argsort(dim=1)[:, :count]
    return torch.zeros(num_tasks, channels, dtype=torch.bool, device="cpu").scatter_(1, chosen, True)


def exclusive_share(mask: Tensor, parts: int = 4) -> Tensor:
    """Share of channels that only one part of the tasks reads: the method's claim of more room for noisy steps.

    Args:
        mask: (T, C) bool.
        parts: consecutive groups of tasks, from least to most noise.

    Returns:
        (parts,) float64 in [0, 1].
    """
    used = torch.stack([part.any(0) for part in mask.tensor_split(parts)])
    return (used & (used.sum(0) == 1)).double().mean(1)


def index_of_flow(unit: Tensor, num_tasks: int) -> Tensor:
    """Task of a flow's time: round(u (T - 1)). unit (B,) float in [0, 1], u = 1 noise; returns (B,) int64."""
    return (unit * (num_tasks - 1)).round().long()


def index_of_sigma(sigma: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Task of a noise level sigma of EDM: the step of a variance-preserving schedule with the nearest log-SNR.

    Args:
        sigma: (B,) float, positive: x = x0 + sigma e.
        alphas_cumprod: (T,) float: the schedule's cumulative product of 1 - beta, index 0 = least noise.

    Returns:
        (B,) int64; levels beyond the schedule take its first or last step.

    Source: own reading; the paper routes EDM hosts without saying how.
    """
    abar = alphas_cumprod.double()
    log_sigma = 0.5 * torch.log((1 - abar) / abar)
    return (sigma.double().log()[:, None] - log_sigma).abs().argmin(dim=1)


class Routing(nn.Module):
    """Masks of a batch for the denoiser's `extras`; no parameters.

    Args:
        mode: `dtr`; `random`, the paper's control with a table of its own for every block; `none`.
        channels: C of the routed blocks: `net.width` of a DiT; or a list with one entry per block (a UNet's
            `routed_channels`).
        num_blocks: number of routed blocks if `channels` is one number; only `random` depends on it.
        num_tasks: T.
        beta: share of channels read.
        alpha: exponent of the window, see `routing_mask`.
        seed: base seed of the random tables; None takes the run's seed. Equal on all ranks.

    The tables of `dtr` follow from the arguments and are not in the checkpoint, those of `random` are.

    Raises:
        ValueError: as `routing_mask`; an unknown mode.

    Source: arXiv 2310.07138; defaults of the official code.
    """

    def __init__(
        self,
        mode: Literal["none", "dtr", "random"] = "dtr",
        channels: int | Sequence[int] = 384,
        num_blocks: int = 12,
        num_tasks: int = 1000,
        beta: float = 0.8,
        alpha: float = 4.0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("none", "dtr", "random"):
            raise ValueError(f"routing.mode must be none, dtr or random, got {mode!r}")
        self.mode, self.num_tasks = mode, num_tasks
        widths = [channels] * num_blocks if isinstance(channels, int) else list(channels)
        if mode == "dtr":
            self.names = [f"width{width}" for width in widths]
            for width in set(widths):
                self.register_buffer(f"width{width}", routing_mask(num_tasks, width, beta, alpha), persistent=False)
        elif mode == "random":
            self.names = [f"block{block}" for block in range(len(widths))]
            generator = make_generator("dtr/random", seed=seed)
            for name, width in zip(self.names, widths, strict=True):
                self.register_buffer(name, random_mask(num_tasks, width, beta, generator))

    def forward(self, index: Tensor) -> dict[str, Any]:
        """Extras of a batch.

        Args:
            index: (B,) int64 tasks; the original step 0 .. T - 1 also when sampling skips steps.

        Returns:
            `{}` for `none`; else `mask`: bool (B, C) if all blocks share one table, or a list with one per block.

        Raises:
            ValueError: the index is not an integer: a flow's time goes through `index_of_flow` first.
        """
        if self.mode == "none":
            return {}
        if index.dtype != torch.int64:
            raise ValueError(f"routing needs int64 indices 0..{self.num_tasks - 1}, got {index.dtype}")
        rows = {name: self.get_buffer(name)[index] for name in dict.fromkeys(self.names)}
        if self.mode == "dtr" and len(rows) == 1:
            return {"mask": rows[self.names[0]]}
        return {"mask": [rows[name] for name in self.names]}
