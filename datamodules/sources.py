"""Where images come from: each source loads a training and a test set of uint8 pictures."""

import functools
import gzip
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from datamodules.batches import Rows

EMBEDDED = Path(__file__).parent / "sample" / "fashion_mnist_8k.npz"


@dataclass(frozen=True)
class ImageSets:
    """Images of a data set.

    Attributes:
        train_images, test_images: (N, C, H, W) uint8 tensors, or `photo_folders.ImageFiles` decoded on demand.
        train_labels, test_labels: (N,) int64.
        num_classes: number of classes.
        val_images, val_labels: an official validation set, where there is one.
    """

    train_images: "Rows"
    train_labels: Tensor
    test_images: "Rows"
    test_labels: Tensor
    num_classes: int
    val_images: "Rows | None" = None
    val_labels: Tensor | None = None


class ImageSource(ABC):
    """A data set as a recipe names it. Attributes are plain and hashable: runs of one process share what was loaded."""

    def load(self) -> ImageSets:
        """The images, from memory if this process has loaded the same source before."""
        return _load_cached(type(self), tuple(sorted(vars(self).items())))

    @abstractmethod
    def read(self) -> ImageSets:
        """Reads the images from where they are; errors say where it looked and how to get them."""


@functools.lru_cache(maxsize=2)
def _load_cached(kind: type[ImageSource], arguments: tuple[tuple[str, Any], ...]) -> ImageSets:
    return kind(**dict(arguments)).read()


class EmbeddedSample(ImageSource):
    """Class-balanced 6,000 + 2,000 images of Fashion-MNIST that travel with the package (see `datamodules/sample/`)."""

    def read(self) -> ImageSets:
        """As in `ImageSource`."""
        expected = "the embedded sample; reinstall noisebench or run `python -m datamodules.sample.make`"
        with explained(EMBEDDED, expected), np.load(EMBEDDED) as arrays:
            data = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        return ImageSets(
            data["train_images"][:, None],
            data["train_labels"].long(),
            data["test_images"][:, None],
            data["test_labels"].long(),
            num_classes=10,
        )


class FashionMNIST(ImageSource):
    """Fashion-MNIST: 60,000 + 10,000 grey 28x28 images.

    Args:
        root: folder with the four idx files (`train-images-idx3-ubyte[.gz]` ...); Debian's package
            `dataset-fashion-mnist` puts them into `/usr/share/datasets/fashion-mnist`. None loads the hub's
            `zalando-datasets/fashion_mnist`.
    """

    def __init__(self, root: str | None = None) -> None:
        self.root = root

    def read(self) -> ImageSets:
        """As in `ImageSource`."""
        if self.root is None:
            return HubImages("zalando-datasets/fashion_mnist").read()
        arrays = [
            torch.from_numpy(_read_idx(Path(self.root), f"{part}-{kind}"))
            for part in ("train", "t10k")
            for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
        ]
        return ImageSets(arrays[0][:, None], arrays[1].long(), arrays[2][:, None], arrays[3].long(), num_classes=10)


class CIFAR(ImageSource):
    """CIFAR-10 or CIFAR-100: 50,000 + 10,000 colour 32x32 images.

    Args:
        num_classes: 10 or 100 (fine labels).
        root: folder with torchvision's `cifar-10-batches-py` / `cifar-100-python`, or with parquet files whose names
            contain `train` and `test`. None loads the hub's `uoft-cs/cifar10` or `uoft-cs/cifar100`.
    """

    def __init__(self, num_classes: int = 10, root: str | None = None) -> None:
        if num_classes not in (10, 100):
            raise ValueError(f"data.source.num_classes must be 10 or 100, got {num_classes}")
        self.num_classes = num_classes
        self.root = root

    def read(self) -> ImageSets:
        """As in `ImageSource`."""
        label = "label" if self.num_classes == 10 else "fine_label"
        if self.root is None:
            return HubImages(f"uoft-cs/cifar{self.num_classes}", image="img", label=label).read()
        folder = Path(self.root) / ("cifar-10-batches-py" if self.num_classes == 10 else "cifar-100-python")
        if not folder.is_dir():
            # a small excerpt may lack the last classes
            return replace(LocalImages(self.root, image="img", label=label).read(), num_classes=self.num_classes)
        import torchvision

        kind = torchvision.datasets.CIFAR10 if self.num_classes == 10 else torchvision.datasets.CIFAR100
        with explained(
            folder, "torchvision's CIFAR files; torchvision.datasets.CIFAR10(root, download=True) gets them"
        ):
            train, test = (kind(self.root, train=part) for part in (True, False))
        images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test)]
        return ImageSets(
            images[0], torch.tensor(train.targets), images[1], torch.tensor(test.targets), self.num_classes
        )


class HubImages(ImageSource):
    """Any image classification data set of the Hugging Face hub, held in memory.

    Args:
        name: hub id.
        image, label: column names.
        train_split, test_split: names of the splits.
        size: edge length in pixels to which the shorter side is resized and then cropped at the centre; None keeps the
            pictures, which must then be of one size.
    """

    def __init__(
        self,
        name: str,
        image: str = "image",
        label: str = "label",
        train_split: str = "train",
        test_split: str = "test",
        size: int | None = None,
    ) -> None:
        self.name = name
        self.image = image
        self.label = label
        self.train_split = train_split
        self.test_split = test_split
        self.size = size

    def read(self) -> ImageSets:
        """As in `ImageSource`."""
        import datasets

        try:
            both = [datasets.load_dataset(self.name, split=split) for split in (self.train_split, self.test_split)]
        except Exception as error:
            raise FileNotFoundError(
                f"data.source: cannot load {self.name!r} from the hub ({type(error).__name__}: {error}); "
                "offline, give a local copy with --data.source.root or --data.source datamodules.sources.LocalImages"
            ) from error
        return _from_datasets(both[0], both[1], self.name, self.image, self.label, self.size)


