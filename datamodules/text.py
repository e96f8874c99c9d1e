"""Text as bytes, for language models without a tokenizer. B batch, T places."""

import lzma
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.batches import BatchOrder, FieldDataset, loader

EMBEDDED_TEXT = Path(__file__).parent / "sample" / "python_topics.txt.xz"
EVAL_BATCH = 32


class ByteText(L.LightningDataModule):
    """Windows of a text; the next byte is to be told at each place, or at the last `predict` places.

    A batch is a dict that fits the classifiers of images: `image` (B, T) int64 bytes; `label` (B * predict,) int64, the
    next bytes, one example each; `index` (B,) int64, position of the window. Windows do not overlap; the last two
    `held_out` shares of the text validate and test. Their order is a function of the seed and the epoch.

    Args:
        path: a text file, plain or compressed with xz; None for the embedded one, 400,000 bytes of Python's help.
        batch_size: global batch of windows, split over the processes.
        length: T.
        predict: places whose next byte is a label; None for all.
        held_out: share of the text that validates, and as much again that tests.
    """

    num_classes = 256

    def __init__(
        self,
        path: str | None = None,
        batch_size: int = 16,
        length: int = 64,
        predict: int | None = None,
        held_out: float = 0.1,
    ) -> None:
        super().__init__()
        if predict is not None and not 1 <= predict <= length:
            raise ValueError(f"data.predict must be between 1 and data.length {length}, got {predict}")
        if not 0 < held_out < 0.5:
            raise ValueError(f"data.held_out must be in (0, 0.5), got {held_out}")
        self.path = EMBEDDED_TEXT if path is None else Path(path)
        self.batch_size, self.length, self.predict, self.held_out = batch_size, length, predict or length, held_out

    def setup(self, stage: str | None = None) -> None:
        """Reads the text and cuts it into windows."""
        if not self.path.is_file():
            raise FileNotFoundError(f"data.path: no text file {self.path}")
        content = self.path.read_bytes()
        text = lzma.decompress(content) if self.path.suffix == ".xz" else content
        windows = (len(text) - 1) // self.length
        held_out = int(self.held_out * windows)
        if held_out < 1:
            raise ValueError(f"data.path: {len(text)} bytes are too few for windows of data.length {self.length}")
        codes = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: windows * self.length + 1].long()
        image, label = codes[:-1].view(windows, -1), codes[1:].view(windows, -1)[:, -self.predict :]
        train = windows - 2 * held_out
        cuts = {"train": (0, train), "val": (train, train + held_out), "test": (train + held_out, windows)}
        self._sets = {part: FieldDataset({"image": image[a:b], "label": label[a:b]}) for part, (a, b) in cuts.items()}
        self.num_train = train

    def examples(self, part: Literal["train", "val", "test"]) -> FieldDataset:
        """Windows of a part by position; labels (B, predict)."""
        return self._sets[part]

    def as_evaluated(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of windows with its labels in one row."""
        label: Tensor = batch["label"]
        return {**batch, "label": label.flatten()}

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Labels in one row."""
        return self.as_evaluated(batch)

    def train_dataloader(self) -> DataLoader:
        """Windows in a random order."""
        return self._loader("train", self.batch_size, shuffle=True)

    def val_dataloader(self) -> list[DataLoader]:
        """Validation and test windows."""
        return [self._loader(part, EVAL_BATCH * self._num_replicas(), shuffle=False) for part in ("val", "test")]

    def test_dataloader(self) -> DataLoader:
        """Test windows."""
        return self.val_dataloader()[1]

    def _loader(self, part: str, batch_size: int, shuffle: bool) -> DataLoader:
        data = self._sets[part]
        rank = 0 if self.trainer is None else self.trainer.global_rank
        order = BatchOrder(len(data), batch_size, shuffle=shuffle, rank=rank, num_replicas=self._num_replicas())
        return loader(data, order)

    def _num_replicas(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size
