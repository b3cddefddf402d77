"""`bbmoe export`: a run as files of another tool."""

from __future__ import annotations

from pathlib import Path

import click

from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.streams import echo

FORMATS = ("backdoorbench",)


@click.command("export")
@click.argument("run", type=PATH, metavar="RUN")
@click.argument("folder", type=PATH, metavar="DIR")
@click.option(
    "--format", "form", type=click.Choice(FORMATS), default=FORMATS[0], show_default=True,
    help="BackdoorBench's folder: PNG files, csv, weights, and a script that makes its pickle.",
)  # fmt: skip
@click.option("--data-root", metavar="DIR", help="Folder of the data set.  [the one of RUN]")
def command(*, run: Path, folder: Path, form: str, data_root: str | None) -> None:
    """Write the poisoned images, the weights and the numbers of the finished run in folder RUN to DIR.

    DIR must not exist or be empty. No pickle is written: BackdoorBench's users run the script in DIR to make it.
    """
    from backdoorbench_moe.engine.run import load_run
    from backdoorbench_moe.interop.exporting import write_backdoorbench

    echo(str(write_backdoorbench(load_run(run), folder, data_root=data_root)))
