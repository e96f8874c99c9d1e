"""WINNER / SIREN^2: noise on the first two layers of a sine net, scaled by the target's spectrum (arXiv 2509.09719).

Legend: M members of the stack, N points, d coordinates, C channels, h width. Where paper and official code differ, the
code decides and the docstring says both.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from callbacks.rng import make_generator

NUM_BANDS = 10
"""Equal parts of the range from 0 to the Nyquist frequency, for error and power by band."""
CODE_SCALES = {1: (3500.0, 7.0, 3.0), 2: (50.0, 5.0, 0.4)}
PAPER_SCALES = {1: (3500.0, 5.0, 3.0), 2: (50.0, 5.0, 0.4)}
"""d -> (s_max, a, b); the official code has 7 for sound where the text has 5. Other d need scales by hand."""


def spectral_centroid(target: Tensor) -> Tensor:
    r"""psi = 2 / C * mean over channels (and rows) of sum f |y_f| / sum |y_f|, f in cycles per sample, DC included.

    Args:
        target: (..., n, C) float; the transform runs along n, further axes are rows.

    Returns:
        0-d; 0 for the zero signal, up to 1 for C = 1.

    Source: official code, `spectral_centroid`; the text has no second division by C.
    """
    magnitude = torch.fft.rfft(target, dim=-2).abs()
    frequency = torch.fft.rfftfreq(target.shape[-2], dtype=magnitude.dtype, device=magnitude.device)[:, None]
    total = magnitude.sum(-2)
    centroid = torch.where(total > 0, (frequency * magnitude).sum(-2) / total, 0.0)
    return 2 * centroid.mean() / target.shape[-1]


def noise_scales(psi: float, dims: int, channels: int, rule: Literal["code", "paper"] = "code") -> tuple[float, float]:
    r"""Scales (s0, s1) of the noise on layers 1 and 2.

    `code`:  s0 = s_max (1 - exp(-a psi / C)), s1 = b psi / C.
    `paper`: s0 = s_max (1 - exp(-a sqrt(psi_1) / C)), s1 = b psi_1 / sqrt(C), with psi_1 = C psi.

    Args:
        psi: of `spectral_centroid`.
        dims: d, 1 for sound and 2 for pictures.
        channels: C.
        rule: which of the two.

    Raises:
        ValueError: another number of dimensions, for which there is no rule.

    Source: official scripts; README of the official code (the sign of its exponent must be minus).
    """
    table = CODE_SCALES if rule == "code" else PAPER_SCALES
    if dims not in table:
        raise ValueError(f"the data must have 1 or 2 coordinates for WINNER's scales, got {dims}")
    largest, rate, second = table[dims]
    if rule == "code":
        return largest * -math.expm1(-rate * psi / channels), second * psi / channels
    single = channels * psi
    return largest * -math.expm1(-rate * math.sqrt(single) / channels), second * single / math.sqrt(channels)


def siren_weights(sizes: Sequence[int], omega: float, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    r"""Initial weights (out, in) and biases (out,) of a SIREN with layer widths `sizes` = d, h, ..., h, C.

    W_1 ~ U(+-1/d); W_l ~ U(+-sqrt(6/h) / omega), the output layer included; biases U(+-1/sqrt(fan_in)).

    Source: official code; biases are torch's default there.
    """
    weights, biases = [], []
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        bound = 1 / fan_in if layer == 0 else math.sqrt(6 / fan_in) / omega
        weights.append((2 * torch.rand(fan_out, fan_in, generator=generator) - 1) * bound)
        biases.append((2 * torch.rand(fan_out, generator=generator) - 1) / math.sqrt(fan_in))
    return weights, biases


def perturbed(weight: Tensor, noise: Tensor, scale: float | Tensor, omega: float) -> Tensor:
    """W + noise * s / w0, noise ~ N(0, 1). Divided by w0, not multiplied. Source: official code."""
    return weight + noise * scale / omega


def siren(
    position: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], first_omega: float | Tensor, omega: float
) -> Tensor:
    r"""z <- sin(w (W z + b)) in every layer but the last, which is affine; w = first_omega in layer 1, omega after it.

    Args:
        position: (N, d) float32; half precision breaks the sine of large arguments.
        weights, biases: per layer (out, in) and (out,), or (M, out, in) and (M, out) for a stack.
        first_omega: number, or (M, 1, 1) for a stack.
        omega: number.

    Returns:
        (N, C), or (M, N, C).

    Source: official code, SIREN.
    """
    values = position
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        values = values @ weight.mT + bias.unsqueeze(-2)
        if layer < len(weights) - 1:
            values = torch.sin((first_omega if layer == 0 else omega) * values)
    return values


def psnr(error: Tensor) -> Tensor:
    """-10 log10 of a mean square error, in dB: peak 1 although the targets' range is 2. Source: official code."""
    return -10 * error.log10()


