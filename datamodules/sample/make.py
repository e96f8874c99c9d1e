"""Makes the embedded sample from the files of Fashion-MNIST: `python -m datamodules.sample.make [--root FOLDER]`.

FOLDER holds the four idx files; Debian's package dataset-fashion-mnist puts them where the default looks. The result is
the same, byte for byte, wherever NumPy's and zlib's formats are.
"""

import argparse
import io
import os
import zipfile
from pathlib import Path

import numpy as np
from numpy.random import RandomState

from datamodules.sources import EMBEDDED, FashionMNIST

DEFAULT_FOLDER = "/usr/share/datasets/fashion-mnist"
PER_CLASS = {"train": 600, "test": 200}
SEED = 0


def balanced_rows(labels: np.ndarray, per_class: int, rng: RandomState) -> np.ndarray:
    """Sorted positions of `per_class` random examples of each class."""
    rows = [rng.permutation(np.flatnonzero(labels == label))[:per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(rows))


def main(root: str = DEFAULT_FOLDER, target: Path = EMBEDDED) -> None:
    """Writes the sample: next to this file, unless a test says otherwise."""
    sets, rng = FashionMNIST(root).read(), RandomState(SEED)
    arrays = {}
    for part, images, labels in (
        ("train", sets.train_images, sets.train_labels),
        ("test", sets.test_images, sets.test_labels),
    ):
        rows = balanced_rows(labels.numpy(), PER_CLASS[part], rng)
        arrays[f"{part}_images"] = np.asarray(images)[rows, 0]
        arrays[f"{part}_labels"] = labels.numpy()[rows].astype(np.uint8)
        arrays[f"{part}_rows"] = rows.astype(np.uint16)
    temporary = target.with_suffix(".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, array, allow_pickle=False)
            # a fixed date: np.savez would write today's
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), data.getvalue(), zipfile.ZIP_DEFLATED
            )
    os.replace(temporary, target)
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m datamodules.sample.make", description="Makes the embedded sample.")
    parser.add_argument("--root", default=DEFAULT_FOLDER, help="folder with the four idx files (default: %(default)s)")
    main(parser.parse_args().root)
