"""Data sets of photo files, decoded when a batch asks for them: Clothing1M, WebVision and ImageNet."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.sources import ImageSets, ImageSource, explained, fit_picture

CLOTHING1M = "Clothing1M comes from its authors on request: https://github.com/Cysu/noisy_label"
IMAGENET = "ImageNet-1k (ILSVRC12) is at https://image-net.org, after registration"
WEBVISION = "WebVision 1.0 is at https://data.vision.ee.ethz.ch/cvl/webvision/dataset2017.html"


class ImageFiles:
    """Picture files decoded when a batch asks for them: (B, 3, size, size) uint8, shorter side resized, centre cut.

    Args:
        paths: one file per row.
        size: edge length in pixels.
    """

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths = np.array([str(p) for p in paths])
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return torch.stack([_read_picture(path, self.size) for path in self.paths[rows.numpy()]])


class Clothing1M(ImageSource):
    """Clothing1M: 1M noisy training images, 14k clean validation and 10k clean test images of 14 classes.

    Args:
        root: folder with `noisy_train_key_list.txt`, `clean_val_key_list.txt`, `clean_test_key_list.txt`,
            `noisy_label_kv.txt`, `clean_label_kv.txt` and the pictures that the lists name.
        size: pictures are resized to this many pixels (paper: 256).
    """

    def __init__(self, root: str, size: int = 256) -> None:
        self.root = root
        self.size = size

    def read(self) -> ImageSets:
        """As in `ImageSource`; pictures are decoded on demand."""
        root = Path(self.root)
        pairs = {}
        for part, table in (("noisy_train", "noisy"), ("clean_val", "clean"), ("clean_test", "clean")):
            with explained(root / f"{part}_key_list.txt", f"a list of picture paths; {CLOTHING1M}"):
                keys = (root / f"{part}_key_list.txt").read_text().split()
            with explained(root / f"{table}_label_kv.txt", f"`path class` a line; {CLOTHING1M}"):
                rows = (line.split() for line in (root / f"{table}_label_kv.txt").read_text().splitlines())
                labels = {path: int(label) for path, label in rows}
                pairs[part] = ([root / key for key in keys], torch.tensor([labels[key] for key in keys]))
        return _file_sets(pairs["noisy_train"], pairs["clean_test"], pairs["clean_val"], 14, self.size)


class WebVision(ImageSource):
    """Mini-WebVision: the Google part of the first classes of WebVision 1.0; tested on its validation set.

    Args:
        root: folder with `info/train_filelist_google.txt`, `info/val_filelist.txt`, `google/`, `val_images_256/`.
        num_classes: the first classes are kept (paper: 50).
        size: pictures are resized to this many pixels (official code: 256, crops of 227).
        imagenet_val: folder `<class number>/*` of ILSVRC12 validation pictures to test on instead.
    """

    def __init__(self, root: str, num_classes: int = 50, size: int = 256, imagenet_val: str | None = None) -> None:
        self.root = root
        self.num_classes = num_classes
        self.size = size
        self.imagenet_val = imagenet_val

    def read(self) -> ImageSets:
        """As in `ImageSource`; pictures are decoded on demand."""
        train = self._list("info/train_filelist_google.txt", "")
        test = self._list("info/val_filelist.txt", "val_images_256")
        if self.imagenet_val is not None:
            folder = Path(self.imagenet_val)
            with explained(folder, "folders 0, 1, ... of ILSVRC12 validation pictures"):
                files = [(f, int(d.name)) for d in folder.iterdir() for f in sorted(d.iterdir())]
            files = [(path, label) for path, label in files if label < self.num_classes]
            test = [path for path, _ in files], torch.tensor([label for _, label in files])
        return _file_sets(train, test, None, self.num_classes, self.size)

    def _list(self, name: str, folder: str) -> tuple[list[Path], Tensor]:
        root = Path(self.root)
        with explained(root / name, f"`path class` a line; {WEBVISION}"):
            rows = [line.split() for line in (root / name).read_text().splitlines()]
            kept = [(root / folder / path, int(label)) for path, label in rows if int(label) < self.num_classes]
        return [path for path, _ in kept], torch.tensor([label for _, label in kept])


class ImageNet(ImageSource):
    """ImageNet-1k: 1.28M training pictures; tested on its 50,000 validation pictures.

    Args:
        root: folder with `train/<class>/*` and `val/<class>/*`; classes are numbered in the order of their names.
        size: pictures are resized to this many pixels.
    """

    def __init__(self, root: str, size: int = 256) -> None:
        self.root = root
        self.size = size

    def read(self) -> ImageSets:
        """As in `ImageSource`; pictures are decoded on demand."""
        train, test = (self._list(Path(self.root) / part) for part in ("train", "val"))
        classes = int(train[1].max()) + 1
        return _file_sets(train, test, None, classes, self.size)

    def _list(self, folder: Path) -> tuple[list[Path], Tensor]:
        with explained(folder, f"a folder of pictures for each class; {IMAGENET}"):
            names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
            files = [(file, k) for k, name in enumerate(names) for file in sorted((folder / name).iterdir())]
            return [path for path, _ in files], torch.tensor([label for _, label in files])


def _read_picture(path: str, size: int) -> Tensor:
    from PIL import Image

    with explained(Path(path), "a picture that the data set's list names"), Image.open(path) as picture:
        return torch.from_numpy(np.array(fit_picture(picture.convert("RGB"), size))).permute(2, 0, 1)


def _file_sets(
    train: tuple[list[Path], Tensor],
    test: tuple[list[Path], Tensor],
    val: tuple[list[Path], Tensor] | None,
    num_classes: int,
    size: int,
) -> ImageSets:
    val_images, val_labels = (None, None) if val is None else (ImageFiles(val[0], size), val[1])
    return ImageSets(
        ImageFiles(train[0], size), train[1], ImageFiles(test[0], size), test[1], num_classes, val_images, val_labels
    )
