"""FSDP2: one recipe runs on one device, under DDP or with sharded weights, by `--trainer.strategy` alone."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

POLICIES = {
    "64-true": MixedPrecisionPolicy(),
    "32-true": MixedPrecisionPolicy(),
    "bf16-mixed": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    "bf16-true": MixedPrecisionPolicy(reduce_dtype=torch.float32),
}
"""What the Trainer's precision means: dtype of the gathered weights, dtype in which gradients are summed."""


def find_blocks(net: nn.Module, blocks: Iterable[str | type[nn.Module]] | None = None) -> list[nn.Module]:
    """The parts of a net that are gathered (or recomputed) one at a time.

    Args:
        net: any module.
        blocks: names of submodules, where a Sequential or ModuleList stands for its children, and classes, which stand
            for all their instances. None takes `net.block_names`, which our nets state; a net without it has no blocks.

    Raises:
        ValueError: one of them matches nothing.
    """
    found: dict[nn.Module, None] = {}
    for wanted in getattr(net, "block_names", ()) if blocks is None else blocks:
        matches = _named(net, wanted) if isinstance(wanted, str) else [m for m in net.modules() if type(m) is wanted]
        if not matches:
            containers = [name for name, module in net.named_modules() if isinstance(module, _CONTAINERS)]
            classes = sorted({type(module).__name__ for module in net.modules()} - {c.__name__ for c in _CONTAINERS})
            name = wanted if isinstance(wanted, str) else wanted.__name__
            raise ValueError(
                f"blocks: {type(net).__name__} has no {name!r}; lists of blocks: {', '.join(containers) or 'none'}; "
                f"classes: {', '.join(classes)}"
            )
        found |= dict.fromkeys(matches)
    return list(found)


def shard(
    net: nn.Module,
    mesh: DeviceMesh | None,
    blocks: Iterable[str | type[nn.Module]] | None = None,
    precision: str = "32-true",
) -> None:
    """Shards a net in place over the data-parallel processes; for `configure_model` of any LightningModule.

    Each block is a unit that is gathered for its forward and backward only; the rest of the net is one more unit.
    Weights keep their values and names, optimizers see shards. A second call changes nothing.

    Args:
        net: the module whose *call* is the forward (not the LightningModule: its `training_step` gathers nothing). All
            ranks must hold the same weights.
        mesh: `self.device_mesh` of the LightningModule; None (one device, DDP) leaves the net as it is.
        blocks: as in `find_blocks`.
        precision: the Trainer's; `bf16-mixed` gathers bf16 weights and sums gradients in float32.

    Raises:
        ValueError: no such block, or a precision that sharding does not have.
    """
    if mesh is None or isinstance(net, FSDPModule):
        return
    if precision not in POLICIES:
        raise ValueError(f"trainer.precision must be one of {', '.join(POLICIES)} under FSDP2, got {precision!r}")
    # the root is given back after its forward too: an evaluation would leave it gathered, and later changes of the
    # shards (an average swapped in or out) unseen
    options: dict[str, Any] = {
        "mesh": mesh["data_parallel"],
        "mp_policy": POLICIES[precision],
        "reshard_after_forward": True,
    }
    for parameter in net.parameters():
        # FSDP2 takes no channels-last weights; the layout of the pictures still chooses that of the convolutions
        parameter.data = parameter.data.contiguous()
    for block in find_blocks(net, blocks):
        fully_shard(block, **options)
    fully_shard(net, **options)


class FSDP2(ModelParallelStrategy):
    """Weights, gradients and optimizer state sharded over all processes: `--trainer.strategy fsdp2`.

    Lightning's ModelParallelStrategy with two differences: all processes are data-parallel by default (Lightning's
    default is tensor-parallel within a node), and a sharded checkpoint replaces an older one only when it is complete.

    Args:
        save_distributed_checkpoint: a checkpoint is a folder to which each rank writes its shards; False gathers
            everything on rank 0 and writes one file.
    """

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint)

    def setup_environment(self) -> None:
        """As Lightning's, over all processes of all nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes the shards beside the older checkpoint, then changes their places."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        partial = path.with_name(f".{path.name}.partial")
        if self.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        self.barrier()
        super().save_checkpoint(checkpoint, partial, storage_options)
        self.barrier()
        if self.is_global_zero:
            replace(partial, path)
        self.barrier()


def replace(new: Path, path: Path) -> None:
    """Puts `new` in the place of `path`; either may be a file or a folder, `path` may be absent."""
    old = path.with_name(f".{path.name}.old")
    _remove(old)
    if path.exists():
        path.rename(old)
    new.rename(path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


_CONTAINERS = (nn.Sequential, nn.ModuleList)


def _named(net: nn.Module, name: str) -> list[nn.Module]:
    module = dict(net.named_modules()).get(name)
    if module is None:
        return []
    return list(module) if isinstance(module, _CONTAINERS) else [module]


StrategyRegistry.register("fsdp2", FSDP2, description="weights, gradients and optimizer state sharded (FSDP2)")