class LocalImages(ImageSource):
    """Local parquet or arrow files, or a folder of pictures `train/<class>/*` and `test/<class>/*`, held in memory.

    Args:
        root: the folder. Parquet / arrow file names must contain `train` and `test`.
        image, label: column names (parquet and arrow).
        size: as in `HubImages`.
    """

    def __init__(self, root: str, image: str = "image", label: str = "label", size: int | None = None) -> None:
        self.root = root
        self.image = image
        self.label = label
        self.size = size

    def read(self) -> ImageSets:
        """As in `ImageSource`."""
        import datasets

        root = Path(self.root)
        expected = "files *train*.parquet and *test*.parquet (or .arrow), or folders train/<class>/ and test/<class>/"
        with explained(root, expected):
            entries = sorted(root.iterdir())
        kind, files = _local_files(entries)
        if not files["train"] or not files["test"]:
            found = ", ".join(e.name for e in entries[:8]) or "nothing"
            raise FileNotFoundError(f"data.source.root: {root} must hold {expected}; found {found}")
        folders = kind == "imagefolder"
        with explained(root, expected):
            options = [{"data_dir": files[p][0]} if folders else {"data_files": files[p]} for p in ("train", "test")]
            train, test = (datasets.load_dataset(kind, split="train", **where) for where in options)
        image, label = ("image", "label") if folders else (self.image, self.label)
        return _from_datasets(train, test, self.root, image, label, self.size)


class explained:
    """Turns whatever goes wrong while reading `path` into one error that says what was expected there."""

    def __init__(self, path: Path, expected: str) -> None:
        self.path = path
        self.expected = expected

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception):
            return
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(
                f"data.source: looked for {self.path}, expected {self.expected}: not there"
            ) from error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"data.source: cannot read {self.path}, expected {self.expected} ({reason})") from error


def _read_idx(root: Path, name: str) -> np.ndarray:
    candidates = [root / f"{name}.gz", root / name]
    path = next((c for c in candidates if c.exists()), candidates[0])
    with explained(path, "an idx file of Fashion-MNIST; Debian's package dataset-fashion-mnist has it"):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        shape = tuple(np.frombuffer(data, ">i4", count=data[3], offset=4))
        # a copy, since a tensor over a read-only buffer is not safe
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape).copy()


def _local_files(entries: list[Path]) -> tuple[str, dict[str, list[str]]]:
    for kind, suffix in (("parquet", ".parquet"), ("arrow", ".arrow")):
        files = {part: [str(e) for e in entries if e.suffix == suffix and part in e.name] for part in ("train", "test")}
        if any(files.values()):
            return kind, files
    return "imagefolder", {
        part: [str(e) for e in entries if e.is_dir() and e.name == part] for part in ("train", "test")
    }


def _from_datasets(train: Any, test: Any, name: str, image: str, label: str, size: int | None) -> ImageSets:
    import datasets

    for part in (train, test):
        for column in (image, label):
            if column not in part.column_names:
                raise ValueError(f"data.source: {name} has no column {column!r}; it has {', '.join(part.column_names)}")
    names = [getattr(part.features[label], "names", None) for part in (train, test)]
    if names[0] != names[1]:
        raise ValueError(
            f"data.source: training and test set of {name} must have the same classes, got {names[0]} and {names[1]}"
        )
    labels = [_labels(part, label, name) for part in (train, test)]
    with explained(Path(name), f"pictures in column {image!r}"):
        images = [_decode_all(part.cast_column(image, datasets.Image())[image], size) for part in (train, test)]
    num_classes = int(max(part.max() for part in labels)) + 1
    return ImageSets(images[0], labels[0], images[1], labels[1], num_classes)


def _labels(part: Any, column: str, name: str) -> Tensor:
    values = np.asarray(part.with_format("numpy")[column][:])
    if values.dtype.kind not in "iu" or values.size == 0 or values.min() < 0:
        found = np.unique(values)[:3].tolist()
        raise ValueError(f"data.source: column {column!r} of {name} must hold classes 0, 1, ..., got {found}")
    return torch.from_numpy(values.astype(np.int64))


def _decode_all(pictures: Any, size: int | None) -> Tensor:
    arrays = [np.asarray(fit_picture(picture, size)) for picture in pictures]
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1:
        raise ValueError(
            f"pictures have {len(shapes)} different sizes, e.g. {sorted(shapes)[:3]}; give data.source.size"
        )
    stacked = torch.from_numpy(np.stack(arrays))
    return stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2).contiguous()


def fit_picture(picture: Any, size: int | None) -> Any:
    """A PIL picture as grey or RGB; with `size` (pixels) its shorter side is resized and the centre square is cut."""
    if picture.mode not in ("L", "RGB"):
        picture = picture.convert("RGB")
    if size is None:
        return picture
    from PIL import Image, ImageOps

    return ImageOps.fit(picture, (size, size), method=Image.Resampling.BILINEAR)
