"""Training of diffusion and flow models; what a paper changes is one of the components."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from callbacks.rng import make_generator, seed_for
from lightning_modules.diffusion.average import WeightAverage
from lightning_modules.diffusion.couplings import Coupling, Independent
from lightning_modules.diffusion.evaluation import SampleEvaluation, write_samples
from lightning_modules.diffusion.learned_variance import variance_bound
from lightning_modules.diffusion.parameterization import (
    Denoiser,
    Kind,
    Preconditioner,
    Prediction,
    mean_square,
    target,
)
from lightning_modules.diffusion.probe import QuarterLosses, probe_draws
from lightning_modules.diffusion.processes import Process
from lightning_modules.diffusion.times import TimeSampler
from lightning_modules.diffusion.weighting import Mean, Weighting
from lightning_modules.networks.conditioning import drop_labels

SUMS = ("train/loss", "train/mse", "coupling/distance", "coupling/distance_permuted", "coupling/noise_power")
"""Means over the epoch. Permuted: images with the noise of their neighbours; power: mean square of the noise."""


class DiffusionModule(L.LightningModule):
    """One network, one process, one loss. Batches are dicts with `image` in [-1, 1], `label` and `index`.

    A network with twice the channels of the images predicts its variance too; the bound of `learned_variance`, which
    trains that head alone, is added to the weighted errors. A batch may bring its `pairs` (`callbacks.assign_ahead`).

    Logged: the means of `SUMS`; `coupling/reduction` of the pair distance; `probe/loss` and `probe/loss_q1` to `_q4`
    of the averaged weights on the last validation loader, unweighted, with independent noise, and `probe/loss_raw` of
    the trained ones; `fd/nfe<n>_step<k>`, the latest `fd/nfe<n>`, and
    `fd/feature_net`, the first bits of the hash of the net they were measured with.

    Args:
        net: makes the network (x, time, label[, extras]) -> like x; built with the run's seed on every rank.
        process: forward process.
        optimizer, scheduler: callables of the recipe; the scheduler steps with the optimizer.
        parameterization: what the network predicts, and what the loss compares.
        weighting: weights of the loss; None for constant.
        time_sampler: None for the process's own distribution.
        coupling: None for independent noise.
        aggregator: per-sample losses and u -> loss; None for the mean.
        preconditioner: None for the identity.
        extras: further inputs of the network, see `Denoiser`.
        encoder: applied to images before anything else, e.g. `PadAndPool`.
        num_classes: 0 for an unconditional model; the class of this number is the null label.
        label_dropout: share of labels replaced by the null label.
        ema_decay: of the averaged weights; min(decay, (1 + n) / (10 + n)) after n updates.
        evaluation: samples and FD-small; None for none.
        probe_images: only batches that start before this position of the held-out set are probed.
    """

    def __init__(
        self,
        net: Callable[[], nn.Module],
        process: Process,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        parameterization: Kind = "eps",
        weighting: Weighting | None = None,
        time_sampler: TimeSampler | None = None,
        coupling: Coupling | None = None,
        aggregator: nn.Module | None = None,
        preconditioner: Preconditioner | None = None,
        extras: nn.Module | None = None,
        encoder: nn.Module | None = None,
        num_classes: int = 0,
        label_dropout: float = 0.1,
        ema_decay: float = 0.9999,
        evaluation: SampleEvaluation | None = None,
        probe_images: int = 2000,
    ) -> None:
        super().__init__()
        self.save_hyperparameters("parameterization", "num_classes", "label_dropout", "ema_decay", "probe_images")
        self.process, self.optimizer, self.scheduler = process, optimizer, scheduler
        self.parameterization: Kind = parameterization
        self.num_classes, self.label_dropout, self.probe_images = num_classes, label_dropout, probe_images
        self.weighting, self.aggregator = weighting or Weighting(), aggregator or Mean()
        self.time_sampler, self.coupling = time_sampler or TimeSampler(), coupling or Independent()
        self.preconditioner, self.extras = preconditioner or Preconditioner(), extras
        self.encoder = encoder or nn.Identity()
        self.evaluation = evaluation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for("weights/net"))
            self.net = net()
        self.average = WeightAverage(self.net, ema_decay)
        self.distances: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        """Generators of the step: ranks differ, but for noise that all ranks must share."""
        device, rank = self.trainer.strategy.root_device, self.global_rank
        noise_rank = 0 if self.coupling.shared_noise else rank
        self.time_generator = make_generator("time", rank=rank, device=device)
        self.noise_generator = make_generator("noise", rank=noise_rank, device=device)
        self.label_generator = make_generator("label_drop", rank=rank, device=device)

    def on_train_start(self) -> None:
        """Tells the time sampler the budget, and looks whether FD can be measured with these data."""
        self.time_sampler.start(self.process, self.trainer.estimated_stepping_batches)
        self.average.start(self.net)
        self._steps = self.trainer.global_step
        if self.evaluation is not None and self.evaluation.steps:
            self.evaluation.check(self.trainer.datamodule)  # type: ignore[attr-defined]

    def on_train_epoch_start(self) -> None:
        """Starts the sums of this epoch; the last one counts images."""
        self._sums = torch.zeros(len(SUMS) + 1, device=self.device)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Couples, draws times, weighs."""
        with torch.no_grad():
            data = self.encoder(batch["image"])
            self.image_shape = tuple(data.shape[1:])
            noise, rows = batch["pairs"] if "pairs" in batch else self.coupling(data, self.noise_generator)
            label = self._dropped(batch)
            if rows is not None:
                data, label = data[rows], None if label is None else label[rows]
            time, importance = self.time_sampler(len(data), self.process, self.time_generator)
        prediction = self._predict(self.net, data, noise, time, label)
        errors = self._errors(prediction, data, noise)
        weighted = errors * self.weighting(self.process, self.parameterization, time).to(errors)
        if prediction.spread is not None:
            weighted = weighted + variance_bound(self.process, prediction, data)
        self.time_sampler.observe(self.process, time, weighted.detach())
        loss = self.aggregator(weighted * importance.to(errors), self.process.unit(time))
        self._add(loss.detach(), errors.detach(), data, noise)
        return {"loss": loss}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an optimizer step: average, time sampler, FD at its steps."""
        if self.trainer.global_step == self._steps:
            return
        self.average.update(self._steps)
        self._steps = self.trainer.global_step
        self.time_sampler.step(self._steps)
        if self.evaluation is not None and self._steps in self.evaluation.steps:
            self._measure(self.evaluation)

    def on_train_epoch_end(self) -> None:
        """Logs the epoch's means, the sampler's progress and all FD so far."""
        sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        means = dict(zip(SUMS, sums[:-1] / sums[-1], strict=True))
        self.log_dict(means, prog_bar=True)
        self.log("coupling/reduction", 1 - means["coupling/distance"] / means["coupling/distance_permuted"])
        self.log_dict(self.time_sampler.progress())
        self.log_dict({name: value.float() for name, value in self.distances.items()})

    def on_validation_epoch_start(self) -> None:
        """Starts the probe."""
        self._probes = {"": QuarterLosses(self.device), "_raw": QuarterLosses(self.device)}

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Probes the last loader, which by convention holds test images."""
        last = len(self.trainer.val_dataloaders) - 1 if isinstance(self.trainer.val_dataloaders, list) else 0
        if dataloader_idx == last:
            self._probe(batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the probe."""
        self.log_dict({f"probe/{name}": value.float() for name, value in self._probes[""].means().items()})
        self.log("probe/loss_raw", self._probes["_raw"].means()["loss"].float())

    def on_test_epoch_start(self) -> None:
        """Starts the probe."""
        self.on_validation_epoch_start()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """As in validation."""
        self._probe(batch)

    def on_test_epoch_end(self) -> None:
        """Logs the probe."""
        self.on_validation_epoch_end()

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Samples of the averaged weights with the first number of evaluations, into `trainer.default_root_dir`."""
        if batch_idx or dataloader_idx or not self.trainer.is_global_zero:
            return
        if self.evaluation is None:
            raise ValueError("model.evaluation is missing; predict needs its sampler")
        shape = tuple(self.encoder(batch["image"]).shape[1:])
        nfe, count = self.evaluation.nfes[0], 10 * max(self.num_classes, 10)
        samples = self.evaluation.sample(self.denoiser(), shape, self.num_classes, nfe, count=count)
        write_samples(samples, Path(self.trainer.default_root_dir))

    def configure_optimizers(self) -> Any:
        """The network's parameters; an aggregator with parameters adds a group with its own rate, without decay."""
        groups: list[dict[str, Any]] = [{"params": [p for p in self.net.parameters() if p.requires_grad]}]
        if learned := [*self.aggregator.parameters()]:
            groups.append({"params": learned, "lr": self.aggregator.lr, "weight_decay": 0.0})
        optimizer = self.optimizer(groups)
        if self.scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """FD measured so far."""
        checkpoint["distances"] = dict(self.distances)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes them back."""
        self.distances = dict(checkpoint["distances"])

    def denoiser(self, label: Tensor | None = None) -> Denoiser:
        """The averaged weights, ready to sample."""
        net = self.average.module.eval()
        return Denoiser(net, self.process, self.parameterization, self.preconditioner, label, self.extras)

    def _predict(self, net: nn.Module, data: Tensor, noise: Tensor, time: Tensor, label: Tensor | None) -> Prediction:
        """Of the network at these times."""
        denoiser = Denoiser(net, self.process, self.parameterization, self.preconditioner, label, self.extras)
        return denoiser(self.process.marginal(data, noise, time), time)

    def _errors(self, prediction: Prediction, data: Tensor, noise: Tensor) -> Tensor:
        """(B,) mean squared errors of the parameterisation."""
        wanted = target(self.parameterization, self.process, data, noise, prediction.time)
        return mean_square(prediction.output, wanted)

    def _dropped(self, batch: dict[str, Any]) -> Tensor | None:
        if not self.num_classes:
            return None
        return drop_labels(batch["label"], self.num_classes, self.label_dropout, self.label_generator)

    def _add(self, loss: Tensor, errors: Tensor, data: Tensor, noise: Tensor) -> None:
        """Sums of `SUMS` over images."""
        distance, permuted = (
            torch.linalg.vector_norm((data - other).flatten(1), dim=1).mean() for other in (noise, noise.roll(1, 0))
        )
        values = [loss, errors.mean(), distance, permuted, noise.square().mean(), torch.ones_like(loss)]
        self._sums.add_(torch.stack([value.to(self._sums) for value in values]), alpha=len(data))

    @torch.no_grad()
    def _probe(self, batch: dict[str, Any]) -> None:
        first = int(batch["index"][0])
        if first >= self.probe_images:
            return
        data = self.encoder(batch["image"])
        mass, time, noise = probe_draws(self.process, data, first)
        label = batch["label"] if self.num_classes else None
        for name, net in (("", self.average.module), ("_raw", self.net)):
            self._probes[name].add(mass, self._errors(self._predict(net, data, noise, time, label), data, noise))

    def _measure(self, evaluation: SampleEvaluation) -> None:
        """FD of the averaged weights at this step."""
        digest = evaluation.prepare(self.trainer.datamodule, self.encoder)  # type: ignore[attr-defined]
        part = {"rank": self.global_rank, "world_size": self.trainer.world_size}
        found = evaluation.distances(self.denoiser(), self.image_shape, self.num_classes, **part)
        self.distances |= found | {f"{name}_step{self._steps}": value for name, value in found.items()}
        # 24 bits are exact in float32: records show whether two values were measured with the same net
        self.distances["fd/feature_net"] = torch.tensor(float(int(digest[:6], 16)))
