"""Small folders of latents for tests."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.latents import LatentData


def write_latents(folder: Path, rows: list[np.ndarray], flipped: list[np.ndarray] | None = None, **facts: Any) -> Path:
    """Shards as `noisebench encode-latents` writes them; labels go round the classes."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"kind": "moments", "scale": 0.18215, "num_classes": 3} | facts
    (folder / "latents.json").write_text(json.dumps(facts))
    first = 0
    for number, shard in enumerate(rows):
        np.save(folder / f"train-{number:05d}.npy", shard)
        labels = (first + np.arange(len(shard))) % max(facts["num_classes"], 1)
        np.save(folder / f"train-{number:05d}-labels.npy", labels)
        if flipped is not None:
            np.save(folder / f"train-{number:05d}-flipped.npy", flipped[number])
        first += len(shard)
    return folder


class SyntheticLatents(LatentData):
    """Random rows of a given shape in the place of a recipe's.

    Args:
        root, batch_size, flip, num_workers: as in `LatentData`; `root` is not looked at.
        kind, channels, size, num_classes: of the rows.
    """

    def __init__(
        self,
        root: str = "",
        batch_size: int = 4,
        flip: bool = True,
        num_workers: int = 0,
        kind: str = "moments",
        channels: int = 4,
        size: int = 32,
        num_classes: int = 1000,
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        super().__init__(self.folder.name, batch_size, flip, num_workers)
        rng = np.random.default_rng(0)
        shape = (16, channels * (2 if kind == "moments" else 1), size, size)
        rows = rng.random(shape).astype(np.float16) if kind != "pixels" else rng.integers(0, 255, shape, np.uint8)
        write_latents(Path(self.folder.name), [rows], [rows], kind=kind, num_classes=num_classes)
