"""`bbmoe show`: a run folder, read and checked."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command("show")
@click.argument("run", type=Path)
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
def command(run: Path, as_json: bool) -> None:
    """Print what the run folder RUN holds: settings, metrics, history, environment."""
    from backdoorbench_moe.records import RunFolder

    record = RunFolder(run).read()
    if as_json:
        click.echo(json.dumps(asdict(record), indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    from backdoorbench_moe.cli.tables import metrics_table, settings_table

    console = Console(highlight=False)
    console.print(f"{run}: {record.status}", soft_wrap=True, markup=False)
    if record.error:
        console.print(f"error: {record.error}", style="red", markup=False)
    console.print(settings_table(record))
    if record.metrics:
        console.print(metrics_table(record))
    if record.history:
        table = Table("epoch", "loss", "train accuracy %", "lr", "seconds", box=None, pad_edge=False)
        for row in record.history:
            table.add_row(
                str(row["epoch"]),
                f"{row['loss']:.4f}",
                f"{row['train_accuracy']:.2f}",
                f"{row['lr']:.4g}",
                f"{row['seconds']:.1f}",
            )
        console.print(table)
