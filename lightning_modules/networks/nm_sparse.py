"""N:M sparse weights: of every M neighbouring weights the N of largest magnitude count. For any Linear or Conv2d.

The dense weight is the parameter; what the layer multiplies by is made from it in each forward pass, as a
parametrization, so that optimizers, averages, checkpoints, sharding and torch.compile see an ordinary module. Keys
become `<layer>.parametrizations.weight.original`. No mask is stored.

Legend: G groups of M weights. Official code: abhibambhaniya/progressive_gradient_flow_nm_sparsity.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Axis = Literal["row", "col"]
Gradient = Literal["ste", "masked"]
MAX_PAIRWISE = 8
"""Largest M whose ranks are counted by comparing all pairs; above it a selection is faster."""
MAX_ROUNDS = 4
"""Largest N of few in a large group that are found one after the other: half of the time of a selection."""


def nm_mask(weight: Tensor, n: int, m: int, axis: Axis = "row") -> Tensor:
    r"""Which weights are kept: in each group of M the N of largest magnitude; of equal ones the first.

    Args:
        weight: (out, in), or (out, in, h, w) of a convolution; float.
        n, m: kept weights and size of a group, 1 <= n <= m.
        axis: `row`: groups run along the inputs of a layer; where M does not divide them they go on in the next row.
            `col`: along its outputs. Of a convolution, along the input channels at one place of the kernel.

    Returns:
        Bool tensor of the weight's shape, exactly N in a group.

    Raises:
        ValueError: see `check_pattern`.

    Source: arXiv 2402.04744; official code `get_sparse_mask`, whose unstable sort leaves ties open.
    """
    check_pattern(weight.shape, n, m, axis)
    return _mask(weight, n, m, axis)


def _mask(weight: Tensor, n: int, m: int, axis: Axis) -> Tensor:
    """As `nm_mask`, of a pattern that was checked before."""
    if weight.dim() == 2 and axis == "row":
        return _keep(weight.detach().abs().reshape(-1, m), n, m).view(weight.shape)
    order = grouped_order(weight.dim(), axis)
    values = weight.detach().abs().permute(order)
    kept = _keep(values.reshape(-1, m), n, m)
    return kept.view(values.shape).permute([order.index(d) for d in range(weight.dim())])


def check_pattern(shape: Sequence[int], n: int, m: int, axis: Axis, name: str = "weight") -> None:
    """Raises ValueError where a weight of this shape has no N:M groups; `name` is that of its layer."""
    if not 1 <= n <= m:
        raise ValueError(f"model.n must be between 1 and model.m {m}, got {n}")
    if axis not in get_args(Axis):
        raise ValueError(f"model.axis must be row or col, got {axis!r}")
    if len(shape) not in (2, 4) or (axis == "col" and len(shape) == 4):
        raise ValueError(f"{name}: N:M groups need a Linear or (row only) a Conv2d, got {tuple(shape)} and axis {axis}")
    if torch.Size(shape).numel() % m:
        raise ValueError(f"{name}: {torch.Size(shape).numel()} weights do not divide into groups of {m}")


def unstructured_mask(weight: Tensor, rate: float) -> Tensor:
    """Keeps the int((1 - rate) * numel) largest magnitudes of all; the whole tensor is one group."""
    count = int((1 - rate) * weight.numel())
    if count < 1:
        raise ValueError(f"rate {rate} leaves none of {weight.numel()} weights")
    return _keep(weight.detach().abs().reshape(1, -1), count, weight.numel()).view(weight.shape)


def grouped_order(dims: int, axis: Axis) -> list[int]:
    """Order of axes in which groups are neighbours: (O, kh, kw, I) of a convolution."""
    if dims == 4:
        return [0, 2, 3, 1]
    return [0, 1] if axis == "row" else [1, 0]


def _keep(magnitude: Tensor, n: int, m: int) -> Tensor:
    """(G, M) bool of (G, M) magnitudes."""
    if n == m:
        return torch.ones_like(magnitude, dtype=torch.bool)
    if n > 1 and m <= MAX_PAIRWISE:
        return _keep_by_rank(magnitude, n, m)
    if magnitude.device.type == "cpu" and not torch.compiler.is_compiling():
        # two to three times as fast as a scatter of positions; right unless there are ties, which a GPU would have to
        # wait for
        kept = magnitude >= _threshold(magnitude, n, m)
        if int(kept.count_nonzero()) == n * len(magnitude):
            return kept
    return _keep_by_position(magnitude, n, m)


def _threshold(magnitude: Tensor, n: int, m: int) -> Tensor:
    """(G, 1): the N-th largest of each group; less where there are ties, so that more than N reach it."""
    if n > 1 and (n > MAX_ROUNDS or 8 * n > m):
        return magnitude.topk(n, dim=1, sorted=False).values.amin(1, keepdim=True)
    top = magnitude.amax(1, keepdim=True)
    for _ in range(n - 1):
        top = magnitude.masked_fill(magnitude >= top, -1.0).amax(1, keepdim=True)
    return top


def _keep_by_rank(magnitude: Tensor, n: int, m: int) -> Tensor:
    """Counts for each weight those that come before it: M (M - 1) / 2 comparisons, each of all groups at once."""
    columns = magnitude.t().contiguous()
    before = torch.zeros(columns.shape, dtype=torch.uint8, device=columns.device)
    for i in range(m - 1):
        wins = (columns[i] >= columns[i + 1 :]).view(torch.uint8)
        before[i + 1 :] += wins
        before[i] += (m - 1 - i) - wins.sum(0, dtype=torch.uint8)
    return (before < n).t().contiguous()


def _keep_by_position(magnitude: Tensor, n: int, m: int) -> Tensor:
    """Selection of exactly N, of equal ones the first."""
    if n == 1:
        first = magnitude.argmax(1, keepdim=True)
    elif magnitude.dtype == torch.float64:
        first = magnitude.argsort(dim=1, descending=True, stable=True)[:, :n]
    else:
        # magnitude and position as one integer, so that no two are equal: the bits of floats that are not negative
        # order like the floats
        bits = magnitude.float().view(torch.int32).long() << 32
        first = (bits - torch.arange(m, device=bits.device)).topk(n, dim=1, sorted=False).indices
    return torch.zeros_like(magnitude, dtype=torch.bool).scatter_(1, first, True)


class _SparseWeight(torch.autograd.Function):
    """where(mask, W, b W); gradient where(mask, g, (1 or b) g + lam W). Keeps mask and W, no copy, or nothing."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: Tensor, lam: float, masked: bool) -> Tensor:
        ctx.lam, ctx.masked = lam, masked
        if lam or masked:
            ctx.save_for_backward(mask, weight if lam else None, decay if masked else None)
        return torch.where(mask, weight, decay.to(weight.dtype) * weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.lam and not ctx.masked:
            return gradient, None, None, None, None
        mask, weight, decay = ctx.saved_tensors
        pruned = gradient * decay.to(gradient.dtype) if ctx.masked else gradient
        if ctx.lam:
            pruned = pruned.add(weight, alpha=ctx.lam)
        return torch.where(mask, gradient, pruned), None, None, None, None


def sparse_weight(weight: Tensor, mask: Tensor, decay: Tensor, lam: float = 0.0, gradient: Gradient = "ste") -> Tensor:
    r"""W on the mask, b W off it.

    Args:
        weight: float.
        mask: bool, of its shape.
        decay: 0-d, b: share of a pruned weight that still counts; 0 is a hard mask, 1 a dense layer.
        lam: weight of the pull of pruned weights to 0 that is added to their gradient (SR-STE).
        gradient: of pruned weights: `ste` as if they were kept (official code), `masked` times b, the exact derivative.

    Returns:
        The weight that the layer uses, in the dtype of `weight`.

    Source: arXiv 2402.04744 and official code (the text restricts the gradients, the code does not); lam from
    arXiv 2102.04010.
    """
    return _SparseWeight.apply(weight, mask, decay, lam, gradient == "masked")


class NMSparse(nn.Module):
    """Parametrization of a weight; see `sparse_weight`. What changes in training is set with `set_phase`.

    Args:
        n, m: kept weights and size of a group at the end; a phase may have others.
        axis, gradient: see `nm_mask` and `sparse_weight`.
    """

    decay: Tensor

    def __init__(self, n: int, m: int, axis: Axis = "row", gradient: Gradient = "ste") -> None:
        super().__init__()
        if gradient not in get_args(Gradient):
            raise ValueError(f"model.gradient must be ste or masked, got {gradient!r}")
        self.target = self.pattern = (n, m)
        self.axis, self.gradient = axis, gradient
        self.dense, self.lam = False, 0.0
        # a tensor, for a number would make torch.compile start anew each step; not in checkpoints: it follows from the
        # step
        self.register_buffer("decay", torch.zeros(()), persistent=False)

    def set_phase(self, n: int, m: int, decay: float, lam: float, dense: bool) -> None:
        """Pattern, b, lam, and whether the weight is left as it is."""
        self.pattern, self.lam, self.dense = (n, m), lam, dense
        self.decay.fill_(decay)

    def harden(self) -> None:
        """The final pattern and nothing else."""
        self.set_phase(*self.target, decay=0.0, lam=0.0, dense=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer uses."""
        if self.dense:
            return weight
        mask = _mask(weight, *self.pattern, self.axis)
        return sparse_weight(weight, mask, self.decay, self.lam, self.gradient)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """A weight that is assigned becomes the dense one."""
        return weight


def sparsify(
    net: nn.Module, layers: Sequence[str], n: int, m: int, axis: Axis = "row", gradient: Gradient = "ste"
) -> dict[str, NMSparse]:
    """Gives the weights of the named layers N:M parametrizations, in place; before the optimizer is made.

    Args:
        net: any module.
        layers: patterns of names of Linear or Conv2d, e.g. `*.mlp.fc?`.
        n, m, axis, gradient: see `NMSparse`.

    Returns:
        Name of the layer -> its parametrization.

    Raises:
        ValueError: a pattern that matches nothing, or a layer whose weights do not divide into groups.
    """
    named = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    chosen: dict[str, nn.Module] = {}
    for pattern in layers:
        found = {name: layer for name, layer in named.items() if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(f"model.layers: no layer matches {pattern!r}; there are {', '.join(named) or 'none'}")
        chosen |= found
    made = {}
    for name, layer in chosen.items():
        check_pattern(layer.weight.shape, n, m, axis, name)  # type: ignore[arg-type]
        made[name] = NMSparse(n, m, axis, gradient)
        parametrize.register_parametrization(layer, "weight", made[name], unsafe=True)
    return made


def dense_weight(layer: nn.Module) -> nn.Parameter:
    """The trained weight of a layer that `sparsify` has changed."""
    return layer.parametrizations["weight"].original  # type: ignore[index,union-attr]


def sparse_layers(net: nn.Module) -> dict[str, NMSparse]:
    """Name of the layer -> its parametrization, of all that have one."""
    return {
        name.removesuffix(".parametrizations.weight.0"): module
        for name, module in net.named_modules()
        if isinstance(module, NMSparse)
    }


@torch.no_grad()
def burn_in(net: nn.Module) -> dict[str, tuple[int, int]]:
    """Replaces each parametrization, in place, by its final weight, and checks that it has at most N in a group.

    torch keeps the parametrized class of a layer in its copies: copies made with `deepcopy` break.

    Returns:
        Name of the layer -> (N, M).

    Raises:
        ValueError: a group with more than N weights; never seen, but an export must not hide it.
    """
    patterns = {}
    for name, sparse in sparse_layers(net).items():
        layer, (n, m) = net.get_submodule(name), sparse.target
        sparse.harden()
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        if int(kept_per_group(layer.weight, m, sparse.axis).max()) > n:  # type: ignore[arg-type]
            raise ValueError(f"{name}: a group has more than {n} of {m} weights")
        patterns[name] = (n, m)
    return patterns


def kept_per_group(weight: Tensor, m: int, axis: Axis = "row") -> Tensor:
    """(G,) int64 numbers of weights in each group that are not 0."""
    return (weight.detach().permute(grouped_order(weight.dim(), axis)).reshape(-1, m) != 0).sum(1)


def semi_structured(net: nn.Module) -> list[str]:
    """Stores the 2:4 weights of a burnt-in net for the sparse kernels of a GPU, in place; returns the layers' names.

    Args:
        net: on a CUDA device in fp16 or bf16, see `burn_in`. Layers that are not 2:4 along the inputs stay dense.

    Raises:
        ValueError: no such device or dtype.
    """
    like = next(net.parameters())
    if like.device.type != "cuda" or like.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"2:4 kernels need a CUDA device and fp16 or bf16, got {like.device.type} and {like.dtype}")
    names = []
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear) and layer.in_features % 4 == 0:
            kept = kept_per_group(layer.weight, 4)
            if int(kept.max()) <= 2:
                sparse = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
                layer.weight = nn.Parameter(sparse, requires_grad=False)
                names.append(name)
    return names
