"""Figures and HTML pages: colours, matplotlib settings, reproducible image files, and SVG inside a page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The colours of Okabe and Ito, which colour-blind readers can distinguish. Markers distinguish lines in print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, PAPER, RULE = "#1a1a1a", "#ffffff", "#d9d9d9"
LINE_VARIABLES = tuple(f"line-{number}" for number in range(len(COLOURS)))

# Metadata that matplotlib writes by default. They are omitted, since the date and the version of matplotlib would make
# files of equal figures differ.
OMITTED_METADATA = {"svg": ("Creator", "Date", "Format", "Type"), "png": ("Software",)}


@contextmanager
def drawing_style(salt: str) -> Iterator[None]:
    """Use fixed matplotlib settings inside the block, independent of the user's settings.

    With the same fonts and package versions, the files are then the same on all machines. Text is not parsed as a
    formula, since a class may be named "$x$".

    Args:
        salt: Text from which the ids in an SVG file are derived (`svg.hashsalt`).
    """
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": 9})
        matplotlib.rcParams.update({"text.parse_math": False})
        for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
            matplotlib.rcParams[key] = INK
        yield


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure without a display and without the global state of pyplot.

    Args:
        width: Width in inches.
        height: Height in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def figure_bytes(figure: Figure, form: str, dpi: int) -> bytes:
    """Return a figure as the content of an image file. Inside `drawing_style`, equal figures result in equal bytes.

    Args:
        figure: The figure.
        form: "svg" (UTF-8 text) or "png".
        dpi: Resolution of a PNG file, in pixels per inch.
    """
    file = BytesIO()
    figure.savefig(file, format=form, metadata=dict.fromkeys(OMITTED_METADATA[form]), dpi=dpi)
    return file.getvalue()


def inline_svg(svg: bytes, prefix: str, alt: str, *, style: str = "") -> str:
    """Convert an SVG file to an `<svg>` element of an HTML page.

    The colours of this module are replaced with the CSS variables --ink, --paper, --rule, --line-0, --line-1, ...
    The page must define them.

    Args:
        svg: Content of the SVG file, as returned by `figure_bytes`.
        prefix: Prefix of all ids in the element, unique within the page.
        alt: Alternative text for readers who cannot see the figure.
        style: CSS declarations for the element.
    """
    from html import escape

    text = svg.decode("utf-8")
    text = text[text.index("<svg") :]
    # Remove matplotlib's style sheet. Its only rule is also in page.css.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    # Remove the ids of embedded images: equal images have equal ids, but ids must be unique. Nothing refers to them.
    text = re.sub(r'(<image\b[^>]*?) id="[^"]*"', r"\1", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    for colour, variable in (
        (INK, "ink"),
        (PAPER, "paper"),
        (RULE, "rule"),
        *zip(COLOURS, LINE_VARIABLES, strict=True),
    ):
        text = text.replace(colour, f"var(--{variable})")
    size = re.match(r'<svg [^>]*?viewBox="([^"]*)"', text)
    assert size is not None
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{escape(alt)}"'
    own = f' style="{escape(style)}"' if style else ""
    return f'{head}{own} viewBox="{size[1]}"{text[text.index(">") :]}'


def render_page(template: str, **values: Any) -> str:
    """Render an HTML page from a jinja2 template.

    Args:
        template: Text of the template. The variable `style` contains the CSS that all pages share.
        **values: All other variables. Values that are not `Markup` are escaped.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    style = (files("backdoorbench_moe") / "templates" / "page.css").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(style=Markup(style), **values)


def slug(text: str) -> str:
    """Convert a title to lower-case ASCII letters, digits and hyphens, for a file name; "" if it has none of them."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
