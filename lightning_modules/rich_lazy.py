"""Rank of the initial connectivity against rich or lazy learning (arXiv 2310.08513).

Legend: M members of a stack (one per rank), T steps, B trials, H hidden units, I inputs, K outputs. Official code
Helena-Yuhan-Liu/BioRNN_RichLazy; where paper and code differ, the code decides.
"""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from callbacks.rng import make_generator


def low_rank(matrix: Tensor, rank: int) -> Tensor:
    r"""The `rank` strongest singular triplets, rescaled to the Frobenius norm of the whole matrix.

    Args:
        matrix: (n, m).
        rank: 1 to min(n, m).

    Raises:
        ValueError: rank outside that range.

    Source: official code `main.py`; without the rescaling one compares norms, not ranks.
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"model.ranks must be between 1 and the width {min(matrix.shape)}, got {rank}")
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    cut = left[:, :rank] * values[:rank] @ right[:rank]
    return cut * (torch.linalg.matrix_norm(matrix) / torch.linalg.matrix_norm(cut))


def rnn_states(inputs: Tensor, w_in: Tensor, w: Tensor, leak: float = 1.0) -> Tensor:
    r"""h_t = relu((1 - a) h_{t-1} + a (W_in x_t + W h_{t-1})), h_0 = 0, no biases.

    Args:
        inputs: (T, B, I), the same for all members.
        w_in: (M, H, I).
        w: (M, H, H).
        leak: a = dt / tau.

    Returns:
        (T, M, B, H), h_1 to h_T.

    Source: official code, class `CTRNN`.
    """
    driven = inputs.unsqueeze(1) @ w_in.mT
    transposed, state, states = w.mT, torch.zeros_like(driven[0]), []
    for step in driven:
        fresh = torch.baddbmm(step, state, transposed, beta=leak, alpha=leak)
        state = F.relu(fresh if leak == 1 else fresh + (1 - leak) * state)
        states.append(state)
    return torch.stack(states)


def rnn_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    r"""Cross entropy in nats, mean over all trials and all steps that have a target.

    Args:
        outputs: (T, M, B, K) logits.
        targets: (T, B) int64; -100 for a step without.

    Returns:
        (M,).

    Source: official code: all steps in the neuroscience tasks, the last one for MNIST.
    """
    members = outputs.shape[1]
    flat = outputs.movedim(1, 0).flatten(0, 2)
    losses = F.cross_entropy(flat, targets.flatten().repeat(members), reduction="none").view(members, -1)
    return losses.sum(1) / (targets != -100).sum()


def tangent_features(states: Tensor, w: Tensor, w_out: Tensor, steps: list[int], leak: float = 1.0) -> Tensor:
    r"""Jacobian of the outputs with respect to the recurrent weights, without autograd.

    For an output at step t: d = W_out[k]; for tau = t .. 1: m = d * 1[h_tau > 0], J += a m h_{tau-1}^T,
    d <- a W^T m + (1 - a) m.

    Args:
        states: (T, B, H) of one net.
        w: (H, H).
        w_out: (K, H).
        steps: steps t whose outputs count, from 0.
        leak: a.

    Returns:
        (len(steps) * B * K, H * H), rows in the order step, trial, output.

    Source: arXiv 2310.08513, kernel alignment; the recursion is derived and equals the official code's autograd.
    """
    before = torch.cat([torch.zeros_like(states[:1]), states[:-1]])
    rows = []
    for last in steps:
        back = w_out.expand(states.shape[1], -1, -1)
        messages = []
        for step in range(last, -1, -1):
            message = back * (states[step] > 0).unsqueeze(1)
            messages.append(message)
            back = leak * message @ w + (1 - leak) * message
        stacked = torch.stack(messages[::-1])
        rows.append(leak * torch.einsum("sbkh,sbg->bkhg", stacked, before[: last + 1]).flatten(2).flatten(0, 1))
    return torch.cat(rows)


def linear_kernel(inputs: Tensor, first: Tensor, second: Tensor) -> Tensor:
    r"""Tangent kernel X W_1^T W_1 X^T + |w_2|^2 X X^T of f(x) = w_2 . (W_1 x).

    Args:
        inputs: (P, d).
        first: (..., h, d) W_1.
        second: (..., h) w_2.

    Returns:
        (..., P, P).

    Source: arXiv 2310.08513, two-layer linear net.
    """
    hidden = inputs @ first.mT
    return hidden @ hidden.mT + second.square().sum(-1)[..., None, None] * (inputs @ inputs.T)


def alignment(kernel: Tensor, initial: Tensor) -> Tensor:
    """<K, K_0> / (||K|| ||K_0||) of kernels (..., n, n), not centred: of the tangent kernel KA, of H H^T the RSA."""
    inner = (kernel * initial).sum((-2, -1))
    return inner / (torch.linalg.matrix_norm(kernel) * torch.linalg.matrix_norm(initial))


def linear_gradients(
    covariance: Tensor, teacher: Tensor, first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Gradients of mean (f(x) - <beta, x>)^2 / 2 = e^T S e / 2, e = W_1^T w_2 - beta: the points enter by S only.

    Args:
        covariance: (d, d) S = X^T X / P.
        teacher: (d,) beta.
        first: (M, h, d) W_1.
        second: (M, h) w_2.

    Returns:
        Of W_1, of w_2, and the losses (M,).

    Source: arXiv 2310.08513, two-layer linear student and teacher.
    """
    error = (second.unsqueeze(-2) @ first).squeeze(-2) - teacher
    pull = error @ covariance
    gradient = second.unsqueeze(-1) * pull.unsqueeze(-2)
    return gradient, (first @ pull.unsqueeze(-1)).squeeze(-1), (error * pull).sum(-1) / 2


