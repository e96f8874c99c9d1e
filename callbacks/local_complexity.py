r"""Local complexity (LC): how many units of a net change sign within a small neighbourhood of a point.

Legend: N points x_i in R^D, m orthonormal directions v_k, r radius, P = 2 m vertices x_i +- r v_k, L layers, U units.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from callbacks.layers import evaluating, find_layers, reading
from callbacks.rng import make_generator
from callbacks.step_probe import StepProbe, Windows, share_of_rank

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)


def orthonormal_frame(count: int, dim: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """(count, dim) random unit vectors, orthogonal to each other where count <= dim. One QR decomposition.

    Source: arXiv 2402.15555; the official code takes torch's orthogonal parametrisation of a random linear layer, which
    has the same distribution but for signs, and signs do not matter.
    """
    tall = torch.randn(max(count, dim), min(count, dim), generator=generator, dtype=torch.float64)
    frame = torch.linalg.qr(tall).Q
    frame = frame.T if count <= dim else frame
    return (frame / torch.linalg.vector_norm(frame, dim=1, keepdim=True)).to(dtype)


def hull_vertices(points: Tensor, frame: Tensor, radius: float) -> Tensor:
    """(N, D), (m, D) -> (N, 2 m, D): x + r v for all directions, then x - r v. Source: official code."""
    steps = radius * frame
    return torch.cat([points[:, None] + steps, points[:, None] - steps], dim=1)


def crossing_counts(values: Tensor, num_vertices: int) -> Tensor:
    """Units whose sign in {-1, 0, 1} is not the same at all vertices.

    Args:
        values: (N * P, ...) pre-activations, the P vertices of a point in a row; every entry after the first axis is
            a unit (convolutions: each channel at each position).
        num_vertices: P.

    Returns:
        (N,) int64. A unit that is 0 at all vertices does not count; one that is 0 at some of them does.

    Source: arXiv 2402.15555; official code.
    """
    by_point = values.reshape(-1, num_vertices, values[0].numel())
    # two vectorised passes: a sixth of the time of one aminmax over this axis
    return (by_point.amin(1).sign() != by_point.amax(1).sign()).sum(1)


def pre_activations(network: nn.Module) -> dict[str, nn.Module]:
    """The activation modules of a net, whose inputs are the pre-activations; see `ACTIVATIONS`."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, ACTIVATIONS)}


