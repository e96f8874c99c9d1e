"""Latents (or small pictures) of large data sets: memory-mapped shards, read a batch at a time.

A folder holds `latents.json` and, for each part (`train`, and `val` if there is one), shards of at most some ten
thousand rows in the order of the data set: `train-00000.npy` or `.safetensors` (tensor `rows`), labels beside them as
`train-00000-labels.npy`, and mirrored pictures, encoded apart, as `train-00000-flipped.*`.
"""

import json
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.rng import make_generator
from datamodules.batches import BatchOrder, FieldDataset, loader

Kind = Literal["moments", "samples", "pixels"]
"""Rows: mean and standard deviation of a VAE's posterior (2 C channels), drawn latents, or uint8 pictures."""

COMMAND = "noisebench encode-latents writes it"
EVAL_BATCH = 128


class Shards:
    """Rows of several files as one: `shards[index]` copies the wanted rows only.

    Args:
        files: `.npy` or `.safetensors`, each (n, C, H, W).
    """

    def __init__(self, files: list[Path]) -> None:
        self.arrays = [open_rows(file) for file in files]
        self.ends = torch.tensor([len(array) for array in self.arrays]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, rows: Tensor) -> Tensor:
        """(B, C, H, W) in the stored dtype."""
        which = torch.searchsorted(self.ends, rows, right=True)
        found = torch.empty(len(rows), *self.arrays[0].shape[1:], dtype=self.arrays[0].dtype)
        for number in which.unique().tolist():
            here = which == number
            first = int(self.ends[number - 1]) if number else 0
            found[here] = self.arrays[number][rows[here] - first]
        return found


