"""What is measured on nets side by side: errors, distances, neural tangent kernels, gradient statistics.

Legend: N nets, P points, m points of a kernel, d inputs. Stacks of weights as in `nets`; results have N in front.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.stacks.nets import Activation, activate


class FitStatistics(NamedTuple):
    """Of a centred predictor o on labels y, each (N,); `loss` times alpha is the mean hinge loss in margins."""

    loss: Tensor
    n_unfitted: Tensor
    min_margin: Tensor
    error: Tensor


def fit_statistics(output: Tensor, labels: Tensor, alpha: Tensor) -> FitStatistics:
    """Hinge loss, points inside the margin, smallest o y, and error.

    Args:
        output: (N, P) o.
        labels: (N, P) in {-1, +1}.
        alpha: (N,).

    Returns:
        Mean of relu(1 - alpha o y) / alpha, number of alpha o y < 1, min of o y, share of o y <= 0. An output that is
        not finite is an error and unfitted.

    Source: arXiv 2301.13703, official code.
    """
    margin, scale = output * labels, alpha.unsqueeze(-1)
    finite = output.isfinite()
    return FitStatistics(
        ((1 - scale * margin).relu() / scale).mean(-1),
        (~(finite & (scale * margin >= 1))).sum(-1),
        margin.amin(-1),
        (~(finite & (margin > 0))).to(output.dtype).mean(-1),
    )


def running_loss(loss: Tensor, batch_loss: Tensor, points: Tensor, batch: int) -> Tensor:
    """Estimate of the loss between exact evaluations: L <- ((P - B) L + B L_batch) / P.

    Args:
        loss, batch_loss: (N,) the estimate so far, and the mean loss of the batch before its step.
        points: (N,) P.
        batch: B.

    Returns:
        (N,).

    Source: arXiv 2301.13703, official code.
    """
    return ((points - batch) * loss + batch * batch_loss) / points


def mean_relative_distance(output: Tensor) -> Tensor:
    """2/(P - 1) sum_mu (o_mu - mean o)^2: mean of (o_mu - o_nu)^2 over pairs. (N, P) -> (N,). Source: official code."""
    return 2 * output.var(-1)


def layer_norms(weights: list[Tensor], start: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Squared norms of each layer: of w and of w - w_0.

    Args:
        weights, start: the stack now and at initialisation.

    Returns:
        Two (N, layers).
    """
    moved = [now - then for now, then in zip(weights, start, strict=True)]
    norms = [torch.stack([part.flatten(1).square().sum(1) for part in parts], 1) for parts in (weights, moved)]
    return norms[0], norms[1]


def relative_change(weights: list[Tensor], start: list[Tensor]) -> Tensor:
    """dw = |w - w_0| / |w_0| over all layers, (N,); infinite for a start at zero."""
    moved, base = layer_norms(weights, start)[1].sum(1), layer_norms(start, start)[0].sum(1)
    return (moved / base).sqrt()


def layer_factors(
    weights: list[Tensor], inputs: Tensor, scales: list[float], activation: Activation
) -> list[tuple[Tensor, Tensor]]:
    """Each layer's gradient of f(x_mu) as an outer product of two vectors.

    Args:
        weights: the stack.
        inputs: (N, m, d).
        scales, activation: as in `nets.forward`.

    Returns:
        For each layer A (N, m, in) and Delta (N, m, out): df(x_mu)/dW = A_mu Delta_mu^T.
    """
    after, before = [inputs.detach()], []
    with torch.enable_grad():
        for weight, scale in zip(weights, scales, strict=True):
            # a leaf, so that gradients reach the first layer's output though nothing below asks for them
            product = scale * torch.bmm(after[-1], weight.detach())
            before.append(product if product.requires_grad else product.requires_grad_())
            after.append(activate(before[-1], activation))
        # a point's output depends on its own row alone
        deltas = torch.autograd.grad(before[-1].sum(), before)
    return [(a.detach(), scale * delta) for a, scale, delta in zip(after[:-1], scales, deltas, strict=True)]


