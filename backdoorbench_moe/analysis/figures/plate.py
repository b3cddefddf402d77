"""Plates: drawn figures with their titles, captions and alternative texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from backdoorbench_moe.drawing import drawing_style, figure_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Doc = dict[str, Any]
Item = TypeVar("Item")

DPI = 200
# Largest numbers that are drawn. analysis.json contains all layers, experts and classes.
MAX_LAYERS, MAX_MAP_LAYERS, MAX_EXPERTS, MAX_CLASSES = 12, 3, 16, 12


@dataclass(frozen=True, repr=False)
class Plate:
    """A drawn figure with its texts.

    Attributes:
        name: File name without suffix.
        title: Title.
        sentence: Caption, which states the most important numbers.
        alt: Alternative text for readers who cannot see the figure.
        svg: Content of the SVG file.
        png: Content of the PNG file.
        width: Width in inches.
    """

    name: str
    title: str
    sentence: str
    alt: str
    svg: bytes
    png: bytes
    width: float

    def __repr__(self) -> str:
        return f"<figure {self.name}: {self.title}>"

    def _repr_svg_(self) -> str:
        return self.svg.decode("utf-8")


def make_plate(name: str, title: str, sentence: str, alt: str, make: Callable[[], Figure]) -> Plate:
    """Draw the figure that `make` returns. Equal figures result in equal bytes. See `Plate` for the texts."""
    with drawing_style(name):
        figure = make()
        svg, png = (figure_bytes(figure, form, DPI) for form in ("svg", "png"))
        width = float(figure.get_figwidth())
    return Plate(name, title, sentence, alt, svg, png, width)


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """Pick at most `most` evenly spaced items, including the first and the last one; `most` is at least 2."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def left_out(shown: int, total: int, what: str) -> str:
    """State how many of the items are drawn; "" if all of them are."""
    return (
        f" The figure shows {shown} of {total} {what}; analysis.json contains all." if shown < total else ""
    )
