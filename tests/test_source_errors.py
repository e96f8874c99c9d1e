"""Sources that cannot be read: one line says where it looked, what it expected and how to get it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from picture_files import TRAIN, picture, write_folders, write_idx, write_parquet

from datamodules import sources
from datamodules.sources import CIFAR, EmbeddedSample, FashionMNIST, LocalImages


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written outside the test's folder or read from an earlier test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def refuse(*_: Any, **__: Any) -> None:
    raise PermissionError(13, "Permission denied")


def truncated_parquet(tmp: Path, _: pytest.MonkeyPatch) -> sources.ImageSource:
    root = Path(write_parquet(tmp / "data"))
    path = root / "train-00000.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    return LocalImages(str(root))


def unreadable_folder(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> sources.ImageSource:
    monkeypatch.setattr(Path, "iterdir", refuse)
    return LocalImages(str(tmp))


def half_an_idx_file(tmp: Path, _: pytest.MonkeyPatch) -> sources.ImageSource:
    root = Path(write_idx(tmp / "data"))
    path = root / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-12])
    return FashionMNIST(str(root))


def no_test_part(tmp: Path, _: pytest.MonkeyPatch) -> sources.ImageSource:
    root = Path(write_parquet(tmp / "data"))
    (root / "test-00000.parquet").unlink()
    return LocalImages(str(root))


def broken_picture(tmp: Path, _: pytest.MonkeyPatch) -> sources.ImageSource:
    root = Path(write_folders(tmp / "data"))
    (root / "train" / "b" / "1.png").write_bytes(b"no picture")
    return LocalImages(str(root))


def pictures_of_two_sizes(tmp: Path, _: pytest.MonkeyPatch) -> sources.ImageSource:
    root = Path(write_folders(tmp / "data"))
    picture(7, edge=9).save(root / "train" / "a" / "2.png")
    return LocalImages(str(root))


def unreachable_hub(_: Path, monkeypatch: pytest.MonkeyPatch) -> sources.ImageSource:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    return CIFAR(100)


def lost_sample(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> sources.ImageSource:
    monkeypatch.setattr(sources, "EMBEDDED", tmp / "fashion_mnist_8k.npz")
    return EmbeddedSample()


def corrupt_cifar(tmp: Path, _: pytest.MonkeyPatch) -> sources.ImageSource:
    (tmp / "cifar-10-batches-py").mkdir()
    return CIFAR(10, str(tmp))


FAILURES: dict[Callable[[Path, pytest.MonkeyPatch], sources.ImageSource], str] = {
    truncated_parquet: r"cannot read .*/data, expected files \*train\*\.parquet and .* \(ArrowInvalid: ",
    unreadable_folder: r"cannot read .*, expected files \*train\*\.parquet .* \(PermissionError: .*Permission denied\)",
    half_an_idx_file: r"cannot read .*/train-images-idx3-ubyte\.gz, expected an idx file .* \(EOFError: ",
    no_test_part: r"/data must hold files \*train\*\.parquet and .* found train-00000\.parquet",
    broken_picture: r"cannot read .*/data, expected pictures in column 'image' \(UnidentifiedImageError: .*1\.png",
    pictures_of_two_sizes: r"pictures have 2 different sizes, .*; give data\.source\.size",
    unreachable_hub: r"cannot load 'uoft-cs/cifar100' from the hub .*no route\); offline, give a local copy with ",
    lost_sample: r"looked for .*/fashion_mnist_8k\.npz, expected .*`python -m datamodules\.sample\.make`: not there",
    corrupt_cifar: r"cannot read .*/cifar-10-batches-py, .*CIFAR10\(root, download=True\) gets them \(RuntimeError: ",
}


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.__name__)
def test_failure_is_explained_in_one_line(
    failure: Callable[[Path, pytest.MonkeyPatch], sources.ImageSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=FAILURES[failure]) as caught:
        failure(tmp_path, monkeypatch).read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            FashionMNIST,
            r"none/train-images-idx3-ubyte\.gz, .* package dataset-fashion-mnist has it: not there",
        ),
        (LocalImages, r"none, expected files \*train\*\.parquet .* or folders train/<class>/ .*: not there"),
    ],
)
def test_missing_folder_is_named(source: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"data\.source: looked for .*{expected}"):
        source(str(tmp_path / "none")).read()


def test_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no column 'img'; it has image, label"):
        LocalImages(write_parquet(tmp_path / "data"), image="img").read()


def test_classes_that_the_test_folder_lacks_are_refused(tmp_path: Path) -> None:
    """They would shift the numbers of the classes behind them."""
    with pytest.raises(ValueError, match=r"must have the same classes, got \['a', 'b', 'c'\] and \['b', 'c'\]"):
        LocalImages(write_folders(tmp_path / "data", test="bc")).read()


@pytest.mark.parametrize(("labels", "found"), [(["x", "y", "z"], r"\['x', 'y', 'z'\]"), ([0, -1, 1], r"\[-1, 0, 1\]")])
def test_labels_that_are_no_classes_are_refused(labels: list[Any], found: str, tmp_path: Path) -> None:
    root = write_parquet(tmp_path / "data", train=(TRAIN[0], labels), test=([1, 2, 3], labels))
    with pytest.raises(ValueError, match=rf"column 'label' of .*/data must hold classes 0, 1, \.\.\., got {found}"):
        LocalImages(root).read()


def test_other_number_of_cifar_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.source\.num_classes must be 10 or 100, got 20"):
        CIFAR(20)
