"""`bbmoe show`: run folders, read and checked."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from backdoorbench_moe.cli.params import PATH


@click.command("show")
@click.argument("runs", type=PATH, nargs=-1, required=True, metavar="RUN...")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON.")
@click.option("--markdown", is_flag=True, help="Print one Markdown table of all runs.")
def command(runs: tuple[Path, ...], as_json: bool, markdown: bool) -> None:
    """Print what a run folder RUN holds: settings, metrics, history, environment; of several, one table."""
    from backdoorbench_moe.records import RunFolder

    records = [RunFolder(run).read() for run in runs]
    if as_json:
        documents = [asdict(record) for record in records]
        click.echo(json.dumps(documents[0] if len(documents) == 1 else documents, indent=2))
        return
    from rich.console import Console

    from backdoorbench_moe.cli import tables

    if markdown:
        click.echo(tables.markdown_table(records))
        return
    console = Console(highlight=False)
    if len(records) > 1:
        console.print(tables.runs_table(records))
        return
    record = records[0]
    console.print(f"{runs[0]}: {record.status}", soft_wrap=True, markup=False)
    if record.error:
        console.print(f"error: {record.error}", style="red", markup=False)
    console.print(tables.settings_table(record))
    if record.metrics:
        console.print(tables.metrics_table(record))
    if record.stages:
        tables.print_stages(console, record)
    if record.history:
        console.print(tables.history_table(record))
