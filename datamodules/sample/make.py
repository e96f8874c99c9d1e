"""Makes the embedded sample from the files of Fashion-MNIST: `python -m datamodules.sample.make [FOLDER]`.

FOLDER holds the four idx files; Debian's package dataset-fashion-mnist puts them where the default looks. The result is
the same, byte for byte, wherever NumPy's and zlib's formats are.
"""

import io
import os
import sys
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


def main(folder: str = DEFAULT_FOLDER) -> None:
    """Writes the sample next to this file."""
    sets, rng = FashionMNIST(folder).read(), RandomState(SEED)
    arrays = {}
    for part, images, labels in (
        ("train", sets.train_images, sets.train_labels),
        ("test", sets.test_images, sets.test_labels),
    ):
        rows = balanced_rows(labels.numpy(), PER_CLASS[part], rng)
        arrays[f"{part}_images"] = np.asarray(images)[rows, 0]
        arrays[f"{part}_labels"] = labels.numpy()[rows].astype(np.uint8)
        arrays[f"{part}_rows"] = rows.astype(np.uint16)
    temporary = EMBEDDED.with_suffix(".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, array, allow_pickle=False)
            # a fixed date: np.savez would write today's
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), data.getvalue(), zipfile.ZIP_DEFLATED
            )
    os.replace(temporary, EMBEDDED)
    print(f"{EMBEDDED}: {Path(EMBEDDED).stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:2])