def _check(ranks: list[int], hidden: int, lr: float, gain: float) -> None:
    if not ranks or len(set(ranks)) < len(ranks):
        raise ValueError(f"model.ranks must be at least one, all different, got {ranks}")
    if hidden < 1 or lr <= 0 or gain <= 0:
        raise ValueError(
            f"model.hidden must be at least 1, model.lr and model.gain positive, got {hidden}, {lr} and {gain}"
        )


def _data(module: L.LightningModule, method: str, example: str) -> Any:
    data: Any = getattr(module.trainer, "datamodule", None)
    if not hasattr(data, method):
        raise ValueError(
            f"{type(module).__name__} needs a datamodule with {method}(), got {type(data).__name__}; {example} has it"
        )
    return data


class RichLazyRNN(L.LightningModule):
    """A recurrent net for each rank of its initial recurrent weights, in one stack. float32.

    A batch is a block of the data's iterations. All ranks share the full initial matrix and the trials; input and
    output weights are drawn anew for every rank, as in the official code. Metrics end in `/r<rank>`: `loss`,
    `accuracy` of the last step, `dw` = ||W - W_0||_F and `dw_rel`, relative to ||W_0||_F; `rsa`, alignment of the last
    step's H H^T; `sign_sim`, share of its equal signs; `effective_rank` (sum s)^2 / sum s^2; `spectral_norm`; and, in
    the last epoch only, `ka`, alignment of the tangent kernel.

    Args:
        ranks: ranks of the initial recurrent matrix.
        hidden: H.
        gain: W_0 is gain * N(0, 1) / sqrt(H) before it is cut.
        lr, momentum: of SGD on all three matrices.
        leak: a = dt / tau.
        kernel_trials: stored trials on which the tangent kernel is taken.

    Source: arXiv 2310.08513 and official code; defaults are the code's.
    """

    def __init__(
        self,
        ranks: list[int],
        hidden: int = 300,
        gain: float = 1.25,
        lr: float = 0.003,
        momentum: float = 0.9,
        leak: float = 1.0,
        kernel_trials: int = 32,
    ) -> None:
        super().__init__()
        _check(ranks, hidden, lr, gain)
        if not 0 < leak <= 1:
            raise ValueError(f"model.leak must be in (0, 1], got {leak}")
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.ranks, self.hidden, self.gain, self.leak = ranks, hidden, gain, leak
        self.lr, self.momentum, self.kernel_trials = lr, momentum, kernel_trials

    def setup(self, stage: str) -> None:
        """Draws the weights, the same on every rank, and remembers them."""
        data = _data(self, "stored", "datamodules.sequences.TwoAlternatives")
        if not 1 <= self.kernel_trials <= data.stored_trials:
            raise ValueError(
                f"model.kernel_trials must be between 1 and data.stored_trials {data.stored_trials}, "
                f"got {self.kernel_trials}"
            )
        shape = (self.hidden, self.hidden)
        full = self.gain / self.hidden**0.5 * torch.randn(shape, generator=make_generator("weights/recurrent"))
        edges = [self._draw_edges(rank, data.num_inputs, data.num_outputs) for rank in self.ranks]
        initial = {
            "w_in": torch.stack([w_in for w_in, _ in edges]),
            "w": torch.stack([low_rank(full, rank) for rank in self.ranks]),
            "w_out": torch.stack([w_out for _, w_out in edges]),
        }
        self.weights = nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in initial.items()})
        inputs, targets = data.stored()
        for name, value in {**initial, "inputs": inputs, "targets": targets}.items():
            self.register_buffer(f"stored_{name}", value, persistent=False)

    def _draw_edges(self, rank: int, num_inputs: int, num_outputs: int) -> tuple[Tensor, Tensor]:
        """Input and output weights of one rank, uniform in +-1 / sqrt(fan_in)."""
        generator = make_generator(f"weights/edges/{rank}")
        shapes = ((self.hidden, num_inputs), (num_outputs, self.hidden))
        w_in, w_out = ((2 * torch.rand(s, generator=generator) - 1) / s[1] ** 0.5 for s in shapes)
        return w_in, w_out

    def configure_optimizers(self) -> Any:
        """SGD on all weights; elementwise, so members do not mix."""
        return torch.optim.SGD(self.weights.values(), lr=self.lr, momentum=self.momentum)

    def on_train_epoch_start(self) -> None:
        """Starts the sums of the epoch."""
        self._losses, self._count = torch.zeros(len(self.ranks), device=self.device), 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """One step for each iteration of the block; the loss is the mean over the block and the members."""
        optimizer: Any = self.optimizers()
        total = torch.zeros(len(self.ranks), device=self.device)
        for inputs, targets in zip(batch["input"], batch["target"], strict=True):
            optimizer.zero_grad()
            states = rnn_states(inputs, self.weights["w_in"], self.weights["w"], self.leak)
            losses = rnn_loss(states @ self.weights["w_out"].mT, targets)
            # summed: each member gets the gradient of its own loss
            self.manual_backward(losses.sum())
            optimizer.step()
            total += losses.detach()
        self._losses += total
        self._count += len(batch["target"])
        return {"loss": total.mean() / len(batch["target"])}

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        """Logs the epoch's losses, and compares the nets with what they were, on the stored trials."""
        initial = [getattr(self, f"stored_{name}") for name in ("w_in", "w", "w_out")]
        current = [self.weights[name].detach() for name in ("w_in", "w", "w_out")]
        inputs, targets = getattr(self, "stored_inputs"), getattr(self, "stored_targets")  # noqa: B009
        before, after = (rnn_states(inputs, w_in, w, self.leak) for w_in, w, _ in (initial, current))
        moved = torch.linalg.matrix_norm(current[1] - initial[1])
        values = torch.linalg.svdvals(current[1])
        losses = self._losses / self._count
        self.log("train/loss", losses.mean(), prog_bar=True)
        columns = {
            "loss": losses,
            "accuracy": ((after[-1] @ current[2].mT).argmax(-1) == targets[-1]).float().mean(-1),
            "dw": moved,
            "dw_rel": moved / torch.linalg.matrix_norm(initial[1]),
            "rsa": alignment(after[-1] @ after[-1].mT, before[-1] @ before[-1].mT),
            "sign_sim": (after[-1].sign() == before[-1].sign()).float().mean((-2, -1)),
            "effective_rank": values.sum(-1) ** 2 / values.square().sum(-1),
            "spectral_norm": values[:, 0],
        }
        if self.current_epoch + 1 == self.trainer.max_epochs:
            columns["ka"] = self._kernel_alignment(before, after, initial, current, targets)
        for name, column in columns.items():
            self.log_dict({f"{name}/r{rank}": value for rank, value in zip(self.ranks, column, strict=True)})

    def _kernel_alignment(
        self, before: Tensor, after: Tensor, initial: list[Tensor], current: list[Tensor], targets: Tensor
    ) -> Tensor:
        """KA (M,) on the first stored trials, over the steps that have a target."""
        steps = [step for step in range(len(targets)) if targets[step, 0] != -100]
        found = []
        for member in range(len(self.ranks)):
            kernels = []
            for states, (_, w, w_out) in ((before, initial), (after, current)):
                part = states[:, member, : self.kernel_trials]
                features = tangent_features(part, w[member], w_out[member], steps, self.leak)
                kernels.append(features @ features.T)
            found.append(alignment(*kernels))
        return torch.stack(found)


