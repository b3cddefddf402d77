"""One figure of a report: its files, its title, what it says in one sentence, and in words for who cannot see it."""

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
# So many are drawn of a model that has more; all of them are in analysis.json.
MAX_LAYERS, MAX_MAP_LAYERS, MAX_EXPERTS, MAX_CLASSES = 12, 3, 16, 12


@dataclass(frozen=True, repr=False)
class Plate:
    """A figure: name, for its file; title; sentence, with its numbers; alt, for who does not see it.

    svg, png: the drawn files. width: in inches.
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
    """Draw what `make` makes; the same numbers, the same bytes."""
    with drawing_style(name):
        figure = make()
        svg, png = (figure_bytes(figure, form, DPI) for form in ("svg", "png"))
        width = float(figure.get_figwidth())
    return Plate(name, title, sentence, alt, svg, png, width)


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` items, the first and the last among them, evenly between."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def left_out(shown: int, total: int, what: str) -> str:
    """A sentence on what is not drawn; "" where all is."""
    return f" Drawn are {shown} of {total} {what}; analysis.json has all." if shown < total else ""
