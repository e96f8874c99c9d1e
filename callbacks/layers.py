"""Which layers an observer reads, and how: names or patterns, hooks that leave no trace, evaluation mode given back."""

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def find_layers(module: nn.Module, patterns: Iterable[str], option: str) -> dict[str, nn.Module]:
    """Submodules by name.

    Args:
        module: what is searched.
        patterns: names as `named_modules` gives them, or globs such as `net.blocks.*`.
        option: name of the option, for the message.

    Returns:
        Name -> submodule, in the order of the module.

    Raises:
        ValueError: a pattern matches nothing; the message lists the closest names, or all where they are few.
    """
    modules = {name: layer for name, layer in module.named_modules() if name}
    found: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(modules, pattern)
        if not matches:
            close = difflib.get_close_matches(pattern, modules, n=5, cutoff=0.4) if len(modules) > 30 else list(modules)
            raise ValueError(f"{option}: no layer {pattern!r} in {type(module).__name__}; it has {', '.join(close)}")
        found.update(matches)
    return {name: layer for name, layer in modules.items() if name in found}


def submodule(module: nn.Module, name: str | None, option: str) -> nn.Module:
    """The submodule of this name; the module itself for None. Errors as in `find_layers`."""
    return module if name is None else next(iter(find_layers(module, [name], option).values()))


@contextmanager
def reading(
    layers: dict[str, nn.Module], read: Callable[[str, Tensor], None], inputs: bool = False
) -> Iterator[list[Any]]:
    """Calls `read(name, tensor)` with each output (or first input) of these layers while the block runs.

    Outputs that are tuples count by their first entry. Hooks are gone when the block ends, whatever happens in it.
    """
    handles: list[Any] = []

    def hook_of(name: str) -> Callable[..., None]:
        def before(layer: nn.Module, args: tuple[Any, ...]) -> None:
            read(name, args[0])

        def after(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            read(name, output[0] if isinstance(output, tuple | list) else output)

        return before if inputs else after

    try:
        for name, layer in layers.items():
            hook = hook_of(name)
            handles.append(layer.register_forward_pre_hook(hook) if inputs else layer.register_forward_hook(hook))
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(module: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Evaluation mode for the block; afterwards each submodule has its own mode back.

    Batch norm so uses and keeps its running statistics. `gradients` allows those with respect to inputs; parameters
    get none.
    """
    modes = [(part, part.training) for part in module.modules()]
    needed = [(p, p.requires_grad) for p in module.parameters()]
    try:
        module.eval()
        if gradients:
            module.requires_grad_(False)
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for part, training in modes:
            part.training = training
        for parameter, requires_grad in needed:
            parameter.requires_grad_(requires_grad)