class RichLazyLinear(L.LightningModule):
    """f(x) = w_2 . (W_1 x) against a linear teacher, for each rank of the initial W_1, in one stack. float64.

    An epoch is one batch, the whole problem, and makes `steps_per_epoch` steps of full-batch descent on all weights.
    All members share the full initial matrix. Metrics end in `/r<rank>`, and in `/aligned` for the start
    ||W_0|| (w_2 / |w_2|) (beta / |beta|)^T: `loss`; `kernel_change` = 1 - KA of the tangent kernel and its logarithm
    `log_kernel_change`; `dw_rel` = ||W_1 - W_0||_F / ||W_0||_F and `log_dw_rel`.

    Args:
        ranks: ranks of the initial W_1.
        aligned: adds the rank-one start that is aligned with the teacher.
        hidden: h.
        gain: W_0 is gain * N(0, 1) / sqrt(d) before it is cut; w_2 is N(0, 1) / sqrt(h).
        lr: step length.
        steps_per_epoch: steps between two rows of metrics.

    Source: arXiv 2310.08513, two-layer linear net; the settings are our own.
    """

    def __init__(
        self,
        ranks: list[int],
        aligned: bool = True,
        hidden: int = 100,
        gain: float = 1.0,
        lr: float = 0.02,
        steps_per_epoch: int = 200,
    ) -> None:
        super().__init__()
        _check(ranks, hidden, lr, gain)
        if steps_per_epoch < 1:
            raise ValueError(f"model.steps_per_epoch must be at least 1, got {steps_per_epoch}")
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.ranks, self.aligned, self.hidden, self.gain = ranks, aligned, hidden, gain
        self.lr, self.steps_per_epoch = lr, steps_per_epoch
        self.members = [f"r{rank}" for rank in ranks] + (["aligned"] if aligned else [])

    def setup(self, stage: str) -> None:
        """Draws the weights, the same on every rank, and remembers them."""
        teacher = _data(self, "problem", "datamodules.teachers.LinearTeacher").problem()["teacher"]
        generator, dim = make_generator("weights"), len(teacher)
        full = self.gain / dim**0.5 * torch.randn(self.hidden, dim, generator=generator, dtype=torch.float64)
        second = torch.randn(self.hidden, generator=generator, dtype=torch.float64) / self.hidden**0.5
        starts = [low_rank(full, rank) for rank in self.ranks]
        if self.aligned:
            starts.append(
                torch.linalg.matrix_norm(full) * torch.outer(second / second.norm(), teacher / teacher.norm())
            )
        first, second = torch.stack(starts), second.repeat(len(starts), 1)
        self.first, self.second = nn.Parameter(first.clone()), nn.Parameter(second.clone())
        self.register_buffer("stored_first", first, persistent=False)
        self.register_buffer("stored_second", second, persistent=False)

    def configure_optimizers(self) -> Any:
        """Plain gradient steps."""
        return torch.optim.SGD([self.first, self.second], lr=self.lr)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """`steps_per_epoch` steps; the loss is the mean over the members before the last one."""
        optimizer: Any = self.optimizers()
        with torch.no_grad():
            covariance = batch["input"].T @ batch["input"] / len(batch["input"])
            for _ in range(self.steps_per_epoch):
                gradients = linear_gradients(covariance, batch["teacher"], self.first, self.second)
                self.first.grad, self.second.grad, losses = gradients
                optimizer.step()
            self._log(batch["input"], losses)
        self.log("train/loss", losses.mean(), prog_bar=True)
        return {"loss": losses.mean()}

    def _log(self, inputs: Tensor, losses: Tensor) -> None:
        before, second = getattr(self, "stored_first"), getattr(self, "stored_second")  # noqa: B009
        kernels = linear_kernel(inputs, before, second), linear_kernel(inputs, self.first, self.second)
        change = 1 - alignment(*kernels)
        moved = torch.linalg.matrix_norm(self.first - before) / torch.linalg.matrix_norm(before)
        columns = {
            "loss": losses,
            "kernel_change": change,
            "log_kernel_change": change.log(),
            "dw_rel": moved,
            "log_dw_rel": moved.log(),
        }
        for name, column in columns.items():
            self.log_dict({f"{name}/{member}": value for member, value in zip(self.members, column, strict=True)})