def open_rows(file: Path) -> Tensor:
    """Rows of one shard, mapped into memory and read where they are used.

    Raises:
        ValueError: it is missing or broken.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, framework="pt") as content:
                return content.get_tensor("rows")
        # copy-on-write: torch wants writable memory, nothing reaches the file
        return torch.from_numpy(np.load(file, mmap_mode="c"))
    except Exception as error:  # safetensors has an exception class of its own for broken files
        raise ValueError(f"data.root: cannot read the shard {file}: {error}; {COMMAND}") from error


def draw_latents(rows: Tensor, kind: Kind, scale: float, generator: torch.Generator | None) -> Tensor:
    """What is diffused, (B, C, H, W) float32.

    Args:
        rows: (B, ...) as stored; for `moments` mean and standard deviation (B, 2 C, H, W), not scaled.
        kind: see `Kind`.
        scale: factor of latents, `scaling_factor` of the VAE (0.18215 for SD-1.x); pictures become x / 127.5 - 1.
        generator: of the draw from the posterior, on the device of the rows; None takes the mean.
    """
    if kind == "pixels":
        return rows.float() / 127.5 - 1
    if kind == "samples":
        return scale * rows.float()
    mean, std = rows.float().chunk(2, dim=1)
    if generator is None:
        return scale * mean
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return scale * (mean + std * noise)


class WholeBatches(BatchOrder):
    """Training order that leaves out the last, smaller batch of each epoch (official codes: `drop_last`)."""

    def __init__(self, num_examples: int, batch_size: int, **place: Any) -> None:
        whole = num_examples // batch_size * batch_size
        if not whole:
            raise ValueError(f"data.batch_size must be at most the {num_examples} rows of data.root, got {batch_size}")
        super().__init__(whole, batch_size, shuffle=True, **place)
        self.available = num_examples

    def _order(self, number: int) -> Tensor:
        generator = make_generator(f"order/{self.epoch}/{number}")
        return torch.randperm(self.available, generator=generator)[: self.num_examples]


class LatentData(L.LightningDataModule):
    """Latents in shards.

    A batch is a dict: `image` (B, C, H, W) float32 on the device, drawn anew from the VAE's posterior each time;
    `label` and `index` (B,) int64. Evaluation takes the posterior's mean of the unmirrored picture.

    Args:
        root: folder with `latents.json`, see above.
        batch_size: global batch, split over the processes; a last, smaller one is left out.
        flip: take the mirrored picture half of the time; needs the `-flipped` shards (pixels are mirrored here).
        num_workers: loader processes.
    """

    def __init__(self, root: str, batch_size: int = 256, flip: bool = True, num_workers: int = 0) -> None:
        super().__init__()
        self.root, self.batch_size, self.flip, self.num_workers = root, batch_size, flip, num_workers
        self.augment_generator = torch.Generator()
        self._parts: dict[str, FieldDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        """Opens the shards."""
        if self._parts:
            return
        facts = read_facts(Path(self.root))
        self.kind: Kind = facts["kind"]
        self.scale, self.num_classes = float(facts["scale"]), int(facts["num_classes"])
        self._parts = {part: self._open(part) for part in ("train", "val") if part == "train" or self._files(part)}
        self.num_train = len(self._parts["train"])

    def train_dataloader(self) -> DataLoader:
        """Training batches; the order is a function of (seed, epoch)."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        rank, replicas = self._place()
        self.augment_generator = make_generator("augment", rank=rank, device=device)
        order = WholeBatches(self.num_train, self.batch_size, rank=rank, num_replicas=replicas)
        return self._loader("train", order)

    def val_dataloader(self) -> list[DataLoader]:
        """The part `val`, if there is one."""
        return [self._eval_loader("val")] if "val" in self._parts else []

    def test_dataloader(self) -> DataLoader:
        """The part `val`, or the training rows."""
        return self._eval_loader("val" if "val" in self._parts else "train")

    def predict_dataloader(self) -> DataLoader:
        """As `test_dataloader`: prediction takes the shape of its latents."""
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Draws from the posterior; while training also which of the two pictures."""
        batch = dict(batch)
        flipped = batch.pop("flipped", None)
        training = self.trainer is not None and self.trainer.training
        rows, generator = batch["image"], self.augment_generator if training else None
        if training and self.flip:
            other = rows.flip(-1) if flipped is None else flipped
            chosen = torch.rand(len(rows), generator=generator, device=rows.device) < 0.5
            rows = torch.where(chosen.view(-1, 1, 1, 1), other, rows)
        return {**batch, "image": draw_latents(rows, self.kind, self.scale, generator)}

    def _open(self, part: str) -> FieldDataset:
        files = self._files(part)
        if not files:
            raise ValueError(f"data.root: {self.root} has no {part}-00000.npy or .safetensors; {COMMAND}")
        labels = [torch.from_numpy(np.load(_beside(file, "labels", ".npy"))).long() for file in files]
        fields: dict[str, Any] = {"image": Shards(files), "label": torch.cat(labels)}
        if part == "train" and self.flip and self.kind != "pixels":
            mirrored = [_beside(file, "flipped") for file in files]
            if missing := [file for file in mirrored if not file.exists()]:
                raise ValueError(f"data.flip needs mirrored latents, {missing[0]} is missing; {COMMAND} with --flip")
            fields["flipped"] = Shards(mirrored)
        return FieldDataset(fields)

    def _files(self, part: str) -> list[Path]:
        found = [file for suffix in (".npy", ".safetensors") for file in Path(self.root).glob(f"{part}-?????{suffix}")]
        return sorted(found)

    def _eval_loader(self, part: str) -> DataLoader:
        rank, replicas = self._place()
        dataset = FieldDataset({name: rows for name, rows in self._parts[part].fields.items() if name != "flipped"})
        order = BatchOrder(len(dataset), EVAL_BATCH * replicas, shuffle=False, rank=rank, num_replicas=replicas)
        return loader(dataset, order, self.num_workers, pin_memory=torch.cuda.is_available())

    def _loader(self, part: str, order: BatchOrder) -> DataLoader:
        return loader(self._parts[part], order, self.num_workers, pin_memory=torch.cuda.is_available())

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)


def read_facts(root: Path) -> dict[str, Any]:
    """`latents.json`: kind, scale, num_classes, and what the latents were made with.

    Raises:
        ValueError: it is missing, or says something unknown.
    """
    file = root / "latents.json"
    try:
        facts = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"data.root: cannot read {file}: {error}; {COMMAND}") from error
    if facts.get("kind") not in get_args(Kind) or not {"scale", "num_classes"} <= set(facts):
        raise ValueError(f"{file} must name kind ({', '.join(get_args(Kind))}), scale and num_classes, got {facts}")
    return facts


def _beside(file: Path, what: str, suffix: str | None = None) -> Path:
    return file.with_name(f"{file.stem}-{what}{suffix or file.suffix}")
