"""Exact learning dynamics of deep linear nets, and why orthogonal starts keep deep ones fast (arXiv 1312.6120).

Legend: L weight matrices W_1 ... W_L, S or M members of a stack, K modes, Sigma_yx = U diag(s) V^T.
Inputs are whitened, the loss is 0.5 ||Sigma_yx - W_L ... W_1||_F^2 up to a constant, time t is step * lr. Formulas are
derived anew and checked by simulation; (derived) marks what the abstract does not say itself.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from callbacks.rng import make_generator

HOPELESS = 1e3
"""A loss of this many times that of the zero net counts as diverged."""


def chain_gradients(weights: Sequence[Tensor], correlation: Tensor) -> tuple[list[Tensor], Tensor]:
    r"""Negative gradients G_l = (W_L ... W_{l+1})^T E (W_{l-1} ... W_1)^T of the loss, all from the same weights.

    Args:
        weights: L tensors (..., n_l, n_{l-1}).
        correlation: (n_L, n_0) Sigma_yx.

    Returns:
        The L directions, and E = Sigma_yx - W_L ... W_1 (..., n_L, n_0).

    Source: arXiv 1312.6120, gradient descent of a deep linear net on whitened inputs.
    """
    products: list[Tensor] = [weights[0]]
    for weight in weights[1:]:
        products.append(weight @ products[-1])
    error = correlation - products[-1]
    directions, back = [], error
    for layer in range(len(weights) - 1, 0, -1):
        directions.append(back @ products[layer - 1].mT)
        back = weights[layer].mT @ back
    return [back, *reversed(directions)], error


def end_to_end(weights: Sequence[Tensor]) -> Tensor:
    """W_L ... W_1 (..., n_L, n_0)."""
    product = weights[0]
    for weight in weights[1:]:
        product = weight @ product
    return product


def mode_strength(time: Tensor, singular: Tensor, start: float) -> Tensor:
    r"""a(t) = s e^{2st} / (e^{2st} - 1 + s / a0), the exact solution for two layers.

    Args:
        time: (...) t.
        singular: (K,) s.
        start: a0, strength of every mode at t = 0, of the product of the layers.

    Returns:
        (..., K).

    Source: arXiv 1312.6120, exact solution of da/dt = 2 a (s - a), decoupled balanced start.
    """
    decay = torch.exp(-2 * singular * time.unsqueeze(-1))
    return singular / (1 + (singular / start - 1) * decay)


def half_time(singular: Tensor, start: float) -> Tensor:
    """t with a(t) = s / 2 for two layers: ln(s / a0 - 1) / (2 s); (K,). Source: (derived) from `mode_strength`."""
    return torch.log(singular / start - 1) / (2 * singular)


def mode_step(strength: Tensor, singular: Tensor, num_layers: int, dt: float) -> Tensor:
    r"""One Runge-Kutta step (order 4) of da/dt = L a^{2 - 2/L} (s - a); strength and singular (K,).

    Source: arXiv 1312.6120; with the paper's count N_l = L + 1 of layers: factor N_l - 1, exponent 2 - 2 / (N_l - 1).
    """

    def slope(a: Tensor) -> Tensor:
        return num_layers * a ** (2 - 2 / num_layers) * (singular - a)

    first = slope(strength)
    second = slope(strength + dt / 2 * first)
    third = slope(strength + dt / 2 * second)
    fourth = slope(strength + dt * third)
    return strength + dt / 6 * (first + 2 * second + 2 * third + fourth)


def aligned_start(
    correlation: Tensor, num_modes: int, sizes: Sequence[int], start: float, generator: torch.Generator
) -> list[Tensor]:
    r"""Decoupled, balanced start: W_1 = R_1 D V^T, W_l = R_l D R_{l-1}^T, W_L = U D R_{L-1}^T.

    Args:
        correlation: (n_L, n_0) Sigma_yx.
        num_modes: K; D has a0^{1/L} in its first K diagonal entries and 0 elsewhere.
        sizes: n_0 ... n_L.
        start: a0, mode strength of the product.
        generator: of the orthogonal R_l.

    Returns:
        L tensors (n_l, n_{l-1}) float64.

    Raises:
        ValueError: a layer is narrower than the number of modes.

    Source: arXiv 1312.6120, decoupled initial conditions.
    """
    if min(sizes) < num_modes:
        raise ValueError(f"model.width must be at least the number of modes {num_modes}, got {min(sizes)}")
    left, _, right = torch.linalg.svd(correlation)
    shapes = [(size, num_modes) for size in sizes[1:-1]]
    hidden = [nn.init.orthogonal_(torch.empty(s, dtype=torch.float64), generator=generator) for s in shapes]
    bases = [right[:num_modes].mT, *hidden, left[:, :num_modes]]
    scale = start ** (1 / (len(sizes) - 1))
    return [scale * after @ before.mT for before, after in pairwise(bases)]


def orthogonal_start(sizes: Sequence[int], gain: float, generator: torch.Generator) -> list[Tensor]:
    """gain times random (semi-)orthogonal matrices (n_l, n_{l-1}) float64. Source: arXiv 1312.6120."""
    shapes = zip(sizes[1:], sizes, strict=False)
    return [nn.init.orthogonal_(torch.empty(shape, dtype=torch.float64), gain, generator=generator) for shape in shapes]


def gaussian_start(sizes: Sequence[int], gain: float, generator: torch.Generator) -> list[Tensor]:
    """gain * N(0, 1) / sqrt(fan_in), matrices (n_l, n_{l-1}) float64. Source: arXiv 1312.6120, scaled Gaussian."""
    return [
        gain / columns**0.5 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        for columns, rows in pairwise(sizes)
    ]


def _data(module: L.LightningModule) -> Tensor:
    """Sigma_yx of the datamodule."""
    data: Any = getattr(module.trainer, "datamodule", None)
    if not hasattr(data, "correlation"):
        raise ValueError(
            f"{type(module).__name__} needs a datamodule with correlation(), got {type(data).__name__}; "
            "datamodules.correlations has them"
        )
    correlation: Tensor = data.correlation()
    if not correlation.any():
        raise ValueError("the data's input-output correlation is zero: there is no mode to learn")
    return correlation


class DeepLinearModes(L.LightningModule):
    """Full-batch descent from several starts in one stack, mode by mode against the exact solution. float64.

    An epoch makes `steps_per_epoch` steps. Metrics for start X and mode k (1 is the strongest): `mode/X_k` and
    `theory/k`; `half_time/X_k`, infinite until a_k > s_k / 2; `deviation/X`, largest |a - theory| / s of any step yet;
    `late/X` and `early/X`, largest and smallest half_time / theory - 1 of any mode (two layers only); `ordered/X`, 1 if
    stronger modes had their half-time earlier; `mixing/X`, norm of the off-diagonal part of U^T W V.

    Args:
        starts: any of aligned, gauss_small; both begin with mode strength about `a0`.
        num_layers: L.
        width: of the hidden layers.
        a0: strength of a mode at the start.
        lr: time of a step.
        steps_per_epoch: steps between two rows of metrics.

    Source: arXiv 1312.6120.
    """

    left: Tensor
    singular: Tensor
    right: Tensor
    half_times: Tensor
    deviation: Tensor
    theory: Tensor

    def __init__(
        self,
        starts: list[Literal["aligned", "gauss_small"]],
        num_layers: int = 2,
        width: int = 8,
        a0: float = 1e-4,
        lr: float = 0.002,
        steps_per_epoch: int = 200,
    ) -> None:
        super().__init__()
        if not starts or len(set(starts)) < len(starts):
            raise ValueError(f"model.starts must be at least one, all different, got {starts}")
        if num_layers < 2 or width < 1 or steps_per_epoch < 1:
            raise ValueError(
                "model.num_layers must be at least 2, model.width and model.steps_per_epoch at least 1, "
                f"got {num_layers}, {width} and {steps_per_epoch}"
            )
        if a0 <= 0 or lr <= 0:
            raise ValueError(f"model.a0 and model.lr must be positive, got {a0} and {lr}")
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.starts, self.num_layers, self.width, self.a0 = starts, num_layers, width, a0
        self.lr, self.steps_per_epoch = lr, steps_per_epoch

    def setup(self, stage: str) -> None:
        """Draws the starts; the same on every rank."""
        correlation = _data(self)
        left, singular, right = torch.linalg.svd(correlation, full_matrices=False)
        count = int((singular > 1e-6 * singular[0]).sum())
        if self.a0 >= float(singular[count - 1]):
            raise ValueError(
                f"model.a0 must be below the weakest singular value {float(singular[count - 1]):.4g}, got {self.a0}"
            )
        for name, value in (("left", left[:, :count]), ("singular", singular[:count]), ("right", right[:count].mT)):
            self.register_buffer(name, value, persistent=False)
        sizes = [correlation.shape[1], *[self.width] * (self.num_layers - 1), correlation.shape[0]]
        stacks = zip(*(self._draw(start, correlation, sizes, count) for start in self.starts), strict=True)
        self.weights = nn.ParameterList(nn.Parameter(torch.stack(layer)) for layer in stacks)
        self.register_buffer("half_times", torch.full((len(self.starts), count), math.inf, dtype=torch.float64))
        self.register_buffer("deviation", torch.zeros(len(self.starts), dtype=torch.float64))
        self.register_buffer("theory", torch.full((count,), self.a0, dtype=torch.float64))

    def _draw(self, start: str, correlation: Tensor, sizes: list[int], count: int) -> list[Tensor]:
        generator = make_generator(f"start/{start}")
        if start == "aligned":
            return aligned_start(correlation, count, sizes, self.a0, generator)
        return gaussian_start(sizes, self.a0 ** (1 / self.num_layers), generator)

    def configure_optimizers(self) -> Any:
        """Plain gradient steps."""
        return torch.optim.SGD(self.weights, lr=self.lr)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """`steps_per_epoch` steps; keeps every step's mode strengths until the epoch's end."""
        optimizer: Any = self.optimizers()
        weights, rows = list(self.weights), []
        first = self.global_step
        with torch.no_grad():
            for _ in range(self.steps_per_epoch):
                directions, _ = chain_gradients(weights, batch["correlation"])
                for weight, direction in zip(weights, directions, strict=True):
                    weight.grad = direction.neg_()
                optimizer.step()
                rows.append(self._modes(end_to_end(weights)))
            product = end_to_end(weights)
            self._compare(torch.stack(rows), first)
            loss = (batch["correlation"] - product).square().sum((-2, -1)) / 2
            self._log(rows[-1], product, loss)
        return {"loss": loss.mean()}

    def _modes(self, product: Tensor) -> Tensor:
        """a_k = (U^T W V)_kk (S, K)."""
        return ((self.left.T @ product) * self.right.T).sum(-1)

    def _compare(self, modes: Tensor, first: int) -> None:
        """Updates half-times and deviation from the (T, S, K) strengths after steps first + 1 ... first + T."""
        time = self.lr * torch.arange(first + 1, first + 1 + len(modes), dtype=torch.float64, device=self.device)
        if self.num_layers == 2:
            theory = mode_strength(time, self.singular, self.a0)
        else:
            rows, row = [], self.theory
            for _ in time:
                row = mode_step(row, self.singular, self.num_layers, self.lr)
                rows.append(row)
            theory = torch.stack(rows)
        self.theory = theory[-1]
        deviation = ((modes - theory[:, None]).abs() / self.singular).amax((0, 2))
        self.deviation = torch.maximum(self.deviation, deviation)
        reached = modes > self.singular / 2
        crossing = torch.where(reached.any(0), time[reached.int().argmax(0)], math.inf)
        self.half_times = torch.minimum(self.half_times, crossing)

    def _log(self, modes: Tensor, product: Tensor, loss: Tensor) -> None:
        names = range(1, len(self.singular) + 1)
        rotated = self.left.T @ product @ self.right
        mixing = (rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))).flatten(1).norm(dim=1)
        metrics = {f"theory/{k}": self.theory[k - 1] for k in names}
        for number, start in enumerate(self.starts):
            times = self.half_times[number]
            metrics |= {f"mode/{start}_{k}": modes[number, k - 1] for k in names}
            metrics |= {f"half_time/{start}_{k}": times[k - 1] for k in names}
            metrics |= {f"deviation/{start}": self.deviation[number], f"mixing/{start}": mixing[number]}
            # an infinite half-time is not earlier than another one
            metrics[f"ordered/{start}"] = (times[1:] > times[:-1]).all().double()
            if self.num_layers == 2:
                delay = times / half_time(self.singular, self.a0) - 1
                metrics |= {f"late/{start}": delay.max(), f"early/{start}": delay.min()}
        self.log_dict(metrics)
        self.log("train/loss", loss.mean(), prog_bar=True)


class DeepLinearDepth(L.LightningModule):
    """Steps to a small loss against depth, each depth with its best learning rate. float32.

    A depth is one stack of M nets with the same start, one for each learning rate 2^(k/2), times 8 / L beyond 8 layers.
    They step side by side, so the first net below the threshold has the fewest steps and the depth is done. A run ends
    when all depths are. Metrics: `steps/L<L>`, the steps made so far while no net is below the threshold;
    `log_steps/L<L>`, its natural logarithm; `reached/L<L>`; `best_lr/L<L>`; `spread/L<L>`, largest over smallest
    singular value of the product at the start.

    Args:
        start: orth, (semi-)orthogonal, or gauss, N(0, 1) / sqrt(fan_in).
        depths: numbers of weight matrices L.
        width: of the hidden layers.
        gain: factor of every matrix of the start.
        half_octaves: smallest and largest k of the learning rates.
        threshold: share of the zero net's excess loss to reach.
        steps_per_epoch: steps between two rows of metrics.

    Source: arXiv 1312.6120.
    """

    rates: Tensor
    steps: Tensor
    best_rate: Tensor
    alive: Tensor

    def __init__(
        self,
        start: Literal["orth", "gauss"],
        depths: list[int],
        width: int = 32,
        gain: float = 1.0,
        half_octaves: tuple[int, int] = (-14, 2),
        threshold: float = 0.05,
        steps_per_epoch: int = 20,
    ) -> None:
        super().__init__()
        if not depths or min(depths) < 1 or len(set(depths)) < len(depths):
            raise ValueError(f"model.depths must be at least 1 and all different, got {depths}")
        if width < 1 or gain <= 0 or steps_per_epoch < 1:
            raise ValueError(
                "model.width and model.steps_per_epoch must be at least 1 and model.gain positive, "
                f"got {width}, {steps_per_epoch} and {gain}"
            )
        if half_octaves[0] > half_octaves[1]:
            raise ValueError(f"model.half_octaves must be smallest and largest, got {half_octaves}")
        if not 0 < threshold < 1:
            raise ValueError(f"model.threshold must be in (0, 1), got {threshold}")
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.start, self.depths, self.width, self.gain = start, depths, width, gain
        self.threshold, self.steps_per_epoch = threshold, steps_per_epoch
        octaves = torch.arange(half_octaves[0], half_octaves[1] + 1) / 2
        rates = torch.stack([2**octaves * min(1.0, 8 / depth) for depth in depths])
        self.register_buffer("rates", rates, persistent=False)

    def setup(self, stage: str) -> None:
        """Draws the starts; the same on every rank."""
        correlation = _data(self)
        self.zero_loss = float(correlation.square().sum() / 2)
        self.nets, self.spread = nn.ModuleDict(), {}
        for depth in self.depths:
            sizes = [correlation.shape[1], *[self.width] * (depth - 1), correlation.shape[0]]
            draw = orthogonal_start if self.start == "orth" else gaussian_start
            weights = draw(sizes, self.gain, make_generator(f"start/{depth}"))
            values = torch.linalg.svdvals(end_to_end(weights))
            self.spread[depth] = values[0] / values[-1]
            stacks = (weight.float().repeat(self.rates.shape[1], 1, 1) for weight in weights)
            self.nets[str(depth)] = nn.ParameterList(nn.Parameter(stack) for stack in stacks)
        self.register_buffer("steps", torch.zeros(len(self.depths), dtype=torch.int64))
        self.register_buffer("best_rate", torch.zeros(len(self.depths)))
        self.register_buffer("alive", torch.ones_like(self.rates, dtype=torch.bool))

    def configure_optimizers(self) -> Any:
        """Plain steps of length 1: each net's own rate is in its gradient."""
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """`steps_per_epoch` steps of the depths that have not reached the threshold.

        The loss is the mean over depths of the lowest one, in units of the zero net's; 0 for a depth that is done.
        """
        optimizer: Any = self.optimizers()
        correlation = batch["correlation"].float()
        losses = torch.zeros(len(self.depths), device=self.device)
        with torch.no_grad():
            for _ in range(self.steps_per_epoch):
                for number, depth in enumerate(self.depths):
                    if self.best_rate[number] == 0:
                        losses[number] = self._direct(number, depth, correlation)
                optimizer.step()
        self._log(losses.mean())
        self.trainer.should_stop = bool((self.best_rate > 0).all())
        return {"loss": losses.mean()}

    def _log(self, loss: Tensor) -> None:
        metrics = {"train/loss": loss}
        for number, depth in enumerate(self.depths):
            steps, rate = self.steps[number].float(), self.best_rate[number]
            metrics |= {f"steps/L{depth}": steps, f"log_steps/L{depth}": steps.log(), f"best_lr/L{depth}": rate}
            metrics |= {f"reached/L{depth}": (rate > 0).float(), f"spread/L{depth}": self.spread[depth]}
        self.log_dict(metrics)

    def _direct(self, number: int, depth: int, correlation: Tensor) -> Tensor:
        """Sets the gradients of one depth, or stops it if a net is below the threshold; returns its lowest loss."""
        weights = list(self.nets[str(depth)])  # type: ignore[call-overload]
        directions, error = chain_gradients(weights, correlation)
        loss = error.square().sum((-2, -1)) / 2
        self.alive[number] &= loss < HOPELESS * self.zero_loss
        # finite, so that a depth where all nets diverge counts as not reached, not as a failed run
        lowest, which = torch.where(self.alive[number], loss, HOPELESS * self.zero_loss).min(0)
        done = bool(lowest <= self.threshold * self.zero_loss)
        if done:
            self.best_rate[number] = self.rates[number, which]
        else:
            self.steps[number] += 1
        rate = (self.rates[number] * self.alive[number])[:, None, None]
        for weight, direction in zip(weights, directions, strict=True):
            # of a diverged net the direction may be NaN, and 0 * NaN is NaN
            weight.grad = None if done else torch.where(rate > 0, -rate * direction, 0)
        return lowest / self.zero_loss
