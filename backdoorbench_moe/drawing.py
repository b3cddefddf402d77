"""What every figure and page shares: colours, settings of matplotlib, files of the same bytes, SVG on a page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind; the markers tell the lines apart without any colour.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, PAPER, RULE = "#1a1a1a", "#ffffff", "#d9d9d9"
LINES = tuple(f"line-{number}" for number in range(len(COLOURS)))

# What a file would say of the program and the day it was made on.
UNSAID = {"svg": ("Creator", "Date", "Format", "Type"), "png": ("Software",)}


@contextmanager
def drawing_style(salt: str) -> Iterator[None]:
    """Our own settings and nobody else's, so that every machine with the same fonts draws the same.

    salt: what the ids in an SVG are made from. Text is drawn as it is: a class may be called "$x$".
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
    """An empty figure of so many inches, without a window system and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def figure_bytes(figure: Figure, form: str, dpi: int) -> bytes:
    """A figure as "svg" (UTF-8 text) or "png", inside `drawing_style`; the same figure, the same bytes."""
    file = BytesIO()
    figure.savefig(file, format=form, metadata=dict.fromkeys(UNSAID[form]), dpi=dpi)
    return file.getvalue()


def inline_svg(svg: bytes, prefix: str, alt: str, *, style: str = "") -> str:
    """An SVG file as an element of an HTML page: its ids its own, its colours the page's, with alt text.

    The page has CSS variables --ink, --paper, --rule and --line-0, --line-1, ... for them. style: CSS of the
    element itself.
    """
    from html import escape

    text = svg.decode("utf-8")
    text = text[text.index("<svg") :]
    # The page has the one rule of that style itself.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    # Equal pictures have equal ids, to which nothing refers.
    text = re.sub(r'(<image\b[^>]*?) id="[^"]*"', r"\1", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    for colour, variable in (
        (INK, "ink"),
        (PAPER, "paper"),
        (RULE, "rule"),
        *zip(COLOURS, LINES, strict=True),
    ):
        text = text.replace(colour, f"var(--{variable})")
    size = re.match(r'<svg [^>]*?viewBox="([^"]*)"', text)
    assert size is not None
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{escape(alt)}"'
    own = f' style="{escape(style)}"' if style else ""
    return f'{head}{own} viewBox="{size[1]}"{text[text.index(">") :]}'


def render_page(template: str, **values: Any) -> str:
    """An HTML page from a jinja2 template, every value escaped unless it is markup.

    `style` in the template stands for the CSS that all our pages share: light, dark, print, small screens.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    style = (files("backdoorbench_moe") / "templates" / "page.css").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(style=Markup(style), **values)


def slug(text: str) -> str:
    """A title as part of a file name; "" of one without letters and digits."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
