"""Consistency training (arXiv 2303.01469): one network maps every point of a noisy path to its clean end.

f(x, t) is trained to agree at two neighbouring noise levels of the same image and the same noise z; the lower level is
seen by a slowly following copy of the net. The levels get finer during training. No teacher, no LPIPS.

Legend: B batch, N levels, k optimizer steps done, K all of them; levels are counted from 0, the least noise.
Official code: openai/consistency_models and openai/consistency_models_cifar10.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_modules.diffusion.average import WeightAverage
from lightning_modules.diffusion.couplings import Coupling
from lightning_modules.diffusion.evaluation import SampleEvaluation
from lightning_modules.diffusion.module import DiffusionModule
from lightning_modules.diffusion.parameterization import Denoiser, Preconditioner, mean_square
from lightning_modules.diffusion.probe import probe_draws
from lightning_modules.diffusion.processes import EDM, Process, along
from lightning_modules.diffusion.samplers import Sampler

Loss = Literal["l2", "huber"]


def boundary_coefficients(
    sigma: Tensor, sigma_min: Tensor | float, sigma_data: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in of f(x, sigma) = c_skip x + c_out F(c_in x); f(x, sigma_min) = x exactly.

    Args:
        sigma: any shape, float64, standard deviations of the noise.
        sigma_min: the least level.
        sigma_data: standard deviation of the data.

    Returns:
        Each of the shape of `sigma`.

    Source: arXiv 2303.01469, appendix C; c_in from the official code, `get_scalings_for_boundary_condition`.
    """
    above, total = sigma - sigma_min, (sigma**2 + sigma_data**2).sqrt()
    return sigma_data**2 / (above**2 + sigma_data**2), sigma_data * above / total, 1 / total


def num_levels(step: int, total: float, first: int = 2, last: int = 150) -> int:
    """N(k) = max(1, ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1)) + 1, from s0 to s1 + 1.

    Args:
        step: k, 0 .. K.
        total: K.
        first, last: s0 and s1.

    Source: arXiv 2303.01469, section 6.1; the maximum from the official code.
    """
    square = step / total * ((last + 1) ** 2 - first**2) + first**2
    return max(1, math.ceil(math.sqrt(square) - 1)) + 1


def following_decay(num: int, first: int = 2, initial: float = 0.9) -> float:
    """mu = mu0^(s0 / (N - 1)): how much of the target network stays in an update; 0 copies.

    Args:
        num: N.
        first: s0.
        initial: mu0.

    Source: official code, `create_ema_and_scales_fn`. The paper has N instead of N - 1 in the exponent.
    """
    return initial ** (first / (num - 1))


def level_times(level: Tensor, num: int) -> Tensor:
    """Unit times n / (N - 1), float64, of levels n; `EDM.sigma` makes Karras's grid of them.

    sigma_n = (sigma_min^(1/rho) + n / (N - 1) (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho, n = 0 .. N - 1.

    Source: arXiv 2303.01469, section 5 (there n = 1 .. N).
    """
    return level.double() / (num - 1)


def pseudo_huber(output: Tensor, wanted: Tensor, scale: float = 0.00054) -> Tensor:
    """(B,) sqrt(||d||^2 + c^2) - c with d = output - wanted, c = scale sqrt(D), D numbers in an image; >= float32.

    Source: arXiv 2310.14189, section 3.3.
    """
    wide = torch.promote_types(output.dtype, torch.float32)
    square = (output.to(wide) - wanted.to(wide)).square().flatten(1)
    c = scale * math.sqrt(square.shape[1])
    return (square.sum(1) + c**2).sqrt() - c


