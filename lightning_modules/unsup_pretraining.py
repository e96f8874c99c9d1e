"""Unsupervised pre-training of a factor model, then least squares on few labels (arXiv 2303.01566).

Legend: d inputs, r factors, m unlabelled points, n labelled points, M values of m in one stack. The paper has theorems
and no experiment known to us; the instance is our own, and its closed forms are (derived).
"""

import math
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from callbacks.rng import make_generator

LAMBDAS = torch.logspace(-2, 5, 29, dtype=torch.float64)
"""Penalties among which the ridge baseline chooses, on the sum of squares."""
FOLDS = 5


def factor_mle(second_moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""Stage 1, maximum likelihood of N(0, W W^T + s2 I): W = V_r diag(sqrt(l_i - s2)), s2 = mean(l_{r+1} ... l_d).

    Args:
        second_moment: (..., d, d) X^T X / m, eigenvalues l_1 >= ... >= l_d.
        rank: r < d.

    Returns:
        W (..., d, r), unique up to a rotation of its columns, and s2 (...).

    Source: arXiv 2303.01566, first stage for factor models; the closed form is probabilistic PCA.
    """
    values, vectors = torch.linalg.eigh(second_moment)
    noise = values[..., :-rank].mean(-1)
    strength = (values[..., -rank:] - noise.unsqueeze(-1)).clamp_min(1e-12).sqrt()
    return vectors[..., -rank:] * strength.unsqueeze(-2), noise


def factor_nll(second_moment: Tensor, loading: Tensor, noise: Tensor) -> Tensor:
    r"""Negative log-likelihood per point, (d log 2 pi + log det C + tr(C^-1 S)) / 2, C = W W^T + s2 I, never formed.

    Args:
        second_moment: (..., d, d) S; of the true distribution for the expected one.
        loading: (..., d, r) W.
        noise: (...) s2.

    Returns:
        (...) in nats.

    Source: arXiv 2303.01566, first stage; exact Gaussian likelihood.
    """
    dim, rank = loading.shape[-2:]
    inner = _inner(loading, noise)
    log_det = (dim - rank) * noise.log() + torch.linalg.slogdet(inner).logabsdet
    explained = torch.linalg.solve(inner, loading.mT @ second_moment @ loading)
    trace = second_moment.diagonal(dim1=-2, dim2=-1).sum(-1) - explained.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (dim * math.log(2 * math.pi) + log_det + trace / noise) / 2


def feature_map(loading: Tensor, noise: Tensor) -> Tensor:
    """W (W^T W + s2 I)^-1 (..., d, r): x times it is the posterior mean of the factors."""
    return torch.linalg.solve(_inner(loading, noise), loading.mT).mT


def _inner(loading: Tensor, noise: Tensor) -> Tensor:
    """W^T W + s2 I (..., r, r)."""
    identity = torch.eye(loading.shape[-1], dtype=loading.dtype, device=loading.device)
    return loading.mT @ loading + noise[..., None, None] * identity


def stage_two(features: Tensor, inputs: Tensor, label: Tensor) -> Tensor:
    r"""Least squares of the label on x times the features, no intercept.

    Args:
        features: (..., d, r), see `feature_map`.
        inputs, label: (n, d) and (n,), n >= r.

    Returns:
        (..., d) weights on x.

    Source: arXiv 2303.01566, second stage.
    """
    coefficients = torch.linalg.pinv(inputs @ features) @ label
    return (features @ coefficients.unsqueeze(-1)).squeeze(-1)


def ridge(inputs: Tensor, label: Tensor, lambdas: Tensor) -> Tensor:
    """Minimisers of |X w - y|^2 + lam |w|^2, for each lam; (n, d), (n,), (Q,) give (Q, d)."""
    left, values, right = torch.linalg.svd(inputs, full_matrices=False)
    shrunk = values * (left.T @ label) / (values**2 + lambdas.unsqueeze(-1))
    return shrunk @ right


def cross_validated_ridge(inputs: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge at the lam of `LAMBDAS` with the least squared error over `FOLDS` folds (index mod 5): (d,) and its lam."""
    lambdas = LAMBDAS.to(inputs.device)
    fold = torch.arange(len(label), device=label.device) % FOLDS
    errors = torch.zeros_like(lambdas)
    for number in range(FOLDS):
        inside, outside = fold != number, fold == number
        weights = ridge(inputs[inside], label[inside], lambdas)
        errors += (weights @ inputs[outside].T - label[outside]).square().sum(1)
    best = errors.argmin()
    return ridge(inputs, label, lambdas[best : best + 1])[0], lambdas[best]


def input_covariance(loading: Tensor, factor_noise: float) -> Tensor:
    """Covariance B B^T + fn^2 I (d, d) of the inputs; loading (d, r) is the true B."""
    return loading @ loading.T + factor_noise**2 * torch.eye(len(loading), dtype=loading.dtype, device=loading.device)


def bayes_weights(loading: Tensor, beta: Tensor, factor_noise: float) -> Tensor:
    """B (B^T B + fn^2 I)^-1 beta (d,), the best predictor of y from x."""
    return feature_map(loading, torch.as_tensor(factor_noise**2, dtype=loading.dtype)) @ beta


def bayes_risk(weights: Tensor, covariance: Tensor, label_noise: float) -> Tensor:
    """Mean squared error 1 + ln^2 - w^T Sxx w of the best predictor (d,), for |beta| = 1."""
    return 1 + label_noise**2 - weights @ covariance @ weights


def excess_risk(weights: Tensor, best: Tensor, covariance: Tensor) -> Tensor:
    r"""(w - w_bayes)^T Sxx (w - w_bayes): exact, without a test set.

    Args:
        weights: (..., d).
        best: (d,) w_bayes.
        covariance: (d, d) of the inputs.

    Returns:
        (...) in squares of the label.

    Source: (derived) for the square loss.
    """
    gap = weights - best
    return ((gap @ covariance) * gap).sum(-1)


def subspace_error(loading: Tensor, truth: Tensor) -> Tensor:
    """||P_W - P_B||_F of the projectors on the columns of W (..., d, r) and B (d, r'), whatever the rotation of W."""
    bases = torch.linalg.qr(loading).Q, torch.linalg.qr(truth).Q
    ours, true = (basis @ basis.mT for basis in bases)
    return torch.linalg.matrix_norm(ours - true)


class UnsupPretraining(L.LightningModule):
    """Stage 1 for each number of unlabelled points, stage 2 for each number of labelled ones, beside the baselines.

    An epoch is one batch, the whole problem; fewer points are the first ones of more. Metrics, each as `excess/...` and
    its natural logarithm `log_excess/...`: `pretrain_m<m>_n<n>`; `ridge_n<n>`, on x itself, tuned by cross-validation;
    `labpca_n<n>`, both stages on the labelled points alone; `baseline_n<n>`, the better of these two; `oracle_n<n>`,
    stage 2 on the features of the true B. Also `subspace/m<m>`, `nll/m<m>` (expected, per point), `ridge_lam/n<n>`,
    `bayes_risk`. The loss is stage 1's likelihood, mean over m.

    Args:
        unlabelled, labelled: values of m and n, up to those of the data.
        rank: factors of the model.
        stage_one: exact, the closed form (an epoch suffices, and no optimizer step is made); or gradient, Adam on the
            exact likelihood from a small random start.
        lr: of Adam.
        steps_per_epoch: steps of Adam between two rows of metrics.

    Source: arXiv 2303.01566, factor models.
    """

    def __init__(
        self,
        unlabelled: list[int],
        labelled: list[int],
        rank: int = 3,
        stage_one: Literal["exact", "gradient"] = "exact",
        lr: float = 0.03,
        steps_per_epoch: int = 50,
    ) -> None:
        super().__init__()
        for name, counts in (("unlabelled", unlabelled), ("labelled", labelled)):
            if not counts or len(set(counts)) < len(counts):
                raise ValueError(f"model.{name} must be at least one number, all different, got {counts}")
        if rank < 1 or min(labelled) < rank or min(unlabelled) < 1:
            raise ValueError(
                "model.labelled must not be smaller than the latent dimension model.rank (at least 1), and "
                f"model.unlabelled at least 1, got {labelled}, {rank} and {unlabelled}"
            )
        if lr <= 0 or steps_per_epoch < 1:
            raise ValueError(
                f"model.lr must be positive and model.steps_per_epoch at least 1, got {lr} and {steps_per_epoch}"
            )
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.unlabelled, self.labelled, self.rank, self.stage_one = unlabelled, labelled, rank, stage_one
        self.lr, self.steps_per_epoch = lr, steps_per_epoch

    def setup(self, stage: str) -> None:
        """Draws the start of stage 1, the same on every rank."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "num_unlabelled"):
            raise ValueError(
                f"UnsupPretraining needs datamodules.factors.FactorModel or its like, got {type(data).__name__}"
            )
        if self.rank >= data.dim:
            raise ValueError(f"model.rank must be below data.dim {data.dim}, got {self.rank}")
        for name in ("unlabelled", "labelled"):
            largest, there = max(getattr(self, name)), getattr(data, f"num_{name}")
            if largest > there:
                raise ValueError(f"model.{name} must not exceed data.num_{name} {there}, got {largest}")
        self.factor_noise, self.label_noise = data.factor_noise, data.label_noise
        draw = torch.randn(data.dim, self.rank, generator=make_generator("start"), dtype=torch.float64)
        self.loading = nn.Parameter(0.1 * draw.repeat(len(self.unlabelled), 1, 1))
        self.log_noise = nn.Parameter(torch.zeros(len(self.unlabelled), dtype=torch.float64))

    def configure_optimizers(self) -> Any:
        """Adam, for the gradient version of stage 1; elementwise, so the values of m do not mix."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Stage 1, then stage 2 and the baselines."""
        points = batch["unlabelled"]
        moments = torch.stack([points[:m].T @ points[:m] / m for m in self.unlabelled])
        if self.stage_one == "gradient":
            self._descend(moments)
        else:
            loading, noise = factor_mle(moments, self.rank)
            self.loading.data, self.log_noise.data = loading, noise.log()
        with torch.no_grad():
            loss = factor_nll(moments, self.loading, self.log_noise.exp()).mean()
            self._evaluate(batch)
        self.log("train/loss", loss, prog_bar=True)
        return {"loss": loss}

    def _descend(self, moments: Tensor) -> None:
        optimizer: Any = self.optimizers()
        for _ in range(self.steps_per_epoch):
            optimizer.zero_grad()
            self.manual_backward(factor_nll(moments, self.loading, self.log_noise.exp()).sum())
            optimizer.step()

    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        """Logs all excess risks."""
        truth, noise = batch["loading"], self.log_noise.exp()
        covariance = input_covariance(truth, self.factor_noise)
        best = bayes_weights(truth, batch["beta"], self.factor_noise)
        features = feature_map(self.loading, noise)
        metrics = {"bayes_risk": bayes_risk(best, covariance, self.label_noise)}
        expected, subspace = factor_nll(covariance, self.loading, noise), subspace_error(self.loading, truth)
        for number, m in enumerate(self.unlabelled):
            metrics |= {f"nll/m{m}": expected[number], f"subspace/m{m}": subspace[number]}
        excess: dict[str, Tensor] = {}
        for n in self.labelled:
            inputs, label = batch["labelled"][:n], batch["label"][:n]
            weights = stage_two(features, inputs, label)
            excess |= {
                f"pretrain_m{m}_n{n}": excess_risk(weights[number], best, covariance)
                for number, m in enumerate(self.unlabelled)
            }
            others, metrics[f"ridge_lam/n{n}"] = self._others(inputs, label, truth)
            excess |= {f"{name}_n{n}": excess_risk(w, best, covariance) for name, w in others.items()}
            excess[f"baseline_n{n}"] = torch.minimum(excess[f"ridge_n{n}"], excess[f"labpca_n{n}"])
        for name, value in excess.items():
            metrics |= {f"excess/{name}": value, f"log_excess/{name}": value.log()}
        self.log_dict(metrics)

    def _others(self, inputs: Tensor, label: Tensor, truth: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Weights (d,) of the baselines and the oracle, and the ridge's lam."""
        weights, lam = cross_validated_ridge(inputs, label)
        own = feature_map(*factor_mle(inputs.T @ inputs / len(inputs), self.rank))
        oracle = feature_map(truth, torch.as_tensor(self.factor_noise**2, dtype=truth.dtype, device=truth.device))
        found = {"ridge": weights, "labpca": stage_two(own, inputs, label), "oracle": stage_two(oracle, inputs, label)}
        return found, lam
