"""N:M sparsity trained with progressive gradient flow: mask decay and structure decay (arXiv 2402.04744), and the
baselines dense, STE and SR-STE (arXiv 2102.04010).

Legend: B batch, C classes, K frames. Official code: abhibambhaniya/progressive_gradient_flow_nm_sparsity. The weights
are in `networks/nm_sparse.py`.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from numpy.random import RandomState
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from callbacks.rng import make_generator, seed_for
from lightning_modules.networks.evaluation import ClassifierMetrics
from lightning_modules.networks.nm_sparse import Axis, Gradient, check_pattern, dense_weight, sparse_layers, sparsify
from lightning_modules.sharding import shard

Method = Literal["dense", "ste", "srste", "mdgf_linear", "mdgf_exp", "sdgf_step", "sdgf_geo"]
GEOMETRIC_FRAMES = 4
"""Official code; its comments and the paper have other numbers."""
CUT = 1e-3
"""A share b below which pruned weights could be left out: the second count of training FLOPs."""


def mask_decay(kind: Literal["linear", "exp"], step: int, coef: float) -> float:
    """b, the share of a pruned weight that counts: max(0, 1 - c j) or exp(-c j), j steps after sparsification began.

    Source: arXiv 2402.04744, MDGF; official code `LinearDecay`, `ExponentialDecay`.
    """
    return max(0.0, 1 - coef * step) if kind == "linear" else math.exp(-coef * step)


def structure_frames(
    kind: Literal["step", "geo"], n: int, m: int, start: int, length: float
) -> list[tuple[int, int, int]]:
    r"""(first step, N, M) of each frame of structure decay; frame i begins at start + int(i length / K).

    `step`: M-1, M/2, M/4, ..., N of M, K = log2(M / N) + 1. `geo`: 8N:8M, 4N:4M, 2N:2M, N:M: the same density in ever
    smaller groups.

    Args:
        kind: see above.
        n, m: the final pattern.
        start, length: of the decay, in steps or epochs.

    Raises:
        ValueError: `step` where M / N is not a power of two: its last frame would not be N:M.

    Source: official code, `sparsify` and `fine`.
    """
    if kind == "geo":
        scales = [2**i for i in reversed(range(GEOMETRIC_FRAMES))]
        patterns = [(n * scale, m * scale) for scale in scales]
    else:
        halvings = round(math.log2(m / n))
        if n * 2**halvings != m:
            raise ValueError(f"model.method sdgf_step needs an m / n that is a power of two, got {n}:{m}")
        patterns = [(m - 1, m), *((m // 2**i, m) for i in range(1, halvings + 1))]
    return [(start + int(i * length / len(patterns)), *pattern) for i, pattern in enumerate(patterns)]


@dataclass(frozen=True)
class Phase:
    """What a step does with sparse weights.

    Args:
        n, m: pattern.
        decay: b.
        lam: pull of pruned weights to 0.
        dense: no mask at all.
    """

    n: int
    m: int
    decay: float = 0.0
    lam: float = 0.0
    dense: bool = False

    def density(self, cut: float = 0.0) -> float:
        """r_t, the share of weights that take part in the forward pass; b of no more than `cut` counts as 0."""
        return 1.0 if self.dense or self.decay > cut else self.n / self.m


@dataclass(frozen=True)
class Schedule:
    """Phase of each step, a pure function of the step.

    The first part is dense for all methods, in the last b is 0 and the pattern final; between lie S steps.

    Args:
        method: see `NMSparsity`.
        n, m: the final pattern.
        total: steps of the run.
        dense, fine_tune: steps of the first and the last part.
        decay_rate: c in units of 1 / S.
        sparsify_frac: share of S over which structure frames are spread.
        lam: see `sparse_weight`.
    """

    method: Method
    n: int
    m: int
    total: int
    dense: int
    fine_tune: int
    decay_rate: float = 8.0
    sparsify_frac: float = 1.0
    lam: float = 2e-4

    @property
    def span(self) -> int:
        """S, at least 1."""
        return max(1, self.total - self.dense - self.fine_tune)

    def at(self, step: int) -> Phase:
        """Phase of optimizer step `step`, counted from 0."""
        if self.method == "dense" or step < self.dense:
            return Phase(self.n, self.m, dense=True)
        if step >= self.total - self.fine_tune or self.method in ("ste", "srste"):
            return Phase(self.n, self.m, lam=self.lam if self.method == "srste" else 0.0)
        if self.method == "mdgf_linear" or self.method == "mdgf_exp":
            kind: Literal["linear", "exp"] = "linear" if self.method == "mdgf_linear" else "exp"
            return Phase(self.n, self.m, mask_decay(kind, step - self.dense, self.decay_rate / self.span))
        n, m = [frame[1:] for frame in self.frames() if frame[0] <= step][-1]
        return Phase(n, m)

    def frames(self) -> list[tuple[int, int, int]]:
        """Structure frames of SDGF; the final pattern alone for the others."""
        if self.method not in ("sdgf_step", "sdgf_geo"):
            return [(0, self.n, self.m)]
        kind: Literal["step", "geo"] = "step" if self.method == "sdgf_step" else "geo"
        return structure_frames(kind, self.n, self.m, self.dense, self.sparsify_frac * self.span)


def step_cost(share: float, density: float) -> float:
    r"""Ideal FLOPs of a training step as a part of a dense one: 1 - s + s (2 r + 1) / 3.

    Forward and the gradient of the inputs use the sparse weight, the gradient of the weight is dense.

    Args:
        share: s, share of the sparse layers in the forward multiply-adds.
        density: r.

    Source: own count; the official code has none.
    """
    return 1 - share + share * (2 * density + 1) / 3


def inference_cost(share: float, density: float) -> float:
    """Ideal FLOPs of a forward pass as a part of a dense one: 1 - s (1 - r); arguments as in `step_cost`."""
    return 1 - share * (1 - density)


def training_cost(schedule: Schedule, share: float, steps: range, cut: float = 0.0) -> float:
    """Sum of `step_cost` over these steps, in dense steps."""
    return math.fsum(step_cost(share, schedule.at(step).density(cut)) for step in steps)


def iso_flop_steps(budget: float, schedule: Schedule, share: float, cut: float = 0.0) -> int:
    """Length of a run of this schedule (stretched or shrunk) that costs `budget` dense steps."""
    mean = training_cost(schedule, share, range(schedule.total), cut) / schedule.total
    return int(budget / mean)


@torch.no_grad()
def forward_macs(net: nn.Module, layers: Iterable[str], image: Tensor) -> tuple[int, int]:
    """Multiply-adds of a forward pass on `image` (B, C, H, W): of all, and of these Linear or Conv2d layers.

    Nothing is computed: net and image are on the meta device.
    """
    counts: list[int] = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # each output number is a sum over the weights of its row
        counts.append(output.numel() * layer.weight[0].numel())  # type: ignore[index]

    hooks = [net.get_submodule(name).register_forward_hook(count) for name in layers]
    # fused attention of a CPU is not counted, its plain form is
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net(image)
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops() // 2, sum(counts)


def mixed(image: Tensor, label: Tensor, num_classes: int, weight: float) -> tuple[Tensor, Tensor]:
    """Mixup with the batch in reverse order: images (B, ...) and soft labels (B, C). Source: timm's batch mode."""
    hot = F.one_hot(label, num_classes).to(image.dtype)
    return image * weight + image.flip(0) * (1 - weight), hot * weight + hot.flip(0) * (1 - weight)


