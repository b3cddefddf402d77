"""`bbmoe bench compare`: two suites or results folders side by side."""

from __future__ import annotations

from pathlib import Path

import click

from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.terminal.streams import echo

FORMATS = ("rich", "markdown", "csv")


@click.command("compare")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    help="asr, ba, cad, ra, or STAGE.asr.  [the tables']",
)
@click.option("--output", type=PATH, default=Path("runs"), show_default=True, help="Folder of run folders.")
@click.option(
    "--format", "form", type=click.Choice(FORMATS), default="rich", show_default=True, help="What to print."
)
def command(a: str, b: str, metrics: tuple[str, ...], output: Path, form: str) -> None:
    """Set A and B side by side: each a suite (SUITE, or SUITE:SCALE) read from --output, or a results folder.

    Cells match if all settings are equal, apart from those in which A and B differ as a whole, such as their
    scale. Shown are both means, B minus A and, with at least three seeds on each side, its 95% interval.
    """
    from backdoorbench_moe.bench.suites.reading import check_metric
    from backdoorbench_moe.bench.tables import compare_render
    from backdoorbench_moe.bench.tables.compare import compare, default_metrics, open_side

    for metric in metrics:
        check_metric(metric, "--metric")
    sides = open_side(a, output), open_side(b, output)
    comparison = compare(*sides, metrics or default_metrics(*sides))
    if form == "rich":
        from rich.console import Console

        Console(highlight=False).print(compare_render.rich_comparison(comparison))
    elif form == "markdown":
        echo(compare_render.comparison_markdown(comparison))
    else:
        echo(compare_render.comparison_csv(comparison), nl=False)
