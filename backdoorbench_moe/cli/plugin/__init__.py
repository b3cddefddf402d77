"""`bbmoe plugin`: write a package of new parts, and check one; one file a command."""

from __future__ import annotations

import click

from backdoorbench_moe.cli.app import LazyGroup
from backdoorbench_moe.cli.kind_names import ALL_KINDS

COMMANDS = {
    "new": "Write a package with a new part that installs and passes as it is.",
    "check": "Run the conformance tests over what an installed package registers.",
}


@click.group(
    "plugin",
    cls=LazyGroup,
    commands_help=COMMANDS,
    package=__package__,
    help=f"Add {ALL_KINDS} from a package of your own.",
)
def command() -> None:
    """Add parts from a package of your own."""
