"""Cutting images into tiles, and reassembling them."""

from __future__ import annotations

import math

from torch import Tensor

from backdoorbench_moe.errors import ShapeError


def tile(images: Tensor, size: int) -> Tensor:
    """Cut images into square tiles, row by row.

    Args:
        images: (B, C, H, W).
        size: Side S of a tile in pixels, a divisor of H and W.

    Returns:
        (B*P, C, S, S) with P = H/S * W/S; the P tiles of an image are consecutive. It may share memory with `images`.

    Raises:
        ShapeError: The tiles do not cover the image exactly.
    """
    batch, channels, height, width = images.shape
    rows, columns = _grid(size, height, width)
    cut = images.reshape(batch, channels, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(batch * rows * columns, channels, size, size)


def untile(tiles: Tensor, height: int, width: int) -> Tensor:
    """Reassemble tiles into images; the exact inverse of `tile`.

    Args:
        tiles: (B*P, C, S, S) as returned by `tile`.
        height: H, the height of the images.
        width: W, the width of the images.

    Returns:
        (B, C, H, W). It may share memory with `tiles`.

    Raises:
        ShapeError: The tiles are not square, or their number is not a multiple of those of an image.
    """
    count, channels, size, other = tiles.shape
    if size != other:
        raise ShapeError(f"tiles: expected square tiles (B*P, C, S, S), got {tuple(tiles.shape)}")
    rows, columns = _grid(size, height, width)
    batch, rest = divmod(count, rows * columns)
    if rest:
        raise ShapeError(
            f"tiles: expected a multiple of {rows * columns} tiles for images of {height}x{width}, got {count}"
        )
    grid = tiles.reshape(batch, rows, columns, channels, size, size).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(batch, channels, height, width)


def _grid(size: int, height: int, width: int) -> tuple[int, int]:
    """Return the numbers of rows and columns of tiles."""
    if size < 1 or height % size or width % size:
        common = math.gcd(height, width)
        divisors = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise ShapeError(f"patch_size: expected a divisor of {height}x{width} ({divisors}), got {size}")
    return height // size, width // size
