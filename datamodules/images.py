"""Image classification data, held as tensors and fetched a batch at a time."""

from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from numpy.random import RandomState
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from callbacks.rng import make_generator, run_seed
from datamodules.augment import center_crop, normalize, random_crop, random_flip
from datamodules.batches import BatchOrder, FieldDataset, Passes, loader
from datamodules.labels import LabelNoise, stratified_split
from datamodules.sources import ImageSets, ImageSource

EVAL_BATCH = 128
"""Evaluation batch: on a CPU 128 pictures still fit the cache, 1,000 take 1.6 times as long per picture."""

PASS_SEED_STEP = 7919
"""Independent draws of further passes: a large step, so that they do not meet the draws of neighbouring seeds."""


class ImageData(L.LightningDataModule):
    """Images with noisy training and validation labels and clean test labels.

    A batch is a dict: `image` (B, C, H, W) float32 in channels-last order, normalised, on the device; `label` and
    `clean_label` (B,) int64; `index` (B,) int64, position in the training subset, the same in every epoch. Where an
    epoch makes several passes, `pass` too. `clean_label` is for diagnostics only.

    Split, noise and the order of an epoch are functions of the seeds, equal on all ranks. Augmentation runs on the
    device of the batch with a generator of its own, which differs between ranks.

    Args:
        source: where the pictures are.
        batch_size: global batch, split over the processes.
        val_fraction: share of each class of the training set that validates; unused where the source has an official
            validation set, which keeps its labels.
        noise: label noise of training and validation labels; None for none.
        split_seed, noise_seed: seeds of the draws of the data; None takes the run's seed.
        passes: passes over the training data per epoch, each in its own order (ELR+: one for each net).
        independent_noise: every pass has its own split and noise, as in the official code of ELR+.
        crop: edge length of random (training) and centre (evaluation) crops; None for none.
        padding: zeros around a training picture before it is cropped.
        flip: mirror half of the training pictures.
        mean, std: per channel, in units of the full scale; None takes those of the training subset.
        batches_per_epoch: an epoch is this many batches per pass, class-balanced and drawn anew each epoch, at most
            1 / C of them from a class (Clothing1M); None walks through all training data.
        num_workers: loader processes, useful where pictures are decoded on demand.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        noise: LabelNoise | None = None,
        split_seed: int | None = None,
        noise_seed: int | None = None,
        passes: int = 1,
        independent_noise: bool = False,
        crop: int | None = None,
        padding: int = 0,
        flip: bool = False,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        batches_per_epoch: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if passes < 1:
            raise ValueError(f"data.passes must be at least 1, got {passes}")
        if independent_noise and passes == 1:
            raise ValueError("data.independent_noise needs data.passes of at least 2, got 1")
        if (mean is None) != (std is None):
            raise ValueError(f"data.mean and data.std must be given together, got {mean} and {std}")
        if std is not None and min(std) <= 0:
            raise ValueError(f"data.std must be positive, got {std}")
        if padding < 0 or (padding and crop is None):
            raise ValueError(f"data.padding must not be negative and needs data.crop, got {padding} and crop {crop}")
        self.source = source
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.noise = noise
        self.split_seed = split_seed
        self.noise_seed = noise_seed
        self.passes = passes
        self.independent_noise = independent_noise
        self.crop = crop
        self.padding = padding
        self.flip = flip
        self.mean_std = None if mean is None or std is None else (torch.tensor(mean), torch.tensor(std))
        self.augment_generator = torch.Generator()
        self.batches_per_epoch = batches_per_epoch
        self.num_workers = num_workers
        self._stored_labels: list[Tensor] | None = None
        self._train: list[FieldDataset] = []

    def prepare_data(self) -> None:
        """Downloads, on one process."""
        self.source.load()

    def setup(self, stage: str | None = None) -> None:
        """Splits and draws the noise; the same on every rank."""
        if self._train:
            return
        sets = self.source.load()
        draws = [self._draw(sets, number) for number in range(self.passes if self.independent_noise else 1)]
        self._train, self._val = [train for train, _ in draws], draws[0][1]
        self._test = _fields(sets.test_images, sets.test_labels, sets.test_labels)
        self.num_classes = sets.num_classes
        self.num_train = len(self._train[0])
        first = self._train[0]
        self._mean, self._std = self.mean_std or _mean_std(sets.train_images, first.rows_of)
        channels = sets.train_images[torch.tensor([0])].shape[1]
        for name, values in (("mean", self._mean), ("std", self._std)):
            if len(values) != channels:
                raise ValueError(
                    f"data.{name} must have one value for each of the {channels} channels, got {len(values)}"
                )
        self._compare_labels()

    def train_labels(self) -> dict[str, Tensor]:
        """`label` and `clean_label` (n,) int64 of the training subset (first pass), at their `index`."""
        return {"label": self._train[0].fields["label"], "clean_label": self._train[0].fields["clean_label"]}

    def train_dataloader(self) -> DataLoader:
        """Training batches; the order is a function of (seed, epoch)."""
        # made before training starts, so that a resume finds it and restores its state
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        self.augment_generator = make_generator("augment", rank=self._rank(), device=device)
        passes = [self._train[number % len(self._train)] for number in range(self.passes)]
        order = BatchOrder(
            self.num_train,
            self.batch_size,
            shuffle=True,
            num_passes=self.passes,
            rank=self._rank(),
            num_replicas=self._num_replicas(),
            classes=self.train_labels()["label"],
            num_batches=self.batches_per_epoch,
        )
        return self._loader(passes[0] if self.passes == 1 else Passes(passes), order)

    def val_dataloader(self) -> list[DataLoader]:
        """Validation (noisy labels) and test set, so that the test accuracy is logged each epoch."""
        return [self._eval_loader(self._val), self._eval_loader(self._test)]

    def test_dataloader(self) -> DataLoader:
        """Test set, clean labels."""
        return self._eval_loader(self._test)

    def predict_dataloader(self) -> DataLoader:
        """Test pictures."""
        return self._eval_loader(self._test)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Augments and normalises on the device."""
        images = batch["image"]
        if self.trainer is not None and self.trainer.training:
            return self._normalized(batch, self._augment(images))
        return self.as_evaluated(batch)

    def examples(self, part: Literal["train", "val", "test"]) -> FieldDataset:
        """Fields of a part by position, raw; what observers pick their examples from."""
        return {"train": self._train[0], "val": self._val, "test": self._test}[part]

    def as_evaluated(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A raw batch as evaluation sees it: centre crop, normalised, no augmentation and no draw."""
        images = batch["image"]
        return self._normalized(batch, images if self.crop is None else center_crop(images, self.crop))

    def _normalized(self, batch: dict[str, Any], images: Tensor) -> dict[str, Any]:
        # in place of per-batch copies of constants: they move to the device once
        if self._mean.device != images.device:
            self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        images = normalize(images, self._mean, self._std)
        return {**batch, "image": images.contiguous(memory_format=torch.channels_last)}

    def state_dict(self) -> dict[str, Any]:
        """The noisy labels travel with the checkpoint."""
        return {"labels": [train.fields["label"].to(torch.int16) for train in self._train]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compares the checkpoint's noisy labels with those drawn here.

        Raises:
            ValueError: they differ, so the run would continue on other data.
        """
        self._stored_labels = state_dict["labels"]
        if self._train:
            self._compare_labels()

    def _compare_labels(self) -> None:
        stored = self._stored_labels
        # the test set has clean labels whatever the seed
        if stored is None or (self.trainer is not None and self.trainer.testing):
            return
        labels = [train.fields["label"] for train in self._train]
        if len(stored) != len(labels) or not all(torch.equal(a.long(), b) for a, b in zip(stored, labels, strict=True)):
            raise ValueError(
                "the checkpoint was trained on other noisy labels than data.source, data.split_seed, data.noise_seed "
                "and the run's seed give here"
            )

    def _draw(self, sets: ImageSets, number: int) -> tuple[FieldDataset, FieldDataset]:
        """Training and validation set of pass `number`: split, then noise on training and on validation labels."""
        split_seed, noise_seed = (
            (run_seed() if seed is None else seed) + number * PASS_SEED_STEP
            for seed in (self.split_seed, self.noise_seed)
        )
        labels = sets.train_labels.numpy()
        official = sets.val_images is not None and sets.val_labels is not None
        if official:
            rows, val_rows = np.arange(len(labels)), np.arange(0)
        else:
            rows, val_rows = stratified_split(labels, self.val_fraction, RandomState(split_seed % 2**32))
            if len(val_rows) == 0:
                raise ValueError(
                    f"data.val_fraction {self.val_fraction} leaves no image of {len(labels)} to validate on"
                )
        rng = RandomState(noise_seed % 2**32)
        noisy = [labels[part] for part in (rows, val_rows)]
        if self.noise is not None:
            noisy = [self.noise(labels[part], part, labels, sets.num_classes, rng) for part in (rows, val_rows)]
        train = _fields(sets.train_images, torch.from_numpy(noisy[0]), sets.train_labels[rows], rows)
        if official:
            return train, _fields(sets.val_images, sets.val_labels, sets.val_labels)
        return train, _fields(sets.train_images, torch.from_numpy(noisy[1]), sets.train_labels[val_rows], val_rows)

    def _augment(self, images: Tensor) -> Tensor:
        generator = self.augment_generator
        if self.crop is not None:
            images = random_crop(images, self.crop, self.padding, generator)
        return random_flip(images, generator) if self.flip else images

    def _eval_loader(self, dataset: FieldDataset) -> DataLoader:
        order = BatchOrder(
            len(dataset),
            EVAL_BATCH * self._num_replicas(),
            shuffle=False,
            rank=self._rank(),
            num_replicas=self._num_replicas(),
        )
        return self._loader(dataset, order)

    def _loader(self, dataset: Dataset, order: BatchOrder) -> DataLoader:
        return loader(dataset, order, self.num_workers, pin_memory=torch.cuda.is_available())

    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    def _num_replicas(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size


def _fields(images: Any, label: Any, clean_label: Any, rows: Any = None) -> FieldDataset:
    fields = {"image": images, "label": label, "clean_label": clean_label}
    if rows is None:
        return FieldDataset(fields)
    return FieldDataset(fields, rows_of=torch.from_numpy(rows), indirect=("image",))


def _mean_std(images: Any, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation over all pixels of these rows, in units of the full scale.

    From a histogram of the 256 values: exact, and without a float copy of the images.
    """
    if not isinstance(images, Tensor):
        raise ValueError("data.mean and data.std must be given where pictures are decoded on demand")
    chosen = images if rows is None else images[rows]
    counts = torch.stack([chosen[:, c].flatten().bincount(minlength=256) for c in range(chosen.shape[1])]).double()
    shares, values = counts / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
    mean = shares @ values
    std = (shares @ values**2 - mean**2).clamp_min(0).sqrt()
    if (std == 0).any():
        raise ValueError(
            "data.std cannot be taken from the training subset: a channel is constant; give data.mean and std"
        )
    return mean.float(), std.float()
