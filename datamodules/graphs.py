"""Graphs whose nodes are to be classified: generated ones, a neighbour graph of the digits, files."""

from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.rng import make_generator


@dataclass
class NodeGraph:
    """One graph.

    Args:
        edges: (2, E) int64, source and destination; self-loops are ignored, and added once to every node later.
        features: (N, d) float32.
        labels: (N,) int64.
        split: (N,) int64, 0 training, 1 validation, 2 test, -1 unused; None leaves the split to the datamodule.
    """

    edges: Tensor
    features: Tensor
    labels: Tensor
    split: Tensor | None = None


class GraphSource:
    """Gives one graph."""

    def read(self, generator: torch.Generator) -> NodeGraph:
        """The graph; `generator` serves those that are drawn."""
        raise NotImplementedError


class DigitsGraph(GraphSource):
    """The 1,797 handwritten digits of scikit-learn, each joined to its nearest neighbours; features are the pixels.

    Args:
        neighbours: per digit; an edge counts in both directions.
    """

    def __init__(self, neighbours: int = 10) -> None:
        if not 1 <= neighbours < 1797:
            raise ValueError(f"data.source.neighbours must be from 1 to 1796, got {neighbours}")
        self.neighbours = neighbours

    def read(self, generator: torch.Generator) -> NodeGraph:
        """As in `GraphSource`."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = torch.from_numpy(digits.data / 16)
        distance = torch.cdist(pixels, pixels).fill_diagonal_(torch.inf)
        near = distance.topk(self.neighbours, largest=False).indices.flatten()
        edges = torch.stack([torch.arange(len(pixels)).repeat_interleave(self.neighbours), near])
        return NodeGraph(both_ways(edges, len(pixels)), pixels.float(), torch.from_numpy(digits.target).long())


class SkewedBlocks(GraphSource):
    """Stochastic block model with Pareto-distributed degrees; features |class mean + N(0, 1)|.

    Args:
        num_nodes, num_classes, num_features: sizes; classes are equally likely.
        mean_degree: about; pairs drawn twice count once.
        within: share of edges that stay inside a class by intention (the others go anywhere).
        exponent: of the Pareto tail of the degrees; smaller is more skewed.
    """

    def __init__(
        self,
        num_nodes: int = 2000,
        num_classes: int = 4,
        num_features: int = 32,
        mean_degree: float = 2.9,
        within: float = 0.8,
        exponent: float = 2.5,
    ) -> None:
        if num_classes < 2 or num_nodes < 2 * num_classes:
            raise ValueError(
                f"data.source needs at least 2 classes of 2 nodes, got num_nodes {num_nodes}, num_classes {num_classes}"
            )
        if not 0 <= within <= 1 or mean_degree <= 0 or exponent <= 0:
            raise ValueError(
                "data.source.within must be in [0, 1], mean_degree and exponent positive, "
                f"got {within}, {mean_degree} and {exponent}"
            )
        self.sizes = (num_nodes, num_classes, num_features)
        self.mean_degree, self.within, self.exponent = mean_degree, within, exponent

    def read(self, generator: torch.Generator) -> NodeGraph:
        """As in `GraphSource`; a node without an edge gets one to another node of its class."""
        nodes, classes, features = self.sizes
        labels = torch.arange(nodes) % classes
        weight = torch.rand(nodes, generator=generator, dtype=torch.float64).clamp_min(1e-6) ** (-1 / self.exponent)
        count = round(nodes * self.mean_degree / 2)
        source, anywhere = torch.multinomial(weight, 2 * count, replacement=True, generator=generator).split(count)
        rows = torch.stack([torch.where(labels == c, weight, 0) for c in range(classes)])
        friends = torch.multinomial(rows, count, replacement=True, generator=generator)
        inside = friends[labels[source], torch.arange(count)]
        stays = torch.rand(count, generator=generator) < self.within
        edges = both_ways(torch.stack([source, torch.where(stays, inside, anywhere)]), nodes)
        alone = isolated(edges, nodes)
        # the next node of the same class, cyclically
        edges = torch.cat([edges, torch.stack([alone, (alone + classes) % (nodes - nodes % classes)])], 1)
        means = torch.randn(classes, features, generator=generator)
        noise = torch.randn(nodes, features, generator=generator)
        return NodeGraph(both_ways(edges, nodes), (means[labels] + noise).abs(), labels)


class GraphFile(GraphSource):
    """A graph in an `.npz` file: `edges` (2, E), `features` (N, d), `labels` (N,), optionally `split` (N,).

    Args:
        path: the file; recipes/virgo/README.md shows how to write it.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"data.source.path must name an .npz file; there is no {self.path.absolute()}")

    def read(self, generator: torch.Generator) -> NodeGraph:
        """As in `GraphSource`."""
        with np.load(self.path) as file:
            missing = {"edges", "features", "labels"} - set(file.files)
            if missing:
                raise ValueError(f"data.source.path {self.path} lacks {', '.join(sorted(missing))}")
            edges, features, labels = (torch.from_numpy(file[name]) for name in ("edges", "features", "labels"))
            split = torch.from_numpy(file["split"]).long() if "split" in file.files else None
        return NodeGraph(edges.long(), features.float(), labels.long(), split)


