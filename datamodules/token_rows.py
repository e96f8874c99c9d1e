"""Rows of tokens: kept on disk once made, packed, put into batches of similar length.

A row is a dict of tensors (T,): `input_ids`, `labels` int64 and `key` bool; a packed one has `documents` too, from 1 on
the number of the document that each token belongs to.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from callbacks.files import write_atomic
from callbacks.rng import make_generator
from datamodules.batches import BatchOrder

IGNORED = -100
WINDOW = 50
"""Batches among whose rows those of similar length are put together."""
Row = dict[str, Tensor]


def kept_rows(description: Any, make: Callable[[], list[Row]]) -> list[Row]:
    """Rows from the user's cache, or made and put there; one process makes them, the others wait.

    Args:
        description: everything that the rows are a function of, as JSON takes it.
        make: makes them.

    Returns:
        Rows as views of a memory-mapped file: processes of a machine share its pages.
    """
    from filelock import FileLock

    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "noisebench"
    path = root / f"tokens-{digest}.pt"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            rows = make()
            joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            buffer = io.BytesIO()
            torch.save({"lengths": lengths, **joined}, buffer)
            write_atomic(path, buffer.getvalue())
    stored = torch.load(path, mmap=True, weights_only=True)
    lengths = stored.pop("lengths").tolist()
    parts = [values.split(lengths) for values in stored.values()]
    return [dict(zip(stored, row, strict=True)) for row in zip(*parts, strict=True)]


def pack(rows: list[Row], length: int) -> list[Row]:
    """Rows joined in their order, as many as fit into `length` tokens; no document predicts the next one's first token.

    Raises:
        ValueError: a row is longer than `length`.
    """
    groups: list[list[Row]] = []
    free = 0
    for number, row in enumerate(rows, start=1):
        size = len(row["input_ids"])
        if size > length:
            raise ValueError(f"data: row {number} has {size} tokens, packed rows have {length}")
        if size > free:
            groups.append([])
            free = length
        groups[-1].append(row)
        free -= size
    return [_joined(group) for group in groups]


def _joined(rows: list[Row]) -> Row:
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    joined["labels"][lengths.cumsum(0) - lengths] = IGNORED
    return {**joined, "documents": torch.arange(1, len(rows) + 1).repeat_interleave(lengths)}


class TokenRows(Dataset):
    """Rows of different lengths; `rows[index_tensor]` is a batch padded on the right to its longest row.

    Its `attention_mask` (B, T) int64 is 0 at padding, else the number of the token's document within the row: 1 where
    nothing is packed.
    """

    def __init__(self, rows: list[Row], pad_id: int) -> None:
        self.rows = rows
        self.fill = {"input_ids": pad_id, "labels": IGNORED, "key": False}
        self.lengths = torch.tensor([len(row["input_ids"]) for row in rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> dict[str, Tensor]:
        rows = [self.rows[k] for k in index.tolist()]
        batch = {name: _padded([row[name] for row in rows], fill) for name, fill in self.fill.items()}
        mask = _padded([row.get("documents", torch.ones_like(row["input_ids"])) for row in rows], 0)
        return {**batch, "attention_mask": mask, "index": index}


def _padded(rows: list[Tensor], fill: int | bool) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


class BucketOrder(BatchOrder):
    """Training batches of rows of similar length; the order is still a function of (seed, epoch) alone.

    The rows of 50 batches, drawn as by `BatchOrder`, are sorted by length before they are cut into batches, which then
    come in random order.

    Args:
        lengths: (n,) int64, tokens of each row.
        batch_size, rank, num_replicas: as in `BatchOrder`.
    """

    def __init__(self, lengths: Tensor, batch_size: int, rank: int = 0, num_replicas: int = 1) -> None:
        super().__init__(len(lengths), batch_size, True, 1, rank, num_replicas)
        self.lengths = lengths

    def _global_batches(self) -> Iterator[Tensor]:
        batches: list[Tensor] = []
        for window in self._order(0).split(WINDOW * self.batch_size):
            batches += window[self.lengths[window].argsort(stable=True)].split(self.batch_size)
        generator = make_generator(f"order/{self.epoch}/buckets")
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[number]
