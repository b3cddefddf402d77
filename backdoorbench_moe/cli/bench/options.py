"""Options that several commands of `bbmoe bench` share."""

from __future__ import annotations

from pathlib import Path

import click

WITH = click.option(
    "--with",
    "beside",
    multiple=True,
    type=Path,
    metavar="DIR",
    help="A results folder, of any suite, whose runs count as finished; may be repeated.",
)
