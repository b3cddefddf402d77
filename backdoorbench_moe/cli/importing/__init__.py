"""`bbmoe import`: models that were made elsewhere, as runs; one file a command."""

from __future__ import annotations

import click

from backdoorbench_moe.cli.app import LazyGroup

COMMANDS = {"backdoorbench": "Make a run of a result folder of BackdoorBench."}


@click.group("import", cls=LazyGroup, commands_help=COMMANDS, package=__package__)
def command() -> None:
    """Make a run folder of a model that another tool made. It is measured, and can be defended and analyzed."""
