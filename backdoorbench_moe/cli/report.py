"""`bbmoe report`: the results of a suite as one HTML page."""

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
@click.option("--scale", metavar="NAME", help="A scale of the suite.  [its first]")
@click.option("--repeats", type=int, metavar="N", help="Seeds a cell.  [the suite's]")
@click.option("--output", type=PATH, default=DEFAULT_OUTPUT, show_default=True, help="Folder of run folders.")
@click.option(
    "--from", "source", type=PATH, metavar="DIR", help="A results folder to read, instead of run folders."
)
@click.option(
    "--published",
    metavar="URL",
    help="Address of the folder of --from, for the links to records.  [paths from the page]",
)
@click.option("--save", type=PATH, metavar="FILE", help="The page to write.  [SUITE-SCALE.html]")
def command(
    name: str,
    scale: str | None,
    repeats: int | None,
    output: Path,
    source: Path | None,
    published: str | None,
    save: Path | None,
) -> None:
    """Draw what was measured for SUITE (a name or a file) as one HTML page that loads nothing from elsewhere.

    Its plots and tables with intervals, which runs are missing or failed, where the others were made, links to their
    records, and the commands that repeat all of it. Nothing is trained; if runs are missing, the command that makes
    them is printed.
    """
    from backdoorbench_moe.bench.pages.report import draw_report
    from backdoorbench_moe.bench.suites.reading import load_suite
    from backdoorbench_moe.errors import ConfigError, naming

    if published is not None and source is None:
        raise ConfigError("--published: can only be used with --from")
    if source is not None and output != DEFAULT_OUTPUT:
        raise ConfigError("--output: cannot be used with --from, which is read instead of run folders")
    suite = load_suite(name, scale)
    suite = suite if repeats is None else suite.with_repeats(repeats)
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
