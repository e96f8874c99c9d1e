"""The linear regions of a net on a plane through three inputs, as a picture."""

from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn

from callbacks.layers import evaluating, find_layers, reading
from callbacks.local_complexity import pre_activations
from callbacks.step_probe import StepProbe


def plane_through(points: Tensor, size: int, margin: float = 0.5) -> tuple[Tensor, Tensor]:
    """A square grid on the plane through three points.

    Args:
        points: (3, D) float, not on a line.
        size: S, pixels on a side.
        margin: free space on each side as a share of the points' extent.

    Returns:
        (S * S, D) inputs row by row, and (3, 2) float pixel positions (column, row) of the points.

    Raises:
        ValueError: the points lie on a line.
    """
    first = points[1] - points[0]
    along = first / torch.linalg.vector_norm(first)
    second = points[2] - points[0]
    across = second - (second @ along) * along
    height = torch.linalg.vector_norm(across)
    if not height > 1e-6 * torch.linalg.vector_norm(second):
        raise ValueError("the three points lie on a line and span no plane")
    across = across / height
    places = (points - points[0]) @ torch.stack([along, across], dim=1)
    low, high = places.amin(0), places.amax(0)
    extent = float((high - low).max()) * (1 + 2 * margin)
    corner = (low + high - extent) / 2
    line = torch.arange(size, device=points.device, dtype=points.dtype) * (extent / (size - 1))
    grid = corner + torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).reshape(-1, 2)
    inputs = points[0] + grid[:, :1] * along + grid[:, 1:] * across
    return inputs, (places - corner) / extent * (size - 1)


def region_borders(
    network: nn.Module, inputs: Tensor, size: int, layers: dict[str, nn.Module] | None = None, max_rows: int = 4096
) -> tuple[Tensor, Tensor]:
    """Where the sign pattern of a layer differs between neighbouring pixels of a grid, and the classes.

    Args:
        network: (B, ...) -> logits (B, C), run in evaluation mode.
        inputs: (S * S, ...) row by row.
        size: S.
        layers: whose outputs are the pre-activations; None takes the inputs of the net's activation modules.
        max_rows: inputs in a forward pass.

    Returns:
        (L, S, S) bool, true where a unit of the layer changes sign to the right or below; (S, S) int64 classes.
    """
    inputs_of = layers is None
    layers = pre_activations(network) if layers is None else layers
    codes: dict[str, list[Tensor]] = {name: [] for name in layers}
    classes = []

    def read(name: str, values: Tensor) -> None:
        positive = (values > 0).flatten(1)
        # a random weight for each unit: equal patterns have equal sums, different ones practically never
        generator = torch.Generator().manual_seed(0)
        weights = torch.rand(positive.shape[1], generator=generator, dtype=torch.float64).to(values.device)
        codes[name].append((positive.double() @ weights).cpu())

    with evaluating(network), reading(layers, read, inputs_of):
        for chunk in inputs.split(max_rows):
            classes.append(network(chunk).argmax(1).cpu())
    maps = torch.stack([torch.cat(parts) for parts in codes.values()]).reshape(-1, size, size)
    return _changes(maps, 1e-9), torch.cat(classes).reshape(size, size)


def draw_regions(borders: Tensor, classes: Tensor, places: Tensor, path: Path) -> None:
    """Writes a PNG: borders of early layers light blue, of late ones dark, the decision boundary red, points black.

    Args:
        borders: (L, S, S) bool.
        classes: (S, S) int64.
        places: (3, 2) pixel positions of the points.
        path: file; folders are made.
    """
    from PIL import Image, ImageDraw

    size = classes.shape[0]
    picture = torch.full((size, size, 3), 255, dtype=torch.uint8)
    for number, layer in enumerate(borders):
        depth = (number + 1) / len(borders)
        picture[layer] = torch.tensor([int(190 * (1 - depth)), int(210 - 130 * depth), 230], dtype=torch.uint8)
    picture[_changes(classes[None].double(), 0.5)[0]] = torch.tensor([200, 30, 30], dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(picture.numpy())
    draw, radius = ImageDraw.Draw(image), max(2, size // 100)
    for column, row in places.tolist():
        draw.ellipse([column - radius, row - radius, column + radius, row + radius], fill=(0, 0, 0))
    image.save(path)


def _changes(maps: Tensor, tolerance: float) -> Tensor:
    changed = torch.zeros(maps.shape, dtype=torch.bool)
    changed[:, :, :-1] |= (maps[:, :, 1:] - maps[:, :, :-1]).abs() > tolerance
    changed[:, :-1] |= (maps[:, 1:] - maps[:, :-1]).abs() > tolerance
    return changed


class LinearRegionPicture(StepProbe):
    """Draws the linear regions on the plane through three fixed training examples, `figures/regions_<step>.png`.

    Works on classifiers whose network takes one tensor. `regions/border_share` is the share of pixels on a border.

    Args:
        size: pixels on a side.
        layers: as in `LocalComplexity`.
        num_steps, every_n_steps, network, field, seed: as in `StepProbe`.

    Source: arXiv 2402.15555, figures of the partition during training.
    """

    name = "linear_regions"

    def __init__(
        self,
        size: int = 256,
        layers: list[str] | None = None,
        num_steps: int = 10,
        every_n_steps: int | None = None,
        network: str | None = None,
        field: str = "image",
        seed: int = 0,
    ) -> None:
        super().__init__(3, num_steps, every_n_steps, None, network, field=field, seed=seed)
        if size < 2:
            raise ValueError(f"LinearRegionPicture.size must be at least 2, got {size}")
        self.size, self.patterns = size, layers

    def measure(self, trainer: L.Trainer, network: nn.Module) -> dict[str, float]:
        """Draws on rank 0; the share is that of rank 0 everywhere."""
        points = self.points("train", self._module)
        inputs, places = plane_through(points.flatten(1), self.size)
        layers = None if self.patterns is None else find_layers(network, self.patterns, "LinearRegionPicture.layers")
        borders, classes = region_borders(network, inputs.reshape(-1, *points.shape[1:]), self.size, layers)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / "figures"
            draw_regions(borders, classes, places.cpu(), folder / f"regions_{trainer.global_step:07d}.png")
        return {"regions/border_share": float(borders.any(0).double().mean())}
