"""ELR and ELR+: early-learning regularization against the memorization of noisy labels (arXiv 2007.00151).

Legend: B batch, C classes. Where paper and official code (shengliu66/ELR) differ, the code decides.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from numpy.random import RandomState
from torch import Tensor, nn

from callbacks.rng import make_generator, seed_for
from lightning_modules.noisy_labels.targets import NoisyLabelModule
from lightning_modules.sharding import shard

EPS = 1e-4
"""Clamp of the probabilities: official code; the paper has none."""


def elr_targets(rows: Tensor, logits: Tensor, beta: float, eps: float = EPS) -> Tensor:
    r"""Temporal ensembling of the targets: t <- beta t + (1 - beta) q / sum(q), q = clamp(softmax(z), eps, 1 - eps).

    Args:
        rows: (B, C) float targets of these examples; zeros before their first visit, there is no bias correction.
        logits: (B, C) float.
        beta: momentum per visit, i.e. per epoch; 0 takes the prediction itself.
        eps: clamp of the probabilities.

    Returns:
        (B, C) new rows in the dtype of `rows`, detached.

    Raises:
        ValueError: shapes disagree, e.g. a net with another number of classes than the data.

    Source: arXiv 2007.00151 (temporal ensembling of the targets); clamp and normalisation from the official code.
    """
    _same_shape(logits, rows)
    probabilities = _wide(logits.detach()).softmax(1).clamp(eps, 1 - eps)
    return (beta * rows + (1 - beta) * probabilities / probabilities.sum(1, keepdim=True)).to(rows.dtype)


def elr_regularizer(logits: Tensor, targets: Tensor, eps: float = EPS) -> Tensor:
    r"""Mean over the batch of log(1 - <q, t>), q = clamp(softmax(z), eps, 1 - eps), not normalised again.

    Args:
        logits: (B, C) float; computed in float32 or wider.
        targets: (B, C) float, already updated; no gradient flows into them.
        eps: clamp of the probabilities; its gradient is 0 outside.

    Returns:
        Scalar in nats, negative.

    Source: arXiv 2007.00151.
    """
    _same_shape(logits, targets)
    probabilities = _wide(logits).softmax(1).clamp(eps, 1 - eps)
    return (1 - (probabilities * targets.detach()).sum(1)).log().mean()


def elr_loss(logits: Tensor, labels: Tensor, targets: Tensor, lam: float, eps: float = EPS) -> Tensor:
    r"""Cross entropy plus the early-learning regulariser.

    Args:
        logits: (B, C) float; computed in float32 or wider.
        labels: (B,) int64, the given (noisy) classes.
        targets: (B, C) float targets of these examples, updated before the loss.
        lam: weight of the regulariser (paper: lambda); 0 gives cross entropy.
        eps: clamp of the probabilities.

    Returns:
        Scalar loss in nats, mean over the batch. Negative values are correct.

    Raises:
        ValueError: shapes disagree.

    Source: arXiv 2007.00151; clamp from the official code.
    """
    return F.cross_entropy(_wide(logits), labels) + lam * elr_regularizer(logits, targets, eps)


def kl_regularizer(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -sum_c t_c log softmax(z)_c, the regulariser that does not prevent memorization (Appendix C)."""
    return soft_cross_entropy(logits, targets.detach())


def mixup(values: Tensor, weight: float, permutation: Tensor) -> Tensor:
    """weight * values + (1 - weight) * values[permutation]; (B, ...) float, permutation (B,) int64."""
    return weight * values + (1 - weight) * values[permutation]


def elr_plus_targets(rows: Tensor, ema_logits: Tensor, beta: float) -> Tensor:
    """Targets of ELR+: as `elr_targets`, from the other net's weight average and without a clamp. All (B, C)."""
    return elr_targets(rows, ema_logits, beta, eps=0.0)


def reweighted_labels(soft_labels: Tensor, mixed_targets: Tensor) -> Tensor:
    """Mixed labels y weighted by the targets q, y q / sum(y q): the official code's rule for CIFAR-100. All (B, C)."""
    product = soft_labels * mixed_targets
    # an example whose targets vanish on both of its labels keeps a zero row instead of 0 / 0
    return product / product.sum(1, keepdim=True).clamp_min(torch.finfo(product.dtype).tiny)


def soft_cross_entropy(logits: Tensor, soft_labels: Tensor) -> Tensor:
    """Mean of -sum_c y_c log softmax(z)_c in nats; (B, C) both, computed in float32 or wider."""
    _same_shape(logits, soft_labels)
    return -(soft_labels * _wide(logits).log_softmax(1)).sum(1).mean()


