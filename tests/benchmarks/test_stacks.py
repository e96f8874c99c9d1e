"""Net-steps per CPU second of a stack against nets one by one, what leaving early saves, bytes per net; one thread.

Run: `python -m pytest -s tests/benchmarks/test_stacks.py`.
"""

import itertools
import statistics
import time

import pytest
import torch
from torch import nn

from lightning_modules.stacks.architectures import MLP
from lightning_modules.stacks.grid import Member, Points, Rules, make_points
from lightning_modules.stacks.sweep import Sweep

SHAPES = ((49, 32, 3), (784, 64, 3))
STACKS = (16, 64, 256)
BATCH = 16


class RandomSets:
    """1,024 points with labels that no net fits soon."""

    def __init__(self, dim: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pool = torch.randn(1024, dim, generator=generator)
        self.label = torch.randn(1024, generator=generator).sign()
        self.rows = torch.arange(1024).unsqueeze(0)
        self.test, self.test_label = self.pool[:256], self.label[:256]


def points(arch: MLP, dim: int) -> Points:
    starts = [w.unsqueeze(0) for w in arch.draw((dim,), torch.Generator().manual_seed(1))]
    return make_points(arch, RandomSets(dim), starts, [7])


def stacked_rate(dim: int, arch: MLP, count: int, seconds: float) -> float:
    """Net-steps per CPU second of bursts of 50 steps, draws and gathers included."""
    members = {str(k): Member(0, 2.0**15, 0.01 * (1 + k), 1024) for k in range(count)}
    sweep = Sweep(arch, Rules(BATCH, 50, 10**9), points(arch, dim), members, count)
    sweep.burst()
    before, start = sweep.net_steps, time.process_time()
    while time.process_time() - start < seconds:
        sweep.burst()
    return (sweep.net_steps - before) / (time.process_time() - start)


def single_rate(dim: int, width: int, depth: int, seconds: float) -> float:
    """The same net as an nn.Module with autograd and torch.optim.SGD."""
    sizes = [dim, *[width] * depth]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b, bias=False), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(width, 1, bias=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    sets, generator = RandomSets(dim), torch.Generator().manual_seed(0)
    steps, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        rows = torch.randperm(1024, generator=generator)[:BATCH]
        loss = (1 - net(sets.pool[rows]).squeeze(-1) * sets.label[rows]).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    return steps / (time.process_time() - start)


def test_net_steps_per_cpu_second(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    lines = []
    for dim, width, depth in SHAPES:
        arch = MLP(width=width, depth=depth)
        alone = statistics.median(single_rate(dim, width, depth, 1.0) for _ in range(3))
        weights = sum(w.numel() for w in arch.draw((dim,), torch.Generator()))
        lines.append(f"{dim} inputs, width {width}, depth {depth}: one by one {alone:,.0f} net-steps/CPU-s")
        for count in STACKS:
            rate = statistics.median(stacked_rate(dim, arch, count, 1.0) for _ in range(3))
            lines.append(
                f"  {count} nets: {rate:,.0f} ({rate / alone:.1f} x), {4 * weights:,} bytes of weights per net, "
                f"{6 * BATCH * weights * rate / 1e9:.1f} GFLOP/s"
            )
            if count == 256 and dim == 49:
                assert rate > 5 * alone
    with capsys.disabled():
        print("", *lines, sep="\n")


def test_leaving_early_saves_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """Nets that finish at different times: the work is the sum of their steps, not the number times the longest."""
    torch.set_num_threads(1)
    arch = MLP(width=32, depth=3)
    members = {f"{p}/{k}": Member(0, 1.0, 2.0**k, p) for p in (64, 128, 256) for k in range(-2, 6)}
    sweep = Sweep(arch, Rules(BATCH, 100, 8000), points(arch, 49), members, len(members))
    start = time.process_time()
    while sweep.alive:
        sweep.burst()
    steps = [row["steps"] for row in sweep.rows.values()]
    saved = 1 - sweep.net_steps / (len(steps) * max(steps))
    spent = time.process_time() - start
    with capsys.disabled():
        print(f"\n{len(steps)} nets, {sweep.net_steps:,} net-steps in {spent:.1f} CPU-s: {saved:.0%} saved")
    assert sweep.net_steps == sum(steps)
