"""Time of an N:M mask against the plain top-k form, and of a step of the mini net against a dense one; one thread."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.networks.image import TimmNet
from lightning_modules.networks.nm_sparse import nm_mask, sparsify

PATTERNS = [(1, 4), (1, 8), (1, 16), (1, 32), (1, 128), (2, 4), (4, 8), (2, 16), (2, 128), (8, 128)]
OPTIONS = {"img_size": 28, "patch_size": 14, "in_chans": 1, "embed_dim": 64, "depth": 2, "num_heads": 4}


def median_seconds(actions: list[Callable[[], object]], times: int) -> list[float]:
    """CPU-seconds of each, in turns of five, so that other work on the machine meets all alike; a turn's first call
    fetches the memory that the others had and does not count."""
    spent: list[list[float]] = [[] for _ in actions]
    for _ in range(times):
        for action, seconds in zip(actions, spent, strict=True):
            for number in range(5):
                start = time.process_time()
                action()
                if number:
                    seconds.append(time.process_time() - start)
    return [statistics.median(seconds) for seconds in spent]


def plain_mask(weight: Tensor, n: int, m: int) -> Tensor:
    groups = weight.abs().view(-1, m)
    places = groups.topk(n, dim=1, sorted=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, places, True).view(weight.shape)


def official_mask(weight: Tensor, n: int, m: int) -> Tensor:
    groups = weight.abs().view(-1, m)
    return torch.ones_like(groups).scatter_(1, groups.argsort(1)[:, : m - n], 0.0).view(weight.shape)


def test_masks_of_3072_by_768(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    weight = torch.randn(3072, 768, generator=torch.Generator().manual_seed(0))
    for n, m in PATTERNS:
        assert torch.equal(nm_mask(weight, n, m), plain_mask(weight, n, m))
        kinds = [lambda f=f, n=n, m=m: f(weight, n, m) for f in (nm_mask, plain_mask, official_mask)]
        ours, plain, official = median_seconds(kinds, 3)
        with capsys.disabled():
            print(
                f"\n{n}:{m}: {1e3 * ours:.1f} ms, plain top-k {1e3 * plain:.1f} ms ({plain / ours:.1f} x), "
                f"argsort {1e3 * official:.1f} ms ({official / ours:.1f} x)",
                end="",
            )


class Step:
    """A training step of the mini net by hand."""

    def __init__(self, decay: float | None, lam: float = 0.0) -> None:
        torch.manual_seed(0)
        options: dict[str, Any] = {**OPTIONS, "class_token": False, "global_pool": "avg", "fc_norm": False}
        self.net = TimmNet("vit_tiny_patch16_224", 10, options=options)
        if decay is not None:
            for layer in sparsify(self.net, ["*.mlp.fc?", "*.attn.qkv"], 1, 64).values():
                layer.set_phase(1, 64, decay, lam, False)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3)
        self.image, self.label = torch.randn(64, 1, 28, 28), torch.randint(10, (64,))

    def __call__(self) -> None:
        loss = F.cross_entropy(self.net(self.image), self.label)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()


def test_step_of_the_mini_net(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    names = ["dense", "STE", "SR-STE", "MDGF"]
    dense, *others = median_seconds([Step(None), Step(0.0), Step(0.0, 2e-4), Step(0.5)], 30)
    with capsys.disabled():
        print(f"\ndense {1e3 * dense:.2f} ms", end="")
        for name, seconds in zip(names[1:], others, strict=True):
            print(f", {name} {1e3 * seconds:.2f} ms ({seconds / dense:.2f} x, goal <= 1.15)", end="")
    assert dense > 0
