"""Tiny picture data sets in the layouts that the sources read."""

import gzip
import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

Part = tuple[list[int], list[Any]]
"""Brightness and label of each picture."""


def picture(value: int, edge: int = 4) -> Image.Image:
    return Image.fromarray(np.full((edge, edge, 3), value, dtype=np.uint8))


def png(value: int, edge: int = 4) -> dict[str, Any]:
    """A picture as the hub's parquet files hold it."""
    data = io.BytesIO()
    picture(value, edge).save(data, "png")
    return {"bytes": data.getvalue(), "path": None}


def table(part: Part, image: str = "image", label: str = "label") -> datasets.Dataset:
    return datasets.Dataset.from_dict({image: [png(value) for value in part[0]], label: part[1]})


TRAIN: Part = ([10, 20, 30], [0, 1, 2])
TEST: Part = ([40, 50], [2, 1])


def write_parquet(folder: Path, train: Part = TRAIN, test: Part = TEST, **columns: str) -> str:
    folder.mkdir(exist_ok=True)
    for name, part in (("train-00000", train), ("test-00000", test)):
        table(part, **columns).to_parquet(str(folder / f"{name}.parquet"))
    return str(folder)


def write_folders(root: Path, train: str = "abc", test: str = "abc") -> str:
    """One picture per class; its brightness is the letter's code."""
    for part, classes in (("train", train), ("test", test)):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            picture(ord(name)).save(root / part / name / "1.png")
    return str(root)


def write_idx(root: Path, per_class: int = 1, zipped: bool = True) -> str:
    """The four files of Fashion-MNIST with 2x2 pictures, each filled with its class."""
    root.mkdir(exist_ok=True)
    labels = np.repeat(np.arange(10, dtype=np.uint8), per_class)
    for part in ("train", "t10k"):
        for name, array in (
            ("images-idx3-ubyte", np.tile(labels[:, None, None], (1, 2, 2))),
            ("labels-idx1-ubyte", labels),
        ):
            data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes() + array.tobytes()
            path = root / f"{part}-{name}"
            if zipped:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(data))
            else:
                path.write_bytes(data)
    return str(root)
