"""Exponential moving average of the weights."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def warm_decay(updates: int, decay: float) -> float:
    """Decay of the next update after `updates` earlier ones: min(decay, (1 + n) / (10 + n)); 0.1 for the first.

    Source: TensorFlow's `ExponentialMovingAverage` with `num_updates`.
    """
    return min(decay, (1 + updates) / (10 + updates))


class EmaWeights(nn.Module):
    """Averages of the trained parameters of a module, in float32 or wider; of a shard (DTensor) this rank's part only.

    They are parameters without gradient, so they travel in every kind of checkpoint, sharded ones too, and are
    resharded with it. Names have `/` for `.`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, value in module.named_parameters():
            if value.requires_grad:
                wide = torch.promote_types(value.dtype, torch.float32)
                self.register_parameter(
                    name.replace(".", "/"), nn.Parameter(value.detach().to(wide).clone(), requires_grad=False)
                )

    def pairs(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Local parts of the averages and of the parameters of `module`, in the same order; views, no copies."""
        own = dict(module.named_parameters())
        averages = [(name, value) for name, value in self.named_parameters()]
        return [_local(value) for _, value in averages], [_local(own[name.replace("/", ".")]) for name, _ in averages]

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float) -> None:
        """average <- decay * average + (1 - decay) * parameter."""
        averages, current = self.pairs(module)
        current = [value.to(average.dtype) for value, average in zip(current, averages, strict=True)]
        torch._foreach_lerp_(averages, current, 1 - decay)

    @torch.no_grad()
    def swap_in(self, module: nn.Module) -> list[Tensor]:
        """Puts the averages in the place of the parameters; returns copies of these."""
        averages, current = self.pairs(module)
        kept = [value.clone() for value in current]
        torch._foreach_copy_(current, averages)
        return kept

    @torch.no_grad()
    def swap_out(self, module: nn.Module, kept: list[Tensor]) -> None:
        """Puts back what `swap_in` returned."""
        torch._foreach_copy_(self.pairs(module)[1], kept)


class Ema(Callback):
    """Averages the weights after each optimizer step; validation, test and prediction use the average.

    The average starts as a copy of the initial weights. Frozen parameters and buffers are those of the module itself.
    It is `module.ema_weights`, part of the state dict: a checkpoint trained with this callback needs it in evaluation
    too (the recipe names it). Lightning's WeightAveraging copies the whole module instead, and cannot shard the copy.

    Args:
        decay: share of the old average that is kept in a step, in the end.
        warm_up: lower decay in the first steps, see `warm_decay`.
    """

    def __init__(self, decay: float = 0.9999, warm_up: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"Ema.decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.warm_up = warm_up
        self.updates = 0
        self._step = 0
        self._kept: list[Tensor] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copies the weights, sharded as the module shards them."""
        if not hasattr(pl_module, "ema_weights"):
            pl_module.configure_model()
            pl_module.ema_weights = EmaWeights(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Steps before a resume are in the average already."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates after an optimizer step; a micro-batch of an accumulated gradient is none."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        decay = warm_decay(self.updates, self.decay) if self.warm_up else self.decay
        _weights(pl_module).update(pl_module, decay)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Number of updates so far; the averages are in the module's state dict."""
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the warm-up."""
        self.updates = state_dict["updates"]

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluates the average."""
        if self._kept is None:
            self._kept = _weights(pl_module).swap_in(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Returns to the trained weights, bit for bit."""
        if self._kept is not None:
            _weights(pl_module).swap_out(pl_module, self._kept)
            self._kept = None

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Returns to the trained weights."""
        self.on_validation_end(trainer, pl_module)


def _weights(pl_module: L.LightningModule) -> EmaWeights:
    return pl_module.ema_weights  # type: ignore[return-value]


def _local(value: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, a view."""
    return value.to_local().detach() if isinstance(value, DTensor) else value.detach()
