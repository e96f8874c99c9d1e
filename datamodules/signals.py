"""Signals to be fitted by a coordinate net: generated ones, sound files and pictures."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from callbacks.rng import make_generator

MOST_POINTS = 512 * 512
"""Batch of the official WINNER code: up to here a step sees the whole signal, beyond it is not supported."""


class SignalSource:
    """Gives one signal as (spatial axes ..., C) float64; scaling is the datamodule's."""

    def read(self, generator: torch.Generator) -> Tensor:
        """The signal; `generator` serves those that are drawn."""
        raise NotImplementedError


class BandNoise(SignalSource):
    """Gaussian noise of one channel without power outside a band.

    Args:
        length: samples.
        low, high: limits of the band in units of the Nyquist frequency.

    Raises:
        ValueError: the band holds no frequency of a signal of this length.
    """

    def __init__(self, length: int, low: float, high: float) -> None:
        frequency = torch.linspace(0, 1, length // 2 + 1)
        self.inside = (frequency >= low) & (frequency <= high)
        self.length = length
        if not self.inside.any():
            raise ValueError(
                f"data.source.low and high must be within [0, 1] and enclose a frequency: between {low} and {high} "
                f"the spectrum of {length} samples is empty"
            )

    def read(self, generator: torch.Generator) -> Tensor:
        """As in `SignalSource`."""
        noise = torch.randn(self.length, generator=generator, dtype=torch.float64)
        return torch.fft.irfft(torch.fft.rfft(noise) * self.inside, n=self.length)[:, None]


class Clicks(SignalSource):
    """Twelve decaying sinusoids, a chirp and 3 % white noise: a stand-in for a sound clip of one second.

    Args:
        length: samples.
    """

    def __init__(self, length: int) -> None:
        if length < 2:
            raise ValueError(f"data.source.length must be at least 2, got {length}")
        self.length = length

    def read(self, generator: torch.Generator) -> Tensor:
        """As in `SignalSource`."""
        draws = torch.rand(4, 12, 1, generator=generator, dtype=torch.float64)
        time = torch.arange(self.length, dtype=torch.float64) / self.length
        since = time - 0.9 * draws[0]
        turn = 2 * torch.pi * self.length * (0.05 + 0.4 * draws[1])
        decay = 30 + 90 * draws[2]
        waves = torch.exp(-decay * since) * torch.sin(turn * since)
        clicks = (0.3 + 0.7 * draws[3]) * torch.where(since >= 0, waves, 0)
        chirp = 0.3 * torch.sin(2 * torch.pi * self.length * (0.01 * time + 0.02 * time**2))
        signal = clicks.sum(0) + chirp
        noise = torch.randn(self.length, generator=generator, dtype=torch.float64)
        return (signal + 0.03 * signal.abs().max() * noise)[:, None]


class UniformPicture(SignalSource):
    """A grey picture of independent uniform pixels.

    Args:
        size: edge length.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def read(self, generator: torch.Generator) -> Tensor:
        """As in `SignalSource`; values in [-1, 1]."""
        return 2 * torch.rand(self.size, self.size, 1, generator=generator, dtype=torch.float64) - 1


class WavFile(SignalSource):
    """The beginning of a sound file, channels averaged, at its own rate.

    Args:
        path: a WAV file.
        length: most samples that are used.
    """

    def __init__(self, path: str, length: int = 150_000) -> None:
        self.path = _existing(path, "a WAV file")
        self.length = length

    def read(self, generator: torch.Generator) -> Tensor:
        """As in `SignalSource`."""
        from scipy.io import wavfile

        _, samples = wavfile.read(self.path)
        used = np.asarray(samples[: self.length], dtype=np.float64)
        return torch.from_numpy(used.reshape(len(used), -1)).mean(1, keepdim=True)


class Picture(SignalSource):
    """A picture file, grey or colour, values in [-1, 1].

    Args:
        path: any format that Pillow reads.
        size: edge length to which it is scaled; None keeps it.
    """

    def __init__(self, path: str, size: int | None = None) -> None:
        self.path = _existing(path, "a picture")
        self.size = size

    def read(self, generator: torch.Generator) -> Tensor:
        """As in `SignalSource`."""
        from PIL import Image

        with Image.open(self.path) as file:
            picture = file.convert("L" if file.mode in ("1", "L") else "RGB")
        if self.size is not None:
            picture = picture.resize((self.size, self.size))
        pixels = torch.from_numpy(np.array(picture, dtype=np.float64))
        return (pixels.reshape(*pixels.shape[:2], -1) / 255 - 0.5) / 0.5


def _existing(path: str, what: str) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"data.source.path must name {what}; there is no {Path(path).absolute()}")
    return Path(path)


def grid(shape: tuple[int, ...]) -> Tensor:
    """(N, d) float64 positions in raster order, each axis from -1 to 1 inclusive."""
    axes = [torch.linspace(-1, 1, size, dtype=torch.float64) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(shape))


def normalized(signal: Tensor) -> Tensor:
    """Signal divided by its largest magnitude.

    Raises:
        ValueError: it is zero everywhere, so it has no spectrum.
    """
    largest = signal.abs().max()
    if largest == 0:
        raise ValueError("data.source gives a signal that is 0 everywhere: its spectrum is empty")
    return signal / largest


class _Repeated(Dataset):
    """The same batch, a number of times."""

    def __init__(self, batch: dict[str, Any], times: int) -> None:
        self.batch = batch
        self.times = times

    def __len__(self) -> int:
        return self.times

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.batch


class Signal(L.LightningDataModule):
    """One signal; a batch is all of it: `position` (N, d) and `target` (N, C), float32, points in raster order.

    Drawn signals are a function of the run's seed, the same on all ranks. Sounds and drawn signals of one axis are
    divided by their largest magnitude; pictures lie in [-1, 1] as they are.

    Args:
        source: the signal.
        steps_per_epoch: how often an epoch shows the whole signal; only logging and checkpoints depend on it (the
            official code's epoch is one step).

    Raises:
        ValueError: no step, or a signal that is 0 everywhere or too long for one batch.
    """

    def __init__(self, source: SignalSource, steps_per_epoch: int = 1) -> None:
        super().__init__()
        if steps_per_epoch < 1:
            raise ValueError(f"data.steps_per_epoch must be at least 1, got {steps_per_epoch}")
        self.source = source
        self.steps_per_epoch = steps_per_epoch

    def setup(self, stage: str | None = None) -> None:
        """Reads or draws the signal."""
        signal = self.source.read(make_generator("signal"))
        if signal.ndim == 2:
            signal = normalized(signal)
        shape = signal.shape[:-1]
        if shape.numel() > MOST_POINTS:
            raise ValueError(f"data.source gives {shape.numel():,} points; one batch holds at most {MOST_POINTS:,}")
        self.position = grid(tuple(shape)).float()
        self.target = signal.reshape(len(self.position), -1).float()

    def train_dataloader(self) -> DataLoader:
        """The whole signal, once per step."""
        return self._loader(self.steps_per_epoch)

    def val_dataloader(self) -> DataLoader:
        """The whole signal, after each epoch."""
        return self._loader(1)

    test_dataloader = val_dataloader

    def _loader(self, times: int) -> DataLoader:
        batch = {"position": self.position, "target": self.target}
        return DataLoader(_Repeated(batch, times), batch_size=None, generator=make_generator("loader"))
