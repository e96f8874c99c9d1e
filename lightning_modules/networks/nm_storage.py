"""N:M weights on disk: the kept values and their places in each group, in one safetensors file."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from callbacks.files import write_atomic
from lightning_modules.networks.nm_sparse import Axis, grouped_order, nm_mask, sparse_layers


def compressed_bytes(numel: int, itemsize: int, n: int, m: int) -> int:
    """Bytes of a compressed weight: N / M of the values, and ceil(log2 M) bits for the place of each, packed."""
    kept = numel // m * n
    return kept * itemsize + -(-kept * place_bits(m) // 8)


def place_bits(m: int) -> int:
    """Bits of a place in a group of M."""
    return max(1, math.ceil(math.log2(m)))


def compress(weight: Tensor, n: int, m: int, axis: Axis = "row") -> tuple[Tensor, Tensor]:
    """Values and packed places of an N:M weight.

    Args:
        weight: (out, in) or (out, in, h, w) with at most N weights other than 0 in a group.
        n, m, axis: see `nm_mask`.

    Returns:
        (G, N) values in the order of their places, in the dtype of `weight`; uint8 places, packed bits.

    Raises:
        ValueError: a group has more than N weights.
    """
    mask = nm_mask(weight, n, m, axis)
    if bool((weight * ~mask).any()):
        raise ValueError(f"a weight that is to be stored as {n}:{m} has a group with more than {n} weights")
    order = grouped_order(weight.dim(), axis)
    groups, kept = (t.permute(order).reshape(-1, m) for t in (weight.detach(), mask))
    places = kept.nonzero()[:, 1].view(-1, n)
    bits = (places.reshape(-1, 1).cpu().numpy() >> np.arange(place_bits(m))) & 1
    return groups.gather(1, places), torch.from_numpy(np.packbits(bits.astype(np.uint8)))


def decompress(values: Tensor, packed: Tensor, shape: list[int], m: int, axis: Axis = "row") -> Tensor:
    """The dense weight of this shape; the inverse of `compress`."""
    bits = place_bits(m)
    flat = np.unpackbits(packed.numpy(), count=values.numel() * bits).reshape(-1, bits).astype(np.int64)
    places = torch.from_numpy(flat @ (1 << np.arange(bits))).view(values.shape)
    groups = torch.zeros(len(values), m, dtype=values.dtype).scatter_(1, places, values)
    order = grouped_order(len(shape), axis)
    moved = groups.view([shape[d] for d in order])
    return moved.permute([order.index(d) for d in range(len(shape))]).contiguous()


def save_compressed(net: nn.Module, path: Path) -> dict[str, int]:
    """Writes the state of a net as it is with the final masks; the net stays as it was.

    Returns:
        `dense` and `compressed`: bytes of the sparse weights before and after; `file`: bytes of the file.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    facts, sizes = {}, {"dense": 0, "compressed": 0}
    for layer, sparse in sparse_layers(net).items():
        weight, name, (n, m) = state.pop(f"{layer}.parametrizations.weight.original"), f"{layer}.weight", sparse.target
        values, places = compress(weight * nm_mask(weight, n, m, sparse.axis), n, m, sparse.axis)
        state[f"{name}.values"], state[f"{name}.places"] = values, places
        facts[name] = {"n": n, "m": m, "axis": sparse.axis, "shape": list(weight.shape)}
        sizes["dense"] += weight.nbytes
        sizes["compressed"] += values.nbytes + places.nbytes
    content = save(state, {"sparse": json.dumps(facts)})
    write_atomic(path, content)
    return {**sizes, "file": len(content)}


def load_compressed(path: Path) -> dict[str, Tensor]:
    """State of a plain net (without parametrizations) from a file of `save_compressed`."""
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
        facts = json.loads(file.metadata()["sparse"])
    for name, fact in facts.items():
        values, packed = state.pop(f"{name}.values"), state.pop(f"{name}.places")
        state[name] = decompress(values, packed, fact["shape"], fact["m"], fact["axis"])
    return state
