"""Sub-gradient method for robust matrix recovery from a small start (arXiv 2202.08788).

Legend: d dimension, r true rank, R rank of the model (paper: r'), m measurements, K members trained side by side.
The theorem's step rule and the figures' settings were not available to us; what is worked out here says (derived).
"""

import math
import warnings
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from callbacks.rng import make_generator

SAFE_MARGIN = 1.0
"""Below this escape margin a warning tells that members may stay near zero."""


def symmetric(matrix: Tensor) -> Tensor:
    """(A_i + A_i^T) / 2 for (m, d, d): all that <A_i, U U^T> and its gradient see of A_i."""
    return (matrix + matrix.mT) / 2


def residuals(factor: Tensor, matrix: Tensor, value: Tensor) -> Tensor:
    """<A_i, U U^T> - y_i; factor (..., d, R), matrix (m, d, d), value (m,) give (..., m)."""
    return (factor @ factor.mT).flatten(-2) @ matrix.flatten(1).T - value


def recovery_loss(residual: Tensor, loss: Literal["l1", "l2"]) -> Tensor:
    r"""f(U) = mean_i |res_i| (l1), or the control mean_i res_i^2 / 2 (l2).

    Args:
        residual: (..., m).
        loss: which.

    Returns:
        (...) in units of the measurements (l1) or their squares (l2).

    Source: arXiv 2202.08788, the l1 loss of robust matrix recovery.
    """
    return residual.abs().mean(-1) if loss == "l1" else residual.square().mean(-1) / 2


def recovery_gradient(factor: Tensor, matrix: Tensor, value: Tensor, loss: Literal["l1", "l2"]) -> Tensor:
    r"""(Sub-)gradient 2 D U of the loss, D = sum_i c_i A_i, c_i = sign(res_i) / m (l1, sign(0) = 0) or res_i / m (l2).

    Args:
        factor: (..., d, R) U.
        matrix: (m, d, d), *symmetric* A_i, see `symmetric`.
        value: (m,) measurements.
        loss: which.

    Returns:
        (..., d, R).

    Source: arXiv 2202.08788, sub-differential of the l1 loss.
    """
    residual = residuals(factor, matrix, value)
    weight = (residual.sign() if loss == "l1" else residual) / len(value)
    direction = (weight @ matrix.flatten(1)).unflatten(-1, matrix.shape[1:])
    return 2 * direction @ factor


def relative_error(factor: Tensor, truth: Tensor) -> Tensor:
    """||U U^T - X*||_F / ||X*||_F; factor (..., d, R), truth (d, d). U itself is defined up to a rotation only."""
    return torch.linalg.matrix_norm(factor @ factor.mT - truth) / torch.linalg.matrix_norm(truth)


def sign_shrinkage(distance: Tensor, corruption: Tensor) -> Tensor:
    r"""phi = sqrt(2 / pi) mean_i exp(-s_i^2 / (2 ||Delta||_F^2)): what corruption leaves of the l1 step's length.

    Args:
        distance: (...) ||Delta||_F, Delta = U U^T - X*.
        corruption: (m,) s.

    Returns:
        (...) in [0, sqrt(2 / pi)]; outliers far larger than Delta shrink it to sqrt(2 / pi) (1 - p).

    Source: (derived) E[sign(<A, Delta> - s) A] = phi Delta / ||Delta||_F for Gaussian A.
    """
    scale = distance.unsqueeze(-1).clamp_min(torch.finfo(distance.dtype).tiny)
    return math.sqrt(2 / math.pi) * torch.exp(-((corruption / scale) ** 2) / 2).mean(-1)


def sign_rip(factor: Tensor, matrix: Tensor, truth: Tensor, corruption: Tensor) -> tuple[Tensor, Tensor]:
    r"""How far the l1 direction is from that of the ideal loss: ||M - phi Delta / ||Delta||_F ||_2 / phi.

    Args:
        factor: (..., d, R).
        matrix: (m, d, d), symmetric.
        truth: (d, d).
        corruption: (m,) s.

    Returns:
        The deviation (...) in operator norm, and phi (...).

    Source: arXiv 2202.08788, Sign-RIP; this normalisation is (derived).
    """
    delta = factor @ factor.mT - truth
    distance = torch.linalg.matrix_norm(delta)
    phi = sign_shrinkage(distance, corruption)
    deviation = sign_mean(delta, matrix, corruption) - (phi / distance)[..., None, None] * delta
    return torch.linalg.matrix_norm(deviation, ord=2) / phi, phi


