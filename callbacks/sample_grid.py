"""Pictures of what a generative model makes, at the end of training."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class SampleGrid(Callback):
    """Writes `figures/samples_<n>_evaluations.png` into the run's folder: ten samples to a row, fixed start noise.

    Works on any module with `evaluation.sample` and `denoiser`, as `lightning_modules.diffusion.module` has them; draws
    from generators of its own, so training does not notice.

    Args:
        nfes: evaluations per image, one picture for each.
        count: samples per picture.
    """

    def __init__(self, nfes: list[int], count: int = 50) -> None:
        if not nfes or min(nfes) < 1 or count < 1:
            raise ValueError(f"nfes and count must be positive, got {nfes} and {count}")
        self.nfes, self.count = nfes, count

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Looks whether the module can sample."""
        if getattr(pl_module, "evaluation", None) is None or not hasattr(pl_module, "denoiser"):
            raise ValueError(
                f"SampleGrid needs a module with `denoiser` and model.evaluation, {type(pl_module).__name__} has none"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Samples and writes."""
        if not trainer.is_global_zero:
            return
        from torchvision.utils import save_image

        model: Any = pl_module
        folder = Path(trainer.default_root_dir) / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        for nfe in self.nfes:
            images = model.evaluation.sample(
                model.denoiser(), model.image_shape, model.num_classes, nfe, count=self.count
            )
            shown = (images.float().cpu().clamp(-1, 1) + 1) / 2
            save_image(shown, folder / f"samples_{nfe}_evaluations.png", nrow=10, padding=1)
