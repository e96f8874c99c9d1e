"""Cost of the observers against the plain formulation: CPU seconds of one thread, alternating, best of each."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from callbacks.local_complexity import crossing_counts, hull_vertices, local_complexity, orthonormal_frame
from callbacks.spectral_entropy import (
    SpectralEntropy,
    diffusion_spectral_entropy,
    diffusion_spectral_mutual_information,
    eigenvalue_entropy,
)
from datamodules.images import ImageData
from datamodules.sources import EmbeddedSample
from lightning_modules.networks.plain import MLP, SmallConvNet
from lightning_modules.supervised.classifier import Classifier


def cpu_seconds(action: Callable[[], Any]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def compare(
    benchmark: Any, name: str, ours: Callable[[], Any], plain: Callable[[], Any], goal: float, rounds: int
) -> None:
    """Reports the ratio of the best times; rounds alternate, so that a busy machine slows both."""
    torch.set_num_threads(1)
    fast, slow = [], []

    def both() -> None:
        fast.append(cpu_seconds(ours))
        slow.append(cpu_seconds(plain))

    benchmark.pedantic(both, rounds=rounds)
    ratio = min(slow) / min(fast)
    benchmark.extra_info.update(ratio=ratio, goal=goal)
    print(f"\n{name}: {min(fast):.3f} s against {min(slow):.3f} s, ratio {ratio:.1f} (goal {goal:g})")


def features(count: int) -> Tensor:
    return torch.randn(count, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def dense_formula(points: Tensor, general: bool) -> float:
    """As written in the paper: diagonal matrices as matrices; the walk's own (not symmetric) eigenvalues if general."""
    gauss = (torch.cdist(points, points) ** 2 / -200).exp()
    if general:
        walk = torch.diag(1 / gauss.sum(1)) @ gauss
        return float(eigenvalue_entropy(torch.linalg.eigvals(walk)))
    root = torch.diag(gauss.sum(1) ** -0.5)
    return float(eigenvalue_entropy(torch.linalg.eigvalsh(root @ gauss @ root)))


@pytest.mark.parametrize(("count", "goal", "rounds"), [(500, 4.0, 3), (1000, 4.0, 2), (2000, 4.0, 1)])
def test_symmetric_against_general_eigenvalues(count: int, goal: float, rounds: int, benchmark: Any) -> None:
    points = features(count)
    assert diffusion_spectral_entropy(points) == pytest.approx(dense_formula(points, general=True), abs=1e-8)
    compare(
        benchmark,
        f"DSE, n {count}, general eigenvalues",
        lambda: diffusion_spectral_entropy(points),
        lambda: dense_formula(points, general=True),
        goal,
        rounds,
    )


@pytest.mark.parametrize(("count", "goal", "rounds"), [(500, 1.9, 5), (1000, 2.2, 3), (2000, 2.5, 2)])
def test_scaled_vectors_against_dense_matrices(count: int, goal: float, rounds: int, benchmark: Any) -> None:
    points = features(count)
    compare(
        benchmark,
        f"DSE, n {count}, dense products",
        lambda: diffusion_spectral_entropy(points),
        lambda: dense_formula(points, general=False),
        goal,
        rounds,
    )


@pytest.mark.parametrize(("count", "goal"), [(500, 9.6), (1000, 4.6), (2000, 2.8)])
def test_information_from_one_kernel(count: int, goal: float, benchmark: Any) -> None:
    points, labels = features(count), torch.arange(count) % 10

    def plain() -> float:
        """A kernel for each subset of each class."""
        value, size = 0.0, count // 10
        draw = torch.Generator().manual_seed(0)
        for label in range(10):
            subsets = [torch.randperm(count, generator=draw)[:size] for _ in range(5)]
            mean = sum(dense_formula(points[rows], general=False) for rows in subsets) / 5
            value += (mean - dense_formula(points[labels == label], general=False)) / 10
        return value

    ours = lambda: diffusion_spectral_mutual_information(points, labels)  # noqa: E731
    compare(benchmark, f"DSMI, n {count}, ten classes", ours, plain, goal, 3)


