"""Cost of the noise assignment against batch size, and as a share of a step of the CIFAR UNet, on one thread.

The step is timed at a small batch and scaled up: its FLOPs grow with the batch, and both sides run on the same core.
"""

import math
import statistics
import time
from collections.abc import Callable

import pytest
import torch

from lightning_modules.immiscible import assign, pair_costs
from lightning_modules.networks.unet import DDPMUNet

BATCHES = (128, 256, 512, 1024)
SHAPE = (3, 32, 32)


def median_seconds(action: Callable[[], object], times: int) -> float:
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def test_assignment_against_batch_and_step(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    net, small = DDPMUNet(), torch.randn(4, *SHAPE, generator=generator)
    net_time = torch.full((4,), 500.0)
    step = median_seconds(lambda: net(small, net_time).square().mean().backward(), 3) / 4
    rows = []
    for batch in BATCHES:
        data, noise = (torch.randn(batch, *SHAPE, generator=generator) for _ in range(2))
        costs = pair_costs(data, noise)
        distance = median_seconds(lambda data=data, noise=noise: pair_costs(data, noise), 5)
        solve = median_seconds(lambda costs=costs: assign(costs), 5)
        rows.append((batch, distance, solve, (distance + solve) / (batch * step)))
    exponent = math.log(sum(rows[-1][1:3]) / sum(rows[0][1:3])) / math.log(BATCHES[-1] / BATCHES[0])
    with capsys.disabled():
        print(f"\nstep of the CIFAR UNet: {1e3 * step:.0f} ms an image")
        for batch, distance, solve, share in rows:
            print(
                f"B {batch:5d}: distances {1e3 * distance:6.1f} ms, assignment {1e3 * solve:6.1f} ms, "
                f"{share:.3%} of a step"
            )
        print(f"growth of the sum: B^{exponent:.2f}")
    assert len(rows) == len(BATCHES)
