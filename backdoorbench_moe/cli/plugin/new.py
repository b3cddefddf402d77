"""`bbmoe plugin new`: create a package to start from."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.terminal.streams import echo
from backdoorbench_moe.kinds import KINDS


@click.command("new")
@click.argument("name")
@click.option(
    "--kind", "kinds", multiple=True, metavar="KIND", help=f"{', '.join(KINDS)}; may be repeated.  [trigger]"
)
@click.option(
    "--output",
    type=PATH,
    default=Path(),
    metavar="DIR",
    help="Folder in which the package folder is created.  [.]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str, kinds: tuple[str, ...], output: Path, as_json: bool) -> None:
    """Create the package NAME, such as bbmoe-stripes, with a working example part of each --kind.

    The parts are named NAME without "bbmoe-". Existing files are not overwritten.
    """
    from backdoorbench_moe.scaffold import plan_package, write_package

    folder = write_package(plan_package(name, kinds or ("trigger",)), output)
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    steps = [
        f"pip install -e {shlex.quote(str(folder))}",
        f"bbmoe plugin check {name}",
        f"python -m pytest {shlex.quote(str(folder / 'tests'))}",
    ]
    if as_json:
        echo(json.dumps({"folder": str(folder), "files": paths, "next": steps}, indent=2))
        return
    echo(f"wrote {folder}")
    for line in paths:
        echo(f"  {line}")
    echo("next:")
    for step in steps:
        echo(f"  {step}")
