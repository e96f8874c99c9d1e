"""Net-steps per CPU second of a stack against nets one by one, what leaving early saves, bytes per net; one thread.

Run: `python -m pytest -s tests/benchmarks/test_stacks.py`.
"""

import itertools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_modules.sgd_noise import nets_in_cache
from lightning_modules.stacks.architectures import MLP
from lightning_modules.stacks.grid import Member, Points, Rules, make_points
from lightning_modules.stacks.sweep import Sweep

SHAPES = ((49, 32, 3), (784, 64, 3))
STACKS = (16, 64, 256)
BATCH = 16
POINTS = 16384


class RandomSets:
    """16,384 points with labels that no net fits soon."""

    def __init__(self, dim: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pool = torch.randn(POINTS, dim, generator=generator)
        self.label = torch.randn(POINTS, generator=generator).sign()
        self.rows = torch.arange(POINTS).unsqueeze(0)
        self.test, self.test_label = self.pool[:256], self.label[:256]


def points(arch: MLP, dim: int) -> Points:
    starts = [w.unsqueeze(0) for w in arch.draw((dim,), torch.Generator().manual_seed(1))]
    return make_points(arch, RandomSets(dim), starts, [7])


def stacked_rate(dim: int, arch: MLP, count: int, slots: int, bursts: int = 5) -> float:
    """Net-steps per CPU second of bursts of 100 steps, draws and gathers included."""
    members = {str(k): Member(0, 2.0**15, 0.01 * (1 + k), POINTS) for k in range(count)}
    sweep = Sweep(arch, Rules(BATCH, 100, 10**9), points(arch, dim), members, slots)
    sweep.burst()
    before, start = sweep.net_steps, time.process_time()
    for _ in range(bursts):
        sweep.burst()
    spent = time.process_time() - start
    assert sweep.alive == count, "a net has left, and the rate is not that of so many"
    return (sweep.net_steps - before) / spent


def single_rate(dim: int, width: int, depth: int, steps: int = 500) -> float:
    """The same net as an nn.Module with autograd and torch.optim.SGD."""
    sizes = [dim, *[width] * depth]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b, bias=False), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(width, 1, bias=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    sets, generator = RandomSets(dim), torch.Generator().manual_seed(0)
    start = time.process_time()
    for _ in range(steps):
        rows = torch.randint(POINTS, (BATCH,), generator=generator)
        loss = (1 - net(sets.pool[rows]).squeeze(-1) * sets.label[rows]).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return steps / (time.process_time() - start)


def test_net_steps_per_cpu_second(capsys: pytest.CaptureFixture[str]) -> None:
    """Each stack right after the single net, five times; the ratio's median and range."""
    torch.set_num_threads(1)
    lines = []
    for dim, width, depth in SHAPES:
        arch = MLP(width=width, depth=depth)
        weights = sum(w.numel() for w in arch.draw((dim,), torch.Generator()))
        room = nets_in_cache(4 * weights)
        lines.append(f"{dim} inputs, width {width}, depth {depth}: {room} nets in the cache at a time")
        for count in STACKS:
            pairs = [
                (stacked_rate(dim, arch, count, min(count, room)), single_rate(dim, width, depth)) for _ in range(5)
            ]
            rate, alone = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratios = sorted(stack / single for stack, single in pairs)
            lines.append(
                f"  {count} nets: {rate:,.0f} net-steps/CPU-s, one by one {alone:,.0f}: {ratios[2]:.1f} times "
                f"({ratios[0]:.1f} to {ratios[-1]:.1f}), {6 * BATCH * weights * rate / 1e9:.1f} GFLOP/s"
            )
    with capsys.disabled():
        print("", *lines, sep="\n")


def test_memory_per_net(capsys: pytest.CaptureFixture[str]) -> None:
    """Highest resident memory of processes with few and with many nets side by side; the slope is a net's."""
    lines = []
    for dim, width, depth in SHAPES:
        # far enough apart that the interpreter's own memory, which varies, does not count
        few, many = (1024, 4096) if dim == 49 else (256, 1024)
        weights = sum(w.numel() for w in MLP(width, depth).draw((dim,), torch.Generator()))
        code = (
            "import re, sys; from test_stacks import MLP, stacked_rate; "
            f"n = int(sys.argv[1]); stacked_rate({dim}, MLP({width}, {depth}), n, n, 1); "
            "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
        )
        # what is freed goes back at once, so that the peak is of memory in use
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        options: dict[str, Any] = {"cwd": Path(__file__).parent, "env": environment}
        options |= {"capture_output": True, "check": True}
        peak = {
            n: 1024 * int(subprocess.run([sys.executable, "-c", code, str(n)], **options).stdout) for n in (few, many)
        }
        measured = (peak[many] - peak[few]) / (many - few)
        lines.append(f"{dim} inputs: {measured / 1e3:,.0f} kB per net, weights {4 * weights / 1e3:,.0f} kB")
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
