"""FID, inception score, precision and recall of samples at paper scale; at laptop scale use FD-small instead."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_modules.diffusion.manifold import inception_score, precision_recall
from lightning_modules.diffusion.ranks import gather_rows
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
        others: further log `precision/nfe<n>`, `recall/nfe<n>` and, with Inception, `is/nfe<n>`, as the ADM evaluator
            does; the reference must hold pictures then, whose features every rank computes for itself.
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
        others: bool = False,
        vae: str | None = None,
        scale: float = 0.18215,
        weights: str | None = None,
        feature: int | nn.Module = 2048,
    ) -> None:
        if every < 0 or (steps and min(steps) < 1):
            raise ValueError(f"fid.steps must be positive and fid.every not negative, got {steps} and {every}")
        self.reference, self.steps, self.every, self.others = reference, set(steps or []), every, others
        self.vae, self.scale, self.weights, self.feature = vae, scale, weights, feature
        self._decoder: Any = None
        self._metric: Any = None
        self._net: _Outputs | None = None
        self._real: Tensor | None = None
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
        if self.others and not has_pictures(Path(self.reference)):
            raise ValueError(f"fid.others needs pictures in fid.reference, {self.reference} has none")
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
            made = []
            for chunk in images.split(CHUNK):
                metric.update(self._pictures(chunk), real=False)
                made.append(self._net.last if self._net is not None else ())
            value = float(metric.compute())
            self.found |= {f"fid/nfe{nfe}": value, f"fid/nfe{nfe}_step{step}": value, f"fid/step{step}": value}
            if self.others:
                features, *logits = (gather_rows(torch.cat(parts)) for parts in zip(*made, strict=True))
                found = self._others(features, logits)
                self.found |= {f"{k}/nfe{nfe}": v for k, v in found.items()}
                self.found |= {f"{k}/nfe{nfe}_step{step}": v for k, v in found.items()}

    def _others(self, features: Tensor, logits: list[Tensor]) -> dict[str, float]:
        """Precision, recall and, from logits, the inception score of samples."""
        if self._real is None:
            assert self._net is not None  # for the type checker: _reference_metric made it
            chunks = [chunk.to(features.device) for chunk in reference_pictures(Path(self.reference))]
            self._real = torch.cat([self._net(chunk) for chunk in chunks]).to(features)
        precision, recall = precision_recall(self._real, features)
        found = {"precision": precision, "recall": recall}
        return found | ({"is": inception_score(logits[0])} if logits else {})

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

            self._net = _Outputs(self.feature, self.weights)
            self._metric = FrechetInceptionDistance(feature=self._net, reset_real_features=False).to(device)
            load_reference(self._metric, Path(self.reference))
        return self._metric


class _Outputs(nn.Module):
    """Features of pictures for torchmetrics, which keeps what the net gave last: features, and Inception's logits."""

    def __init__(self, feature: int | nn.Module, weights: str | None) -> None:
        super().__init__()
        self.net: nn.Module
        self.inception = isinstance(feature, int)
        if isinstance(feature, int):
            from torchmetrics.image.fid import NoTrainInceptionV3

            self.net = NoTrainInceptionV3("inception-v3-compat", [str(feature), "logits_unbiased"], weights)
        else:
            self.net = feature
        self.num_features: Any = feature if isinstance(feature, int) else feature.num_features
        self.last: tuple[Tensor, ...] = ()

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, D) features of uint8 pictures (B, 3, H, W)."""
        if self.inception:
            features, logits = self.net._torch_fidelity_forward(pictures)  # type: ignore[operator]
            self.last = features.flatten(1), logits
        else:
            self.last = (self.net(pictures),)
        return self.last[0]


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
    content = None if path.is_dir() else np.load(path)
    if content is not None and {"mu", "sigma"} <= set(content.files):
        # sums of as many features as the covariance's unbiased form forgets about: any number gives it back
        count = 50_000
        mu, sigma = (torch.from_numpy(content[name]).to(metric.device, torch.float64) for name in ("mu", "sigma"))
        metric.real_features_sum = count * mu
        metric.real_features_cov_sum = (count - 1) * sigma + count * mu.outer(mu)
        metric.real_features_num_samples = torch.tensor(count, device=metric.device)
        return
    for chunk in reference_pictures(path):
        metric.update(chunk.to(metric.device), real=True)


def has_pictures(path: Path) -> bool:
    """Whether a reference holds pictures, and not their statistics alone."""
    return path.is_dir() or "arr_0" in np.load(path).files


def reference_pictures(path: Path) -> Iterator[Tensor]:
    """Pictures of a reference, uint8 (B, 3, H, W) each.

    Raises:
        ValueError: the file holds no pictures.
    """
    if path.is_dir():
        from torchvision.io import ImageReadMode, decode_image

        for file in sorted(path.rglob("*.png")) + sorted(path.rglob("*.jp*g")):
            yield decode_image(str(file), ImageReadMode.RGB)[None]
        return
    content = np.load(path)
    if "arr_0" not in content.files:
        raise ValueError(f"fid.reference: {path} must hold mu and sigma, or pictures arr_0; it has {content.files}")
    yield from torch.from_numpy(content["arr_0"]).permute(0, 3, 1, 2).split(CHUNK)
