"""Mosaics: grids of heat maps and images with marked patches, drawn without resampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from backdoorbench_moe.drawing import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# CELL is the approximate side of a cell in pixels; the others are its drawn side, gaps and margins in inches. In a PNG
# file of 200 dpi, a pixel of a cell has 2x2 pixels.
CELL, SIDE, GAP, TOP, BOTTOM = 64, 0.64, 0.06, 0.24, 0.06
HEADING, SCALE = 0.24, 0.42
CHARACTER = 0.066
# Distance from the left edge of the scale to its label.
SCALE_TEXT = 1.12
MAP = "cividis"
# Grey that patches without the expert are mixed with, their weight in the mixture, and the border of taken patches.
GREY, LEFT_OF_IT, BORDER = 128, 0.22, (213, 94, 0)

Picture = np.ndarray


@dataclass(frozen=True)
class MosaicRow:
    """A row of a mosaic, or a heading if it has no cells.

    Attributes:
        label: Text to the left of the cells, or the heading.
        cells: (h, w, 4) uint8 pictures of equal size; None for an empty cell.
    """

    label: str
    cells: Sequence[Picture | None] = ()


def draw_mosaic(
    columns: Sequence[str], rows: Sequence[MosaicRow], *, scale: tuple[float, str] | None = None
) -> Figure:
    """Draw a mosaic.

    Args:
        columns: Titles of the columns.
        rows: The rows.
        scale: For heat maps, the value of the brightest colour and the name of the quantity; None to draw no scale.
    """
    longest = max((len(line) for row in rows if row.cells for line in row.label.split("\n")), default=0)
    left = 0.12 + CHARACTER * longest
    step = SIDE + GAP
    heights = [step if row.cells else HEADING for row in rows]
    foot = BOTTOM + (SCALE if scale else 0)
    least = 0.1 + CHARACTER * max((len(row.label) for row in rows if not row.cells), default=0)
    if scale:
        least = max(least, left + SCALE_TEXT + CHARACTER * len(scale[1]))
    width, height = max(left + step * len(columns), least, 3.0), TOP + sum(heights) + foot
    figure = new_figure(width, height)
    for place, name in enumerate(columns):
        _text(figure, left + place * step + SIDE / 2, height - TOP + 0.05, name, ha="center", va="bottom")
    top = height - TOP
    for row, tall in zip(rows, heights, strict=True):
        if not row.cells:
            _text(figure, 0.06, top - tall / 2, row.label, fontweight="bold")
        else:
            _text(figure, left - 0.07, top - SIDE / 2, row.label, ha="right")
            strip = _strip(row.cells)
            side = step * len(row.cells) - GAP
            axes = figure.add_axes((left / width, (top - SIDE) / height, side / width, SIDE / height))
            axes.imshow(strip, interpolation="none", aspect="auto")
            axes.set_axis_off()
        top -= tall
    if scale:
        _scale(figure, left, scale)
    return figure


def heat_map(values: Sequence[float | None], grid: tuple[int, int], most: float) -> Picture:
    """Draw the values of a grid of patches as coloured squares.

    Args:
        values: (P,) values; None is transparent.
        grid: Rows and columns of the patches.
        most: Value of the brightest colour. The darkest colour is 0.

    Returns:
        (h, w, 4) uint8.
    """
    from matplotlib import colormaps

    array = np.array([np.nan if value is None else value for value in values], dtype=float).reshape(grid)
    share = np.clip(array / most if most else array, 0, 1)
    colours = colormaps[MAP](np.nan_to_num(share), bytes=True)
    colours[..., 3] = np.where(np.isnan(array), 0, 255)
    side = round(CELL / max(grid)) or 1
    return colours.repeat(side, 0).repeat(side, 1)


def image_cell(image: Picture, grid: tuple[int, int]) -> Picture:
    """Resize an (H, W, 3) uint8 image to a cell whose patches have an integer number of pixels."""
    size = [round(CELL / places) or 1 for places in grid]
    rows, columns = (places * side for places, side in zip(grid, size, strict=True))
    height, width = image.shape[:2]
    if rows % height == 0 and columns % width == 0:
        image = image.repeat(rows // height, 0).repeat(columns // width, 1)
    else:
        image = np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BOX))
    return np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])


def mark_selected(image: Picture, selected: Sequence[Sequence[int]]) -> Picture:
    """Draw an image with frames around the selected patches and all other patches in grey.

    Args:
        image: (H, W, 3) uint8.
        selected: (rows, columns), 1 for selected patches and 0 for the others.

    Returns:
        (h, w, 4) uint8.
    """
    chosen = np.asarray(selected, dtype=bool)
    picture = image_cell(image, (chosen.shape[0], chosen.shape[1]))
    inside = _fill(chosen, picture.shape)
    colours = picture[..., :3]
    colours[~inside] = (LEFT_OF_IT * colours[~inside] + (1 - LEFT_OF_IT) * GREY).round()
    padded = np.pad(inside, 1)
    whole = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    colours[inside & ~whole] = BORDER
    return picture


def _fill(grid: Picture, shape: Sequence[int]) -> Picture:
    """Enlarge a grid to a picture of the given shape."""
    return grid.repeat(shape[0] // grid.shape[0], 0).repeat(shape[1] // grid.shape[1], 1)


def _strip(cells: Sequence[Picture | None]) -> Picture:
    """Join cells horizontally, with transparent gaps."""
    shape = next(cell.shape for cell in cells if cell is not None)
    gap = np.zeros((shape[0], max(1, round(shape[1] * GAP / SIDE)), 4), np.uint8)
    parts: list[Picture] = []
    for cell in cells:
        if parts:
            parts.append(gap)
        parts.append(np.zeros(shape, np.uint8) if cell is None else cell)
    return np.concatenate(parts, axis=1)


def _scale(figure: Figure, left: float, scale: tuple[float, str]) -> None:
    most, what = scale
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, 0.2 / height, 1.0 / width, 0.1 / height))
    axes.imshow([[step / 63 for step in range(64)]], cmap=MAP, aspect="auto", interpolation="nearest")
    axes.set_xticks([0, 63], ["0", f"{most:.2g}"], fontsize=7)
    axes.tick_params(length=0, pad=2)
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    _text(figure, left + SCALE_TEXT, 0.25, what)


def _text(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Write text at a position in inches from the lower left corner."""
    width, height = figure.get_size_inches()
    style = {"ha": "left", "va": "center", "fontsize": 8, **style}
    figure.text(x / width, y / height, text, **style)
