"""Noise of gradients and masks of N:M sparse layers, the paper's explanation of what its methods change."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_modules.networks.nm_sparse import dense_weight, nm_mask, sparse_layers


def flip_rate(before: Tensor, after: Tensor) -> float:
    """Share of the kept weights that are others than before; bool masks with equally many kept ones."""
    return float((before != after).sum() / (2 * after.sum()))


def pruned_share(gradient: Tensor, mask: Tensor) -> Tensor:
    """Share of the squared gradient that falls outside a bool mask of its shape, 0-d; 0 of a gradient that is 0."""
    squared = gradient.square()
    return (squared * ~mask).sum() / squared.sum().clamp_min(torch.finfo(squared.dtype).tiny)


class SparsityNoise(Callback):
    """Logs once an epoch, of its last step, means over the sparse layers of any module that has some.

    `noise/grad_var` variance over the entries of the gradient of the dense weight, before clipping; `noise/grad_l2` and
    `noise/grad_linf` its norm and largest entry; `noise/pruned_share` the share of its square that falls on weights
    outside the final pattern; `noise/adam_v_var` variance over the entries of Adam's second moment, and its `_log10`;
    `noise/step_l2` and `noise/step_linf` of the change of the weight; `noise/weight_std` standard deviation of the
    dense weight; `noise/sparse_l2` norm of those of the final pattern; `noise/flip_rate` share of the final pattern's
    kept weights that changed since the epoch before.

    Source: arXiv 2402.04744, statistics of the study of gradients in the official code's history; `pruned_share` is
    ours.
    """

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}
        self._gradient: dict[str, float] = {}
        self._before: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Names a module that has nothing to observe."""
        if not sparse_layers(pl_module):
            raise ValueError(f"SparsityNoise needs layers with N:M weights, {type(pl_module).__name__} has none")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The first masks, unless a checkpoint brought some."""
        self.masks = self.masks or _masks(pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Looks at weights and gradients before the epoch's last step."""
        if not trainer.is_last_batch:
            return
        weights, masks = _weights(pl_module), _masks(pl_module)
        gradients = {name: _full(weight.grad) for name, weight in weights.items() if weight.grad is not None}
        self._before = {name: _full(weight).clone() for name, weight in weights.items()}
        self._gradient = {
            "noise/grad_var": _mean([g.var() for g in gradients.values()]),
            "noise/grad_l2": _mean([g.norm() for g in gradients.values()]),
            "noise/grad_linf": _mean([g.abs().max() for g in gradients.values()]),
            "noise/pruned_share": _mean([pruned_share(g, masks[name]) for name, g in gradients.items()]),
        }

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs."""
        weights, masks = _weights(pl_module), _masks(pl_module)
        after = {name: _full(weight) for name, weight in weights.items()}
        values = {
            **self._gradient,
            "noise/weight_std": _mean([weight.std() for weight in after.values()]),
            "noise/sparse_l2": _mean([weight[masks[name]].norm() for name, weight in after.items()]),
        }
        if self._before:
            steps = [after[name] - before for name, before in self._before.items()]
            values["noise/step_l2"] = _mean([step.norm() for step in steps])
            values["noise/step_linf"] = _mean([step.abs().max() for step in steps])
        state: Any = trainer.optimizers[0].state
        moments = [_full(state[w]["exp_avg_sq"]).var() for w in weights.values() if "exp_avg_sq" in state[w]]
        if moments:
            values["noise/adam_v_var"] = _mean(moments)
            values["noise/adam_v_var_log10"] = float(torch.stack(moments).mean().log10())
        rates = [flip_rate(self.masks[name].to(mask.device), mask) for name, mask in masks.items()]
        values["noise/flip_rate"] = sum(rates) / len(rates)
        self.masks, self._before = masks, {}
        pl_module.log_dict(values)

    def state_dict(self) -> dict[str, Any]:
        """Masks of the last measurement."""
        return {"masks": self.masks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them back."""
        self.masks = dict(state_dict["masks"])


def _weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Dense weights of the sparse layers."""
    return {name: dense_weight(module.get_submodule(name)) for name in sparse_layers(module)}


def _masks(module: nn.Module) -> dict[str, Tensor]:
    """Masks of the final pattern."""
    layers = sparse_layers(module)
    return {
        name: nm_mask(_full(weight), *layers[name].target, layers[name].axis)
        for name, weight in _weights(module).items()
    }


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).mean())


def _full(value: Tensor) -> Tensor:
    """The whole of a sharded tensor; a collective."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach()
