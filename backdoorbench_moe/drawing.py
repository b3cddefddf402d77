"""Drawing of figures and HTML pages: colours, matplotlib settings, reproducible files, SVG inside a page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The colours of Okabe and Ito can be distinguished by colour-blind readers, the markers without any colours.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, PAPER, RULE = "#1a1a1a", "#ffffff", "#d9d9d9"
LINE_VARIABLES = tuple(f"line-{number}" for number in range(len(COLOURS)))

# Metadata that matplotlib would write by default: program and date, which would make equal figures differ.
OMITTED_METADATA = {"svg": ("Creator", "Date", "Format", "Type"), "png": ("Software",)}


@contextmanager
def drawing_style(salt: str) -> Iterator[None]:
    """Draw inside the block with fixed matplotlib settings, whatever the user's own are.

    Machines with the same fonts and versions draw the same bytes. Text is never parsed as mathematics, since a
    class may be named "$x$".

    Args:
        salt: Salt of the ids in an SVG file.
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
    """Make an empty figure, independent of any display and of pyplot's global state.

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
    """Encode a figure as an image file. Inside `drawing_style`, equal figures give equal bytes.

    Args:
        figure: The figure.
        form: "svg" (UTF-8 text) or "png".
        dpi: Resolution of a PNG file, in pixels per inch.
    """
    file = BytesIO()
    figure.savefig(file, format=form, metadata=dict.fromkeys(OMITTED_METADATA[form]), dpi=dpi)
    return file.getvalue()


def inline_svg(svg: bytes, prefix: str, alt: str, *, style: str = "") -> str:
    """Convert an SVG file to an element of an HTML page.

    Its colours are replaced with the CSS variables --ink, --paper, --rule, --line-0, --line-1, ..., which the page
    defines.

    Args:
        svg: The SVG file.
        prefix: Prefix of all ids, unique within the page.
        alt: Alternative text for readers who cannot see the figure.
        style: CSS of the element.
    """
    from html import escape

    text = svg.decode("utf-8")
    text = text[text.index("<svg") :]
    # page.css has the only rule of this style.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    # Equal images have equal ids, which must be unique on the page. Nothing refers to them.
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
        template: Text of the template. Its variable `style` is the common CSS of all pages, for light and dark
            themes, print and small screens.
        **values: The other variables; every value that is not `Markup` is escaped.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    style = (files("backdoorbench_moe") / "templates" / "page.css").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(style=Markup(style), **values)


def slug(text: str) -> str:
    """Convert a title to a part of a file name; "" for a title without letters and digits."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
