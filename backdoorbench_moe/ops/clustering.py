"""Clustering of points: deterministic 2-means that does not depend on their order, and silhouettes."""

from __future__ import annotations

import torch
from torch import Tensor

# Initial splits along each coordinate, at these multiples of its standard deviation: in the middle, and near each end.
CUTS = (0.0, 1.5, -1.5)
MOST_STEPS = 100
# Distances that are computed at a time: 50 MB.
CHUNK_VALUES = 6_000_000


def two_means(points: Tensor) -> Tensor:
    """Split points into two clusters that minimise the sum of squared distances from the means of the clusters.

    Lloyd's algorithm starts from several splits, and the best result is returned. The splits are planes perpendicular
    to each coordinate, and one halfway to the point that is farthest from the mean, to find a few distant points.
    Unlike random starts, they do not depend on the order of the points. They suit principal components, since the best
    two clusters are nearly separated by a plane perpendicular to the first component.

    Args:
        points: (N, k) float64.

    Returns:
        (N,) bool, True for the points of the smaller cluster; all False if all points are equal.

    Source:
        Ding and He, "K-means Clustering via Principal Component Analysis", ICML 2004, for splits along components.
    """
    centred = points - points.mean(0)
    scaled = centred / centred.square().mean(0).sqrt().clamp(min=torch.finfo(points.dtype).tiny)
    sides = torch.cat([cut < scaled.T for cut in CUTS]) if points.shape[1] else scaled.T.bool()
    if not len(sides):
        return torch.zeros(len(points), dtype=torch.bool, device=points.device)
    farthest = centred[centred.square().sum(1).argmax()]
    sides = torch.cat([sides, (centred @ farthest > farthest.square().sum() / 2).unsqueeze(0)])
    for _ in range(MOST_STEPS):
        first, second, _ = _means(centred, sides)
        middle = (first.square().sum(1) - second.square().sum(1)) / 2
        moved = centred @ (first - second).T > middle
        if torch.equal(moved.T, sides):
            break
        sides = moved.T
    best = sides[between_squares(centred, sides).argmax()]
    return ~best if 2 * int(best.sum()) > len(best) else best


def between_squares(points: Tensor, sides: Tensor) -> Tensor:
    """Compute by how much two means, instead of one, reduce the sum of squared distances.

    Args:
        points: (N, k).
        sides: (S, N) bool, several ways to split the points.

    Returns:
        (S,): n m / (n + m) times the squared distance of the means of n and m points; 0 if one side is empty.
    """
    first, second, counts = _means(points, sides)
    others = len(points) - counts
    return counts * others / len(points) * (first - second).square().sum(1)


def _means(points: Tensor, sides: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the means (S, k) of both sides, 0 for an empty one, and the numbers of points (S,) on the first side."""
    inside = sides.to(points.dtype)
    counts = inside.sum(1)
    sums = inside @ points
    first = sums / counts.clamp(min=1).unsqueeze(1)
    second = (points.sum(0) - sums) / (len(points) - counts).clamp(min=1).unsqueeze(1)
    return first, second, counts


def silhouettes(points: Tensor, inside: Tensor) -> Tensor:
    """Compute the silhouette of each point, (b - a) / max(a, b).

    Here, a is the mean distance from the other points of its cluster, and b from the points of the other cluster.

    Args:
        points: (N, k).
        inside: (N,) bool, the points of one of the two clusters.

    Returns:
        (N,) in [-1, 1]; 0 for a point that is alone in its cluster, and for all points if there is only one cluster.

    Source:
        Rousseeuw, Journal of Computational and Applied Mathematics 20 (1987), 53-65.
    """
    members = torch.stack([~inside, inside], 1).to(points.dtype)
    counts = members.sum(0)
    if not counts.all():
        return points.new_zeros(len(points))
    size = max(1, CHUNK_VALUES // len(points))
    mode = "donot_use_mm_for_euclid_dist"
    sums = torch.cat([torch.cdist(part, points, compute_mode=mode) @ members for part in points.split(size)])
    own, other = inside.long().unsqueeze(1), (~inside).long().unsqueeze(1)
    near = sums.gather(1, own).squeeze(1) / (counts[own.squeeze(1)] - 1).clamp(min=1)
    far = (sums / counts).gather(1, other).squeeze(1)
    found = (far - near) / torch.maximum(near, far).clamp(min=torch.finfo(points.dtype).tiny)
    return torch.where(counts[own.squeeze(1)] > 1, found, 0.0)
