"""The tables of a suite as text, in every format that can be pasted."""

from __future__ import annotations

from typing import Literal, get_args

from backdoorbench_moe.bench.pages.page import page
from backdoorbench_moe.bench.tables import render
from backdoorbench_moe.bench.tables.layout import build_sheet
from backdoorbench_moe.bench.tables.results import ResultSet

Form = Literal["markdown", "latex", "csv", "html"]
FORMS: tuple[Form, ...] = get_args(Form)


def tables_text(results: ResultSet, form: Form, *, intervals: bool = False) -> str:
    """Return the tables of a suite as text.

    Args:
        results: The results of the suite.
        form: "markdown", "latex", "csv" (one row for each cell and metric) or "html" (the complete report).
        intervals: Whether Markdown and LaTeX tables have 95% intervals instead of standard deviations.

    Raises:
        ConfigError: A layout puts two cells in one place.
    """
    if form == "csv":
        return render.statistics_csv(results)
    if form == "html":
        return page(results)
    draw = render.markdown if form == "markdown" else render.latex
    return draw(build_sheet(results, intervals=intervals))
