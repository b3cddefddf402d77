"""`bbmoe report`: write the results of a suite to one HTML page."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import click

from backdoorbench_moe.cli.pages import save_page
from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.terminal.streams import say

DEFAULT_OUTPUT = Path("runs")


@click.command("report")
@click.argument("name", metavar="SUITE")
@click.option("--scale", metavar="NAME", help="Scale of the suite.  [the first]")
@click.option(
    "--repeats", type=int, metavar="N", help="Seeds per cell.  [the suite's; with --from, the folder's]"
)
@click.option(
    "--output",
    type=PATH,
    default=DEFAULT_OUTPUT,
    show_default=True,
    help="Folder that contains the run folders.",
)
@click.option(
    "--from", "source", type=PATH, metavar="DIR", help="Read this results folder instead of run folders."
)
@click.option(
    "--published",
    metavar="URL",
    help="URL at which the folder of --from is published, for links to records.  [relative paths]",
)
@click.option("--save", type=PATH, metavar="FILE", help="File to write.  [SUITE-SCALE.html]")
def command(
    name: str,
    scale: str | None,
    repeats: int | None,
    output: Path,
    source: Path | None,
    published: str | None,
    save: Path | None,
) -> None:
    """Write the results of SUITE (a name or a file) to one self-contained HTML page.

    The page has the suite's plots and tables with confidence intervals, the missing and failed runs, the hardware and
    versions of the finished ones, links to the records, and the commands that reproduce everything. Nothing is trained;
    if runs are missing, the command that trains them is printed.
    """
    from backdoorbench_moe.bench.pages.report import draw_report
    from backdoorbench_moe.bench.suites.reading import load_suite
    from backdoorbench_moe.bench.tables.results import with_seeds
    from backdoorbench_moe.errors import ConfigError, naming

    if published is not None and source is None:
        raise ConfigError("--published: can only be used with --from")
    if source is not None and output != DEFAULT_OUTPUT:
        raise ConfigError("--output: cannot be used with --from, which is read instead of run folders")
    suite = with_seeds(load_suite(name, scale), repeats, source)
    file = save if save is not None else Path(f"{suite.label}.html")
    options = {
        "output": output if source is None and output != DEFAULT_OUTPUT else None,
        "from": source,
        "published": published,
        "save": save,
    }
    with nullcontext() if source is None else naming("--from"):
        drawn = draw_report(suite, name, start=file.parent, runs=output, source=source, options=options)
    save_page(drawn.page, file)
    say(f"report: {file}")
    if drawn.missing:
        say(f"{suite.label}: {drawn.missing}")