class ConsistencyEDM(EDM):
    """`EDM`, but the network sees 250 ln sigma, as in the official code, which suits the nets' time features.

    Args:
        sigma_min, sigma_max, rho: see `EDM`.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        super().__init__(sigma_min, sigma_max, rho)

    def net_time(self, time: Tensor) -> Tensor:
        """1000 ln(sigma) / 4."""
        return 1000 * super().net_time(time)


class BoundaryPreconditioner(Preconditioner):
    """The parameterisation of `boundary_coefficients`; the least level is u = 0 of the process.

    Args:
        sigma_data: standard deviation of the data.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.sigma_data = sigma_data

    def scale_input(self, process: Process, x: Tensor, time: Tensor) -> Tensor:
        """c_in x."""
        return along(self._coefficients(process, time)[2], x) * x

    def wrap_output(self, process: Process, x: Tensor, output: Tensor, time: Tensor) -> Tensor:
        """c_skip x + c_out F."""
        c_skip, c_out, _ = self._coefficients(process, time)
        return along(c_skip, x) * x + along(c_out, x) * output

    def _coefficients(self, process: Process, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # sigma(0) and not sigma_min: rho-th root and power do not cancel to the last bit
        return boundary_coefficients(process.sigma(time), process.sigma(torch.zeros_like(time)), self.sigma_data)


class ConsistencySampler(Sampler):
    """Maps to the clean end, adds fresh noise up to the next level of the grid, and again; one step needs no noise.

    With the default grid the levels of n evaluations are u = 1, (n - 1) / n, ..., 1 / n; the official code searches for
    better ones.

    Args:
        clip: clamp the clean ends to [-1, 1], as the official code does.

    Source: arXiv 2303.01469, Algorithm 1.
    """

    def __init__(self, clip: bool = True) -> None:
        self.clip = clip

    def step(
        self, denoiser: Denoiser, x: Tensor, time: Tensor, after: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """As in `Sampler`."""
        process = denoiser.process
        clean = denoiser(x, time).x0
        clean = clean.clamp(-1, 1) if self.clip else clean
        least = process.sigma(torch.zeros_like(after))
        if process.sigma(after) <= least:
            return clean
        if generator is None:
            raise ValueError("ConsistencySampler adds noise between its steps and needs a generator")
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return clean + (process.sigma(after) ** 2 - least**2).sqrt().to(x) * noise


class TargetNet(WeightAverage):
    """Copy of the net that follows it with a decay given at each update."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, 0.0)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """target <- decay target + (1 - decay) net; buffers are copied."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        for old, new in self._copied:
            old.copy_(new)


class ConsistencyModule(DiffusionModule):
    """Consistency training of one network, sampled with `ConsistencySampler` and the averaged weights.

    The coupling chooses z for each image once; both levels use it. Lower levels are drawn uniformly from 0 .. N(k) - 2.
    The net's dropout, if any, is not shared by the two levels (the official code's is; its recipes have none).

    Logged as by `DiffusionModule`, with these meanings: `train/mse` is the mean square of the difference of the two
    levels; `probe/loss` and its quarters are the same on held-out images at the finest grid, N = s1 + 1, with
    independent noise and the averaged weights at both levels (`probe/loss_raw`: the trained ones); in addition
    `consistency/levels` and `consistency/target_decay` of the last step.

    Args:
        net, process, optimizer, scheduler, coupling, encoder, num_classes, label_dropout, ema_decay, evaluation,
            probe_images: see `DiffusionModule`; the process is an `EDM`.
        parameterization: only x0: the output of f.
        sigma_data: see `boundary_coefficients`.
        loss: l2, mean over the pixels; or huber, see `pseudo_huber`. Levels weigh the same.
        first_levels, last_levels: s0 and s1 of `num_levels`; K is the Trainer's budget.
        target_decay: mu0 of `following_decay`.

    Source: arXiv 2303.01469, Algorithm 3.
    """

    def __init__(
        self,
        net: Callable[[], nn.Module],
        process: Process,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        parameterization: Literal["x0"] = "x0",
        coupling: Coupling | None = None,
        encoder: nn.Module | None = None,
        num_classes: int = 0,
        label_dropout: float = 0.1,
        ema_decay: float = 0.9999,
        evaluation: SampleEvaluation | None = None,
        probe_images: int = 2000,
        sigma_data: float = 0.5,
        loss: Loss = "l2",
        first_levels: int = 2,
        last_levels: int = 150,
        target_decay: float = 0.9,
    ) -> None:
        if not isinstance(process, EDM):
            raise ValueError(f"model.process must be an EDM for consistency training, got {type(process).__name__}")
        if loss not in get_args(Loss):
            raise ValueError(f"model.loss must be one of {', '.join(get_args(Loss))}, got {loss!r}")
        if not 2 <= first_levels <= last_levels:
            raise ValueError(
                f"model.first_levels must be at least 2 and at most last_levels, got {first_levels} and {last_levels}"
            )
        if not 0 <= target_decay < 1:
            raise ValueError(f"model.target_decay must be in [0, 1), got {target_decay}")
        super().__init__(
            net,
            process,
            optimizer,
            scheduler,
            parameterization,
            coupling=coupling,
            preconditioner=BoundaryPreconditioner(sigma_data),
            encoder=encoder,
            num_classes=num_classes,
            label_dropout=label_dropout,
            ema_decay=ema_decay,
            evaluation=evaluation,
            probe_images=probe_images,
        )
        self.loss: Loss = loss
        self.first_levels, self.last_levels, self.target_decay = first_levels, last_levels, target_decay
        self.target = TargetNet(self.net)

    def on_train_start(self) -> None:
        """Looks at the budget."""
        super().on_train_start()
        self.target.start(self.net)
        self._total = self.trainer.estimated_stepping_batches
        if math.isinf(self._total):
            raise ValueError("consistency training needs a budget of steps: trainer.max_steps or max_epochs, got none")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Couples, draws neighbouring levels, compares."""
        with torch.no_grad():
            data = self.encoder(batch["image"])
            self.image_shape = tuple(data.shape[1:])
            noise, rows = batch["pairs"] if "pairs" in batch else self.coupling(data, self.noise_generator)
            label = self._dropped(batch)
            if rows is not None:
                data, label = data[rows], None if label is None else label[rows]
            num = self._num_levels()
            device = self.time_generator.device
            lower = torch.randint(num - 1, (len(data),), generator=self.time_generator, device=device)
        output, wanted = self._neighbours(self.net, self.target.module, data, noise, lower, num, label)
        errors = mean_square(output, wanted)
        loss = (errors if self.loss == "l2" else pseudo_huber(output, wanted)).mean()
        self._add(loss.detach(), errors.detach(), data, noise)
        return {"loss": loss}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an optimizer step the target follows, with the decay of the step just done."""
        if self.trainer.global_step != self._steps:
            self.target.follow(self._decay())
        super().on_train_batch_end(outputs, batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        """Logs the schedules too."""
        super().on_train_epoch_end()
        self.log("consistency/levels", float(self._num_levels()))
        self.log("consistency/target_decay", self._decay())

    def _num_levels(self) -> int:
        return num_levels(self._steps, self._total, self.first_levels, self.last_levels)

    def _decay(self) -> float:
        return following_decay(self._num_levels(), self.first_levels, self.target_decay)

    def _neighbours(
        self,
        net: nn.Module,
        target: nn.Module,
        data: Tensor,
        noise: Tensor,
        lower: Tensor,
        num: int,
        label: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """f of the net one level above `lower`, and of the target at `lower`, without gradients."""
        output = self._predict(net, data, noise, level_times(lower + 1, num), label).x0
        with torch.no_grad():
            wanted = self._predict(target, data, noise, level_times(lower, num), label).x0
        return output, wanted

    @torch.no_grad()
    def _probe(self, batch: dict[str, Any]) -> None:
        first, num = int(batch["index"][0]), self.last_levels + 1
        if first >= self.probe_images:
            return
        data = self.encoder(batch["image"])
        mass, _, noise = probe_draws(self.process, data, first)
        lower = (mass * (num - 1)).long().clamp(max=num - 2)
        label = batch["label"] if self.num_classes else None
        for name, net in (("", self.average.module), ("_raw", self.net)):
            errors = mean_square(*self._neighbours(net, net, data, noise, lower, num, label))
            self._probes[name].add(mass, errors)
