"""FD-small: Frechet distance between features of a small classifier trained on the real images. No downloads.

Values compare only within one data set, resolution, feature net (its hash is reported) and number of samples.
"""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from callbacks.rng import make_generator
from lightning_modules.diffusion.ranks import is_parallel

IMAGES, BATCH, LR, SEED = 180_000, 128, 2e-3, 1234
"""Training of the feature net: 3 epochs of 60,000 images, or as many images from a smaller set; Adam, cosine decay to
0, no augmentation."""

CHUNK = 500
"""Images per forward pass."""


class Moments(NamedTuple):
    """Mean (D,) and unbiased covariance (D, D) of features, float64."""

    mean: Tensor
    cov: Tensor


def frechet_distance(a: Moments, b: Moments) -> Tensor:
    """|m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1^1/2 C2 C1^1/2)^1/2, 0-d float64; negative eigenvalues count as 0."""
    values, vectors = torch.linalg.eigh(a.cov)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.cov @ root).clamp_min(0).sqrt().sum()
    return (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross


def moments(features: Tensor, reduce: bool = False) -> Moments:
    """Of features (n, D); with `reduce` over the features of all ranks, which exchange sums, not images."""
    wide = features.double()
    count = wide.new_tensor([len(wide)])
    sums = [count, wide.sum(0), wide.T @ wide]
    if reduce and is_parallel():
        for part in sums:
            torch.distributed.all_reduce(part)
    count, total, outer = sums
    mean = total / count
    return Moments(mean, (outer - count * mean.outer(mean)) / (count - 1))


def share(hits: Tensor) -> Tensor:
    """Share of true entries (n,) bool over all ranks, 0-d float64."""
    sums = torch.stack([hits.sum(), hits.new_tensor(len(hits), dtype=torch.int64)])
    if is_parallel():
        torch.distributed.all_reduce(sums)
    return sums[0].double() / sums[1]


class FeatureNet(nn.Module):
    """conv-BN-ReLU three times (32, 64, 64 channels; the last two of stride 2), global average, linear.

    Args:
        in_channels, num_classes: of the data.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        shapes = ((in_channels, 32, 1), (32, 64, 2), (64, 64, 2))
        self.body = nn.Sequential(
            *(
                layer
                for before, after, stride in shapes
                for layer in (nn.Conv2d(before, after, 3, stride, padding=1), nn.BatchNorm2d(after), nn.ReLU())
            )
        )
        self.head = nn.Linear(64, num_classes)
        self.to(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        """(B, 64) of images clamped to [-1, 1]."""
        return self.body(images.clamp(-1, 1)).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        return self.head(self.features(images))

    @torch.no_grad()
    def all_features(self, images: Tensor) -> Tensor:
        """`features` of many images (n, C, H, W), by chunks, on the device of the net."""
        device = self.head.weight.device
        return torch.cat([self.features(chunk.to(device)) for chunk in images.split(CHUNK)])


def train_feature_net(images: Tensor, labels: Tensor, num_classes: int, seed: int = SEED) -> FeatureNet:
    """Feature net in eval mode, trained on images (n, C, H, W) in [-1, 1] with labels (n,); depends on nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = FeatureNet(images.shape[1], num_classes)
    order = make_generator("feature net", seed=seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    epochs = max(1, round(IMAGES / len(images)))
    steps = epochs * -(-len(images) // BATCH)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(len(images), generator=order).split(BATCH):
                loss = F.cross_entropy(net(images[rows]), labels[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                scheduler.step()
    return net.eval().requires_grad_(False)


class Reference(NamedTuple):
    """Feature net, the moments of the real test images, and the hash of the net's weights."""

    net: FeatureNet
    moments: Moments
    digest: str


def reference(train: tuple[Tensor, Tensor], test_images: Tensor, num_classes: int, cache: Path) -> Reference:
    """Feature net and statistics, from the cache if these images have been seen before.

    Args:
        train: real training images (n, C, H, W) float32 in [-1, 1] and labels (n,) int64, on the CPU.
        test_images: (m, C, H, W) float32.
        num_classes: of the labels.
        cache: folder; the file name is a hash of images, labels and the training settings.
    """
    settings = f"{IMAGES}/{BATCH}/{LR}/{SEED}/{num_classes}"
    file = cache / f"feature-net-{_hash(*train, test_images, text=settings)[:16]}.pt"
    if file.exists():
        stored = torch.load(file, weights_only=True)
        net = FeatureNet(train[0].shape[1], num_classes)
        net.load_state_dict(stored["net"])
        net = net.eval().requires_grad_(False)
        return Reference(net, Moments(stored["mean"], stored["cov"]), _hash(*stored["net"].values())[:16])
    net = train_feature_net(*train, num_classes)
    found = moments(net.all_features(test_images))
    state = net.state_dict()
    _store(file, {"net": state, "mean": found.mean, "cov": found.cov})
    return Reference(net, found, _hash(*state.values())[:16])


def _store(file: Path, content: dict[str, object]) -> None:
    """Whole files only, also when ranks write at once; the cache is a convenience, so a full disk costs only time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "wb") as stream:
            torch.save(content, stream)
        os.replace(name, file)
    except OSError as error:
        rank_zero_warn(f"the feature net could not be kept in {file.parent}: {error}")


def _hash(*tensors: Tensor, text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