def sign_mean(delta: Tensor, matrix: Tensor, corruption: Tensor) -> Tensor:
    """M = (1 / m) sum_i sign(<A_i, Delta> - s_i) A_i, (..., d, d) like delta; matrix (m, d, d), symmetric."""
    signs = (delta.flatten(-2) @ matrix.flatten(1).T - corruption).sign()
    return (signs @ matrix.flatten(1) / len(corruption)).unflatten(-1, matrix.shape[1:])


def spectral_start(matrix: Tensor, value: Tensor, rank: int) -> Tensor:
    r"""B with B B^T = PSD part of the best rank-R approximation of C = (1 / m) sum_i sign(y_i) A_i.

    Args:
        matrix: (m, d, d), symmetric.
        value: (m,) measurements.
        rank: R.

    Returns:
        (d, R); columns of eigenvalues below 0 are 0.

    Source: arXiv 2202.08788, initialisation (as remembered; golden vectors hold C and B B^T).
    """
    values, vectors = torch.linalg.eigh(sign_mean(torch.zeros_like(matrix[0]), matrix, -value))
    largest = values.abs().argsort(descending=True)[:rank]
    return vectors[:, largest] * values[largest].clamp_min(0).sqrt()


def escape_margin(truth: Tensor, rank: int, corruption: Tensor, alpha: float, lr: float, decay: float) -> float:
    r"""G - ln(1 / alpha), G = 2 phi (lam_r / ||X*||_F) lr / (1 - decay): positive if the start escapes zero.

    Args:
        truth: (d, d) X*, of rank `rank`; lam_r is its r-th eigenvalue.
        corruption: (m,) s.
        alpha: size of the start.
        lr, decay: step lengths lr * decay^t, decay < 1.

    Source: (derived) near U = 0 the truth's directions grow by 1 + 2 lr_t phi lam_k / ||X*||_F per step.
    """
    norm = torch.linalg.matrix_norm(truth)
    phi = sign_shrinkage(norm, corruption)
    smallest = torch.linalg.eigvalsh(truth)[-rank]
    return float(2 * phi * smallest / norm * lr / (1 - decay)) - math.log(1 / alpha)


