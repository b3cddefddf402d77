"""Tiles against a worked table, their inverse, and what does not tile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backdoorbench_moe.errors import ShapeError
from backdoorbench_moe.ops.patches import tile, untile


def test_tiles_run_row_by_row_within_each_image() -> None:
    images = torch.arange(32.0).view(2, 1, 4, 4)
    expected = [
        [[0, 1], [4, 5]],
        [[2, 3], [6, 7]],
        [[8, 9], [12, 13]],
        [[10, 11], [14, 15]],
        [[16, 17], [20, 21]],
        [[18, 19], [22, 23]],
        [[24, 25], [28, 29]],
        [[26, 27], [30, 31]],
    ]
    assert tile(images, 2).tolist() == [[square] for square in expected]


def test_tiles_keep_channels_together_on_a_wide_image() -> None:
    images = torch.arange(12.0).view(1, 2, 2, 3)
    tiles = tile(images, 1)
    assert tiles.shape == (6, 2, 1, 1)
    assert tiles.flatten(1).tolist() == [[0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]]


@settings(deadline=None, max_examples=50)
@given(
    batch=st.integers(0, 3),
    channels=st.integers(1, 4),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    size=st.integers(1, 5),
    channels_last=st.booleans(),
)
def test_untile_undoes_tile(
    batch: int, channels: int, rows: int, columns: int, size: int, channels_last: bool
) -> None:
    images = torch.rand(batch, channels, rows * size, columns * size)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    tiles = tile(images, size)
    assert tiles.shape == (batch * rows * columns, channels, size, size)
    assert torch.equal(untile(tiles, rows * size, columns * size), images)


@settings(deadline=None, max_examples=50)
@given(row=st.integers(0, 3), column=st.integers(0, 2), size=st.integers(1, 4))
def test_a_tile_is_a_slice_of_the_image(row: int, column: int, size: int) -> None:
    images = torch.rand(2, 3, 4 * size, 3 * size)
    part = images[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
    assert torch.equal(tile(images, size)[row * 3 + column :: 12], part)


@pytest.mark.parametrize("size", [0, -4, 5, 64])
def test_a_size_that_does_not_tile_names_the_divisors(size: int) -> None:
    with pytest.raises(ShapeError, match=rf"patch_size.*32x32 \(1, 2, 4, 8, 16, 32\), got {size}"):
        tile(torch.rand(1, 3, 32, 32), size)


def test_divisors_are_those_of_both_sides() -> None:
    with pytest.raises(ShapeError, match=r"8x12 \(1, 2, 4\), got 3"):
        tile(torch.rand(1, 3, 8, 12), 3)


def test_untile_refuses_what_makes_no_whole_image() -> None:
    with pytest.raises(ShapeError, match="multiple of 4 tiles for images of 8x8, got 7"):
        untile(torch.rand(7, 3, 4, 4), 8, 8)
    with pytest.raises(ShapeError, match="square tiles"):
        untile(torch.rand(4, 3, 4, 2), 8, 8)
