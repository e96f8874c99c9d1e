"""Activation checkpointing: less memory for a second forward."""

from collections.abc import Iterable

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.distributed._composable import checkpoint

from lightning_modules.sharding import find_blocks


def checkpoint_activations(net: nn.Module, blocks: Iterable[str | type[nn.Module]] | None = None) -> int:
    """Makes each block keep its inputs only and recompute the rest in the backward; same gradients, bit for bit.

    Args:
        net: changed in place; names and weights stay.
        blocks: as in `sharding.find_blocks`.

    Returns:
        Number of blocks.
    """
    found = find_blocks(net, blocks)
    for block in found:
        checkpoint(block)
    return len(found)


class CheckpointActivations(Callback):
    """Recomputes the activations of each block in the backward, on one device, under DDP and under FSDP2.

    Works on any module which has nets that state `block_names` (all of `networks/`); keeps random numbers.

    Args:
        blocks: names of submodules of the LightningModule instead, e.g. `net.net.blocks`.
    """

    def __init__(self, blocks: list[str] | None = None) -> None:
        self.blocks = blocks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Runs before the nets are sharded, as FSDP2 wants it."""
        if getattr(self, "_done", None) is pl_module:
            return
        nets = [m for m in pl_module.modules() if hasattr(m, "block_names")] if self.blocks is None else [pl_module]
        if sum(checkpoint_activations(net, self.blocks) for net in nets) == 0:
            raise ValueError(
                f"CheckpointActivations: no net of {type(pl_module).__name__} states block_names; "
                "give CheckpointActivations.blocks, e.g. [net.blocks]"
            )
        self._done = pl_module