def elr_plus_loss(
    logits: Tensor, soft_labels: Tensor, mixed_targets: Tensor, lam: float, label_reweight: bool = False
) -> Tensor:
    r"""Soft cross entropy plus lam * mean log(1 - <q, clamp(softmax(z))>).

    Args:
        logits: (B, C) float, of the mixed images.
        soft_labels: (B, C) float, mixed one-hot noisy labels.
        mixed_targets: (B, C) float (q), the updated targets mixed like the images; no clamp, no gradient.
        lam: lambda times the ramp r(t).
        label_reweight: weight the labels by q first, see `reweighted_labels`.

    Returns:
        Scalar loss in nats.

    Source: official code `ELR_plus/model/loss.py`.
    """
    labels = reweighted_labels(soft_labels, mixed_targets.detach()) if label_reweight else soft_labels
    return soft_cross_entropy(logits, labels) + lam * elr_regularizer(logits, mixed_targets)


def sigmoid_ramp(step: float, length: float) -> float:
    """exp(-5 (1 - clip(step, 0, length) / length)^2), from 0.0067 to 1; 1 if length is 0. Source: official code."""
    if length == 0:
        return 1.0
    return math.exp(-5 * (1 - min(max(step, 0), length) / length) ** 2)


def ema_decay(step: int, cap: float, ramp_steps: int | None) -> float:
    """Decay a_t of the weight average after step t (1-based); shares of the old average.

    Args:
        step: t.
        cap: decay reached in the end.
        ramp_steps: cap * sigmoid_ramp(t + 1, ramp_steps); None takes min(1 - 1 / (t + 1), cap).

    Source: official code `ELR_plus/trainer`; CIFAR ramps over 40,000 steps, Clothing1M and WebVision use None.
    """
    if ramp_steps is None:
        return min(1 - 1 / (step + 1), cap)
    return cap * sigmoid_ramp(step + 1, ramp_steps)


