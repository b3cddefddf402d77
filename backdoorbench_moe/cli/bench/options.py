"""Options that several commands of `bbmoe bench` share."""

from __future__ import annotations

import click

from backdoorbench_moe.cli.params import PATH

WITH = click.option(
    "--with",
    "beside",
    multiple=True,
    type=PATH,
    metavar="DIR",
    help="Results folder of any suite, whose runs count as finished; may be repeated.",
)
