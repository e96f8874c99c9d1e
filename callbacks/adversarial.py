"""Accuracy under L-infinity attacks, and why two losses are needed to believe it."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from callbacks.layers import evaluating
from callbacks.rng import make_generator
from callbacks.step_probe import StepProbe, Windows, share_of_rank

Attack = Literal["ce", "ce64", "margin64"]


def logit_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, C), (B,) -> (B,) logit of the class minus the largest other one; negative where the net errs."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def pgd(
    network: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    eps: float,
    alpha: float,
    steps: int = 10,
    bounds: Sequence[float] = (0.0, 1.0),
    loss: Literal["ce", "margin"] = "ce",
    start: Tensor | None = None,
) -> Tensor:
    """Projected gradient ascent in the L-infinity ball; one step with alpha = eps is FGSM.

    Args:
        network: (B, ...) -> logits (B, C), run in evaluation mode; its parameters get no gradient.
        inputs: (B, ...) in the dtype of the net; that dtype decides the attack. In float32 the gradient of the cross
            entropy vanishes where a logit margin exceeds about 17, and the attack fails without the net being robust.
        labels: (B,) int64.
        eps: radius, in units of the inputs.
        alpha: length of a step.
        steps: number of them.
        bounds: smallest and largest value an input may have.
        loss: `ce` cross entropy (official), `margin` the largest other logit minus that of the class.
        start: (B, ...) first perturbation; None for zero.

    Returns:
        (B, ...) attacked inputs, detached.

    Source: arXiv 2402.15555, official code; margin loss after arXiv 1608.04644.
    """
    if loss not in ("ce", "margin"):
        raise ValueError(f"loss must be ce or margin, got {loss!r}")
    clean = inputs.detach()
    moved = clean if start is None else (clean + start).clamp(*bounds)
    with evaluating(network, gradients=True):
        for _ in range(steps):
            moved = moved.detach().requires_grad_(True)
            logits = network(moved)
            # mean or sum: only the sign of the gradient counts
            value = F.cross_entropy(logits, labels) if loss == "ce" else -logit_margins(logits, labels).sum()
            (gradient,) = torch.autograd.grad(value, moved)
            step = moved.detach() + alpha * gradient.sign() - clean
            moved = (clean + step.clamp(-eps, eps)).clamp(*bounds)
    return moved.detach()


class _Wide(nn.Module):
    """The network in float64, its own tensors untouched. No deep copy: a LightningModule would copy its Trainer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        self.state = {name: t.detach().double() if t.is_floating_point() else t for name, t in state.items()}

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.func.functional_call(self.network, self.state, (inputs,))


class AdversarialAccuracy(StepProbe):
    """Accuracy on fixed test examples under attack during training, and the logit margin.

    Works on classifiers whose network takes one tensor. Logged: `adv/<attack>/eps<e>`; `clean/train` and `clean/test`
    on the same examples; `margin/median` of the test logits. Three attacks: `ce` in the net's own precision (the
    paper's), `ce64` the same in float64, `margin64` with the margin loss in float64. Robustness is what remains under
    the last.

    Args:
        num_points: of training and of test examples.
        eps: radii, in units of the inputs after normalisation.
        attacks: which.
        alpha: length of a step; null for a quarter of eps.
        attack_steps: number of them.
        bounds: smallest and largest value an input may have.
        num_steps, every_n_steps, windows, network, field, seed: as in `StepProbe`.

    Source: arXiv 2402.15555.
    """

    name = "adversarial"

    def __init__(
        self,
        num_points: int = 1000,
        eps: list[float] | None = None,
        attacks: list[Attack] | None = None,
        alpha: float | None = None,
        attack_steps: int = 10,
        bounds: list[float] | None = None,
        num_steps: int = 50,
        every_n_steps: int | None = None,
        windows: Windows | None = None,
        network: str | None = None,
        field: str = "image",
        seed: int = 0,
    ) -> None:
        super().__init__(num_points, num_steps, every_n_steps, windows, network, field=field, seed=seed)
        self.eps = [0.1] if eps is None else eps
        self.attacks: list[Attack] = ["ce", "ce64", "margin64"] if attacks is None else attacks
        self.alpha, self.attack_steps, self.bounds = alpha, attack_steps, bounds or [0.0, 1.0]
        if not self.eps or min(self.eps) <= 0:
            raise ValueError(f"AdversarialAccuracy.eps must be positive, got {eps}")
        if attack_steps < 1:
            raise ValueError(f"AdversarialAccuracy.attack_steps must be at least 1, got {attack_steps}")

    def measure(self, trainer: L.Trainer, network: nn.Module) -> dict[str, float]:
        """Counts of this rank's examples, summed over the ranks."""
        found: dict[str, float] = {}
        for part in ("train", "test"):
            inputs = share_of_rank(self.points(part, self._module), trainer)
            labels = share_of_rank(self.labels(part, inputs.device), trainer)
            with evaluating(network):
                margins = logit_margins(network(inputs), labels)
            found[f"clean/{part}"] = self._share(trainer, margins > 0)
        # the test examples come last: they are attacked
        found["margin/median"] = self._median(trainer, margins)
        wide = _Wide(network)
        whole = self.points("test", self._module)
        generator = make_generator("adversarial/start", seed=self.seed)
        # drawn whole, so that it does not depend on the number of ranks
        unit = 2 * torch.rand(whole.shape, generator=generator, dtype=torch.float64).to(whole.device) - 1
        for attack in self.attacks:
            net: nn.Module = network if attack == "ce" else wide
            dtype = inputs.dtype if attack == "ce" else torch.float64
            for eps in self.eps:
                alpha = eps / 4 if self.alpha is None else self.alpha
                start = share_of_rank(eps * unit, trainer).to(dtype)
                loss: Any = "margin" if attack == "margin64" else "ce"
                arguments = (eps, alpha, self.attack_steps, self.bounds, loss, start)
                moved = pgd(net, inputs.to(dtype), labels, *arguments)
                with evaluating(net):
                    found[f"adv/{attack}/eps{eps:g}"] = self._share(trainer, logit_margins(net(moved), labels) > 0)
        return found

    def _share(self, trainer: L.Trainer, right: Tensor) -> float:
        counts = torch.stack([right.sum(), right.new_tensor(len(right), dtype=torch.int64)]).double()
        total = trainer.strategy.reduce(counts, reduce_op="sum")
        return float(total[0] / total[1])

    def _median(self, trainer: L.Trainer, values: Tensor) -> float:
        parts: list[Any] = [values.double().cpu()]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, values.double().cpu())
        return float(torch.cat(parts).median())
