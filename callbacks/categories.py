"""Categories of continuous quantities, as mutual information with them needs."""

import torch
from torch import Tensor


def equal_width_bins(values: Tensor, bins: int = 10) -> Tensor:
    """(n,) float -> (n,) int64 bins of equal width over the range, the largest value in the last. Source: dse_dsmi."""
    low, high = values.double().aminmax()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=values.device)[:-1]
    return torch.bucketize((values.double() - low) / (high - low), edges, right=True) - 1


def spectral_clusters(vectors: Tensor, num_clusters: int) -> Tensor:
    """(n, d) float -> (n,) int64 clusters of the nearest-neighbour graph (scikit-learn). Source: package dse_dsmi."""
    from sklearn.cluster import SpectralClustering

    method = SpectralClustering(
        num_clusters, affinity="nearest_neighbors", assign_labels="cluster_qr", random_state=0, n_jobs=1
    )
    return torch.from_numpy(method.fit_predict(vectors.double().cpu().numpy())).long()
