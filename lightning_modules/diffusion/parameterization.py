"""What a network predicts, one conversion table, and EDM's preconditioning.

With x = a x0 + s e:  eps = e,  x0,  v = a e - s x0,  score = -e / s,  flow = d x / d(1 - u) = -(a' x0 + s' e), which
points to the data (linear flow: x0 - e).
"""

from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_modules.diffusion.processes import Process, along

Kind = Literal["eps", "x0", "v", "score", "flow"]


def target(kind: Kind, process: Process, data: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """What a network of this kind shall predict.

    Args:
        kind: see the table above.
        process: gives the coefficients.
        data, noise: (B, ...) float.
        time: (B,) times of the process.

    Returns:
        (B, ...) in the dtype of `data`.
    """
    if kind == "eps":
        return noise
    if kind == "x0":
        return data
    if kind == "score":
        return -noise / along(process.sigma(time), data)
    if kind == "v":
        return along(process.alpha(time), data) * noise - along(process.sigma(time), data) * data
    return -along(process.dalpha(time), data) * data - along(process.dsigma(time), data) * noise


class Prediction:
    """One network output at x, as any parameterisation; converted when first asked for.

    Args:
        kind: of `output`.
        output: (B, ...) float.
        x: (B, ...) the noisy images.
        process, time: process and times, (B,) or 0-d.
        spread: (B, ...) variance head of a net with twice the channels, see `learned_variance`; None without one.

    Raises:
        ValueError: a conversion divides by a coefficient that is 0 here: x0 from eps or score at pure noise, eps from
            x0 without noise.
    """

    def __init__(
        self, kind: Kind, output: Tensor, x: Tensor, process: Process, time: Tensor, spread: Tensor | None = None
    ) -> None:
        self.kind, self.output, self.x, self.process, self.time = kind, output, x, process, time
        self.spread = spread

    @cached_property
    def x0(self) -> Tensor:
        """Prediction of the data."""
        a, s = self._alpha_sigma
        if self.kind == "x0":
            return self.output
        if self.kind == "v":
            return (a * self.x - s * self.output) / (a**2 + s**2)
        if self.kind == "flow":
            da, ds = self._slopes
            return (ds * self.x + s * self.output) / (a * ds - s * da)
        eps = self.output if self.kind == "eps" else -s * self.output
        return (self.x - s * eps) / self._nonzero(a, "x0")

    @cached_property
    def eps(self) -> Tensor:
        """Prediction of the noise."""
        a, s = self._alpha_sigma
        if self.kind == "eps":
            return self.output
        if self.kind == "score":
            return -s * self.output
        if self.kind == "v":
            return (s * self.x + a * self.output) / (a**2 + s**2)
        if self.kind == "flow":
            da, ds = self._slopes
            return -(a * self.output + da * self.x) / (a * ds - s * da)
        return (self.x - a * self.output) / self._nonzero(s, "eps")

    @cached_property
    def v(self) -> Tensor:
        """a eps - s x0."""
        a, s = self._alpha_sigma
        return self.output if self.kind == "v" else a * self.eps - s * self.x0

    @cached_property
    def score(self) -> Tensor:
        """-eps / s."""
        return self.output if self.kind == "score" else -self.eps / self._nonzero(self._alpha_sigma[1], "score")

    @cached_property
    def flow(self) -> Tensor:
        """Velocity towards the data."""
        if self.kind == "flow":
            return self.output
        da, ds = self._slopes
        return -da * self.x0 - ds * self.eps

    def as_kind(self, kind: Kind) -> Tensor:
        """This prediction as `kind`."""
        return getattr(self, kind)

    def with_output(self, kind: Kind, output: Tensor) -> "Prediction":
        """Another prediction at the same point."""
        return Prediction(kind, output, self.x, self.process, self.time, self.spread)

    @cached_property
    def _alpha_sigma(self) -> tuple[Tensor, Tensor]:
        return along(self.process.alpha(self.time), self.x), along(self.process.sigma(self.time), self.x)

    @cached_property
    def _slopes(self) -> tuple[Tensor, Tensor]:
        return along(self.process.dalpha(self.time), self.x), along(self.process.dsigma(self.time), self.x)

    def _nonzero(self, divisor: Tensor, wanted: str) -> Tensor:
        if (divisor == 0).any():
            raise ValueError(
                f"{wanted} cannot be had from {self.kind} at this end of {type(self.process).__name__}; "
                "move the time off the end or choose another model.parameterization"
            )
        return divisor


def edm_coefficients(sigma: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in, c_noise and the loss weight, each of the shape of `sigma`.

    Source: arXiv 2206.00364, Table 1.
    """
    total = sigma**2 + sigma_data**2
    c_out = sigma * sigma_data / total.sqrt()
    return sigma_data**2 / total, c_out, 1 / total.sqrt(), sigma.log() / 4, total / (sigma * sigma_data) ** 2


class Preconditioner(nn.Module):
    """Identity: the net sees x and its output is the prediction."""

    def scale_input(self, process: Process, x: Tensor, time: Tensor) -> Tensor:
        """Input of the net."""
        return x

    def wrap_output(self, process: Process, x: Tensor, output: Tensor, time: Tensor) -> Tensor:
        """Prediction from the output of the net."""
        return output


class EDMPreconditioner(Preconditioner):
    """D = c_skip x + c_out F(c_in x), a prediction of x0; needs the process `EDM` and parameterization x0.

    Args:
        sigma_data: standard deviation of the data.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.sigma_data = sigma_data

    def scale_input(self, process: Process, x: Tensor, time: Tensor) -> Tensor:
        """c_in x."""
        return along(edm_coefficients(process.sigma(time), self.sigma_data)[2], x) * x

    def wrap_output(self, process: Process, x: Tensor, output: Tensor, time: Tensor) -> Tensor:
        """c_skip x + c_out F."""
        c_skip, c_out, *_ = edm_coefficients(process.sigma(time), self.sigma_data)
        return along(c_skip, x) * x + along(c_out, x) * output


class Denoiser:
    """A network at work: preconditions, converts, counts evaluations.

    Args:
        net: (x, time (B,), label (B,) or None[, extras]) -> output like x, or with twice the channels, of which the
            second half is the variance head.
        process, kind: process and parameterisation it was trained for.
        preconditioner: None for the identity.
        label: (B,) int64 classes, or None.
        extras: (index (B,) int64) -> further inputs of the net, e.g. `dtr.Routing`; the index is round(u (T - 1)) with
            T = `extras.num_tasks`.

    Attributes:
        rows: images evaluated so far; divided by the size of the batch it is the NFE (guidance evaluates two).
    """

    def __init__(
        self,
        net: nn.Module,
        process: Process,
        kind: Kind,
        preconditioner: Preconditioner | None = None,
        label: Tensor | None = None,
        extras: nn.Module | None = None,
    ) -> None:
        if kind not in get_args(Kind):
            raise ValueError(f"model.parameterization must be one of {', '.join(get_args(Kind))}, got {kind!r}")
        self.net, self.process, self.kind, self.label = net, process, kind, label
        self.preconditioner = preconditioner or Preconditioner()
        self.extras = extras
        self.rows = 0

    def __call__(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Prediction:
        """Prediction at x (B, ...) and time, (B,) or 0-d; `label` replaces the one given at construction."""
        self.rows += len(x)
        label = self.label if label is None else label
        time_B = time.expand(len(x))
        inputs = [
            self.preconditioner.scale_input(self.process, x, time),
            self.process.net_time(time_B).to(x.dtype),
            label,
        ]
        if self.extras is not None:
            index = self.process.unit(time_B) * (self.extras.num_tasks - 1)  # type: ignore[operator]
            inputs.append(self.extras(index.round().long()))
        output, spread = self.net(*inputs), None
        if output.shape[1] == 2 * x.shape[1]:
            output, spread = output.chunk(2, dim=1)
        output = self.preconditioner.wrap_output(self.process, x, output, time)
        return Prediction(self.kind, output, x, self.process, time, spread)


def mean_square(output: Tensor, wanted: Tensor) -> Tensor:
    """Per-sample (B,) mean of (output - wanted)^2 over all other axes, float32 or wider."""
    wide = torch.promote_types(output.dtype, torch.float32)
    return (output.to(wide) - wanted.to(wide)).square().flatten(1).mean(1)