class SubGM(L.LightningModule):
    """Full-batch sub-gradient descent on f(U), for every pair of a start's size and a rank, in one stack.

    An epoch is one batch, the whole problem, and makes `steps_per_epoch` steps U <- U - lr decay^t (2 D U). All
    members see the same measurements and the same start, cut to their rank and scaled by alpha. Metrics end in
    `/r<R>_a<alpha>`, as in `log10_error/r20_a1e-06`.

    Args:
        alphas: sizes of the start (paper: alpha).
        ranks: ranks of the model (paper: r'), from the true rank to d.
        lr: step length of step 0 (paper: eta_0).
        decay: factor per step (paper: rho); 1 for constant steps. 12 / (1 - decay) steps let it end.
        loss: l1, or l2 for the control.
        init: random, N(0, 1) / sqrt(d), or spectral, see `spectral_start`.
        steps_per_epoch: steps between two rows of metrics.

    Source: arXiv 2202.08788.
    """

    def __init__(
        self,
        alphas: list[float],
        ranks: list[int],
        lr: float = 0.25,
        decay: float = 0.985,
        loss: Literal["l1", "l2"] = "l1",
        init: Literal["random", "spectral"] = "random",
        steps_per_epoch: int = 40,
    ) -> None:
        super().__init__()
        if not alphas or min(alphas) <= 0:
            raise ValueError(f"model.alphas must be positive numbers, at least one, got {alphas}")
        if lr <= 0 or not 0 < decay <= 1:
            raise ValueError(f"model.lr must be positive and model.decay in (0, 1], got {lr} and {decay}")
        if steps_per_epoch < 1:
            raise ValueError(f"model.steps_per_epoch must be at least 1, got {steps_per_epoch}")
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.alphas, self.ranks = alphas, ranks
        self.lr, self.decay, self.steps_per_epoch = lr, decay, steps_per_epoch
        self.loss: Literal["l1", "l2"] = loss
        self.init = init
        self.members = [(rank, alpha) for rank in ranks for alpha in alphas]

    def setup(self, stage: str) -> None:
        """Draws the start; the same on every rank."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "problem") or "truth" not in data.problem():
            raise ValueError(
                f"SubGM needs a datamodule with problem(), got {type(data).__name__}; "
                "datamodules.measurements.MatrixMeasurements has it"
            )
        problem = data.problem()
        dim = len(problem["truth"])
        if not self.ranks or not data.rank <= min(self.ranks) <= max(self.ranks) <= dim:
            raise ValueError(f"model.ranks must lie between data.rank {data.rank} and data.dim {dim}, got {self.ranks}")
        self.true_rank = data.rank
        self.factor = nn.Parameter(self._start(problem, dim), requires_grad=True)
        self._warn(problem)

    def _start(self, problem: dict[str, Tensor], dim: int) -> Tensor:
        """(K, d, largest R) float64; columns beyond a member's rank are zero and stay so."""
        start = torch.zeros(len(self.members), dim, max(self.ranks), dtype=torch.float64)
        draw = torch.randn(dim, max(self.ranks), generator=make_generator("start"), dtype=torch.float64) / dim**0.5
        for member, (rank, alpha) in zip(start, self.members, strict=True):
            spectral = self.init == "spectral"
            shape = spectral_start(symmetric(problem["matrix"]), problem["value"], rank) if spectral else draw[:, :rank]
            member[:, :rank] = alpha * shape
        return start

    def _warn(self, problem: dict[str, Tensor]) -> None:
        if self.loss != "l1" or self.decay == 1:
            return
        margin = escape_margin(
            problem["truth"], self.true_rank, problem["corruption"], min(self.alphas), self.lr, self.decay
        )
        if margin < SAFE_MARGIN:
            warnings.warn(
                f"model.decay {self.decay} may end the steps before the smallest start escapes zero: escape margin "
                f"{margin:.2g}, should be above {SAFE_MARGIN}; raise model.decay, model.lr or min(model.alphas)",
                stacklevel=2,
            )

    def configure_optimizers(self) -> Any:
        """Plain gradient steps of length lr * decay^t."""
        optimizer = torch.optim.SGD([self.factor], lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay)]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """`steps_per_epoch` steps on the whole problem; the loss is the mean over the members after the last one."""
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        matrix = symmetric(batch["matrix"])
        with torch.no_grad():
            for _ in range(self.steps_per_epoch):
                self.factor.grad = recovery_gradient(self.factor, matrix, batch["value"], self.loss)
                optimizer.step()
                scheduler.step()
            self._log(matrix, batch)
            losses = recovery_loss(residuals(self.factor, matrix, batch["value"]), self.loss)
        self.log("train/loss", losses.mean().float(), prog_bar=True)
        return {"loss": losses.mean()}

    def _log(self, matrix: Tensor, batch: dict[str, Tensor]) -> None:
        """Each member's error, loss against the truth's, Sign-RIP, smallest true and largest spurious eigenvalue."""
        truth, corruption = batch["truth"], batch["corruption"]
        loss = recovery_loss(residuals(self.factor, matrix, batch["value"]), self.loss)
        error = relative_error(self.factor, truth)
        deviation, phi = sign_rip(self.factor, matrix, truth, corruption)
        eigenvalues = torch.linalg.svdvals(self.factor) ** 2
        # of the truth the residual is -s
        excess = loss - recovery_loss(corruption, self.loss)
        columns = {
            "error": error,
            "log10_error": error.log10(),
            "excess_loss": excess,
            "overfit": (excess < 0).double(),
            "signrip": deviation,
            "phi": phi,
            "signal": eigenvalues[:, self.true_rank - 1],
        }
        if max(self.ranks) > self.true_rank:
            columns["spurious"] = eigenvalues[:, self.true_rank]
        for name, values in columns.items():
            keys = [f"{name}/r{rank}_a{alpha:g}" for rank, alpha in self.members]
            self.log_dict(dict(zip(keys, values, strict=True)))