def kernel(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
    """Neural tangent kernel K = J J^T, a plain sum over all weights; layer by layer as (A A^T) * (Delta Delta^T).

    Args:
        left, right: `layer_factors` of two sets of points; right None means left.

    Returns:
        (N, m, m'). J itself, m times all weights, is never built.

    Source: arXiv 2301.13703, official code, which builds J.
    """
    pairs = zip(left, left if right is None else right, strict=True)
    return sum(torch.bmm(a, b.mT) * torch.bmm(c, d.mT) for (a, c), (b, d) in pairs)  # type: ignore[return-value]


class KernelStatistics(NamedTuple):
    """Each (N,): mean (K - K_0)^2, mean K^2, y^T K y, (y/m)^T K^-1 (y/m) (NaN where K is singular)."""

    change: Tensor
    norm: Tensor
    alignment: Tensor
    inverse_alignment: Tensor


def kernel_statistics(now: Tensor, start: Tensor, labels: Tensor) -> KernelStatistics:
    """Change of the kernel and its alignment with the labels.

    Args:
        now, start: (N, m, m) K and K_0.
        labels: (N, m).

    Returns:
        The statistics; `change` is not normalised: divide by the norm of K_0.

    Source: arXiv 2301.13703, official code (kernel_change, kernel_norm, yky, y_norm); the guard is ours.
    """
    change, norm = (now - start).square().mean((-2, -1)), now.square().mean((-2, -1))
    alignment = torch.einsum("nu,nuv,nv->n", labels, now, labels)
    return KernelStatistics(change, norm, alignment, _inverse_form(now, labels / labels.shape[-1]))


def _inverse_form(matrices: Tensor, vectors: Tensor) -> Tensor:
    """v^T K^-1 v; NaN where the smallest eigenvalue is below the rounding of K's own precision."""
    broken = ~matrices.isfinite().flatten(1).all(1)
    values, basis = torch.linalg.eigh(matrices.masked_fill(broken.view(-1, 1, 1), 0).double())
    rounding = matrices.shape[-1] * torch.finfo(matrices.dtype).eps * values[:, -1]
    parts = torch.einsum("nuk,nu->nk", basis, vectors.double()).square()
    singular = broken | (values[:, 0] <= rounding)
    return (parts / values).sum(-1).masked_fill(singular, torch.nan).to(matrices.dtype)


def loss_slopes(output: Tensor, labels: Tensor, alpha: Tensor) -> Tensor:
    """dl/do = -y [alpha o y < 1] of the hinge loss, (N, P)."""
    return -labels * (alpha.unsqueeze(-1) * output * labels < 1)


def gradient_statistics(matrix: Tensor, slopes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Signal and noise of per-sample gradients: |mean g|^2 and mean |g_mu - mean g|^2, from the kernel alone.

    Args:
        matrix: (N, m, m) K.
        slopes: (N, m) dl/do for the gradients of the loss; None for those of f.

    Returns:
        Two (N,); their ratio is the signal-to-noise ratio.

    Source: arXiv 2301.13703, official code (grad_f_norm, grad_f_var, grad_l_norm, grad_l_var).
    """
    if slopes is not None:
        matrix = matrix * slopes.unsqueeze(-1) * slopes.unsqueeze(-2)
    signal = matrix.mean((-2, -1))
    return signal, matrix.diagonal(dim1=-2, dim2=-1).mean(-1) - signal


def gradient_overlap(
    train: Tensor, test: Tensor, cross: Tensor, train_slopes: Tensor | None = None, test_slopes: Tensor | None = None
) -> Tensor:
    """Cosine between the mean gradients of training and test points.

    Args:
        train, test, cross: (N, m, m), (N, m', m'), (N, m, m') kernels.
        train_slopes, test_slopes: (N, m), (N, m') dl/do for the gradients of the loss; None for those of f.

    Returns:
        (N,); NaN when a mean gradient vanishes, as that of the loss does once all points are fitted.
    """
    ones = [torch.ones_like(cross[:, :, 0]), torch.ones_like(cross[:, 0])]
    left, right = (
        one if given is None else given for one, given in zip(ones, (train_slopes, test_slopes), strict=True)
    )
    sides = [(left, cross, right), (left, train, left), (right, test, right)]
    product, *squares = (torch.einsum("nu,nuv,nv->n", a, matrix, b) for a, matrix, b in sides)
    return product / (squares[0] * squares[1]).sqrt()


def signal_to_spread(weights: Tensor) -> Tensor:
    """lambda = w_1 / |w_perp| of perceptrons whose label is the sign of the first input.

    Args:
        weights: (N, d, 1) or w - w_0 of the same shape.

    Returns:
        (N,).

    Source: arXiv 2309.10688: lambda grows as P^(1/(1 + chi)).
    """
    return weights[:, 0, 0] / weights[:, 1:, 0].norm(dim=1)


class PerceptronObservables(NamedTuple):
    """As the official code has them, slips included, each (N,); use `signal_to_spread` for physics."""

    ampli_factor: Tensor
    first: Tensor
    first_squared: Tensor
    others_squared: Tensor
    mean_x1_unfit: Tensor


def perceptron_observables(
    weights: Tensor, start: Tensor, inputs: Tensor, labels: Tensor, alpha: Tensor
) -> PerceptronObservables:
    """The official observables of perceptrons w.x / sqrt(d).

    Args:
        weights, start: (N, d, 1) w and w_0.
        inputs: (N, P, d); labels: (N, P) in {-1, +1}; alpha: (N,).

    Returns:
        ampli_factor w_1^2 / |w_perp|^2 / (d - 1) (a slip: meant is a product with d - 1); (w - w_0)_1 and its square;
        mean over the other coordinates of (w - w_0)^2; mean of x_1 y over points with alpha y x.(w - w_0) < 1 (a slip:
        without 1 / sqrt(d)), NaN when there are none.

    Source: arXiv 2301.13703, official code.
    """
    now, moved = weights[..., 0], (weights - start)[..., 0]
    spread = now.shape[1] - 1
    factor = now[:, 0].square() / now[:, 1:].square().sum(1) / spread
    unfitted = alpha.unsqueeze(-1) * torch.einsum("npd,nd->np", inputs, moved) * labels < 1
    mean_x1 = (inputs[..., 0] * labels * unfitted).sum(-1) / unfitted.sum(-1)
    return PerceptronObservables(
        factor, moved[:, 0], moved[:, 0].square(), moved[:, 1:].square().sum(1) / spread, mean_x1
    )
