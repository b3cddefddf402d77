"""`bbmoe bench table`: print the tables of a suite from its run folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from backdoorbench_moe.cli.bench.options import WITH
from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.terminal.streams import echo, say

if TYPE_CHECKING:
    from backdoorbench_moe.bench.tables.results import ResultSet

FORMATS = ("rich", "markdown", "csv", "latex", "html")
# Formats with both standard deviations and intervals.
WITH_INTERVALS = ("csv", "html")


@click.command("table")
@click.argument("name", metavar="SUITE")
@click.option("--scale", metavar="NAME", help="Scale of the suite.  [the first]")
@click.option(
    "--output",
    type=PATH,
    default=Path("runs"),
    show_default=True,
    help="Folder that contains the run folders.",
)
@click.option(
    "--from", "source", type=PATH, metavar="DIR", help="Read this results folder instead of run folders."
)
@WITH
@click.option(
    "--only",
    "filters",
    multiple=True,
    metavar="KEY=VALUE,..",
    help="Only cells with these settings, by spec key; may be repeated.",
)
@click.option(
    "--repeats", type=int, metavar="N", help="Seeds per cell.  [the suite's; with --from, the folder's]"
)
@click.option(
    "--format", "form", type=click.Choice(FORMATS), default="rich", show_default=True, help="Output format."
)
@click.option(
    "--intervals",
    is_flag=True,
    help="Show 95% intervals instead of standard deviations; csv and html have both.",
)
@click.option(
    "--save", type=PATH, metavar="DIR", help="Also write a results folder: records, tables, plots and a page."
)
def command(
    name: str,
    scale: str | None,
    output: Path,
    source: Path | None,
    beside: tuple[Path, ...],
    filters: tuple[str, ...],
    repeats: int | None,
    form: str,
    intervals: bool,
    save: Path | None,
) -> None:
    """Print the tables of SUITE (a name or a file) from its run folders, with the paper's values next to ours.

    Nothing is trained: unfinished runs are shown as missing. If no run is finished, the options of parts are
    checked. A results folder of another version of the suite is
    rejected.
    """
    from dataclasses import replace

    from backdoorbench_moe.bench.suites.part_options import check_options
    from backdoorbench_moe.bench.suites.reading import load_suite
    from backdoorbench_moe.bench.tables.results import ResultSet, read_known, with_seeds
    from backdoorbench_moe.errors import ConfigError

    if save is not None and filters:
        raise ConfigError(
            "--save: cannot be used with --only, as a results folder contains the complete suite"
        )
    if intervals and form in WITH_INTERVALS:
        raise ConfigError(f"--intervals: cannot be used with --format {form}, which always has them")
    if source is not None and beside:
        raise ConfigError("--with: cannot be used with --from, as it adds to run folders")
    suite = with_seeds(load_suite(name, scale), repeats, source)
    if source is not None:
        results = ResultSet.from_folder(suite, source)
    else:
        results = ResultSet.from_runs(suite, output, read_known(beside))
    if not results.finished():
        # Nothing proves that the options are valid, and a table of missing runs would hide that they are not.
        check_options(suite)
    results = replace(results, suite=suite.only(filters))
    if save is not None:
        from backdoorbench_moe.bench.save import save_results

        save_results(results, save)
    _print(results, form, intervals=intervals)
    if save is not None:
        say(f"results folder: {save}")


def _print(results: ResultSet, form: str, *, intervals: bool) -> None:
    if form == "rich":
        from rich.console import Console

        from backdoorbench_moe.bench.tables.render import rich_tables

        Console(highlight=False).print(rich_tables(results, intervals=intervals))
        return
    from backdoorbench_moe.bench.pages.texts import tables_text

    # A CSV file ends with its last row.
    echo(tables_text(results, form, intervals=intervals), nl=form != "csv")  # type: ignore[arg-type]
