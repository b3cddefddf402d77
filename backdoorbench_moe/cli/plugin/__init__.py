"""`bbmoe plugin`: create or check a plug-in package; one file per command."""

from __future__ import annotations

import click

from backdoorbench_moe.cli.app import LazyGroup
from backdoorbench_moe.cli.kind_names import ALL_KINDS

COMMANDS = {
    "new": "Create a package with a working example of a new part.",
    "check": "Run the conformance tests on the parts of an installed package.",
}


@click.group(
    "plugin",
    cls=LazyGroup,
    commands_help=COMMANDS,
    package=__package__,
    help=f"Create or check a package that adds {ALL_KINDS}.",
)
def command() -> None:
    """Create or check a package that adds parts."""
