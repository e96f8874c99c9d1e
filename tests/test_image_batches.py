"""Batches of the image data module: order, ranks, normalisation, augmentation."""

from typing import Any

import lightning as L
import pytest
import torch
from image_data import SMALL, epoch, field, ready
from torch import Tensor

from datamodules.images import ImageData
from datamodules.labels import Symmetric


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")


# batches


def test_index_is_the_position_in_the_training_subset_in_every_epoch() -> None:
    data = ready(noise=Symmetric(0.5))
    loader, labels = data.train_dataloader(), data.train_labels()["label"]
    for number in (0, 1):
        batches = epoch(data, loader, number)
        assert torch.equal(field(batches, "label"), labels[field(batches, "index")])


def test_epoch_holds_each_training_image_once() -> None:
    data = ready()
    assert sorted(field(epoch(data, data.train_dataloader()), "index").tolist()) == list(range(72))


def test_two_ranks_share_the_global_batch() -> None:
    alone = ready()
    parts = [ready(rank=rank, replicas=2) for rank in (0, 1)]
    halves = zip(*(epoch(part, part.train_dataloader()) for part in parts), strict=True)
    expected = [batch["index"].tolist() for batch in epoch(alone, alone.train_dataloader())]
    assert [first["index"].tolist() + second["index"].tolist() for first, second in halves] == expected


def test_ranks_evaluate_each_image_once() -> None:
    parts = [ready(rank=rank, replicas=3) for rank in range(3)]
    seen = [index for part in parts for index in field(epoch(part, part.test_dataloader()), "index").tolist()]
    assert sorted(seen) == list(range(40))


def test_works_without_a_trainer() -> None:
    data = ImageData(SMALL, batch_size=16, mean=[0.0] * 3, std=[1.0] * 3)
    data.setup()
    batch = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    torch.testing.assert_close(batch["image"], SMALL.load().test_images[batch["index"]] / 255)


def test_pictures_are_channels_last() -> None:
    data = ready()
    image = epoch(data, data.train_dataloader())[0]["image"]
    assert image.is_contiguous(memory_format=torch.channels_last)


def test_class_balanced_epochs_draw_anew() -> None:
    """3 batches of 16 are at most 12 of each of 4 classes, of 18 that there are."""
    data = ready(batches_per_epoch=3)
    loader = data.train_dataloader()
    first, second = (epoch(data, loader, number) for number in (0, 1))
    assert field(first, "label").bincount().tolist() == [12, 12, 12, 12]
    assert set(field(first, "index").tolist()) != set(field(second, "index").tolist())


# normalisation


def test_default_normalisation_gives_the_training_subset_mean_0_and_deviation_1() -> None:
    data = ready()
    pixels = field(epoch(data, data.train_dataloader()), "image").double()
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(pixels.std((0, 2, 3), correction=0), torch.ones(3).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_given_mean_and_std_are_used(training: bool) -> None:
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    data = ready(training=training, mean=mean, std=std)
    batch = epoch(data, data.test_dataloader())[0]
    raw = SMALL.load().test_images[batch["index"]].double() / 255
    expected = (raw - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)
    torch.testing.assert_close(batch["image"].double(), expected, rtol=1e-5, atol=1e-6)


# augmentation

UNIT: dict[str, Any] = {"mean": [0.0] * 3, "std": [1 / 255] * 3, "split_seed": 0}
"""Normalisation that keeps the pixels as they are."""

AUGMENT: dict[str, Any] = {**UNIT, "crop": 8, "padding": 2, "flip": True}


def test_augmentation_is_a_function_of_the_seed() -> None:
    first, second = (ready(**AUGMENT) for _ in range(2))
    batches = [field(epoch(data, data.train_dataloader()), "image") for data in (first, second)]
    assert torch.equal(batches[0], batches[1])


def test_augmentation_differs_between_epochs() -> None:
    data = ready(**AUGMENT)
    loader = data.train_dataloader()
    pictures = []
    for _ in range(2):
        batches = epoch(data, loader)
        pictures.append(field(batches, "image")[field(batches, "index").argsort()])
    assert not torch.equal(pictures[0], pictures[1])


def test_augmentation_differs_between_ranks() -> None:
    draws = []
    for rank in (0, 1):
        data = ready(rank=rank, replicas=2, **AUGMENT)
        data.train_dataloader()
        draws.append(data.augment_generator.initial_seed())
    assert draws[0] != draws[1]


def test_augmentation_continues_from_a_restored_generator() -> None:
    data = ready(**AUGMENT)
    loader = data.train_dataloader()
    state = data.augment_generator.get_state()
    first = field(epoch(data, loader), "image")
    data.augment_generator.set_state(state)
    assert torch.equal(field(epoch(data, loader), "image"), first)


def test_no_draw_without_augmentation() -> None:
    data = ready()
    loader = data.train_dataloader()
    before = data.augment_generator.get_state()
    epoch(data, loader)
    assert torch.equal(data.augment_generator.get_state(), before)


def test_flip_alone_mirrors_training_pictures() -> None:
    data = ready(flip=True, **UNIT)
    batches = epoch(data, data.train_dataloader())
    rows = data.train_dataloader().dataset.rows_of[field(batches, "index")]
    raw, ours = SMALL.load().train_images[rows].float(), field(batches, "image").round()
    mirrored = (ours == raw.flip(-1)).flatten(1).all(1)
    assert ((ours == raw).flatten(1).all(1) ^ mirrored).all()
    assert 0 < mirrored.sum() < len(raw)


def test_evaluation_cuts_the_centre() -> None:
    data = ready(training=False, crop=6, flip=True, **UNIT)
    image = field(epoch(data, data.test_dataloader()), "image").round()
    assert torch.equal(image, SMALL.load().test_images[torch.arange(40)][:, :, 1:7, 1:7].float())


class Probe(L.LightningModule):
    """Keeps the pictures that it is validated on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.weight * batch["image"].mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int) -> None:
        if dataloader_idx == 1:
            self.seen.append(batch["image"].round())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_validation_during_fit_is_not_augmented(tmp_path: Any) -> None:
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    probe = Probe()
    trainer.fit(probe, datamodule=ImageData(SMALL, 16, **AUGMENT))
    assert torch.equal(torch.cat(probe.seen), SMALL.load().test_images[torch.arange(40)].float())


def test_crop_larger_than_the_picture_is_refused() -> None:
    data = ready(crop=16, padding=2)
    with pytest.raises(ValueError, match=r"data\.crop 16 exceeds the padded image of 12 x 12 pixels"):
        epoch(data, data.train_dataloader())


def test_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size is global .* the 3 processes, got 16"):
        ready(rank=0, replicas=3).train_dataloader()
