"""Basis patterns of the discrete cosine transform (DCT-II)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dct_vector(size: int, index: int) -> Tensor:
    """Return one basis vector of the orthonormal DCT-II.

    Args:
        size: Number n of samples.
        index: Index k of the coefficient, in 0..n-1. The vector has k half-waves.

    Returns:
        (n,) float64 of norm 1: sqrt(2 / n) cos(pi (2 i + 1) k / (2 n)), and sqrt(1 / n) for k = 0.
    """
    steps = torch.arange(size, dtype=torch.float64)
    wave = torch.cos(math.pi * (2 * steps + 1) * index / (2 * size))
    return wave * math.sqrt((1 if index == 0 else 2) / size)


def dct_image(height: int, width: int, row: int, column: int) -> Tensor:
    """Return the image whose two-dimensional orthonormal DCT-II is 1 at one coefficient and 0 elsewhere.

    Args:
        height: H.
        width: W.
        row: Index of the coefficient along the height, in 0..H-1.
        column: Index of the coefficient along the width, in 0..W-1.

    Returns:
        (H, W) float64 of norm 1.
    """
    return torch.outer(dct_vector(height, row), dct_vector(width, column))


def smooth_field(coefficients: Tensor, height: int, width: int) -> Tensor:
    """Sum the lowest cosine waves along both axes; each wave has the same amplitude on a canvas of any size.

    A canvas gets at most as many waves along an axis as it has pixels.

    Args:
        coefficients: (C, k, k) float64, the amplitudes; element (u, v) belongs to u half-waves along the height and v
            along the width.
        height: H.
        width: W.

    Returns:
        (C, H, W) float64.
    """
    down, across = (_waves(size, coefficients.shape[-1]) for size in (height, width))
    shown = coefficients[:, : len(down), : len(across)]
    return torch.einsum("cuv,uh,vw->chw", shown, down, across)


def _waves(size: int, count: int) -> Tensor:
    """Return the first cosine waves along an axis, with amplitude 1, (min(count, size), size) float64."""
    steps = (2 * torch.arange(size, dtype=torch.float64) + 1) / (2 * size)
    return torch.cos(math.pi * torch.arange(min(count, size), dtype=torch.float64)[:, None] * steps)
