"""How many bytes a training step holds, from shapes alone: modules and batches on the meta device."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward keeps for the backward, apart from weights and the batch.

    Attributes:
        plain: all of them.
        kept: with activation checkpointing: inputs of the blocks, and what is saved outside of them.
        block: with activation checkpointing: what the largest block saves when it is computed again.
    """

    plain: int
    kept: int
    block: int

    def bytes(self, checkpointed: bool) -> int:
        """Peak over the step."""
        return self.kept + self.block if checkpointed else self.plain


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


def shard_bytes(tensors: Iterable[Tensor], processes: int) -> int:
    """Bytes of the first rank's shards: FSDP2 splits dimension 0 and rounds up; scalars are whole on every rank."""
    return sum(
        math.ceil(t.shape[0] / processes) * math.prod(t.shape[1:]) * t.element_size() if t.ndim else t.element_size()
        for t in tensors
    )


def optimizer_state(optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    """Tensors that the optimizers hold after a step; takes that step on the (meta) parameters, for real."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def activations(
    step: Callable[[], Any], module: nn.Module, batch: Iterable[Tensor], blocks: Sequence[nn.Module] = ()
) -> Activations:
    """Counts the storages that autograd saves in one forward.

    Every storage counts once, whatever the number of views of it. Parameters, buffers and the batch do not count.
    Attention counts as a fused kernel does it: queries, keys, values, output and one number per query and head. Not
    counted: temporary tensors of a kernel, its workspace, fragmentation of the allocator.

    Args:
        step: runs the forward and returns the loss; on meta tensors nothing is computed.
        module: owner of the parameters and buffers.
        batch: tensors of the batch.
        blocks: parts that activation checkpointing would compute again.
    """
    own = {_key(t) for t in (*module.parameters(), *module.buffers(), *batch)}
    outside: dict[int, torch.UntypedStorage] = {}
    inside: list[dict[int, torch.UntypedStorage]] = [{} for _ in blocks]
    current: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in own:
            place = inside[current[-1]] if current else outside
            # the storage itself is kept, so that no other one takes its address
            place[_key(tensor)] = tensor.untyped_storage()
        return tensor

    def enter(number: int, arguments: tuple[Any, ...]) -> None:
        inputs.update({_key(t): t.untyped_storage() for t in arguments if isinstance(t, Tensor) and _key(t) not in own})
        current.append(number)

    def leave(*_: Any) -> None:
        current.pop()

    inputs: dict[int, torch.UntypedStorage] = {}
    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            before = block.register_forward_pre_hook(lambda _, arguments, n=number: enter(n, arguments))
            after = block.register_forward_hook(leave)
            stack.callback(before.remove)
            stack.callback(after.remove)
        stack.enter_context(_FusedAttention())
        stack.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
        step()
    every = {key: storage for part in (outside, *inside) for key, storage in part.items()}
    kept = outside | inputs
    largest = max((_bytes({k: v for k, v in part.items() if k not in kept}) for part in inside), default=0)
    return Activations(_bytes(every), _bytes(kept), largest)


class _FusedAttention(TorchFunctionMode):
    """The meta device has the unfused attention only, which saves a matrix of queries times keys."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3]) if len(args) >= 3 else func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Saves what a fused attention saves; values are not computed."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(storages: dict[int, torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages.values())
