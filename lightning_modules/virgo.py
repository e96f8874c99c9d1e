"""Virgo: graph nets whose initial variance stays level across layers, message passing included (arXiv 2312.02622).

Legend: N nodes, d features, h width, L layers, K classes, M members of the stack. A = D_in^-1/2 Adj D_out^-1/2 with
self-loops, a row per destination.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from callbacks.rng import make_generator

Init = Literal["xavier", "kaifor", "kaiback", "virgofor", "virgoback", "virgo"]
Mean = Literal["harmonic", "arithmetic"]


def message_matrix(edges: Tensor, num_nodes: int) -> Tensor:
    r"""A = D_in^-1/2 Adj D_out^-1/2, one self-loop added to each node.

    Args:
        edges: (2, E) int64, source and destination, without self-loops (a second one would count double).
        num_nodes: N.

    Returns:
        (N, N) float64 sparse, coalesced; row u gathers the messages to u. An isolated node has A_uu = 1.

    Raises:
        ValueError: a self-loop.

    Source: official code `utils.py` (DGL): out-degree at the source, in-degree at the destination. The PyG twin takes
    the in-degree twice, which differs on directed graphs.
    """
    if bool((edges[0] == edges[1]).any()):
        raise ValueError("edges must not hold self-loops: message_matrix adds one to every node")
    loops = torch.arange(num_nodes, device=edges.device)
    source, destination = torch.cat([edges, loops.expand(2, -1)], 1)
    out_degree, in_degree = (ends.bincount(minlength=num_nodes).double() for ends in (source, destination))
    values = (out_degree[source] * in_degree[destination]).rsqrt()
    return torch.sparse_coo_tensor(
        torch.stack([destination, source]), values, (num_nodes, num_nodes), check_invariants=False
    ).coalesce()


def channel_energy(messages: Tensor, channel: Tensor, depth: int) -> Tensor:
    """(L,) float64 c_l(u) = sum over nodes of (A^l u)^2, l = 1 .. L; `messages` A (N, N) sparse, `channel` u (N,)."""
    values, energies = channel.double()[:, None], []
    for _ in range(depth):
        values = torch.sparse.mm(messages, values)
        energies.append(values.square().sum())
    return torch.stack(energies)


def forward_variances(energy: Tensor, num_features: int, width: int) -> Tensor:
    r"""`virgofor`: v_1 = 2 / d and v_l = (2 / h) c_{l-1} / c_l for l = 2 .. L.

    Args:
        energy: (L,) c_l(u) of u = mean of the features over their channels; c_0 is not used.
        num_features: d.
        width: h.

    Returns:
        (L,) variances of the weights.

    Source: official code `utils.py`; the 2 stands for ReLU and is applied to the last, linear layer too.
    """
    later = 2 / width * energy[:-1] / energy[1:]
    return torch.cat([energy.new_tensor([2 / num_features]), later])


def backward_variances(energy: Tensor, num_nodes: int, num_classes: int, width: int) -> Tensor:
    r"""`virgoback`: w_1 = N / ((K - 1) c_1) and w_l = (2 / h) c_{l-1} / c_l, reversed: w_1 is the last layer's.

    Args:
        energy: (L,) c_l(1) of the constant channel.
        num_nodes, num_classes, width: N, K, h.

    Returns:
        (L,) variances of the weights, first layer first.

    Source: official code `utils.py`.
    """
    first = num_nodes / ((num_classes - 1) * energy[:1])
    return torch.cat([first, 2 / width * energy[:-1] / energy[1:]]).flip(0)


def virgo_variances(forward: Tensor, backward: Tensor, mean: Mean = "harmonic") -> Tensor:
    """`virgo`: 2 / (1 / v + 1 / w) (default of the official function), or (v + w) / 2 (its node scripts); (L,) each."""
    if mean == "arithmetic":
        return (forward + backward) / 2
    return 2 / (1 / forward + 1 / backward)


def uniform_bound(variance: Tensor) -> Tensor:
    """a = sqrt(3 v): U(-a, a) has variance v."""
    return (3 * variance).sqrt()


def init_bounds(
    messages: Tensor, features: Tensor, sizes: Sequence[int], init: Init, mean: Mean = "harmonic"
) -> Tensor:
    r"""Bounds a_l of the uniform initial weights of each layer.

    Args:
        messages: A (N, N), float64 sparse.
        features: X (N, d).
        sizes: d, h, ..., h, K.
        init: `xavier` a = sqrt(6 / (in + out)); `kaifor` sqrt(6 / in); `kaiback` sqrt(6 / out); Virgo's three.
        mean: of `virgo`.

    Returns:
        (L,) float64.

    Raises:
        ValueError: a forward rule on features without a mean channel, whose energy is 0.

    Source: official code `utils.py`; in its DGL branch fan-in and fan-out of torch are swapped, here they are as named.
    """
    fan_in, fan_out = torch.tensor(sizes[:-1]).double(), torch.tensor(sizes[1:]).double()
    if init == "xavier":
        return (6 / (fan_in + fan_out)).sqrt()
    if init in ("kaifor", "kaiback"):
        return (6 / (fan_in if init == "kaifor" else fan_out)).sqrt()
    nodes, depth, width = len(features), len(sizes) - 1, sizes[1]
    constant = torch.ones(nodes, dtype=torch.float64)
    backward = backward_variances(channel_energy(messages, constant, depth), nodes, sizes[-1], width)
    if init == "virgoback":
        return uniform_bound(backward)
    energy = channel_energy(messages, features.double().mean(1), depth)
    if bool((energy == 0).any()):
        raise ValueError(f"model.inits {init} needs features whose mean over channels does not vanish at every node")
    forward = forward_variances(energy, sizes[0], width)
    return uniform_bound(forward if init == "virgofor" else virgo_variances(forward, backward, mean))


class _Pass(torch.autograd.Function):
    """A x with the transpose at hand: torch would build it anew in each backward pass, a quarter of a step."""

    @staticmethod
    def forward(ctx: Any, messages: Tensor, transposed: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(transposed)
        return torch.sparse.mm(messages, values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        return None, None, torch.sparse.mm(ctx.saved_tensors[0], gradient)


def graph_net(messages: tuple[Tensor, Tensor], features: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    r"""Outputs h_l of every layer of a stack of GCNs without biases: h_l = relu(A h_{l-1} W_l), the last one linear.

    Args:
        messages: A and its transpose, (N, N) sparse in the dtype of the weights.
        features: (N, d).
        weights: per layer (M, in, out).

    Returns:
        L tensors (M, N, out).

    Source: official code, GCN of `comp1.py`.
    """
    hidden, outputs = features.expand(len(weights[0]), *features.shape), []
    for layer, weight in enumerate(weights):
        members, nodes, _ = hidden.shape
        mixed = (hidden @ weight).transpose(0, 1).reshape(nodes, -1)
        passed = _Pass.apply(*messages, mixed).view(nodes, members, -1).transpose(0, 1)
        hidden = passed if layer == len(weights) - 1 else passed.relu()
        outputs.append(hidden)
    return outputs


def log_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """(M,) log of the ratio of variances (unbiased, over all entries) of two stacks (M, N, width)."""
    return numerator.var((1, 2)).log() - denominator.var((1, 2)).log()


def _as_csr(matrix: Tensor) -> Tensor:
    """float32 rows; torch announces on each first use that they are in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return matrix.float().to_sparse_csr()


