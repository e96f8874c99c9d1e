"""What was trained of a language model, in the form that peft and transformers load."""

import shutil
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback


class SaveAdapter(Callback):
    """Writes `adapter/` into the run's folder when training has finished.

    Works on modules whose `lm` has `save(folder)`, as `PretrainedLM`. Nothing is sent anywhere.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Looks whether the module can be written."""
        if not hasattr(getattr(pl_module, "lm", None), "save"):
            raise ValueError(f"SaveAdapter needs a module with lm.save(folder), {type(pl_module).__name__} has none")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes beside an older one, then changes their places; all ranks take part, the first one writes."""
        folder = Path(trainer.default_root_dir) / "adapter"
        partial = folder.with_name(".adapter.partial")
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        pl_module.lm.save(partial, write=trainer.is_global_zero)  # type: ignore[union-attr, operator]
        if trainer.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