def both_ways(edges: Tensor, num_nodes: int) -> Tensor:
    """(2, E') int64: every edge in both directions, each once, without self-loops."""
    edges = torch.cat([edges, edges.flip(0)], 1)
    keys = (edges[0] * num_nodes + edges[1])[edges[0] != edges[1]].unique()
    return torch.stack([keys // num_nodes, keys % num_nodes])


def isolated(edges: Tensor, num_nodes: int) -> Tensor:
    """int64 positions of the nodes that no edge touches; self-loops do not count."""
    touched = torch.zeros(num_nodes, dtype=torch.bool)
    touched[edges[:, edges[0] != edges[1]]] = True
    return (~touched).nonzero().flatten()


class GraphNodes(L.LightningDataModule):
    """Node classification on one graph; a batch is all of it.

    `features` (N, d) float32, `label` (N,) int64, `split` (N,) int64 (0 training, 1 validation, 2 test, -1 unused),
    `edges` (2, E) int64 without self-loops. Graph and split are functions of the run's seed, equal on all ranks.

    Args:
        source: the graph.
        train_per_class, val_per_class: labelled nodes per class where the source has no split; the rest tests.
        allow_isolated: whether a node may be without edges; its only message is then its own.

    Raises:
        ValueError: isolated nodes that are not allowed, edges outside the graph, or a class that is too small.
    """

    def __init__(
        self, source: GraphSource, train_per_class: int = 20, val_per_class: int = 30, allow_isolated: bool = False
    ) -> None:
        super().__init__()
        if min(train_per_class, val_per_class) < 1:
            raise ValueError(
                f"data.train_per_class and val_per_class must be at least 1, got {train_per_class} and {val_per_class}"
            )
        self.source = source
        self.per_class = (train_per_class, val_per_class)
        self.allow_isolated = allow_isolated

    def setup(self, stage: str | None = None) -> None:
        """Reads or draws graph and split."""
        graph = self.source.read(make_generator("graph"))
        nodes = len(graph.labels)
        if len(graph.features) != nodes or (graph.edges.numel() and int(graph.edges.max()) >= nodes):
            raise ValueError(
                f"data.source: {nodes} labels, {len(graph.features)} rows of features and edges up to node "
                f"{int(graph.edges.max())} do not belong to one graph"
            )
        alone = isolated(graph.edges, nodes)
        if len(alone) and not self.allow_isolated:
            raise ValueError(
                f"data.source: {len(alone)} of {nodes} nodes have no edge (first: {alone[:5].tolist()}); "
                "data.allow_isolated true keeps them"
            )
        self.num_classes = int(graph.labels.max()) + 1
        self.edges = graph.edges[:, graph.edges[0] != graph.edges[1]].unique(dim=1)
        self.features, self.labels = graph.features, graph.labels
        self.split = self._draw_split(graph.labels) if graph.split is None else graph.split

    def _draw_split(self, labels: Tensor) -> Tensor:
        train, val = self.per_class
        order = torch.randperm(len(labels), generator=make_generator("split"))
        split = torch.full_like(labels, 2)
        for label in range(self.num_classes):
            members = order[labels[order] == label]
            if len(members) <= train + val:
                raise ValueError(
                    f"data.train_per_class {train} and val_per_class {val} leave no test node of class {label}, "
                    f"which has {len(members)}"
                )
            split[members[:train]], split[members[train : train + val]] = 0, 1
        return split

    def train_dataloader(self) -> DataLoader:
        """The whole graph, once an epoch."""
        batch = {"features": self.features, "label": self.labels, "split": self.split, "edges": self.edges}
        return DataLoader([batch], batch_size=None, generator=make_generator("loader"))  # type: ignore[arg-type]

    val_dataloader = train_dataloader
    test_dataloader = train_dataloader
