"""`bbmoe bench suites`: list the built-in suites."""

from __future__ import annotations

import click


@click.command("suites")
def command() -> None:
    """List the built-in suites: name, scales, number of cells and repeats, title."""
    from rich.console import Console
    from rich.table import Table

    from backdoorbench_moe.bench.suites.reading import list_scales, list_suites, load_suite

    table = Table("suite", "scales", "cells x repeats", "what it is", box=None, pad_edge=False)
    for name in list_suites():
        suite = load_suite(name)
        scales = ", ".join(list_scales(name)) or "–"
        table.add_row(name, scales, f"{len(suite.cells)} x {suite.repeats}", suite.title)
    Console(highlight=False).print(table)