def band_power(signal: Tensor) -> Tensor:
    """(..., NUM_BANDS) power of (..., N, C) in equal bands up to the Nyquist frequency, summed over channels."""
    power = torch.fft.rfft(signal, dim=-2).abs().square().sum(-1)
    frequency = torch.arange(power.shape[-1], device=power.device) * NUM_BANDS // max(power.shape[-1] - 1, 1)
    bands = torch.zeros(*power.shape[:-1], NUM_BANDS, dtype=power.dtype, device=power.device)
    return bands.index_add(-1, frequency.clamp(max=NUM_BANDS - 1), power)


@dataclass
class Member:
    """One net of the stack.

    Args:
        init: `siren`, or `winner` for the noise.
        first_omega: factor inside the first sine.
        layers: where WINNER puts its noise.
        rule: see `noise_scales`.
        reference_length: multiplies s0 by N / reference_length; None leaves it. s_max was set for 150,000 samples.
    """

    init: Literal["siren", "winner"] = "siren"
    first_omega: float = 30.0
    layers: Literal["both", "first", "second"] = "both"
    rule: Literal["code", "paper"] = "code"
    reference_length: int | None = None


class Winner(L.LightningModule):
    """Sine nets that fit one signal, stacked: members share base weights and noise, and differ in their `Member`.

    The gradient of a member is that of its own mean square error. Logs per member and epoch, after the update:
    `psnr/<name>`, `gain/<name>` over the zero output, `power/<name>_<band>` and `error/<name>_<band>` in units of the
    target's power; for comparison `psnr/zero`, `power/target_<band>`, and `init_power/<name>_<band>` before training;
    `noise/psi`, `noise/s0_<name>`, `noise/s1_<name>`.

    Args:
        members: name -> settings; names are words of letters and digits.
        optimizer: callable of the recipe; elementwise ones (Adam) train the stack like separate nets.
        scheduler: steps with every step, which is the official code's epoch.
        width: h.
        depth: number of sine layers.
        omega: factor inside the later sines, and divisor of weights and noise.

    Raises:
        ValueError: no member, a name that is not a word, sizes below 1, or factors that are not positive.

    Source: arXiv 2509.09719 and official code; defaults are those of its sound script.
    """

    first_omega: Tensor
    init_power: Tensor

    def __init__(
        self,
        members: dict[str, Member],
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        width: int = 222,
        depth: int = 4,
        omega: float = 30.0,
    ) -> None:
        super().__init__()
        if not members or not all(name.isalnum() for name in members):
            raise ValueError(f"model.members must name at least one net in letters and digits, got {list(members)}")
        if min(width, depth) < 1 or (depth < 2 and any(m.init == "winner" for m in members.values())):
            raise ValueError(f"model.width and depth must be at least 1, depth 2 for winner, got {width} and {depth}")
        factors = [omega, *(member.first_omega for member in members.values())]
        if min(factors) <= 0:
            raise ValueError(f"model.omega and first_omega must be positive, got {factors}")
        self.save_hyperparameters("width", "depth", "omega")
        self.members = members
        self.optimizer = optimizer
        self.scheduler = scheduler

    def setup(self, stage: str) -> None:
        """Draws the weights, once: sizes and noise follow from the signal."""
        if hasattr(self, "weights"):
            return
        data: Any = getattr(self.trainer, "datamodule", None)
        if not (hasattr(data, "position") and hasattr(data, "target")):
            raise ValueError(f"Winner needs a datamodule with position and target, got {type(data).__name__}")
        dims, channels = data.position.shape[1], data.target.shape[1]
        # pictures too are measured along their raster, as in the official script
        self.psi = float(spectral_centroid(data.target.double()))
        self.scales = [self._scales(member, dims, channels, len(data.target)) for member in self.members.values()]
        depth, omega = self.hparams["depth"], self.hparams["omega"]
        sizes = [dims, *[self.hparams["width"]] * depth, channels]
        weights, biases = siren_weights(sizes, omega, make_generator("weights"))
        generator, count = make_generator("noise"), len(self.members)
        stacked = [weight.repeat(count, 1, 1) for weight in weights]
        for layer in range(min(2, depth)):
            scale = torch.tensor([pair[layer] for pair in self.scales])[:, None, None]
            noise = torch.randn(weights[layer].shape, generator=generator)
            stacked[layer] = perturbed(stacked[layer], noise, scale, omega)
        self.weights = nn.ParameterList(stacked)
        self.biases = nn.ParameterList(bias.repeat(count, 1) for bias in biases)
        first = torch.tensor([member.first_omega for member in self.members.values()])
        self.register_buffer("first_omega", first[:, None, None])
        with torch.no_grad():
            power = band_power(self(data.position)) / band_power(data.target).sum()
        self.register_buffer("init_power", power)

    def _scales(self, member: Member, dims: int, channels: int, length: int) -> tuple[float, float]:
        if member.init == "siren":
            return 0.0, 0.0
        if self.psi == 0:
            raise ValueError("data.source gives a target whose spectrum is empty or constant: WINNER has no centroid")
        first, second = noise_scales(self.psi, dims, channels, member.rule)
        if member.reference_length is not None:
            first *= length / member.reference_length
        return (0.0 if member.layers == "second" else first), (0.0 if member.layers == "first" else second)

    def forward(self, position: Tensor) -> Tensor:
        """(M, N, C) outputs."""
        return siren(position, list(self.weights), list(self.biases), self.first_omega, self.hparams["omega"])

    def on_train_epoch_start(self) -> None:
        """Starts the sum of the epoch's losses."""
        self._sum = torch.zeros((), device=self.device)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Sum of the members' mean square errors, before the update."""
        loss = self._errors(self(batch["position"]), batch["target"]).sum()
        self._sum += loss.detach()
        return loss

    def on_train_epoch_end(self) -> None:
        """Logs the mean over members and steps."""
        self.log("train/loss", self._sum / (len(self.members) * self.trainer.num_training_batches))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Quality of each member, over all and by band."""
        output, target = self(batch["position"]), batch["target"]
        zero, reached = psnr(target.square().mean()), psnr(self._errors(output, target))
        total = band_power(target)
        self.log_dict({"psnr/zero": zero, "noise/psi": self.psi, **_by_band("power/target", total / total.sum())})
        power, error = band_power(output) / total.sum(), band_power(output - target) / total.sum()
        for i, name in enumerate(self.members):
            values = {f"psnr/{name}": reached[i], f"gain/{name}": reached[i] - zero}
            values |= _by_band(f"power/{name}", power[i]) | _by_band(f"error/{name}", error[i])
            values |= _by_band(f"init_power/{name}", self.init_power[i])
            self.log_dict({**values, f"noise/s0_{name}": self.scales[i][0], f"noise/s1_{name}": self.scales[i][1]})

    test_step = validation_step

    @staticmethod
    def _errors(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean((-2, -1))

    def configure_optimizers(self) -> Any:
        """Optimizer over the stack; the scheduler steps with every step."""
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": "step"}]


def _by_band(name: str, values: Tensor) -> dict[str, Tensor]:
    return {f"{name}_{band}": value for band, value in enumerate(values)}
