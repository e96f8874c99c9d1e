"""Exponential moving average of the weights, and the learning-rate shape of the mini recipes."""

import copy

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def ema_decay(updates: int, cap: float) -> float:
    """min(cap, (1 + n) / (10 + n)) after n earlier updates; 0 at the first, which copies."""
    return min(cap, (1 + updates) / (10 + updates)) if updates else 0.0


class WeightAverage(nn.Module):
    """Averaged copy of a net: trained parameters move by 1 - decay, buffers are copied, frozen parameters stay.

    Args:
        net: what is averaged; starts as an exact copy.
        decay: final decay per optimizer step.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"model.ema_decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.module = copy.deepcopy(net).requires_grad_(False)
        self.start(net)

    def start(self, net: nn.Module) -> None:
        """Before training, when the weights are where they stay: a walk over all modules is too slow for each step."""
        pairs = [(a, c) for a, c in zip(self.module.parameters(), net.parameters(), strict=True) if c.requires_grad]
        self._averages: list[Tensor] = [average for average, _ in pairs]
        self._weights: list[Tensor] = [weight for _, weight in pairs]
        self._copied = [*zip(self.module.buffers(), net.buffers(), strict=True)]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """After an optimizer step; `updates` counts the earlier ones."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - ema_decay(updates, self.decay))
        for old, new in self._copied:
            old.copy_(new)


class WarmupHoldDecay(LambdaLR):
    """Linear warm-up, constant, then linear to a share of the rate; counted in optimizer steps.

    Args:
        optimizer: what is scheduled.
        warmup: steps; step k of them has k / warmup of the rate.
        total: steps of the run; None holds for ever.
        hold: share of `total` after which the rate falls.
        final: share of the rate at the end.
    """

    def __init__(
        self, optimizer: Optimizer, warmup: int = 0, total: int | None = None, hold: float = 0.5, final: float = 0.02
    ) -> None:
        def factor(step: int) -> float:
            rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
            if total is None:
                return rise
            past = max(0.0, step / total - hold) / (1 - hold)
            return rise * max(final, 1 - (1 - final) * past)

        if total is not None and not 0 <= hold < 1:
            raise ValueError(f"scheduler.hold must be in [0, 1), got {hold}")
        super().__init__(optimizer, factor)
