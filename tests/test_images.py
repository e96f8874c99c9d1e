"""The image data module: split, noise, passes, checkpoints, bad input."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from image_data import SMALL, epoch, field, ready
from jsonargparse import ArgumentParser
from numpy.random import RandomState
from synthetic import SyntheticImages

from datamodules.images import ImageData
from datamodules.labels import Symmetric, stratified_split, symmetric_noise
from datamodules.photo_folders import ImageFiles
from datamodules.sources import EmbeddedSample, ImageSets, ImageSource


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")


# split


def test_mini_split_of_the_embedded_sample() -> None:
    data = ready(EmbeddedSample(), val_fraction=1 / 6)
    val, test = data.val_dataloader()
    assert [data.num_train, len(val.dataset), len(test.dataset), data.num_classes] == [5000, 1000, 2000, 10]


def test_split_is_the_official_one_of_its_seed() -> None:
    train, _ = stratified_split(SMALL.load().train_labels.numpy(), 0.1, RandomState(7))
    assert ready(split_seed=7).train_labels()["clean_label"].tolist() == (train % 4).tolist()


def test_seeds_default_to_the_runs_seed() -> None:
    given = ready(noise=Symmetric(0.5), split_seed=3, noise_seed=3)
    assert torch.equal(ready(noise=Symmetric(0.5)).train_labels()["label"], given.train_labels()["label"])


def test_run_seed_is_read_at_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ImageData(SMALL)
    monkeypatch.setenv("PL_GLOBAL_SEED", "9")
    data.setup()
    assert torch.equal(data.train_labels()["label"], ready(split_seed=9).train_labels()["label"])


def test_setup_leaves_the_global_random_state_alone() -> None:
    np.random.seed(0)
    torch.manual_seed(0)
    before = (np.random.get_state(legacy=True)[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]
    ready(noise=Symmetric(0.4))
    assert (np.random.get_state(legacy=True)[1].tolist(), torch.get_rng_state().tolist()) == before  # type: ignore[index]


def test_train_and_validation_images_are_disjoint() -> None:
    data = ready(training=False)
    pictures = [field(epoch(data, loader), "image") for loader in (data.train_dataloader(), data.val_dataloader()[0])]
    unique = torch.cat(pictures).flatten(1).unique(dim=0)
    assert [len(pictures[0]), len(pictures[1]), len(unique)] == [72, 8, 80]


def test_subset_shares_the_images_of_the_source() -> None:
    data = ready()
    assert data.train_dataloader().dataset.fields["image"] is SMALL.load().train_images


# noise


def test_noise_is_drawn_for_training_and_then_for_validation_labels() -> None:
    data = ready(noise=Symmetric(0.5), split_seed=1, noise_seed=2, val_fraction=0.25)
    labels, rng = SMALL.load().train_labels.numpy(), RandomState(2)
    expected = [symmetric_noise(labels[rows], 0.5, 4, rng) for rows in stratified_split(labels, 0.25, RandomState(1))]
    val = field(epoch(data, data.val_dataloader()[0]), "label")
    assert [data.train_labels()["label"].tolist(), val.tolist()] == [expected[0].tolist(), expected[1].tolist()]


def test_validation_batches_carry_the_clean_label() -> None:
    data = ready(noise=Symmetric(1.0), val_fraction=0.5, split_seed=1)
    labels = SMALL.load().train_labels.numpy()
    _, rows = stratified_split(labels, 0.5, RandomState(1))
    assert field(epoch(data, data.val_dataloader()[0]), "clean_label").tolist() == labels[rows].tolist()


def test_test_labels_are_clean() -> None:
    data = ready(noise=Symmetric(1.0))
    assert torch.equal(field(epoch(data, data.test_dataloader()), "label"), SMALL.load().test_labels)


def test_test_set_is_the_second_validation_loader() -> None:
    data = ready(noise=Symmetric(1.0))
    assert torch.equal(field(epoch(data, data.val_dataloader()[1]), "label"), SMALL.load().test_labels)


def test_noise_seed_keeps_the_split() -> None:
    first, second = (ready(noise=Symmetric(0.5), noise_seed=seed).train_labels() for seed in (1, 2))
    assert torch.equal(first["clean_label"], second["clean_label"])
    assert not torch.equal(first["label"], second["label"])


def test_all_ranks_draw_the_same_labels() -> None:
    first, second = (ready(noise=Symmetric(0.5), rank=rank, replicas=2).train_labels()["label"] for rank in (0, 1))
    assert torch.equal(first, second)


OFFICIAL = SyntheticImages(num_classes=4, channels=3, size=8, per_class=20, official_val=True)


def test_official_validation_set_leaves_all_training_images() -> None:
    assert ready(OFFICIAL, val_fraction=0.0).num_train == 80


def test_official_validation_labels_stay_clean() -> None:
    data = ready(OFFICIAL, noise=Symmetric(1.0))
    expected = torch.arange(40) % 4  # as SyntheticImages labels its pictures
    assert torch.equal(field(epoch(data, data.val_dataloader()[0]), "label"), expected)


# passes


def test_passes_walk_through_the_same_data_in_turn() -> None:
    data = ready(passes=2, noise=Symmetric(0.5))
    batches, labels = epoch(data, data.train_dataloader()), data.train_labels()["label"]
    assert [batch["pass"] for batch in batches] == [0] * 5 + [1] * 5
    for part in (batches[:5], batches[5:]):
        assert sorted(field(part, "index").tolist()) == list(range(72))
        assert torch.equal(field(part, "label"), labels[field(part, "index")])


INDEPENDENT: dict[str, Any] = {"noise": Symmetric(0.5), "passes": 2, "independent_noise": True}


def test_independent_noise_leaves_the_first_pass_unchanged() -> None:
    shared = ready(noise=Symmetric(0.5)).train_labels()["label"]
    assert torch.equal(ready(**INDEPENDENT).train_labels()["label"], shared)


def test_independent_noise_gives_each_pass_its_own_split_and_labels() -> None:
    first, second = ready(**INDEPENDENT).train_dataloader().dataset.passes
    assert set(first.rows_of.tolist()) != set(second.rows_of.tolist())
    assert not torch.equal(first.fields["label"], second.fields["label"])


# checkpoints


def test_checkpoint_of_the_same_labels_is_accepted() -> None:
    ready(noise=Symmetric(0.5)).load_state_dict(ready(noise=Symmetric(0.5)).state_dict())


def test_checkpoint_of_other_labels_is_refused() -> None:
    state = ready(noise=Symmetric(0.5), noise_seed=1).state_dict()
    with pytest.raises(ValueError, match=r"other noisy labels than data\.source, data\.split_seed, data\.noise_seed"):
        ready(noise=Symmetric(0.5), noise_seed=2).load_state_dict(state)


def test_checkpoint_of_other_labels_is_refused_when_it_is_read_before_setup() -> None:
    data = ImageData(SMALL, noise=Symmetric(0.5), noise_seed=2)
    data.load_state_dict(ready(noise=Symmetric(0.5), noise_seed=1).state_dict())
    with pytest.raises(ValueError, match="other noisy labels"):
        data.setup()


def test_checkpoint_of_a_second_pass_with_other_labels_is_refused() -> None:
    state = ready(**INDEPENDENT).state_dict()
    state["labels"][1] = state["labels"][1].flip(0)
    with pytest.raises(ValueError, match="other noisy labels"):
        ready(**INDEPENDENT).load_state_dict(state)


def test_testing_a_checkpoint_needs_no_equal_labels() -> None:
    data = ready(noise=Symmetric(0.5), noise_seed=2)
    data.trainer.testing = True
    data.load_state_dict(ready(noise=Symmetric(0.5), noise_seed=1).state_dict())


# command line


def test_settings_of_a_recipe_build_the_data() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=L.LightningDataModule)
    noise = {"class_path": "datamodules.labels.Symmetric", "init_args": {"rate": 0.4}}
    options = {"source": {"class_path": "datamodules.sources.EmbeddedSample"}, "noise": noise, "val_fraction": 1 / 6}
    settings = {"data": {"class_path": "datamodules.images.ImageData", "init_args": options}}
    data = parser.instantiate_classes(parser.parse_object(settings)).data
    data.setup()
    label, clean = (data.train_labels()[name] for name in ("label", "clean_label"))
    # 36 % of 5,000 with a standard deviation of 0.4 % (2,000 draws hit the true class with probability 0.1)
    assert float((label != clean).float().mean()) == pytest.approx(0.36, abs=0.015)


# bad input


class Constant(ImageSource):
    """Black pictures."""

    def read(self) -> ImageSets:
        images, labels = torch.zeros(20, 1, 4, 4, dtype=torch.uint8), torch.arange(20) % 2
        return ImageSets(images, labels, images, labels, 2)


class OnDemand(ImageSource):
    """Pictures that are decoded when a batch asks for them."""

    def read(self) -> ImageSets:
        labels = torch.arange(20) % 2
        return ImageSets(ImageFiles([Path("a.jpg")] * 20, 4), labels, ImageFiles([Path("a.jpg")] * 20, 4), labels, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 0}, r"data\.passes must be at least 1, got 0"),
        ({"independent_noise": True}, r"data\.independent_noise needs data\.passes of at least 2, got 1"),
        ({"mean": [0.5]}, r"data\.mean and data\.std must be given together, got \[0\.5\] and None"),
        ({"mean": [0.5], "std": [0.5]}, r"data\.mean must have one value for each of the 3 channels, got 1"),
        ({"val_fraction": 0.0}, r"data\.val_fraction 0\.0 leaves no image of 80 to validate on"),
        ({"val_fraction": 1.0}, r"data\.val_fraction must be in \[0, 1\), got 1\.0"),
        ({"padding": 4}, r"data\.padding must not be negative and needs data\.crop, got 4 and crop None"),
        ({"source": Constant()}, r"data\.std cannot be taken .* a channel is constant; give data\.mean and std"),
        ({"source": OnDemand()}, r"data\.mean and data\.std must be given where pictures are decoded on demand"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_setting_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready(**options)


def test_mean_and_std_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.std must have one value for each of the 3 channels, got 2"):
        ready(mean=[0.5] * 3, std=[0.5] * 2)


def test_zero_std_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.std must be positive, got \[0\.5, 0\.0, 0\.5\]"):
        ready(mean=[0.5] * 3, std=[0.5, 0.0, 0.5])
