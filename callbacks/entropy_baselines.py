"""Other entropies of the same points, against which diffusion spectral entropy is held. (n, d) float -> bits."""

from typing import Literal

import torch
from torch import Tensor

from callbacks.spectral_entropy import diffusion_matrix, eigenvalue_entropy, squared_distances


def shannon_entropy(points: Tensor, bins: int = 2) -> float:
    """Classic Shannon entropy of binned points (CSE): each feature in equal-width bins, distinct rows counted.

    Args:
        points: (n, d) float.
        bins: per feature, over its range in this sample. A constant feature goes to one bin.

    Returns:
        Bits; log2 n as soon as all rows differ, which in many dimensions they do.

    Source: arXiv 2312.04823, baseline; package dse_dsmi.
    """
    low, high = points.double().aminmax(dim=0)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=points.device)[:-1]
    scaled = ((points.double() - low) / (high - low)).nan_to_num(1.0)
    counts = torch.bucketize(scaled, edges, right=True).unique(dim=0, return_counts=True)[1]
    shares = counts.double() / len(points)
    return float(-(shares * shares.log2()).sum())


def matrix_entry_entropy(points: Tensor, sigma: float = 10.0) -> float:
    """Entropy of the entries of the row-stochastic diffusion operator D_K^-1 K. Source: package dse_dsmi."""
    kernel = diffusion_matrix(_gauss(points, sigma))
    entries = (kernel / kernel.sum(1, keepdim=True)).flatten()
    return float(eigenvalue_entropy(entries))


def adjacency_entropy(
    points: Tensor, kind: Literal["gauss", "anisotropic", "knn"], sigma: float = 10.0, neighbours: int = 10
) -> float:
    """Spectral entropy of an adjacency matrix (ASE).

    Args:
        points: (n, d) float.
        kind: `gauss` G, `anisotropic` K, `knn` the 0/1 matrix of each point's nearest neighbours, itself included, not
            made symmetric: moduli of complex eigenvalues.
        sigma: bandwidth of the first two.
        neighbours: of the last.

    Returns:
        Bits.

    Source: package dse_dsmi.
    """
    if kind == "gauss":
        return float(eigenvalue_entropy(torch.linalg.eigvalsh(_gauss(points, sigma))))
    if kind == "anisotropic":
        return float(eigenvalue_entropy(torch.linalg.eigvalsh(diffusion_matrix(_gauss(points, sigma)))))
    squared = squared_distances(points)
    adjacency = squared <= squared.kthvalue(min(neighbours, len(points)), dim=1, keepdim=True).values
    return float(eigenvalue_entropy(torch.linalg.eigvals(adjacency.double())))


def _gauss(points: Tensor, sigma: float) -> Tensor:
    return (squared_distances(points) / (-2 * sigma**2)).exp()
