"""Checkpoints of a run: the one to resume from, and what it says of the run that wrote it."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy

from lightning_modules.sharding import replace
from scripts.errors import UserError
from scripts.options import flat, is_location


def last_checkpoint(folder: Path) -> ModelCheckpoint:
    """Saves `last.ckpt` at the end of every epoch; ModelCheckpoint's `save_last` does so only with a new best one."""
    return ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)


def differences(stored: dict[str, Any], given: dict[str, Any], parts: tuple[str, ...]) -> list[str]:
    """`key: stored -> given` for each setting of these parts that differs; locations of data do not count."""
    old, new = (flat({part: config.get(part) for part in parts}) for config in (stored, given))
    keys = sorted(old.keys() | new.keys())
    lines = [(key, old.get(key), new.get(key)) for key in keys if not is_location(key)]
    return [f"{key.replace('.init_args', '')}: {was!r} -> {now!r}" for key, was, now in lines if was != now]


def read_checkpoint_facts(path: Path) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it; empty for one that noisebench did not write.

    Raises:
        UserError: not a checkpoint.
    """
    try:
        # a sharded checkpoint is a folder; this file holds what is not a shard of a tensor
        file = path / "meta.pt" if path.is_dir() else path
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True).get("noisebench", {})
    except Exception as error:
        raise UserError(f"--ckpt_path: {path} is not a readable checkpoint: {error}".splitlines()[0]) from error


class FileInPlaceOfFolder(TorchCheckpointIO):
    """As Lightning's, and a file may replace the folder of a sharded checkpoint (a run that goes on on one device)."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes the file beside the folder, then changes their places."""
        if not Path(path).is_dir():
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        partial = Path(path).with_name(f".{Path(path).name}.partial")
        super().save_checkpoint(checkpoint, partial, storage_options)
        replace(partial, Path(path))


def refuse_folder(path: str | Path | None, strategy: Strategy) -> None:
    """A sharded checkpoint loads under a sharding strategy only.

    Raises:
        UserError: `path` is a folder and the strategy needs a file.
    """
    if path is None or not Path(path).is_dir() or isinstance(strategy, ModelParallelStrategy | FSDPStrategy):
        return
    raise UserError(
        f"--ckpt_path {path} is a sharded checkpoint; give --trainer.strategy fsdp2, or make one file of it: "
        f"noisebench consolidate {path}"
    )
