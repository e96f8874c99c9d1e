"""Whole-batch fetching: data stay tensors, a batch is one gather, its order a function of (seed, epoch)."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from callbacks.rng import make_generator


class Rows(Protocol):
    """Anything that gives many rows at once: a tensor, or pictures that are decoded on demand."""

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows at these positions."""
        ...

    def __len__(self) -> int:
        """Number of rows."""
        ...


class FieldDataset(Dataset):
    """Named fields of equal length; `dataset[index_tensor]` is a batch dict with `index` added.

    Args:
        fields: name -> rows. Fields given as `rows_of` are looked up through it.
        rows_of: (n,) int64; position of example i in the fields named in `indirect`. A subset so shares its pictures
            with the full set instead of copying them.
        indirect: names of the fields that are indexed through `rows_of`.
        extra: constants that each batch carries along.
    """

    def __init__(
        self,
        fields: Mapping[str, Rows],
        rows_of: Tensor | None = None,
        indirect: tuple[str, ...] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.fields: dict[str, Any] = dict(fields)
        self.rows_of = rows_of
        self.indirect = indirect
        self.extra = dict(extra or {})
        lengths = {
            name: len(rows_of) if name in indirect and rows_of is not None else len(rows)
            for name, rows in self.fields.items()
        }
        if len(set(lengths.values())) != 1:
            raise ValueError(f"fields must have the same number of rows, got {lengths}")
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Tensor) -> dict[str, Any]:
        through = index if self.rows_of is None else self.rows_of[index]
        batch: dict[str, Any] = {
            name: _take(rows, through if name in self.indirect else index) for name, rows in self.fields.items()
        }
        return {**batch, "index": index, **self.extra}


def _take(rows: Rows, index: Tensor) -> Tensor:
    # copies whole rows: a fifth of the time of rows[index] for uint8 pictures
    return rows.index_select(0, index) if isinstance(rows, Tensor) else rows[index]


class Passes(Dataset):
    """Several data sets of n examples each, walked through one after the other in an epoch; adds `pass` to a batch."""

    def __init__(self, passes: list[FieldDataset]) -> None:
        self.passes = passes
        self.length = len(passes[0])
        if any(len(p) != self.length for p in passes):
            raise ValueError(f"passes must have the same length, got {[len(p) for p in passes]}")

    def __len__(self) -> int:
        return self.length * len(self.passes)

    def __getitem__(self, index: Tensor) -> dict[str, Any]:
        which = int(index[0]) // self.length
        return {**self.passes[which][index - which * self.length], "pass": which}


class BatchOrder(Sampler[Tensor]):
    """Index tensors of this rank's part of each global batch.

    The order of an epoch is a function of (seed, epoch) alone, so a resumed run continues in the order of an
    undisturbed one, and each global batch holds the same examples whatever the number of ranks. Nothing is padded or
    repeated: a last, smaller batch is kept (for evaluation split as evenly as it goes).

    Args:
        num_examples: examples per pass.
        batch_size: global batch size, a multiple of `num_replicas`.
        shuffle: False keeps the stored order (evaluation).
        num_passes: passes over the examples per epoch, each in its own order; pass p counts from `p * num_examples`.
        rank, num_replicas: position among the data-parallel processes.
        classes: (n,) int64 labels; with `num_batches` an epoch is a class-balanced subset, drawn anew each time, of at
            most `num_batches * batch_size / C` examples of each of the C classes.
        num_batches: batches per pass of a class-balanced epoch.

    Raises:
        ValueError: the batch, or the last smaller one of a training pass, does not divide by the number of replicas:
            the mean of the replicas' means would not be that of the batch.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        shuffle: bool,
        num_passes: int = 1,
        rank: int = 0,
        num_replicas: int = 1,
        classes: Tensor | None = None,
        num_batches: int | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % num_replicas:
            raise ValueError(
                f"data.batch_size is global and must be a positive multiple of the {num_replicas} processes, "
                f"got {batch_size}"
            )
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.num_passes = num_passes
        self.rank = rank
        self.num_replicas = num_replicas
        self.classes = classes
        self.per_class: int | None = None
        self._drawn = num_examples
        if classes is not None and num_batches is not None:
            counts = classes.bincount()
            self.per_class = num_batches * batch_size // len(counts)
            self._drawn = int(counts.clamp(max=self.per_class).sum())
        rest = self._drawn % batch_size
        if shuffle and rest % num_replicas:
            raise ValueError(
                f"data.batch_size {batch_size} leaves {rest} of {self._drawn} training examples for the last batch, "
                f"which do not divide by the {num_replicas} processes; choose another"
            )
        self.epoch = 0
        self.start = 0
        """Batches that the next iteration leaves out."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's order; the Trainer calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_passes * -(-self._drawn // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        start, self.start = self.start, 0
        for batch in islice(self._global_batches(), start, None):
            mine = batch.tensor_split(self.num_replicas)[self.rank] if self.num_replicas > 1 else batch
            if len(mine):
                yield mine

    def _global_batches(self) -> Iterator[Tensor]:
        for number in range(self.num_passes):
            yield from (self._order(number) + number * self.num_examples).split(self.batch_size)

    def _order(self, number: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.num_examples)
        generator = make_generator(f"order/{self.epoch}/{number}")
        order = torch.randperm(self.num_examples, generator=generator)
        if self.classes is None or self.per_class is None:
            return order
        by_class = order[self.classes[order].argsort(stable=True)]
        counts = self.classes.bincount()
        first = (counts.cumsum(0) - counts)[self.classes[by_class]]
        drawn = by_class[torch.arange(self.num_examples) - first < self.per_class]
        return drawn[torch.randperm(len(drawn), generator=generator)]


class ResumableLoader(DataLoader):
    """DataLoader over a `BatchOrder` that continues within an epoch; the Trainer keeps its state in the checkpoint.

    The position counts batches handed to the Trainer, not those that workers have prepared. It holds for the epoch in
    which it was saved; another epoch starts at its beginning.
    """

    _position = (0, 0)
    _resume_at = (-1, 0)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # a generator: workers start with the first batch, when the Trainer has set the epoch, and not before
        order: Any = self.sampler
        (epoch, done), self._resume_at = self._resume_at, (-1, 0)
        order.start = done if epoch == order.epoch else 0
        self._position = (order.epoch, order.start)
        for batch in super().__iter__():
            self._position = (self._position[0], self._position[1] + 1)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were handed out."""
        return {"epoch": self._position[0], "batches": self._position[1]}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """The next iteration continues there if it is of the same epoch."""
        self._resume_at = (state_dict["epoch"], state_dict["batches"])


def loader(dataset: Dataset, order: BatchOrder, num_workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """DataLoader that fetches one batch per index tensor; its own generator keeps the global random state untouched.

    Training loaders (those that shuffle) continue within an epoch.
    """
    kind = ResumableLoader if order.shuffle else DataLoader
    return kind(
        dataset,
        sampler=order,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        generator=make_generator("loader"),
    )
