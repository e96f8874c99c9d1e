"""Learning rates counted in epochs."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class LinearWarmupCosine(LambdaLR):
    """Rises linearly from 0 over `warmup` epochs, then falls as a cosine to 0 at `total`.

    Args:
        optimizer: what is scheduled.
        warmup, total: epochs. The first epoch has 1 / warmup of the rate (official code: a step before each epoch).

    Source: arXiv 2312.04823, official code (history).
    """

    def __init__(self, optimizer: Optimizer, warmup: int, total: int) -> None:
        if not 0 <= warmup < total:
            raise ValueError(f"scheduler.warmup must be in [0, total), got {warmup} and total {total}")

        def factor(epoch: int) -> float:
            number = epoch + 1
            if number <= warmup:
                return number / warmup
            return 0.5 * (1 + math.cos(math.pi * (number - warmup) / (total - warmup)))

        super().__init__(optimizer, factor)