def local_complexity(
    network: nn.Module,
    points: Tensor,
    frame: Tensor,
    radii: Sequence[float],
    layers: dict[str, nn.Module] | None = None,
    max_rows: int = 1024,
) -> tuple[Tensor, dict[str, int]]:
    """Local complexity of a net at points, layer by layer; exact, in evaluation mode, without gradients.

    Vertices go through the net in chunks of whole points, so memory does not grow with N. Where the net begins with a
    linear or convolution layer, that layer sees centres and directions only: W (x +- r v) + b = (W x + b) +- r W v.

    Args:
        network: inputs (B, ...) -> anything.
        points: (N, ...) inputs, in the dtype and on the device of the net.
        frame: (m, D), see `orthonormal_frame`; D numbers per input.
        radii: neighbourhoods, small against the distances of the points.
        layers: whose outputs are the pre-activations; None takes the inputs of the net's activation modules.
        max_rows: vertices in a forward pass.

    Returns:
        Counts (len(radii), N, L) int64 on the CPU, and the number of units of each layer by name.

    Raises:
        ValueError: the frame does not fit, or the net has no activation modules and no layers are given.

    Source: arXiv 2402.15555, definition of local complexity; order of operations of the official code.
    """
    if frame.shape[1] != points[0].numel():
        raise ValueError(f"frame must have {points[0].numel()} columns, got {tuple(frame.shape)}")
    inputs = layers is None
    layers = pre_activations(network) if layers is None else layers
    if not layers:
        names = ", ".join(name for name, _ in network.named_modules() if name)
        raise ValueError(f"layers must be given for a net without activation modules; it has {names}")
    frame = frame.to(points)
    num_vertices = 2 * len(frame)
    found: dict[str, Tensor] = {}
    units: dict[str, int] = {}

    def read(name: str, values: Tensor) -> None:
        # at once: an activation that works in place would overwrite them
        found[name] = crossing_counts(values, num_vertices).cpu()
        units[name] = values[0].numel()

    counts = torch.zeros(len(radii), len(points), len(layers), dtype=torch.int64)
    with evaluating(network):
        first = _first_affine(network, points, frame, radii[0], layers, inputs)
        with reading(layers, read, inputs):
            size = max(1, max_rows // num_vertices)
            for start in range(0, len(points), size):
                chunk = points[start : start + size]
                for number, _ in enumerate(_forwards(network, chunk, frame, radii, first)):
                    rows = torch.stack([found[name] for name in layers], dim=1)
                    counts[number, start : start + size] = rows
    return counts, {name: units[name] for name in layers}


def _forwards(
    network: nn.Module,
    chunk: Tensor,
    frame: Tensor,
    radii: Sequence[float],
    first: "tuple[nn.Module, torch.Size] | None",
) -> Iterator[None]:
    """One forward pass with all vertices of the chunk for each radius."""
    if first is None:
        for radius in radii:
            vertices = hull_vertices(chunk.flatten(1), frame, radius)
            network(vertices.reshape(-1, *chunk.shape[1:]))
            yield
        return
    layer, shape = first
    # not a call of the module: its hooks are for the vertices
    centres = layer.forward(chunk.reshape(-1, *shape))
    directions = _linear_part(layer, frame.reshape(-1, *shape))
    # the net's own input is not looked at any more: zeros without memory
    rows = chunk.new_zeros(()).expand(len(chunk) * 2 * len(frame), *chunk.shape[1:])
    for radius in radii:
        steps = radius * directions
        values = torch.cat([centres[:, None] + steps, centres[:, None] - steps], dim=1).flatten(0, 1)
        with _returning(layer, values):
            network(rows)
        yield


def _first_affine(
    network: nn.Module,
    points: Tensor,
    frame: Tensor,
    radius: float,
    layers: dict[str, nn.Module],
    inputs: bool,
) -> tuple[nn.Module, torch.Size] | None:
    """The layer that alone sees the net's input, and the shape in which it does; None if there is none.

    Found by trial on the first point: with that layer's output put in place and an empty input, all pre-activations
    must be the same.
    """
    seen: list[tuple[nn.Module, Tensor]] = []
    affine: dict[str, nn.Module] = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    point = points[:1]
    with reading(affine, lambda name, values: seen.append((affine[name], values)), inputs=True):
        network(point)
    if not seen:
        return None
    layer, given = seen[0]
    alone = sum(part is layer for part, _ in seen) == 1 and given.shape[0] == 1 and given.numel() == point.numel()
    if not alone or not torch.equal(given.flatten(), point.flatten()):
        return None
    candidate = (layer, given.shape[1:])
    trials: list[list[Tensor]] = []
    for first in (None, candidate):
        values: list[Tensor] = []
        with reading(layers, lambda name, z, into=values: into.append(z.clone()), inputs):  # type: ignore[misc]
            next(_forwards(network, point, frame, [radius], first))
        trials.append(values)
    rtol = 1e-4 if point.dtype == torch.float32 else 1e-9
    same = all(torch.allclose(a, b, rtol=rtol, atol=rtol * float(a.abs().max())) for a, b in zip(*trials, strict=True))
    return candidate if same else None


def _linear_part(layer: nn.Module, values: Tensor) -> Tensor:
    """W v without the bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(values, layer.weight)
    convolution: Any = layer
    return convolution._conv_forward(values, convolution.weight, None)


@contextmanager
def _returning(layer: nn.Module, values: Tensor) -> Iterator[None]:
    """The layer gives these values whatever its input; its hooks still run."""
    object.__setattr__(layer, "forward", lambda _: values)
    try:
        yield
    finally:
        object.__delattr__(layer, "forward")


class LocalComplexity(StepProbe):
    """Local complexity at fixed training, test and random points during training.

    Works on any module whose network takes one tensor (or one tensor and constants). Logged for each set of points and
    each radius: `lc/<set>/r<r>`, mean over points of the sum over layers; `lc_fraction/...` of all units;
    `lc_layer/<set>/r<r>/<layer>`. With windows also their means and log2 of these (at least one crossing in all points
    is taken, so that it is finite): differences of log2 are ratios. See `StepProbe` for schedule and data.

    Args:
        num_points: of each set.
        vertices: P, even.
        radii: small against the distances of the points; 0.05 for pixels in [0, 1], 0.005 for normalised CIFAR.
        layers: names or globs of modules of the network whose outputs are the pre-activations; null takes the inputs
            of all activation modules. The logits are no pre-activation; name their layer to count them as the
            official code does.
        bounds: range of the random points, uniform in it; null takes the range of the training points.
        max_rows: vertices in a forward pass; bounds the memory.
        num_steps, every_n_steps, windows, network, constants, encoder, field, seed: as in `StepProbe`.

    Source: arXiv 2402.15555.
    """

    name = "local_complexity"
    summarized = ("lc/",)

    def __init__(
        self,
        num_points: int = 1024,
        vertices: int = 50,
        radii: list[float] | None = None,
        layers: list[str] | None = None,
        bounds: list[float] | None = None,
        max_rows: int = 1024,
        num_steps: int = 50,
        every_n_steps: int | None = None,
        windows: Windows | None = None,
        network: str | None = None,
        constants: list[int | float] | None = None,
        encoder: str | None = None,
        field: str = "image",
        seed: int = 0,
    ) -> None:
        super().__init__(num_points, num_steps, every_n_steps, windows, network, constants, encoder, field, seed)
        if vertices < 2 or vertices % 2:
            raise ValueError(f"LocalComplexity.vertices must be even and positive, got {vertices}")
        self.radii = [0.05] if radii is None else radii
        if not self.radii or min(self.radii) <= 0:
            raise ValueError(f"LocalComplexity.radii must be positive, got {radii}")
        self.vertices, self.patterns, self.bounds, self.max_rows = vertices, layers, bounds, max_rows
        self.log2_floor = 1 / num_points

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Names unknown layers before anything is trained."""
        super().setup(trainer, pl_module, stage)
        self._layers(self.network_of(pl_module))

    def measure(self, trainer: L.Trainer, network: nn.Module) -> dict[str, float]:
        """Counts of this rank's points, summed over the ranks."""
        train, test = (self.points(part, self._module) for part in ("train", "test"))
        sets = {"train": train, "test": test, "random": self._random_points(train)}
        frame = orthonormal_frame(self.vertices // 2, train[0].numel(), make_generator("lc/frame", seed=self.seed))
        layers, found = self._layers(network), {}
        for name, points in sets.items():
            mine = share_of_rank(points, trainer)
            counts, units = local_complexity(network, mine, frame, self.radii, layers, self.max_rows)
            sums = counts.sum(1).double().to(points.device)
            means = trainer.strategy.reduce(sums, reduce_op="sum").cpu() / len(points)
            for radius, row in zip(self.radii, means, strict=True):
                where = f"{name}/r{radius:g}"
                found[f"lc/{where}"] = float(row.sum())
                found[f"lc_fraction/{where}"] = float(row.sum()) / sum(units.values())
                found |= {f"lc_layer/{where}/{layer}": float(v) for layer, v in zip(units, row, strict=True)}
        return found

    def _layers(self, network: nn.Module) -> dict[str, nn.Module] | None:
        if self.patterns is not None:
            return find_layers(network, self.patterns, "LocalComplexity.layers")
        if not pre_activations(network):
            names = ", ".join(name for name, _ in network.named_modules() if name)
            raise ValueError(f"LocalComplexity.layers must be given: no activation modules among {names}")
        return None

    def _random_points(self, train: Tensor) -> Tensor:
        low, high = self.bounds or (float(train.min()), float(train.max()))
        generator = make_generator("lc/random", seed=self.seed)
        uniform = torch.rand(train.shape, generator=generator, dtype=torch.float64)
        return (low + (high - low) * uniform).to(train)
