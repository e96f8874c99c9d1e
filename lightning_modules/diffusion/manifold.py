"""Precision and recall of samples, and the inception score: what the ADM evaluator reports beside FID."""

import math

import torch
from torch import Tensor

CHUNK = 1000
"""Rows whose distances to all others are in memory at a time."""


def precision_recall(real: Tensor, made: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of samples on the manifold of the real pictures, and of real pictures on that of the samples.

    A manifold is the union of balls around its points, each as large as the distance to the k-th nearest other point.

    Args:
        real: (n, D) features.
        made: (m, D) features.
        neighbours: k.

    Raises:
        ValueError: a set has no more than k points.

    Source: arXiv 1904.06991, Eqs. 1-2; k = 3 as there and in the ADM evaluator.
    """
    if min(len(real), len(made)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} pictures, got {len(real)} and {len(made)}")
    return _share_inside(made, real, neighbours), _share_inside(real, made, neighbours)


def inception_score(logits: Tensor, split: int = 5000) -> float:
    """exp of the mean KL divergence of a sample's classes from all samples' classes, mean over parts of the samples.

    Args:
        logits: (m, C), without the classifier's bias.
        split: samples of a part; one part where there are fewer.

    Source: arXiv 1606.03498; parts as in the ADM evaluator.
    """
    scores = []
    for part in logits.double().split(min(split, len(logits))):
        log_p = part.log_softmax(1)
        log_mean = torch.logsumexp(log_p, 0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def _share_inside(points: Tensor, centres: Tensor, neighbours: int) -> float:
    """Share of the points that lie in some ball around the centres, borders included."""
    # a point is its own nearest neighbour
    radii = torch.cat([torch.cdist(part, centres).kthvalue(neighbours + 1, 1).values for part in centres.split(CHUNK)])
    inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(CHUNK)]
    return float(torch.cat(inside).double().mean())
