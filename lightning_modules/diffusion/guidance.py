"""Guidance: wrappers that are called like the denoiser they hold."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_modules.diffusion.parameterization import Denoiser, Prediction


class ClassifierFree(Denoiser):
    """out = out_null + scale (out_class - out_null), both halves in one call, all channels; variance of the class.

    Args:
        denoiser: a network trained with dropped labels.
        label: (B,) int64 classes.
        null_label: class that stands for none, by convention the number of classes.
        scale: w; 1 is conditional and costs one evaluation, 0 unconditional.
        interval: unit times between which guidance acts; outside it is conditional (arXiv 2404.07724).

    Source: arXiv 2207.12598.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        label: Tensor,
        null_label: int,
        scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__(denoiser.net, denoiser.process, denoiser.kind, denoiser.preconditioner, label, denoiser.extras)
        self.null_label, self.scale, self.interval = null_label, scale, interval

    def __call__(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Prediction:
        """As in `Denoiser`; `time` is 0-d or (B,) with one value."""
        given = self.label if label is None else label
        unit = float(self.process.unit(time.flatten()[0]))
        if given is None or self.scale == 1 or not self.interval[0] <= unit <= self.interval[1]:
            return super().__call__(x, time, given)
        labels = torch.cat([given, torch.full_like(given, self.null_label)])
        times = time if time.ndim == 0 else torch.cat([time, time])
        both = super().__call__(torch.cat([x, x]), times, labels)
        conditional, null = both.output.chunk(2)
        spread = None if both.spread is None else both.spread.chunk(2)[0]
        return Prediction(self.kind, null + self.scale * (conditional - null), x, self.process, time, spread)


class ClassifierGuidance(Denoiser):
    """eps - s scale grad log p(label | x).

    Args:
        denoiser: what is guided.
        log_probability: (x (B, ...), time, label (B,)) -> (B,) log p(label | x), differentiable in x.
        label: (B,) int64 classes.
        scale: factor.

    Source: arXiv 2105.05233, Algorithm 2.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        log_probability: Callable[[Tensor, Tensor, Tensor], Tensor],
        label: Tensor,
        scale: float,
    ) -> None:
        super().__init__(denoiser.net, denoiser.process, denoiser.kind, denoiser.preconditioner, label, denoiser.extras)
        self.log_probability, self.scale = log_probability, scale

    def __call__(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Prediction:
        """As in `Denoiser`."""
        prediction = super().__call__(x, time, label)
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            total = self.log_probability(at, time, self.label if label is None else label).sum()  # type: ignore[arg-type]
            (gradient,) = torch.autograd.grad(total, at)
        sigma = self.process.sigma(time).to(x).view(-1, *[1] * (x.ndim - 1))
        return prediction.with_output("eps", prediction.eps - sigma * self.scale * gradient)
