"""Reading and rewriting the outputs of decoder layers, whatever kind of output they have."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


def find_decoder_layers(model: nn.Module) -> list[nn.Module]:
    """`model.decoder_layers` if it says so, else the only ModuleList of modules named `*DecoderLayer` or `*Block`.

    Raises:
        ValueError: none found, or more than one list.
    """
    stated: Any = getattr(model, "decoder_layers", None)
    if stated is not None:
        return list(stated)
    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(type(child).__name__.endswith(("DecoderLayer", "Block")) for child in module)
    }
    if len(lists) != 1:
        raise ValueError(
            f"{type(model).__name__} must have one list of decoder layers (classes *DecoderLayer or *Block) or an "
            f"attribute decoder_layers, found lists {list(lists) or 'none'}"
        )
    return next(iter(lists.values()))


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a layer's output: the tensor itself, or the first part of a tuple (older transformers)."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def rewriting(layers: Mapping[int, nn.Module], change: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Within the block each layer's hidden state becomes change(number, hidden); None leaves it. Hooks end with it."""

    def hook(number: int) -> Callable[[nn.Module, Any, Any], Any]:
        def rewrite(module: nn.Module, inputs: Any, output: Any) -> Any:
            changed = change(number, hidden_of(output))
            if changed is None:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return rewrite

    with ExitStack() as stack:
        for number, layer in layers.items():
            stack.callback(layer.register_forward_hook(hook(number)).remove)
        yield


@contextmanager
def widening(layers: Iterable[nn.Module], batch_size: int, times: int) -> Iterator[None]:
    """Within the block the layers' inputs beside the hidden state fit a batch repeated `times` on its way.

    These are masks and positions: tensors (B, ...) of two or more axes are repeated, with B = 1 they broadcast.
    """

    def widen(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(widen(part) for part in value)
        if batch_size > 1 and isinstance(value, Tensor) and value.ndim > 1 and len(value) == batch_size:
            return value.repeat(times, *[1] * (value.ndim - 1))
        return value

    def hook(module: nn.Module, inputs: Any, named: dict[str, Any]) -> Any:
        # transformers and our own nets give the hidden state first and by position
        hidden, *others = inputs
        return (hidden, *(widen(value) for value in others)), {name: widen(value) for name, value in named.items()}

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
