"""Clusters of all images' features, by k-means on the sphere, none of them empty.

Source: Caron et al., "Deep clustering for unsupervised learning of visual features" (2018), section 3.3.
"""

from __future__ import annotations

import faiss
import torch
import torch.nn.functional as F
from torch import Tensor

_ITERATIONS = 20
_ROWS = 2**16  # compared with all means at once
_APART = 1e-3  # of the halves of a cluster that is split, as a share of their length


def kmeans(rows: Tensor, clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cluster rows by cosine, with FAISS; the same rows and seed give the same clusters.

    Shapes: float32 [N, D] on the CPU, not normalised, N at least `clusters` -> means of norm 1 [clusters, D], and the
    cluster of each row int64 [N].
    """
    rows = F.normalize(rows, dim=1)
    means = faiss.Kmeans(
        rows.shape[1], clusters, niter=_ITERATIONS, seed=seed, spherical=True,
        min_points_per_centroid=1, max_points_per_centroid=len(rows),  # all rows, and no warning that they are few
    )  # fmt: skip
    means.train(rows.numpy())
    return fill_empty(F.normalize(torch.from_numpy(means.centroids), dim=1), rows)


def fill_empty(means: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Give each row its nearest mean; a mean with no row becomes a copy of the fullest one, both a little perturbed.

    Where the rows of all clusters but those of one row each are alike, empty ones stay empty.

    Shapes: means [K, D] and rows [N, D] of norm 1 -> means [K, D], cluster of each row int64 [N].
    """
    means, generator = means.clone(), torch.Generator().manual_seed(0)
    assigned = torch.cat([(part @ means.T).argmax(1) for part in rows.split(_ROWS)])
    for _ in range(len(means)):
        counts = torch.bincount(assigned, minlength=len(means))
        empty, fullest = int(counts.argmin()), int(counts.argmax())
        if counts[empty] > 0:
            break
        apart = _APART * F.normalize(torch.randn(means.shape[1], generator=generator), dim=0)
        halves = F.normalize(torch.stack([means[fullest] + apart, means[fullest] - apart]), dim=1)
        means[[empty, fullest]] = halves
        inside = (assigned == fullest).nonzero()[:, 0]
        nearer = rows[inside] @ means[empty] > rows[inside] @ means[fullest]
        assigned[inside[nearer]] = empty
    return means, assigned


def balance(assigned: Tensor, clusters: int) -> Tensor:
    """A weight of each row, mean 1, by which all clusters that have rows count alike.

    In expectation this is what drawing images uniformly over clusters gives (DeepCluster, section 3.3), and every
    image is still seen once in an epoch.

    Shapes: int64 [N] -> float32 [N].
    """
    counts = torch.bincount(assigned, minlength=clusters)
    return len(assigned) / (counts.count_nonzero() * counts[assigned]).float()
