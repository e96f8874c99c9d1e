"""Checkpoints of a run: the one to resume from, and what it says of the run that wrote it."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy

from callbacks.requeue import CHECKPOINT
from lightning_modules.sharding import replace
from scripts.consolidate import check_complete
from scripts.errors import UserError
from scripts.options import flat, is_location


class LastCheckpoint(ModelCheckpoint):
    """Saves `last.ckpt` at the end of every epoch; ModelCheckpoint's `save_last` does so only with a new best one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lets a resume begin with the next epoch also where training counts steps (`max_steps`).

        There Lightning takes a complete epoch for an unfinished one and runs its end a second time.
        """
        super().on_train_start(trainer, pl_module)
        fit, steps = trainer.fit_loop, trainer.fit_loop.epoch_loop
        if fit.restarted_on_epoch_end and steps.batch_progress.is_last_batch:
            fit.epoch_progress.increment_completed()
            fit.reset_restart_stage()
            for loop in (fit, steps, steps.val_loop):
                loop._restarting = False


def newest_checkpoint(folder: Path, fallback: bool = False) -> Path | None:
    """The checkpoint that continues a run.

    Args:
        folder: the run's own checkpoints; no other run's are looked at.
        fallback: passes over what cannot be read, to the newest one of any name that can.

    Returns:
        The one of `last.ckpt` and `requeue.ckpt` after more steps (clocks may jump); None if there is neither.

    Raises:
        UserError: it cannot be read, and `fallback` is False or there is nothing to fall back to.
    """
    # a sharded checkpoint changes places by two renames; a job killed between them leaves the older one's name
    last = next((path for name in ("last.ckpt", ".last.ckpt.old") if (path := folder / name).exists()), None)
    found = [path for path in (last, folder / CHECKPOINT) if path is not None and path.exists()]
    problem = "; ".join(text for path in found if (text := _unreadable(path)))
    if not problem:
        return max(found, key=_steps, default=None)
    good = max((path for path in folder.glob("*.ckpt") if _unreadable(path) is None), key=_steps, default=None)
    if good is None:
        raise UserError(f"{problem}; there is no other to fall back to, --overwrite true starts anew")
    if not fallback:
        raise UserError(f"{problem}; --fallback true continues from {good.name}, the newest good one")
    print(f"warning: {problem}; continuing from {good}", file=sys.stderr)
    return good


def own_checkpoint(folder: Path, code_hash: str, fallback: bool = False) -> str | None:
    """The newest checkpoint as in `newest_checkpoint`, if code of this hash wrote it."""
    newest = newest_checkpoint(folder, fallback)
    if newest is None or read_checkpoint_facts(newest).get("code_hash") != code_hash:
        return None
    return str(newest)


def set_aside(folder: Path) -> None:
    """Keeps what other code left in the run's folder, under another name, and says so."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    folder.rename(target)
    print(f"{folder} cannot be continued by this code; kept as {target.name}, starting anew", file=sys.stderr)


def _steps(path: Path) -> int:
    """Optimizer steps before a checkpoint was written."""
    return _read(path).get("global_step", -1)


def _unreadable(path: Path) -> str | None:
    """Why a checkpoint cannot be read, or None."""
    try:
        _read(path)
        if path.is_dir():
            check_complete(path)
    except UserError as error:
        return str(error)
    return None


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
    return _read(path).get("noisebench", {})


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint, or that part of a sharded one (a folder) which is not a shard of a tensor."""
    try:
        file = path / "meta.pt" if path.is_dir() else path
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(f"{path} is not a readable checkpoint: {error}".splitlines()[0]) from error


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
