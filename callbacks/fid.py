"""FID of a model's samples at paper scale, by torchmetrics; at laptop scale use FD-small instead."""

import importlib.util
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_modules.networks.vae import load_vae

CHUNK = 50
"""Samples per forward pass of the decoder and of Inception."""


class FID(Callback):
    """Logs `fid/nfe<n>` after the given optimizer steps, averaged weights, fixed start noise, samples of all ranks.

    The metric is torchmetrics' `FrechetInceptionDistance` on the Inception of 2015 that pytorch-fid, clean-fid's
    `legacy_tensorflow` and the ADM evaluator use; resizing and reference still differ between them, so compare only
    numbers of one evaluator, reference and sample count. Works on a module with `evaluation.sample`, `denoiser` and
    `image_shape`, as `lightning_modules.diffusion.module` has; the number of samples is `evaluation.num_samples`.

    Args:
        reference: `.npz` with `mu` and `sigma` (the ADM evaluator's files), or with pictures `arr_0` (n, H, W, 3)
            uint8, or a folder of pictures, all of one size.
        steps: optimizer steps after which it is measured; None for the end of training only.
        every: further, each time that many steps are done; 0 for not at all.
        vae: the AutoencoderKL that decodes latents, see `load_vae`; None for pixels.
        scale: factor of the latents, which decoding undoes.
        weights: file `pt_inception-2015-12-05-6726825d.pth` of torch-fidelity, for machines without internet; None
            downloads it.
        feature: layer of Inception, or a network (uint8 (B, 3, H, W) -> (B, D)) with attribute `num_features`.

    Raises:
        ValueError: torch-fidelity or a file is missing; found before training starts.
    """

    def __init__(
        self,
        reference: str,
        steps: list[int] | None = None,
        every: int = 0,
        vae: str | None = None,
        scale: float = 0.18215,
        weights: str | None = None,
        feature: int | nn.Module = 2048,
    ) -> None:
        if every < 0 or (steps and min(steps) < 1):
            raise ValueError(f"fid.steps must be positive and fid.every not negative, got {steps} and {every}")
        self.reference, self.steps, self.every = reference, set(steps or []), every
        self.vae, self.scale, self.weights, self.feature = vae, scale, weights, feature
        self._decoder: Any = None
        self._metric: Any = None
        self._done = 0
        self.found: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Looks for everything that a measurement needs, so that no day of training is lost to a missing file."""
        if stage != "fit":
            return
        if getattr(pl_module, "evaluation", None) is None or not hasattr(pl_module, "denoiser"):
            raise ValueError(
                f"FID needs a module with `denoiser` and model.evaluation, {type(pl_module).__name__} has none"
            )
        if isinstance(self.feature, int) and importlib.util.find_spec("torch_fidelity") is None:
            raise ValueError("callbacks.fid needs torch-fidelity: pip install 'noisebench[fid]'")
        for name, path in (("weights", self.weights), ("reference", self.reference)):
            if path is not None and not Path(path).exists():
                raise ValueError(f"fid.{name}: there is no {path}")
        if self.vae is not None and self._decoder is None:
            self._decoder = load_vae(self.vae)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures where this step asks for it."""
        step = trainer.global_step
        if step == self._done:
            return
        self._done = step
        if step in self.steps or (self.every and step % self.every == 0):
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs; after the last step measures if it has not been done yet."""
        ended = trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps
        ended = ended or (trainer.max_epochs or -1) == trainer.current_epoch + 1
        if ended and f"fid/step{trainer.global_step}" not in self.found:
            self._measure(trainer, pl_module)
        pl_module.log_dict({name: value for name, value in self.found.items() if "/nfe" in name})

    def state_dict(self) -> dict[str, Any]:
        """Values so far."""
        return {"found": self.found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them back."""
        self.found = dict(state_dict["found"])

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, model: Any) -> None:
        """FID for each number of evaluations."""
        metric = self._reference_metric(model.device)
        evaluation, step = model.evaluation, trainer.global_step
        for nfe in evaluation.nfes:
            metric.reset()
            images = evaluation.sample(
                model.denoiser(), model.image_shape, model.num_classes, nfe, trainer.global_rank, trainer.world_size
            )
            for chunk in images.split(CHUNK):
                metric.update(self._pictures(chunk), real=False)
            value = float(metric.compute())
            self.found |= {f"fid/nfe{nfe}": value, f"fid/nfe{nfe}_step{step}": value, f"fid/step{step}": value}

    def _pictures(self, samples: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) of samples."""
        if self._decoder is not None:
            samples = self._decoder.to(samples.device).decode(samples / self.scale).sample
        samples = samples.expand(-1, 3, -1, -1) if samples.shape[1] == 1 else samples
        return to_uint8(samples)

    def _reference_metric(self, device: torch.device) -> Any:
        """The metric with the real pictures' statistics, which stay through `reset`."""
        if self._metric is None:
            from torchmetrics.image.fid import FrechetInceptionDistance

            options: dict[str, Any] = {"reset_real_features": False}
            if isinstance(self.feature, int):
                options["feature_extractor_weights_path"] = self.weights
            self._metric = FrechetInceptionDistance(feature=self.feature, **options).to(device)
            load_reference(self._metric, Path(self.reference))
        return self._metric


def to_uint8(samples: Tensor) -> Tensor:
    """x * 127.5 + 128 clipped, truncated: (B, C, H, W) float in [-1, 1]. Source: official codes of DiT and torchcfm."""
    return (samples.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def load_reference(metric: Any, path: Path) -> None:
    """Puts the real pictures' statistics into a `FrechetInceptionDistance`, on the first rank only: ranks are summed.

    Raises:
        ValueError: the file holds neither statistics nor pictures.
    """
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    if parallel and torch.distributed.get_rank():
        return
    if path.is_dir():
        from torchvision.io import ImageReadMode, decode_image

        for file in sorted(path.rglob("*.png")) + sorted(path.rglob("*.jp*g")):
            metric.update(decode_image(str(file), ImageReadMode.RGB)[None].to(metric.device), real=True)
        return
    content = np.load(path)
    if {"mu", "sigma"} <= set(content.files):
        # sums of as many features as the covariance's unbiased form forgets about: any number gives it back
        count = 50_000
        mu, sigma = (torch.from_numpy(content[name]).to(metric.device, torch.float64) for name in ("mu", "sigma"))
        metric.real_features_sum = count * mu
        metric.real_features_cov_sum = (count - 1) * sigma + count * mu.outer(mu)
        metric.real_features_num_samples = torch.tensor(count, device=metric.device)
    elif "arr_0" in content.files:
        for chunk in torch.from_numpy(content["arr_0"]).permute(0, 3, 1, 2).split(CHUNK):
            metric.update(chunk.to(metric.device), real=True)
    else:
        raise ValueError(f"fid.reference: {path} must hold mu and sigma, or pictures arr_0; it has {content.files}")