class Virgo(L.LightningModule):
    """Graph convolution nets on one graph, stacked: members share their uniform draws and differ in their bounds.

    Biases are left out (zero in the official code at the start). Logs per member, after the update:
    `train|val|test/acc_<init>`, `test/acc_mean_<init>` (over the epochs so far) and, with `patience`,
    `test/acc_stopped_<init>` (at the best validation accuracy before that many epochs without a better one). At
    initialisation, under the cross entropy of all nodes, in the first row: `init/var_<init>_<l>` and
    `init/gradvar_<init>_<l>` of each layer's output; `init/fwd_<init>` = log var h_{L-1} / var h_1 and
    `init/bwd_<init>` = log var g_1 / var g_{L-1}; with `xavier` among the members `init/fwd_to_xavier_<init>` and
    `init/bwd_to_xavier_<init>`, the ratios of their absolute values.

    Args:
        inits: one member for each.
        optimizer: callable of the recipe; elementwise ones (Adam) train the stack like separate nets.
        width: h.
        depth: L, at least 3 for the log ratios.
        mean: of `virgo`.
        patience: epochs without a better validation accuracy after which a member's result stands; None for none.

    Raises:
        ValueError: no member or one twice, depth or width too small.

    Source: arXiv 2312.02622 and official code; defaults are those of its shipped example (`comp1.py`).
    """

    def __init__(
        self,
        inits: list[Init],
        optimizer: OptimizerCallable,
        width: int = 64,
        depth: int = 3,
        mean: Mean = "arithmetic",
        patience: int | None = None,
    ) -> None:
        super().__init__()
        if not inits or len(set(inits)) < len(inits):
            raise ValueError(f"model.inits must name at least one initialisation, each once, got {inits}")
        if depth < 3 or width < 1:
            raise ValueError(f"model.depth must be at least 3 and model.width at least 1, got {depth} and {width}")
        if patience is not None and patience < 1:
            raise ValueError(f"model.patience must be at least 1, got {patience}")
        self.save_hyperparameters(ignore=["optimizer"])
        self.inits = inits
        self.optimizer = optimizer
        for name in ("acc_sum", "best_val", "best_test", "waited"):
            self.register_buffer(name, torch.zeros(len(inits)))

    acc_sum: Tensor
    best_val: Tensor
    best_test: Tensor
    waited: Tensor

    def setup(self, stage: str) -> None:
        """Draws the weights, once: their bounds follow from the graph."""
        if hasattr(self, "weights"):
            return
        data: Any = getattr(self.trainer, "datamodule", None)
        if not (hasattr(data, "edges") and hasattr(data, "features")):
            raise ValueError(f"Virgo needs a datamodule with edges and features, got {type(data).__name__}")
        width, depth, mean = (self.hparams[name] for name in ("width", "depth", "mean"))
        sizes = [data.features.shape[1], *[width] * (depth - 1), data.num_classes]
        messages = message_matrix(data.edges, len(data.features))
        bounds = torch.stack([init_bounds(messages, data.features, sizes, init, mean) for init in self.inits]).float()
        generator, weights = make_generator("weights"), []
        for layer, bound in enumerate(bounds.T):
            draw = 2 * torch.rand(sizes[layer], sizes[layer + 1], generator=generator) - 1
            weights.append(bound[:, None, None] * draw)
        self.weights = nn.ParameterList(weights)
        # CSR multiplies fastest; not a buffer, since it is neither trained nor worth a place in the checkpoint
        self._messages = (_as_csr(messages), _as_csr(messages.t()))

    def on_fit_start(self) -> None:
        """Moves the graph to the device."""
        forth, back = self._messages
        self._messages = forth.to(self.device), back.to(self.device)

    on_validation_start = on_test_start = on_fit_start

    def forward(self, features: Tensor) -> Tensor:
        """(M, N, K) logits."""
        return graph_net(self._messages, features, list(self.weights))[-1]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Sum of the members' cross entropies over the training nodes; the first step also measures the start."""
        outputs = graph_net(self._messages, batch["features"], list(self.weights))
        rows = batch["split"] == 0
        if self.global_step == 0:
            # the theory's backward signal comes from every node
            everywhere = self._loss(outputs[-1], batch["label"])
            self._log_start(outputs, torch.autograd.grad(everywhere, outputs, retain_graph=True))
        loss = self._loss(outputs[-1][:, rows], batch["label"][rows])
        self.log("train/loss", loss.detach() / len(self.inits), batch_size=1)
        return loss

    @staticmethod
    def _loss(logits: Tensor, labels: Tensor) -> Tensor:
        """Sum over members of the mean cross entropy over nodes."""
        return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits))) * len(logits)

    def _log_start(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        ratios = {"fwd": log_ratio(outputs[-2].detach(), outputs[0].detach())}
        ratios["bwd"] = log_ratio(gradients[0], gradients[-2])
        values: dict[str, Tensor] = {}
        for i, init in enumerate(self.inits):
            for layer, (output, gradient) in enumerate(zip(outputs, gradients, strict=True), start=1):
                values[f"init/var_{init}_{layer}"] = output[i].detach().var()
                values[f"init/gradvar_{init}_{layer}"] = gradient[i].var()
            for name, ratio in ratios.items():
                values[f"init/{name}_{init}"] = ratio[i]
                if "xavier" in self.inits:
                    values[f"init/{name}_to_xavier_{init}"] = (ratio[i] / ratio[self.inits.index("xavier")]).abs()
        self.log_dict(values, batch_size=1)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Accuracy of each member on the three parts."""
        hits = (self(batch["features"]).argmax(-1) == batch["label"]).float()
        accuracy = {name: hits[:, batch["split"] == part].mean(1) for part, name in enumerate(("train", "val", "test"))}
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._keep(accuracy["val"], accuracy["test"])
            accuracy["test_mean"] = self.acc_sum / (self.current_epoch + 1)
            if self.hparams["patience"] is not None:
                accuracy["test_stopped"] = self.best_test
        for name, values in accuracy.items():
            part, _, kind = name.partition("_")
            key = f"{part}/acc_{kind}_" if kind else f"{part}/acc_"
            self.log_dict({f"{key}{init}": value for init, value in zip(self.inits, values, strict=True)}, batch_size=1)

    test_step = validation_step

    def _keep(self, val: Tensor, test: Tensor) -> None:
        """Adds the epoch to the mean; keeps the best member's accuracy until its patience has run out."""
        self.acc_sum += test
        patience = self.hparams["patience"]
        if patience is None:
            return
        better = (val > self.best_val) & (self.waited < patience)
        self.best_val = torch.where(better, val, self.best_val)
        self.best_test = torch.where(better, test, self.best_test)
        self.waited = torch.where(better, 0, self.waited + 1)
        if bool((self.waited >= patience).all()):
            self.trainer.should_stop = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimizer over the stack."""
        return self.optimizer(self.parameters())