class Watched:
    """A perceptron 784-200-200-200-10 and 1,024 pictures, as in the paper's MNIST study."""

    def __init__(self, vertices: int) -> None:
        torch.manual_seed(0)
        self.net = MLP(784, 200, 4).eval()
        self.layers = {name: part for name, part in self.net.named_modules() if isinstance(part, nn.Linear)}
        generator = torch.Generator().manual_seed(0)
        self.points = torch.rand(1024, 1, 28, 28, generator=generator)
        self.frame = orthonormal_frame(vertices // 2, 784, generator, torch.float32)

    def ours(self) -> Tensor:
        return local_complexity(self.net, self.points, self.frame, [0.05], self.layers)[0][0]

    @torch.no_grad()
    def plain(self, batch: int) -> Tensor:
        """All vertices of `batch` points at once through the whole net, signs compared with the first vertex."""
        found: dict[str, Tensor] = {}
        handles = [
            layer.register_forward_hook(lambda _, args, out, name=name: found.__setitem__(name, out.sign()))
            for name, layer in self.layers.items()
        ]
        counts = []
        for points in self.points.flatten(1).split(batch):
            self.net(hull_vertices(points, self.frame, 0.05).flatten(0, 1))
            signs = [part.reshape(len(points), -1, part.shape[1]) for part in found.values()]
            counts.append(torch.stack([(part != part[:, :1]).any(1).sum(1) for part in signs], dim=1))
        for handle in handles:
            handle.remove()
        return torch.cat(counts)


@pytest.mark.parametrize(
    ("vertices", "batch", "goal", "rounds"),
    [(24, 1024, 3.7, 5), (24, 64, 2.7, 5), (24, 1, 4.0, 1), (50, 1024, 3.9, 5), (50, 64, 2.2, 5), (50, 1, 4.0, 1)],
)
def test_local_complexity_against_plain(vertices: int, batch: int, goal: float, rounds: int, benchmark: Any) -> None:
    watched = Watched(vertices)
    # float32: a pre-activation within rounding of 0 may fall on either side
    assert int((watched.ours() - watched.plain(batch)).abs().sum()) <= 3
    name = f"LC, {vertices} vertices, {batch} {'points' if batch > 1 else 'point'} at a time"
    compare(benchmark, name, watched.ours, lambda: watched.plain(batch), goal, rounds)


def test_reduction_against_signs(benchmark: Any) -> None:
    values = torch.randn(1000, 200, generator=torch.Generator().manual_seed(0))

    def plain() -> Tensor:
        signs = values.sign().reshape(20, 50, 200)
        return (signs != signs[:, :1]).any(1).sum(1)

    compare(benchmark, "reduction over 50 vertices", lambda: crossing_counts(values, 50), plain, 1.0, 20)


def timed(callback: Callback) -> list[float]:
    """Makes a callback write down the CPU seconds of its own hooks."""
    seconds: list[float] = []
    for name in ("on_validation_epoch_start", "on_validation_batch_start", "on_validation_epoch_end"):
        method = getattr(callback, name)

        def wrapped(*args: Any, method: Any = method) -> None:
            start = time.process_time()
            method(*args)
            seconds.append(time.process_time() - start)

        setattr(callback, name, wrapped)
    return seconds


def test_share_of_a_mini_run(benchmark: Any, tmp_path: Path) -> None:
    """Spectral entropy at its defaults, after each epoch of 5,000 pictures."""
    torch.set_num_threads(1)
    callback = SpectralEntropy(["net.features"])
    spent = timed(callback)
    L.seed_everything(0)
    trainer = L.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        use_distributed_sampler=False,
        callbacks=[callback],
    )
    module = Classifier(SmallConvNet, lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    total: list[float] = []
    data = ImageData(EmbeddedSample(), batch_size=64, val_fraction=1 / 6)
    benchmark.pedantic(lambda: total.append(cpu_seconds(lambda: trainer.fit(module, datamodule=data))), rounds=1)
    share = sum(spent) / total[0]
    benchmark.extra_info.update(ratio=share, goal="<= 0.10")
    print(f"\nspectral entropy each epoch: {sum(spent):.2f} of {total[0]:.2f} s, share {share:.2f}")
