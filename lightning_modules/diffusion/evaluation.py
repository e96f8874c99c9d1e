"""Samples and their Frechet distance during training."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from callbacks.rng import make_generator
from lightning_modules.diffusion.frechet import CHUNK, Moments, Reference, frechet_distance, moments, reference, share
from lightning_modules.diffusion.grids import Grid
from lightning_modules.diffusion.guidance import ClassifierFree
from lightning_modules.diffusion.parameterization import Denoiser
from lightning_modules.diffusion.probe import SEED
from lightning_modules.diffusion.samplers import Sampler


class PadAndPool(nn.Module):
    """Makes pictures smaller: pads with black (-1), then averages squares of pixels.

    Args:
        padding: pixels on each side.
        pool: edge of the squares.
    """

    def __init__(self, padding: int = 0, pool: int = 1) -> None:
        super().__init__()
        self.padding, self.pool = padding, pool

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float in [-1, 1] -> smaller ones."""
        padded = nn.functional.pad(images, (self.padding,) * 4, value=-1.0)
        return nn.functional.avg_pool2d(padded, self.pool).contiguous()


class SampleEvaluation:
    """How a model samples, and when FD-small is taken.

    Args:
        sampler, grid: see `samplers` and `grids`; grid None is even in the process's clock.
        nfes: evaluations per image (without guidance) for each of which FD is logged.
        steps: optimizer steps after which it is.
        num_samples: images per FD, over all ranks.
        guidance: scale w of classifier-free guidance; 1 is none, more doubles the evaluations.
        cache: folder of the feature nets.
    """

    def __init__(
        self,
        sampler: Sampler,
        grid: Grid | None = None,
        nfes: list[int] | None = None,
        steps: list[int] | None = None,
        num_samples: int = 2000,
        guidance: float = 1.0,
        cache: str = "~/.cache/noisebench",
    ) -> None:
        self.sampler, self.grid = sampler, grid or Grid()
        self.nfes, self.steps = list(nfes or [20]), list(steps or [])
        if min(self.nfes) < 1 or num_samples < 2:
            raise ValueError(f"evaluation.nfes and num_samples must be positive, got {self.nfes} and {num_samples}")
        self.num_samples, self.guidance = num_samples, guidance
        self.cache = Path(cache).expanduser()
        self._reference: Reference | None = None

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        shape: tuple[int, ...],
        num_classes: int,
        nfe: int,
        rank: int = 0,
        world_size: int = 1,
        count: int | None = None,
    ) -> Tensor:
        """Samples of this rank from fixed start noise and labels, (n, *shape) unclamped, where the network is.

        Args:
            denoiser: of the averaged weights; gets the labels here.
            shape: of an image.
            num_classes: 0 for an unconditional model; else labels go round.
            nfe: evaluations per image without guidance.
            rank, world_size: this process takes every world_size-th image.
            count: images over all ranks; None for `num_samples`.
        """
        count = count or self.num_samples
        device = next(denoiser.net.parameters()).device
        # drawn whole, so that images do not depend on the number of ranks
        z = torch.randn(count, *shape, generator=make_generator("samples", seed=SEED))[rank::world_size].to(device)
        labels = self._labels(num_classes, device, count)[rank::world_size]
        generator = make_generator("sampler", seed=SEED, rank=rank, device=device)
        grid = self.grid(denoiser.process, self.sampler.steps_for(nfe))
        images = []
        for chunk, label in zip(z.split(CHUNK), labels.split(CHUNK), strict=True):
            guided = _labelled(denoiser, label if num_classes else None, num_classes, self.guidance)
            images.append(self.sampler(guided, chunk * denoiser.process.noise_scale, grid, generator)[0])
        return torch.cat(images)

    def _labels(self, num_classes: int, device: torch.device, count: int | None = None) -> Tensor:
        """Classes of all samples, going round."""
        return torch.arange(count or self.num_samples, device=device) % max(num_classes, 1)

    @torch.no_grad()
    def distances(
        self, denoiser: Denoiser, shape: tuple[int, ...], num_classes: int, rank: int = 0, world_size: int = 1
    ) -> dict[str, Tensor]:
        """`fd/nfe<n>` for each number of evaluations, 0-d float64; arguments as in `sample`.

        With classes also `samples/accuracy_nfe<n>`, the share of samples in which the feature net sees their class.
        """
        if self._reference is None:
            raise RuntimeError("SampleEvaluation.prepare has not been called")
        net = self._reference.net.to(next(denoiser.net.parameters()).device)
        found = {}
        for nfe in self.nfes:
            images = self.sample(denoiser, shape, num_classes, nfe, rank, world_size)
            features = net.all_features(images.float())
            if num_classes:
                labels = self._labels(num_classes, features.device)[rank::world_size]
                found[f"samples/accuracy_nfe{nfe}"] = share(net.head(features).argmax(1) == labels)
            made = moments(features, reduce=True)
            # on the CPU: eigenvalues of 64 x 64 in float64
            made = Moments(made.mean.cpu(), made.cov.cpu())
            found[f"fd/nfe{nfe}"] = frechet_distance(self._reference.moments, made)
        return found

    def check(self, data: Any) -> Any:
        """The pictures of a data module.

        Raises:
            ValueError: they are not held in memory.
        """
        sets = data.source.load() if hasattr(data, "source") else None
        if sets is None or not isinstance(sets.train_images, Tensor):
            raise ValueError(
                "model.evaluation measures FD-small against pictures held in memory, which "
                f"{type(data).__name__} does not have; datamodules.images.ImageData with a small source does"
            )
        return sets

    def prepare(self, data: Any, encoder: nn.Module) -> str:
        """Trains or loads the feature net and the statistics of the real images; returns the hash of the net."""
        if self._reference is None:
            sets = self.check(data)
            train = (to_model_range(sets.train_images, encoder), sets.train_labels)
            test = to_model_range(sets.test_images, encoder)
            self._reference = reference(train, test, sets.num_classes, self.cache)
        return self._reference.digest


@torch.no_grad()
def to_model_range(images: Tensor, encoder: nn.Module) -> Tensor:
    """uint8 images (n, C, H, W) -> x / 127.5 - 1, encoded, by chunks."""
    return torch.cat([encoder(chunk.float() / 127.5 - 1) for chunk in images.split(CHUNK)])


def _labelled(denoiser: Denoiser, label: Tensor | None, num_classes: int, guidance: float) -> Denoiser:
    """The denoiser with labels, guided unless the scale is 1."""
    if label is not None and guidance != 1:
        return ClassifierFree(denoiser, label, num_classes, guidance)
    return Denoiser(denoiser.net, denoiser.process, denoiser.kind, denoiser.preconditioner, label, denoiser.extras)


def write_samples(images: Tensor, folder: Path) -> None:
    """samples.png, ten to a row, and samples.npz with `images` (n, C, H, W) float32, unclamped."""
    from torchvision.utils import save_image

    folder.mkdir(parents=True, exist_ok=True)
    images = images.float().cpu()
    save_image((images.clamp(-1, 1) + 1) / 2, folder / "samples.png", nrow=10)
    np.savez(folder / "samples.npz", images=images.numpy())
    print(f"{len(images)} samples: {folder / 'samples.png'}, {folder / 'samples.npz'}")
