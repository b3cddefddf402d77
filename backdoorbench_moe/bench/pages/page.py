"""A suite's results as one self-contained HTML page: plots, tables, environment, commands."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

from backdoorbench_moe import data
from backdoorbench_moe.bench.suites.suite import Suite
from backdoorbench_moe.bench.tables.coverage import cell_runs, failures, missing_line, seeds_line
from backdoorbench_moe.bench.tables.layout import MetricTable, Place, build_sheet, varied_keys
from backdoorbench_moe.bench.tables.plots import alt_text, describe, draw
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.bench.tables.tidy import environments, train_seconds
from backdoorbench_moe.bench.tables.wording import (
    INTERVALS,
    counts_line,
    facts,
    heading,
    inside_word,
    key_name,
    legend_parts,
    own_text,
    paper_parts,
    span,
    suite_line,
)
from backdoorbench_moe.drawing import inline_svg, render_page
from backdoorbench_moe.wording.counting import capital

ENVIRONMENT = ("runs", "device", "precision", "threads", "torch", "python", "git commit", "dates")
# Returns the address of the record with a digest, relative to the page; None if the record cannot be reached.
Address = Callable[[str], str | None]


def page(
    results: ResultSet,
    svgs: Sequence[bytes] | None = None,
    again: Sequence[str] | None = None,
    address: Address = lambda digest: None,
) -> str:
    """Return the page as self-contained HTML: plots, tables, runs, environment, commands.

    Args:
        results: The results of the suite.
        svgs: The suite's plots as SVG files, if already drawn.
        again: The command that runs what is missing, and the one that draws the page; by default those of the suite.
        address: Returns the addresses of records, to which the seeds of every cell then link.

    Raises:
        ConfigError: A layout or plot puts two cells in one place.
    """
    template = (files("backdoorbench_moe.bench.pages") / "templates" / "suite.html").read_text(
        encoding="utf-8"
    )
    sheet, cells = build_sheet(results), list(cell_runs(results))
    return render_page(
        template,
        suite=sheet.suite,
        note=capital(sheet.suite.note),
        identity=capital(suite_line(sheet.suite)),
        counts=counts_line(sheet.counts),
        took=f"{_hours(train_seconds(results))} of training in all",
        figures=_figures(results, svgs or [draw(results, plot, "svg") for plot in results.suite.plots]),
        tables=[_table(table) for table in sheet.tables],
        legend=[*legend_parts(sheet), INTERVALS],
        missing=missing_line(cells),
        failures=failures(results),
        run_names=[key_name(key) for key in varied_keys(sheet.suite)],
        cells=[
            {
                "labels": cell.labels,
                "seeds": [(seed, address(digest)) for seed, digest in cell.finished.items()],
                "missing": seeds_line(cell.others),
            }
            for cell in cells
        ],
        facts=facts(sheet),
        environment_names=ENVIRONMENT,
        environments=[_environment(row) for row in environments(results)],
        commands=again or commands(sheet.suite),
    )


def commands(suite: Suite) -> list[str]:
    """Return the commands that run a suite and draw its results."""
    table = f"bbmoe bench table {suite_words(suite, suite.name)} --save DIR"
    return [run_command(suite, suite.name), table]


def run_command(suite: Suite, name: str, only: Sequence[str] = ()) -> str:
    """Return the command that runs a suite, or the cells that match filters; see `suite_words` and `Suite.only`."""
    rooted = any("root" in data.registry.options(cell.spec.dataset.name) for cell in suite.cells)
    filters = "".join(f" --only {shlex.quote(each)}" for each in only)
    return f"bbmoe bench run {suite_words(suite, name)}{filters}{' --data-root DIR' if rooted else ''}"


def suite_words(suite: Suite, name: str) -> str:
    """Return the arguments of a command for a suite, its scale and its number of seeds.

    Args:
        suite: The suite.
        name: Name of the suite, or path of its file.
    """
    scale = f" --scale {shlex.quote(suite.scale)}" if suite.scale else ""
    return f"{shlex.quote(name)}{scale} --repeats {suite.repeats}"


def _figures(results: ResultSet, svgs: Sequence[bytes]) -> list[dict[str, Any]]:
    from markupsafe import Markup

    figures = []
    for number, (plot, drawn) in enumerate(zip(results.suite.plots, svgs, strict=True), 1):
        alt = alt_text(results, plot)
        # The SVG is drawn by this package from numbers and escaped labels, so it is safe as markup.
        svg = Markup(inline_svg(drawn, f"p{number}", alt))
        figures.append({"title": plot.title, "svg": svg, "caption": describe(results, plot)})
    return figures


def _table(table: MetricTable) -> dict[str, Any]:
    return {
        "heading": heading(table),
        "short": heading(table, short=True),
        "key_names": [key_name(key) for key in table.row_keys],
        "columns": table.columns,
        "groups": [
            [(labels, [_place(place) for place in places]) for labels, places in group]
            for group in table.groups()
        ],
    }


def _place(place: Place) -> dict[str, Any]:
    found = place.statistic
    return {
        "state": place.state,
        "mean": own_text(place) if found or place.shape is not None else "",
        "interval": span(*found.shown) if found and found.shown else "",
        "paper": paper_parts(place)[:2],
        "word": inside_word(found) if found else "",
    }


def _environment(row: dict[str, Any]) -> list[str]:
    device = row.get("cpu", "cpu") if row.get("device") == "cpu" else row.get("device")
    packages = row.get("packages", {})
    shown = [row["runs"], device, row.get("precision"), row.get("threads")]
    shown += [packages.get("torch"), row.get("python"), row.get("git_commit"), _dates(row.get("dates"))]
    return ["–" if item is None else str(item) for item in shown]


def _dates(dates: Sequence[str] | None) -> str | None:
    """Return one day, or the first and the last."""
    return " to ".join(dict.fromkeys(dates)) if dates else None


def _hours(seconds: float) -> str:
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