def is_decayed(parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices and kernels; not for biases, norms, tokens and position embeddings (1, T, D)."""
    return parameter.dim() in (2, 4)


class NMSparsity(L.LightningModule):
    """A classifier some of whose weights become N:M sparse.

    Logged: `train/loss`; `val/acc`, `val/loss`, `test/acc`, `test/loss` with the final mask (of the dense method:
    without a mask); the same with `_soft` for the weights as they are in training, or, of the dense method, with
    `_oneshot` for the final mask without any retraining; `sparse/decay`, `sparse/n`, `sparse/m`, `sparse/density`;
    `flops/train` so far in dense steps, and `flops/train_cut` if b below `CUT` counted as 0; `flops/forward`, of the
    finished net as a part of the dense one.

    Args:
        net: makes the classifier, images (B, ...) -> logits (B, C); built with the run's seed on every rank.
        optimizer: callable of the recipe; its weight decay acts on matrices and kernels only.
        scheduler: callable of the recipe.
        scheduler_interval: what it counts.
        method: `dense`; `ste` mask with straight-through gradients; `srste` with a pull of pruned weights to 0;
            `mdgf_linear`, `mdgf_exp` pruned weights fade; `sdgf_step`, `sdgf_geo` the pattern tightens.
        layers: patterns of names of the sparse layers, within the net.
        n, m, axis, gradient: see `networks.nm_sparse`.
        lam: of `srste`.
        dense_frac, fine_tune_frac: shares of the run before the mask, and at its end with b = 0.
        decay_rate: c in units of 1 / S, S the steps between; the official coefficient per step is decay_rate / S.
        sparsify_frac: share of S over which `sdgf_*` spreads its frames (official: 1).
        mixup: both parameters of the Beta distribution; 0 for none. With it the loss is binary cross entropy.

    Raises:
        ValueError: values out of range, or layers whose weights do not divide into the groups of a frame.

    Source: arXiv 2402.04744 and official code; lam from arXiv 2102.04010.
    """

    def __init__(
        self,
        net: Callable[[], nn.Module],
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["step", "epoch"] = "step",
        method: Method = "mdgf_exp",
        layers: tuple[str, ...] = ("*.mlp.fc1", "*.mlp.fc2"),
        n: int = 1,
        m: int = 32,
        axis: Axis = "row",
        gradient: Gradient = "ste",
        lam: float = 2e-4,
        dense_frac: float = 0.0,
        fine_tune_frac: float = 0.0,
        decay_rate: float = 8.0,
        sparsify_frac: float = 1.0,
        mixup: float = 0.0,
    ) -> None:
        super().__init__()
        _check(method, dense_frac, fine_tune_frac, decay_rate, sparsify_frac, lam, mixup)
        self.save_hyperparameters(ignore=["net", "optimizer", "scheduler"])
        self.optimizer, self.scheduler = optimizer, scheduler
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for("weights/net"))
            self.net = net()
        # for the count of FLOPs, when the weights may be sharded; in a list, so that it is no part of this module
        self._shapes = [copy.deepcopy(self.net).to("meta").eval()]
        self.sparse = list(sparsify(self.net, layers, n, m, axis, gradient).values())
        for (_, *frame), name in itertools.product(self.schedule(1000).frames(), sparse_layers(self.net)):
            check_pattern(dense_weight(self.net.get_submodule(name)).shape, frame[0], frame[1], axis, name)
        self.final = Phase(n, m, dense=method == "dense")
        self.apply_phase(self.final)
        self._sums = torch.zeros(2)
        self._counted = [0.0, 0.0, 0.0]

    def schedule(self, total: int) -> Schedule:
        """The schedule of a run of `total` steps."""
        h = self.hparams
        dense, fine_tune = (int(h[name] * total) for name in ("dense_frac", "fine_tune_frac"))
        rest = h["decay_rate"], h["sparsify_frac"], h["lam"]
        return Schedule(h["method"], h["n"], h["m"], total, dense, fine_tune, *rest)

    def apply_phase(self, phase: Phase) -> None:
        """Sets all sparse weights."""
        for layer in self.sparse:
            layer.set_phase(phase.n, phase.m, phase.decay, phase.lam, phase.dense)

    def configure_model(self) -> None:
        """Shards the net under FSDP2."""
        shard(self.net, self.device_mesh, precision=self.trainer.precision)

    def setup(self, stage: str) -> None:
        """Sizes the metrics by the data."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if not all(hasattr(data, name) for name in ("num_classes", "examples", "as_evaluated")):
            raise ValueError(
                f"NMSparsity needs a datamodule with num_classes, examples() and as_evaluated(), got "
                f"{type(data).__name__}; datamodules.images.ImageData has them"
            )
        self.num_classes = data.num_classes
        other = "_oneshot" if self.hparams["method"] == "dense" else "_soft"
        sets = (("val", ""), ("test", ""), ("val", other), ("test", other))
        self.metrics = ClassifierMetrics(data.num_classes, sets)
        self.mixup_generator = make_generator("mixup", rank=self.global_rank)
        if stage == "fit":
            example = data.as_evaluated(data.examples("test")[torch.tensor([0])])
            image = example["image"].to("meta")
            total, sparse = forward_macs(self._shapes[0], sparse_layers(self.net), image)
            self.forward_share = sparse / total

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, C)."""
        return self.net(image)

    def on_train_start(self) -> None:
        """The schedule needs the length of the run."""
        self.plan = self.schedule(int(self.trainer.estimated_stepping_batches))
        self._sums = self._sums.to(self.device)
        self.phase = self.plan.at(self.global_step)

    def on_train_epoch_start(self) -> None:
        """Starts the sums of this epoch: loss and examples."""
        self._sums = torch.zeros(2, device=self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Sets the phase of this step; a micro-batch of an accumulated gradient has that of its step."""
        self.phase = self.plan.at(self.global_step)
        self.apply_phase(self.phase)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The loss of the batch."""
        image, label = batch["image"], batch["label"]
        if self.hparams["mixup"]:
            image, soft = mixed(image, label, self.num_classes, self._mixup_weight())
            logits = self.net(image)
            loss = F.binary_cross_entropy_with_logits(logits.float(), soft.float())
        else:
            logits = self.net(image)
            loss = F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, label)
        self._sums += torch.stack([loss.detach() * len(label), torch.full_like(loss.detach(), len(label))])
        return {"loss": loss, "logits": logits}

    def on_train_epoch_end(self) -> None:
        """Logs the loss, the phase of the last step and the FLOPs so far."""
        sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        self.log("train/loss", (sums[0] / sums[1]).float(), prog_bar=True)
        first, step, share = int(self._counted[0]), self.global_step, self.forward_share
        spent = [training_cost(self.plan, share, range(first, step), cut) for cut in (0.0, CUT)]
        self._counted = [step, self._counted[1] + spent[0], self._counted[2] + spent[1]]
        phase = self.phase
        values = {"decay": phase.decay, "n": phase.n, "m": phase.m, "density": phase.density()}
        self.log_dict({f"sparse/{name}": float(value) for name, value in values.items()})
        cost = inference_cost(share, self.final.density())
        self.log_dict({"flops/train": self._counted[1], "flops/train_cut": self._counted[2], "flops/forward": cost})

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loader 0 validates, loader 1 is the test set; both with the final weights and with the others."""
        other = Phase(self.final.n, self.final.m) if self.final.dense else getattr(self, "phase", self.final)
        for offset, phase in ((2, other), (0, self.final)):
            self.apply_phase(phase)
            self.metrics.update(dataloader_idx + offset, self(batch["image"]), batch["label"])

    def on_validation_epoch_end(self) -> None:
        """Logs accuracy and cross entropy of all."""
        self.metrics.log(self)

    def on_test_start(self) -> None:
        """The final weights, whatever ran before."""
        self.apply_phase(self.final)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Test set, final weights."""
        self.metrics.update(1, self(batch["image"]), batch["label"])

    def on_test_epoch_end(self) -> None:
        """Logs test accuracy and cross entropy."""
        self.metrics.log(self)

    def configure_optimizers(self) -> Any:
        """Weight decay on matrices and kernels."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": [p for p in trained if is_decayed(p)]}]
        groups.append({"params": [p for p in trained if not is_decayed(p)], "weight_decay": 0.0})
        optimizer = self.optimizer([group for group in groups if group["params"]])
        if self.scheduler is None:
            return optimizer
        interval = self.hparams["scheduler_interval"]
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": interval}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Sums of the epoch and FLOPs so far; masks and phase follow from weights and step."""
        checkpoint["epoch_sums"] = self.trainer.strategy.reduce(self._sums.clone(), reduce_op="sum").cpu()
        checkpoint["flops"] = list(self._counted)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes them back; the first rank takes all the sums."""
        self._sums = checkpoint["epoch_sums"] * (self.global_rank == 0)
        self._counted = list(checkpoint["flops"])

    def _mixup_weight(self) -> float:
        seed = int(torch.randint(2**31, (), generator=self.mixup_generator))
        return float(RandomState(seed).beta(self.hparams["mixup"], self.hparams["mixup"]))


def _check(
    method: str,
    dense_frac: float,
    fine_tune_frac: float,
    decay_rate: float,
    sparsify_frac: float,
    lam: float,
    mixup: float,
) -> None:
    if method not in get_args(Method):
        raise ValueError(f"model.method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if min(dense_frac, fine_tune_frac) < 0 or dense_frac + fine_tune_frac >= 1:
        raise ValueError(
            "model.dense_frac and model.fine_tune_frac must not be negative and leave a part of the run between them, "
            f"got {dense_frac} and {fine_tune_frac}"
        )
    if not 0 < sparsify_frac <= 1:
        raise ValueError(f"model.sparsify_frac must be in (0, 1], got {sparsify_frac}")
    if min(decay_rate, lam, mixup) < 0:
        raise ValueError(f"model.decay_rate, lam and mixup must not be negative, got {decay_rate}, {lam} and {mixup}")
