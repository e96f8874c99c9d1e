"""Clothing1M and WebVision layouts with a few tiny pictures; pictures decoded on demand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.images import ImageData
from datamodules.labels import Symmetric
from datamodules.photo_folders import Clothing1M, ImageFiles, WebVision


def save(path: Path, value: int, width: int = 8, height: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, dtype=np.uint8)).save(path)


def brightness(images: object) -> list[int]:
    assert isinstance(images, ImageFiles)
    return images[torch.arange(len(images))][:, 0, 0, 0].tolist()


@pytest.fixture
def clothing(tmp_path: Path) -> Path:
    """Four noisy training pictures, of which one also has a clean label, and two clean ones each for val and test."""
    noisy = {f"images/0/{name}.png": label for name, label in (("10", 3), ("20", 13), ("30", 0), ("40", 3))}
    clean = {"images/1/50.png": 1, "images/1/60.png": 2, "images/1/70.png": 5, "images/0/10.png": 9}
    for key in noisy | clean:
        save(tmp_path / key, int(Path(key).stem))
    for name, labels in (("noisy", noisy), ("clean", clean)):
        (tmp_path / f"{name}_label_kv.txt").write_text("".join(f"{key} {label}\n" for key, label in labels.items()))
    (tmp_path / "noisy_train_key_list.txt").write_text("\n".join(noisy))
    (tmp_path / "clean_val_key_list.txt").write_text("images/1/60.png\nimages/1/50.png\n")
    (tmp_path / "clean_test_key_list.txt").write_text("images/1/70.png\n")
    return tmp_path


@pytest.fixture
def webvision(tmp_path: Path) -> Path:
    """Classes 0, 1 and 2; the tests keep the first two."""
    train = {"google/q0001/10.png": 0, "google/q0002/20.png": 1, "google/q0003/30.png": 2}
    val = {"40.png": 1, "50.png": 2}
    for folder, labels in (("", train), ("val_images_256", val)):
        for key in labels:
            save(tmp_path / folder / key, int(Path(key).stem))
    (tmp_path / "info").mkdir()
    for name, labels in (("train_filelist_google", train), ("val_filelist", val)):
        (tmp_path / "info" / f"{name}.txt").write_text("".join(f"{key} {label}\n" for key, label in labels.items()))
    return tmp_path


def test_clothing_trains_on_noisy_labels(clothing: Path) -> None:
    sets = Clothing1M(str(clothing), size=4).read()
    assert (brightness(sets.train_images), sets.train_labels.tolist()) == ([10, 20, 30, 40], [3, 13, 0, 3])


def test_clothing_validates_on_clean_labels(clothing: Path) -> None:
    sets = Clothing1M(str(clothing), size=4).read()
    assert sets.val_labels is not None
    assert (brightness(sets.val_images), sets.val_labels.tolist()) == ([60, 50], [2, 1])


def test_clothing_tests_on_clean_labels(clothing: Path) -> None:
    sets = Clothing1M(str(clothing), size=4).read()
    assert (brightness(sets.test_images), sets.test_labels.tolist(), sets.num_classes) == ([70], [5], 14)


@pytest.mark.parametrize("workers", [0, 1])
def test_clothing_batches(clothing: Path, workers: int) -> None:
    source = Clothing1M(str(clothing), size=6)
    data = ImageData(source, 4, 0.0, Symmetric(0.0), crop=4, mean=[0.0] * 3, std=[1 / 255] * 3, num_workers=workers)
    data.setup()
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert batch["image"].shape == (4, 3, 4, 4)
    assert batch["image"][:, 0, 0, 0].round().tolist() == [10.0 * (row + 1) for row in batch["index"].tolist()]


def test_webvision_keeps_the_first_classes(webvision: Path) -> None:
    sets = WebVision(str(webvision), num_classes=2, size=4).read()
    assert (brightness(sets.train_images), sets.train_labels.tolist()) == ([10, 20], [0, 1])


def test_webvision_tests_on_its_validation_set(webvision: Path) -> None:
    sets = WebVision(str(webvision), num_classes=2, size=4).read()
    assert (brightness(sets.test_images), sets.test_labels.tolist()) == ([40], [1])


def test_webvision_tests_on_imagenet(webvision: Path, tmp_path: Path) -> None:
    for label in (0, 1, 2):
        save(tmp_path / "imagenet" / str(label) / "x.png", 100 + label)
    source = WebVision(str(webvision), num_classes=2, size=4, imagenet_val=str(tmp_path / "imagenet"))
    sets = source.read()
    pairs = zip(brightness(sets.test_images), sets.test_labels.tolist(), strict=True)
    assert sorted(pairs) == [(100, 0), (101, 1)]


def test_shorter_side_is_resized_and_the_centre_cut(tmp_path: Path) -> None:
    pixels = np.zeros((4, 12, 3), dtype=np.uint8)
    pixels[:, 4:8] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert ImageFiles([tmp_path / "wide.png"], 4)[torch.tensor([0])].unique().tolist() == [200]


def test_grey_pictures_become_rgb(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 9, dtype=np.uint8)).save(tmp_path / "grey.png")
    assert ImageFiles([tmp_path / "grey.png"], 4)[torch.tensor([0])].shape == (1, 3, 4, 4)


# bad input


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (Clothing1M, r"none/noisy_train_key_list\.txt, .* https://github\.com/Cysu/noisy_label: not there"),
        (WebVision, r"none/info/train_filelist_google\.txt, .* https://data\.vision\.ee\.ethz\.ch/.*: not there"),
    ],
)
def test_missing_folder_is_named(source: type[Clothing1M] | type[WebVision], expected: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"data\.source: looked for .*{expected}"):
        source(str(tmp_path / "none")).read()


def test_picture_without_label_is_named(clothing: Path) -> None:
    (clothing / "clean_test_key_list.txt").write_text("images/1/99.png\n")
    with pytest.raises(ValueError, match=r"cannot read .*clean_label_kv\.txt, .*KeyError: 'images/1/99\.png'"):
        Clothing1M(str(clothing)).read()


def test_broken_list_is_named(webvision: Path) -> None:
    (webvision / "info" / "val_filelist.txt").write_text("40.png one\n")
    with pytest.raises(ValueError, match=r"cannot read .*/info/val_filelist\.txt, expected `path class` a line"):
        WebVision(str(webvision)).read()


def test_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"looked for .*/gone\.png, expected a picture .*: not there"):
        ImageFiles([tmp_path / "gone.png"], 4)[torch.tensor([0])]


def test_truncated_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "half.jpg"
    save(path, 9, 64, 64)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cannot read .*/half\.jpg, expected a picture"):
        ImageFiles([path], 4)[torch.tensor([0])]
