"""Images per second of our data path against torchvision's transforms in a DataLoader with two workers."""

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import SyntheticImages
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from datamodules.images import ImageData

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
CIFAR_SHAPED = SyntheticImages(num_classes=10, per_class=5000)
"""50,000 random training pictures of 3x32x32; content does not matter for the time."""

ROUNDS = 5
GOAL = 10.0


class PerSample(Dataset):
    """What torchvision's CIFAR10 does for a sample: array -> PIL picture -> transforms."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def our_loader() -> tuple[ImageData, DataLoader]:
    data = ImageData(CIFAR_SHAPED, batch_size=128, crop=32, padding=4, flip=True, mean=MEAN, std=STD, split_seed=0)
    data.setup()
    training: Any = SimpleNamespace(
        training=True, global_rank=0, world_size=1, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    data.trainer = training
    return data, data.train_dataloader()


@pytest.mark.benchmark(group="data path: one epoch of CIFAR-10")
def test_epoch_against_torchvision(benchmark: Any) -> None:
    """Rounds alternate, so that a busy machine slows both; the first epoch of each, with its start-up, is left out."""
    torch.set_num_threads(1)
    data, ours = our_loader()
    sets = CIFAR_SHAPED.load()
    per_sample = PerSample(sets.train_images[torch.arange(50_000)], sets.train_labels)
    theirs = DataLoader(per_sample, batch_size=128, shuffle=True, num_workers=2, persistent_workers=True)
    theirs_seconds = []

    def our_epoch() -> int:
        return sum(len(data.on_after_batch_transfer(batch, 0)["image"]) for batch in ours)

    def time_theirs() -> None:
        start = time.perf_counter()
        assert sum(len(images) for images, _ in theirs) == 50_000
        theirs_seconds.append(time.perf_counter() - start)

    time_theirs()
    theirs_seconds.clear()
    seen = benchmark.pedantic(our_epoch, setup=time_theirs, rounds=ROUNDS, warmup_rounds=1)
    assert seen == 45_000  # a tenth validates

    rates = {
        "ours images/s": seen / benchmark.stats.stats.median,
        "torchvision images/s": 50_000 / float(np.median(theirs_seconds)),
    }
    ratio = rates["ours images/s"] / rates["torchvision images/s"]
    benchmark.extra_info.update(rates, ratio=ratio, goal=GOAL)
    print(f"\n{', '.join(f'{name} {rate:,.0f}' for name, rate in rates.items())}, ratio {ratio:.1f} (goal {GOAL:.0f})")