def _wide(logits: Tensor) -> Tensor:
    """bf16 and fp16 round 1 - 1e-4 to 1, and log(0) appears: at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _same_shape(logits: Tensor, targets: Tensor) -> None:
    if logits.shape != targets.shape:
        raise ValueError(f"targets must have the shape of logits {tuple(logits.shape)}, got {tuple(targets.shape)}")


class ELR(NoisyLabelModule):
    """One net trained with cross entropy plus the early-learning regulariser.

    Args:
        net: makes the classifier, images (B, ...) -> logits (B, C); built with the run's seed on every rank.
        optimizer, scheduler: callables of the recipe; the scheduler steps once an epoch.
        lam: weight of the regulariser (paper: lambda). 0 is cross entropy; targets are tracked all the same.
        beta: momentum of the targets per epoch.
        reg: `elr`, or `kl` for the regulariser of Appendix C.

    Source: arXiv 2007.00151; defaults are those of CIFAR-10 with symmetric noise.
    """

    def __init__(
        self,
        net: Callable[[], nn.Module],
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        lam: float = 3.0,
        beta: float = 0.7,
        reg: Literal["elr", "kl"] = "elr",
    ) -> None:
        super().__init__(optimizer, scheduler)
        _check_constants(lam, beta)
        self.save_hyperparameters("lam", "beta", "reg")
        self.lam, self.beta = lam, beta
        self.regularizer = elr_regularizer if reg == "elr" else kl_regularizer
        self.net = _build(net, "net")

    def configure_model(self) -> None:
        """Shards the net under FSDP2."""
        shard(self.net, self.device_mesh, precision=self.trainer.precision)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, C)."""
        return self.net(image)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Updates the targets of the batch, then takes the loss."""
        logits, index = self.net(batch["image"]), batch["index"]
        rows = elr_targets(self.targets[0, index], logits, self.beta)
        self.update_targets(0, index, rows)
        cross_entropy = F.cross_entropy(_wide(logits), batch["label"])
        regularizer = self.regularizer(logits, rows)
        loss = cross_entropy + self.lam * regularizer
        self.add_losses(loss, cross_entropy, regularizer, len(index))
        return {"loss": loss, "logits": logits}


class ELRPlus(NoisyLabelModule):
    """ELR+: two nets, each trained for a full pass per epoch against targets made by the other one's weight average.

    The two passes come from the data (`data.passes: 2`, `pass` in the batch). One optimizer holds both nets; a net
    without gradients in this pass is left alone by it. `training_step` returns as `logits` those of the weight average
    on the un-mixed images. Under DDP set `find_unused_parameters`.

    Args:
        net, optimizer, scheduler, lam, beta: as in `ELR`.
        mixup_alpha: both parameters of the Beta distribution; 0 turns mixup off.
        coef_step: length in steps of the ramp of lam; 0 for none.
        ema_decay: final decay of the weight averages (parameters only; their batch-norm statistics are their own).
        ema_ramp_steps: ramp of the decay; None for 1 - 1 / (t + 1) up to `ema_decay`.
        label_reweight: as in `elr_plus_loss`; the official code has it for CIFAR-100.
        two_nets: False trains one net against its own average (`data.passes: 1`).
        ema: False takes the targets from the trained net itself.
        eval_pair: average of the logits of both trained nets, or (official two-GPU mode) net 1 and the average of the
            last net.

    Source: arXiv 2007.00151 and official code `ELR_plus`; defaults are those of CIFAR-10.
    """

    def __init__(
        self,
        net: Callable[[], nn.Module],
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        lam: float = 3.0,
        beta: float = 0.7,
        mixup_alpha: float = 1.0,
        coef_step: int = 0,
        ema_decay: float = 0.997,
        ema_ramp_steps: int | None = 40000,
        label_reweight: bool = False,
        two_nets: bool = True,
        ema: bool = True,
        eval_pair: Literal["raw", "raw_ema"] = "raw",
    ) -> None:
        super().__init__(optimizer, scheduler)
        _check_constants(lam, beta)
        self.save_hyperparameters(ignore=["net", "optimizer", "scheduler"])
        if mixup_alpha < 0:
            raise ValueError(f"model.mixup_alpha must not be negative, got {mixup_alpha}")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"model.ema_decay must be in [0, 1), got {ema_decay}")
        if eval_pair == "raw_ema" and not ema:
            raise ValueError("model.eval_pair raw_ema needs model.ema true")
        self.num_passes = 2 if two_nets else 1
        self.nets = nn.ModuleList(_build(net, f"net/{k}") for k in range(self.num_passes))
        # as in the official code the averages start from weights of their own; the first decay is about 0.007
        averages = [_build(net, f"average/{k}").requires_grad_(False) for k in range(self.num_passes if ema else 0)]
        self.averages = nn.ModuleList(averages)

    def configure_model(self) -> None:
        """Shards nets and averages under FSDP2."""
        for net in (*self.nets, *self.averages):
            shard(net, self.device_mesh, precision=self.trainer.precision)

    def setup(self, stage: str) -> None:
        """Adds the generator of mixup: a draw of the step, so ranks differ."""
        super().setup(stage)
        self.mixup_generator = make_generator("mixup", rank=self.global_rank)

    def forward(self, image: Tensor) -> Tensor:
        """Mean logits (B, C) of the evaluated pair."""
        raw = self.hparams["eval_pair"] == "raw"
        pair = self.nets if raw else [self.nets[0], self.averages[-1]]
        return sum(net(image) for net in pair) / len(pair)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """One step of net k: its targets come from the other net's average, in train mode."""
        which, hparams = self._pass_of(batch), self.hparams
        image, index = batch["image"], batch["index"]
        with torch.no_grad():
            teacher_logits = (self.averages if hparams["ema"] else self.nets)[-1 - which](image)
        rows = elr_plus_targets(self.targets[which, index], teacher_logits, hparams["beta"])
        self.update_targets(which, index, rows)
        weight, permutation = self._draw_mixup(len(index))
        mixed_targets = mixup(rows, weight, permutation)
        labels = mixup(F.one_hot(batch["label"], rows.shape[1]).to(rows.dtype), weight, permutation)
        if hparams["label_reweight"]:
            labels = reweighted_labels(labels, mixed_targets)
        logits = self.nets[which](mixup(image, weight, permutation))
        lam = hparams["lam"] * sigmoid_ramp(self._step_of(batch_idx), hparams["coef_step"])
        cross_entropy = soft_cross_entropy(logits, labels)
        regularizer = elr_regularizer(logits, mixed_targets)
        loss = cross_entropy + lam * regularizer
        self.add_losses(loss, cross_entropy, regularizer, len(index))
        return {"loss": loss, "logits": teacher_logits}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Moves the weight average of the net that has just stepped."""
        if not self.hparams["ema"]:
            return
        which, hparams = self._pass_of(batch), self.hparams
        decay = ema_decay(self._step_of(batch_idx), hparams["ema_decay"], hparams["ema_ramp_steps"])
        with torch.no_grad():
            average, net = ([*nets[which].parameters()] for nets in (self.averages, self.nets))
            torch._foreach_lerp_(average, net, 1 - decay)  # type: ignore[arg-type]

    def _pass_of(self, batch: dict[str, Any]) -> int:
        return int(batch.get("pass", 0))

    def _step_of(self, batch_idx: int) -> int:
        """t: steps of one net so far, 1-based; both nets see the same t."""
        steps = max(1, int(self.trainer.num_training_batches) // self.num_passes)
        return self.current_epoch * steps + batch_idx % steps + 1

    def _draw_mixup(self, count: int) -> tuple[float, Tensor]:
        """One weight max(l, 1 - l), l ~ Beta(alpha, alpha), and one permutation per batch."""
        alpha, generator = self.hparams["mixup_alpha"], self.mixup_generator
        if alpha == 0:
            return 1.0, torch.arange(count, device=self.device)
        seed = int(torch.randint(2**31, (), generator=generator))
        weight = RandomState(seed).beta(alpha, alpha)
        return max(weight, 1 - weight), torch.randperm(count, generator=generator).to(self.device, non_blocking=True)


def _build(net: Callable[[], nn.Module], name: str) -> nn.Module:
    """Initial weights are a function of (seed, name): equal on all ranks and in treatment and control."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(f"weights/{name}"))
        return net()


def _check_constants(lam: float, beta: float) -> None:
    if lam < 0:
        raise ValueError(f"model.lam must not be negative, got {lam}")
    if not 0 <= beta < 1:
        raise ValueError(f"model.beta must be in [0, 1), got {beta}")
