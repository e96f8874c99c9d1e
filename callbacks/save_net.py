"""The trained net alone, as a small file from which other runs may start."""

import io
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.files import write_atomic


class SaveNet(Callback):
    """Writes `<name>.pt` into the run's folder when training has finished: weights in half precision, and its hash.

    Args:
        attribute: of the module, the net whose state is written.
        name: of the file.
    """

    def __init__(self, attribute: str = "lm", name: str = "net") -> None:
        self.attribute, self.name = attribute, name

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes; float16 rounds weights by 2^-11 of their size at most."""
        if not trainer.is_global_zero:
            return
        state = getattr(pl_module, self.attribute).state_dict()
        buffer = io.BytesIO()
        torch.save({name: value.cpu().half() for name, value in state.items()}, buffer)
        path = Path(trainer.default_root_dir) / f"{self.name}.pt"
        write_atomic(path, buffer.getvalue())
