"""`bbmoe show`: print the settings and results of runs as tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.terminal.streams import echo, say
from backdoorbench_moe.errors import RecordError

if TYPE_CHECKING:
    from rich.console import Console

    from backdoorbench_moe.cli.tables.show_columns import ShownRun


@click.command("show")
@click.argument("runs", type=PATH, nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--columns",
    metavar="NAME,..",
    help="Columns to print: run, status, data, model, trigger, applicator, attack, gate, experts, poison, "
    "defense, seed, epochs, a metric such as asr, or a dotted key such as train.lr or timing.total_seconds.  "
    "[settings, others in which the runs differ, and recorded metrics]",
)
@click.option(
    "--sort",
    metavar="NAME,..",
    help="Sort by these columns; -NAME sorts from high to low.  [order of RUN...]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON.")
@click.option("--markdown", is_flag=True, help="Print one Markdown table of all runs.")
def command(
    *, runs: tuple[Path, ...], columns: str | None, sort: str | None, as_json: bool, markdown: bool
) -> None:
    """Print the settings and results of runs. RUN is a run folder, or a folder that contains run folders.

    One run is shown with its settings, metrics, history and environment. Several runs are shown in one table; values
    that all of them share are printed once above it, and columns that do not fit into the terminal in further tables
    below it. Up to four other settings in which the runs differ, such as train.lr, are columns as well.
    """
    from backdoorbench_moe.cli.tables.show import sort_runs, split_keys

    keys, order = split_keys(columns, "--columns"), split_keys(sort, "--sort")
    shown = sort_runs([each for run in runs for each in _read_runs(run)], order or [])
    if as_json:
        documents = [{**run.record.to_dict(), "status": run.status} for run in shown]
        echo(json.dumps(documents[0] if len(documents) == 1 else documents, indent=2))
        return
    from rich.console import Console

    from backdoorbench_moe.cli.tables import show as show_table
    from backdoorbench_moe.cli.tables.show_columns import choose_columns, omitted_settings

    omitted = omitted_settings(shown) if keys is None else None
    if markdown:
        echo(show_table.markdown_table(choose_columns(keys, shown, intervals=True), shown))
        if omitted:
            echo(f"\n{omitted}")
        return
    console = Console(highlight=False)
    if len(shown) == 1 and keys is None:
        _print_one(console, shown[0])
        return
    chosen = choose_columns(keys, shown, intervals=False)
    equal, chosen = ("", chosen) if keys is not None else show_table.lift_columns(chosen, shown)
    if equal:
        console.print(equal, markup=False)
    for table in show_table.build_tables(chosen, shown, console.width):
        console.print(table)
    if legend := show_table.mark_legend(chosen, shown):
        console.print(legend, markup=False)
    if omitted:
        console.print(omitted, markup=False, soft_wrap=True)
    for run in shown:
        if run.record.error:
            text = f"{run.status}: {run.folder.path}: {run.record.error}"
            console.print(text, style="red", soft_wrap=True, markup=False)


def _folders(path: Path) -> list[Path]:
    """Return the run folders in a folder; a run folder, or any other path (rejected when read), is returned itself."""
    from backdoorbench_moe.records import RunFolder

    if RunFolder(path).exists or not path.is_dir():
        return [path]
    return [inner for inner in sorted(path.iterdir()) if RunFolder(inner).exists] or [path]


def _read_runs(path: Path) -> list[ShownRun]:
    """Read a run, or the runs in a folder. Of these, damaged ones are named on stderr, and the others are returned.

    Raises:
        RecordError: No run can be read.
    """
    shown, errors = [], []
    for inner in _folders(path):
        try:
            shown.append(read_shown(inner))
        except RecordError as error:
            errors.append(error)
    if errors and not shown:
        raise errors[0]
    for damaged in errors:
        say(f"left out: {damaged}")
    return shown


def read_shown(path: Path) -> ShownRun:
    """Read a run folder. Raises RecordError."""
    from backdoorbench_moe.cli.tables.show_columns import ShownRun
    from backdoorbench_moe.records import RunFolder
    from backdoorbench_moe.records.status import status_of

    folder = RunFolder(path)
    record = folder.read()
    return ShownRun(folder, record, status_of(folder, record))


def _print_one(console: Console, run: ShownRun) -> None:
    from backdoorbench_moe.cli.tables import runs as tables

    record = run.record
    console.print(f"{run.folder.path}: {run.status}", soft_wrap=True, markup=False)
    if record.error:
        console.print(f"error: {record.error}", style="red", soft_wrap=True, markup=False)
    console.print(tables.settings_table(record))
    if record.metrics:
        tables.print_metrics(console, run.folder, record)
    if record.stages:
        tables.print_stages(console, record)
    if record.history:
        console.print(tables.history_table(record))
