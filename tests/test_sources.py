"""Sources held in memory: embedded sample, idx, parquet, arrow, picture folders, the hub."""

import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torchvision
from picture_files import TEST, TRAIN, picture, table, write_folders, write_idx, write_parquet

from datamodules import sources
from datamodules.sample import make
from datamodules.sources import CIFAR, EMBEDDED, EmbeddedSample, FashionMNIST, HubImages, ImageSets, LocalImages


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written outside the test's folder or read from an earlier test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    sources._load_cached.cache_clear()


def values(sets: ImageSets) -> list[list[int]]:
    """Brightness and label of each picture, training and test."""
    pairs = ((sets.train_images, sets.train_labels), (sets.test_images, sets.test_labels))
    brightness = [images[torch.arange(len(images))][:, 0, 0, 0].tolist() for images, _ in pairs]
    return [brightness[0], pairs[0][1].tolist(), brightness[1], pairs[1][1].tolist()]


EXPECTED = [*TRAIN, *TEST]

# embedded sample


@pytest.mark.parametrize(("part", "per_class"), [("train", 600), ("test", 200)])
def test_embedded_sample_is_class_balanced(part: str, per_class: int) -> None:
    sets = EmbeddedSample().read()
    assert getattr(sets, f"{part}_labels").bincount().tolist() == [per_class] * 10


@pytest.mark.parametrize(("part", "count"), [("train", 6000), ("test", 2000)])
def test_embedded_images_are_grey_uint8(part: str, count: int) -> None:
    images = getattr(EmbeddedSample().read(), f"{part}_images")
    assert (images.dtype, images.shape) == (torch.uint8, (count, 1, 28, 28))


@pytest.mark.parametrize(("part", "count", "total"), [("train", 6000, 60_000), ("test", 2000, 10_000)])
def test_embedded_rows_are_distinct_positions_of_the_original(part: str, count: int, total: int) -> None:
    with np.load(EMBEDDED) as arrays:
        rows = arrays[f"{part}_rows"]
    assert (rows.dtype, len(np.unique(rows)), rows.max() < total) == (np.uint16, count, True)


@pytest.mark.skipif(not Path(make.DEFAULT_FOLDER).is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_embedded_test_images_are_the_originals() -> None:
    with np.load(EMBEDDED) as arrays:
        images, labels, rows = (arrays[f"test_{name}"] for name in ("images", "labels", "rows"))
    for kind, ours in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
        np.testing.assert_array_equal(sources._read_idx(Path(make.DEFAULT_FOLDER), f"t10k-{kind}")[rows], ours)


def test_sources_are_read_once_in_a_process() -> None:
    assert EmbeddedSample().load() is EmbeddedSample().load()


# idx


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files(tmp_path: Path, zipped: bool) -> None:
    sets = FashionMNIST(write_idx(tmp_path / "idx", zipped=zipped)).read()
    assert values(sets) == [list(range(10))] * 4


def test_sample_is_made_equal_byte_for_byte(tmp_path: Path) -> None:
    root = write_idx(tmp_path / "idx", per_class=601)
    for name in ("one.npz", "two.npz"):
        make.main(root, tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_failing_make_keeps_the_sample(tmp_path: Path) -> None:
    (tmp_path / "old.npz").write_bytes(b"old")
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        make.main(str(tmp_path), tmp_path / "old.npz")
    assert (tmp_path / "old.npz").read_bytes() == b"old"


# parquet, arrow, folders


def test_parquet(tmp_path: Path) -> None:
    assert values(LocalImages(write_parquet(tmp_path / "data")).read()) == EXPECTED


def test_parquet_with_other_columns(tmp_path: Path) -> None:
    root = write_parquet(tmp_path / "data", image="picture", label="kind")
    assert values(LocalImages(root, image="picture", label="kind").read()) == EXPECTED


def test_arrow(tmp_path: Path) -> None:
    for name, part in (("train", TRAIN), ("test", TEST)):
        table(part).save_to_disk(str(tmp_path / name))
        (tmp_path / name / "data-00000-of-00001.arrow").rename(tmp_path / f"{name}.arrow")
    assert values(LocalImages(str(tmp_path)).read()) == EXPECTED


def test_folder_of_pictures(tmp_path: Path) -> None:
    sets = LocalImages(write_folders(tmp_path / "data")).read()
    assert values(sets) == [[97, 98, 99], [0, 1, 2]] * 2


def test_pictures_are_resized(tmp_path: Path) -> None:
    root = Path(write_folders(tmp_path / "data"))
    picture(7, edge=9).save(root / "train" / "a" / "2.png")
    assert LocalImages(str(root), size=3).read().train_images[torch.arange(4)].shape == (4, 3, 3, 3)


@pytest.mark.parametrize(("classes", "label"), [(10, "label"), (100, "fine_label")])
def test_cifar_parquet(tmp_path: Path, classes: int, label: str) -> None:
    root = write_parquet(tmp_path / "data", image="img", label=label)
    assert values(CIFAR(classes, root).read()) == EXPECTED


def test_cifar_in_torchvisions_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(kind, "_load_meta", lambda self: None)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, (name, _) in enumerate(kind.train_list + kind.test_list):
        # channels first, as in the published files: red is the file's number, green and blue are 0
        data = np.zeros((1, 3, 32, 32), dtype=np.uint8)
        data[:, 0] = number
        (folder / name).write_bytes(pickle.dumps({"data": data.reshape(1, -1), "labels": [number]}))
    assert values(CIFAR(10, str(tmp_path)).read()) == [[0, 1, 2, 3, 4]] * 2 + [[5]] * 2


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"train": table(TRAIN), "test": table(TEST)}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: parts[split])
    assert values(HubImages("someone/pictures").read()) == EXPECTED
