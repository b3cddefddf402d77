"""Principal components of a set of vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def principal_components(vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Project centred vectors onto their principal components.

    The eigenvectors are computed exactly, from the covariance (D, D) or the Gram matrix (N, N), whichever is smaller.
    Their signs are arbitrary. The order of the vectors changes the results only by rounding errors.

    Args:
        vectors: (N, D) floats.
        count: Largest number of components, from 1.

    Returns:
        (N, k) float64 coordinates, the component with the largest variance first; and (k, D) float64, the unit vectors
        of the directions. k is `count`, or the rank of the centred vectors if that is smaller; it can be 0.
    """
    centred = vectors.double()
    centred = centred - centred.mean(0)
    rows, columns = centred.shape
    wide = columns > rows
    products = centred @ centred.T if wide else centred.T @ centred
    squares, basis = torch.linalg.eigh(products)
    # Eigenvalues are in ascending order; those below the rounding error of the largest one count as 0.
    smallest = squares[-1:] * max(rows, columns) * torch.finfo(torch.float64).eps
    kept = min(count, int((squares > smallest).sum()))
    squares, basis = squares.flip(0)[:kept], basis.flip(1)[:, :kept]
    directions = (centred.T @ basis / squares.sqrt()).T if wide else basis.T
    return centred @ directions.T, directions
