"""`bbmoe bench compare`: compare two suites or results folders."""

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
    help="Metric to compare: asr, ba, cad, ra, or STAGE.asr; may be repeated.  [those of the tables]",
)
@click.option(
    "--only", multiple=True, metavar="KEY=V[,V]", help="Use only these cells of both sides; may be repeated."
)
@click.option("--only-a", multiple=True, metavar="KEY=V[,V]", help="Use only these cells of A.")
@click.option("--only-b", multiple=True, metavar="KEY=V[,V]", help="Use only these cells of B.")
@click.option(
    "--output",
    type=PATH,
    default=Path("runs"),
    show_default=True,
    help="Folder that contains the run folders.",
)
@click.option(
    "--format", "form", type=click.Choice(FORMATS), default="rich", show_default=True, help="Output format."
)
def command(
    *,
    a: str,
    b: str,
    metrics: tuple[str, ...],
    only: tuple[str, ...],
    only_a: tuple[str, ...],
    only_b: tuple[str, ...],
    output: Path,
    form: str,
) -> None:
    """Compare A and B. Each is a suite (SUITE or SUITE:SCALE), read from --output, or a results folder.

    Cells are matched if their settings are equal, except those that differ between A and B for all cells, such as the
    scale. For each pair, prints both means, the difference B minus A and, with at least three seeds on each side, its
    95% confidence interval.

    Two parts of one suite, such as two defenses, are compared by naming it twice:

      bbmoe bench compare SUITE SUITE --only-a defenses=clp --only-b defenses=fst
    """
    from backdoorbench_moe.bench.suites.reading import check_metric
    from backdoorbench_moe.bench.tables import compare_render
    from backdoorbench_moe.bench.tables.compare import compare, default_metrics, open_side

    for metric in metrics:
        check_metric(metric, "--metric")
    sides = open_side(a, output, (*only, *only_a)), open_side(b, output, (*only, *only_b))
    comparison = compare(*sides, metrics or default_metrics(*sides))
    if form == "rich":
        from rich.console import Console

        Console(highlight=False).print(compare_render.rich_comparison(comparison))
    elif form == "markdown":
        echo(compare_render.comparison_markdown(comparison))
    else:
        echo(compare_render.comparison_csv(comparison), nl=False)
